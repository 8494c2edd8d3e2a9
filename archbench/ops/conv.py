"""Causal depthwise convolution followed by silu, with a window carried between calls: public functions and operators.

    pre_t = bias + sum_j weight[:, j] x_{t - w + 1 + j}        y = silu(pre)

One operator forward (`archbench::causal_conv`) and one backward at every level, as in `scan`. The window holds the last
w - 1 inputs before convolution and silu, in the type of the computation: fp32, or fp64 for fp64 inputs.

FLOPs: a multiply-add is 2, so 2 w per token and channel; silu and the bias are elementwise and not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from archbench.ops import backends, conv_native, conv_torch, packed, scan_cuda
from archbench.ops.eager import eager, eager_with_gradient


class _Level(NamedTuple):
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, ...]]


_LEVELS = {
    "reference": _Level(conv_torch.forward_reference, conv_torch.backward_reference),
    "lean": _Level(conv_torch.forward_lean, conv_torch.backward_lean),
    "native": _Level(conv_native.forward, conv_native.backward),
    "cuda": _Level(scan_cuda.conv_forward, scan_cuda.conv_backward),
}


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b v d"]]:
    """silu(conv(x)), and the window for the tokens that follow.

    Args:
        x: any number of tokens, also none; any row stride while the last dimension is contiguous.
        weight: the last column multiplies the current token.
        window: (b, w - 1, d), the inputs before x; zeros without it.
        starts: true where a document begins, which sees nothing of what stands before it in its row (see `packed`).
        backend: a level of `backends.LEVELS`, or "auto".

    Gradients flow to all four tensors, also through the window returned.

    Raises:
        BackendError: a level was asked for that cannot run here.
        ValueError: the shapes or devices do not fit together.
    """
    _check(x, weight, bias, window)
    if starts is not None and x.shape[1] and not x.is_meta:
        pieces = packed.cut(starts, *x.shape[:2])
        before = None if window is None else pieces.opening(window)
        y, window = causal_conv(pieces.apart(x), weight, bias, before, backend=backend)
        return pieces.together(y), pieces.closing(window)
    level = backends.pick("causal_conv", x.device, x.dtype, backend)
    if not x.is_meta:
        backends.note("causal_conv", level)
    return _run(x, weight, bias, window, level)


def causal_conv_step(
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"],
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b v d"]]:
    """The convolution of one token, for decoding: y and the new window. No gradients; a few torch calls anywhere."""
    return _conv_step(x, weight, bias, window)


# ---- cost ----


def flops(n_tokens: int, d_inner: int, width: int) -> int:
    """Model FLOPs of the forward convolution over n_tokens tokens (all rows together); backward is twice that."""
    return 2 * n_tokens * d_inner * width


def _forward_cost(x: Tensor, weight: Tensor, *_: object) -> int:
    return flops(x.shape[0] * x.shape[1], *weight.shape)


def _backward_cost(_gy: object, _gwindow: object, x: Tensor, weight: Tensor, *_: object) -> int:
    return 2 * flops(x.shape[0] * x.shape[1], *weight.shape)


def _step_cost(x: Tensor, weight: Tensor, *_: object) -> int:
    return flops(x.shape[0], *weight.shape)


FORMULAS: dict[str, Callable[..., int]] = {
    "archbench::causal_conv": _forward_cost,
    "archbench::causal_conv_backward": _backward_cost,
    "archbench::causal_conv_step": _step_cost,
}


# ---- operators ----


def _check(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None) -> None:
    """Native code reads memory by these shapes, so a mismatch must not get that far."""
    b, _, d = x.shape
    width = weight.shape[-1]
    wanted = {"weight": (weight, (d, width)), "bias": (bias, (d,)), "window": (window, (b, width - 1, d))}
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"causal_conv: {name} is {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {shape}"
            )
        if tensor.device != x.device:
            raise ValueError(f"causal_conv: {name} is on {tensor.device}, x on {x.device}; move them together")


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _taken_in(x: Tensor, backend: str) -> torch.dtype:
    """The type in which a level takes x and the gradient of y."""
    return x.dtype if backend == "native" and x.dtype is torch.bfloat16 else _computed_in(x)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    dtype = _computed_in(x)
    n_kept, n_tokens = weight.shape[1] - 1, x.shape[1]
    before = None if window is None else window.to(dtype)
    y = _LEVELS[backend].forward(x.to(_taken_in(x, backend)), weight.to(dtype), bias.to(dtype), before)
    if n_tokens >= n_kept:
        kept = x[:, n_tokens - n_kept :].to(dtype, copy=True)
    else:
        # A copy even where the slice is contiguous: a view would keep the whole padded tensor alive in the state.
        tail = conv_torch.padded(x.to(dtype), before, weight.shape[1])[:, n_tokens:]
        kept = tail.clone(memory_format=torch.contiguous_format)
    return y.to(x.dtype), kept


_conv = torch.library.custom_op(
    "archbench::causal_conv",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? window, str backend) -> (Tensor, Tensor)",
)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, t, d = x.shape
    return x.new_empty(b, t, d), x.new_empty(b, weight.shape[1] - 1, d, dtype=_computed_in(x))


def _backward(
    gy: Tensor | None,
    gwindow: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, weight, bias and window (empty without one). gwindow is the gradient of the window returned."""
    dtype = _computed_in(x)
    # Two gradients meet in the last rows of x where the window has one: their sum is what is rounded.
    taken_in = _taken_in(x, backend) if gwindow is None else dtype
    gy = torch.zeros_like(x, dtype=taken_in) if gy is None else gy.to(taken_in)
    before = None if window is None else window.to(dtype)
    inputs = (x.to(taken_in), weight.to(dtype), bias.to(dtype), before)
    gx, gweight, gbias, gbefore = _LEVELS[backend].backward(gy, *inputs)
    assert gx is not None and gweight is not None and gbias is not None
    if gwindow is not None:
        n_kept, n_tokens = weight.shape[1] - 1, x.shape[1]
        from_x = min(n_tokens, n_kept)
        gx[:, n_tokens - from_x :] += gwindow[:, n_kept - from_x :]
        if gbefore is not None:
            gbefore[:, from_x:] += gwindow[:, : n_kept - from_x]
    gradients = [gx.to(x.dtype), gweight.to(weight.dtype), gbias.to(bias.dtype)]
    return [*gradients, x.new_empty(0) if window is None or gbefore is None else gbefore.to(window.dtype)]


