"""Root-mean-square norm of rows with a gain, and its gradient written out.

    y_i = w_i s x_i                  s = 1 / sqrt(mean_i x_i^2 + eps), one a row
    dL/dx_i = s w_i g_i - s^3 x_i (sum_j w_j g_j x_j) / d
    dL/dw_i = sum over rows of s x_i g_i

The forward pass is the same at every level. Where a gradient may follow, all levels but `reference` remember x and s
and take six passes over memory for both gradients; autograd takes fifteen and remembers three tensors of x's size.
That is 1 to 3 % of a small model's training step.

Source: Zhang & Sennrich 2019, eq. 4; the gradient follows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from archbench.ops import backends
from archbench.ops.eager import watched
from archbench.ops.precision import without_autocast


def rms_norm(x: Float[Tensor, "*n d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*n d"]:
    """The norm in the type of x, computed in fp32. Except at level `reference`, its gradient cannot be differentiated
    again nor batched, it has no forward-mode derivative, and x may not be written over before the backward pass: each
    of these raises RuntimeError."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if trained and weight.dtype is torch.float32 and not (x.is_meta or backends.only_reference() or watched()):
        return _RMSNorm.apply(x, weight, eps)
    wide = x.float()
    return (wide * _scale(wide, eps) * weight).to(x.dtype)


def _scale(wide: Float[Tensor, "*n d"], eps: float) -> Float[Tensor, "*n 1"]:
    return torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


class _RMSNorm(torch.autograd.Function):
    """Inputs: x, weight in fp32, eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = _scale(wide, eps)
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():  # `create_graph`: what follows writes over what a second gradient would need
            raise RuntimeError("a norm's gradient has none itself, except at ARCHBENCH_BACKEND=reference")
        x, scale, weight = ctx.saved_tensors
        wide, grad, scale = x.float().reshape(-1, x.shape[-1]), grad.float().reshape(-1, x.shape[-1]), scale.flatten()
        with without_autocast(x):
            products = grad * wide
            of_weight = torch.mv(products.t(), scale) if ctx.needs_input_grad[1] else None
            along = torch.mv(products, weight) * scale.pow(3) / -x.shape[-1]
            of_x = torch.mul(grad, weight, out=products).mul_(scale[:, None]).addcmul_(wide, along[:, None])
        return of_x.view(x.shape).to(x.dtype), of_weight, None
