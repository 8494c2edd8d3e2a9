"""The cost tables: size and speed of training, FLOPs three ways, state, memory and latency, with the samples behind.

Contexts are columns, so that growth is read across and architectures are compared downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding, Row
from archbench.report.table import Column, Table, TableCell
from archbench.stats import samples_for_percentile

DISAGREEMENT = 0.02
"""Counts of FLOPs that differ by more are flagged: one of them is wrong."""
_AGREE = 5e-4
WORKS = ("training", "prefill", "decode")
TAILS = (0.9, 0.95, 0.99, 0.999)

TRAINING: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("parameters", "cost", "parameters", {"kind": "total"}),
    ("non-embedding", "cost", "parameters", {"kind": "non_embedding"}),
    ("training FLOPs", "training", "flops", {}),
    ("FLOPs per byte", "cost", "training_flops_per_byte", {}),
    ("steps", "training", "steps", {}),
    ("wall-clock", "training", "seconds", {}),
    ("CPU time", "training", "cpu_seconds", {}),
    ("tokens a second", "training", "tokens_per_second", {}),
    ("bytes a second", "training", "bytes_per_second", {}),
    ("FLOP a second", "training", "flops_per_second", {}),
    ("matmul utilisation", "training", "matmul_utilisation", {}),
)
LATENCIES = (
    ("time_per_token", "wall", "Time per token, wall-clock median", False),
    ("time_to_first_token", "wall", "Time to first token, wall-clock median", False),
    ("time_per_token", "cpu", "Time per token, CPU median", True),
    ("prefill_rate", "wall", "Prefill rate, wall-clock median", True),
)


def cost_tables(evidence: Evidence) -> tuple[list[Table], list[str]]:
    """The tables, and for each that has nothing to show a sentence saying so."""
    candidates: list[Callable[[Evidence], Table | str]] = [training_table, flops_table, state_table, memory_table]
    built = [make(evidence) for make in candidates]
    built += [latency_table(evidence, *which) for which in LATENCIES]
    return [t for t in built if isinstance(t, Table)], list(dict.fromkeys(t for t in built if isinstance(t, str)))


def training_table(evidence: Evidence) -> Table | str:
    rows, notes = _asked(evidence, ("cost", "training"))
    if not rows:
        return "Size and training: not measured in this run."
    lines = [
        (table.text(row.name), *(table.number(evidence.find(row, metric, q, **at)) for _, metric, q, at in TRAINING))
        for row in rows
    ]
    return Table(
        key="training",
        title="Size and training",
        columns=(Column(name="architecture", numeric=False), *(Column(name=name) for name, *_ in TRAINING)),
        lines=tuple(lines),
        notes=(
            "Matmul utilisation: achieved FLOP/s over those of the best matrix product in the same process.",
            *notes,
        ),
    )


def flops_table(evidence: Evidence) -> Table | str:
    """FLOPs per token; the analytic count stands in full, the other two as deviations from it."""
    rows, notes = _asked(evidence, ("cost",))
    quantities = [f"{work}_flops_per_token" for work in WORKS]
    contexts = _contexts(evidence, rows, "cost", quantities)
    if not contexts:
        return "FLOPs per token: " + _nothing(evidence, "cost", quantities[0])
    lines = [
        (
            table.text(row.name),
            table.text(work),
            *(_counts(evidence, row, work, context) for context in contexts),
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
        columns=(Column(name="architecture", numeric=False), Column(name="work", numeric=False), *_heads(contexts)),
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
    rows, notes = _asked(evidence, ("cost",))
    contexts = _contexts(evidence, rows, "cost", ["state_bytes"])
    if not contexts:
        return "State bytes by context: " + _nothing(evidence, "cost", "state_bytes")
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
        columns=(Column(name="architecture", numeric=False), *_heads(contexts)),
        lines=tuple(lines),
        notes=("Bytes of the live state of one row after reading so many tokens; 1K = 1024 tokens.", *notes),
    )


def memory_table(evidence: Evidence) -> Table | str:
    """Peaks by work and batch; where a device has its own memory, that too."""
    rows, notes = _asked(evidence, ("memory",))
    contexts = _contexts(evidence, rows, "memory", ["peak_rss", "peak_device"])
    if not contexts:
        return "Peak memory: " + _nothing(evidence, "memory", "peak_rss")
    lines = []
    for quantity, where in (("peak_rss", "host"), ("peak_device", "device")):
        if not any(evidence.series(row, "memory", quantity) for row in rows):
            continue
        for row in rows:
            for at in _points(evidence, row, "memory", quantity, ("work", "batch")):
                found = [evidence.find(row, "memory", quantity, **at, context=context) for context in contexts]
                lines.append(
                    (
                        table.text(row.name),
                        table.text(str(at.get("work", "all")).replace("_", " ")),
                        _coordinate(at.get("batch")),
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
            *_heads(contexts),
        ),
        lines=tuple(lines),
        notes=notes,
    )


def latency_table(evidence: Evidence, quantity: str, clock: str, title: str, folded: bool) -> Table | str:
    """Batches down, contexts across: medians with intervals, and the tail where there are samples enough."""
    rows, notes = _asked(evidence, ("latency",))
    contexts = _contexts(evidence, rows, "latency", [quantity])
    if not contexts:
        return "Latency: " + _nothing(evidence, "latency", quantity)
    lines = []
    sizes: set[int] = set()
    for row in rows:
        for at in _points(evidence, row, "latency", quantity, ("batch",)):
            found = [evidence.find(row, "latency", quantity, clock=clock, **at, context=c) for c in contexts]
            sizes |= {len(finding.samples) for finding in found if finding.value is not None}
            lines.append((table.text(row.name), _coordinate(at.get("batch")), *(_timing(finding) for finding in found)))
    shown = str(min(sizes)) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}" if sizes else "no"
    needs = [f"p{100 * q:g} from {samples_for_percentile(q)}" for q in TAILS[:3]]
    return Table(
        key=f"{quantity.replace('_', '-')}-{clock}",
        title=title,
        columns=(Column(name="architecture", numeric=False), Column(name="batch", hint="rows"), *_heads(contexts)),
        lines=tuple(lines),
        notes=(
            f"{shown} samples a point. A percentile needs n ≥ ln(0.01) / ln(q) of them: {', '.join(needs)}.",
            *notes,
        ),
        folded=folded,
    )


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
    return TableCell(text=cell.text, detail=cell.detail, more=tail(finding), sort=cell.sort)


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


def _asked(evidence: Evidence, metrics: tuple[str, ...]) -> tuple[list[Row], tuple[str, ...]]:
    """The rows for which one of the metrics was planned, and a note naming the others."""
    rows = [row for row in evidence.rows if any(evidence.planned(row, metric) for metric in metrics)]
    left = [row.name for row in evidence.rows if row not in rows]
    return rows, (f"Not measured in this run: {notation.listed(left)}.",) if left else ()


def _heads(contexts: Iterable[Any]) -> list[Column]:
    return [
        Column(name="value") if context is None else Column(name=notation.tokens(context), hint="tokens")
        for context in contexts
    ]


def _coordinate(value: Any) -> TableCell:
    if value is None:
        return TableCell(text="any", sort=-1.0)
    return TableCell(text=str(value), sort=float(value) if type(value) in (int, float) else str(value))


def _contexts(evidence: Evidence, rows: Iterable[Row], metric: str, quantities: Iterable[str]) -> list[Any]:
    """Every context at which one of the quantities was measured for one of the rows."""
    found = {
        finding.coordinates.get("context")
        for row in rows
        for quantity in quantities
        for finding in evidence.series(row, metric, quantity)
    }
    return sorted(found, key=lambda value: (value is not None, value))


def _points(evidence: Evidence, row: Row, metric: str, quantity: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
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


def _nothing(evidence: Evidence, metric: str, quantity: str) -> str:
    reasons = list(dict.fromkeys(evidence.missing(row, metric, quantity).reason for row in evidence.rows))
    return "; ".join(reasons) + "."
