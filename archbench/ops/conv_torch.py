"""Causal depthwise convolution followed by silu in plain torch: the levels `reference` and `lean`.

    pre_t = bias + sum_j weight[:, j] x_{t - w + 1 + j}        y = silu(pre)

The last column of `weight` multiplies the current token. Before the first token stands the window, or zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def padded(x: Float[Tensor, "b t d"], window: Float[Tensor, "b v d"] | None, width: int) -> Float[Tensor, "b u d"]:
    """The window, or zeros, followed by x: u = w - 1 + t tokens."""
    if window is None:
        window = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    return torch.cat((window, x), 1)


def forward_reference(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> Float[Tensor, "b t d"]:
    """One output token at a time."""
    whole, width = padded(x, window, weight.shape[1]), weight.shape[1]
    outputs = [bias + (whole[:, t : t + width] * weight.t()).sum(1) for t in range(x.shape[1])]
    return F.silu(torch.stack(outputs, 1)) if outputs else torch.zeros_like(x)


def backward_reference(
    gy: Float[Tensor, "b t d"],
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, window (None without one), one output token at a time."""
    whole, width = padded(x, window, weight.shape[1]), weight.shape[1]
    gwhole, gweight, gbias = torch.zeros_like(whole), torch.zeros_like(weight), torch.zeros_like(bias)
    for t in range(x.shape[1]):
        seen = whole[:, t : t + width]
        pre = bias + (seen * weight.t()).sum(1)
        s = torch.sigmoid(pre)
        gpre = gy[:, t] * s * (1 + pre * (1 - s))
        gwhole[:, t : t + width] += gpre[:, None] * weight.t()
        gweight += (gpre[:, None] * seen).sum(0).t()
        gbias += gpre.sum(0)
    return _split(gwhole, gweight, gbias, window, width)


def forward_lean(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> Float[Tensor, "b t d"]:
    """One shifted multiply-add per weight: faster than a grouped conv1d, which wants the channels before the tokens."""
    pre = _before_silu(padded(x, window, weight.shape[1]), weight, bias, x.shape[1])
    return F.silu(pre, inplace=True)


def backward_lean(
    gy: Float[Tensor, "b t d"],
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, window (None without one)."""
    width, n_tokens = weight.shape[1], x.shape[1]
    whole = padded(x, window, width)
    pre = _before_silu(whole, weight, bias, n_tokens)
    s = torch.sigmoid(pre)
    gpre = gy * s * (1 + pre * (1 - s))
    gwhole, gweight = torch.zeros_like(whole), torch.empty_like(weight)
    for j in range(width):
        gwhole[:, j : j + n_tokens].addcmul_(gpre, weight[:, j])
        gweight[:, j] = (gpre * whole[:, j : j + n_tokens]).sum((0, 1))
    return _split(gwhole, gweight, gpre.sum((0, 1)), window, width)


def _before_silu(whole: Tensor, weight: Tensor, bias: Tensor, n_tokens: int) -> Tensor:
    pre = torch.addcmul(bias, whole[:, :n_tokens], weight[:, 0])
    for j in range(1, weight.shape[1]):
        pre.addcmul_(whole[:, j : j + n_tokens], weight[:, j])
    return pre


def _split(
    gwhole: Tensor, gweight: Tensor, gbias: Tensor, window: Tensor | None, width: int
) -> tuple[Tensor | None, ...]:
    gwindow = None if window is None else gwhole[:, : width - 1].clone()
    return gwhole[:, width - 1 :].contiguous(), gweight, gbias, gwindow
