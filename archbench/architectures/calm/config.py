"""Sizes and settings of a CALM, what they amount to in parameters, and the configs offered by size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, floor
from typing import Any, Literal

from archbench.errors import ConfigError

CHUNK_SIZES = (1, 2, 4, 8)
TIME_WIDTH = 256
"""Width of the sinusoids that tell the time to a diffusion or flow head."""


@dataclass(frozen=True, kw_only=True)
class CalmConfig:
    """Sizes and settings. Defaults are the paper's where it states them in figures that hold at any size.

    Attributes:
        chunk_size: tokens of one latent vector (K).
        d_model, n_layers, n_heads, d_ffn: the backbone, a Transformer over chunks; `d_ffn` None as there.
        d_latent: width of the latent vector (l), None for 16 K; the paper has 32 K.
        d_autoencoder, d_autoencoder_ffn: widths of the autoencoder, None for half of d_model (a multiple of 8, at least
            32) and for 5/2 of that. n_autoencoder_blocks: in the encoder and again in the decoder; even.
        head: what draws the next latent: "energy" in one call, "diffusion" or "flow" in many.
        d_head, n_head_blocks: None for d_model and for a quarter of n_layers.
        d_noise: width of the energy head's noise.
        n_samples, n_targets: draws of the model (N) and of the posterior (M) per position in training. The energy loss
            compares all pairs; the other heads see each position N times, each with its own posterior draw.
        energy_exponent: alpha of the energy loss; strictly proper below 2.
        flow_steps, flow_solver: of a flow head's integration ("midpoint" calls it twice a step).
        diffusion_steps: of a diffusion head's sampling, out of 1000.
        kl_weight, kl_floor, dropout: beta, lambda and the probability of DropToken and DropLatent in the autoencoder's
            loss.
        inputs: what the backbone reads of a chunk: its tokens ("discrete"), the mean of its latent, or both.
        temperature_method: how a temperature below 1 is had without probabilities: "batch" picks from `n_candidates`
            drawn chunks and knows 1/n only; "exact" rejects until it is right, at most `max_draws` chunks a step.
        autoencoder_share: of the training budget. autoencoder_lr_scale, lm_lr_scale: multiples of the learning rate.
    """

    vocab_size: int
    chunk_size: int = 4
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 2
    d_ffn: int | None = None
    d_latent: int | None = None
    d_autoencoder: int | None = None
    d_autoencoder_ffn: int | None = None
    n_autoencoder_blocks: int = 2
    head: Literal["energy", "diffusion", "flow"] = "energy"
    d_head: int | None = None
    n_head_blocks: int | None = None
    d_noise: int = 64
    n_samples: int = 8
    n_targets: int = 100
    energy_exponent: float = 1.0
    flow_steps: int = 10
    flow_solver: Literal["midpoint", "euler"] = "midpoint"
    diffusion_steps: int = 100
    kl_weight: float = 1e-3
    kl_floor: float = 0.5
    dropout: float = 0.15
    inputs: Literal["discrete", "latent", "both"] = "discrete"
    temperature_method: Literal["batch", "exact"] = "batch"
    n_candidates: int = 200
    max_draws: int = 10_000
    autoencoder_share: float = 0.25
    autoencoder_lr_scale: float = 2.0
    lm_lr_scale: float = 0.5
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.chunk_size not in CHUNK_SIZES:
            raise ConfigError(f"calm.chunk_size: {self.chunk_size}; allowed: {', '.join(map(str, CHUNK_SIZES))}")
        for name in (
            "vocab_size", "d_model", "n_layers", "n_heads", "ffn_width", "latent_width", "autoencoder_width",
            "autoencoder_ffn_width", "head_width", "head_blocks", "d_noise", "n_targets", "flow_steps", "n_candidates",
            "max_draws",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"calm.{name}: {getattr(self, name)}; must be at least 1")
        if self.n_autoencoder_blocks < 2 or self.n_autoencoder_blocks % 2:
            raise ConfigError(f"calm.n_autoencoder_blocks: {self.n_autoencoder_blocks}; must be even and at least 2")
        if self.d_model % self.n_heads or self.d_model // self.n_heads % 2:
            raise ConfigError(
                f"calm.n_heads: {self.n_heads} does not cut d_model {self.d_model} into heads of even width"
            )
        if self.n_samples < 2:
            raise ConfigError(f"calm.n_samples: {self.n_samples}; the energy loss compares samples: at least 2")
        if not 2 <= self.diffusion_steps <= 1000:
            raise ConfigError(f"calm.diffusion_steps: {self.diffusion_steps}; must lie between 2 and 1000")
        for name, low, high in (
            ("energy_exponent", 0, 2),
            ("kl_weight", 0, 1e3),
            ("kl_floor", 0, 1e3),
            ("dropout", 0, 0.9),
            ("autoencoder_share", 0.01, 0.99),
            ("autoencoder_lr_scale", 1e-3, 1e3),
            ("lm_lr_scale", 1e-3, 1e3),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"calm.{name}: {getattr(self, name)}; must lie between {low} and {high}")
        if self.energy_exponent == 0:
            raise ConfigError("calm.energy_exponent: 0; must be above 0")
        if self.rope_theta <= 1:
            raise ConfigError(f"calm.rope_theta: {self.rope_theta}; must be above 1")
        if self.norm_eps <= 0:
            raise ConfigError(f"calm.norm_eps: {self.norm_eps}; must be above 0")

    @property
    def ffn_width(self) -> int:
        return -(-8 * self.d_model // 24) * 8 if self.d_ffn is None else self.d_ffn

    @property
    def latent_width(self) -> int:
        return 16 * self.chunk_size if self.d_latent is None else self.d_latent

    @property
    def autoencoder_width(self) -> int:
        return max(32, self.d_model // 16 * 8) if self.d_autoencoder is None else self.d_autoencoder

    @property
    def autoencoder_ffn_width(self) -> int:
        return 5 * self.autoencoder_width // 2 if self.d_autoencoder_ffn is None else self.d_autoencoder_ffn

    @property
    def head_width(self) -> int:
        return self.d_model if self.d_head is None else self.d_head

    @property
    def head_blocks(self) -> int:
        return max(1, self.n_layers // 4) if self.n_head_blocks is None else self.n_head_blocks

    @property
    def n_parameters(self) -> int:
        """Parameters, the autoencoder included."""
        return self.n_autoencoder_parameters + self.n_lm_parameters

    @property
    def n_autoencoder_parameters(self) -> int:
        """Parameters of the autoencoder; its tied embedding once."""
        width, latent, chunk = self.autoencoder_width, self.latent_width, self.chunk_size
        blocks = 2 * self.n_autoencoder_blocks * (3 * width * self.autoencoder_ffn_width + width)
        squeeze = chunk * width * width + width + chunk * width * width + chunk * width
        ends = width * 2 * latent + 2 * latent + latent * width + width + 2 * width
        return self.vocab_size * width + blocks + squeeze + ends

    @property
    def n_lm_parameters(self) -> int:
        """Parameters of the continuous language model: inputs, backbone and head."""
        d = self.d_model
        embedding = self.vocab_size * d + 2 * self.chunk_size * d * d + 2 * d + 2 * d * d + d + 2 * d
        latent = self.latent_width * d + d
        inputs = {"discrete": embedding, "latent": latent, "both": embedding + latent}[self.inputs]
        backbone = self.n_layers * (4 * d * d + 3 * d * self.ffn_width + 2 * d) + d
        return inputs + backbone + self._n_head_parameters

    @property
    def _n_head_parameters(self) -> int:
        d, w, latent = self.d_model, self.head_width, self.latent_width
        if self.head == "energy":
            starts = (d * w + 3 * w) + (self.d_noise * w + 3 * w)
            return starts + self.head_blocks * (6 * w * w + 7 * w) + 3 * w + w * w + w * latent + latent
        out = 2 * latent if self.head == "diffusion" else latent
        starts = (latent * w + w) + (d * w + w) + (TIME_WIDTH * w + w + w * w + w)
        return starts + self.head_blocks * (5 * w * w + 7 * w) + 2 * w * w + 2 * w + w * out + out


@lru_cache
def candidates(vocab_size: int) -> tuple[CalmConfig, ...]:
    """Backbones shaped like the Transformer's at the same width, and what pays at small sizes in the other parts.

    Depth is 4 layers at width 128, 12 at 768, 32 at 4096, rounded down and up; heads are 32 to 64 wide, the widest that
    divides the width; the feed-forward is 7/3 to 10/3 times as wide as the residual stream. N and M are 4 and 16.

    The paper's autoencoder is half as wide as the backbone; below width 256 it is 48 wide at least (or 3/4 of the
    backbone), since narrower ones are slow to learn bytes. The paper's head is as wide as the backbone; at widths 40 to
    160 it is twice as wide: with 0.4 million parameters and 2 MB of Python source that gave BrierLM 16.8 and 17.6 (two
    seeds) against 15.1 and 14.6, at equal parameters, hence with fewer layers.
    """
    found = []
    for d_model in (*range(32, 256, 8), *range(256, 1024, 32), *range(1024, 8193, 128)):
        head_dim = next((width for width in (64, 56, 48, 40, 32) if d_model % width == 0), None)
        if head_dim is None:
            continue
        depth = 4 * (d_model / 128) ** 0.6
        step = 8 * max(1, d_model // 256)
        depths = range(max(2, floor(depth)), max(2, ceil(depth)) + (2 if d_model < 64 else 1))
        inner = (None, *range(-(-7 * d_model // (3 * step)) * step, 10 * d_model // 3 + 1, step))
        small = d_model < 256
        least = max(d_model // 16 * 8, min(3 * d_model // 16 * 4, 48) if small else 0)
        widths = range(least, least + (9 if small else 1), 4)
        for n_layers, d_ffn, d_autoencoder in product(depths, inner, widths):
            found.append(
                CalmConfig(
                    vocab_size=vocab_size,
                    d_model=d_model,
                    n_layers=n_layers,
                    n_heads=d_model // head_dim,
                    d_ffn=d_ffn,
                    d_autoencoder=d_autoencoder,
                    d_head=2 * d_model if 40 <= d_model <= 160 else None,
                    n_samples=4,
                    n_targets=16,
                )
            )
    return tuple(sorted(found, key=lambda config: config.n_parameters))


AUTOENCODER_SHARE = 30 * 0.512 / (30 * 0.512 + 250 * 2)
"""30 thousand steps of 0.512 million tokens for the autoencoder, then 250 thousand of 2 million for the model. Source:
Shao et al. 2025, section 7.1."""


def _table(d_model: int, d_ffn: int, chunk_size: int = 4, n_layers: int = 16) -> dict[str, Any]:
    """The Llama 3 vocabulary and one padding token; heads of L and XL are not stated and do not change a count."""
    return {
        "vocab_size": 128_257,
        "chunk_size": chunk_size,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": 16,
        "d_ffn": d_ffn,
        "d_latent": 32 * chunk_size,
        "d_autoencoder": 512,
        "d_autoencoder_ffn": 1280,
        "autoencoder_share": AUTOENCODER_SHARE,
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "calm-ablation": _table(768, 2048, n_layers=12),
    "calm-m": _table(1024, 2752),
    "calm-l": _table(1536, 4096),
    "calm-l-k1": _table(1536, 4096, chunk_size=1),
    "calm-l-k2": _table(1536, 4096, chunk_size=2),
    "calm-l-k8": _table(1536, 4096, chunk_size=8),
    "calm-xl": _table(2560, 6880),
}
"""Shao et al. 2025, table 1, figure 4 and section 7.1. The paper's counts leave the autoencoder out; ours do not."""
