"""The selective scan of Mamba-1: public functions, operators and FLOP formulas.

    step_t = softplus(dt_t + dt_bias)
    h_t    = exp(step_t A) h_{t-1} + step_t x_t B_t
    y_t    = (sum_n C_t h_t + D x_t) silu(z_t)

At every level the scan is one operator, `archbench::selective_scan`, and its gradient another,
`archbench::selective_scan_backward`, so a dispatch mode sees two operators with a known cost instead of many small
ones, or none. Both work on the meta device. Computation is in fp32 (fp64 for fp64 inputs, levels reference and lean)
whatever autocast says; y has the type of x, states have the type of the computation.

FLOPs count the recurrence, a multiply-add as 2: dt A, dt x B, the state and the output take 6 per channel and state.
Exponentials, softplus, the gate and D are elementwise and counted apart (`free_flops`). They are model FLOPs: what a
level executes beyond them, such as recomputation, does not count.

Source: Gu & Dao 2023 (arXiv 2312.00752), sections 2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from archbench.ops import backends, packed, scan_chunked, scan_cuda, scan_native, scan_reference
from archbench.ops.eager import eager, eager_with_gradient
from archbench.ops.precision import without_autocast

_LEVELS: dict[str, ModuleType] = {
    "reference": scan_reference,
    "lean": scan_chunked,
    "native": scan_native,
    "cuda": scan_cuda,
}
_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? h0"


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b t d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    h0: Float[Tensor, "b d n"] | None = None,
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Run the scan over any number of tokens, also none; returns y and the state after the last token.

    Args:
        x, dt, z: any row stride is taken as it is, without a copy, while the last dimension is contiguous.
        dt: before softplus, which is always applied.
        A: negative.
        z: no gate without it.
        h0: the state before the first token; zero without it.
        starts: true where a document begins, which sees nothing of what stands before it in its row (see `packed`).
        backend: a level of `backends.LEVELS`, or "auto".

    Gradients flow to all nine tensors, also through the last state (at level `cuda` that raises instead).

    Raises:
        BackendError: a level was asked for that cannot run here.
        ValueError: the shapes or devices do not fit together.
    """
    inputs = (x, dt, A, B, C, D, z, dt_bias, h0)
    _check(*inputs)
    if starts is not None and x.shape[1] and not x.is_meta:
        pieces = packed.cut(starts, *x.shape[:2])
        x, dt, B, C = map(pieces.apart, (x, dt, B, C))
        z, h0 = z if z is None else pieces.apart(z), h0 if h0 is None else pieces.opening(h0)
        y, h_last = selective_scan(x, dt, A, B, C, D, z, dt_bias, h0, backend=backend)
        return pieces.together(y), pieces.closing(h_last)
    level = backends.pick("selective_scan", x.device, x.dtype, backend)
    if not x.is_meta:
        backends.note("selective_scan", level)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    y, h_last, _ = _run(*inputs, keep, level)
    return y, h_last


def selective_scan_step(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"],
    C: Float[Tensor, "b n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d n"]]:
    """The scan of one token, for decoding: y and the new state. No gradients; a few torch calls on every device."""
    return _scan_step(x, dt, A, B, C, D, z, dt_bias, h)


# ---- cost ----


def flops(n_tokens: int, d_inner: int, d_state: int) -> int:
    """Model FLOPs of a forward scan over n_tokens tokens (all rows together); backward is twice that."""
    return 6 * n_tokens * d_inner * d_state


def free_flops(n_tokens: int, d_inner: int) -> int:
    """Elementwise work outside the recurrence that `flops` leaves out: dt x and the D skip, 3 per token and channel."""
    return 3 * n_tokens * d_inner


def _forward_cost(x: Tensor, _dt: Tensor, A: Tensor, *_: object) -> int:
    return flops(x.shape[0] * x.shape[1], *A.shape)


def _backward_cost(_gy: object, _gh: object, x: Tensor, _dt: Tensor, A: Tensor, *_: object) -> int:
    return 2 * flops(x.shape[0] * x.shape[1], *A.shape)


def _step_cost(x: Tensor, _dt: Tensor, A: Tensor, *_: object) -> int:
    return flops(x.shape[0], *A.shape)


FORMULAS: dict[str, Callable[..., int]] = {
    "archbench::selective_scan": _forward_cost,
    "archbench::selective_scan_backward": _backward_cost,
    "archbench::selective_scan_step": _step_cost,
}


