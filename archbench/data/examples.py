"""What a training reads: rows of tokens, step by step. Windows of a corpus are one source, a task's lessons another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor


class Rows(NamedTuple):
    """The rows of one step, `context` tokens and `lookahead` more each; weights and repeats as `model.Batch` says."""

    tokens: Int64[Tensor, "b t"]
    weights: Float[Tensor, "b t"] | None = None
    repeats: Float[Tensor, "b t"] | None = None


class Examples(ABC):
    """A source of training rows.

    `context` is the length that the next step's rows will have. Rows depend on the step, and in a curriculum on what
    `told` has been told; `position` is that part of the state, so that an interrupted training goes on alike.
    """

    context: int

    @abstractmethod
    def rows_at(self, step: int, lookahead: int) -> Rows:
        """The rows of a step."""

    @abstractmethod
    def bytes_at(self, step: int) -> float:
        """Bytes of raw text under the step's next-token targets."""

    def told(self, parts: Mapping[str, Tensor]) -> None:  # noqa: B027 (most sources have nothing to learn)
        """The parts of the loss of the step just done."""

    def parts(self) -> dict[str, float]:
        """What to log beside the loss's parts."""
        return {}

    def position(self) -> dict[str, Any]:
        """JSON values from which `go_to` restores this source."""
        return {}

    def go_to(self, position: Mapping[str, Any]) -> None:  # noqa: B027
        """Raises KeyError when the position is not one of this source."""
