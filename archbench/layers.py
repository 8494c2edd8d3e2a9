"""Layers that several architectures share, each with its FLOP formula beside it.

Letters: b batch, t time, s positions attended to, d width, h query heads, g key-value heads, e head width, f inner
width. FLOP formulas give floating-point operations (multiply-add = 2) for n positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from archbench.ops import conv
from archbench.ops.norm import rms_norm

M = TypeVar("M", bound=nn.Module)


class RMSNorm(nn.Module):
    """Root-mean-square norm with gain, statistics in fp32. Source: Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A matrix without bias, drawn from N(0, std) with the generator given."""

    def __init__(self, d_in: int, d_out: int, *, std: float | None = None, generator: Generator | None = None) -> None:
        super().__init__(d_in, d_out, bias=False)
        draw_normal(self.weight, d_in**-0.5 if std is None else std, generator)

    def reset_parameters(self) -> None:
        """Nothing: `__init__` draws the weights once, from its generator, not from global random state."""

    def flops(self, n: int) -> int:
        return 2 * n * self.in_features * self.out_features


class Embedding(nn.Embedding):
    """A look-up table drawn from N(0, std) with the generator given."""

    def __init__(self, n: int, d_model: int, *, std: float, generator: Generator | None = None) -> None:
        super().__init__(n, d_model, _weight=torch.empty(n, d_model))
        draw_normal(self.weight, std, generator)


class Stack(nn.ModuleList, Generic[M]):
    """Modules of one kind in order, known to the type checker as such."""

    def __iter__(self) -> Iterator[M]:
        return super().__iter__()  # type: ignore[return-value]


def draw_normal(parameter: Tensor, std: float, generator: Generator | None) -> None:
    """Fills `parameter` from N(0, std). On the meta device there is nothing to fill."""
    if parameter.device.type != "meta":
        nn.init.normal_(parameter, std=std, generator=generator)


class SwiGLU(nn.Module):
    """Gated feed-forward W2(silu(W1 x) * W3 x), with W1 and W3 as one matrix. Source: Shazeer 2020, eq. 6."""

    def __init__(self, d_model: int, d_ffn: int, *, out_std: float, generator: Generator | None) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ffn, generator=generator)
        self.down = Linear(d_ffn, d_model, std=out_std, generator=generator)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def flops(self, n: int) -> int:
        return self.gate_up.flops(n) + self.down.flops(n)


class Frontend(nn.Module):
    """x + silu(conv(x)) on embeddings: a causal convolution of each channel over `width` tokens, before the layers.

    It lets attention match on what stood just before a token without learning that in a layer of its own. It is part of
    no paper compared here, so a table gives it to all attention models or to none. Width 0 leaves embeddings as they
    are. Source: the convolution in front of keys and values of So et al. 2021 (Primer), 2109.08668, section 3, moved to
    the embeddings.

    Its state is a tuple: of the window alone, or of nothing at width 0.
    """

    def __init__(self, d_model: int, width: int, generator: Generator | None) -> None:
        super().__init__()
        self.width = width
        if width:
            self.weight = nn.Parameter(torch.empty(d_model, width))
            self.bias = nn.Parameter(torch.zeros(d_model))
            draw_normal(self.weight, width**-0.5, generator)

    def initial_state(self, batch_size: int) -> tuple[Float[Tensor, "b v d"], ...]:
        if not self.width:
            return ()
        d, v = self.weight.shape[0], self.width - 1
        return (torch.zeros(batch_size, v, d, device=self.weight.device, dtype=self.weight.dtype),)

    def forward(
        self, x: Float[Tensor, "b t d"], state: tuple[Float[Tensor, "b v d"], ...]
    ) -> tuple[Float[Tensor, "b t d"], tuple[Float[Tensor, "b v d"], ...]]:
        if not self.width:
            return x, state
        mixed, window = conv.causal_conv(x, self.weight, self.bias, state[0])
        return x + mixed, (window,)

    def flops(self, n: int) -> int:
        return conv.flops(n, *self.weight.shape) if self.width else 0

    @staticmethod
    def parameters_of(d_model: int, width: int) -> int:
        return (width + 1) * d_model if width else 0


class KVCache(NamedTuple):
    """Keys and values of the `length` positions read so far; what lies beyond is unused capacity and never matters.

    Rolling back is setting `length` back. A prompt read into an empty cache takes exactly its own size; later growth
    leaves slack of one eighth, so that appending costs little on average.
    """

    keys: Float[Tensor, "b g s e"]
    values: Float[Tensor, "b g s e"]
    length: int

    def append(self, keys: Float[Tensor, "b g t e"], values: Float[Tensor, "b g t e"]) -> KVCache:
        """The cache with t more positions, written in place where capacity allows."""
        length = self.length + keys.shape[2]
        if self.length == 0 and self.keys.shape[2] < length:
            if keys.requires_grad:
                return KVCache(keys, values, length)
            # Copies, since a view of a wider projection would keep all of that projection alive.
            return KVCache(keys.contiguous(), values.clone(memory_format=torch.contiguous_format), length)
        if self.keys.shape[2] >= length and not keys.requires_grad:
            self.keys[:, :, self.length : length] = keys
            self.values[:, :, self.length : length] = values
            return KVCache(self.keys, self.values, length)
        slack = 0 if keys.requires_grad else slack_behind(length)
        return KVCache(
            _grown(self.keys[:, :, : self.length], keys, slack),
            _grown(self.values[:, :, : self.length], values, slack),
            length,
        )

    def with_room(self, n: int) -> KVCache:
        """The same cache with capacity for n positions in all, and its numbers one after the other in memory: what a
        kernel that writes into it asks for. Not for caches with gradients."""
        if self.keys.shape[2] >= n and self.keys.is_contiguous() and self.values.is_contiguous():
            return self
        room = n - self.length + (slack_behind(n) if self.length else 0)
        new = self.keys.new_zeros(*self.keys.shape[:2], room, self.keys.shape[3])
        keys, values = self.valid()
        return KVCache(torch.cat([keys, new], dim=2), torch.cat([values, new], dim=2), self.length)

    def valid(self) -> tuple[Float[Tensor, "b g s e"], Float[Tensor, "b g s e"]]:
        """Views of the keys and values that count."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def slack_behind(n: int) -> int:
    """Positions of unused capacity that a cache of n positions gets when it grows."""
    return max(64, n // 8)


def filled(caches: Iterable[KVCache], n: int) -> tuple[KVCache, ...]:
    """Caches that were written to up to position n."""
    return tuple([KVCache(keys, values, n) for keys, values, _ in caches])


def _grown(old: Tensor, new: Tensor, slack: int) -> Tensor:
    room = new.new_zeros(*new.shape[:2], slack, new.shape[3])
    return torch.cat([old, new, room], dim=2)


def empty_cache(
    batch_size: int, n_kv_heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
) -> KVCache:
    nothing = torch.zeros(batch_size, n_kv_heads, 0, head_dim, device=device, dtype=dtype)
    return KVCache(nothing, nothing.clone(), 0)


ANGLES_AT_ONCE = 1024
"""Rotary angles are made and kept for this many positions at a time."""


def rotary_angles(
    start: int, n: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]:
    """Cosines and sines of positions start .. start + n - 1, each angle twice (half-split pairs i and i + e/2).

    Angles are formed in fp64 on CPU and GPU: at position 10^6 an fp32 product is off by 0.06 rad. The last few tables
    made are kept, so that decoding token by token computes none.
    Source: Su et al. 2021, eq. 15; pairing as in the Hugging Face Llama.
    """
    first = start // ANGLES_AT_ONCE * ANGLES_AT_ONCE
    if start + n > first + ANGLES_AT_ONCE:
        return _angles(start, n, head_dim, theta, device)
    cos, sin = _kept_angles(first, head_dim, theta, device)
    here = slice(start - first, start - first + n)
    return cos[here], sin[here]


@lru_cache(maxsize=16)
def _kept_angles(first: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # these tables may take part in training later
        return _angles(first, ANGLES_AT_ONCE, head_dim, theta, device)


def _angles(start: int, n: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if device.type == "mps" else torch.float64
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=wide) / head_dim)
    angles = torch.arange(start, start + n, device=device, dtype=wide)[:, None] * frequency
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(
    x: Float[Tensor, "b h t e"], angles: tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]
) -> Float[Tensor, "b h t e"]:
    """Rotary position embedding of queries or keys."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin).to(x.dtype)


def residual_std(d_in: int, n_branches: int) -> float:
    """Standard deviation of a matrix that writes into a residual stream with `n_branches` such writers, so that the
    stream's variance does not grow with depth. Source: Radford et al. 2019, section 2.3."""
    return d_in**-0.5 / math.sqrt(n_branches)
