"""Transformer-XL: segments that look back at the states of the segments before, with relative positions.

A text is read in segments of N tokens, counted from its start and never from the edge of a call. In every layer the
tokens of a segment attend to those before them in it and to the memory: the last M inputs of the same layer before the
segment began. No gradient enters the memory (though the matrices that make its keys and values do learn from it), so a
layer can treat all segments of a window at once. Each layer looks M further back: l layers see about l M tokens.

    h'    = [SG(memory); h]      of the normalised inputs h = N1(u)
    s_ij  = (Wq h_i + u) (Wk h'_j) + (Wq h_i + w) (Wr R_{i-j})        over sqrt(e);  R a fixed sinusoid of the distance
    a     = u + Wo softmax_j(s) Wv h'        u' = a + W2( silu(W1 N2(a)) * W3 N2(a) )

The second term is computed for all distances at once and realigned (the relative shift of appendix B). Its product
(h Wq + w) Wr R is taken in the order that costs less: one token of a long text never projects all distances.

Sources: Dai et al. 2019, 1901.02860 (section 3.2; eq. in 3.3; appendix B). As in the authors' code the biases u and w
are shared by all layers and the sinusoid is [sin | cos]. Departures: blocks are the Transformer's here (pre-norm,
SwiGLU, its initial weights), so that only recurrence and positions differ; the memory begins empty with every text and
training window instead of running on through the corpus. While decoding, the memory stays that of the segments that
are complete, and is renewed when the next one is.

State: keys and values of memory and open segment in one buffer of M + N places a layer, whatever was read.

Letters: b batch, t time, d width, h heads, e head width, n queries of a row, s positions they see, r rows (texts x
segments), c places of the buffer, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.errors import ConfigError
from archbench.layers import Embedding, Linear, RMSNorm, Stack, SwiGLU, draw_normal, residual_std
from archbench.model import Architecture, AutoregressiveModel, AutoregressiveState, FlopFormulas, Traits
from archbench.ops.attention import causal_attention_flops
from archbench.ops.backbone_lean import LONGEST, Attend, BackboneWeights, LeanBackbone
from archbench.ops.decode_ladder import Ladder, unchanged
from archbench.ops.decode_weights import BlockWeights


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """Sizes of a Transformer-XL.

    Attributes:
        d_ffn: None means 8/3 d_model rounded up to 8.
        segment: tokens of a segment, N.
        memory: tokens before its segment that a token sees, M; None means a segment, 0 none. Weights do not depend
            on it.
        clamp: largest distance told apart, None for no limit. Source: the authors' code (`clamp_len`).
    """

    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 2
    d_ffn: int | None = None
    segment: int = 64
    memory: int | None = None
    clamp: int | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    boundary: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "ffn_width", "segment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"transformer_xl.{name}: {getattr(self, name)}; must be at least 1")
        if self.d_model % self.n_heads:
            raise ConfigError(f"transformer_xl.n_heads: {self.n_heads} does not divide d_model {self.d_model}")
        if self.d_model % 2:
            raise ConfigError(f"transformer_xl.d_model: {self.d_model} is odd; sinusoids need an even width")
        if self.memory_length < 0:
            raise ConfigError(f"transformer_xl.memory: {self.memory}; must be at least 0, or left out for a segment")
        if self.clamp is not None and self.clamp < 1:
            raise ConfigError(f"transformer_xl.clamp: {self.clamp}; must be at least 1, or left out")
        if self.norm_eps <= 0:
            raise ConfigError(f"transformer_xl.norm_eps: {self.norm_eps}; must be above 0")
        if not 0 <= self.boundary < self.vocab_size:
            raise ConfigError(f"transformer_xl.boundary: {self.boundary}; must lie in [0, {self.vocab_size})")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def ffn_width(self) -> int:
        return -(-8 * self.d_model // 24) * 8 if self.d_ffn is None else self.d_ffn

    @property
    def memory_length(self) -> int:
        return self.segment if self.memory is None else self.memory

    @property
    def memory_numbers(self) -> int:
        """Numbers in the memory of one text, 2 d M l; the buffer of the open segment holds 2 d N l more."""
        return 2 * self.d_model * self.memory_length * self.n_layers

    @property
    def n_parameters(self) -> int:
        """Parameters, embeddings included, a tied table once."""
        d = self.d_model
        block = 5 * d * d + 3 * d * self.ffn_width + 2 * d
        return (1 if self.tie_embeddings else 2) * self.vocab_size * d + self.n_layers * block + 3 * d


class Piece(NamedTuple):
    """New tokens that can be attended to together: `rows` stretches of n queries, the first one at position `start` of
    the text, each with the same number of `behind` positions seen before it."""

    start: int
    n: int
    rows: int
    behind: int


def pieces(start: int, n: int, segment: int, memory: int) -> Iterator[Piece]:
    """Cuts n tokens at position `start` at the segments' borders. Whole segments whose memory is full are one piece."""
    at, stop = start, start + n
    while at < stop:
        filled = at % segment
        whole = (stop - at) // segment if filled == 0 and at >= memory else 0
        length = segment if whole else min(segment - filled, stop - at)
        yield Piece(at, length, max(1, whole), min(memory, at - filled) + filled)
        at += length * max(1, whole)


