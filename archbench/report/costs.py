"""The cost tables: size and speed of training, FLOPs three ways, state, memory and latency, with the samples behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding, Row
from archbench.report.table import Column, Table, TableCell
from archbench.stats import samples_for_percentile

DISAGREEMENT = 0.02
"""Counts of FLOPs that differ by more are flagged: one of them is wrong."""
COUNTS = ("analytic", "traced", "meta")
WORKS = ("training", "prefill", "decode")
TAILS = (0.9, 0.95, 0.99, 0.999)

TRAINING: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("parameters", "cost", "parameters", {"kind": "total"}),
    ("non-embedding", "cost", "parameters", {"kind": "non_embedding"}),
    ("training FLOPs", "training", "flops", {}),
    ("FLOPs per byte", "cost", "training_flops_per_byte", {}),
    ("wall-clock", "training", "seconds", {}),
    ("CPU time", "training", "cpu_seconds", {}),
    ("tokens per second", "training", "tokens_per_second", {}),
    ("bytes per second", "training", "bytes_per_second", {}),
    ("FLOP per second", "training", "flops_per_second", {}),
    ("matmul utilisation", "training", "matmul_utilisation", {}),
)


def cost_tables(evidence: Evidence) -> tuple[list[Table], list[str]]:
    """The tables, and for each that has nothing to show a sentence saying so."""
    candidates = (training_table, flops_table, state_table, memory_table, latency_table)
    built = [make(evidence) for make in candidates]
    return [t for t in built if isinstance(t, Table)], [t for t in built if isinstance(t, str)]


def training_table(evidence: Evidence) -> Table | str:
    lines = [
        (table.text(row.name), *(table.number(evidence.find(row, metric, q, **at)) for _, metric, q, at in TRAINING))
        for row in evidence.rows
    ]
    return Table(
        key="training",
        title="Size and training",
        columns=(Column(name="architecture", numeric=False), *(Column(name=name) for name, *_ in TRAINING)),
        lines=tuple(lines),
        notes=("Matmul utilisation: achieved FLOP/s over those of the best matrix product in the same process.",),
        rule_after=len(evidence.architectures) if evidence.references else None,
    )


def flops_table(evidence: Evidence) -> Table | str:
    """FLOPs per token, counted three ways that must agree."""
    lines = []
    conventions: set[str] = set()
    for row in evidence.rows:
        for work in WORKS:
            quantity = f"{work}_flops_per_token"
            for context in _values(evidence, row, "cost", (quantity, "flops_disagreement"), "context"):
                at = {} if context is None else {"context": context}
                counts = [evidence.find(row, "cost", quantity, count=count, **at) for count in COUNTS]
                conventions |= {str(f.coordinates["causal"]) for f in counts if "causal" in f.coordinates}
                spread = evidence.find(row, "cost", "flops_disagreement", work=work, **at)
                wrong = spread.value is not None and spread.value > DISAGREEMENT
                lines.append(
                    (
                        table.text(row.name),
                        table.text(work),
                        _coordinate(context),
                        *(table.number(count) for count in counts),
                        _disagreement(spread, wrong),
                    )
                )
    if not lines:
        return "FLOPs per token: " + _nothing(evidence, "cost", "training_flops_per_token")
    convention = (
        f"Counting convention: causal attention counts {notation.listed(sorted(conventions))} of the full square."
        if conventions
        else "Counting convention: not recorded."
    )
    return Table(
        key="flops",
        title="FLOPs per token, counted three ways",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="work", numeric=False),
            Column(name="context", hint="tokens"),
            *(Column(name=count) for count in COUNTS),
            Column(name="disagreement", hint=f"flagged above {notation.percent(DISAGREEMENT)}"),
        ),
        lines=tuple(lines),
        notes=(
            convention,
            "Analytic: the formula beside the layer. Traced: operators counted as they run. Meta: the same without "
            "data.",
        ),
    )


def state_table(evidence: Evidence) -> Table | str:
    contexts = sorted(
        {
            context
            for row in evidence.rows
            for context in _values(evidence, row, "cost", ("state_bytes",), "context")
            if context is not None
        }
    )
    if not contexts:
        return "State bytes by context: " + _nothing(evidence, "cost", "state_bytes")
    lines = [
        (
            table.text(row.name),
            *(table.number(evidence.find(row, "cost", "state_bytes", context=context)) for context in contexts),
        )
        for row in evidence.rows
    ]
    return Table(
        key="state",
        title="State by context",
        columns=(
            Column(name="architecture", numeric=False),
            *(Column(name=notation.tokens(context), hint="tokens") for context in contexts),
        ),
        lines=tuple(lines),
        notes=("Bytes of the live state of one row after reading so many tokens; 1K = 1024 tokens.",),
        rule_after=len(evidence.architectures) if evidence.references else None,
    )


def memory_table(evidence: Evidence) -> Table | str:
    """Peaks by work, context and batch."""
    lines: list[tuple[TableCell, ...]] = []
    for row in evidence.rows:
        for at in _points(evidence, row, "memory", ("peak_rss", "peak_device")):
            host = evidence.find(row, "memory", "peak_rss", **at)
            device = evidence.find(row, "memory", "peak_device", **at)
            lines.append(
                (
                    table.text(row.name),
                    table.text(str(at.get("work", "all")).replace("_", " ")),
                    _coordinate(at.get("context")),
                    _coordinate(at.get("batch")),
                    table.number(host),
                    table.number(device),
                )
            )
    if not lines:
        return "Peak memory: " + _nothing(evidence, "memory", "peak_rss")
    columns = [Column(name="architecture", numeric=False), Column(name="work", numeric=False)]
    columns += [Column(name="context", hint="tokens"), Column(name="batch", hint="rows")]
    columns += [Column(name="peak memory", hint="above the level before"), Column(name="peak on the device")]
    if not any(evidence.series(row, "memory", "peak_device") for row in evidence.rows):
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    return Table(key="memory", title="Peak memory", columns=tuple(columns), lines=tuple(lines))


def latency_table(evidence: Evidence) -> Table | str:
    """Context by batch: medians with intervals, how many samples, and the tail if there are enough."""
    lines = []
    quantities = ("time_to_first_token", "time_per_token", "prefill_rate")
    for row in evidence.rows:
        for at in _points(evidence, row, "latency", quantities, without=("clock",)):
            wall = {name: evidence.find(row, "latency", name, clock="wall", **at) for name in quantities}
            per_token_cpu = evidence.find(row, "latency", "time_per_token", clock="cpu", **at)
            lines.append(
                (
                    table.text(row.name),
                    _coordinate(at.get("context")),
                    _coordinate(at.get("batch")),
                    table.number(wall["time_to_first_token"]),
                    table.number(wall["time_per_token"]),
                    table.number(per_token_cpu),
                    table.number(wall["prefill_rate"]),
                    _samples(wall["time_per_token"], wall["time_to_first_token"]),
                    tail(wall["time_per_token"]),
                )
            )
    if not lines:
        return "Latency: " + _nothing(evidence, "latency", "time_per_token")
    least = samples_for_percentile(TAILS[0])
    return Table(
        key="latency",
        title="Latency by context and batch",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="context", hint="tokens"),
            Column(name="batch", hint="rows"),
            Column(name="time to first token", hint="wall, median"),
            Column(name="time per token", hint="wall, median"),
            Column(name="time per token", hint="CPU, median"),
            Column(name="prefill rate", hint="wall, median"),
            Column(name="samples", hint="per point"),
            Column(name="tail of time per token", hint=f"from {least} samples"),
        ),
        lines=tuple(lines),
        notes=("A percentile q needs n ≥ ln(0.01) / ln(q) samples: 44 for p90, 90 for p95, 459 for p99.",),
    )


def tail(finding: Finding) -> TableCell:
    """The largest percentile that the number of samples allows."""
    if finding.value is None:
        return table.absent(finding.reason, finding.status)
    n = len(finding.samples)
    allowed = [q for q in TAILS if n >= samples_for_percentile(q)]
    if not allowed:
        least = samples_for_percentile(TAILS[0])
        return TableCell(
            text=f"too few ({n} of {least})",
            reason=f"a p{100 * TAILS[0]:g} needs {least} samples, a p99 {samples_for_percentile(0.99)}; see the column "
            "'samples' for how many were taken",
            status="absent",
        )
    q = allowed[-1]
    value = float(np.quantile(np.asarray(finding.samples), q, method="higher"))
    return TableCell(text=f"p{100 * q:g} {notation.plain(value, finding.unit)}", sort=value)


def _disagreement(spread: Finding, wrong: bool) -> TableCell:
    if spread.value is None:
        return table.absent(spread.reason, spread.status)
    shown = notation.percent(spread.value)
    return TableCell(text=shown, detail="counts disagree" if wrong else "", sort=spread.value, flagged=wrong)


def _samples(*findings: Finding) -> TableCell:
    found = [finding for finding in findings if finding.value is not None]
    return table.count(len(found[0].samples)) if found else table.absent(findings[0].reason, findings[0].status)


def _coordinate(value: Any) -> TableCell:
    if value is None:
        return TableCell(text="any", sort=-1.0)
    return TableCell(text=str(value), sort=float(value) if type(value) in (int, float) else str(value))


def _points(
    evidence: Evidence, row: Row, metric: str, quantities: tuple[str, ...], without: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Every point of the grid at which one of the quantities was measured, or was planned and has a reason."""
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    ats = [f.coordinates for quantity in quantities for f in evidence.series(row, metric, quantity)]
    ats += [record.at for record in evidence.problems_of(row, metric) if record.at]
    for at in ats:
        kept = {name: value for name, value in at.items() if name not in without}
        points.setdefault(tuple(sorted((k, str(v)) for k, v in kept.items())), kept)
    return sorted(points.values(), key=lambda at: (str(at.get("work")), at.get("batch") or 0, at.get("context") or 0))


def _values(evidence: Evidence, row: Row, metric: str, quantities: tuple[str, ...], name: str) -> Iterator[Any]:
    found = {f.coordinates.get(name) for q in quantities for f in evidence.series(row, metric, q)}
    yield from sorted(found, key=lambda value: (value is not None, value))


def _nothing(evidence: Evidence, metric: str, quantity: str) -> str:
    reasons = list(dict.fromkeys(evidence.missing(row, metric, quantity).reason for row in evidence.rows))
    return "; ".join(reasons) + "."
