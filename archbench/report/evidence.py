"""Records turned into answers: what does this row say about that quantity, over its seeds, and if nothing, why.

A finding is one number of a row with its interval, or the reason why there is none; there is no third case, so no table
cell can be blank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.special import stdtrit

from archbench.record import Better, Record
from archbench.report.rows import CellId, Row, cell_id, rows_of

SEED_CONFIDENCE = 0.95
"""Confidence of the interval over seeds."""

At = tuple[tuple[str, Any], ...]
"""Coordinates of a point as a sorted tuple, so that they can be a key."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A number with its interval (`value` set), or why there is none (`value` None, `reason` set).

    `over` says what the interval covers: the samples of one seed, or the seeds. `n` counts them. `samples` are those of
    all seeds together.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    over: Literal["samples", "seeds", "nothing"] = "nothing"
    n: int = 0
    seeds: int = 0
    unit: str = ""
    better: Better = "neither"
    at: At = ()
    samples: tuple[float, ...] = ()
    reason: str = ""
    status: Literal["ok", "unsupported", "failed", "absent"] = "ok"

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None

    @property
    def coordinates(self) -> dict[str, Any]:
        return dict(self.at)


def known(finding: Finding) -> float:
    """The value of a finding that has one."""
    assert finding.value is not None
    return finding.value


def separated(a: Finding, b: Finding) -> bool:
    """Whether both have intervals and these do not overlap."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.high < b.low or b.high < a.low


class Evidence:
    """All records of a run, indexed by row.

    A later record of the same cell and point replaces an earlier one, and a failure is forgotten when a later record
    of the same cell and metric succeeded: a resumed run tries again.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = _current(records)
        row_of_cell = rows_of(self.records)
        self.rows: list[Row] = sorted(dict.fromkeys(row_of_cell.values()), key=lambda row: row.reference)
        self._row_of_cell = row_of_cell
        self._index: dict[tuple[Row, str, str], dict[At, list[Record]]] = defaultdict(lambda: defaultdict(list))
        self._missing: dict[tuple[Row, str], list[Record]] = defaultdict(list)
        self._planned: set[tuple[Row, str]] = set()
        self._measured: set[tuple[Row, str]] = set()
        self._quantities: set[tuple[str, str]] = set()
        self._of_row: dict[Row, list[Record]] = defaultdict(list)
        for record in self.records:
            row = row_of_cell[cell_id(record)]
            self._of_row[row].append(record)
            self._planned.add((row, record.metric))
            if record.status == "ok":
                self._measured.add((row, record.metric))
                self._quantities.add((record.metric, record.quantity))
                self._index[row, record.metric, record.quantity][freeze(record.at)].append(record)
            else:
                self._missing[row, record.metric].append(record)

    @property
    def architectures(self) -> list[Row]:
        return [row for row in self.rows if not row.reference]

    @property
    def references(self) -> list[Row]:
        return [row for row in self.rows if row.reference]

    @property
    def arenas(self) -> dict[tuple[str, str], list[Row]]:
        """The architecture rows that may be held against each other, by size and corpus."""
        arenas: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.architectures:
            arenas[row.arena].append(row)
        return dict(arenas)

    def row_of(self, record: Record) -> Row:
        return self._row_of_cell[cell_id(record)]

    def config(self, row: Row) -> dict[str, Any]:
        """The resolved config of a row's first cell."""
        return self._of_row[row][0].config

    def start_of(self, row: Row) -> str:
        """The checkpoint whose weights a row's training went on from; "" where it had first weights."""
        return next((r.config["start_from"] for r in self._of_row[row] if r.config.get("start_from")), "")

    def series(self, row: Row, metric: str, quantity: str, **at: Any) -> list[Finding]:
        """The findings at every recorded point that agrees with `at`, in the order of their coordinates."""
        points = self._index.get((row, metric, quantity), {})
        found = [_over_seeds(key, group) for key, group in points.items() if _agrees(dict(key), at)]
        return sorted(found, key=lambda finding: [_sortable(value) for _, value in finding.at])

    def records_of(self, row: Row, metric: str, quantity: str, **at: Any) -> list[Record]:
        """The records behind `series`."""
        points = self._index.get((row, metric, quantity), {})
        return [record for key, group in points.items() if _agrees(dict(key), at) for record in group]

    def find(self, row: Row, metric: str, quantity: str, **at: Any) -> Finding:
        """The finding at `at`; of several that agree with it, the one with the largest coordinates."""
        found = self.series(row, metric, quantity, **at)
        return found[-1] if found else self.missing(row, metric, quantity, **at)

    def missing(self, row: Row, metric: str, quantity: str, **at: Any) -> Finding:
        """Why a row has no such number: the reason given for it, for its whole metric, or for the cell's training."""
        candidates = [r for r in self._missing.get((row, metric), ()) if _agrees(dict(r.at), at)]
        for record in candidates:
            if record.quantity == quantity:
                return Finding(reason=record.reason, status=_status(record))
        for record in candidates:
            names_another = (metric, record.quantity) in self._quantities
            if not names_another or (row, metric) not in self._measured:
                return Finding(reason=record.reason, status=_status(record))
        for record in self._missing.get((row, "training"), ()):
            if record.status == "failed":
                return Finding(reason=f"training failed: {record.reason}", status="failed")
        if (row, metric) not in self._planned:
            return Finding(reason=f"not measured; this run has no {metric} job for it", status="absent")
        point = f" at {coordinates(at)}" if at else ""
        return Finding(reason=f"not recorded; {metric} gave no {quantity}{point}", status="absent")

    def problems(self) -> list[Record]:
        """Every record without a value."""
        return [record for records in self._missing.values() for record in records]

    def planned(self, row: Row, metric: str) -> bool:
        """Whether the run asked this metric of the row, whatever came of it."""
        return (row, metric) in self._planned

    def problems_of(self, row: Row, metric: str) -> list[Record]:
        """The records of a row's metric that have no value."""
        return self._missing.get((row, metric), [])


