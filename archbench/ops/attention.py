"""Causal softmax attention with its kernel levels and its FLOP formula.

    reference   scores, softmax and sum written out, in the inputs' type: the oracle
    lean        on a CPU what is quickest for the shape, see `_lean`; elsewhere torch's fused attention
    cuda        flash-attn, for half types on a CUDA device; probed by running it

Memory is linear in the number of positions at every level but the reference: no tensor of t x s scores or masks is
made, only blocks of fixed height, and up to KEPT positions the weights that the backward pass needs.

Letters: b batch, t new positions, s all positions, h query heads, g key-value heads, e head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from archbench.ops import backends
from archbench.ops.attention_blockwise import BLOCK, blockwise
from archbench.ops.attention_cuda import flash
from archbench.ops.attention_parts import in_parts
from archbench.ops.attention_reference import written_out

KEPT = 512
"""Windows up to this length keep their attention weights for the backward pass; longer ones make them anew."""

FEW = 16
"""New positions after cached ones for which a mask costs less than attending in two parts."""


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
    return _lean(q, k, v)


def _lean(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b g s e"], v: Float[Tensor, "b g s e"]
) -> Float[Tensor, "b h t e"]:
    """The way for the shape. On CPUs (torch 2.13, forward and backward together) products in blocks take 0.3 of the
    time of torch's fused kernel in bf16 at length 512 and 0.7 in fp32; 0.6 and 1.1 at 4096."""
    t, s = q.shape[2], k.shape[2]
    on_cpu = q.device.type in ("cpu", "meta")
    grouped = q.shape[1] != k.shape[1]
    if t == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if t == s and on_cpu and (t <= KEPT or q.dtype.itemsize < 4):
        return blockwise(q, k, v, keep=t <= KEPT)
    if t == s:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if on_cpu and t > FEW:
        return in_parts(q, k, v)
    return in_masked_blocks(q, k, v)


def in_masked_blocks(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b g s e"], v: Float[Tensor, "b g s e"]
) -> Float[Tensor, "b h t e"]:
    """Torch's fused attention of a block of queries and the keys up to its last; a mask has at most BLOCK rows."""
    t, s, grouped, blocks = q.shape[2], k.shape[2], q.shape[1] != k.shape[1], []
    for begin in range(0, t, BLOCK):
        end = min(begin + BLOCK, t)
        stop = s - t + end
        seen = torch.ones(end - begin, stop, dtype=torch.bool, device=q.device).tril(stop - (end - begin))
        keys, values = k[:, :, :stop], v[:, :, :stop]
        mixed = F.scaled_dot_product_attention(q[:, :, begin:end], keys, values, attn_mask=seen, enable_gqa=grouped)
        blocks.append(mixed)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def causal_attention_flops(n: int, context: int, n_heads: int, head_dim: int, causal: float) -> float:
    """Scores and weighted sum of n queries over the n new and `context` earlier positions.

    `causal` weighs the n x n square among the new positions: 0.5 counts the half below the diagonal, 1.0 all of it.
    """
    pairs = n * context + (causal * n * n if n > 1 else 1)
    return 4 * n_heads * head_dim * pairs