def realign(by_distance: Float[Tensor, "*r n s_plus_1"]) -> Float[Tensor, "*r n s"]:
    """From scores by distance to scores by key, without copying: the relative shift.

    Column c of row i holds distance s - c. Query i stands at position s - n + i, so key j is found in column n + j - i;
    read as one line with rows of length s + 1, that is at n + i s + j. Keys of the future get whatever stands there.

    Source: Dai et al. 2019, appendix B, with one distance more in place of the padding.
    """
    n, s = by_distance.shape[-2], by_distance.shape[-1] - 1
    return by_distance.flatten(-2)[..., n:].unflatten(-1, (n, s))


def biased_attention(
    q: Float[Tensor, "r h n e"],
    k: Float[Tensor, "r h s e"],
    v: Float[Tensor, "r h s e"],
    bias: Float[Tensor, "r h n s"],
) -> Float[Tensor, "r h n e"]:
    """Causal attention of the last n of s positions, with a bias on each score. Under bf16 on a CPU the products are
    written out, which is faster there (see `ops.attention`)."""
    n, s = bias.shape[-2:]
    if n > 1:
        bias = bias + torch.full((n, s), float("-inf"), device=q.device, dtype=q.dtype).triu_(s - n + 1)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class _Projection(torch.autograd.Function):
    """x W^T twice: as it is, and its last columns as memory. The gradient of either reaches W, but only that of the
    first reaches x. One product serves both, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
        y = F.linear(x, weight)
        ctx.save_for_backward(x.to(y.dtype), weight.to(y.dtype))
        ctx.types = x.dtype, weight.dtype
        return y, y[..., -n_columns:].detach()

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, of_memory: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        untouched = of_y.shape[-1] - of_memory.shape[-1]
        both = torch.cat([of_y[..., :untouched], of_y[..., untouched:] + of_memory], dim=-1)
        of_weight = both.flatten(0, -2).T @ x.flatten(0, -2)
        return (of_y @ weight).to(ctx.types[0]), of_weight.to(ctx.types[1]), None


class Attention(nn.Module):
    """Attention over segment and memory with relative positions."""

    def __init__(self, config: TransformerXLConfig, generator: Generator | None) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.segment, self.memory = config.segment, config.memory_length
        d = config.d_model
        self.qkv = Linear(d, 3 * d, generator=generator)
        self.distance = Linear(d, d, generator=generator)
        self.out = Linear(d, d, std=residual_std(d, 2 * config.n_layers), generator=generator)

    def initial_buffer(self, batch_size: int) -> Float[Tensor, "b c 2 h e"]:
        """Keys and values of M + N positions: the memory ends, and the open segment begins, at place M."""
        weight = self.qkv.weight
        places = self.memory + self.segment
        return torch.zeros(batch_size, places, 2, self.n_heads, self.head_dim, device=weight.device, dtype=weight.dtype)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        buffer: Float[Tensor, "b c 2 h e"],
        start: int,
        sinusoids: Float[Tensor, "c_plus_1 d"],
        content_bias: Float[Tensor, "h e"],
        distance_bias: Float[Tensor, "h e"],
    ) -> Float[Tensor, "b t d"]:
        """What tokens at positions start, start + 1, ... gather. Writes them into `buffer`."""
        b, t, d = x.shape
        projected, remembered = _Projection.apply(x, self.qkv.weight, 2 * d)
        heads = projected.view(b, t, 3, self.n_heads, self.head_dim)
        q, own = heads[:, :, 0], heads[:, :, 1:]
        filled = start % self.segment
        held = min(self.memory, start - filled) + filled
        kept = buffer[:, self.memory + filled - held : self.memory + filled].to(own.dtype)
        past = torch.cat([kept, remembered.view(own.shape)], dim=1)  # from position start - held on

        plan = list(pieces(start, t, self.segment, self.memory))
        asked, keys = self.distances(q + distance_bias.to(q.dtype), plan, sinusoids)
        q = q + content_bias.to(q.dtype)
        mixed = []
        for piece in plan:
            here = slice(piece.start - start, piece.start - start + piece.rows * piece.n)
            rows = (piece.rows, piece.n)
            seen = own[:, here].unflatten(1, rows)
            if piece.behind:
                first = piece.start - piece.behind - (start - held)
                reach = past[:, first : first + piece.behind + (piece.rows - 1) * self.segment]
                behind = reach.unfold(1, piece.behind, self.segment).movedim(-1, 2)
                seen = torch.cat([behind, seen], dim=2)
            k, v = seen.flatten(0, 1).transpose(1, 3).unbind(2)
            by_distance = torch.einsum(
                "rnha,hsa->rhns", asked[:, here].unflatten(1, rows).flatten(0, 1), keys[:, -k.shape[2] - 1 :]
            )
            found = biased_attention(
                q[:, here].unflatten(1, rows).flatten(0, 1).transpose(1, 2), k, v, realign(by_distance)
            )
            mixed.append(found.transpose(1, 2).reshape(b, -1, d))
        self._keep(past, buffer, start, t)
        return self.out(torch.cat(mixed, dim=1))

    def step(
        self,
        heads: Float[Tensor, "b w"],
        buffer: Float[Tensor, "b c 2 h e"],
        start: int,
        sinusoids: Float[Tensor, "c_plus_1 d"],
        content_bias: Float[Tensor, "h e"],
        distance_bias: Float[Tensor, "h e"],
    ) -> Float[Tensor, "b d"]:
        """What `forward` gathers, before its last matrix, for one projected token: keys and values are read where they
        lie, and one query needs no realigning."""
        b = heads.shape[0]
        filled = start % self.segment
        held, place = min(self.memory, start - filled) + filled, self.memory + filled
        q, own = heads.view(b, 3, self.n_heads, self.head_dim).split((1, 2), dim=1)
        buffer[:, place] = own
        k, v = buffer[:, place - held : place + 1].to(own.dtype).permute(2, 0, 3, 1, 4).unbind(0)
        asked, keys = self.distances(q + distance_bias.to(q.dtype), [Piece(start, 1, 1, held)], sinusoids)
        by_distance = asked.transpose(1, 2) @ keys.transpose(1, 2)
        found = biased_attention((q + content_bias.to(q.dtype)).transpose(1, 2), k, v, by_distance[..., 1:])
        if filled + 1 == self.segment and self.memory:
            n = min(self.memory, start + 1)
            buffer[:, self.memory - n : self.memory] = buffer[:, place + 1 - n : place + 1].clone()
        return found.reshape(b, -1)

    def distances(
        self, q: Float[Tensor, "b t h e"], plan: list[Piece], sinusoids: Float[Tensor, "c_plus_1 d"]
    ) -> tuple[Float[Tensor, "b t h a"], Float[Tensor, "h s a"]]:
        """Two factors whose product are the scores by distance, the largest distance first, already divided by
        sqrt(e): either q and the projected distances (a = e), or the projected q and the distances (a = d)."""
        n_distances = max(piece.behind + piece.n for piece in plan) + 1
        far = sinusoids[-n_distances:]
        q = q * self.head_dim**-0.5
        if self._folds(plan):
            weight = self.distance.weight.view(self.n_heads, self.head_dim, -1)
            folded = (q.transpose(1, 2) @ weight).transpose(1, 2)
            return folded, far.to(folded.dtype).expand(self.n_heads, -1, -1)
        keys = self.distance(far).unflatten(-1, (self.n_heads, self.head_dim)).transpose(0, 1)
        return q, keys

    def _folds(self, plan: list[Piece]) -> bool:
        """Whether projecting the queries costs less than projecting the distances."""
        n_distances, pairs = _extent(plan)
        n = sum(piece.rows * piece.n for piece in plan)
        d = self.n_heads * self.head_dim
        return d * n + self.n_heads * pairs < d * n_distances + pairs

    def _keep(self, past: Float[Tensor, "b p 2 h e"], buffer: Float[Tensor, "b c 2 h e"], start: int, t: int) -> None:
        stop = start + t
        filled = stop % self.segment
        n = min(self.memory, stop - filled) + filled if stop // self.segment > start // self.segment else t
        if n:
            buffer[:, self.memory + filled - n : self.memory + filled] = past[:, -n:].detach()

    def flops(self, n: int, context: int, causal: float) -> float:
        """Projections, attention to what is seen, and the scores by distance, whole whatever `causal` says: the shift
        needs them all. Projecting distances counts once a call, as if every text had a call of its own."""
        plan = list(pieces(context, n, self.segment, self.memory))
        pairs = sum(
            piece.rows * causal_attention_flops(piece.n, piece.behind, self.n_heads, self.head_dim, causal)
            for piece in plan
        )
        by_query, by_distance = self._distance_flops(plan)
        return self.qkv.flops(n) + self.out.flops(n) + pairs + by_query + by_distance

    def constant_flops(self, n: int) -> float:
        """Of these, for n tokens of a new text, the product that the sinusoids themselves enter: they are constants,
        to which nothing is propagated back."""
        plan = list(pieces(0, n, self.segment, self.memory))
        by_query, by_distance = self._distance_flops(plan)
        return by_query if self._folds(plan) else by_distance

    def _distance_flops(self, plan: list[Piece]) -> tuple[float, float]:
        """FLOPs of the products with queries as they come last, and of projecting the shorter side."""
        n_distances, pairs = _extent(plan)
        d = self.n_heads * self.head_dim
        if self._folds(plan):
            return 2.0 * d * self.n_heads * pairs, 2.0 * d * d * sum(piece.rows * piece.n for piece in plan)
        return 2.0 * d * pairs, 2.0 * d * d * n_distances


def _extent(plan: list[Piece]) -> tuple[int, int]:
    """How many distances are needed, and how many scores by distance are computed."""
    n_distances = max(piece.behind + piece.n for piece in plan) + 1
    return n_distances, sum(piece.rows * piece.n * (piece.behind + piece.n + 1) for piece in plan)


class Block(nn.Module):
    """Attention and feed-forward, each on its own residual branch."""

    def __init__(self, config: TransformerXLConfig, generator: Generator | None) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, generator)
        self.norm_ffn = RMSNorm(config.d_model, config.norm_eps)
        out_std = residual_std(config.ffn_width, 2 * config.n_layers)
        self.ffn = SwiGLU(config.d_model, config.ffn_width, out_std=out_std, generator=generator)

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


class XLState(NamedTuple):
    """One buffer a layer, and how many tokens were read: it tells which places count."""

    buffers: tuple[Float[Tensor, "b c 2 h e"], ...]
    length: int


class TransformerXL(AutoregressiveModel):
    """State: keys and values of M + N positions a layer; constant however much was read."""

    sinusoids: Tensor

    def __init__(self, config: TransformerXLConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.boundary = config.boundary
        # 0.6 is the root mean square of the first residual stream; a tied table must suit the logits instead.
        std = 0.3 * config.d_model**-0.5 if config.tie_embeddings else 0.6
        self.embedding = Embedding(config.vocab_size, config.d_model, std=std, generator=generator)
        self.content_bias = nn.Parameter(torch.empty(config.n_heads, config.head_dim))
        self.distance_bias = nn.Parameter(torch.empty(config.n_heads, config.head_dim))
        for bias in (self.content_bias, self.distance_bias):
            draw_normal(bias, 0.02, generator)  # as in the authors' code
        self.blocks: Stack[Block] = Stack(Block(config, generator) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = Linear(
            config.d_model, config.vocab_size, std=0.3 * config.d_model**-0.5, generator=generator
        )
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight
        self.register_buffer("sinusoids", _sinusoids(config), persistent=False)
        self.ladder: Ladder[BackboneWeights, LeanBackbone] = Ladder({"lean": LeanBackbone}, LONGEST)

    def initial_layers(self, batch_size: int) -> XLState:
        return XLState(tuple(block.attention.initial_buffer(batch_size) for block in self.blocks), 0)

    def hidden(self, tokens: Int[Tensor, "b t"], layers: XLState) -> tuple[Float[Tensor, "b t d"], XLState]:
        backbone, after = self._backbone(tokens.shape[1]), layers._replace(length=layers.length + tokens.shape[1])
        if backbone is not None:
            return backbone.hidden(self.embedding(tokens), self._attending(layers)), after
        x = self.embedding(tokens)
        biases = self.content_bias, self.distance_bias
        for block, buffer in zip(self.blocks, layers.buffers, strict=True):
            x = x + block.attention(block.norm_attention(x), buffer, layers.length, self.sinusoids, *biases)
            x = x + block.ffn(block.norm_ffn(x))
        return self.norm(x), after

    def predict(self, tokens: Int[Tensor, "b t"], layers: XLState) -> tuple[Float[Tensor, "b t v"], XLState]:
        backbone = self._backbone(tokens.shape[1])
        if backbone is None:
            return super().predict(tokens, layers)
        logits = backbone.logits(self.embedding(tokens), self._attending(layers))
        return logits, layers._replace(length=layers.length + 1)

    def _attending(self, layers: XLState) -> Attend:
        """What one token gathers in each layer; writes the buffers."""
        attentions = [block.attention for block in self.blocks]
        fixed = layers.length, self.sinusoids, self.content_bias, self.distance_bias

        def attend(layer: int, heads: Float[Tensor, "b w"]) -> Float[Tensor, "b d"]:
            return attentions[layer].step(heads, layers.buffers[layer], *fixed)

        return attend

    def _backbone(self, n: int) -> LeanBackbone | None:
        """What reads n new tokens of every row quicker than the modules do, if anything. Nothing in fp64, which serves
        to compare to the last digit: the modules' norms are in fp32 even then."""
        if self.embedding.weight.dtype == torch.float64 or not unchanged(self, TransformerXL, "hidden", "logits"):
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

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        return self.unembedding(hidden)

    def lasting(self, state: AutoregressiveState) -> tuple[Float[Tensor, "b m 2 h e"], ...]:
        """The first M places of each buffer: the memory of finished segments, as it is or as it will be."""
        return tuple(buffer[:, : self.config.memory_length] for buffer in state.layers.buffers)

    def undecayed(self) -> Iterable[nn.Parameter]:
        return [self.content_bias, self.distance_bias]

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        return sum(block.flops(n, context, causal) for block in self.blocks)

    def logits_flops(self) -> float:
        return float(self.unembedding.flops(1))

    def flops(self) -> FlopFormulas:
        return _Flops(self)


