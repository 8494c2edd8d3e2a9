"""Memorizing Transformer: attention inside segments, and in one layer the nearest neighbours among the keys kept.

The one layer that remembers, for a query of segment s of N tokens, per head; q^ = q / |q|, k^ = k / |k|, R the rotation
of rotary positions and c = exp(log_scale) a learned temperature:

    local   V_l = softmax_causal( c R q^ . R k^ ) v            over its own segment up to itself
    memory  V_m = softmax( c q^ . k^ ) v                       over the k nearest of the last n_mem tokens before s
    mix     V   = g V_m + (1 - g) V_l,   g = sigmoid(gate)     one learned scalar a head

Keys and values are shared by both. Those kept are constants: no gradient enters the memory, so all segments of a window
are treated at once. A segment is written only when it is complete, and the oldest tokens leave; nothing of a query's
own segment can be retrieved. The search is exact: one product with all keys kept, then the k largest scores. Where
nothing is kept yet V_m is zero. Keys are normalised because those kept are older than the weights that ask for them;
without a temperature no query could then be certain.

All other layers, and all else, are those of the segment-local Transformer. Departures: the paper's local attention has
T5's relative biases, here rotary positions; the Transformer-XL cache that it gives to every layer is left out, so what
lies before the segment is reached through the memory alone; keys without rotation are kept, so retrieval knows no
positions, as in the paper. Gates learn faster than other parameters and without decay (see `gate_lr_scale`).

Source: Wu, Rabe, Hutchins & Szegedy 2022, 2203.08913 (sections 3.1 and 3.2). The initial temperature is that of a
public re-implementation (lucidrains/memorizing-transformers-pytorch).

Letters: b batch, t time, n positions of a stretch, r rows (texts x segments), m tokens kept, k tokens retrieved, d
width, h query heads, g key-value heads, q queries that share a key-value head, e head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from archbench.architectures import local, transformer
from archbench.errors import ConfigError
from archbench.layers import rotary_angles, rotate
from archbench.model import Architecture, FlopFormulas, ParameterGroup, Phase, Traits
from archbench.ops.attention import causal_attention
from archbench.ops.precision import without_autocast
from archbench.segments import (
    Angles,
    SegmentAttention,
    SegmentCache,
    SegmentConfig,
    SegmentModel,
    blended,
    carried_over,
)


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig(SegmentConfig):
    """Sizes of a Memorizing Transformer.

    Attributes:
        memory: tokens kept at most, n_mem.
        top_k: tokens retrieved for a query.
        memory_layer: the layer that remembers, from 0; None means the last but one, of two layers the last.
        temperature: c at first.
        gate_init: gate of every head at first; g = sigmoid(gate) is the weight of the memory.
        gate_lr_scale: learning rate of the gates as a multiple of the others'.
        grad_through_memory: let gradients enter what earlier segments of a window have written. Not in the paper.
    """

    kind: ClassVar[str] = "memorizing_transformer"

    memory: int = 4096
    top_k: int = 32
    memory_layer: int | None = None
    temperature: float = 20.0
    gate_init: float = 0.0
    gate_lr_scale: float = 25.0
    grad_through_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memory", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.kind}.{name}: {getattr(self, name)}; must be at least 1")
        if not 0 <= self.remembering < self.n_layers:
            raise ConfigError(f"{self.kind}.memory_layer: {self.memory_layer}; must lie in [0, {self.n_layers})")
        for name in ("temperature", "gate_lr_scale"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{self.kind}.{name}: {getattr(self, name)}; must be above 0")

    @property
    def remembering(self) -> int:
        """The index of the layer that remembers."""
        if self.memory_layer is not None:
            return self.memory_layer
        return max(self.n_layers - 2, min(self.n_layers - 1, 1))

    @property
    def n_parameters(self) -> int:
        """Parameters: the backbone's, and a gate and a temperature a head of one layer."""
        return super().n_parameters + 2 * self.n_heads

    @property
    def memory_numbers(self) -> int:
        """Numbers in one text's memory once it is full. (A state also holds `segment_numbers`.)"""
        return 2 * self.kv_heads * self.head_dim * self.memory


class Kept(NamedTuple):
    """The memory: normalised keys, without rotation, and values of the tokens kept, oldest first."""

    keys: Float[Tensor, "b g m e"]
    values: Float[Tensor, "b g m e"]

    @property
    def n_tokens(self) -> int:
        return self.keys.shape[2]

    def followed_by(self, keys: Float[Tensor, "b g n e"], values: Float[Tensor, "b g n e"]) -> Kept:
        """The memory with n more tokens."""
        new = keys.to(self.keys.dtype), values.to(self.values.dtype)
        return Kept(torch.cat([self.keys, new[0]], dim=2), torch.cat([self.values, new[1]], dim=2))

    def before(self, stop: int, capacity: int) -> Kept:
        """Views of the last `capacity` tokens before number `stop`."""
        last = slice(max(0, stop - capacity), stop)
        return Kept(self.keys[:, :, last], self.values[:, :, last])

    def newest(self, capacity: int) -> Kept:
        """What is left when the oldest beyond `capacity` leave; copied, for a view would keep them alive."""
        if self.n_tokens <= capacity:
            return self
        keys, values = self.before(self.n_tokens, capacity)
        return Kept(keys.clone(), values.clone())


