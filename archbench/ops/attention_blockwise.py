"""Causal softmax attention as matrix products, a block of queries at a time: the quick way on CPUs in training.

    S_i = Q_i K_{<=i}^T / sqrt(e)      P_i = softmax(S_i)      O_i = P_i V_{<=i}                       for block i

A block of BLOCK queries meets the keys up to its own last one, so a mask is needed in its last square only and the
upper half of the scores is never made. Backward, with G_i the gradient of O_i:

    dV += P_i^T G_i     dS_i = softmax'(P_i, G_i V^T)     dQ_i = dS_i K / sqrt(e)     dK += dS_i^T Q_i / sqrt(e)

The weights P_i are kept for the backward pass (as many as half the scores) or made anew there; then no tensor is larger
than BLOCK x s a head, and memory grows with the length, not with its square.

Forward and backward are one operator each, so that FLOPs are counted by formula, as those of a causal model.

Letters: b batch, t new positions, s all positions, h query heads, g key-value heads, r = h / g, e head width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries of a block. Smaller blocks waste fewer scores above the diagonal, larger ones fill the matrix products."""


def blockwise(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b g s e"], v: Float[Tensor, "b g s e"], *, keep: bool
) -> Float[Tensor, "b h t e"]:
    """Attention of the last t of s positions, in the inputs' type. `keep`: hold the weights for the backward pass."""
    keep = keep and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _Blockwise.apply(q, k.to(q.dtype), v.to(q.dtype), keep)


def _blocks(t: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + BLOCK, t)) for begin in range(0, t, BLOCK)]


def _unseen(q: Tensor) -> Float[Tensor, "n n"]:
    """Added to the scores of a block and its own keys: minus infinity above the diagonal."""
    n = min(BLOCK, q.shape[2])
    return q.new_full((n, n), float("-inf")).triu_(1)


def _grouped(x: Float[Tensor, "b h t e"], groups: int) -> Float[Tensor, "x r t e"]:
    """Query heads beside those that share their key-value head, batch and key-value heads as one dimension."""
    b, h, t, e = x.shape
    return x.reshape(b * groups, h // groups, t, e)


def _rows(x: Float[Tensor, "x r t e"], begin: int, end: int) -> Float[Tensor, "x n e"]:
    """A block of all heads of a group, one under the other."""
    return x[:, :, begin:end].reshape(x.shape[0], -1, x.shape[-1])


def _weights(
    queries: Float[Tensor, "x n e"], keys: Float[Tensor, "x s e"], unseen: Float[Tensor, "m m"]
) -> Float[Tensor, "x n s"]:
    """Softmax of the scaled queries of a block (n = r m rows) and all keys up to its last."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    m, s = len(unseen), keys.shape[1]
    scores.view(len(scores), -1, m, s)[..., s - m :].add_(unseen)
    return scores.softmax(dim=-1)


def _attention(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    groups, past, unseen = k.shape[1], k.shape[2] - q.shape[2], _unseen(q)
    queries, keys, values = _grouped(q, groups) * q.shape[-1] ** -0.5, k.flatten(0, 1), v.flatten(0, 1)
    out, kept = torch.empty_like(queries, memory_format=torch.contiguous_format), []
    for begin, end in _blocks(q.shape[2]):
        square = unseen[: end - begin, : end - begin]
        weights = _weights(_rows(queries, begin, end), keys[:, : past + end], square)
        mixed = torch.bmm(weights, values[:, : past + end])
        out[:, :, begin:end] = mixed.view(len(out), out.shape[1], end - begin, -1)
        if keep:
            kept.append(weights)
    return out.view(q.shape), kept


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; of those not wanted, a tensor of nothing."""
    groups, past, unseen, scale = k.shape[1], k.shape[2] - q.shape[2], _unseen(q), q.shape[-1] ** -0.5
    queries, grads = _grouped(q, groups) * scale, _grouped(grad, groups)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    blocks = _blocks(q.shape[2])
    # Sums over many blocks would lose bits in a half type.
    wide = torch.float32 if len(blocks) > 4 and q.dtype.itemsize < 4 else q.dtype
    of_q = torch.empty(queries.shape if wanted[0] else 0, dtype=q.dtype, device=q.device)
    of_k, of_v = (
        torch.zeros(x.shape if asked else 0, dtype=wide, device=x.device)
        for x, asked in zip((keys, values), wanted[1:], strict=True)
    )
    for i, (begin, end) in enumerate(blocks):
        stop = past + end
        rows, seen, mixed = _rows(queries, begin, end), keys[:, :stop], _rows(grads, begin, end)
        weights = kept[i] if kept else _weights(rows, seen, unseen[: end - begin, : end - begin])
        if wanted[2]:
            _accumulate(of_v[:, :stop], weights.transpose(1, 2), mixed)
        if not (wanted[0] or wanted[1]):
            continue
        of_weights = torch.bmm(mixed, values[:, :stop].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        if wanted[0]:
            of_q[:, :, begin:end] = torch.bmm(of_scores, seen).view(*queries.shape[:2], end - begin, -1)
        if wanted[1]:
            _accumulate(of_k[:, :stop], of_scores.transpose(1, 2), rows)
    of_q.mul_(scale)
    found = ((of_q, q), (of_k, k), (of_v, v))
    gradients = [
        x.to(like.dtype).view(like.shape if asked else 0) for (x, like), asked in zip(found, wanted, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2]


def _accumulate(total: Float[Tensor, "x s e"], left: Float[Tensor, "x s n"], right: Float[Tensor, "x n e"]) -> None:
    """total += left right, in the type of `total`."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


_LIBRARY = torch.library.Library("archbench", "FRAGMENT")
for _name, _arguments, _results, _kernel in (
    ("blockwise_attention", "Tensor q, Tensor k, Tensor v, bool keep", "(Tensor, Tensor[])", _attention),
    (
        "blockwise_attention_backward",
        "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] kept, bool[] wanted",
        "(Tensor, Tensor, Tensor)",
        _attention_backward,
    ),
):
    _LIBRARY.define(f"{_name}({_arguments}) -> {_results}")
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


class _Blockwise(torch.autograd.Function):
    """The two operators as one node. `torch.library.custom_op` would do the same, for 0.3 ms a layer and step."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> Tensor:
        out, kept = torch.ops.archbench.blockwise_attention(q, k, v, keep)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        found = torch.ops.archbench.blockwise_attention_backward(grad, q, k, v, kept, wanted)
        return *(gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)), None
