"""Key-value caches of all layers in one tensor, of which a step cuts its views at once.

Letters: b rows, g key-value heads, s positions, t new ones, e head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from archbench.layers import KVCache
from archbench.ops.decode_weights import LastCaches

Place: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a layer: where new keys and values go (b g t e), and all of them, those included (b g s e)."""


def place_in(cache: KVCache, length: int, end: int) -> Place:
    """That of positions `length` to `end` in a cache by itself."""
    keys, values = cache.keys[:, :, :end], cache.values[:, :, :end]
    return keys[:, :, length:], values[:, :, length:], keys, values


class CacheStack(LastCaches):
    """The caches last written to, in one tensor (2 layers, b, g, capacity, e), which it does not keep alive."""

    def holding(self, caches: Sequence[KVCache], length: int, end: int) -> Sequence[KVCache]:
        """Caches with the same first `length` positions and room up to `end`, in one tensor: those given if they are
        the last ones, else copies."""
        if end <= caches[0].keys.shape[2] and self.are(caches):
            return caches
        first = caches[0].keys
        b, g, _, e = first.shape
        room = end + (max(64, end // 8) if length else 0)
        tensors = first.new_zeros(2 * len(caches), b, g, room, e).unbind(0)
        held = [KVCache(keys, values, end) for keys, values in zip(tensors[::2], tensors[1::2], strict=True)]
        for new, old in zip(held, caches, strict=True):
            new.keys[:, :, :length] = old.keys[:, :, :length]
            new.values[:, :, :length] = old.values[:, :, :length]
        self.become(held)
        return held

    def places(self, caches: Sequence[KVCache], length: int, end: int) -> list[Place]:
        """That of every layer, of caches that are held."""
        first = caches[0].keys
        b, g, room, e = first.shape
        strides = (b * g * room * e, g * room * e, room * e, e, 1)
        new = first.as_strided((2 * len(caches), b, g, end - length, e), strides, length * e).unbind(0)
        valid = first.as_strided((2 * len(caches), b, g, end, e), strides, 0).unbind(0)
        return list(zip(new[::2], new[1::2], valid[::2], valid[1::2], strict=True))
