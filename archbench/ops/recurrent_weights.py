"""What decode steps need of Mamba or Mamba-2: weights, sizes, and the states they go on from.

Letters: b rows, d width, c inner width, n states of a channel, w convolution width, x convolved channels, r step rank,
h heads, p head width, v vocabulary.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

LONGEST = {"lean": 12, "native": 32}
"""New tokens of a row, at most, that a level reads quicker than the model's own modules do."""

States: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Of each block the last w - 1 inputs of its convolution (b, w - 1, x), and the recurrent state (b, c, n) or
(b, h, p, n)."""


class MixerWeights(NamedTuple):
    """One block. A is negative. `x_proj` and `dt_proj` are Mamba's, `inner_norm` Mamba-2's; steps, A and skip are of
    channels in Mamba, of heads in Mamba-2."""

    norm: Float[Tensor, " d"]
    in_proj: Float[Tensor, "_ d"]
    conv: Float[Tensor, "x w"]
    conv_bias: Float[Tensor, " x"]
    step_bias: Float[Tensor, " _"]
    A: Float[Tensor, "*_"]
    skip: Float[Tensor, " _"]
    out_proj: Float[Tensor, "d c"]
    x_proj: Float[Tensor, "_ c"] | None = None
    dt_proj: Float[Tensor, "c r"] | None = None
    inner_norm: Float[Tensor, " c"] | None = None


class RecurrentWeights(NamedTuple):
    """The weights of a model; `n_heads` 0 means Mamba, else Mamba-2."""

    embedding: Float[Tensor, "v d"]
    mixers: Sequence[MixerWeights]
    norm: Float[Tensor, " d"]
    unembedding: Float[Tensor, "v d"]
    d_inner: int
    n_states: int
    eps: float
    n_heads: int = 0
    n_groups: int = 0
    step_floor: float = 0.0
    step_ceiling: float = math.inf


class LastStates:
    """Which states the last call left behind, without keeping them alive."""

    def __init__(self) -> None:
        self._known: list[weakref.ref[Tensor]] = []

    def become(self, states: States) -> None:
        self._known = [weakref.ref(tensor) for tensor in chain.from_iterable(states)]

    def are(self, states: States) -> bool:
        """Whether these are the same tensors: so it is from step to step."""
        if len(self._known) != 2 * len(states):
            return False
        return all(tensor is known() for tensor, known in zip(chain.from_iterable(states), self._known, strict=True))
