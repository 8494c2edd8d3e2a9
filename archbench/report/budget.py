"""What the architectures were given, and how equal it was.

Each axis answers another question (per parameter, per training FLOP, per byte of text, ...). A comparison ranks only
along an axis on which the rows agree within five per cent; every residual is printed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from archbench.report.evidence import Evidence, Finding, known
from archbench.report.rows import Row
from archbench.report.table import shared_note

TOLERANCE = 0.05
"""Largest relative deviation from the first row that still counts as matched."""


PARAMETERS = "parameters"
NON_EMBEDDING = "non-embedding parameters"
TRAINING_BYTES = "training bytes"
TRAINING_FLOPS = "training FLOPs"
FLOPS_PER_BYTE = "training FLOPs per byte"
STATE = "state bytes"
WALL = "training wall-clock"

_BY_BUDGET = {"bytes": TRAINING_BYTES, "tokens": TRAINING_BYTES, "flops": TRAINING_FLOPS, "seconds": WALL}
_BY_MATCH = {
    "parameters": PARAMETERS,
    "non_embedding": NON_EMBEDDING,
    "training_flops": FLOPS_PER_BYTE,
    "state_bytes": STATE,
}
_SPENT = (TRAINING_BYTES, TRAINING_FLOPS, WALL)
"""Axes that training spends, and that training before it spent as well."""
_UNDECLARED = frozenset({PARAMETERS, TRAINING_BYTES, TRAINING_FLOPS})
"""Held against each other when the configs do not say what was to be equal."""


def declared_axes(configs: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """What the suite set out to make equal: the unit of the training budget, and what sizes were solved for."""
    axes: set[str] = set()
    for config in configs:
        given = (config.get("training") or {}).get("budget") or {}
        axes |= {axis for unit, axis in _BY_BUDGET.items() if given.get(unit) is not None}
        axes |= {axis for match, axis in _BY_MATCH.items() if config.get("match") == match}
    return frozenset(axes) or _UNDECLARED


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row on one axis. `deviation` is value / reference's value - 1; None where one of the two is missing. A row
    that has no value on any axis (its training failed) did not take part. A row that `started` from trained weights had
    more of this axis than its own training spent, so it is never matched."""

    row: Row
    finding: Finding
    deviation: float | None
    took_part: bool
    started: bool = False

    @property
    def matched(self) -> bool:
        return not self.started and self.deviation is not None and abs(self.deviation) <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class AxisMatch:
    """All rows of one arena on one axis. `declared` axes were to be equal; the others are outcomes. `note` says at
    which point of the grid, where that matters."""

    axis: str
    declared: bool
    entries: tuple[Entry, ...]
    note: str = ""

    @property
    def contenders(self) -> list[Entry]:
        """The entries of rows that took part; the first is what the others are held against."""
        return [entry for entry in self.entries if entry.took_part]

    def among(self, rows: Collection[Row]) -> AxisMatch:
        """The same for some of the rows."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.row in rows))

    @property
    def matched(self) -> bool:
        return bool(self.contenders) and all(entry.matched for entry in self.contenders)

    @property
    def mismatch(self) -> float | None:
        """The largest deviation from the reference, or None where a value is missing."""
        found = [entry.deviation for entry in self.contenders if entry.deviation is not None]
        return max(found, key=abs, default=None) if len(found) == len(self.contenders) else None


def declared_and_matched(match: Iterable[AxisMatch], rows: Collection[Row]) -> list[AxisMatch]:
    """The axes along which these rows may be ranked: those that were to be equal, and are."""
    return [axis for axis in (axis.among(rows) for axis in match) if axis.declared and axis.matched]


def training_bytes(evidence: Evidence, row: Row) -> Finding:
    """The bytes of text read in training, all phases together: where the loss curve ends."""
    ends = [r.along["bytes"][-1] for r in evidence.records_of(row, "training", "loss") if r.along.get("bytes")]
    if ends:
        return Finding(value=max(ends), unit="B", n=len(ends), seeds=len(row.seeds))
    return (
        evidence.missing(row, "training", "bytes")
        if not evidence.series(row, "training", "loss")
        else Finding(reason="not recorded; the loss curve has no byte positions", status="absent")
    )


def flops_per_byte(evidence: Evidence, row: Row) -> Finding:
    """Training FLOPs per byte at the context the row was trained with, else at the nearest one that was counted."""
    found = evidence.series(row, "cost", "training_flops_per_byte")
    trained = (evidence.config(row).get("training") or {}).get("context")
    if trained is None or not all("context" in finding.coordinates for finding in found):
        return evidence.find(row, "cost", "training_flops_per_byte")
    nearest = min(found, key=lambda finding: abs(finding.coordinates["context"] - trained), default=None)
    return nearest or evidence.missing(row, "cost", "training_flops_per_byte")


def largest_shared_context(evidence: Evidence, rows: list[Row]) -> int | None:
    """The largest context at which every row that has a state size at all has one."""
    contexts = [
        {finding.coordinates.get("context") for finding in evidence.series(row, "cost", "state_bytes")} for row in rows
    ]
    shared = set.intersection(*(c for c in contexts if c)) - {None} if any(contexts) else set()
    return max((int(context) for context in shared if context is not None), default=None)


def _state_context(evidence: Evidence, rows: list[Row]) -> int | None:
    """Where states are held against each other: where they were made equal, else at the largest context there is."""
    configs = [evidence.config(row) for row in rows]
    if configs and all(config.get("match") == "state_bytes" for config in configs):
        return (configs[0].get("training") or {}).get("context")
    return largest_shared_context(evidence, rows)


def budget(evidence: Evidence, rows: list[Row]) -> list[AxisMatch]:
    """The match of all axes among the rows of one arena; the first row is what the others are held against."""
    context = _state_context(evidence, rows)
    at = {} if context is None else {"context": context}
    state_note = "" if context is None else f"at {context} tokens"
    per_byte = [flops_per_byte(evidence, row) for row in rows]
    counted_at = shared_note(per_byte, "context")
    plans = [
        (PARAMETERS, [evidence.find(row, "cost", "parameters", kind="total") for row in rows], ""),
        (NON_EMBEDDING, [evidence.find(row, "cost", "parameters", kind="non_embedding") for row in rows], ""),
        (TRAINING_BYTES, [training_bytes(evidence, row) for row in rows], ""),
        (TRAINING_FLOPS, [evidence.find(row, "training", "flops") for row in rows], ""),
        (FLOPS_PER_BYTE, per_byte, f"in windows of {counted_at} tokens" if counted_at else ""),
        (STATE, [evidence.find(row, "cost", "state_bytes", **at) for row in rows], state_note),
        (WALL, [evidence.find(row, "training", "seconds") for row in rows], ""),
    ]
    declared = declared_axes(evidence.config(row) for row in rows)
    ran = {
        row
        for _, findings, _ in plans
        for row, finding in zip(rows, findings, strict=True)
        if finding.value is not None
    }
    started = {row for row in rows if evidence.start_of(row)}
    return [
        _match(axis, axis in declared, rows, findings, ran, started if axis in _SPENT else set(), note)
        for axis, findings, note in plans
    ]


def _match(
    axis: str, declared: bool, rows: list[Row], findings: list[Finding], ran: set[Row], started: set[Row], note: str
) -> AxisMatch:
    against = next((f.value for row, f in zip(rows, findings, strict=True) if row in ran), None)

    def deviation(finding: Finding) -> float | None:
        if against is None or finding.value is None:
            return None
        if against == 0:
            return 0.0 if finding.value == 0 else None
        return known(finding) / against - 1

    entries = tuple(
        Entry(row=row, finding=finding, deviation=deviation(finding), took_part=row in ran, started=row in started)
        for row, finding in zip(rows, findings, strict=True)
    )
    return AxisMatch(axis=axis, declared=declared, entries=entries, note=note)