_conv_backward = torch.library.custom_op(
    "archbench::causal_conv_backward",
    _backward,
    mutates_args=(),
    schema=(
        "(Tensor? gy, Tensor? gwindow, Tensor x, Tensor weight, Tensor bias, Tensor? window, str backend) -> Tensor[]"
    ),
)


@_conv_backward.register_fake
def _(
    _gy: Tensor | None,
    _gwindow: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None,
    _backend: str,
) -> list[Tensor]:
    last = x.new_empty(0) if window is None else window.new_empty(window.shape)
    return [*(tensor.new_empty(tensor.shape) for tensor in (x, weight, bias)), last]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.backend = inputs[4]


_run_backward = eager(_conv_backward, _backward)


def _differentiate(ctx: Any, gy: Tensor | None, gwindow: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, window = ctx.saved_tensors
    if gy is None and gwindow is None:
        return (None,) * 5
    gx, gweight, gbias, gbefore = _run_backward(gy, gwindow, x, weight, bias, window, ctx.backend)
    return gx, gweight, gbias, None if window is None else gbefore, None


_conv.register_autograd(_differentiate, setup_context=_save)
_run = eager_with_gradient(_conv, _forward, _save, _differentiate)


@torch.library.custom_op(
    "archbench::causal_conv_step",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor window) -> (Tensor, Tensor)",
)
def _conv_step(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _computed_in(x)
    whole = torch.cat((window, x[:, None]), 1).to(dtype)
    y = F.silu((whole * weight.t()).sum(1).add_(bias), inplace=True)
    return y.to(x.dtype), whole[:, 1:].clone()


@_conv_step.register_fake
def _(x: Tensor, _weight: Tensor, _bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), window.new_empty(window.shape, dtype=_computed_in(x))
