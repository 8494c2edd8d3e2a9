"""Whole-model decode steps of attention models, level `lean`: one torch loop without module calls, for CPUs.

At a few rows a step is not arithmetic but calls, so it makes few of them, each the cheapest that torch has:

- matrices lie transposed, [inputs, outputs], gains and the root of the width multiplied into them;
- the residual stream has one more column that holds sqrt(d eps), so that a norm is one vector norm and a division; the
  table of embeddings has it already;
- rotary positions turn queries and keys at once: x cos + (x with halves exchanged) (-sin, sin), which for a single
  position is a product with a matrix;
- keys and values of all layers lie in one tensor, so that views are cut once a step;
- residual additions are part of the products.

Half types keep gains and norms apart in fp32, as rounding asks for it.

Letters: b rows, t new tokens, d width, v vocabulary, h query heads, g key-value heads, s positions, e head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from archbench.layers import KVCache, filled
from archbench.ops.cache_stack import CacheStack, Place, place_in
from archbench.ops.decode_weights import AngleTable, BlockWeights, DecoderWeights, Read, Written


class _Block(NamedTuple):
    gain_attention: Tensor
    qkv: Tensor
    out: Tensor
    gain_ffn: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


_Turning: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Rotary positions: a matrix (e, e) for one position; for several cosines and signed sines (t, e) each."""


