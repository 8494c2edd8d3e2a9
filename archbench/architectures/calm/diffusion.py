"""The diffusion head: noise is removed from the latent in many small steps.

    x_t = sqrt(a_t) z + sqrt(1 - a_t) eps        a_t = prod (1 - b_s), cosine schedule of 1000 steps

The network tells eps and, by v in [-1, 1], the log variance of the step between its bounds: log b_t (v = 1) and the
log variance of q(x_{t-1} | x_t, z) (v = -1). Loss: mean squared error of eps, plus the divergence of the step from q in
bits with its mean held fixed, which trains the variance. Sampling walks a subset of the steps, evenly spaced.

Source: Ho et al. 2020, section 2 and eq. 7; Nichol & Dhariwal 2021, sections 3.1 to 3.3; Shao et al. 2025, section 7.4.
Departure: the last step's likelihood, written for pixels in [-1, 1], is replaced by the divergence at the smallest
variance, since latents have no such range. The predicted latent is not clipped.

Letters: p positions, n samples, d width, l latent width, t steps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Generator, Tensor

from archbench.architectures.calm.config import CalmConfig
from archbench.architectures.calm.denoiser import Denoiser
from archbench.architectures.calm.heads import Head, Noise, posterior_draws
from archbench.model import Loss

STEPS = 1000


class Schedule(NamedTuple):
    """One entry a step. q(x_{t-1} | x_t, z) has mean `from_latent` z + `from_noisy` x_t."""

    time: Float64[Tensor, " t"]
    signal: Float64[Tensor, " t"]
    log_beta: Float64[Tensor, " t"]
    log_variance: Float64[Tensor, " t"]
    from_latent: Float64[Tensor, " t"]
    from_noisy: Float64[Tensor, " t"]


class DiffusionHead(Head):
    """`diffusion_steps` calls a sample."""

    def __init__(self, config: CalmConfig, generator: Generator | None) -> None:
        super().__init__()
        self.config = config
        self.net = Denoiser(config, 2 * config.latent_width, generator)

    def loss(
        self,
        hidden: Float[Tensor, "p d"],
        mean: Float[Tensor, "p l"],
        sigma: Float[Tensor, "p l"],
        generator: Generator,
    ) -> Loss:
        """Each position at `n_samples` times. Parts: the error of eps, and the divergence in bits a dimension."""
        latent = posterior_draws(mean, sigma, self.config.n_samples, generator)
        device = latent.device
        step = torch.randint(STEPS, latent.shape[:2], generator=generator, device=device)
        noise = torch.randn(latent.shape, generator=generator, device=device)
        plan = schedule(STEPS)
        signal = _at(plan.signal, step)
        noisy = signal.sqrt() * latent + (1 - signal).sqrt() * noise
        found, v = self.net(noisy, step.float(), self.net.condition(hidden)).chunk(2, dim=-1)
        error = (found - noise).square().mean()
        # The mean is held fixed, so that the divergence trains the variance alone.
        predicted = (noisy - (1 - signal).sqrt() * found.detach()) / signal.sqrt()
        apart = _at(plan.from_latent, step) * (latent - predicted)
        low, high = _at(plan.log_variance, step), _at(plan.log_beta, step)
        log_variance = low + (v + 1) / 2 * (high - low)
        ratio = low - log_variance
        divergence = 0.5 * (ratio.exp() - 1 - ratio + apart.square() * (-log_variance).exp())
        bits = divergence.mean() / math.log(2)
        return Loss(error + bits, {"error": error.detach(), "divergence": bits.detach()})

    def sample(self, hidden: Float[Tensor, "p d"], n: int, noise: Noise) -> Float[Tensor, "p n l"]:
        p, width = len(hidden), self.config.latent_width
        x = noise.normal(p, n, width, hidden.device)
        steps = sampling_steps(self.config.diffusion_steps)
        modulations = self.net.at_times([step.time for step in steps], self.net.condition(hidden))
        for step, by in zip(steps, modulations, strict=True):
            found, v = self.net.modulated(x, by).chunk(2, dim=-1)
            x = torch.add(x * step.of_noisy, found, alpha=step.of_found)
            if not step.last:
                spread = torch.add(v * step.by_v, step.centre).exp_()
                x = torch.addcmul(x, spread, noise.normal(p, n, width, hidden.device))
        return x

    def training_flops(self, n: int) -> float:
        return self.net.training_flops(n, self.config.n_samples)

    def sampling_flops(self, n: int) -> float:
        return self.net.from_hidden.flops(n) + self.config.diffusion_steps * self.net.call_flops(n)

    def further_flops(self, n: int) -> float:
        return self.config.diffusion_steps * self.net.further_flops(n)


@lru_cache
def schedule(n_steps: int) -> Schedule:
    """The cosine schedule, walked in `n_steps` of its 1000 steps, first and last included."""
    with torch.device("cpu"):
        edge = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
        curve = ((edge + 0.008) / 1.008 * math.pi / 2).cos().square()
        signal = (1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999)).cumprod(0)
        time = torch.linspace(0, STEPS - 1, n_steps, dtype=torch.float64).round()
        signal = signal[time.long()]
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        beta = 1 - signal / before
        variance = beta * (1 - before) / (1 - signal)
        variance[0] = variance[1]  # the first is 0, whose logarithm there is not
        return Schedule(
            time,
            signal,
            beta.log(),
            variance.log(),
            beta * before.sqrt() / (1 - signal),
            (1 - before) * (1 - beta).sqrt() / (1 - signal),
        )


class Step(NamedTuple):
    """One step of sampling, in numbers: the latent told by (x, eps), put into the mean of q, is a sum of both; the log
    of the standard deviation, half the log variance between its bounds, is `centre` + `by_v` v."""

    time: float
    of_noisy: float
    of_found: float
    centre: float
    by_v: float
    last: bool


@lru_cache
def sampling_steps(n_steps: int) -> tuple[Step, ...]:
    """The schedule walked down."""
    steps = []
    for index, (time, signal, high, low, from_latent, from_noisy) in enumerate(zip(*schedule(n_steps), strict=True)):
        of_noisy = float(from_noisy + from_latent / signal.sqrt())
        of_found = float(-from_latent * ((1 - signal) / signal).sqrt())
        steps.append(
            Step(float(time), of_noisy, of_found, float((low + high) / 4), float((high - low) / 4), last=index == 0)
        )
    return tuple(reversed(steps))


def _at(column: Float64[Tensor, " t"], step: Int[Tensor, "p n"]) -> Float[Tensor, "p n 1"]:
    return column.float().to(step.device)[step][..., None]