class LayerState(NamedTuple):
    """Keys (normalised, without rotation) and values: of the open segment, and those kept of earlier ones."""

    cache: SegmentCache
    kept: Kept

    @property
    def filled(self) -> int:
        return self.cache.filled


def recall(queries: Float[Tensor, "b g q e"], kept: Kept, top_k: int) -> Float[Tensor, "b g q e"]:
    """Softmax attention to the `top_k` tokens kept whose keys score highest; zero where nothing is kept.

    Source: Wu et al. 2022, section 3.2.
    """
    if not kept.n_tokens:
        return torch.zeros_like(queries)
    nearest = (queries @ kept.keys.transpose(-1, -2)).topk(min(top_k, kept.n_tokens), dim=-1)
    b, g, q, k = nearest.indices.shape
    places = nearest.indices.view(b, g, q * k, 1).expand(-1, -1, -1, queries.shape[-1])
    values = kept.values.gather(2, places).view(b, g, q, k, -1)
    return (nearest.values.softmax(dim=-1).unsqueeze(-2) @ values).squeeze(-2)


def unit(x: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """x / |x|, in fp32 at least; zero stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=1e-6)


class KnnAttention(SegmentAttention):
    """Attention inside segments, mixed by a gate a head with the nearest neighbours in memory."""

    def __init__(self, config: MemorizingConfig, generator: Generator | None) -> None:
        super().__init__(config, generator)
        self.capacity, self.top_k = config.memory, config.top_k
        self.rope_theta = config.rope_theta
        self.grad_through_memory = config.grad_through_memory
        self.gate = nn.Parameter(torch.full((config.n_heads,), float(config.gate_init)))
        self.log_scale = nn.Parameter(torch.full((config.n_heads,), math.log(config.temperature)))

    def initial_state(self, batch_size: int) -> LayerState:
        weight = self.qkv.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        nothing = torch.zeros(batch_size, self.n_kv_heads, 0, self.head_dim, device=weight.device, dtype=wide)
        return LayerState(self.empty_segment(batch_size), Kept(nothing, nothing.clone()))

    def lasting(self, state: LayerState) -> Kept:
        return state.kept

    def mix(
        self, rows: Float[Tensor, "r m n e"], state: LayerState, angles: Angles | None
    ) -> tuple[Float[Tensor, "r h n e"], LayerState]:
        cache, kept = state
        g, scale = self.gate.sigmoid()[:, None, None], self.log_scale.exp()[:, None, None]
        q, k = unit(rows[:, : -self.n_kv_heads]).split((self.n_heads, self.n_kv_heads), dim=1)
        q, v = q * scale, rows[:, -self.n_kv_heads :]
        whole = q.shape[2] == self.segment
        if not whole:
            cache = cache.append(k, v)
            k, v = cache.valid()
        local = self._attend(q, k, v.to(rows.dtype), rotary=angles is not None)
        with without_autocast(rows):  # the same tokens are found whatever autocast says
            recalled, kept = self._recall_whole(q, k, v, kept) if whole else (self._recall(q, kept), kept)
        if cache.filled == self.segment:
            kept = kept.followed_by(*self._as_written(k, v)).newest(self.capacity)
            cache = cache.cleared()
        return blended(local, recalled, g), LayerState(cache, kept)

    def _attend(
        self,
        q: Float[Tensor, "r h n e"],
        k: Float[Tensor, "r g s e"],
        v: Float[Tensor, "r g s e"],
        *,
        rotary: bool,
    ) -> Float[Tensor, "r h n e"]:
        """Attention of the last n of s positions of a segment, in the type of v."""
        n, s = q.shape[2], k.shape[2]
        q = q * self.head_dim**0.5  # the temperature stands in for the scale that attention divides by
        if rotary:
            cos, sin = rotary_angles(0, s, self.head_dim, self.rope_theta, q.device)
            q, k = rotate(q, (cos[s - n :], sin[s - n :])), rotate(k, (cos, sin))
        return causal_attention(q.to(v.dtype), k.to(v.dtype), v)

    def _recall(self, q: Float[Tensor, "b h n e"], kept: Kept) -> Float[Tensor, "b h n e"]:
        """Query heads that share a key-value head stand one below the other."""
        rows = q.reshape(q.shape[0], self.n_kv_heads, -1, self.head_dim)
        return recall(rows, kept, self.top_k).view(q.shape)

    def _recall_whole(
        self, q: Float[Tensor, "r h N e"], k: Float[Tensor, "r g N e"], v: Float[Tensor, "r g N e"], kept: Kept
    ) -> tuple[Float[Tensor, "r h N e"], Kept]:
        """What each of several whole segments retrieves from those before it, and what is kept after them."""
        b, already = kept.keys.shape[0], kept.n_tokens
        queries = q.view(b, -1, *q.shape[1:])
        keys, values = (x.view(b, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3) for x in self._as_written(k, v))
        grown = kept.followed_by(keys, values)
        recalled = [
            self._recall(queries[:, s], grown.before(already + s * self.segment, self.capacity))
            for s in range(queries.shape[1])
        ]
        return torch.stack(recalled, dim=1).flatten(0, 1), grown.newest(self.capacity)

    def _as_written(
        self, k: Float[Tensor, "r g N e"], v: Float[Tensor, "r g N e"]
    ) -> tuple[Float[Tensor, "r g N e"], Float[Tensor, "r g N e"]]:
        return (k, v) if self.grad_through_memory else (k.detach(), v.detach())

    def flops(self, n: int, context: int, causal: float) -> float:
        """Projections, pairs inside segments, the search through the memory and the sum over what it found."""
        return self.projection_flops(n) + self.attention_flops(n, context, causal) + self.memory_flops(n, context)

    def memory_flops(self, n: int, context: int) -> float:
        """Scores of all tokens kept, and the weighted sum of the nearest; choosing them is free by convention."""
        pairs = sum(length * (kept + min(kept, self.top_k)) for length, kept in self._searches(context, context + n))
        return 2.0 * self.n_heads * self.head_dim * pairs

    def _searches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """For each segment that tokens start .. stop - 1 lie in: how many do, and how many tokens are kept then."""
        for first in range(start - start % self.segment, stop, self.segment):
            length = min(stop, first + self.segment) - max(start, first)
            yield length, min(self.capacity, first)


class MemorizingTransformer(SegmentModel):
    """State: a buffer for one segment a layer, and in one layer the memory, which grows by segments to its capacity."""

    def __init__(self, config: MemorizingConfig, generator: Generator | None = None) -> None:
        layers = iter(range(config.n_layers))

        def attention(config: MemorizingConfig, generator: Generator | None) -> SegmentAttention:
            remembers = next(layers) == config.remembering
            return KnnAttention(config, generator) if remembers else local.LocalAttention(config, generator)

        super().__init__(config, attention, generator)
        self.gate_lr_scale = config.gate_lr_scale

    def remembering(self) -> KnnAttention:
        """The layer that remembers."""
        (layer,) = (module for module in self.modules() if isinstance(module, KnnAttention))
        return layer

    def gates(self) -> Float[Tensor, " h"]:
        """Weight of the memory in every head, 0 to 1."""
        return self.remembering().gate.detach().sigmoid()

    def phases(self) -> list[Phase]:
        gate = self.remembering().gate
        (phase,) = super().phases()
        groups = [replace(group, parameters=[p for p in group.parameters if p is not gate]) for group in phase.groups]
        gates = ParameterGroup(name="gates", parameters=[gate], lr_scale=self.gate_lr_scale, weight_decay=False)
        return [replace(phase, groups=[*groups, gates])]

    def flops(self) -> FlopFormulas:
        return _Flops(self, super().flops())


class _Flops(FlopFormulas):
    """The formulas of every next-token model, except that nothing is propagated back to keys and values kept: of each
    product's two gradients only the query's, or the share's, is taken."""

    def __init__(self, model: MemorizingTransformer, plain: FlopFormulas) -> None:
        self.layer, self.plain = model.remembering(), plain

    def training(self, context: int, causal: float = 0.5) -> float:
        constant = 0.0 if self.layer.grad_through_memory else self.layer.memory_flops(context, 0)
        return self.plain.training(context, causal) - constant

    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        return self.plain.prefill(n, context, causal)

    def decode(self, context: int) -> float:
        return self.plain.decode(context)


@cache
def candidates(vocab_size: int) -> tuple[MemorizingConfig, ...]:
    """The Transformer's, width for width; gates and temperatures are all that comes on top."""
    return tuple(
        MemorizingConfig(**carried_over(config, MemorizingConfig)) for config in transformer.candidates(vocab_size)
    )


def _table(segment: int, memory: int) -> dict[str, int]:
    """Section 4.2: 12 layers of width 1024, memory in the 9th. The gated feed-forward here has three matrices of width
    8/3 d for the paper's two of 4 d."""
    sizes = {"vocab_size": 32_000, "d_model": 1024, "n_layers": 12, "n_heads": 8, "memory_layer": 8}
    return {**sizes, "segment": segment, "memory": memory}


ARCHITECTURE = Architecture(
    config=MemorizingConfig,
    build=MemorizingTransformer,
    traits=lambda _config: Traits(likelihood=True, answers=True),
    paper="Wu et al. 2022, Memorizing Transformers, 2203.08913",
    candidates=candidates,
    published={
        "512-1536": _table(512, 1536),
        "512-8192": _table(512, 8192),
        "512-65k": _table(512, 65_536),
        "2048-65k": _table(2048, 65_536),
        # The peer of Munkhdalai et al. 2024 (2404.07143), table 2, without its Transformer-XL caches.
        "infini-peer": _table(2048, 65_000),
    },
)
