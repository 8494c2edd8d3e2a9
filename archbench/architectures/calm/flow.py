"""The flow head: a velocity field carries noise to the latent.

    x_t = (1 - t) x_0 + t z        x_0 ~ N(0, I), t ~ U(0, 1);  the network regresses v = z - x_0 at x_t

Sampling integrates dx = v dt from t = 0 to 1. The network is told floor(1000 t).

Source: Lipman et al. 2023, section 4.1 (the straight paths); Shao et al. 2025, section 7.4.

Letters: p positions, n samples, d width, l latent width.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from archbench.architectures.calm.config import CalmConfig
from archbench.architectures.calm.denoiser import Denoiser
from archbench.architectures.calm.heads import Head, Noise, posterior_draws
from archbench.model import Loss

TIMES = 1000


class FlowHead(Head):
    """`flow_steps` calls a sample by Euler's rule, twice as many by the midpoint rule."""

    def __init__(self, config: CalmConfig, generator: Generator | None) -> None:
        super().__init__()
        self.config = config
        self.net = Denoiser(config, config.latent_width, generator)

    def loss(
        self,
        hidden: Float[Tensor, "p d"],
        mean: Float[Tensor, "p l"],
        sigma: Float[Tensor, "p l"],
        generator: Generator,
    ) -> Loss:
        """Mean squared error of the velocity, each position at `n_samples` times."""
        latent = posterior_draws(mean, sigma, self.config.n_samples, generator)
        start = torch.randn(latent.shape, generator=generator, device=latent.device)
        time = torch.rand(latent.shape[:2], generator=generator, device=latent.device)
        mixed = (1 - time[..., None]) * start + time[..., None] * latent
        velocity = self.net(mixed, (TIMES * time).floor(), self.net.condition(hidden))
        return Loss((velocity - (latent - start)).square().mean())

    def sample(self, hidden: Float[Tensor, "p d"], n: int, noise: Noise) -> Float[Tensor, "p n l"]:
        x = noise.normal(len(hidden), n, self.config.latent_width, hidden.device)
        step, midpoint = 1 / self.config.flow_steps, self.config.flow_solver == "midpoint"
        times = [index * step for index in range(self.config.flow_steps)]
        if midpoint:
            times = [time + half for time in times for half in (0, step / 2)]
        told = self.net.at_times([float(math.floor(TIMES * time)) for time in times], self.net.condition(hidden))
        for by in told:
            slope = self.net.modulated(x, by)
            if midpoint:
                slope = self.net.modulated(torch.add(x, slope, alpha=step / 2), next(told))
            x = torch.add(x, slope, alpha=step)
        return x

    def training_flops(self, n: int) -> float:
        return self.net.training_flops(n, self.config.n_samples)

    def sampling_flops(self, n: int) -> float:
        calls = self.config.flow_steps * (2 if self.config.flow_solver == "midpoint" else 1)
        return self.net.from_hidden.flops(n) + calls * self.net.call_flops(n)

    def further_flops(self, n: int) -> float:
        calls = self.config.flow_steps * (2 if self.config.flow_solver == "midpoint" else 1)
        return calls * self.net.further_flops(n)