class _Flops(FlopFormulas):
    """As of any next-token model, except that nothing is propagated back to the sinusoids."""

    def __init__(self, model: TransformerXL) -> None:
        self.model = model

    def training(self, context: int, causal: float = 0.5) -> float:
        model = self.model
        forward = model.hidden_flops(context, 0, causal) + context * model.logits_flops()
        return 3 * forward - sum(block.attention.constant_flops(context) for block in model.blocks)

    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        """Call by call, since each call projects distances of its own."""
        model, stop = self.model, context + n
        starts = range(context, stop, model.prefill_chunk)
        return sum(model.hidden_flops(min(model.prefill_chunk, stop - at), at, causal) for at in starts)

    def decode(self, context: int) -> float:
        return self.model.hidden_flops(1, context, 1.0) + self.model.logits_flops()


def _sinusoids(config: TransformerXLConfig) -> Float[Tensor, "c_plus_1 d"]:
    """Row r stands for distance M + N - r. Source: Vaswani et al. 2017, section 3.5, sines first and cosines after."""
    n, d = config.memory_length + config.segment, config.d_model
    distances = torch.arange(n, -1, -1, dtype=torch.float64).clamp(max=n if config.clamp is None else config.clamp)
    angles = distances[:, None] * 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


@cache
def candidates(vocab_size: int) -> tuple[TransformerXLConfig, ...]:
    """The Transformer's proportions: 4 layers at width 128, 12 at 768, rounded down and up; heads 32 to 64 wide, the
    widest that divides the width; the feed-forward 7/3 (below width 64 twice) to 10/3 times as wide as the stream."""
    found = []
    for d_model in (*range(32, 256, 8), *range(256, 1024, 32), *range(1024, 8193, 128)):
        head_dim = next((width for width in (64, 56, 48, 40, 32) if d_model % width == 0), None)
        if head_dim is None:
            continue
        depth = 4 * (d_model / 128) ** 0.6
        depths = range(max(2, math.floor(depth)), max(2, math.ceil(depth)) + (2 if d_model < 64 else 1))
        step = 8 * max(1, d_model // 256)
        narrowest = 2 * d_model if d_model < 64 else -(-7 * d_model // (3 * step)) * step
        for n_layers in depths:
            for d_ffn in (None, *range(narrowest, 10 * d_model // 3 + 1, step)):
                found.append(
                    TransformerXLConfig(
                        vocab_size=vocab_size,
                        d_model=d_model,
                        n_layers=n_layers,
                        n_heads=d_model // head_dim,
                        d_ffn=d_ffn,
                    )
                )
    return tuple(sorted(found, key=lambda config: config.n_parameters))


ARCHITECTURE = Architecture(
    config=TransformerXLConfig,
    build=TransformerXL,
    traits=lambda _config: Traits(likelihood=True, constant_state=True, answers=True),
    paper="Dai et al. 2019, Transformer-XL: Attentive Language Models beyond a Fixed-Length Context, 1901.02860",
    candidates=candidates,
    published={
        # Tables 1 and 2. The gated feed-forward has three matrices for the paper's two, hence 2/3 of its inner width:
        # the parameters agree with those printed (41M, 277M, 151M; the last with an adaptive table there).
        "enwik8-12l": {
            "vocab_size": 204, "d_model": 512, "n_layers": 12, "n_heads": 8, "segment": 512, "memory": 512,
        },
        "enwik8-24l": {
            "vocab_size": 204, "d_model": 1024, "n_layers": 24, "n_heads": 8, "d_ffn": 2048, "segment": 784,
            "memory": 784,
        },
        "wikitext103-base": {
            "vocab_size": 267_735, "d_model": 410, "n_layers": 16, "n_heads": 10, "d_ffn": 1400, "segment": 150,
            "memory": 150, "tie_embeddings": True,
        },
        # The peer of Munkhdalai et al. 2024 (2404.07143), table 2: 50M numbers of memory.
        "infini-peer": {
            "vocab_size": 32_000, "d_model": 1024, "n_layers": 12, "n_heads": 8, "segment": 2048, "memory": 2048,
        },
    },
)  # fmt: skip
