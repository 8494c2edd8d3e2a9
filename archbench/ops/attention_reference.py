"""Causal softmax attention written out: the oracle, and the quick way for bf16 on CPUs at short lengths."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def written_out(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b g s e"], v: Float[Tensor, "b g s e"]
) -> Float[Tensor, "b h t e"]:
    """Attention of the last t of s positions as two products and a softmax that hold all t x s scores."""
    groups, t, s = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    unseen = torch.full((t, s), float("-inf"), device=q.device, dtype=q.dtype).triu_(s - t + 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + unseen
    return scores.softmax(dim=-1).to(v.dtype) @ v
