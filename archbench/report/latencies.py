"""The latency tables: batches down, contexts across; medians with intervals, and the tail where samples allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding
from archbench.report.grid import asked, context_columns, contexts_of, coordinate, nothing, points_of
from archbench.report.levels import BEST, best, compared, words
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell
from archbench.stats import samples_for_percentile

TAILS = (0.9, 0.95, 0.99, 0.999)
_MIXED = "Levels may differ from row to row: it is what a user gets, and no comparison of architectures."
LATENCIES = (
    ("time_per_token", "wall", "Time per token, wall-clock median", False),
    ("time_to_first_token", "wall", "Time to first token, wall-clock median", False),
    ("time_per_token", "cpu", "Time per token, CPU median", True),
    ("prefill_rate", "wall", "Prefill rate, wall-clock median", True),
)


def latency_tables(evidence: Evidence) -> list[Table | str]:
    """Each quantity at the level that times are compared at; where that is not the best, times of the best beside."""
    at = compared(evidence)
    found = [latency_table(evidence, *which, at) for which in LATENCIES]
    if at and at != best(evidence) and best(evidence):
        found += [latency_table(evidence, *which, best(evidence)) for which in LATENCIES[:2]]
    return found


def latency_table(
    evidence: Evidence, quantity: str, clock: str, title: str, folded: bool, level: dict[str, Any]
) -> Table | str:
    """Batches down, contexts across: medians with intervals, and the tail where there are samples enough."""
    rows, notes = asked(evidence, ("latency",))
    contexts = contexts_of(evidence, rows, "latency", [quantity])
    if not contexts:
        return "Latency: " + nothing(evidence, "latency", quantity)
    lines = []
    sizes: set[int] = set()
    for row in rows:
        for at in points_of(evidence, row, "latency", quantity, ("batch",)):
            where = {"clock": clock, **level, **at}
            found = [evidence.find(row, "latency", quantity, **where, context=c) for c in contexts]
            name = table.text(row.name, _ran(evidence, row, quantity, where))
            sizes |= {len(finding.samples) for finding in found if finding.value is not None}
            lines.append((name, coordinate(at.get("batch")), *(_timing(finding) for finding in found)))
    shown = str(min(sizes)) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}" if sizes else "no"
    needs = [f"p{100 * q:g} from {samples_for_percentile(q)}" for q in TAILS[:3]]
    return Table(
        key=f"{quantity.replace('_', '-')}-{clock}" + (f"-{level['level']}" if level else ""),
        title=title + words(level),
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="batch", hint="rows"),
            *context_columns(contexts),
        ),
        lines=tuple(lines),
        notes=(
            f"{shown} samples a point. A percentile needs n ≥ ln(0.01) / ln(q) of them: {', '.join(needs)}.",
            *notes,
            *((_MIXED,) if level == {"level": BEST} else ()),
        ),
        folded=folded,
    )


def _ran(evidence: Evidence, row: Row, quantity: str, at: dict[str, Any]) -> str:
    """The level that decode steps ran at, where it is not the one asked for."""
    if "level" not in at or quantity != "time_per_token":
        return ""
    records = evidence.records_of(row, "latency", quantity, **at)
    ran = {record.backend.get("decode", "modules") for record in records}
    return "" if ran <= {at["level"]} else "+".join(sorted(ran))


def tail(finding: Finding) -> str:
    """The largest percentile that the number of samples allows: `p90 823 µs`; "" where there are too few.

    It is the bad end that counts: for rates, of which more is better, the percentile is taken from below.
    """
    allowed = [q for q in TAILS if len(finding.samples) >= samples_for_percentile(q)]
    if not allowed:
        return ""
    samples = np.asarray(finding.samples)
    rate = finding.better == "higher"
    value = np.quantile(samples, 1 - allowed[-1] if rate else allowed[-1], method="lower" if rate else "higher")
    name = f"p{100 * (1 - allowed[-1] if rate else allowed[-1]):g}"
    return f"{name} {notation.plain(float(value), finding.unit)}"


def _timing(finding: Finding) -> TableCell:
    cell = table.number(finding)
    if cell.reason:
        return cell
    return replace(cell, more=tail(finding))
