"""State-space duality (SSD), the recurrence of Mamba-2: public function, operators and FLOP formulas.

    h_t = exp(step_t A) h_{t-1} + (step_t x_t) B_t'        one scalar decay a head
    y_t = h_t C_t + D x_t

At every level it is one operator, `archbench::ssd`, and its gradient another, `archbench::ssd_backward`, as in `scan`;
both work on the meta device. Computation is in fp32 (fp64 for fp64 inputs, levels reference and lean) whatever autocast
says; y has the type of x, states have the type of the computation.

FLOPs count the recurrence, a multiply-add as 2: per channel and state 1 for the input, 2 for the state, 2 for the
output. Exponentials, one a head and token, and the D skip are elementwise and counted apart (`free_flops`). These are
model FLOPs: the chunked form executes more (`chunked_flops`) and counts the same.

Source: Dao & Gu 2024 (arXiv 2405.21060), sections 3 and 6.

Letters: b batch, t time, h heads, p head width, g groups of heads that share B and C, n state size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from archbench.ops import backends, packed, ssd_chunked, ssd_cuda, ssd_native, ssd_reference
from archbench.ops.eager import eager, eager_with_gradient
from archbench.ops.precision import without_autocast

_LEVELS: dict[str, ModuleType] = {
    "reference": ssd_reference,
    "lean": ssd_chunked,
    "native": ssd_native,
    "cuda": ssd_cuda,
}
_INPUTS = "Tensor x, Tensor step, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? h0"


def ssd(
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None = None,
    h0: Float[Tensor, "b h p n"] | None = None,
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Run the recurrence over any number of tokens, also none; returns y and the state after the last token.

    Args:
        step: step sizes as they are used, 0 or more; a token with step 0 leaves the state alone.
        A: negative.
        B, C: head i reads group floor(i g / h); g divides h.
        h0: the state before the first token; zero without it.
        starts: true where a document begins, which sees nothing of what stands before it in its row (see `packed`).
        backend: a level of `backends.LEVELS`, or "auto".

    Gradients flow to all seven tensors, also through the last state.

    Raises:
        BackendError: a level was asked for that cannot run here.
        ValueError: the shapes or devices do not fit together.
    """
    inputs = (x, step, A, B, C, D, h0)
    _check(*inputs)
    if starts is not None and x.shape[1] and not x.is_meta:
        pieces = packed.cut(starts, *x.shape[:2])
        x, step, B, C = map(pieces.apart, (x, step, B, C))
        y, h_last = ssd(x, step, A, B, C, D, h0 if h0 is None else pieces.opening(h0), backend=backend)
        return pieces.together(y), pieces.closing(h_last)
    level = backends.pick("ssd", x.device, x.dtype, backend)
    if not x.is_meta:
        backends.note("ssd", level)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    y, h_last, _ = _run(*inputs, keep, level)
    return y, h_last


# ---- cost ----


def flops(n_tokens: int, d_inner: int, d_state: int) -> int:
    """Model FLOPs forward over n_tokens tokens (all rows together), d_inner = heads x head width; backward twice."""
    return 5 * n_tokens * d_inner * d_state


def free_flops(n_tokens: int, d_inner: int) -> int:
    """Elementwise work outside the recurrence that `flops` leaves out: step x and the D skip."""
    return 3 * n_tokens * d_inner


def chunked_flops(n_tokens: int, chunk: int, n_heads: int, head_dim: int, n_groups: int, d_state: int) -> int:
    """What the chunked form executes over whole chunks, masked halves included; for reports, never as model FLOPs."""
    scores = 2 * chunk * d_state * n_groups
    return n_tokens * (scores + n_heads * (2 * chunk * head_dim + 4 * d_state * head_dim))


def _forward_cost(x: Tensor, _step: object, _A: object, B: Tensor, *_: object) -> int:
    b, t, h, p = x.shape
    return flops(b * t, h * p, B.shape[3])


def _backward_cost(_gy: object, _gh: object, *inputs: Any) -> int:
    return 2 * _forward_cost(*inputs)


FORMULAS: dict[str, Callable[..., int]] = {
    "archbench::ssd": _forward_cost,
    "archbench::ssd_backward": _backward_cost,
}


# ---- operators ----


def _check(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None) -> None:
    """Native code reads memory by these shapes, so a mismatch must not get that far."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    wanted = {
        "step": (step, (b, t, h)),
        "A": (A, (h,)),
        "B": (B, (b, t, g, n)),
        "C": (C, (b, t, g, n)),
        "D": (D, (h,)),
        "h0": (h0, (b, h, p, n)),
    }
    if h % g:
        raise ValueError(f"ssd: {g} groups in B; their number must divide the {h} heads of x")
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"ssd: {name} is {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {shape}")
        if tensor.device != x.device:
            raise ValueError(f"ssd: {name} is on {tensor.device}, x on {x.device}; move them together")


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _converted(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _forward(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states that this level's backward pass needs (with `keep`)."""
    with without_autocast(x):
        inputs = _converted(_computed_in(x), x, step, A, B, C, D, h0)
        y, h_last, starts = _LEVELS[backend].forward(*inputs, keep)
    return y.to(x.dtype), h_last, starts


_ssd = torch.library.custom_op(
    "archbench::ssd",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool keep, str backend) -> (Tensor, Tensor, Tensor)",
)


@_ssd.register_fake
def _(x: Tensor, _step: Tensor, _A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep, backend = rest[-2:]
    b, t, h, p = x.shape
    n = B.shape[3]
    shape = _LEVELS[backend].starts_shape(b, t, h, p, n) if keep else (0,)
    dtype = _computed_in(x)
    return x.new_empty(b, t, h, p), x.new_empty((b, h, p, n), dtype=dtype), x.new_empty(shape, dtype=dtype)


def _backward(
    gy: Tensor | None,
    gh: Tensor | None,
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    starts: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of the seven tensors, empty where an input is None."""
    given = (x, step, A, B, C, D, h0)
    with without_autocast(x):
        inputs = _converted(_computed_in(x), gy, gh, *given)
        gradients = _LEVELS[backend].backward(*inputs, starts)
    return [
        x.new_empty(0) if tensor is None else gradient.to(tensor.dtype)
        for tensor, gradient in zip(given, gradients, strict=True)
    ]


_ssd_backward = torch.library.custom_op(
    "archbench::ssd_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? gy, Tensor? gh, {_INPUTS}, Tensor starts, str backend) -> Tensor[]",
)


@_ssd_backward.register_fake
def _(_gy: Tensor | None, _gh: Tensor | None, x: Tensor, *rest: Any) -> list[Tensor]:
    given = (x, *rest[:6])
    return [x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], output[2])
    ctx.backend = inputs[8]


_run_backward = eager(_ssd_backward, _backward)


def _differentiate(ctx: Any, gy: Tensor | None, gh: Tensor | None, _gstarts: None) -> tuple[Tensor | None, ...]:
    *given, starts = ctx.saved_tensors
    if gy is None and gh is None:
        return (None,) * 9
    gradients = _run_backward(gy, gh, *given, starts, ctx.backend)
    wanted = (gradient if tensor is not None else None for tensor, gradient in zip(given, gradients, strict=True))
    return *wanted, None, None


_ssd.register_autograd(_differentiate, setup_context=_save)
_run = eager_with_gradient(_ssd, _forward, _save, _differentiate)
