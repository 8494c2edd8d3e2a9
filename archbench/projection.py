"""What a longer text will cost, projected from shorter ones: time by the FLOPs of the work, state along a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Expected(NamedTuple):
    """Seconds of the work, None before any was done, and bytes of one row's state."""

    seconds: float | None
    row_bytes: float


class Projection:
    """Learns from every length that was done, in ascending order.

    `sizes` are two first observations of a state, (tokens read, bytes of one row). A state that is one sum keeps its
    size, a cache grows by as much with every token: both lie on a line. (Caches with slack lie near one.)
    """

    def __init__(self, sizes: Sequence[tuple[int, float]]) -> None:
        self.sizes = list(sizes)
        self.longest = 0
        self.seconds_per_flop: float | None = None

    @property
    def basis(self) -> tuple[int, int]:
        """The two lengths that the line goes through."""
        return self.sizes[-2][0], self.sizes[-1][0]

    def expected(self, length: int, flops: float) -> Expected:
        """Of a length that needs so many FLOPs."""
        (before, less), (last, more) = self.sizes[-2:]
        row_bytes = more + (more - less) / (last - before) * (length - last)
        seconds = None if self.seconds_per_flop is None else self.seconds_per_flop * flops
        return Expected(seconds, row_bytes)

    def learn(self, length: int, flops: float, seconds: float, row_bytes: float) -> None:
        """The longest length done so far tells most about those beyond it."""
        self.longest, self.seconds_per_flop = length, seconds / flops
        if length > self.sizes[-1][0]:
            self.sizes.append((length, row_bytes))
