"""Whole-model decode steps of attention models, level `lean`: one torch loop without module calls, for CPUs.

At a few rows a step is not arithmetic but calls, so it makes few of them, each the cheapest that torch has:

- matrices lie transposed, [inputs, outputs], gains and the root of the width multiplied into them;
- the residual stream has one more column that holds sqrt(d eps), so that the norm is one vector norm and a division;
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
from archbench.ops.decode_weights import AngleTable, DecoderWeights, LastCaches, Read, Written


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
        self._gain, self._unembedding = self._normed_product(weights.norm, weights.unembedding)
        self._blocks = []
        for block in weights.blocks:
            gain_attention, qkv = self._normed_product(block.norm_attention, block.qkv)
            gain_ffn, gate_up = self._normed_product(block.norm_ffn, block.gate_up)
            out, down = _transposed(block.out), _transposed(block.down)
            self._blocks.append(_Block(gain_attention, qkv, out, gain_ffn, gate_up, down))
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
        weights = self._weights
        n_heads, n_shared, e = weights.n_heads, weights.n_kv_heads, weights.head_dim
        n_turned, grouped = n_heads + n_shared, n_heads != n_shared
        x = F.embedding(tokens, weights.embedding) if embedded is None else embedded
        wide = self._widened(x.reshape(b * t, d))
        x = wide.narrow(1, 0, d)
        if self._table is not None:
            self._table.cover(length, end)
            place = length - self._table.first
            cos, sin = self._table.cos.narrow(0, place, t), self._table.sin.narrow(0, place, t)
        # Numbers, since torch makes them of truth values anew at every call.
        hidden = torch.full((t, end), float("-inf"), dtype=x.dtype).triu_(length + 1) if t > 1 else None
        for block, (keys, values, _) in zip(self._blocks, caches, strict=True):
            heads = torch.mm(self._norm(wide, x, block.gain_attention), block.qkv)
            heads = heads.view(b, -1, 1, e) if t == 1 else heads.view(b, t, -1, e).transpose(1, 2)
            turned = heads.narrow(1, 0, n_turned)
            if self._table is not None:
                turned = torch.addcmul(turned * cos, turned.roll(e // 2, -1), sin)
                turned = turned if self._folds else turned.to(x.dtype)
            keys, values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
            keys.narrow(2, length, t).copy_(turned.narrow(1, n_heads, n_shared))
            values.narrow(2, length, t).copy_(heads.narrow(1, n_turned, n_shared))
            mixed = F.scaled_dot_product_attention(
                turned.narrow(1, 0, n_heads), keys, values, attn_mask=hidden, enable_gqa=grouped
            )
            mixed = mixed if t == 1 else mixed.transpose(1, 2)
            x.addmm_(mixed.reshape(b * t, -1), block.out)
            gate, up = torch.mm(self._norm(wide, x, block.gain_ffn), block.gate_up).chunk(2, -1)
            x.addmm_(F.silu(gate).mul_(up), block.down)
        found = torch.mm(self._norm(wide, x, self._gain), self._unembedding).view(b, t, -1) if logits else None
        return Read(x.view(b, t, d), found, filled(caches, end))

    def write(
        self, pending: Int[Tensor, " b"], caches: Sequence[KVCache], length: int, n: int
    ) -> tuple[Int[Tensor, "b n"], tuple[KVCache, ...]]:
        """Reads the pending token of each row and returns the most likely next one. Gives up `caches`."""
        assert n == 1
        _, logits, after = self.read(pending[:, None], caches, length)
        assert logits is not None
        return logits.argmax(-1), after

    def draft(self, last: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n v"]:
        """Logits of the first n draft heads, from what the last block made at each row's last position."""
        assert self._drafts is not None
        n_vocab = self._weights.embedding.shape[0]
        wide = self._widened(last)
        heads = self._drafts[:, : n * n_vocab]
        return torch.mm(self._norm(wide, wide[:, : self._width], self._gain), heads).view(-1, n, n_vocab)

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
        drafts = self.draft(last, k - 1).argmax(-1)
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
