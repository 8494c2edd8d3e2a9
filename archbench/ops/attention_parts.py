"""Causal softmax attention of new positions after cached ones, on CPUs, in memory linear in their number.

Torch's fused CPU kernel takes a causal mask only over a square, and any other mask as t x s values. So the earlier
positions, which every query sees, and the new ones, a causal square, are attended to apart. Each part comes with the
logarithm L of its softmax's denominator, and the two are one softmax over all positions:

    L = log(exp L_1 + exp L_2)        O = exp(L_1 - L) O_1 + exp(L_2 - L) O_2

Backward, the kernel makes the weights of a part anew as exp(S - L); given the L and O of the whole it returns that
part's share of the exact gradients.

Source: Dao et al. 2022 (FlashAttention), section 3.1 and algorithm 4.

Letters: b batch, t new positions, p earlier ones, s = p + t, h query heads, g key-value heads, r = h / g, e head width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def in_parts(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b g s e"], v: Float[Tensor, "b g s e"]
) -> Float[Tensor, "b h t e"]:
    """Attention of the last t of s > t positions, in the queries' type."""
    return _InParts.apply(_dense(q), _dense(k.to(q.dtype)), _dense(v.to(q.dtype)))


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past, groups, n_heads = k.shape[2] - q.shape[2], k.shape[1], q.shape[1]
        earlier, of_earlier = _FORWARD(_stacked(q, groups), k[:, :, :past], v[:, :, :past])
        earlier, of_earlier = _unstacked(earlier, n_heads), of_earlier.reshape(q.shape[:3])
        own, of_own = _FORWARD(q, _shared(k[:, :, past:], n_heads), _shared(v[:, :, past:], n_heads), is_causal=True)
        whole = torch.logaddexp(of_earlier, of_own)
        out = torch.lerp(own, earlier, (of_earlier - whole).exp().unsqueeze(-1).to(own.dtype))
        ctx.save_for_backward(q, k, v, out, whole)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, whole = ctx.saved_tensors
        past, groups, n_heads = k.shape[2] - q.shape[2], k.shape[1], q.shape[1]
        grad = _dense(grad)
        stacked = [_stacked(x, groups) for x in (grad, q, out)]
        earlier = _BACKWARD(
            stacked[0], stacked[1], k[:, :, :past], v[:, :, :past], stacked[2],
            whole.reshape(stacked[1].shape[:3]), 0.0, False,
        )  # fmt: skip
        keys, values = _shared(k[:, :, past:], n_heads), _shared(v[:, :, past:], n_heads)
        own = _BACKWARD(grad, q, keys, values, out, whole, 0.0, True)
        of_k, of_v = (
            torch.cat([before, _summed(here, groups)], dim=2) for before, here in zip(earlier[1:], own[1:], strict=True)
        )
        return _unstacked(earlier[0], n_heads) + own[0], of_k, of_v


def _dense(x: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
    """The kernel reads e neighbouring numbers whatever the last stride says."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _stacked(x: Float[Tensor, "b h t e"], groups: int) -> Float[Tensor, "b g n e"]:
    """The heads that share keys and values as n = r t rows of one head: where nothing is masked, rows are all alike."""
    b, h, t, e = x.shape
    return x if h == groups else x.reshape(b, groups, h // groups * t, e)


def _unstacked(x: Float[Tensor, "b g n e"], n_heads: int) -> Float[Tensor, "b h t e"]:
    b, g, n, e = x.shape
    return x if g == n_heads else x.reshape(b, n_heads, g * n // n_heads, e)


def _shared(x: Float[Tensor, "b g t e"], n_heads: int) -> Float[Tensor, "b h t e"]:
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def _summed(x: Float[Tensor, "b h t e"], groups: int) -> Float[Tensor, "b g t e"]:
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(dim=2)
