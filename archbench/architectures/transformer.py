"""The yardstick: a Llama-style decoder.

Pre-norm blocks of causal attention with rotary positions and a SwiGLU feed-forward, RMSNorm, no biases. Grouped-query
attention when n_kv_heads < n_heads.

    a  = u + Wo Attn(N1(u))            u' = a + W2( silu(W1 N2(a)) * W3 N2(a) )            logits = U Nf(u_L)

Sources: Vaswani et al. 2017 (attention); Touvron et al. 2023, section 2 (the block); Su et al. 2021 (rotary positions,
in the half-split pairing of the Hugging Face Llama); Shazeer 2020 (SwiGLU); Zhang & Sennrich 2019 (RMSNorm); Ainslie et
al. 2023 (grouped queries). Initial weights: N(0, 1/fan_in), the two matrices that write into the residual stream
divided by sqrt(2 n_layers); unembedding N(0, 0.3^2/d), so that the first loss is near ln V.

Letters: b batch, t time, d width, h query heads, g key-value heads, e head width, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.errors import ConfigError, ContextOverflow
from archbench.foreign import Sources, boundary_token, integer, number, only, rename
from archbench.layers import (
    Embedding,
    Frontend,
    KVCache,
    Linear,
    RMSNorm,
    Stack,
    SwiGLU,
    empty_cache,
    residual_std,
    rotary_angles,
    rotate,
)
from archbench.model import Architecture, AutoregressiveModel, AutoregressiveState, Emission, HFImport, Traits
from archbench.ops.attention import causal_attention, causal_attention_flops
from archbench.ops.decode import Decoder, decoders
from archbench.ops.decode_ladder import unchanged
from archbench.ops.decode_weights import BlockWeights, DecoderWeights, Read
from archbench.sampling import Sampling
from archbench.state import State


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a Transformer.

    Attributes:
        n_kv_heads, d_ffn: None mean n_heads and 8/3 d_model rounded up to 8.
        rotary: rotary positions; False leaves attention without positions, which then only the causal mask gives.
        frontend_conv: tokens that the convolution in front of the first layer spans; 0 for none.
    """

    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 2
    n_kv_heads: int | None = None
    d_ffn: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_context: int | None = None
    boundary: int = 0
    rotary: bool = True
    frontend_conv: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "kv_heads", "ffn_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"transformer.{name}: {getattr(self, name)}; must be at least 1")
        if self.d_model % self.n_heads:
            raise ConfigError(f"transformer.n_heads: {self.n_heads} does not divide d_model {self.d_model}")
        if self.rotary and self.head_dim % 2:
            raise ConfigError(
                f"transformer.n_heads: {self.n_heads} gives heads of odd width {self.head_dim}; rotary positions need "
                "an even width"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"transformer.n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.rope_theta <= 1:
            raise ConfigError(f"transformer.rope_theta: {self.rope_theta}; must be above 1")
        if self.norm_eps <= 0:
            raise ConfigError(f"transformer.norm_eps: {self.norm_eps}; must be above 0")
        if self.max_context is not None and self.max_context < 1:
            raise ConfigError(f"transformer.max_context: {self.max_context}; must be at least 1, or left out")
        if not 0 <= self.boundary < self.vocab_size:
            raise ConfigError(f"transformer.boundary: {self.boundary}; must lie in [0, {self.vocab_size})")
        if self.frontend_conv and self.frontend_conv < 2:
            raise ConfigError(f"transformer.frontend_conv: {self.frontend_conv}; must be at least 2, or 0 for none")

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
        """Parameters, embeddings included, a tied table once."""
        d = self.d_model
        attention = (2 * self.n_heads + 2 * self.kv_heads) * self.head_dim * d
        block = attention + 3 * d * self.ffn_width + 2 * d
        front = Frontend.parameters_of(d, self.frontend_conv)
        return (1 if self.tie_embeddings else 2) * self.vocab_size * d + front + self.n_layers * block + d


class Attention(nn.Module):
    """Causal self-attention over a key-value cache."""

    def __init__(self, config: TransformerConfig, generator: Generator | None) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        width = config.n_heads * config.head_dim
        self.qkv = Linear(config.d_model, width + 2 * config.kv_heads * config.head_dim, generator=generator)
        self.out = Linear(width, config.d_model, std=residual_std(width, 2 * config.n_layers), generator=generator)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        angles: tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]] | None,
        cache: KVCache,
    ) -> tuple[Float[Tensor, "b t d"], KVCache]:
        b, t, _ = x.shape
        heads = self.qkv(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        cache = cache.append(k, v)
        keys, values = cache.valid()
        mixed = causal_attention(q, keys, values)
        return self.out(mixed.transpose(1, 2).reshape(b, t, -1)), cache

    def flops(self, n: int, context: int, causal: float) -> float:
        """Projections of n positions and their attention over themselves and `context` earlier ones."""
        pairs = causal_attention_flops(n, context, self.n_heads, self.head_dim, causal)
        return self.qkv.flops(n) + self.out.flops(n) + pairs


class Block(nn.Module):
    """Attention and feed-forward, each on its own residual branch."""

    def __init__(self, config: TransformerConfig, generator: Generator | None) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, generator)
        self.norm_ffn = RMSNorm(config.d_model, config.norm_eps)
        out_std = residual_std(config.ffn_width, 2 * config.n_layers)
        self.ffn = SwiGLU(config.d_model, config.ffn_width, out_std=out_std, generator=generator)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        angles: tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]] | None,
        cache: KVCache,
    ) -> tuple[Float[Tensor, "b t d"], KVCache]:
        mixed, cache = self.attention(self.norm_attention(x), angles, cache)
        x = x + mixed
        return x + self.ffn(self.norm_ffn(x)), cache

    def flops(self, n: int, context: int, causal: float) -> float:
        return self.attention.flops(n, context, causal) + self.ffn.flops(n)

    def weights(self) -> BlockWeights:
        """What a decode step needs of the block."""
        attention, ffn = self.attention, self.ffn
        return BlockWeights(
            norm_attention=self.norm_attention.weight,
            qkv=attention.qkv.weight,
            out=attention.out.weight,
            norm_ffn=self.norm_ffn.weight,
            gate_up=ffn.gate_up.weight,
            down=ffn.down.weight,
        )