def freeze(at: dict[str, Any]) -> At:
    return tuple(sorted((name, tuple(value) if type(value) is list else value) for name, value in at.items()))


def coordinates(at: dict[str, Any]) -> str:
    """`context 256, batch 1`."""
    return ", ".join(f"{name} {value}" for name, value in at.items())


def _agrees(point: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """A point agrees unless a coordinate that both name differs."""
    return all(point.get(name, value) == value for name, value in wanted.items())


def _sortable(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if type(value) in (int, float) else (1, 0.0, str(value))


def _status(record: Record) -> Literal["unsupported", "failed"]:
    return "failed" if record.status == "failed" else "unsupported"


def _current(records: Sequence[Record]) -> list[Record]:
    last: dict[tuple[Any, ...], int] = {}
    succeeded: dict[tuple[CellId, str], int] = {}
    for index, record in enumerate(records):
        last[cell_id(record), record.metric, record.quantity, freeze(record.at)] = index
        if record.status == "ok":
            succeeded[cell_id(record), record.metric] = index
    return [
        records[index]
        for index in sorted(last.values())
        if records[index].status != "failed"
        or succeeded.get((cell_id(records[index]), records[index].metric), -1) < index
    ]


def _over_seeds(at: At, records: Iterable[Record]) -> Finding:
    """One finding from one record a seed: its own interval if there is one seed, else the mean and a t interval."""
    group = list(records)
    head = group[0]
    assert head.value is not None
    pooled = tuple(sample for record in group for sample in record.samples)
    values = [record.value for record in group if record.value is not None]
    if len(values) == 1:
        interval: Literal["samples", "nothing"] = "samples" if head.low is not None else "nothing"
        return Finding(
            value=head.value,
            low=head.low,
            high=head.high,
            confidence=head.confidence,
            over=interval,
            n=len(head.samples),
            seeds=1,
            unit=head.unit,
            better=head.better,
            at=at,
            samples=pooled,
        )
    mean = math.fsum(values) / len(values) if len(set(values)) > 1 else values[0]
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(stdtrit(len(values) - 1, 0.5 + SEED_CONFIDENCE / 2)) * spread / math.sqrt(len(values))
    varied = len(set(values)) > 1  # rounding can give equal values a spread
    return Finding(
        value=mean,
        low=mean - half if varied else None,
        high=mean + half if varied else None,
        confidence=SEED_CONFIDENCE if varied else None,
        over="seeds" if varied else "nothing",
        n=len(values),
        seeds=len(values),
        unit=head.unit,
        better=head.better,
        at=at,
        samples=pooled,
    )
