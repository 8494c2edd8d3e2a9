"""Key-value caches of all layers in one tensor, of which a step cuts its views at once.

Letters: b rows, g key-value heads, s positions, t new ones, e head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from archbench.layers import KVCache, slack_behind
from archbench.ops.decode_weights import LastCaches

Place: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a layer: where new keys and values go (b g t e), and all of them, those included (b g s e)."""


def place_in(cache: KVCache, length: int, end: int) -> Place:
    """That of positions `length` to `end` in a cache by itself."""
    keys, values = cache.keys[:, :, :end], cache.values[:, :, :end]
    return keys[:, :, length:], values[:, :, length:], keys, values


class CacheStack:
    """The caches last written to, and whether they lie in one tensor (2 layers, b, g, capacity, e). It does not keep
    them alive."""

    def __init__(self) -> None:
        self._now = LastCaches(), False  # replaced, never changed: threads may share a stack

    def are(self, caches: Sequence[KVCache]) -> bool:
        """Whether these are they, lengths aside."""
        return self._now[0].are(caches)

    def holding(self, caches: Sequence[KVCache], length: int, end: int) -> tuple[Sequence[KVCache], bool]:
        """Caches with the same first `length` positions and room up to `end`, and whether they lie in one tensor.
        Those given where all have room: copying them would cost more than cutting views of each."""
        last, stacked = self._now
        if end <= last.capacity and last.are(caches):
            return caches, stacked
        now = LastCaches()
        now.become(caches)
        stacked = end > now.capacity
        if stacked:
            caches = _stacked(caches, length, end)
            now.become(caches)
        self._now = now, stacked
        return caches, stacked

    def places(self, caches: Sequence[KVCache], stacked: bool, length: int, end: int) -> list[Place]:
        """That of every layer, of caches that are held."""
        if not stacked:
            return [place_in(cache, length, end) for cache in caches]
        first = caches[0].keys
        b, g, room, e = first.shape
        strides = (b * g * room * e, g * room * e, room * e, e, 1)
        new = first.as_strided((2 * len(caches), b, g, end - length, e), strides, length * e).unbind(0)
        valid = first.as_strided((2 * len(caches), b, g, end, e), strides, 0).unbind(0)
        return list(zip(new[::2], new[1::2], valid[::2], valid[1::2], strict=True))


def _stacked(caches: Sequence[KVCache], length: int, end: int) -> list[KVCache]:
    """Copies in one tensor, with some room beyond `end`."""
    first = caches[0].keys
    b, g, _, e = first.shape
    room = end + (slack_behind(end) if length else 0)
    tensors = first.new_zeros(2 * len(caches), b, g, room, e).unbind(0)
    held = [KVCache(keys, values, end) for keys, values in zip(tensors[::2], tensors[1::2], strict=True)]
    for new, old in zip(held, caches, strict=True):
        new.keys[:, :, :length] = old.keys[:, :, :length]
        new.values[:, :, :length] = old.values[:, :, :length]
    return held
