"""Tables over a grid of contexts: which rows, which contexts, which other coordinates they have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from archbench.report import notation, table
from archbench.report.evidence import Evidence
from archbench.report.rows import Row
from archbench.report.table import Column, TableCell

_COVERAGE = re.compile(r"(\d+) calls counted[^,]*, (\d+) calls free[^,]*, (\d+) calls refused")


def asked(evidence: Evidence, metrics: tuple[str, ...]) -> tuple[list[Row], tuple[str, ...]]:
    """The rows for which one of the metrics was planned, and a note naming the others."""
    rows = [row for row in evidence.rows if any(evidence.planned(row, metric) for metric in metrics)]
    left = [row.name for row in evidence.rows if row not in rows]
    return rows, (f"Not measured in this run: {notation.listed(left)}.",) if left else ()


def context_columns(contexts: Iterable[Any]) -> list[Column]:
    return [
        Column(name="value") if context is None else Column(name=notation.tokens(context), hint="tokens")
        for context in contexts
    ]


def coordinate(value: Any) -> TableCell:
    if value is None:
        return TableCell(text="any", sort=-1.0)
    return TableCell(text=str(value), sort=float(value) if type(value) in (int, float) else str(value))


def contexts_of(evidence: Evidence, rows: Iterable[Row], metric: str, quantities: Iterable[str]) -> list[Any]:
    """Every context at which one of the quantities was measured for one of the rows."""
    found = {
        finding.coordinates.get("context")
        for row in rows
        for quantity in quantities
        for finding in evidence.series(row, metric, quantity)
    }
    return sorted(found, key=lambda value: (value is not None, value))


def points_of(evidence: Evidence, row: Row, metric: str, quantity: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every combination of the named coordinates that was measured, or was planned and has a reason."""
    ats = [finding.coordinates for finding in evidence.series(row, metric, quantity)]
    ats += [record.at for record in evidence.problems_of(row, metric)]
    points = {}
    for at in ats:
        kept = {name: at[name] for name in names if name in at}
        points[repr(kept)] = kept
    if len(points) > 1:
        points.pop("{}", None)  # a failure of the whole metric, beside points that were measured
    order = {work: index for index, work in enumerate(("training_step", "prefill", "decode"))}
    return sorted(points.values(), key=lambda at: (order.get(str(at.get("work")), 9), at.get("batch") or 0))


def coverage(evidence: Evidence, row: Row, metric: str, quantity: str) -> TableCell:
    """How many calls a count of FLOPs met at its largest context: those with a formula, those free by convention, those
    it refused to pass by. No operator counts as a silent zero."""
    told = [_COVERAGE.search(record.protocol) for record in evidence.records_of(row, metric, quantity)]
    found = [match.groups() for match in told if match]
    if not found:
        return table.absent("no count of operators is recorded")
    counted, free, refused = max(found, key=lambda calls: sum(map(int, calls)))
    return TableCell(text=f"{counted} counted, {free} free, {refused} refused", flagged=refused != "0")


def nothing(evidence: Evidence, metric: str, quantity: str) -> str:
    reasons = list(dict.fromkeys(evidence.missing(row, metric, quantity).reason for row in evidence.rows))
    return "; ".join(reasons) + "."