def decoder_weights(
    config: TransformerConfig,
    embedding: Embedding,
    blocks: Iterable[Block],
    norm: RMSNorm,
    unembedding: Linear,
    drafts: Iterable[Linear] = (),
    heads: Iterable[Block] = (),
    n_trunk: int = 0,
) -> DecoderWeights:
    """What a decode step needs of a Transformer with these parts, on a CPU."""
    make = partial(rotary_angles, head_dim=config.head_dim, theta=config.rope_theta, device=torch.device("cpu"))
    return DecoderWeights(
        embedding=embedding.weight,
        blocks=tuple(block.weights() for block in blocks),
        norm=norm.weight,
        unembedding=unembedding.weight,
        n_heads=config.n_heads,
        n_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        eps=config.norm_eps,
        angles=make if config.rotary else None,
        drafts=tuple(head.weight for head in drafts),
        heads=tuple(head.weights() for head in heads),
        n_trunk=n_trunk,
    )


class Transformer(AutoregressiveModel):
    """State: one key-value cache a layer; it grows with every token read."""

    def __init__(self, config: TransformerConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.boundary = config.boundary
        # 0.6 is the root mean square of the first residual stream; a tied table must suit the logits instead.
        std = 0.3 * config.d_model**-0.5 if config.tie_embeddings else 0.6
        self.embedding = Embedding(config.vocab_size, config.d_model, std=std, generator=generator)
        self.blocks: Stack[Block] = Stack(Block(config, generator) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = Linear(
            config.d_model, config.vocab_size, std=0.3 * config.d_model**-0.5, generator=generator
        )
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight
        self.frontend = Frontend(config.d_model, config.frontend_conv, generator)
        self.decoders = decoders()

    def initial_layers(self, batch_size: int) -> tuple[Any, ...]:
        weight = self.embedding.weight
        make = partial(empty_cache, batch_size, self.config.kv_heads, self.config.head_dim)
        caches = (make(device=weight.device, dtype=weight.dtype) for _ in self.blocks)
        return (*caches, *self.frontend.initial_state(batch_size))

    def hidden(
        self, tokens: Int[Tensor, "b t"], layers: tuple[Any, ...]
    ) -> tuple[Float[Tensor, "b t d"], tuple[Any, ...]]:
        decoder = self._decoder(tokens.shape[1], layers)
        if decoder is not None:
            read, window = self._read(decoder, tokens, layers, logits=False)
            return self.norm(read.stream), (*read.caches, *window)
        start, n = layers[0].length, tokens.shape[1]
        self._check_room(start + n)
        x, window = self.frontend(self.embedding(tokens), layers[len(self.blocks) :])
        angles = None
        if self.config.rotary:
            angles = rotary_angles(start, n, self.config.head_dim, self.config.rope_theta, x.device)
        caches = []
        for block, cache in zip(self.blocks, layers, strict=False):
            x, cache = block(x, angles, cache)
            caches.append(cache)
        return self.norm(x), (*caches, *window)

    def predict(self, tokens: Int[Tensor, "b t"], layers: State) -> tuple[Float[Tensor, "b t v"], State]:
        decoder = self._decoder(tokens.shape[1], layers)
        if decoder is None:
            return super().predict(tokens, layers)
        read, window = self._read(decoder, tokens, layers, logits=True)
        assert read.logits is not None
        return read.logits, (*read.caches, *window)

    def write(
        self, pending: Int[Tensor, " b"], layers: State, sampling: Sampling, generator: Generator | None
    ) -> tuple[Int[Tensor, " b"], State]:
        decoder = self._decoder(1, layers) if sampling.greedy and not self.config.frontend_conv else None
        if decoder is None:
            return super().write(pending, layers, sampling, generator)
        length = layers[0].length
        self._check_room(length + 1)
        tokens, caches = decoder.write(pending, layers, length, 1)
        return tokens.view(-1), caches

    def decode_steps(
        self, state: AutoregressiveState, n: int, sampling: Sampling, generator: Generator | None
    ) -> Emission:
        layers = state.layers
        decoder = self._decoder(1, layers) if sampling.greedy and not self.config.frontend_conv else None
        if decoder is None:
            return super().decode_steps(state, n, sampling, generator)
        length, n = layers[0].length, min(n, decoder.most_at_once)
        self._check_room(length + n)
        tokens, caches = decoder.write(state.pending, layers, length, n)
        pending = tokens[:, -1].clone()
        return Emission(tokens, torch.full_like(pending, n), AutoregressiveState(pending, caches))

    def _read(
        self, decoder: Decoder, tokens: Int[Tensor, "b t"], layers: tuple[Any, ...], *, logits: bool
    ) -> tuple[Read, tuple[Any, ...]]:
        """A few tokens by a decoder, and the state of the convolution in front. Gives up `layers`."""
        length, n_blocks = layers[0].length, len(self.blocks)
        self._check_room(length + tokens.shape[1])
        embedded, window = None, ()
        if self.config.frontend_conv:
            embedded, window = self.frontend(self.embedding(tokens), layers[n_blocks:])
        return decoder.read(tokens, layers[:n_blocks], length, embedded=embedded, logits=logits), window

    def _decoder(self, n: int, layers: State) -> Decoder | None:
        """What reads n new tokens of every row quicker than the modules do, if anything."""
        if not unchanged(self, Transformer, "hidden", "decode_step"):
            return None
        return self.decoders.serving(self, n, self._weights, state=layers[: self.config.n_layers])

    def _weights(self) -> DecoderWeights:
        return decoder_weights(self.config, self.embedding, self.blocks, self.norm, self.unembedding)

    def _check_room(self, end: int) -> None:
        limit = self.config.max_context
        if limit is not None and end > limit:
            raise ContextOverflow(
                f"transformer.max_context: {end} tokens do not fit into {limit}; raise max_context or feed fewer"
            )

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        return self.unembedding(hidden)

    def lasting(self, state: AutoregressiveState) -> tuple[Any, ...]:
        caches = state.layers[: len(self.blocks)]
        return (*(cache.valid() for cache in caches), *state.layers[len(self.blocks) :])

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        return self.frontend.flops(n) + sum(block.flops(n, context, causal) for block in self.blocks)

    def logits_flops(self) -> float:
        return float(self.unembedding.flops(1))


@lru_cache
def candidates(vocab_size: int) -> tuple[TransformerConfig, ...]:
    """Depth grows with width: 4 layers at 128, 12 at 768, 32 at 4096, rounded down and up. Heads are 32 to 64 wide, the
    widest that divides the width; the feed-forward is 7/3 to 10/3 times as wide as the residual stream."""
    found = []
    for d_model in (*range(32, 256, 8), *range(256, 1024, 32), *range(1024, 8193, 128)):
        head_dim = next((width for width in (64, 56, 48, 40, 32) if d_model % width == 0), None)
        if head_dim is None:
            continue
        depth = 4 * (d_model / 128) ** 0.6
        # Below width 64 one layer is half the model, so one more is offered.
        depths = range(max(2, math.floor(depth)), max(2, math.ceil(depth)) + (2 if d_model < 64 else 1))
        step = 8 * max(1, d_model // 256)
        for n_layers in depths:
            for d_ffn in (None, *range(-(-7 * d_model // (3 * step)) * step, 10 * d_model // 3 + 1, step)):
                found.append(
                    TransformerConfig(
                        vocab_size=vocab_size,
                        d_model=d_model,
                        n_layers=n_layers,
                        n_heads=d_model // head_dim,
                        d_ffn=d_ffn,
                    )
                )
    return tuple(sorted(found, key=lambda config: config.n_parameters))


def _from_hf(options: Mapping[str, Any]) -> TransformerConfig:
    """The config of a Hugging Face LlamaForCausalLM, in the layout before or since transformers 5."""
    only(
        options,
        hidden_act=("silu",),
        attention_bias=(False,),
        mlp_bias=(False,),
        rope_scaling=(None, {"type": "default"}, {"rope_type": "default"}),
    )
    d_model, n_heads = integer(options, "hidden_size"), integer(options, "num_attention_heads")
    if options.get("head_dim") is not None:
        only(options, head_dim=(d_model // n_heads if n_heads else 0,))
    rope = {"rope_theta": options.get("rope_theta"), **(options.get("rope_parameters") or {})}
    for key in rope.keys() - {"rope_type", "rope_theta"}:
        raise ConfigError(f"rope_parameters.{key}: {rope[key]!r} is not supported; allowed: rope_type, rope_theta")
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters.rope_type: {rope['rope_type']!r} is not supported; allowed: 'default'")
    vocab_size = integer(options, "vocab_size")
    return TransformerConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=integer(options, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=integer(options, "num_key_value_heads", n_heads),
        d_ffn=integer(options, "intermediate_size"),
        rope_theta=number(rope, "rope_theta", 10_000.0),
        norm_eps=number(options, "rms_norm_eps", 1e-6),
        tie_embeddings=bool(options.get("tie_word_embeddings", False)),
        boundary=boundary_token(options, vocab_size),
    )


def _from_hf_weights(config: TransformerConfig, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LlamaForCausalLM's tensors under our names. Both sides pair rotary components in halves, so rows keep their
    order; the inv_freq that old files hold follows from rope_theta."""
    d, kv, inner = config.d_model, config.kv_heads * config.head_dim, config.ffn_width
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    sources: Sources = {"embedding.weight": {table: (config.vocab_size, d)}, "norm.weight": {"model.norm.weight": (d,)}}
    if not config.tie_embeddings:
        sources["unembedding.weight"] = {head: (config.vocab_size, d)}
    for i in range(config.n_layers):
        own, layer = f"blocks.{i}", f"model.layers.{i}"
        sources |= {
            f"{own}.norm_attention.weight": {f"{layer}.input_layernorm.weight": (d,)},
            f"{own}.attention.qkv.weight": {
                f"{layer}.self_attn.q_proj.weight": (d, d),
                f"{layer}.self_attn.k_proj.weight": (kv, d),
                f"{layer}.self_attn.v_proj.weight": (kv, d),
            },
            f"{own}.attention.out.weight": {f"{layer}.self_attn.o_proj.weight": (d, d)},
            f"{own}.norm_ffn.weight": {f"{layer}.post_attention_layernorm.weight": (d,)},
            f"{own}.ffn.gate_up.weight": {
                f"{layer}.mlp.gate_proj.weight": (inner, d),
                f"{layer}.mlp.up_proj.weight": (inner, d),
            },
            f"{own}.ffn.down.weight": {f"{layer}.mlp.down_proj.weight": (d, inner)},
        }
    unused = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.n_layers)}
    return rename(found, sources, copies={head: table} if config.tie_embeddings else {}, unused=unused)


def _table(d_model: int, n_layers: int, n_heads: int, vocab_size: int = 32_000) -> dict[str, int]:
    return {"vocab_size": vocab_size, "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads}


ARCHITECTURE = Architecture(
    config=TransformerConfig,
    build=Transformer,
    traits=lambda config: Traits(likelihood=True, context_limit=config.max_context, answers=True),
    paper="Vaswani et al. 2017, Attention Is All You Need, 1706.03762; as Llama: Touvron et al. 2023, 2302.13971",
    candidates=candidates,
    published={
        # Gloeckle et al. 2024 (2404.19737), Table S14: the next-token baselines of multi-token prediction.
        "mtp-0.3b": _table(1024, 18, 16),
        "mtp-0.6b": _table(1280, 27, 20),
        "mtp-1.3b": _table(2048, 24, 16),
        "mtp-3b": _table(2560, 36, 20),
        "mtp-6.7b": _table(4096, 32, 32),
        "mtp-13b": _table(5120, 40, 40),
        # Shao et al. 2025 (2510.27688), table 1: the baselines of CALM; Llama 3 vocabulary and a padding token.
        "calm-s": {**_table(768, 12, 16, 128_257), "d_ffn": 2048},
        "calm-m": {**_table(1024, 16, 16, 128_257), "d_ffn": 2752},
        "calm-l": {**_table(1536, 16, 16, 128_257), "d_ffn": 4096},
        # The shape that Munkhdalai et al. 2024 (2404.07143), section 4.1, count memories at, with full attention.
        "infini-peer": _table(1024, 12, 8),
    },
    hf={"llama": HFImport(config=_from_hf, weights=_from_hf_weights)},
)
