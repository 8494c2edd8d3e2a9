"""Rows that stand at different places: blocks read into caches of which each row has filled another part.

After a step of speculative decoding one row may have kept four tokens and its neighbour one. All rows share caches
whose entry s belongs to position s of each row; row i has read `length - behind[i]` positions, and what lies beyond is
garbage that never matters. While all rows stand at the same place, blocks run exactly as in the Transformer, so that
predictions are the same to the last bit; else each row gets its own positions and its own part of a mask.

Letters: b batch, t new positions, s all positions, d width, h query heads, g key-value heads, e head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from archbench.architectures.transformer import Attention, Block, TransformerConfig
from archbench.layers import KVCache, rotary_angles, rotate


class Rows(NamedTuple):
    """How far each row has read: row i `length - behind[i]` positions; `behind` None where all have read `length`."""

    length: int
    behind: Int[Tensor, " b"] | None

    def settled(self) -> Rows:
        """The same places with `length` that of the longest row there is: rows may have left the batch."""
        if self.behind is None:
            return self
        least, most = int(self.behind.min()), int(self.behind.max())
        return Rows(self.length - least, None if least == most else self.behind - least)

    def plus(self, n: int) -> Rows:
        """Every row n positions on (back, for a negative n)."""
        return self._replace(length=self.length + n)

    def plus_each(self, counts: Int[Tensor, " b"], most: int) -> Rows:
        """Row i `counts[i]` positions on, none more than `most`. On the meta device counts have no values, and every
        row goes on by one."""
        if most == 1 or counts.is_meta:
            return self.plus(1)
        if len(counts) == 1 and self.behind is None:
            return self.plus(int(counts))
        short = most - counts
        return Rows(self.length + most, short if self.behind is None else short + self.behind).settled()


class Place(NamedTuple):
    """Where t new positions of every row go. `positions` and `visible` are None where all rows stand at one place and
    see all that was read; else `angles` are those of all rows, one after the other."""

    rows: Rows
    angles: tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]
    positions: Int[Tensor, "b t"] | None
    visible: Bool[Tensor, "b 1 t s"] | None


def place(config: TransformerConfig, rows: Rows, b: int, t: int, device: torch.device, first: int = 0) -> Place:
    """The place of t new positions behind `rows`. Entries before `first` are void: nothing sees them but themselves."""
    if rows.behind is None and first == 0:
        return Place(rows, rotary_angles(rows.length, t, config.head_dim, config.rope_theta, device), None, None)
    behind = torch.zeros(b, dtype=torch.long, device=device) if rows.behind is None else rows.behind
    positions = (rows.length - behind)[:, None] + torch.arange(t, device=device)
    low = rows.length - (0 if rows.behind is None else int(behind.max()))
    cos, sin = rotary_angles(low, rows.length + t - low, config.head_dim, config.rope_theta, device)
    index = (positions - low).flatten()
    keys = torch.arange(rows.length + t, device=device)
    own = positions[:, None, :, None]
    visible = (keys <= own) & ((keys >= first) | (keys == own))
    return Place(rows, (cos[index], sin[index]), positions, visible)


def read_block(
    block: Block, x: Float[Tensor, "b t d"], cache: KVCache, where: Place
) -> tuple[Float[Tensor, "b t d"], KVCache]:
    """The block over t new positions of every row. Gives up `cache`; the new one counts as read to `length + t`."""
    cache = cache._replace(length=where.rows.length)
    if where.visible is None:
        return block(x, where.angles, cache)
    mixed, cache = _attention(block.attention, block.norm_attention(x), cache, where)
    x = x + mixed
    return x + block.ffn(block.norm_ffn(x)), cache


def fill(block: Block, x: Float[Tensor, "b t d"], cache: KVCache, where: Place) -> KVCache:
    """The block's keys and values of t new positions, without what the block makes of them."""
    attention = block.attention
    width = attention.n_heads * attention.head_dim
    projected = F.linear(block.norm_attention(x), attention.qkv.weight[width:])
    keys, values = _heads(attention, projected, x.shape[0]).chunk(2, dim=1)
    return _appended(cache._replace(length=where.rows.length), _rotated(keys, where), values, where)


def fill_flops(block: Block, n: int) -> int:
    """FLOPs of `fill` over n positions."""
    attention = block.attention
    return 2 * n * attention.qkv.in_features * 2 * attention.n_kv_heads * attention.head_dim


def _attention(
    attention: Attention, x: Float[Tensor, "b t d"], cache: KVCache, where: Place
) -> tuple[Float[Tensor, "b t d"], KVCache]:
    b, t, _ = x.shape
    heads = _heads(attention, attention.qkv(x), b)
    q, k, v = heads.split([attention.n_heads, attention.n_kv_heads, attention.n_kv_heads], dim=1)
    cache = _appended(cache, _rotated(k, where), v, where)
    keys, values = cache.valid()
    grouped = attention.n_heads != attention.n_kv_heads
    mixed = F.scaled_dot_product_attention(
        _rotated(q, where), keys.to(q.dtype), values.to(q.dtype), attn_mask=where.visible, enable_gqa=grouped
    )
    return attention.out(mixed.transpose(1, 2).reshape(b, t, -1)), cache


def _heads(attention: Attention, projected: Float[Tensor, "b t w"], b: int) -> Float[Tensor, "b h t e"]:
    return projected.view(b, projected.shape[1], -1, attention.head_dim).transpose(1, 2)


def _rotated(x: Float[Tensor, "b h t e"], where: Place) -> Float[Tensor, "b h t e"]:
    if where.positions is None:
        return rotate(x, where.angles)
    b, h, t, e = x.shape
    # Rows differ in their angles, heads do not: rows and positions become one long row.
    together = rotate(x.transpose(0, 1).reshape(1, h, b * t, e), where.angles)
    return together.view(h, b, t, e).transpose(0, 1)


def _appended(
    cache: KVCache, keys: Float[Tensor, "b g t e"], values: Float[Tensor, "b g t e"], where: Place
) -> KVCache:
    """The cache with the new entries at each row's own place, and zeros where a row has none yet: a mask hides garbage
    from the scores, but what is no number would still spoil the weighted sum."""
    cache = cache.append(keys, values)  # makes room, and is right for the longest rows
    if where.rows.behind is None:
        return cache
    assert where.positions is not None
    low = int(where.positions[:, 0].min())
    row = torch.arange(len(keys), device=keys.device)[:, None]
    beyond = torch.arange(low, cache.length, device=keys.device) > where.positions[:, -1:]
    for store, new in ((cache.keys, keys), (cache.values, values)):
        store[row, :, where.positions] = new.transpose(1, 2).to(store.dtype)
        store[:, :, low : cache.length].masked_fill_(beyond[:, None, :, None], 0)
    return cache
