"""Causal softmax attention with its kernel levels and its FLOP formula.

    reference   scores, softmax and sum written out, in the inputs' type: the oracle
    lean        torch's fused attention, or in bf16 on a CPU at short lengths the products written out
    cuda        flash-attn, for half types on a CUDA device; probed by running it

Letters: b batch, t new positions, s all positions, h query heads, g key-value heads, e head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from archbench.ops import backends
from archbench.ops.attention_cuda import flash
from archbench.ops.attention_reference import written_out

EXPLICIT_LENGTH = 512
"""Up to this length torch's fused bf16 attention on CPUs (2.13) takes 2.5 to 4 times as long, forward and backward, as
the products written out; from 1024 on it is the faster one, as it is for fp32 at every length."""


def causal_attention(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b g s e"], v: Float[Tensor, "b g s e"], *, backend: str = "auto"
) -> Float[Tensor, "b h t e"]:
    """Softmax attention of the last t of s positions; query i sees keys up to s - t + i. Query heads share key-value
    heads in groups of h / g.

    Raises:
        BackendError: the level asked for by name cannot run here.

    Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (groups).
    """
    level = backends.pick("attention", q.device, q.dtype, backend)
    if q.device.type != "meta":
        backends.note("attention", level)
    if level == "reference":
        return written_out(q, k, v)
    if level == "cuda":
        return flash(q, k, v)
    t, s = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if t == s and 1 < t <= EXPLICIT_LENGTH and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return written_out(q, k, v)
    if t == s:
        return F.scaled_dot_product_attention(q, k, v, is_causal=t > 1, enable_gqa=grouped)
    if t == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(diagonal=s - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


def causal_attention_flops(n: int, context: int, n_heads: int, head_dim: int, causal: float) -> float:
    """Scores and weighted sum of n queries over the n new and `context` earlier positions.

    `causal` weighs the n x n square among the new positions: 0.5 counts the half below the diagonal, 1.0 all of it.
    """
    pairs = n * context + (causal * n * n if n > 1 else 1)
    return 4 * n_heads * head_dim * pairs
