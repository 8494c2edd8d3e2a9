"""Mamba-2: state-space duality (SSD), a selective state space whose recurrence is also masked attention.

One block, for a token's input u (d), inner width D = expand * d in H heads of width P, state size N, G groups of heads
that share B and C, convolution width W:

    z, xBC, dt = Win n(u)                      in_proj: D, D + 2 G N, H
    x, B, C    = silu(conv_W(xBC))             depthwise, causal; B and C are convolved too
    step       = clamp(softplus(dt + bdt))     one a head
    h_t        = exp(step A) h_{t-1} + step x_t B_t'       A = -exp(A_log), one number a head; h is P x N
    y          = h C + Dskip x
    u'         = u + Wout norm(y * silu(z))    RMSNorm after the gate, within each group

What differs from Mamba: A and the step are scalars of a head, so the recurrence is the matrix (C B' masked by decays)
and can be computed in chunks by matrix products; the step comes straight from the input; states are larger.

Source: Dao & Gu 2024, 2405.21060 (sections 3, 6 and 7). Initial weights follow the official code: dt bias so that
softplus gives a log-uniform step in [0.001, 0.1], A uniform in [1, 16], out_proj divided by sqrt(n_layers).

Letters: b batch, t time, d width, h heads, p head width, g groups, n state size, w convolution width,
c convolved width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from archbench.errors import CheckpointError, ConfigError
from archbench.foreign import Sources, boundary_token, integer, number, only, rename
from archbench.layers import Linear
from archbench.model import Architecture, HFImport, Traits
from archbench.ops import conv
from archbench.ops import ssd as recurrence
from archbench.ops.conv import causal_conv
from archbench.ops.recurrent_weights import MixerWeights, RecurrentWeights
from archbench.ops.ssd import ssd
from archbench.recurrent import LayerState, RecurrentMixer, RecurrentModel


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Sizes of a Mamba-2. `step_ceiling` None means that steps have no upper limit.

    The papers' state sizes are 64 to 256. Below a width of 256 those would take a third of a block's parameters for B
    and C; at 0.4M parameters and 200 KB of text 32 reached 3.00 bits per byte, 16 3.02 and 64 3.07 (one seed).
    """

    vocab_size: int
    d_model: int = 128
    n_layers: int = 8
    d_state: int = 32
    head_dim: int = 32
    n_groups: int = 1
    d_conv: int = 4
    expand: int = 2
    dt_min: float = 1e-3
    dt_max: float = 0.1
    step_floor: float = 0.0
    step_ceiling: float | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    boundary: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "d_state", "head_dim", "n_groups", "expand"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mamba2.{name}: {getattr(self, name)}; must be at least 1")
        if self.d_inner % self.head_dim:
            raise ConfigError(
                f"mamba2.head_dim: {self.head_dim} does not divide the inner width {self.d_inner} (expand * d_model)"
            )
        if self.n_heads % self.n_groups:
            raise ConfigError(f"mamba2.n_groups: {self.n_groups} does not divide the {self.n_heads} heads")
        if self.d_conv < 2:
            raise ConfigError(f"mamba2.d_conv: {self.d_conv}; must be at least 2")
        if not 0 < self.dt_min < self.dt_max:
            raise ConfigError(f"mamba2.dt_min: {self.dt_min}; must lie between 0 and dt_max {self.dt_max}")
        if self.step_floor < 0 or (self.step_ceiling is not None and self.step_ceiling <= self.step_floor):
            raise ConfigError(
                f"mamba2.step_floor: {self.step_floor}; must be 0 or more and below step_ceiling {self.step_ceiling}"
            )
        if not 0 <= self.boundary < self.vocab_size:
            raise ConfigError(f"mamba2.boundary: {self.boundary}; must lie in [0, {self.vocab_size})")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def d_convolved(self) -> int:
        """Channels of x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def n_parameters(self) -> int:
        """Parameters, embeddings included, a tied table once."""
        d, inner, heads = self.d_model, self.d_inner, self.n_heads
        matrices = (2 * inner + self.d_convolved - inner + heads) * d + inner * d
        block = matrices + self.d_convolved * (self.d_conv + 1) + 3 * heads + inner + d
        return (1 if self.tie_embeddings else 2) * self.vocab_size * d + self.n_layers * block + d


class GatedNorm(nn.Module):
    """Gate first, then RMSNorm within each group, statistics in fp32."""

    def __init__(self, width: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.n_groups = n_groups
        self.eps = eps

    def forward(self, y: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gated = (y.float() * F.silu(z.float())).unflatten(-1, (self.n_groups, -1))
        scale = torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + self.eps)
        return ((gated * scale).flatten(-2) * self.weight).to(y.dtype)


class Mixer(RecurrentMixer):
    """The state-space mixer of one block."""

    def __init__(self, config: Mamba2Config, generator: Generator | None) -> None:
        super().__init__()
        self.config = config
        width, inner, heads = config.d_model, config.d_inner, config.n_heads
        self.in_proj = Linear(width, inner + config.d_convolved + heads, generator=generator)
        self.conv_weight = nn.Parameter(torch.empty(config.d_convolved, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(config.d_convolved))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(inner, config.n_groups, config.norm_eps)
        self.out_proj = Linear(inner, width, generator=generator)
        self._draw(generator)

    def _draw(self, generator: Generator | None) -> None:
        """The official initialisation: uniform matrices, log-uniform step sizes, uniform decays."""
        if self.dt_bias.device.type == "meta":
            return
        config = self.config
        for weight, fan_in in (
            (self.in_proj.weight, config.d_model),
            (self.out_proj.weight, config.d_inner * config.n_layers),
            (self.conv_weight, config.d_conv),
            (self.conv_bias, config.d_conv),
        ):
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        with torch.no_grad():
            low, high = math.log(config.dt_min), math.log(config.dt_max)
            step = (low + (high - low) * torch.rand(config.n_heads, generator=generator)).exp().clamp(min=1e-4)
            self.dt_bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
            self.A_log.uniform_(1, 16, generator=generator).log_()

    def initial_state(self, batch_size: int) -> LayerState:
        config, device = self.config, self.dt_bias.device
        return LayerState(
            torch.zeros(batch_size, config.d_conv - 1, config.d_convolved, device=device),
            torch.zeros(batch_size, config.n_heads, config.head_dim, config.d_state, device=device),
        )

    def forward(self, u: Float[Tensor, "b t d"], state: LayerState) -> tuple[Float[Tensor, "b t d"], LayerState]:
        config = self.config
        z, xBC, dt = self.in_proj(u).split([config.d_inner, config.d_convolved, config.n_heads], dim=-1)
        xBC, window = causal_conv(xBC, self.conv_weight, self.conv_bias, state.window)
        shared = config.n_groups * config.d_state
        x, B, C = xBC.split([config.d_inner, shared, shared], dim=-1)
        step = F.softplus(dt.float() + self.dt_bias.float()).clamp(config.step_floor, config.step_ceiling)
        y, ssm = ssd(
            x.unflatten(-1, (config.n_heads, config.head_dim)),
            step,
            -self.A_log.float().exp(),
            B.unflatten(-1, (config.n_groups, config.d_state)),
            C.unflatten(-1, (config.n_groups, config.d_state)),
            D=self.D,
            h0=state.ssm,
        )
        return self.out_proj(self.norm(y.flatten(2), z)), LayerState(window.float(), ssm)

    def flops(self, n: int) -> int:
        """Matrices, convolution 2 W (D + 2 G N) and recurrence 5 D N a token (norm and gate are free by convention)."""
        config = self.config
        matrices = self.in_proj.flops(n) + self.out_proj.flops(n)
        convolution = conv.flops(n, config.d_convolved, config.d_conv)
        return matrices + convolution + recurrence.flops(n, config.d_inner, config.d_state)

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
            inner_norm=self.norm.weight,
        )


class Mamba2(RecurrentModel):
    def __init__(self, config: Mamba2Config, generator: Generator | None = None) -> None:
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
            n_heads=config.n_heads,
            n_groups=config.n_groups,
            step_floor=config.step_floor,
            step_ceiling=math.inf if config.step_ceiling is None else config.step_ceiling,
        )


@cache
def candidates(vocab_size: int) -> tuple[Mamba2Config, ...]:
    """Twice a Transformer's depth at the same width (8 layers at 128, 24 at 768, 64 at 4096), give or take a tenth.
    Heads are 32 to 64 wide, the widest that divides the inner width; states are 64 from width 256 on, 32 below."""
    found = []
    for d_model in (*range(16, 256, 4), *range(256, 1024, 16), *range(1024, 8193, 64)):
        head_dim = next((width for width in (64, 56, 48, 40, 32) if 2 * d_model % width == 0), None)
        if head_dim is None:
            continue
        depth = 8 * (d_model / 128) ** 0.6
        for n_layers in range(max(2, math.floor(0.9 * depth)), math.ceil(1.1 * depth) + 1):
            found.append(
                Mamba2Config(
                    vocab_size=vocab_size,
                    d_model=d_model,
                    n_layers=n_layers,
                    head_dim=head_dim,
                    d_state=32 if d_model < 256 else 64,
                )
            )
    return tuple(sorted(found, key=lambda config: config.n_parameters))


PADS = (1, 8, 16)
"""A release pads its vocabulary to a multiple of one of these; rows beyond it are no tokens."""


def _from_hf(options: Mapping[str, Any]) -> Mamba2Config:
    """The config of a checkpoint by Hugging Face, or of the original release, whose config.json has other keys."""
    return _from_release(options) if "d_model" in options else _from_transformers(options)


def _from_transformers(options: Mapping[str, Any]) -> Mamba2Config:
    only(options, use_bias=(False,), use_conv_bias=(True,), hidden_act=("silu",))
    d_model, expand = integer(options, "hidden_size"), integer(options, "expand", 2)
    heads, head_dim = integer(options, "num_heads", 128), integer(options, "head_dim", 64)
    if heads * head_dim != expand * d_model:
        raise ConfigError(
            f"num_heads: {heads}; times head_dim {head_dim} it must be expand * hidden_size, {expand * d_model}"
        )
    vocab_size = integer(options, "vocab_size")
    floor, ceiling = _limits(options, "time_step_limit")
    return Mamba2Config(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=integer(options, "num_hidden_layers"),
        d_state=integer(options, "state_size", 128),
        head_dim=head_dim,
        n_groups=integer(options, "n_groups", 8),
        d_conv=integer(options, "conv_kernel", 4),
        expand=expand,
        step_floor=floor,
        step_ceiling=ceiling,
        norm_eps=number(options, "layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(options.get("tie_word_embeddings", False)),
        boundary=boundary_token(options, vocab_size),
    )


def _from_release(options: Mapping[str, Any]) -> Mamba2Config:
    only(options, rms_norm=(True,), d_intermediate=(0,), attn_layer_idx=([], None), pad_vocab_size_multiple=PADS)
    ssm: Mapping[str, Any] = options.get("ssm_cfg") or {}
    if ssm.get("layer") != "Mamba2":
        raise ConfigError(f"ssm_cfg.layer: {ssm.get('layer')!r} is not supported; allowed: 'Mamba2'")
    only(ssm, bias=(False,), conv_bias=(True,), rmsnorm=(True,), norm_before_gate=(False,), D_has_hdim=(False,))
    d_model, expand = integer(options, "d_model"), integer(ssm, "expand", 2)
    only(ssm, d_ssm=(None, expand * d_model))
    floor, ceiling = _limits(ssm, "dt_limit")
    return Mamba2Config(
        vocab_size=integer(options, "vocab_size"),
        d_model=d_model,
        n_layers=integer(options, "n_layer"),
        d_state=integer(ssm, "d_state", 128),
        head_dim=integer(ssm, "headdim", 64),
        n_groups=integer(ssm, "ngroups", 1),
        d_conv=integer(ssm, "d_conv", 4),
        expand=expand,
        step_floor=floor,
        step_ceiling=ceiling,
        tie_embeddings=bool(options.get("tie_embeddings", True)),
    )


def _limits(options: Mapping[str, Any], key: str) -> tuple[float, float | None]:
    """Lowest and highest step; JSON has no infinity, so writers spell it in several ways."""
    found = options.get(key)
    if found is None:
        return 0.0, None
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        raise ConfigError(f"{key}: {found!r}; must be two numbers, the lowest and the highest step")
    low, high = (part.get("__float__") if isinstance(part, Mapping) else part for part in found)
    unlimited = high in (None, "Infinity", "inf", math.inf)
    return number({key: low}, key, 0.0), None if unlimited else number({key: high}, key, 0.0)


def _from_hf_weights(config: Mamba2Config, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of either layout under our names: the release says `embedding` and pads the vocabulary."""
    for name in found:
        if name.endswith(("norm.bias", "norm_f.bias")):
            raise CheckpointError(f"tensor {name}: the bias of a LayerNorm; only RMSNorm is supported")
    d, inner, convolved, heads = config.d_model, config.d_inner, config.d_convolved, config.n_heads
    released, head = "backbone.embedding.weight", "lm_head.weight"
    table = released if released in found else "backbone.embeddings.weight"
    padded = {-(-config.vocab_size // pad) * pad for pad in PADS}
    rows = len(found[table]) if table in found and len(found[table]) in padded else config.vocab_size
    sources: Sources = {"embedding.weight": {table: (rows, d)}, "norm.weight": {"backbone.norm_f.weight": (d,)}}
    if not config.tie_embeddings:
        sources["unembedding.weight"] = {head: (rows, d)}
    for i in range(config.n_layers):
        own, layer = f"blocks.{i}.mixer", f"backbone.layers.{i}.mixer"
        sources |= {
            f"blocks.{i}.norm.weight": {f"backbone.layers.{i}.norm.weight": (d,)},
            f"{own}.in_proj.weight": {f"{layer}.in_proj.weight": (inner + convolved + heads, d)},
            f"{own}.conv_weight": {f"{layer}.conv1d.weight": (convolved, 1, config.d_conv)},
            f"{own}.conv_bias": {f"{layer}.conv1d.bias": (convolved,)},
            f"{own}.dt_bias": {f"{layer}.dt_bias": (heads,)},
            f"{own}.A_log": {f"{layer}.A_log": (heads,)},
            f"{own}.D": {f"{layer}.D": (heads,)},
            f"{own}.norm.weight": {f"{layer}.norm.weight": (inner,)},
            f"{own}.out_proj.weight": {f"{layer}.out_proj.weight": (d, inner)},
        }
    weights = rename(found, sources, copies={head: table} if config.tie_embeddings else {})
    for name in weights:
        if name.endswith("conv_weight"):
            weights[name] = weights[name].squeeze(1)
        elif name in ("embedding.weight", "unembedding.weight"):
            weights[name] = weights[name][: config.vocab_size]
    return weights


def _released(d_model: int, n_layers: int) -> dict[str, int]:
    """A checkpoint of state-spaces/mamba: state size 128, heads of 64, vocabulary 50277 padded to a multiple of 16."""
    return {"vocab_size": 50_288, "d_model": d_model, "n_layers": n_layers, "d_state": 128, "head_dim": 64}


ARCHITECTURE = Architecture(
    config=Mamba2Config,
    build=Mamba2,
    traits=lambda _config: Traits(likelihood=True, constant_state=True, answers=True),
    paper="Dao & Gu 2024, Transformers are SSMs: Generalized Models and Efficient Algorithms, 2405.21060",
    candidates=candidates,
    published={
        "130m": _released(768, 24),
        "370m": _released(1024, 48),
        "780m": _released(1536, 48),
        "1.3b": _released(2048, 48),
        "2.7b": _released(2560, 64),
    },
    hf={"mamba2": HFImport(config=_from_hf, weights=_from_hf_weights)},
)
