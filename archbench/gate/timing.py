"""Tier 2: time. Lock-step pairs until every cell is decided, or the time given for it is spent.

A cell is `regressed` when its slowdown is shown to exceed the margin, `fine` when it is shown not to, `undecided` else.
CPU time decides; wall time stands beside it. What is flagged is timed again on fresh processes, and only what they flag
as well is a regression: looking again and again until something is found would find something.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from archbench.errors import GateError
from archbench.gate.lockstep import Item, Ratios, Side, alternate
from archbench.gate.ratios import Speed, speed
from archbench.gate.significance import ALPHA, detectable, holm
from archbench.gate.verdict import Finding, Verdict

Start = Callable[[], Sequence[Side]]
"""Starts both versions: the baseline's side, then the current one's."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """`margin` is the slowdown allowed, a share. Every cell gets `restarts` restarts of `pairs` pairs; then the
    undecided ones get more until `budget_s` seconds are spent."""

    margin: float = 0.10
    restarts: int = 3
    pairs: int = 15
    budget_s: float = 240.0
    alpha: float = ALPHA

    @property
    def bound(self) -> float:
        return math.log1p(self.margin)


@dataclass
class Timings:
    """What was timed, by item. `missing` says why the baseline cannot be timed there, `broken` why this version
    cannot; `dropped` are options that the baseline does not know."""

    ratios: dict[str, list[Ratios]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def left(self, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if item.name not in self.missing and item.name not in self.broken]


def hold(
    items: Sequence[Item],
    start: Start,
    policy: Policy,
    demoted: Sequence[str] = (),
    clock: Callable[[], float] = time.monotonic,
    notify: Callable[[str], None] = lambda _text: None,
) -> list[Finding]:
    """The verdict on every item; those named in `demoted` are watched and block nothing.

    Raises:
        GateError: a version does not start.
    """
    begin, timings = clock(), Timings()
    for number in range(policy.restarts):
        notify(f"timing: restart {number + 1} of {policy.restarts}, {len(items)} works")
        before = clock()
        restart(items, start, policy, timings)
    last = clock() - before
    while (unsure := _of(items, judge(timings, policy), "undecided")) and clock() - begin + last <= policy.budget_s:
        notify(f"timing: {len(unsure)} undecided, one more restart")
        before = clock()
        restart(unsure, start, policy, timings)
        last = clock() - before
    findings = judge(timings, policy)
    flagged = _of(items, findings, "regressed")
    if flagged:
        notify(f"timing: {len(flagged)} flagged, timed again on fresh processes")
        fresh = Timings()
        for _ in range(policy.restarts):
            restart(flagged, start, policy, fresh)
        again = {finding.cell: finding for finding in judge(fresh, policy)}
        findings = [_confirmed(finding, again.get(finding.cell)) for finding in findings]
    return [_watched(finding) if finding.cell in demoted else finding for finding in findings]


def restart(items: Sequence[Item], start: Start, policy: Policy, timings: Timings) -> None:
    """One start of both versions, and one series of pairs for each item that can be timed."""
    waiting = timings.left(items)[::-1]
    while waiting:
        sides = start()
        try:
            while waiting:
                if not _time(waiting.pop(), sides, policy, timings):
                    break  # fresh processes for the rest
        finally:
            for side in sides:
                side.close()


def _time(item: Item, sides: Sequence[Side], policy: Policy, timings: Timings) -> bool:
    """Whether the processes can go on after this item."""
    baseline, current = sides
    try:
        dropped = baseline.prepare(item)
    except GateError as error:
        timings.missing[item.name] = str(error)
        return False
    if dropped:
        timings.dropped[item.name] = dropped
    try:
        current.prepare(item)
        timings.ratios.setdefault(item.name, []).append(alternate(baseline, current, item, policy.pairs))
        for side in sides:
            side.forget(item)
    except GateError as error:
        timings.broken[item.name] = str(error)
        timings.ratios.pop(item.name, None)
        return False
    return True


def judge(timings: Timings, policy: Policy) -> list[Finding]:
    """Verdicts from what was timed so far."""
    speeds = {name: speed([pairs.cpu for pairs in found]) for name, found in timings.ratios.items()}
    worse = holm([found.p_above(policy.bound) for found in speeds.values()])
    findings = [
        _finding(name, found, p, timings, policy) for (name, found), p in zip(speeds.items(), worse, strict=True)
    ]
    for name, reason in timings.missing.items():
        findings.append(Finding(tier=2, cell=name, quantity="CPU time", verdict="new", note=f"not timed: {reason}"))
    for name, reason in timings.broken.items():
        findings.append(Finding(tier=2, cell=name, quantity="CPU time", verdict="incomparable", note=reason))
    return findings


def _finding(name: str, found: Speed, p: float, timings: Timings, policy: Policy) -> Finding:
    ratios = timings.ratios[name]
    verdict: Verdict
    if p < policy.alpha:
        verdict = "regressed"
    else:
        verdict = "fine" if found.p_below(policy.bound) < policy.alpha else "undecided"
    low, high = found.interval
    wall = float(np.mean([np.median(pairs.wall) for pairs in ratios]))
    said = [f"wall {math.expm1(wall):+.1%}", f"{len(ratios)} restarts of {len(ratios[0].cpu)} pairs"]
    if name in timings.dropped:
        said.append(f"the baseline does not know {', '.join(timings.dropped[name])}")
    return Finding(
        tier=2,
        cell=name,
        quantity="CPU time",
        verdict=verdict,
        baseline=1.0,
        current=math.exp(found.value),
        unit="x",
        low=math.expm1(low),
        high=math.expm1(high),
        margin=policy.margin,
        detectable=math.expm1(policy.bound + detectable(found.error)),
        relative=True,
        p=p,
        note="; ".join(said),
    )


def _confirmed(finding: Finding, again: Finding | None) -> Finding:
    """A flagged finding in the light of fresh processes, whose numbers it then takes."""
    if finding.verdict != "regressed":
        return finding
    if again is None or again.verdict == "incomparable":
        return replace(finding, verdict="undecided", note=f"flagged, and not to be timed again; {finding.note}")
    if again.verdict == "regressed":
        return replace(again, note=f"{again.note}; confirmed on fresh processes")
    before = f"{finding.change:+.1%}" if finding.change is not None else "a regression"
    return replace(again, note=f"{again.note}; {before} at first, not confirmed on fresh processes")


def _watched(finding: Finding) -> Finding:
    if finding.verdict not in ("regressed", "undecided"):
        return finding
    return replace(
        finding, verdict="watched", note=f"{finding.verdict}, but too noisy on this machine to block; {finding.note}"
    )


def _of(items: Sequence[Item], findings: Sequence[Finding], verdict: str) -> list[Item]:
    names = {finding.cell for finding in findings if finding.verdict == verdict}
    return [item for item in items if item.name in names]


def errors(timings: Timings, restarts: int) -> Mapping[str, float]:
    """Of a version against itself: the standard error that the mean of `restarts` restarts has, by item.

    Needs two restarts at least of each item.
    """
    return {
        name: float(np.std([np.median(pairs.cpu) for pairs in found], ddof=1)) / math.sqrt(restarts)
        for name, found in timings.ratios.items()
    }