# ---- operators ----


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
) -> None:
    """Native code reads memory by these shapes, so a mismatch must not get that far."""
    b, t, d = x.shape
    n = A.shape[-1]
    wanted = {
        "dt": (dt, (b, t, d)),
        "A": (A, (d, n)),
        "B": (B, (b, t, n)),
        "C": (C, (b, t, n)),
        "D": (D, (d,)),
        "z": (z, (b, t, d)),
        "dt_bias": (dt_bias, (d,)),
        "h0": (h0, (b, d, n)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"selective_scan: {name} is {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {shape}"
            )
        if tensor.device != x.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, x on {x.device}; move them together")


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _converted(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _taken(backend: str, x: Tensor, dt: Tensor, *others: Tensor | None) -> list[Any]:
    """The nine inputs in the type of the computation; x, dt and z may stay bf16 where the level reads that."""
    A, B, C, D, z, dt_bias, h0 = others
    rows: list[Tensor | None] = [x, dt, z]
    if backend != "native" or any(row is not None and row.dtype is not torch.bfloat16 for row in rows):
        rows = _converted(_computed_in(x), *rows)
    return [*rows[:2], *_converted(_computed_in(x), A, B, C, D), rows[2], *_converted(_computed_in(x), dt_bias, h0)]


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states that this level's backward pass needs (with `keep`)."""
    with without_autocast(x):
        inputs = _taken(backend, x, dt, A, B, C, D, z, dt_bias, h0)
        y, h_last, starts = _LEVELS[backend].forward(*inputs, keep)
    return y.to(x.dtype), h_last, starts


_scan = torch.library.custom_op(
    "archbench::selective_scan",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool keep, str backend) -> (Tensor, Tensor, Tensor)",
)


@_scan.register_fake
def _(x: Tensor, _dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep, backend = rest[-2:]
    b, t, d = x.shape
    shape = _LEVELS[backend].starts_shape(b, t, *A.shape) if keep else (0,)
    dtype = _computed_in(x)
    return x.new_empty(b, t, d), x.new_empty((b, *A.shape), dtype=dtype), x.new_empty(shape, dtype=dtype)


def _backward(
    gy: Tensor | None,
    gh: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    starts: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of the nine tensors, empty where an input is None."""
    given = (x, dt, A, B, C, D, z, dt_bias, h0)
    with without_autocast(x):
        inputs = _taken(backend, *given)
        incoming = *_converted(inputs[0].dtype, gy), *_converted(_computed_in(x), gh)
        gradients = _LEVELS[backend].backward(*incoming, *inputs, starts)
    return [
        x.new_empty(0) if tensor is None else gradient.to(tensor.dtype)
        for tensor, gradient in zip(given, gradients, strict=True)
    ]


_scan_backward = torch.library.custom_op(
    "archbench::selective_scan_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? gy, Tensor? gh, {_INPUTS}, Tensor starts, str backend) -> Tensor[]",
)


@_scan_backward.register_fake
def _(_gy: Tensor | None, _gh: Tensor | None, x: Tensor, *rest: Any) -> list[Tensor]:
    given = (x, *rest[:8])
    return [x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no gradient through the last state must stay distinct from a zero one
    ctx.save_for_backward(*inputs[:9], output[2])
    ctx.backend = inputs[10]


_run_backward = eager(_scan_backward, _backward)


def _differentiate(ctx: Any, gy: Tensor | None, gh: Tensor | None, _gstarts: None) -> tuple[Tensor | None, ...]:
    *given, starts = ctx.saved_tensors
    if gy is None and gh is None:
        return (None,) * 11
    gradients = _run_backward(gy, gh, *given, starts, ctx.backend)
    wanted = (gradient if tensor is not None else None for tensor, gradient in zip(given, gradients, strict=True))
    return *wanted, None, None


_scan.register_autograd(_differentiate, setup_context=_save)
_run = eager_with_gradient(_scan, _forward, _save, _differentiate)


@torch.library.custom_op(
    "archbench::selective_scan_step",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor h)"
        " -> (Tensor, Tensor)"
    ),
)
def _scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = _computed_in(x)
    u = x.to(dtype)
    step = F.softplus(dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias)
    h = torch.exp_(step[:, :, None] * A).mul_(h).addcmul_((step * u)[:, :, None], B.to(dtype)[:, None, :])
    y = (h * C[:, None, :]).sum(-1)
    if D is not None:
        y.addcmul_(D, u)
    if z is not None:
        y *= F.silu(z.to(dtype))
    return y.to(x.dtype), h


@_scan_step.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    h = rest[-1]
    return x.new_empty(x.shape), h.new_empty(h.shape, dtype=_computed_in(x))
