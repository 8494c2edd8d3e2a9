"""How a ratio is measured: two sides in one process take turns, and every turn gives one ratio.

    round r   ours then peer when r is even, peer then ours when it is odd
    ratio     (peer's seconds per unit of work) / (ours' seconds per unit of work), within the round

The two calls of a round are neighbours in time, so that what else the machine does falls on both; who goes first
alternates, so that neither is always the one that finds warm caches. The quicker side's call is repeated within its
turn until it has had as much time as the other's single call, up to ENOUGH_S: a call of a millisecond behind one of a
hundred mostly measures how long the caches take to fill again. Calls before the first round warm up and tell how often
that is. CPU time is that of all threads of the process and decides; wall time stands beside it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Union

from archbench.clocks import CLOCKS, TICK, collector_paused

ENOUGH_S = 0.1
"""Seconds after which a turn is long enough, whatever the other side takes."""


def _nothing() -> None:
    """No preparation."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One competitor. `call` does `work` units of work (tokens, steps, bytes); it may give back another number of
    units that it did, and then that one counts. `prepare` makes the next call ready, outside the clock."""

    call: Callable[[], object]
    work: float = 1.0
    prepare: Callable[[], object] = _nothing


@dataclass(kw_only=True)
class Race:
    """Two sides that take turns; `samples` holds a ratio a turn, by clock. `notes` are figures of the sides worth
    printing, in words; `explain` says in words what the figure means for this pair. All turns are taken `within` a
    context of which both sides are a part, where there is one."""

    ours: Side
    peer: Side
    notes: dict[str, str] = field(default_factory=dict)
    explain: Callable[[float], Mapping[str, str]] | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    samples: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})
    _taken: list[dict[str, dict[str, float]]] = field(default_factory=list)
    _calls: dict[str, int] = field(default_factory=dict)

    def turn(self) -> None:
        if not self._calls:
            self._calls = self._warmed_up()
        taken = self._round(len(self._taken))
        self._taken.append(taken)
        for clock, ratios in self.samples.items():
            ratios.append(taken["peer"][clock] / taken["ours"][clock])

    def times(self) -> Mapping[str, Mapping[str, list[float]]]:
        """Seconds per unit of work, by side ("ours", "peer") and clock."""
        return {side: {clock: [taken[side][clock] for taken in self._taken] for clock in CLOCKS} for side in _SIDES}

    def _warmed_up(self) -> dict[str, int]:
        """Calls of each side in a turn."""
        for name in _SIDES:
            _call(self._side(name))  # loads and compiles
        spent = {name: _call(self._side(name))[0]["cpu"] for name in _SIDES}
        turn = min(max(spent.values()), ENOUGH_S)
        return {name: max(1, round(turn / seconds)) for name, seconds in spent.items()}

    def _round(self, number: int) -> dict[str, dict[str, float]]:
        gc.collect()
        with collector_paused():
            order = _SIDES if number % 2 == 0 else _SIDES[::-1]
            return {side: _seconds(self._side(side), self._calls[side]) for side in order}

    def _side(self, name: str) -> Side:
        return self.ours if name == "ours" else self.peer


_SIDES = ("ours", "peer")


def _call(side: Side) -> tuple[dict[str, float], float]:
    """Seconds of a call by each clock, and the units of work it did."""
    begin = {clock: read() for clock, read in CLOCKS.items()}
    done = side.call()
    end = {clock: read() for clock, read in CLOCKS.items()}
    side.prepare()
    work = float(done) if isinstance(done, (int, float)) else side.work
    return {clock: max(end[clock] - begin[clock], TICK) for clock in CLOCKS}, work


def _seconds(side: Side, calls: int) -> dict[str, float]:
    """Seconds per unit of work by each clock, over so many calls."""
    taken = [_call(side) for _ in range(calls)]
    work = sum(units for _, units in taken)
    return {clock: sum(spent[clock] for spent, _ in taken) / work for clock in CLOCKS}


@dataclass(kw_only=True)
class Reading:
    """A quantity that is read off and not raced: bytes, a slope, a count. Its one clock is "none"."""

    take: Callable[[], float]
    notes: dict[str, str] = field(default_factory=dict)
    explain: Callable[[float], Mapping[str, str]] | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    samples: dict[str, list[float]] = field(default_factory=lambda: {"none": []})

    def turn(self) -> None:
        self.samples["none"].append(self.take())

    def times(self) -> Mapping[str, Mapping[str, list[float]]]:
        return {}


Trial = Union[Race, Reading]  # noqa: UP007  (an alias, evaluated)
