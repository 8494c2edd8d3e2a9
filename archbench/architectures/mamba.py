"""Mamba: a selective state-space model (S6), linear in length, with a state of constant size.

One block, for a token's input u (d), inner width D = expand * d, state size N, convolution width W, step rank R:

    x, z   = Win N(u)                       in_proj
    x      = silu(conv_W(x))                depthwise, causal
    r,B,C  = Wx x                           x_proj: R + 2N
    dt     = softplus(Wdt r + bdt)          dt_proj
    h_t    = exp(dt A) h_{t-1} + dt B x_t   A = -exp(A_log), diagonal, one row of N per channel
    y      = C h_t + Dskip x
    u'     = u + Wout (y * silu(z))         out_proj

There is no feed-forward layer: two blocks stand for one attention-and-feed-forward pair. On the byte codec this is
MambaByte.

Sources: Gu & Dao 2023, 2312.00752 (sections 3.2 to 3.6; B is discretised by dt B as in the official code, not by the
full zero-order hold of eq. 4); Wang et al. 2024, 2401.13660 (bytes). Initial weights follow the official code: dt bias
so that softplus gives a log-uniform step in [0.001, 0.1], A_log = log(1..N), out_proj divided by sqrt(n_layers).

Letters: b batch, t time, d width, D inner width ("c" in shapes), n state size, r step rank, w convolution width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from archbench.errors import CheckpointError, ConfigError
from archbench.foreign import Sources, boundary_token, integer, number, only, rename
from archbench.layers import Linear
from archbench.model import Architecture, HFImport, Traits
from archbench.ops.conv import causal_conv
from archbench.ops.recurrent_weights import MixerWeights, RecurrentWeights
from archbench.ops.scan import selective_scan
from archbench.recurrent import LayerState, RecurrentMixer, RecurrentModel


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes of a Mamba. `dt_rank` None means d_model / 16 rounded up."""

    vocab_size: int
    d_model: int = 128
    n_layers: int = 8
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    boundary: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "d_state", "expand", "step_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mamba.{name}: {getattr(self, name)}; must be at least 1")
        if self.d_conv < 2:
            raise ConfigError(f"mamba.d_conv: {self.d_conv}; must be at least 2")
        if not 0 < self.dt_min < self.dt_max:
            raise ConfigError(f"mamba.dt_min: {self.dt_min}; must lie between 0 and dt_max {self.dt_max}")
        if not 0 <= self.boundary < self.vocab_size:
            raise ConfigError(f"mamba.boundary: {self.boundary}; must lie in [0, {self.vocab_size})")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def step_rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank

    @property
    def n_parameters(self) -> int:
        """Parameters, embeddings included, a tied table once."""
        d, inner = self.d_model, self.d_inner
        block = 3 * inner * d + inner * (self.d_conv + 2 * self.step_rank + 3 * self.d_state + 3) + d
        return (1 if self.tie_embeddings else 2) * self.vocab_size * d + self.n_layers * block + d


