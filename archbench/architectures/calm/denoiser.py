"""The network of diffusion and flow heads: noisy latent, time and hidden vector in, a direction out.

    c  = Wh h + MLP( sinusoids of t )
    x' = x + gate * MLP( N(x) (1 + scale) + shift )        shift, scale, gate = Wm silu(c)       each block
    out = Wo ( N(x) (1 + scale) + shift )                  shift, scale = Wf silu(c)             N without gain here

All modulation matrices and Wo start at zero, so a block is the identity and the output 0.

A sampler goes through many times, and what modulates depends on time and hidden vector alone: `at_times` computes it
for many times together, as products of many rows instead of one each time.

Source: Peebles & Xie 2023 (DiT), section 3.2, as an MLP in Li et al. 2024 (MAR); Shao et al. 2025, section 7.4.

Letters: p positions, n samples, t times, d width of the backbone, w width of the head, l latent width, o output width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from archbench.architectures.calm.config import TIME_WIDTH, CalmConfig
from archbench.architectures.calm.parts import Affine, layer_norm
from archbench.layers import Stack

MOST_NUMBERS = 2**20
"""Most numbers of one modulation held at once while sampling."""


class Modulation(NamedTuple):
    """What modulates each block (shift, 1 + scale, gate) and the output (shift, 1 + scale): all [#p, #n, w]."""

    blocks: tuple[tuple[Tensor, Tensor, Tensor], ...]
    out: tuple[Tensor, Tensor]


class Block(nn.Module):
    """A residual block modulated by the condition."""

    def __init__(self, width: int, generator: Generator | None) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.inner = Affine(width, width, generator=generator)
        self.outer = Affine(width, width, generator=generator)
        self.modulation = Affine(width, 3 * width, std=0.0, generator=generator)

    def modulated_by(
        self, condition: Float[Tensor, "*_ w"]
    ) -> tuple[Float[Tensor, "*_ w"], Float[Tensor, "*_ w"], Float[Tensor, "*_ w"]]:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return shift, 1 + scale, gate

    def forward(self, x: Float[Tensor, "p n w"], by: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "p n w"]:
        shift, scale, gate = by
        return torch.addcmul(x, gate, self.outer(F.silu(self.inner(torch.addcmul(shift, self.norm(x), scale)))))


class Denoiser(nn.Module):
    """`out_width` numbers for each sample."""

    def __init__(self, config: CalmConfig, out_width: int, generator: Generator | None) -> None:
        super().__init__()
        width = config.head_width
        self.from_latent = Affine(config.latent_width, width, generator=generator)
        self.from_hidden = Affine(config.d_model, width, generator=generator)
        self.time_inner = Affine(TIME_WIDTH, width, generator=generator)
        self.time_outer = Affine(width, width, generator=generator)
        self.blocks: Stack[Block] = Stack(Block(width, generator) for _ in range(config.head_blocks))
        self.norm = layer_norm(width, affine=False)
        self.modulation = Affine(width, 2 * width, std=0.0, generator=generator)
        self.out = Affine(width, out_width, std=0.0, generator=generator)

    def condition(self, hidden: Float[Tensor, "p d"]) -> Float[Tensor, "p 1 w"]:
        """The part of the condition that stays the same at all times."""
        return self.from_hidden(hidden)[:, None]

    def forward(
        self, x: Float[Tensor, "p n l"], time: Float[Tensor, "#p #n"], condition: Float[Tensor, "p 1 w"]
    ) -> Float[Tensor, "p n o"]:
        """`time` in [0, 1000), `[1, 1]` where all samples are at the same."""
        return self.modulated(x, self._modulated_by(condition + self._told(time)))

    def at_times(self, times: Sequence[float], condition: Float[Tensor, "p 1 w"]) -> Iterator[Modulation]:
        """What modulates at each of these times, at which all samples are."""
        told = self._told(torch.tensor(times, dtype=torch.float32, device=condition.device)[:, None])
        for some in told.split(max(1, MOST_NUMBERS // condition.numel())):
            held = self._modulated_by(condition + some[:, None])
            parts = [part.unbind(0) for block in held.blocks for part in block]
            parts += [part.unbind(0) for part in held.out]
            for at_one in zip(*parts, strict=True):
                blocks = tuple((at_one[i], at_one[i + 1], at_one[i + 2]) for i in range(0, len(at_one) - 2, 3))
                yield Modulation(blocks, (at_one[-2], at_one[-1]))

    def modulated(self, x: Float[Tensor, "p n l"], by: Modulation) -> Float[Tensor, "p n o"]:
        """What `forward` gives at a time of `at_times`."""
        x = self.from_latent(x)
        for block, modulation in zip(self.blocks, by.blocks, strict=True):
            x = block(x, modulation)
        shift, scale = by.out
        return self.out(torch.addcmul(shift, self.norm(x), scale)).float()

    def _told(self, time: Float[Tensor, "#p #n"]) -> Float[Tensor, "#p #n w"]:
        return self.time_outer(F.silu(self.time_inner(sinusoids(time))))

    def _modulated_by(self, condition: Float[Tensor, "*_ w"]) -> Modulation:
        by = F.silu(condition)
        shift, scale = self.modulation(by).chunk(2, dim=-1)
        return Modulation(tuple(block.modulated_by(by) for block in self.blocks), (shift, 1 + scale))

    def training_flops(self, n: int, n_samples: int) -> float:
        """Forward and backward with n_samples of n positions, each at a time of its own. Latents and sinusoids need no
        gradient: their matrices are multiplied twice, not three times."""
        rows = n * n_samples
        inputs = self.from_latent.flops(rows) + self.time_inner.flops(rows)
        rest = self.from_hidden.flops(n) + self.time_outer.flops(rows) + self._rest_flops(rows)
        return 2 * inputs + 3 * rest

    def call_flops(self, n: int) -> float:
        """Forward of one sample at n positions, all at one time; without the condition."""
        time = self.time_inner.flops(1) + self.time_outer.flops(1)
        return time + self.from_latent.flops(n) + self._rest_flops(n)

    def further_flops(self, n: int) -> float:
        """Forward of one more sample at n positions, at the same time: what modulates it is there already."""
        blocks = sum(m.flops(n) for b in self.blocks for m in (b.inner, b.outer))
        return self.from_latent.flops(n) + blocks + self.out.flops(n)

    def _rest_flops(self, n: int) -> float:
        blocks = sum(m.flops(n) for b in self.blocks for m in (b.inner, b.outer, b.modulation))
        return blocks + self.modulation.flops(n) + self.out.flops(n)


def sinusoids(time: Float[Tensor, "p n"]) -> Float[Tensor, "p n s"]:
    """Cosines, then sines, of the time at 128 frequencies from 1 down to almost 1/10000."""
    half = TIME_WIDTH // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device) / half)
    angles = time.float()[..., None] * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
