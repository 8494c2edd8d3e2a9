"""The cost tables: size and speed of training, FLOPs three ways, state, memory; latency comes from `latencies`.

Contexts are columns, so that growth is read across and architectures are compared downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from archbench.report import notation, table
from archbench.report.budget import flops_per_byte
from archbench.report.evidence import Evidence
from archbench.report.grid import asked, context_columns, contexts_of, coordinate, coverage, nothing, points_of
from archbench.report.latencies import latency_tables
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell

DISAGREEMENT = 0.02
"""Counts of FLOPs that differ by more are flagged: one of them is wrong."""
_AGREE = 5e-4
WORKS = ("training", "prefill", "decode")

SIZE: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("parameters", "cost", "parameters", {"kind": "total"}),
    ("non-embedding", "cost", "parameters", {"kind": "non_embedding"}),
    ("training FLOPs", "training", "flops", {}),
)
SPEED = (
    ("steps", "steps"),
    ("wall-clock", "seconds"),
    ("CPU time", "cpu_seconds"),
    ("tokens a second", "tokens_per_second"),
    ("bytes a second", "bytes_per_second"),
    ("FLOP a second", "flops_per_second"),
    ("matmul utilisation", "matmul_utilisation"),
)


def cost_tables(evidence: Evidence) -> tuple[list[Table], list[str]]:
    """The tables, and for each that has nothing to show a sentence saying so."""
    candidates: list[Callable[[Evidence], Table | str]] = [training_table, flops_table, state_table, memory_table]
    built = [make(evidence) for make in candidates]
    built += latency_tables(evidence)
    return [t for t in built if isinstance(t, Table)], list(dict.fromkeys(t for t in built if isinstance(t, str)))


def training_table(evidence: Evidence) -> Table | str:
    rows, notes = asked(evidence, ("cost", "training"))
    if not rows:
        return "Size and training: not measured in this run."
    lines = [
        (
            table.text(row.name),
            *(table.number(evidence.find(row, metric, quantity, **at)) for _, metric, quantity, at in SIZE),
            table.number(flops_per_byte(evidence, row)),
            *(table.number(evidence.find(row, "training", quantity)) for _, quantity in SPEED),
        )
        for row in rows
    ]
    return Table(
        key="training",
        title="Size and training",
        columns=(
            Column(name="architecture", numeric=False),
            *(Column(name=name) for name in (*(name for name, *_ in SIZE), "FLOPs per byte", *(n for n, _ in SPEED))),
        ),
        lines=tuple(lines),
        notes=(
            "Matmul utilisation: achieved FLOP/s over those of the best matrix product in the same process.",
            *notes,
        ),
    )


def flops_table(evidence: Evidence) -> Table | str:
    """FLOPs per token; the analytic count stands in full, the other two as deviations from it."""
    rows, notes = asked(evidence, ("cost",))
    quantities = [f"{work}_flops_per_token" for work in WORKS]
    contexts = contexts_of(evidence, rows, "cost", quantities)
    if not contexts:
        return "FLOPs per token: " + nothing(evidence, "cost", quantities[0])
    lines = [
        (
            table.text(row.name),
            table.text(work),
            *(_counts(evidence, row, work, context) for context in contexts),
            coverage(evidence, row, "cost", f"{work}_flops_per_token"),
        )
        for row in rows
        for work in WORKS
    ]
    conventions = sorted(
        {
            str(finding.coordinates["causal"])
            for row in rows
            for quantity in quantities
            for finding in evidence.series(row, "cost", quantity)
            if "causal" in finding.coordinates
        }
    )
    convention = (
        f"Counting convention: causal attention counts {notation.listed(conventions)} of the full square."
        if conventions
        else "Counting convention: not recorded."
    )
    return Table(
        key="flops",
        title="FLOPs per token, counted three ways",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="work", numeric=False),
            *context_columns(contexts),
            Column(name="operators met", hint="calls", numeric=False),
        ),
        lines=tuple(lines),
        notes=(
            convention,
            "In full: the analytic count, by the formula beside the layer. Below: how far the traced count (operators "
            "as they run) and the meta count (the same without data) are from it. Flagged: counts that differ by more "
            f"than {notation.share(DISAGREEMENT)}.",
            *notes,
        ),
    )


def state_table(evidence: Evidence) -> Table | str:
    rows, notes = asked(evidence, ("cost",))
    contexts = contexts_of(evidence, rows, "cost", ["state_bytes"])
    if not contexts:
        return "State bytes by context: " + nothing(evidence, "cost", "state_bytes")
    lines = [
        (
            table.text(row.name),
            *(table.number(evidence.find(row, "cost", "state_bytes", context=context)) for context in contexts),
        )
        for row in rows
    ]
    return Table(
        key="state",
        title="State by context",
        columns=(Column(name="architecture", numeric=False), *context_columns(contexts)),
        lines=tuple(lines),
        notes=("Bytes of the live state of one row after reading so many tokens; 1K = 1024 tokens.", *notes),
    )


def memory_table(evidence: Evidence) -> Table | str:
    """Peaks by work and batch; where a device has its own memory, that too."""
    rows, notes = asked(evidence, ("memory",))
    contexts = contexts_of(evidence, rows, "memory", ["peak_rss", "peak_device"])
    if not contexts:
        return "Peak memory: " + nothing(evidence, "memory", "peak_rss")
    lines = []
    for quantity, where in (("peak_rss", "host"), ("peak_device", "device")):
        if not any(evidence.series(row, "memory", quantity) for row in rows):
            continue
        for row in rows:
            for at in points_of(evidence, row, "memory", quantity, ("work", "batch")):
                found = [evidence.find(row, "memory", quantity, **at, context=context) for context in contexts]
                lines.append(
                    (
                        table.text(row.name),
                        table.text(str(at.get("work", "all")).replace("_", " ")),
                        coordinate(at.get("batch")),
                        table.text(where),
                        *(table.number(finding) for finding in found),
                    )
                )
    return Table(
        key="memory",
        title="Peak memory above the level before the work",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="work", numeric=False),
            Column(name="batch", hint="rows"),
            Column(name="memory", numeric=False),
            *context_columns(contexts),
        ),
        lines=tuple(lines),
        notes=notes,
    )


def _counts(evidence: Evidence, row: Row, work: str, context: Any) -> TableCell:
    """The analytic count, with how far the others are from it."""
    quantity = f"{work}_flops_per_token"
    at = {} if context is None else {"context": context}
    analytic = evidence.find(row, "cost", quantity, count="analytic", **at)
    details = []
    furthest = 0.0
    for way in ("traced", "meta"):
        other = evidence.find(row, "cost", quantity, count=way, **at)
        if other.value is None:
            furthest = math.inf
            if analytic.value is not None:
                details.append(f"{way}: none")
        elif analytic.value:
            off = other.value / analytic.value - 1
            furthest = max(furthest, abs(off))
            details.append(f"{way} {notation.percent(off, signed=True)}")
        else:
            details.append(f"{way} {notation.plain(other.value, other.unit)}")
    detail = "all three agree" if furthest < _AGREE else ", ".join(details)
    spread = evidence.find(row, "cost", "flops_disagreement", work=work, **at)
    wrong = spread.value is not None and spread.value > DISAGREEMENT
    cell = table.number(analytic)
    more = f"counts differ by {notation.percent(spread.value)}" if wrong and spread.value is not None else ""
    return TableCell(
        text=cell.text, detail=detail, more=more, sort=cell.sort, reason=cell.reason, status=cell.status,
        flagged=wrong,
    )  # fmt: skip
