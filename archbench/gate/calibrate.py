"""`archbench noise`: how much numbers differ when nothing has changed, and so what the gate can see.

Seeds: the suite's gated part is trained and measured with several. Repetition: with the first seed it is done twice,
and must give the same numbers. Time: this version is held against itself in lock-step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from archbench.environment import cpu_class
from archbench.errors import GateError
from archbench.gate import timing
from archbench.gate.hosts import described
from archbench.gate.lockstep import start
from archbench.gate.measure import gated_plan, measure, timed_items
from archbench.gate.noise import Noise, TimingNoise, spreads
from archbench.gate.points import gated
from archbench.gate.significance import detectable
from archbench.gate.timing import Policy, Timings
from archbench.record import Record

_PACKAGE = Path(__file__).resolve().parents[1]


def calibrate(
    suite: str,
    *,
    runs: int,
    changes: Sequence[str] = (),
    policy: Policy | None = None,
    threads: int = 1,
    command: str = "",
    notify: Callable[[str], None] = lambda _text: None,
) -> Noise:
    """Measures the noise of a suite with `runs` seeds. `policy` is the gate's for time; None leaves time out.

    Raises:
        GateError: there are fewer than two runs, or a cell fails.
    """
    if runs < 2:
        raise GateError(f"--runs {runs}: a spread needs two runs at least; 5 are usual")
    records = []
    for seed in range(runs):
        notify(f"seed {seed + 1} of {runs}")
        records += _whole(measure(gated_plan(suite, [*changes, f"seeds=[{seed}]"]), threads))
    notify("the first seed again")
    again = _whole(measure(gated_plan(suite, [*changes, "seeds=[0]"]), threads))
    return Noise(
        suite=suite,
        seeds=runs,
        where=described(next(iter(gated(records).values()))),
        cpu_class=cpu_class(),
        command=command,
        repeated_exactly=_same(records, again),
        quality=spreads(records),
        timing={} if policy is None else _timing(suite, changes, policy, threads, notify),
    )


def _timing(
    suite: str, changes: Sequence[str], policy: Policy, threads: int, notify: Callable[[str], None]
) -> dict[str, TimingNoise]:
    """Twice as many restarts as a gate's, of this version against itself."""
    items, timings = timed_items(suite, changes), Timings()
    root = _PACKAGE.parent
    begin = partial(start, (root, root), ("this version", "itself"), threads)
    for number in range(2 * policy.restarts):
        notify(f"timing: restart {number + 1} of {2 * policy.restarts}, {len(items)} works")
        timing.restart(items, begin, policy, timings)
    for reason in [*timings.missing.values(), *timings.broken.values()]:
        raise GateError(reason)
    found = timing.errors(timings, policy.restarts)
    return {name: TimingNoise(error=error, detectable=math.expm1(detectable(error))) for name, error in found.items()}


def _whole(records: list[Record]) -> list[Record]:
    for record in records:
        if record.status == "failed":
            raise GateError(f"noise: {record.metric} failed on {record.label}: {record.reason}")
    return records


def _same(records: Sequence[Record], again: Sequence[Record]) -> bool:
    first, second = gated(records), gated(again)
    return all(point in first and first[point].value == record.value for point, record in second.items())
