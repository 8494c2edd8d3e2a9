"""Attention inside segments and nothing across them: the control of every model with a memory.

The Transformer's blocks (pre-norm, rotary positions, SwiGLU), whose attention sees the tokens of its own segment of N
up to itself and none before it. Positions restart in every segment. What a model with a memory gains over this one of
the same size, tokens beyond the segment are worth to it.

Source: the `local` control of the benchmark's long-context protocol; as Infini-attention (2404.07143) with the memory's
gate at zero, which the tests hold it against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from archbench.architectures import transformer
from archbench.model import Architecture, Conversion, Traits
from archbench.segments import (
    Angles,
    SegmentAttention,
    SegmentCache,
    SegmentConfig,
    SegmentModel,
    carried_over,
)


@dataclass(frozen=True, kw_only=True)
class LocalConfig(SegmentConfig):
    """Sizes of a segment-local Transformer."""

    kind: ClassVar[str] = "local"


class LocalAttention(SegmentAttention):
    """State: the open segment's keys and values."""

    def initial_state(self, batch_size: int) -> SegmentCache:
        return self.empty_segment(batch_size)

    def mix(
        self, rows: Float[Tensor, "r m n e"], state: SegmentCache, angles: Angles | None
    ) -> tuple[Float[Tensor, "r h n e"], SegmentCache]:
        return self.attend(rows, state, angles)

    def flops(self, n: int, context: int, causal: float) -> float:
        return self.projection_flops(n) + self.attention_flops(n, context, causal)


class Local(SegmentModel):
    """State: a buffer for one segment a layer."""

    def __init__(self, config: LocalConfig, generator: Generator | None = None) -> None:
        super().__init__(config, LocalAttention, generator)


@cache
def candidates(vocab_size: int) -> tuple[LocalConfig, ...]:
    """The Transformer's, width for width."""
    return tuple(LocalConfig(**carried_over(config, LocalConfig)) for config in transformer.candidates(vocab_size))


def _carried(source: Any) -> Mapping[str, Any]:
    return carried_over(source, LocalConfig)


def _same_weights(_config: LocalConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(weights)


ARCHITECTURE = Architecture(
    config=LocalConfig,
    build=Local,
    traits=lambda _config: Traits(likelihood=True, constant_state=True, answers=True),
    paper="the segment-local control of Munkhdalai et al. 2024, Leave No Context Behind, 2404.07143",
    candidates=candidates,
    conversions={"transformer": Conversion(config=_carried, weights=_same_weights)},
)
