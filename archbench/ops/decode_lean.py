"""Whole-model decode steps of attention models, level `lean`: one torch loop without module calls, for CPUs.

At a few rows a step is not arithmetic but calls, so it makes few of them, each the cheapest that torch has:

- matrices lie transposed, [inputs, outputs], gains and the root of the width multiplied into them;
- the residual stream has one more column that holds sqrt(d eps), so that a norm is one vector norm and a division; the
  table of embeddings has it already;
- rotary positions turn queries and keys at once: x cos + (x with halves exchanged) (-sin, sin);
- residual additions are part of the products.

Half types keep gains and norms apart in fp32, as rounding asks for it.

Letters: b rows, t new tokens, d width, v vocabulary, h query heads, g key-value heads, s positions, e head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from archbench.layers import KVCache, filled
from archbench.ops.decode_weights import AngleTable, BlockWeights, DecoderWeights, LastCaches, Read, Written


class _Block(NamedTuple):
    gain_attention: Tensor
    qkv: Tensor
    out: Tensor
    gain_ffn: Tensor
    gate_up: Tensor
    down: Tensor


class LeanDecoder:
    """A model's weights, ready for steps."""

    ragged = False
    """rows may stand at different places"""
    most_at_once = 1
    """tokens of a row that `write` writes"""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self._folds = weights.embedding.dtype in (torch.float32, torch.float64)
        self._width = weights.embedding.shape[1]
        self._embedding = self._widened(weights.embedding.detach())
        self._gain, self._unembedding = self._normed_product(weights.norm, weights.unembedding)
        self._blocks, self._heads = [self._block(b) for b in weights.blocks], [self._block(b) for b in weights.heads]
        self._queries = weights.n_heads * weights.head_dim
        self._last = LastCaches()
        self._drafts = None
        if weights.drafts:
            _, self._drafts = self._normed_product(weights.norm, torch.cat([head.detach() for head in weights.drafts]))
        self._table = None if weights.angles is None else AngleTable(weights.angles, _signed)

    def read(
        self,
        tokens: Int[Tensor, "b t"],
        caches: Sequence[KVCache],
        length: int,
        *,
        embedded: Float[Tensor, "b t d"] | None = None,
        behind: Int[Tensor, " b"] | None = None,
        logits: bool = True,
    ) -> Read:
        """Reads tokens, or what stands for them, `embedded`, behind `length` positions. Gives up `caches`."""
        assert behind is None, "not ragged"
        (b, t), d = tokens.shape, self._width
        end = length + t
        if end > self._last.capacity or not self._last.are(caches):
            caches = [cache.with_room(end) for cache in caches]
            self._last.become(caches)
        weights, blocks = self._weights, len(self._blocks)
        if embedded is None:
            wide = torch.embedding(self._embedding, tokens.reshape(-1))
        else:
            wide = self._widened(embedded.reshape(b * t, d))
        x = wide.narrow(1, 0, d)
        turning = self._turning(length, t)
        # Numbers, since torch makes them of truth values anew at every call.
        hidden = torch.full((t, end), float("-inf"), dtype=x.dtype).triu_(length + 1) if t > 1 else None
        trunk = x
        for number, (block, cache) in enumerate(zip(self._blocks, caches, strict=False), start=1):
            projected = torch.mm(self._norm(wide, x, block.gain_attention), block.qkv)
            self._gather(projected, (b, t), x, block, cache, length, turning, hidden)
            self._feed(wide, x, block)
            if self._heads and number == weights.n_trunk:
                trunk = x.clone()
                self._fill(wide, x, caches[blocks:], b, length, turning)
        found = torch.mm(self._norm(wide, x, self._gain), self._unembedding).view(b, t, -1) if logits else None
        return Read(trunk.view(b, t, d), found, filled(caches, end))

    def _turning(self, length: int, t: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and signed sines of t positions from `length` on."""
        if self._table is None:
            return None
        self._table.cover(length, length + t)
        place = length - self._table.first
        return self._table.cos.narrow(0, place, t), self._table.sin.narrow(0, place, t)

    def _turned(self, heads: Float[Tensor, "b h t e"], turning: tuple[Tensor, Tensor] | None) -> Tensor:
        if turning is None:
            return heads
        turned = torch.addcmul(heads * turning[0], heads.roll(heads.shape[3] // 2, -1), turning[1])
        return turned if self._folds else turned.to(heads.dtype)

    def _gather(
        self,
        projected: Float[Tensor, "m w"],
        shape: tuple[int, int],
        x: Float[Tensor, "m d"],
        block: _Block,
        cache: KVCache,
        length: int,
        turning: tuple[Tensor, Tensor] | None,
        hidden: Tensor | None,
    ) -> None:
        """Attention: keys and values go into the cache, what is gathered is added to x."""
        weights = self._weights
        n_heads, n_shared, e = weights.n_heads, weights.n_kv_heads, weights.head_dim
        b, t = shape
        heads = projected.view(b, -1, 1, e) if t == 1 else projected.view(b, t, -1, e).transpose(1, 2)
        turning_heads, new_values = heads.split_with_sizes((n_heads + n_shared, n_shared), 1)
        queries, new_keys = self._turned(turning_heads, turning).split_with_sizes((n_heads, n_shared), 1)
        keys, values = cache.keys.narrow(2, 0, length + t), cache.values.narrow(2, 0, length + t)
        keys.narrow(2, length, t).copy_(new_keys)
        values.narrow(2, length, t).copy_(new_values)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=hidden, enable_gqa=n_heads != n_shared)
        mixed = mixed if t == 1 else mixed.transpose(1, 2)
        x.addmm_(mixed.reshape(b * t, -1), block.out)

    def _feed(self, wide: Float[Tensor, "m w"], x: Float[Tensor, "m d"], block: _Block) -> None:
        gate, up = torch.mm(self._norm(wide, x, block.gain_ffn), block.gate_up).chunk(2, -1)
        x.addmm_(F.silu(gate).mul_(up), block.down)

    def _fill(
        self,
        wide: Float[Tensor, "m w"],
        x: Float[Tensor, "m d"],
        caches: Sequence[KVCache],
        b: int,
        length: int,
        turning: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Keys and values of the heads at new positions."""
        n_shared, e = self._weights.n_kv_heads, self._weights.head_dim
        for head, cache in zip(self._heads, caches, strict=True):
            projected = torch.mm(self._norm(wide, x, head.gain_attention), head.qkv[:, self._queries :])
            new = projected.view(b, -1, 2 * n_shared, e).transpose(1, 2)
            t = new.shape[2]
            cache.keys.narrow(2, length, t).copy_(self._turned(new.narrow(1, 0, n_shared), turning))
            cache.values.narrow(2, length, t).copy_(new.narrow(1, n_shared, n_shared))

    def write(
        self, pending: Int[Tensor, " b"], caches: Sequence[KVCache], length: int, n: int
    ) -> tuple[Int[Tensor, "b n"], tuple[KVCache, ...]]:
        """Reads the pending token of each row and returns the most likely next one. Gives up `caches`."""
        assert n == 1
        _, logits, after = self.read(pending[:, None], caches, length)
        assert logits is not None
        return logits.argmax(-1), after

    def draft(
        self,
        last: Float[Tensor, "b d"],
        n: int,
        caches: Sequence[KVCache],
        length: int,
        behind: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b n v"]:
        """Logits of the first n draft heads, from the stream at each row's last position, which is read already."""
        assert behind is None, "not ragged"
        n_vocab, b = self._weights.embedding.shape[0], len(last)
        if self._drafts is not None:
            wide = self._widened(last)
            heads = self._drafts[:, : n * n_vocab]
            return torch.mm(self._norm(wide, wide[:, : self._width], self._gain), heads).view(-1, n, n_vocab)
        found, turning = [], self._turning(length - 1, 1)
        for head, cache in zip(self._heads[:n], caches[len(self._blocks) :], strict=False):
            wide = self._widened(last)
            x = wide.narrow(1, 0, self._width)
            projected = torch.mm(self._norm(wide, x, head.gain_attention), head.qkv)
            self._gather(projected, (b, 1), x, head, cache, length - 1, turning, None)
            self._feed(wide, x, head)
            found.append(torch.mm(self._norm(wide, x, self._gain), self._unembedding))
        return torch.stack(found, dim=1)

    def continues(self, caches: Sequence[KVCache]) -> bool:
        """Whether these are the caches of the last call."""
        return self._last.are(caches)

    def speculate(
        self,
        pending: Int[Tensor, " b"],
        last: Float[Tensor, "b d"],
        k: int,
        caches: Sequence[KVCache],
        length: int,
        behind: Int[Tensor, " b"] | None,
    ) -> Written:
        """A greedy step: drafts k - 1 tokens, reads them behind the pending ones, keeps those that hold. Gives up
        `caches`."""
        drafts = self.draft(last, k - 1, caches, length, behind).argmax(-1)
        block = torch.cat([pending[:, None], drafts], dim=1)
        stream, logits, after = self.read(block, caches, length, behind=behind)
        assert logits is not None
        tokens = logits.argmax(-1)
        pairs = zip(drafts.tolist(), tokens.tolist(), strict=True)
        kept = [next((i for i, guess in enumerate(guesses) if guess != found[i]), k - 1) for guesses, found in pairs]
        counts = torch.tensor([n + 1 for n in kept])
        if len(kept) == 1:
            return Written(tokens, counts, tokens[:, kept[0]].clone(), stream[:, kept[0]].clone(), after)
        row = torch.arange(len(kept))
        return Written(tokens, counts, tokens[row, counts - 1], stream[row, counts - 1], after)

    def _block(self, block: BlockWeights) -> _Block:
        gain_attention, qkv = self._normed_product(block.norm_attention, block.qkv)
        gain_ffn, gate_up = self._normed_product(block.norm_ffn, block.gate_up)
        return _Block(gain_attention, qkv, _transposed(block.out), gain_ffn, gate_up, _transposed(block.down))

    def _widened(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m w"]:
        return F.pad(x, (0, 1), value=math.sqrt(self._width * self._weights.eps))

    def _norm(self, wide: Float[Tensor, "m w"], x: Float[Tensor, "m d"], gain: Float[Tensor, " d"]) -> Tensor:
        if self._folds:
            return x / torch.linalg.vector_norm(wide, 2, -1, True)
        return (x / torch.linalg.vector_norm(wide, 2, -1, True, dtype=torch.float32) * gain).to(x.dtype)

    def _normed_product(
        self, gain: Float[Tensor, " d"], weight: Float[Tensor, "o d"]
    ) -> tuple[Float[Tensor, " d"], Float[Tensor, "d o"]]:
        """The gain times sqrt(d), and the transposed matrix, into which it is multiplied where types allow."""
        gain = gain.detach() * math.sqrt(self._width)
        return gain.float(), _transposed(weight * gain if self._folds else weight)


def _signed(cos: Float[Tensor, "n e"], sin: Float[Tensor, "n e"]) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
    first, second = sin.chunk(2, dim=1)
    return cos, torch.cat([-first, second], dim=1)


def _transposed(weight: Float[Tensor, "o i"]) -> Float[Tensor, "i o"]:
    return weight.detach().t().contiguous()