class Mixer(RecurrentMixer):
    """The selective state-space mixer of one block."""

    def __init__(self, config: MambaConfig, generator: Generator | None) -> None:
        super().__init__()
        self.config = config
        width, inner, rank, states = config.d_model, config.d_inner, config.step_rank, config.d_state
        self.in_proj = Linear(width, 2 * inner, generator=generator)
        self.conv_weight = nn.Parameter(torch.empty(inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.x_proj = Linear(inner, rank + 2 * states, generator=generator)
        self.dt_proj = Linear(rank, inner, generator=generator)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, width, generator=generator)
        self._draw(generator)

    def _draw(self, generator: Generator | None) -> None:
        """The official initialisation: uniform matrices, log-uniform step sizes, A = -(1, 2, ..., n)."""
        if self.dt_bias.device.type == "meta":
            return
        config = self.config
        for weight, fan_in in (
            (self.in_proj.weight, config.d_model),
            (self.x_proj.weight, config.d_inner),
            (self.dt_proj.weight, config.step_rank),
            (self.out_proj.weight, config.d_inner * config.n_layers),
            (self.conv_weight, config.d_conv),
            (self.conv_bias, config.d_conv),
        ):
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        with torch.no_grad():
            low, high = math.log(config.dt_min), math.log(config.dt_max)
            step = (low + (high - low) * torch.rand(config.d_inner, generator=generator)).exp().clamp(min=1e-4)
            self.A_log.copy_(torch.arange(1, config.d_state + 1).log())
            self.dt_bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus

    def initial_state(self, batch_size: int) -> LayerState:
        inner, device = self.config.d_inner, self.dt_bias.device
        return LayerState(
            torch.zeros(batch_size, self.config.d_conv - 1, inner, device=device),
            torch.zeros(batch_size, inner, self.config.d_state, device=device),
        )

    def forward(self, u: Float[Tensor, "b t d"], state: LayerState) -> tuple[Float[Tensor, "b t d"], LayerState]:
        config = self.config
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, window = causal_conv(x, self.conv_weight, self.conv_bias, state.window)
        r, B, C = self.x_proj(x).split([config.step_rank, config.d_state, config.d_state], dim=-1)
        dt = self.dt_proj(r)
        A = -self.A_log.float().exp()
        y, ssm = selective_scan(x, dt, A, B, C, D=self.D, z=z, dt_bias=self.dt_bias, h0=state.ssm)
        return self.out_proj(y), LayerState(window.float(), ssm)

    def flops(self, n: int) -> int:
        """Matrices, convolution 2 W D and recurrence 6 D N a token (exponentials are free by convention)."""
        config = self.config
        matrices = sum(m.flops(n) for m in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj))
        return matrices + n * (2 * config.d_conv * config.d_inner + 6 * config.d_inner * config.d_state)

    def weights(self, norm: Float[Tensor, " d"]) -> MixerWeights:
        return MixerWeights(
            norm=norm,
            in_proj=self.in_proj.weight,
            conv=self.conv_weight,
            conv_bias=self.conv_bias,
            step_bias=self.dt_bias,
            A=-self.A_log.detach().float().exp(),
            skip=self.D,
            out_proj=self.out_proj.weight,
            x_proj=self.x_proj.weight,
            dt_proj=self.dt_proj.weight,
        )


class Mamba(RecurrentModel):
    def __init__(self, config: MambaConfig, generator: Generator | None = None) -> None:
        super().__init__(config, Mixer, generator)

    def recurrent_weights(self, mixers: list[MixerWeights]) -> RecurrentWeights:
        config = self.config
        return RecurrentWeights(
            embedding=self.embedding.weight,
            mixers=mixers,
            norm=self.norm.weight,
            unembedding=self.unembedding.weight,
            d_inner=config.d_inner,
            n_states=config.d_state,
            eps=config.norm_eps,
        )

    def undecayed(self) -> Iterable[nn.Parameter]:
        return [block.mixer.A_log for block in self.blocks]


@cache
def candidates(vocab_size: int) -> tuple[MambaConfig, ...]:
    """Twice a Transformer's depth at the same width (8 layers at 128, 24 at 768, 64 at 4096), give or take a tenth."""
    found = []
    for d_model in (*range(16, 96, 2), *range(96, 256, 4), *range(256, 1024, 16), *range(1024, 8193, 64)):
        depth = 8 * (d_model / 128) ** 0.6
        for n_layers in range(max(2, math.floor(0.9 * depth)), math.ceil(1.1 * depth) + 1):
            found.append(MambaConfig(vocab_size=vocab_size, d_model=d_model, n_layers=n_layers))
    return tuple(sorted(found, key=lambda config: config.n_parameters))


PAD = 8
"""The release pads its vocabulary to a multiple of this; rows beyond it are no tokens."""


def _from_hf(options: Mapping[str, Any]) -> MambaConfig:
    """The config of a checkpoint by Hugging Face, or of the original release, whose config.json has other keys."""
    return _from_release(options) if "d_model" in options else _from_transformers(options)


def _from_transformers(options: Mapping[str, Any]) -> MambaConfig:
    only(options, use_bias=(False,), use_conv_bias=(True,), hidden_act=("silu",))
    d_model, expand = integer(options, "hidden_size"), integer(options, "expand", 2)
    only(options, intermediate_size=(expand * d_model,))
    vocab_size = integer(options, "vocab_size")
    return MambaConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=integer(options, "num_hidden_layers"),
        d_state=integer(options, "state_size", 16),
        d_conv=integer(options, "conv_kernel", 4),
        expand=expand,
        dt_rank=_rank(options, "time_step_rank"),
        norm_eps=number(options, "layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(options.get("tie_word_embeddings", True)),
        boundary=boundary_token(options, vocab_size),
    )


