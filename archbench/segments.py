"""Attention inside segments: what models that read text segment by segment share.

Segments are counted from the start of the text, N tokens each, never from the edge of a call. So the tokens of one call
fall into at most three stretches: what completes the segment under way, whole segments, what opens the next one. Whole
segments are independent of each other here, and so become rows of one batch; the open segment waits in a buffer of
fixed size. Positions restart in every segment.

`SegmentModel` is the backbone (the Transformer's: pre-norm blocks of attention and SwiGLU) around any
`SegmentAttention`, which adds to this module's attention whatever it carries from one segment to the next.

Letters: b batch, t time, n positions of a stretch, N segment length, r rows (texts x whole segments), d width, h query
heads, g key-value heads, e head width, v vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.errors import ConfigError
from archbench.layers import Embedding, Frontend, Linear, RMSNorm, Stack, SwiGLU, residual_std, rotary_angles, rotate
from archbench.model import AutoregressiveModel, AutoregressiveState
from archbench.ops.attention import causal_attention, causal_attention_flops
from archbench.ops.backbone_lean import LONGEST, Attend, BackboneWeights, LeanBackbone
from archbench.ops.decode_ladder import Ladder, unchanged
from archbench.ops.decode_weights import BlockWeights
from archbench.state import State


def stretches(n: int, filled: int, length: int) -> list[int]:
    """Lengths of the stretches that n new tokens fall into when the open segment of `length` holds `filled` < length:
    what joins it, all whole segments together, what opens the next. Empty ones are left out."""
    head = min(n, (length - filled) % length)
    whole = (n - head) // length * length
    return [stretch for stretch in (head, whole, n - head - whole) if stretch]


class SegmentCache(NamedTuple):
    """Keys and values of the `filled` positions of the open segment. The buffer always has room for one whole segment,
    so its size never changes; what lies beyond `filled` never matters."""

    keys: Float[Tensor, "b g N e"]
    values: Float[Tensor, "b g N e"]
    filled: int

    def append(self, keys: Float[Tensor, "b g n e"], values: Float[Tensor, "b g n e"]) -> SegmentCache:
        """The buffer with n more positions, written in place unless a gradient must pass."""
        stop = self.filled + keys.shape[2]
        assert stop <= self.keys.shape[2], "a stretch never reaches beyond its segment"
        if keys.requires_grad or self.keys.requires_grad:
            parts = [(old[:, :, : self.filled], new.to(old.dtype), old[:, :, stop:]) for old, new in
                     ((self.keys, keys), (self.values, values))]  # fmt: skip
            return SegmentCache(torch.cat(parts[0], dim=2), torch.cat(parts[1], dim=2), stop)
        self.keys[:, :, self.filled : stop] = keys
        self.values[:, :, self.filled : stop] = values
        return SegmentCache(self.keys, self.values, stop)

    def valid(self) -> tuple[Float[Tensor, "b g n e"], Float[Tensor, "b g n e"]]:
        """Views of the keys and values that count."""
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def cleared(self) -> SegmentCache:
        """The buffer of a segment not yet begun."""
        return self._replace(filled=0)


def empty_segment(
    batch_size: int, n_kv_heads: int, length: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
) -> SegmentCache:
    room = torch.zeros(batch_size, n_kv_heads, length, head_dim, device=device, dtype=dtype)
    return SegmentCache(room, room.clone(), 0)


class Angles(NamedTuple):
    """Rotary angles of the positions `first`, first + 1, ... inside a segment."""

    cos: Float[Tensor, "n e"]
    sin: Float[Tensor, "n e"]
    first: int

    def at(self, start: int, n: int) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
        """Those of positions start .. start + n - 1."""
        here = slice(start - self.first, start - self.first + n)
        return self.cos[here], self.sin[here]


def segment_angles(n: int, filled: int, length: int, head_dim: int, theta: float, device: torch.device) -> Angles:
    """The angles that n new tokens need when the open segment of `length` holds `filled`."""
    first, count = (filled, n) if filled + n <= length else (0, length)
    return Angles(*rotary_angles(first, count, head_dim, theta, device), first)


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Sizes of a Transformer that attends inside segments.

    Attributes:
        n_kv_heads, d_ffn: None mean n_heads and 8/3 d_model rounded up to 8.
        segment: tokens of a segment.
        rotary: rotary positions inside a segment; False leaves attention without positions.
        frontend_conv: tokens that the convolution in front of the first layer spans; 0 for none.
    """

    kind: ClassVar[str]
    """The architecture's name, for messages."""

    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 2
    n_kv_heads: int | None = None
    d_ffn: int | None = None
    segment: int = 64
    rotary: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    boundary: int = 0
    frontend_conv: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "kv_heads", "ffn_width", "segment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.kind}.{name}: {getattr(self, name)}; must be at least 1")
        if self.d_model % self.n_heads:
            raise ConfigError(f"{self.kind}.n_heads: {self.n_heads} does not divide d_model {self.d_model}")
        if self.rotary and self.head_dim % 2:
            raise ConfigError(
                f"{self.kind}.n_heads: {self.n_heads} gives heads of odd width {self.head_dim}; rotary positions need "
                "an even width"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"{self.kind}.n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.rope_theta <= 1:
            raise ConfigError(f"{self.kind}.rope_theta: {self.rope_theta}; must be above 1")
        if self.norm_eps <= 0:
            raise ConfigError(f"{self.kind}.norm_eps: {self.norm_eps}; must be above 0")
        if not 0 <= self.boundary < self.vocab_size:
            raise ConfigError(f"{self.kind}.boundary: {self.boundary}; must lie in [0, {self.vocab_size})")
        if self.frontend_conv and self.frontend_conv < 2:
            raise ConfigError(f"{self.kind}.frontend_conv: {self.frontend_conv}; must be at least 2, or 0 for none")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_width(self) -> int:
        return -(-8 * self.d_model // 24) * 8 if self.d_ffn is None else self.d_ffn

    @property
    def n_parameters(self) -> int:
        """Parameters of the backbone, embeddings included, a tied table once."""
        d = self.d_model
        attention = (2 * self.n_heads + 2 * self.kv_heads) * self.head_dim * d
        block = attention + 3 * d * self.ffn_width + 2 * d
        front = Frontend.parameters_of(d, self.frontend_conv)
        return (1 if self.tie_embeddings else 2) * self.vocab_size * d + front + self.n_layers * block + d

    @property
    def segment_numbers(self) -> int:
        """Numbers in the buffers of one text's open segment: keys and values of every layer."""
        return self.n_layers * 2 * self.segment * self.kv_heads * self.head_dim


def carried_over(source: Any, target: type[SegmentConfig]) -> dict[str, Any]:
    """The values of a config that `target` has fields of the same name for: what a conversion keeps."""
    own = {field.name for field in fields(target)}
    return {field.name: getattr(source, field.name) for field in fields(source) if field.name in own}


class SegmentAttention(nn.Module, ABC):
    """The projections of an attention layer, and causal attention inside segments."""

    def __init__(self, config: SegmentConfig, generator: Generator | None) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        self.segment = config.segment
        width = config.n_heads * config.head_dim
        self.qkv = Linear(config.d_model, width + 2 * config.kv_heads * config.head_dim, generator=generator)
        self.out = Linear(width, config.d_model, std=residual_std(width, 2 * config.n_layers), generator=generator)

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """The layer's state before anything was read: a NamedTuple with `filled`, the tokens in the open segment."""

    @abstractmethod
    def mix(
        self, rows: Float[Tensor, "r m n e"], state: Any, angles: Angles | None
    ) -> tuple[Float[Tensor, "r h n e"], Any]:
        """What the tokens of one stretch gather, from their queries, keys and values. Gives up `state`."""

    def forward(
        self, x: Float[Tensor, "b t d"], state: Any, angles: Angles | None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """Any number of tokens, from any point of a segment. Gives up `state`."""
        mixed = []
        for stretch in self.stretches(x, state.filled):
            rows, state = self.mix(self.rows(stretch), state, angles)
            mixed.append(rows)
        return self.out(self.joined(mixed, x.shape[0])), state

    @abstractmethod
    def flops(self, n: int, context: int, causal: float) -> float:
        """FLOPs of n tokens of one row after `context` tokens."""

    def lasting(self, state: Any) -> State:
        """What of the layer's state outlives the open segment: nothing, unless a layer carries something on."""
        del state
        return ()

    def empty_segment(self, batch_size: int) -> SegmentCache:
        weight = self.qkv.weight
        return empty_segment(
            batch_size, self.n_kv_heads, self.segment, self.head_dim, device=weight.device, dtype=weight.dtype
        )

    def stretches(self, x: Float[Tensor, "b t d"], filled: int) -> Sequence[Float[Tensor, "b _ m e"]]:
        """The projected heads of x, cut into stretches; the m heads are those of queries, keys and values."""
        b, t, _ = x.shape
        heads = self.qkv(x).view(b, t, -1, self.head_dim)
        lengths = stretches(t, filled, self.segment)
        return (heads,) if len(lengths) == 1 else heads.split(lengths, dim=1)

    def rows(self, stretch: Float[Tensor, "b n m e"]) -> Float[Tensor, "r m _ e"]:
        """The heads of a stretch, with its whole segments as rows: those of text 0, of text 1, ..."""
        n, heads = min(stretch.shape[1], self.segment), stretch.shape[2]
        if n < stretch.shape[1]:
            stretch = stretch.reshape(-1, n, heads, self.head_dim)
        return stretch.transpose(1, 2)

    def parts(
        self, rows: Float[Tensor, "r m n e"]
    ) -> tuple[Float[Tensor, "r h n e"], Float[Tensor, "r g n e"], Float[Tensor, "r g n e"]]:
        """Queries, keys and values."""
        q, k, v = rows.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        return q, k, v

    def joined(self, rows: Sequence[Float[Tensor, "_ h _ e"]], batch_size: int) -> Float[Tensor, "b t d"]:
        """What attention returned for the stretches, as texts, heads side by side."""
        width = self.n_heads * self.head_dim
        mixed = [stretch.transpose(1, 2).reshape(batch_size, -1, width) for stretch in rows]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def attend(
        self, rows: Float[Tensor, "r m n e"], cache: SegmentCache, angles: Angles | None
    ) -> tuple[Float[Tensor, "r h n e"], SegmentCache]:
        """Causal attention inside segments of one stretch. A segment that became full leaves the buffer cleared."""
        start, n, turned = cache.filled, rows.shape[2], self.n_heads + self.n_kv_heads
        if angles is not None:
            q, k = rotate(rows[:, :turned], angles.at(start, n)).split((self.n_heads, self.n_kv_heads), dim=1)
            v = rows[:, turned:]
        else:
            q, k, v = self.parts(rows)
        if start == 0 and n == self.segment:
            return causal_attention(q, k, v), cache
        cache = cache.append(k, v)
        keys, values = cache.valid()
        mixed = causal_attention(q, keys.to(q.dtype), values.to(q.dtype))
        return mixed, cache.cleared() if cache.filled == self.segment else cache

    def projection_flops(self, n: int) -> float:
        return self.qkv.flops(n) + self.out.flops(n)

    def attention_flops(self, n: int, context: int, causal: float) -> float:
        """Pairs inside segments only."""
        total, filled = 0.0, context % self.segment
        for stretch in stretches(n, filled, self.segment):
            rows, length = max(1, stretch // self.segment), min(stretch, self.segment)
            total += rows * causal_attention_flops(length, filled, self.n_heads, self.head_dim, causal)
            filled = 0
        return total


def blended(
    local: Float[Tensor, "r h n e"], recalled: Float[Tensor, "r h n e"], g: Float[Tensor, "*r h 1 1"]
) -> Float[Tensor, "r h n e"]:
    """(1 - g) local + g recalled, computed in the type of `recalled`, in the type of `local`."""
    return torch.lerp(local.to(recalled.dtype), recalled, g.to(recalled.dtype)).to(local.dtype)


class SegmentBlock(nn.Module):
    """Attention and feed-forward, each on its own residual branch."""

    def __init__(self, config: SegmentConfig, attention: SegmentAttention, generator: Generator | None) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(config.d_model, config.norm_eps)
        self.attention = attention
        self.norm_ffn = RMSNorm(config.d_model, config.norm_eps)
        out_std = residual_std(config.ffn_width, 2 * config.n_layers)
        self.ffn = SwiGLU(config.d_model, config.ffn_width, out_std=out_std, generator=generator)

    def forward(
        self, x: Float[Tensor, "b t d"], state: Any, angles: Angles | None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        mixed, state = self.attention(self.norm_attention(x), state, angles)
        x = x + mixed
        return x + self.ffn(self.norm_ffn(x)), state

    def flops(self, n: int, context: int, causal: float) -> float:
        return self.attention.flops(n, context, causal) + self.ffn.flops(n)

    def weights(self) -> BlockWeights:
        """What a decode step needs of the block."""
        return BlockWeights(
            norm_attention=self.norm_attention.weight,
            qkv=self.attention.qkv.weight,
            out=self.attention.out.weight,
            norm_ffn=self.norm_ffn.weight,
            gate_up=self.ffn.gate_up.weight,
            down=self.ffn.down.weight,
        )


class SegmentModel(AutoregressiveModel):
    """The backbone around layers made by `attention`; initial weights as the Transformer's.

    State: one entry a layer, whose size does not depend on how much was read.
    """

    def __init__(
        self,
        config: SegmentConfig,
        attention: Callable[[Any, Generator | None], SegmentAttention],
        generator: Generator | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.boundary = config.boundary
        # 0.6 is the root mean square of the first residual stream; a tied table must suit the logits instead.
        std = 0.3 * config.d_model**-0.5 if config.tie_embeddings else 0.6
        self.embedding = Embedding(config.vocab_size, config.d_model, std=std, generator=generator)
        self.blocks: Stack[SegmentBlock] = Stack(
            SegmentBlock(config, attention(config, generator), generator) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = Linear(
            config.d_model, config.vocab_size, std=0.3 * config.d_model**-0.5, generator=generator
        )
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight
        self.frontend = Frontend(config.d_model, config.frontend_conv, generator)
        self.ladder: Ladder[BackboneWeights, LeanBackbone] = Ladder({"lean": LeanBackbone}, LONGEST)

    def initial_layers(self, batch_size: int) -> tuple[Any, ...]:
        states = (block.attention.initial_state(batch_size) for block in self.blocks)
        return (*states, *self.frontend.initial_state(batch_size))

    def hidden(
        self, tokens: Int[Tensor, "b t"], layers: tuple[Any, ...]
    ) -> tuple[Float[Tensor, "b t d"], tuple[Any, ...]]:
        x, window = self.frontend(self.embedding(tokens), layers[len(self.blocks) :])
        angles = self.angles(tokens.shape[1], layers[0].filled, x.device)
        backbone = self._backbone(tokens.shape[1])
        if backbone is not None:
            states, attend = self._attending(layers, angles)
            return backbone.hidden(x, attend), (*states, *window)
        states = []
        for block, state in zip(self.blocks, layers, strict=False):
            x, state = block(x, state, angles)
            states.append(state)
        return self.norm(x), (*states, *window)

    def predict(
        self, tokens: Int[Tensor, "b t"], layers: tuple[Any, ...]
    ) -> tuple[Float[Tensor, "b t v"], tuple[Any, ...]]:
        backbone = self._backbone(tokens.shape[1])
        if backbone is None:
            return super().predict(tokens, layers)
        x, window = self.frontend(self.embedding(tokens), layers[len(self.blocks) :])
        states, attend = self._attending(layers, self.angles(1, layers[0].filled, x.device))
        return backbone.logits(x, attend), (*states, *window)

    def _attending(self, layers: tuple[Any, ...], angles: Angles | None) -> tuple[list[Any], Attend]:
        """What one token gathers in each layer, and a list that the layers' states go into."""
        states: list[Any] = []
        attentions = [block.attention for block in self.blocks]

        def attend(layer: int, heads: Float[Tensor, "b w"]) -> Float[Tensor, "b m"]:
            attention = attentions[layer]
            rows, state = attention.mix(heads.view(len(heads), -1, 1, attention.head_dim), layers[layer], angles)
            states.append(state)
            return rows.reshape(len(heads), -1)

        return states, attend

    def _backbone(self, n: int) -> LeanBackbone | None:
        """What reads n new tokens of every row quicker than the modules do, if anything. Nothing in fp64, which serves
        to compare to the last digit: the modules' norms are in fp32 even then."""
        if self.embedding.weight.dtype == torch.float64 or not unchanged(self, SegmentModel, "hidden", "logits"):
            return None
        return self.ladder.serving(self, n, self._weights)

    def _weights(self) -> BackboneWeights:
        return BackboneWeights(
            embedding=self.embedding.weight,
            blocks=[block.weights() for block in self.blocks],
            norm=self.norm.weight,
            unembedding=self.unembedding.weight,
            eps=self.config.norm_eps,
        )

    def angles(self, n: int, filled: int, device: torch.device) -> Angles | None:
        """What rotates the queries and keys of n new tokens, if the model has positions."""
        config = self.config
        if not config.rotary:
            return None
        return segment_angles(n, filled, config.segment, config.head_dim, config.rope_theta, device)

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        return self.unembedding(hidden)

    def lasting(self, state: AutoregressiveState) -> State:
        kept = (block.attention.lasting(layer) for block, layer in zip(self.blocks, state.layers, strict=False))
        return (*kept, *state.layers[len(self.blocks) :])

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        return self.frontend.flops(n) + sum(block.flops(n, context, causal) for block in self.blocks)

    def logits_flops(self) -> float:
        return float(self.unembedding.flops(1))
