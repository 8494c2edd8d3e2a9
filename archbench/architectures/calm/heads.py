"""What draws the next latent from a hidden vector: the interface of a head, its noise, and the energy head.

The energy head writes a sample in one pass from hidden vector h and noise e, uniform on [-1/2, 1/2):

    y = N(Wh h)     x_0 = N(We e)                                                       N: LayerNorm
    u = silu(W1 [N(x); y])    g, w = split(W3 silu(W2 u))    x' = x + W4( silu(g) * w )       each block
    z = Wz silu(Wo N(x))                                                      Wz, bz start at zero: every sample is 0

It is trained by the energy loss alone: it never tells a probability.

Source: Shao et al. 2025, sections 3.2 and 3.3; output layers and LayerNorms as in the official code. What depends on h
alone (y, and the half of W1 that reads it) is computed once a position, not once a sample, which changes no number.

Letters: p positions, n samples, d width of the backbone, w width of the head, l latent width, m targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from archbench.architectures.calm.config import CalmConfig
from archbench.architectures.calm.energy import between, energy_loss, energy_loss_flops
from archbench.architectures.calm.parts import Affine, layer_norm
from archbench.layers import Linear, Stack
from archbench.model import Loss
from archbench.ops.precision import without_autocast


@dataclass(frozen=True)
class Noise:
    """Where a head's random numbers come from. With `shared`, all positions get the same numbers, so that what one
    draws does not depend on how many others there are."""

    generator: Generator
    shared: bool = False

    def uniform(self, p: int, n: int, width: int, device: torch.device) -> Float[Tensor, "p n w"]:
        """Uniform on [-1/2, 1/2)."""
        rows = 1 if self.shared else p
        return torch.rand(rows, n, width, generator=self.generator, device=device).expand(p, n, width) - 0.5

    def normal(self, p: int, n: int, width: int, device: torch.device) -> Float[Tensor, "p n w"]:
        rows = 1 if self.shared else p
        return torch.randn(rows, n, width, generator=self.generator, device=device).expand(p, n, width)


class Head(nn.Module, ABC):
    """Draws latents given hidden vectors, and says how well it does."""

    @abstractmethod
    def loss(
        self,
        hidden: Float[Tensor, "p d"],
        mean: Float[Tensor, "p l"],
        sigma: Float[Tensor, "p l"],
        generator: Generator,
    ) -> Loss:
        """Of drawing latents from the posteriors N(mean, sigma^2), averaged over positions."""

    @abstractmethod
    def sample(self, hidden: Float[Tensor, "p d"], n: int, noise: Noise) -> Float[Tensor, "p n l"]:
        """n independent latents of each position, fp32."""

    @abstractmethod
    def training_flops(self, n: int) -> float:
        """Forward and backward of the loss at n positions."""

    @abstractmethod
    def sampling_flops(self, n: int) -> float:
        """One sample at each of n positions."""

    @abstractmethod
    def further_flops(self, n: int) -> float:
        """One more sample at each of n positions, drawn together with the first."""


def posterior_draws(
    mean: Float[Tensor, "p l"], sigma: Float[Tensor, "p l"], n: int, generator: Generator
) -> Float[Tensor, "p n l"]:
    shape = (len(mean), n, mean.shape[1])
    return mean[:, None] + sigma[:, None] * torch.randn(shape, generator=generator, device=mean.device)


class Block(nn.Module):
    """A residual block of the energy head."""

    def __init__(self, width: int, generator: Generator | None) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.from_x = Linear(width, width, std=(2 * width) ** -0.5, generator=generator)
        self.from_y = Affine(width, width, std=(2 * width) ** -0.5, generator=generator)
        self.middle = Affine(width, width, generator=generator)
        self.gates = Affine(width, 2 * width, generator=generator)
        self.out = Affine(width, width, generator=generator)

    def forward(self, x: Float[Tensor, "p n w"], y: Float[Tensor, "p w"]) -> Float[Tensor, "p n w"]:
        u = F.silu(self.from_x(self.norm(x)) + self.from_y(y)[:, None])
        gate, value = self.gates(F.silu(self.middle(u))).chunk(2, dim=-1)
        return x + self.out(F.silu(gate) * value)


class EnergyHead(Head):
    """One pass a sample, trained by the energy loss."""

    def __init__(self, config: CalmConfig, generator: Generator | None) -> None:
        super().__init__()
        self.config = config
        width = config.head_width
        self.from_hidden = Affine(config.d_model, width, generator=generator)
        self.norm_hidden = layer_norm(width)
        self.from_noise = Affine(config.d_noise, width, generator=generator)
        self.norm_noise = layer_norm(width)
        self.blocks: Stack[Block] = Stack(Block(width, generator) for _ in range(config.head_blocks))
        self.norm = layer_norm(width)
        self.widen = Affine(width, width, generator=generator)
        self.out = Affine(width, config.latent_width, std=0.0, generator=generator)

    def forward(self, hidden: Float[Tensor, "p d"], noise: Float[Tensor, "p n e"]) -> Float[Tensor, "p n l"]:
        y = self.norm_hidden(self.from_hidden(hidden))
        x = self.norm_noise(self.from_noise(noise))
        for block in self.blocks:
            x = block(x, y)
        return self.out(F.silu(self.widen(self.norm(x)))).float()

    def sample(self, hidden: Float[Tensor, "p d"], n: int, noise: Noise) -> Float[Tensor, "p n l"]:
        return self(hidden, noise.uniform(len(hidden), n, self.config.d_noise, hidden.device))

    def loss(
        self,
        hidden: Float[Tensor, "p d"],
        mean: Float[Tensor, "p l"],
        sigma: Float[Tensor, "p l"],
        generator: Generator,
    ) -> Loss:
        """Parts: the loss of the best draws without context (E |z_i - z_j| over positions), that of a perfect model
        (within a posterior), and the skill, how far from the first to the second: 0 says that no context is used."""
        config = self.config
        samples = self.sample(hidden, config.n_samples, Noise(generator))
        targets = posterior_draws(mean, sigma, config.n_targets, generator)
        value = energy_loss(samples, targets, config.energy_exponent)
        with torch.no_grad(), without_autocast(mean):
            pair = posterior_draws(mean, sigma, 2, generator)
            perfect = between(pair, config.energy_exponent)
            context_free = between(
                torch.stack([pair[:, 0], pair[:, 1].roll(len(pair) // 2, dims=0)], dim=1), config.energy_exponent
            )
            skill = (context_free - value) / (context_free - perfect).clamp(min=1e-6)
        return Loss(value, {"context_free": context_free, "perfect": perfect, "skill": skill})

    def training_flops(self, n: int) -> float:
        config, samples = self.config, n * self.config.n_samples
        each = self._sample_flops(samples) - self.from_noise.flops(samples)
        distances = energy_loss_flops(n, config.n_samples, config.n_targets, config.latent_width)
        # Noise needs no gradient: its matrix is multiplied twice, not three times.
        return 3 * (self._position_flops(n) + each) + 2 * self.from_noise.flops(samples) + distances

    def sampling_flops(self, n: int) -> float:
        return self._position_flops(n) + self._sample_flops(n)

    def further_flops(self, n: int) -> float:
        return self._sample_flops(n)

    def _position_flops(self, n: int) -> float:
        return self.from_hidden.flops(n) + sum(block.from_y.flops(n) for block in self.blocks)

    def _sample_flops(self, n: int) -> float:
        blocks = sum(m.flops(n) for b in self.blocks for m in (b.from_x, b.middle, b.gates, b.out))
        return self.from_noise.flops(n) + blocks + self.widen.flops(n) + self.out.flops(n)