def _from_release(options: Mapping[str, Any]) -> MambaConfig:
    only(
        options,
        rms_norm=(True,),
        d_intermediate=(0,),
        attn_layer_idx=([], None),
        pad_vocab_size_multiple=(1, PAD),
    )
    ssm: Mapping[str, Any] = options.get("ssm_cfg") or {}
    only(ssm, layer=("Mamba1",), bias=(False,), conv_bias=(True,))
    return MambaConfig(
        vocab_size=integer(options, "vocab_size"),
        d_model=integer(options, "d_model"),
        n_layers=integer(options, "n_layer"),
        d_state=integer(ssm, "d_state", 16),
        d_conv=integer(ssm, "d_conv", 4),
        expand=integer(ssm, "expand", 2),
        dt_rank=_rank(ssm, "dt_rank"),
        tie_embeddings=bool(options.get("tie_embeddings", True)),
    )


def _rank(options: Mapping[str, Any], key: str) -> int | None:
    return None if options.get(key, "auto") in ("auto", None) else integer(options, key)


def _from_hf_weights(config: MambaConfig, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of either layout under our names: the release says `embedding` and pads the vocabulary."""
    for name in found:
        if name.endswith(("norm.bias", "norm_f.bias")):
            raise CheckpointError(f"tensor {name}: the bias of a LayerNorm; only RMSNorm is supported")
    d, inner, rank, states = config.d_model, config.d_inner, config.step_rank, config.d_state
    released, head = "backbone.embedding.weight", "lm_head.weight"
    table = released if released in found else "backbone.embeddings.weight"
    padded = -(-config.vocab_size // PAD) * PAD
    rows = padded if table in found and len(found[table]) == padded else config.vocab_size
    sources: Sources = {"embedding.weight": {table: (rows, d)}, "norm.weight": {"backbone.norm_f.weight": (d,)}}
    if not config.tie_embeddings:
        sources["unembedding.weight"] = {head: (rows, d)}
    for i in range(config.n_layers):
        own, layer = f"blocks.{i}.mixer", f"backbone.layers.{i}.mixer"
        sources |= {
            f"blocks.{i}.norm.weight": {f"backbone.layers.{i}.norm.weight": (d,)},
            f"{own}.in_proj.weight": {f"{layer}.in_proj.weight": (2 * inner, d)},
            f"{own}.conv_weight": {f"{layer}.conv1d.weight": (inner, 1, config.d_conv)},
            f"{own}.conv_bias": {f"{layer}.conv1d.bias": (inner,)},
            f"{own}.x_proj.weight": {f"{layer}.x_proj.weight": (rank + 2 * states, inner)},
            f"{own}.dt_proj.weight": {f"{layer}.dt_proj.weight": (inner, rank)},
            f"{own}.dt_bias": {f"{layer}.dt_proj.bias": (inner,)},
            f"{own}.A_log": {f"{layer}.A_log": (inner, states)},
            f"{own}.D": {f"{layer}.D": (inner,)},
            f"{own}.out_proj.weight": {f"{layer}.out_proj.weight": (d, inner)},
        }
    weights = rename(found, sources, copies={head: table} if config.tie_embeddings else {})
    for name in weights:
        if name.endswith("conv_weight"):
            weights[name] = weights[name].squeeze(1)
        elif name in ("embedding.weight", "unembedding.weight"):
            weights[name] = weights[name][: config.vocab_size]
    return weights


def _table(d_model: int, n_layers: int, vocab_size: int) -> dict[str, int]:
    return {"vocab_size": vocab_size, "d_model": d_model, "n_layers": n_layers}


ARCHITECTURE = Architecture(
    config=MambaConfig,
    build=Mamba,
    traits=lambda _config: Traits(likelihood=True, constant_state=True, answers=True),
    paper="Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2312.00752",
    candidates=candidates,
    published={
        # The released checkpoints of state-spaces/mamba; vocabulary 50277 padded to a multiple of 8.
        "130m": _table(768, 24, 50_280),
        "370m": _table(1024, 48, 50_280),
        "790m": _table(1536, 48, 50_280),
        "1.4b": _table(2048, 48, 50_280),
        "2.8b": _table(2560, 64, 50_280),
        # Wang et al. 2024 (MambaByte), configurations of the research code.
        "byte-353m": _table(1024, 53, 256),
        "byte-972m": _table(1792, 48, 256),
        "byte-1.6b": _table(2304, 48, 256),
    },
    hf={"mamba": HFImport(config=_from_hf, weights=_from_hf_weights)},
)