class LeanDecoder:
    """A model's weights, ready for steps."""

    ragged = False
    """rows may stand at different places"""
    most_at_once = 256
    """tokens of a row that `write` writes"""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self._folds = weights.embedding.dtype in (torch.float32, torch.float64)
        self._width = weights.embedding.shape[1]
        self._embedding = self._widened(weights.embedding.detach())
        self._gain, self._unembedding = self._normed_product(weights.norm, weights.unembedding)
        self._blocks, self._heads = [self._block(b) for b in weights.blocks], [self._block(b) for b in weights.heads]
        self._queries = weights.n_heads * weights.head_dim
        self._stack = CacheStack()
        attend = F.scaled_dot_product_attention
        self._attend = attend if weights.n_heads == weights.n_kv_heads else partial(attend, enable_gqa=True)
        self._drafts = None
        if weights.drafts:
            _, self._drafts = self._normed_product(weights.norm, torch.cat([head.detach() for head in weights.drafts]))
        self._table = self._matrices = None
        if weights.angles is not None:
            wide = torch.promote_types(weights.embedding.dtype, torch.float32)
            self._table = AngleTable(weights.angles, _signed)
            self._matrices = AngleTable(weights.angles, partial(_matrices, wide), at_once=32)

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
        (b, t), end = tokens.shape, length + tokens.shape[1]
        caches, stacked = self._stack.holding(caches, length, end)
        if embedded is None:
            wide = torch.embedding(self._embedding, tokens.reshape(-1))
        else:
            wide = self._widened(embedded.flatten(0, 1))
        x, trunk = self._through(wide, (b, t), length, self._stack.places(caches, stacked, length, end))
        found = self._logits(wide, x).view(b, t, -1) if logits else None
        return Read(trunk.view(b, t, -1), found, filled(caches, end))

    def _through(
        self, wide: Float[Tensor, "m w"], shape: tuple[int, int], length: int, places: Sequence[Place]
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]:
        """Sends the stream through all blocks, in place; what it then is, and what it was behind the trunk."""
        t, weights, n_blocks = shape[1], self._weights, len(self._blocks)
        x = trunk = wide.narrow(1, 0, self._width)
        turning = self._turning(length, t)
        # Numbers, since torch makes them of truth values anew at every call.
        hidden = torch.full((t, length + t), float("-inf"), dtype=x.dtype).triu_(length + 1) if t > 1 else None
        for number, (block, place) in enumerate(zip(self._blocks, places, strict=False), start=1):
            self._layer(wide, x, shape, block, place, turning, hidden)
            if self._heads and number == weights.n_trunk:
                trunk = x.clone()
                self._fill(wide, x, shape, places[n_blocks:], turning)
        return x, trunk

    def _logits(self, wide: Float[Tensor, "m w"], x: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        return torch.mm(self._norm(wide, x, self._gain), self._unembedding)

    def _turning(self, length: int, t: int) -> _Turning | None:
        """What turns heads at t positions from `length` on."""
        if self._table is None or self._matrices is None:
            return None
        if t == 1:
            first, matrices = self._matrices.covering(length, length + 1)
            return matrices[length - first]
        first, (cos, sin) = self._table.covering(length, length + t)
        return cos.narrow(0, length - first, t), sin.narrow(0, length - first, t)

    def _heads_of(
        self, projected: Float[Tensor, "m w"], shape: tuple[int, int], n_heads: int, turning: _Turning | None
    ) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b g t e"], Float[Tensor, "b g t e"]]:
        """Queries of so many heads and keys, both at their positions, and values."""
        (b, t), n_shared, e = shape, self._weights.n_kv_heads, self._weights.head_dim
        if isinstance(turning, Tensor):  # one product, for the values too: cheaper than parting them before
            heads = projected.view(b, -1, 1, e)
            turned = (
                torch.matmul(heads, turning) if self._folds else torch.matmul(heads.float(), turning).to(heads.dtype)
            )
            queries, keys, _ = turned.split_with_sizes((n_heads, n_shared, n_shared), 1)
            return queries, keys, heads.narrow(1, n_heads + n_shared, n_shared)
        heads = projected.view(b, t, -1, e).transpose(1, 2)
        turning_heads, values = heads.split_with_sizes((n_heads + n_shared, n_shared), 1)
        if turning is not None:
            cos, sin = turning
            turned = torch.addcmul(turning_heads * cos, turning_heads.roll(e // 2, -1), sin)
            turning_heads = turned if self._folds else turned.to(heads.dtype)
        queries, keys = turning_heads.split_with_sizes((n_heads, n_shared), 1)
        return queries, keys, values

    def _layer(
        self,
        wide: Float[Tensor, "m w"],
        x: Float[Tensor, "m d"],
        shape: tuple[int, int],
        block: _Block,
        place: Place,
        turning: _Turning | None,
        hidden: Tensor | None,
    ) -> None:
        """Sends the stream through a block, in place; new keys and values go to their place."""
        (b, t), (gain_attention, qkv, out, gain_ffn, gate, up, down) = shape, block
        new_keys, new_values, keys, values = place
        projected = torch.mm(self._norm(wide, x, gain_attention), qkv)
        queries, found_keys, found_values = self._heads_of(projected, shape, self._weights.n_heads, turning)
        new_keys.copy_(found_keys)
        new_values.copy_(found_values)
        mixed = self._attend(queries, keys, values, hidden)
        if t > 1:
            mixed = mixed.transpose(1, 2)
        x.addmm_(mixed.reshape(b * t, -1), out)
        normed = self._norm(wide, x, gain_ffn)
        x.addmm_(F.silu(torch.mm(normed, gate), inplace=True).mul_(torch.mm(normed, up)), down)

    def _fill(
        self,
        wide: Float[Tensor, "m w"],
        x: Float[Tensor, "m d"],
        shape: tuple[int, int],
        places: Sequence[Place],
        turning: _Turning | None,
    ) -> None:
        """Keys and values of the heads at new positions."""
        for head, (new_keys, new_values, _, _) in zip(self._heads, places, strict=True):
            projected = torch.mm(self._norm(wide, x, head.gain_attention), head.qkv[:, self._queries :])
            _, keys, values = self._heads_of(projected, shape, 0, turning)
            new_keys.copy_(keys)
            new_values.copy_(values)

    def write(
        self, pending: Int[Tensor, " b"], caches: Sequence[KVCache], length: int, n: int
    ) -> tuple[Int[Tensor, "b n"], tuple[KVCache, ...]]:
        """Reads the pending token of each row and writes the n most likely next ones, each read but for the last. Gives
        up `caches`."""
        end = length + n
        (caches, stacked), written = self._stack.holding(caches, length, end), [pending]
        for place in range(length, end):
            wide = torch.embedding(self._embedding, written[-1])
            places = self._stack.places(caches, stacked, place, place + 1)
            x, _ = self._through(wide, (len(pending), 1), place, places)
            # Where the gain is part of the product, a norm only scales logits: the largest is the same one.
            logits = torch.mm(x, self._unembedding) if self._folds else self._logits(wide, x)
            written.append(logits.argmax(-1))
        return torch.stack(written[1:], dim=1), filled(caches, end)

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
            self._layer(wide, x, (b, 1), head, place_in(cache, length - 1, length), turning, None)
            found.append(self._logits(wide, x))
        return torch.stack(found, dim=1)

    def continues(self, caches: Sequence[KVCache]) -> bool:
        """Whether these are the caches of the last call."""
        return self._stack.are(caches)

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
        gate, up = block.gate_up.chunk(2)
        gain_ffn, gate = self._normed_product(block.norm_ffn, gate)
        _, up = self._normed_product(block.norm_ffn, up)
        return _Block(gain_attention, qkv, _transposed(block.out), gain_ffn, gate, up, _transposed(block.down))

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


def _matrices(dtype: torch.dtype, cos: Float[Tensor, "n e"], sin: Float[Tensor, "n e"]) -> Sequence[Tensor]:
    """For each position the matrix (e, e) that turns a head from the right."""
    same = torch.eye(cos.shape[1], dtype=dtype)
    cos, sin = _signed(cos, sin)
    return torch.addcmul(same * cos[:, None], same.roll(len(same) // 2, 0), sin[:, None]).unbind(0)


def _transposed(weight: Float[Tensor, "o i"]) -> Float[Tensor, "i o"]:
    return weight.detach().t().contiguous()
