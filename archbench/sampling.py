"""Drawing tokens from logits: temperature, top-k, top-p; greedy is temperature 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 takes the most likely token, ties to the lowest id."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"sampling.temperature: {self.temperature}; must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"sampling.top_k: {self.top_k}; must be 1 or more, or left out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p: {self.top_p}; must lie in (0, 1], or be left out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0)
PLAIN = Sampling()


def probabilities(logits: Float[Tensor, "*batch v"], sampling: Sampling) -> Float[Tensor, "*batch v"]:
    """The distribution that `sampling` makes of `logits`, in fp32; sums to one.

    Top-k and top-p act after the temperature; top-p keeps the smallest set of most likely tokens whose mass reaches p
    (Holtzman et al. 2020, section 3.1). Equal logits at the border of top-k are kept by lowest id.
    """
    if sampling.greedy:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    probs = (logits.float() / sampling.temperature).softmax(dim=-1)
    if sampling.top_k is None and sampling.top_p is None:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k is not None:
        keep[..., sampling.top_k :] = False
    if sampling.top_p is not None:
        mass_before = ordered.cumsum(dim=-1) - ordered
        keep &= mass_before < sampling.top_p
    kept = torch.where(keep, ordered, 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, kept / kept.sum(dim=-1, keepdim=True))


def draw(logits: Float[Tensor, "b v"], sampling: Sampling, generator: Generator | None) -> Int[Tensor, " b"]:
    """One token per row. `generator` may be None only when greedy.

    The draw inverts the distribution function at one uniform number per row, so that a row's token depends on its own
    logits and its own number alone.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    assert generator is not None, "sampling needs a generator: no global random state is used"
    cumulative = probabilities(logits, sampling).double().cumsum(dim=-1)
    uniform = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64, device=logits.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
