"""Infini-attention: attention inside segments beside a compressive memory of all earlier ones, of constant size.

One layer, for segment s of N tokens, per head; phi(x) = elu(x) + 1 and R the rotation of rotary positions:

    A_dot = softmax_causal( R(Q) R(K)^T / sqrt(e) ) V            inside the segment                      eq. 4 to 6
    A_mem = phi(Q) M_{s-1} / (phi(Q) z_{s-1} + eps)              read                                    eq. 7
    A     = g A_mem + (1 - g) A_dot,   g = sigmoid(beta)         one learned scalar a head               eq. 10
    M_s   = M_{s-1} + phi(K)^T V,      z_s = z_{s-1} + sum phi(K)                  write, "linear"       eq. 8
    M_s   = M_{s-1} + phi(K)^T (V - phi(K) M_{s-1} / (phi(K) z_{s-1} + eps))       write, "delta"        eq. 9

The read comes before the write, so the memory holds earlier segments only: every past token is seen exactly once. Keys
and queries enter it without rotation: phi acts on components, so a rotated product would depend on the places inside
their segments. Gates are the only parameters beyond the Transformer's. The delta rule is a batched one, as published:
it corrects a whole segment against the memory before it, and z counts every key again; it does not overwrite.

    M, z      LayerState.memory[..., :e] and [..., e]: the norm is summed as one more column of the values
    "open"    the open segment's share of the sums; each token adds its own, so that no step costs more than another
    g         weight of the memory; in the first segment there is none, and its heads give (1 - g) A_dot ("strict"), or
              A_dot alone ("bypass")

Departures: scores are divided by sqrt(e), the head width (eq. 6 prints the model width); eps is added to the
denominator, which is 0 for an empty memory only; phi is computed as exp(min(x, 0)) + max(x, 0), since elu(x) + 1 loses
in fp32 the small values on which retrieval over long contexts rests. Gates start at g = 1/2 and learn 25 times as
fast, without weight decay: at the common rate they have been seen not to move at all.

Source: Munkhdalai, Faruqui & Gopal 2024, 2404.07143.

Letters: b batch, t time, n positions of a stretch, r rows (texts x segments), s segments, d width, h query heads, g
key-value heads, m queries that share a key-value head, e head width, w = e + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.architectures import transformer
from archbench.errors import ConfigError
from archbench.model import Architecture, Conversion, FlopFormulas, ParameterGroup, Phase, Traits
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

Update = Literal["linear", "delta"]

CONVERTED_GATE = -4.0
"""Where gates of a converted model start: g = 0.018 hardly disturbs what it had learned, and still lets a gradient
through, which a gate of exactly zero does not."""


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(SegmentConfig):
    """Sizes of a Transformer with Infini-attention.

    Attributes:
        update: how a segment is written into the memory.
        first_segment: what becomes of the memory's weight while there is no memory.
        memory_eps: added to the denominator of a read.
        bptt_segments: gradients cross at most this many segments in a row; None for all of a window.
        gate_init: beta of every head at first; g = sigmoid(beta) is the weight of the memory.
        gate_lr_scale: learning rate of the gates as a multiple of the others'.
    """

    kind: ClassVar[str] = "infini_attention"

    update: Update = "linear"
    first_segment: Literal["strict", "bypass"] = "strict"
    memory_eps: float = 1e-6
    bptt_segments: int | None = None
    gate_init: float = 0.0
    gate_lr_scale: float = 25.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_eps <= 0:
            raise ConfigError(f"{self.kind}.memory_eps: {self.memory_eps}; must be above 0")
        if self.bptt_segments is not None and self.bptt_segments < 1:
            raise ConfigError(
                f"{self.kind}.bptt_segments: {self.bptt_segments}; must be at least 1, or left out for all"
            )
        if self.gate_lr_scale <= 0:
            raise ConfigError(f"{self.kind}.gate_lr_scale: {self.gate_lr_scale}; must be above 0")

    @property
    def n_parameters(self) -> int:
        """Parameters: the backbone's and one gate a head and layer."""
        return super().n_parameters + self.n_layers * self.n_heads

    @property
    def memory_numbers(self) -> int:
        """Numbers in one text's memory, M and z of every layer. Source: 2404.07143, table 1. (A state also holds as
        many for the open segment's share, and the `segment_numbers` of its keys and values.)"""
        return self.n_layers * self.kv_heads * self.head_dim * (self.head_dim + 1)


