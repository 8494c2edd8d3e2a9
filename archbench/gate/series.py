"""Tier 3: a series of runs over time, and the steps in it. Shown, never blocking.

A step is found by fitting levels: the series is cut so that the sum of absolute distances from the levels (medians),
plus a price for each cut, is least. The absolute distance lets single outliers be; the price is set by the noise of the
series itself, so that a series without steps is rarely cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from archbench.errors import GateError
from archbench.gate.points import Point, point_of, read_records
from archbench.gate.verdict import Finding
from archbench.record import Record

LEAST_RUNS = 3
"""Runs on either side of a step."""
PRICE = 4.0
"""Of a cut, in noise times the logarithm of the length; steady noise of 10 to 100 runs is then cut in about 2 series of
100 (a test simulates it)."""
SMALLEST_STEP = 0.01
"""Relative; smaller ones are not shown."""
_COUNTED = ("cost", "fingerprint")
"""Metrics of the ledger: they need no statistics."""


@dataclass(frozen=True)
class Step:
    """The series changes its level from `before` to `after` with the value of that index."""

    index: int
    before: float
    after: float


def steps(values: Sequence[float]) -> list[Step]:
    """The steps in a series of positive values, on a relative scale."""
    logs = np.log(np.asarray(values, dtype=np.float64))
    n = len(logs)
    if n < 2 * LEAST_RUNS:
        return []
    noise = float(np.median(np.abs(np.diff(logs)))) / (0.6745 * math.sqrt(2))
    price = PRICE * max(noise, 1e-9) * math.log(n)
    edges = _cuts(logs, price)
    levels = [float(np.median(logs[a:b])) for a, b in pairwise(edges)]
    found = [
        Step(edge, math.exp(before), math.exp(after))
        for edge, before, after in zip(edges[1:-1], levels[:-1], levels[1:], strict=True)
    ]
    return [step for step in found if abs(step.after / step.before - 1) >= SMALLEST_STEP]


def _cuts(values: np.ndarray, price: float) -> list[int]:
    """The edges of the best segments, 0 and the length included: dynamic programming over the last segment."""
    n = len(values)
    best, last = [0.0] + [math.inf] * n, [0] * (n + 1)
    for end in range(LEAST_RUNS, n + 1):
        for begin in range(end - LEAST_RUNS + 1):
            if best[begin] == math.inf:
                continue
            piece = values[begin:end]
            cost = best[begin] + float(np.abs(piece - np.median(piece)).sum()) + (price if begin else 0.0)
            if cost < best[end]:
                best[end], last[end] = cost, begin
    edges = [n]
    while edges[-1]:
        edges.append(last[edges[-1]])
    return edges[::-1]


def watch(folder: Path) -> list[Finding]:
    """The newest step of every series in a folder of record files (one a run, in any depth), in the order of their
    dates, each on one kind of machine.

    Raises:
        GateError: there are no runs to make a series of.
    """
    files = sorted(folder.rglob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise GateError(f"--history {folder}: holds no *.jsonl record files; keep one there a run (`--save`)")
    runs = sorted((read_records(file, "--history") for file in files), key=lambda records: records[0].created)
    series: dict[tuple[Point, str], list[Record]] = {}
    for records in runs:
        for point, record in {point_of(r): r for r in records if _followed(r)}.items():
            machine = record.environment.get("cpu_class") or record.environment.get("cpu", "")
            series.setdefault((point, str(machine)), []).append(record)
    findings = []
    for (point, _), records in sorted(series.items()):
        found = steps([record.value for record in records if record.value is not None])
        if found:
            findings.append(_finding(point, records, found[-1]))
    return findings


def _followed(record: Record) -> bool:
    return record.metric not in _COUNTED and record.better != "neither" and (record.value or 0.0) > 0


def _finding(point: Point, records: Sequence[Record], step: Step) -> Finding:
    first = records[step.index]
    commit = str(first.environment.get("commit") or "")[:12]
    since = f"since {first.created[:16]}{f' (commit {commit})' if commit else ''}"
    return Finding(
        tier=3,
        cell=point.cell,
        quantity=f"{point.metric}: {point.name}",
        verdict="watched",
        baseline=step.before,
        current=step.after,
        unit=first.unit,
        note=f"a step {since}, run {step.index + 1} of {len(records)}",
    )
