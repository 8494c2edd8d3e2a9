"""What decode steps need of an attention model: its weights and sizes, and rotary angles kept at hand.

Letters: d width, v vocabulary, w width of all heads, f inner width, e head width, n positions, b rows,
k tokens of a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from archbench.layers import KVCache

LONGEST = {"lean": 8, "native": 8}
"""New tokens of a row, at most, that a level reads quicker than the model's own modules do."""

Angles: TypeAlias = Callable[[int, int], tuple[Tensor, Tensor]]
"""Cosines and sines (n, e) of n positions from the first one given, each angle twice, fp32."""

CHUNK = 512
"""Positions whose angles are computed at once."""

T = TypeVar("T")


class BlockWeights(NamedTuple):
    """u' = a + down(silu(gate) * up), a = u + out(attention), each of a normed input."""

    norm_attention: Float[Tensor, " d"]
    qkv: Float[Tensor, "w d"]
    out: Float[Tensor, "d w"]
    norm_ffn: Float[Tensor, " d"]
    gate_up: Float[Tensor, "f d"]
    down: Float[Tensor, "d f"]


class DecoderWeights(NamedTuple):
    """A pre-norm decoder. `angles` None leaves attention without positions.

    Heads that guess further tokens are unembeddings (`drafts`), or blocks on what the first `n_trunk` blocks make
    (`heads`; the final norm and the unembedding are shared). Such a head keeps keys and values of all positions, in
    caches that stand behind those of `blocks`; the rest of it runs where a guess is wanted, at the last position.
    """

    embedding: Float[Tensor, "v d"]
    blocks: Sequence[BlockWeights]
    norm: Float[Tensor, " d"]
    unembedding: Float[Tensor, "v d"]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    angles: Angles | None
    drafts: Sequence[Float[Tensor, "v d"]] = ()
    heads: Sequence[BlockWeights] = ()
    n_trunk: int = 0


class Read(NamedTuple):
    """What reading a few tokens gave: what the last block makes (that of the trunk, where heads are blocks), the logits
    behind each token where wanted, and the caches, which now count the tokens."""

    stream: Float[Tensor, "b t d"]
    logits: Float[Tensor, "b t v"] | None
    caches: tuple[KVCache, ...]


class Written(NamedTuple):
    """What a greedy step of self-speculation wrote: of row b, `tokens[b, :counts[b]]`. `pending` is each row's last
    token, `last` the stream (see `Read`) at the position before it; the caches count all k positions of the block."""

    tokens: Int[Tensor, "b k"]
    counts: Int[Tensor, " b"]
    pending: Int[Tensor, " b"]
    last: Float[Tensor, "b d"]
    caches: tuple[KVCache, ...]


class AngleTable(Generic[T]):
    """What `made` makes of the cosines and sines of positions around those asked for last, so many at once."""

    def __init__(self, angles: Angles, made: Callable[[Tensor, Tensor], T], at_once: int = CHUNK) -> None:
        self._angles, self._made, self._at_once = angles, made, at_once
        self._held: tuple[int, int, T] | None = None

    def covering(self, low: int, high: int) -> tuple[int, T]:
        """A first position, and what was made of those from there to high - 1 at least; low is among them."""
        if self._held is not None:
            first, end, made = self._held
            if first <= low and high <= end:
                return first, made
        first, end = low // self._at_once * self._at_once, -(-high // self._at_once) * self._at_once
        with torch.inference_mode(False), torch.no_grad():
            made = self._made(*self._angles(first, end - first))
        self._held = first, end, made
        return first, made


class LastCaches:
    """The caches that a decoder wrote to last, without keeping them alive: a text goes on in the same ones."""

    def __init__(self) -> None:
        self._tensors: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = []
        self.capacity = 0

    def are(self, caches: Sequence[KVCache]) -> bool:
        """Whether these are they, lengths aside."""
        if len(caches) != len(self._tensors):
            return False
        for (keys, values, _), (last_keys, last_values) in zip(caches, self._tensors, strict=True):
            if keys is not last_keys() or values is not last_values():
                return False
        return True

    def become(self, caches: Sequence[KVCache]) -> None:
        self._tensors = [(weakref.ref(cache.keys), weakref.ref(cache.values)) for cache in caches]
        self.capacity = min(cache.keys.shape[2] for cache in caches)