class LayerState(NamedTuple):
    """A layer's state, sums in fp32 at least.

    Attributes:
        cache: keys, rotated, and values of the open segment.
        memory: the sums over all finished segments.
        open: what the open segment will add to them.
        n_finished: how many segments that is; while it is 0 there is nothing to read.
    """

    cache: SegmentCache
    memory: Float[Tensor, "b g e w"]
    open: Float[Tensor, "b g e w"]
    n_finished: int

    @property
    def filled(self) -> int:
        return self.cache.filled


def features(x: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """phi(x) = elu(x) + 1 in fp32 at least: x + 1 above zero, exp(x) below."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.clamp(max=0).exp() + wide.relu()


def read(
    queries: Float[Tensor, "*r g m e"], memory: Float[Tensor, "*r g e w"], eps: float
) -> Float[Tensor, "*r g m e"]:
    """What the memory holds for the features of queries. Source: 2404.07143, eq. 7."""
    sums = queries @ memory
    return sums[..., :-1] / (sums[..., -1:] + eps)


def contribution(
    keys: Float[Tensor, "*r g n e"],
    values: Float[Tensor, "*r g n e"],
    corrected: Float[Tensor, "*r g e w"] | None,
    eps: float,
) -> Float[Tensor, "*r g e w"]:
    """What features of keys and their values add to the memory. With `corrected`, the memory before their segment,
    only what it does not hold of the values already. Source: 2404.07143, eq. 8 (without) and 9 (with)."""
    return keys.transpose(-1, -2) @ _new_values(keys, values, corrected, eps)


def written(
    memory: Float[Tensor, "b g e w"],
    keys: Float[Tensor, "b g n e"],
    values: Float[Tensor, "b g n e"],
    corrected: Float[Tensor, "b g e w"] | None,
    eps: float,
) -> Float[Tensor, "b g e w"]:
    """The memory with a contribution added, in one product."""
    columns = _new_values(keys, values, corrected, eps)
    flat = (memory.flatten(0, 1), keys.transpose(-1, -2).flatten(0, 1), columns.flatten(0, 1))
    return torch.baddbmm(*flat).view(memory.shape)


def _new_values(
    keys: Float[Tensor, "*r g n e"],
    values: Float[Tensor, "*r g n e"],
    corrected: Float[Tensor, "*r g e w"] | None,
    eps: float,
) -> Float[Tensor, "*r g n w"]:
    """What is summed for each key, with a column of ones for the norm."""
    if corrected is not None:
        values = values - read(keys, corrected, eps)
    return F.pad(values, (0, 1), value=1.0)


def recall_in_parallel(
    q: Float[Tensor, "b s g m e"],
    k: Float[Tensor, "b s g n e"],
    v: Float[Tensor, "b s g n e"],
    memory: Float[Tensor, "b g e w"],
    *,
    n_finished: int,
    eps: float,
) -> tuple[Float[Tensor, "b s g m e"], Float[Tensor, "b g e w"]]:
    """All segments at once, linear update: a prefix sum gives the memory before each. The last one's contribution
    stands apart, since no read here depends on it and so no gradient passes. q and k are features."""
    after = memory[:, None] + contribution(k[:, :-1], v[:, :-1], None, eps).cumsum(dim=1)
    before = torch.cat([memory[:, None], after], dim=1)
    empty = int(n_finished == 0)
    reads = read(q[:, empty:], before[:, empty:], eps)
    if empty:
        reads = torch.cat([torch.zeros_like(q[:, :1]), reads], dim=1)
    return reads, before[:, -1] + contribution(k[:, -1], v[:, -1], None, eps)


def recall_in_order(
    q: Float[Tensor, "b s g m e"],
    k: Float[Tensor, "b s g n e"],
    v: Float[Tensor, "b s g n e"],
    memory: Float[Tensor, "b g e w"],
    *,
    n_finished: int,
    eps: float,
    update: Update = "linear",
    bptt_segments: int | None = None,
) -> tuple[Float[Tensor, "b s g m e"], Float[Tensor, "b g e w"]]:
    """One segment after the other, as the paper says it; either update. q and k are features."""
    reads = []
    for s in range(q.shape[1]):
        memory = _entering(memory, n_finished + s, bptt_segments)
        empty = n_finished + s == 0
        reads.append(torch.zeros_like(q[:, s]) if empty else read(q[:, s], memory, eps))
        corrected = memory if update == "delta" and not empty else None
        memory = memory + contribution(k[:, s], v[:, s], corrected, eps)
    return torch.stack(reads, dim=1), memory


def _entering(memory: Float[Tensor, "b g e w"], segment: int, bptt_segments: int | None) -> Float[Tensor, "b g e w"]:
    """The memory that segment number `segment` of a text sees, without gradient at every bptt_segments-th."""
    return memory.detach() if bptt_segments is not None and segment % bptt_segments == 0 else memory


class InfiniAttention(SegmentAttention):
    """Attention inside segments, mixed by a gate a head with what the memory of earlier segments holds."""

    def __init__(self, config: InfiniConfig, generator: Generator | None) -> None:
        super().__init__(config, generator)
        self.update: Update = config.update
        self.bypass = config.first_segment == "bypass"
        self.eps, self.bptt_segments = config.memory_eps, config.bptt_segments
        self.gate = nn.Parameter(torch.full((config.n_heads,), float(config.gate_init)))

    def initial_state(self, batch_size: int) -> LayerState:
        weight, e = self.qkv.weight, self.head_dim
        wide = torch.promote_types(weight.dtype, torch.float32)
        memory = torch.zeros(batch_size, self.n_kv_heads, e, e + 1, device=weight.device, dtype=wide)
        return LayerState(self.empty_segment(batch_size), memory, memory.clone(), 0)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: LayerState,
        angles: Angles | None,
        repeats: Float[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], LayerState]:
        """`repeats` says how often each token is written."""
        mixed, read_so_far = [], 0
        # A call that never leaves the first segment says nothing about the memory: gates learn nothing from it.
        alone = not state.n_finished and state.filled + x.shape[1] <= self.segment
        for stretch in self.stretches(x, state.filled):
            here = slice(read_so_far, read_so_far := read_so_far + stretch.shape[1])
            repeated = None if repeats is None else repeats[:, here]
            rows, state = self.mix(self.rows(stretch), state, angles, repeated, alone=alone)
            mixed.append(rows)
        return self.out(self.joined(mixed, x.shape[0])), state

    def mix(
        self,
        rows: Float[Tensor, "r m n e"],
        state: LayerState,
        angles: Angles | None,
        repeats: Float[Tensor, "b t"] | None = None,
        *,
        alone: bool = False,
    ) -> tuple[Float[Tensor, "r h n e"], LayerState]:
        """`alone`: gates are not to learn from this stretch."""
        local, cache = self.attend(rows, state.cache, angles)
        g = self._weight_of_memory(rows.shape[0], state.n_finished, state.memory.shape[0])
        g = g.detach() + 0 * g if alone else g  # a gradient of zero, not none
        # Sums over millions of tokens are kept in fp32: in bf16 the norm stops growing after some hundred segments.
        with without_autocast(rows):
            recalled, state = self._recall(rows, state, repeats)
        return blended(local, recalled, g), state._replace(cache=cache)

    def lasting(self, state: LayerState) -> Tensor:
        return state.memory

    @property
    def adds_up(self) -> bool:
        """The memory is one sum over all earlier tokens, through which gradients pass unhindered."""
        return self.update == "linear" and self.bptt_segments is None

    def last_segment(
        self, x: Float[Tensor, "b t d"], angles: Angles | None, repeats: Float[Tensor, "b t"] | None
    ) -> Float[Tensor, "b n d"]:
        """What `forward` gives for the last of several whole segments of a new text, if the memory `adds_up`: the
        others' queries, local attention and outputs are left out. Source of the shortcut: none of them is read."""
        b, n, g = len(x), self.segment, self.n_kv_heads
        past, own = x[:, :-n], x[:, -n:]
        pairs = F.linear(past, self.qkv.weight[self.n_heads * self.head_dim :]).view(b, -1, 2 * g, self.head_dim)
        k, v = pairs.transpose(1, 2).split(g, dim=1)
        (stretch,) = self.stretches(own, 0)
        heads = self.rows(stretch)
        queries, _, _ = self.parts(heads)
        local, _ = self.attend(heads, self.empty_segment(b), angles)
        with without_autocast(x):
            keys = features(k)
            if repeats is not None:
                keys = keys * repeats[:, None, :-n, None]
            memory = contribution(keys, v.to(keys.dtype), None, self.eps)
            recalled = read(features(queries).reshape(b, g, -1, self.head_dim), memory, self.eps).view(queries.shape)
        return self.out(self.joined([blended(local, recalled, self.gate.sigmoid()[:, None, None])], b))

    def _weight_of_memory(self, n_rows: int, n_finished: int, batch_size: int) -> Float[Tensor, "*r h 1 1"]:
        """g of every head, by row where they differ; in bypass zero in the first segment of a text."""
        g = self.gate.sigmoid()[:, None, None]
        if not self.bypass or n_finished:
            return g
        remembers = torch.arange(n_rows // batch_size, device=g.device).clamp(max=1).to(g.dtype)
        return g * remembers.repeat(batch_size)[:, None, None, None]

    def _recall(
        self,
        heads: Float[Tensor, "r m n e"],
        state: LayerState,
        repeats: Float[Tensor, "b t"] | None,
    ) -> tuple[Float[Tensor, "r h n e"], LayerState]:
        """What the memory holds for the queries of one stretch, zero where there is none, and what the stretch makes
        of it. (The open segment's buffer is left to `attend`.)"""
        b, g, n, e = state.memory.shape[0], self.n_kv_heads, heads.shape[2], self.head_dim
        q, k = features(heads[:, :-g]).split((self.n_heads, g), dim=1)
        # Query heads that share a key-value head stand one below the other.
        queries, keys = q.reshape(b, -1, g, self.n_heads // g * n, e), k.reshape(b, -1, g, n, e)
        values = heads[:, -g:].to(keys.dtype).reshape(b, -1, g, n, e)
        if repeats is not None:
            keys = keys * repeats.reshape(b, -1, 1, n, 1)
        if n == self.segment:
            reads, memory = self._recall_whole(queries, keys, values, state.memory, state.n_finished)
            state = state._replace(memory=memory, n_finished=state.n_finished + keys.shape[1])
        else:
            reads, state = self._recall_part(queries, keys, values, state)
        return reads.reshape(q.shape), state

    def _recall_whole(
        self, q: Tensor, k: Tensor, v: Tensor, memory: Float[Tensor, "b g e w"], n_finished: int
    ) -> tuple[Float[Tensor, "b s g m e"], Float[Tensor, "b g e w"]]:
        if self.adds_up:
            return recall_in_parallel(q, k, v, memory, n_finished=n_finished, eps=self.eps)
        return recall_in_order(
            q, k, v, memory,
            n_finished=n_finished, eps=self.eps, update=self.update, bptt_segments=self.bptt_segments,
        )  # fmt: skip

    def _recall_part(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState
    ) -> tuple[Float[Tensor, "b 1 g m e"], LayerState]:
        """A stretch inside the open segment; the memory changes where the segment ends."""
        memory = _entering(state.memory, state.n_finished, self.bptt_segments)
        empty = state.n_finished == 0
        reads = torch.zeros_like(q[:, 0]) if empty else read(q[:, 0], memory, self.eps)
        corrected = memory if self.update == "delta" and not empty else None
        share = written(state.open, k[:, 0], v[:, 0], corrected, self.eps)
        if state.filled + k.shape[3] == self.segment:
            finished = LayerState(state.cache, memory + share, torch.zeros_like(share), state.n_finished + 1)
            return reads[:, None], finished
        return reads[:, None], state._replace(memory=memory, open=share)

    def flops(self, n: int, context: int, causal: float) -> float:
        """Projections, pairs inside segments; every token is written, and reads if a segment lies before its own."""
        reading = n - max(0, min(n, self.segment - context))
        memory = self.read_flops(reading) + self.write_flops(n, reading)
        return self.projection_flops(n) + self.attention_flops(n, context, causal) + memory

    def read_flops(self, n: int) -> float:
        return 2 * self.n_heads * self.head_dim * (self.head_dim + 1) * n

    def write_flops(self, n: int, n_corrected: int) -> float:
        """n keys and values, of which delta holds `n_corrected` against the memory first."""
        products = n + (n_corrected if self.update == "delta" else 0)
        return 2 * self.n_kv_heads * self.head_dim * (self.head_dim + 1) * products

    def untrained_flops(self, context: int) -> float:
        """FLOPs that twice the forward pass counts too many for the backward pass over a window: nothing that the last
        segment writes is read, and at a detached memory gradients end."""
        total = 0.0
        lengths = [self.segment] * (context // self.segment) + [context % self.segment] * bool(context % self.segment)
        every = self.bptt_segments or len(lengths)
        for s, n in enumerate(lengths):
            unread = s == len(lengths) - 1 or (s + 1) % every == 0
            detached = s > 0 and s % every == 0
            corrected = n if s > 0 else 0
            total += 2 * self.write_flops(n, corrected) * unread + self.read_flops(n) * detached
            if detached and not unread:
                total += self.write_flops(0, corrected)
        return total


class Infini(SegmentModel):
    """State: the memory, the open segment's share of it and its keys and values; constant in size."""

    def __init__(self, config: InfiniConfig, generator: Generator | None = None) -> None:
        super().__init__(config, InfiniAttention, generator)
        self.gate_lr_scale = config.gate_lr_scale

    def layers(self) -> list[InfiniAttention]:
        """The attention layers, in order."""
        return [module for module in self.modules() if isinstance(module, InfiniAttention)]

    def gates(self) -> Float[Tensor, "layers h"]:
        """Weight of the memory in every head of every layer, 0 to 1."""
        return torch.stack([layer.gate.detach().sigmoid() for layer in self.layers()])

    def window_hidden(
        self, tokens: Int[Tensor, "b t"], n: int, repeats: Float[Tensor, "b t"] | None
    ) -> Float[Tensor, "b n d"]:
        """Of the last layer only what the last n positions need, if windows are whole segments."""
        (b, t), segment = tokens.shape, self.config.segment
        x, _ = self.frontend(self.embedding(tokens), self.frontend.initial_state(b))
        angles = self.angles(t, 0, x.device)
        *below, last = zip(self.blocks, self.layers(), strict=True)
        for block, attention in below:
            x = x + attention(block.norm_attention(x), attention.initial_state(b), angles, repeats)[0]
            x = x + block.ffn(block.norm_ffn(x))
        block, attention = last
        seen = block.norm_attention(x)
        if attention.adds_up and n <= segment < t and t % segment == 0:
            x = x[:, -segment:] + attention.last_segment(seen, angles, repeats)
        else:
            x = x + attention(seen, attention.initial_state(b), angles, repeats)[0]
        x = x[:, -n:]
        return self.norm(x + block.ffn(block.norm_ffn(x)))

    def phases(self) -> list[Phase]:
        gates = [layer.gate for layer in self.layers()]
        own = {id(gate) for gate in gates}
        (phase,) = super().phases()
        groups = [
            replace(group, parameters=[p for p in group.parameters if id(p) not in own]) for group in phase.groups
        ]
        gate_group = ParameterGroup(name="gates", parameters=gates, lr_scale=self.gate_lr_scale, weight_decay=False)
        return [replace(phase, groups=[*groups, gate_group])]

    def flops(self) -> FlopFormulas:
        return _InfiniFlops(self, super().flops())


class _InfiniFlops(FlopFormulas):
    """The formulas of every next-token model, but for writes that no gradient reaches."""

    def __init__(self, model: Infini, plain: FlopFormulas) -> None:
        self.model, self.plain = model, plain

    def training(self, context: int, causal: float = 0.5) -> float:
        untrained = sum(layer.untrained_flops(context) for layer in self.model.layers())
        return self.plain.training(context, causal) - untrained

    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        return self.plain.prefill(n, context, causal)

    def decode(self, context: int) -> float:
        return self.plain.decode(context)


@cache
def candidates(vocab_size: int) -> tuple[InfiniConfig, ...]:
    """The Transformer's, width for width; gates are all that comes on top."""
    return tuple(InfiniConfig(**carried_over(config, InfiniConfig)) for config in transformer.candidates(vocab_size))


def _with_memory(source: Any) -> Mapping[str, Any]:
    """The config for the weights of a model without memory."""
    return {**carried_over(source, InfiniConfig), "gate_init": CONVERTED_GATE}


def _with_gates(config: InfiniConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, and gates where the source has none."""
    gates = {
        f"blocks.{i}.attention.gate": torch.full((config.n_heads,), config.gate_init) for i in range(config.n_layers)
    }
    return {**gates, **weights}


_FROM_WITHOUT = Conversion(config=_with_memory, weights=_with_gates)

ARCHITECTURE = Architecture(
    config=InfiniConfig,
    build=Infini,
    traits=lambda config: Traits(
        likelihood=True, constant_state=True, answers=True, repeats=config.update == "linear"
    ),
    paper="Munkhdalai et al. 2024, Leave No Context Behind: Efficient Infinite Context Transformers with "
    "Infini-attention, 2404.07143",
    candidates=candidates,
    published={
        # Section 4.1: the language model of PG19 and arXiv-math. The paper's feed-forward has two matrices, ours three;
        # its vocabulary is not printed.
        "pg19": {
            "vocab_size": 32_000, "d_model": 1024, "n_layers": 12, "n_heads": 8, "d_ffn": 4096, "segment": 2048,
        },
    },
    conversions={
        "transformer": _FROM_WITHOUT,
        "local": _FROM_WITHOUT,
        # To change what the config says: the update, the segment, the first segment.
        "infini_attention": Conversion(config=partial(carried_over, target=InfiniConfig), weights=_with_gates),
    },
)  # fmt: skip
