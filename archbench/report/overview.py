"""The overview of a comparison at several sizes: one line an architecture, one column a size, and what use costs.

In each column the lowest bits per byte carry "best", and "≈ best" those whose difference to it, paired by seed or by
document, does not exclude zero: the column then does not tell which of them is better.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.levels import compared, words
from archbench.report.pairs import difference
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell

STATE = "reset"
BEST, NEAR = "best", "≈ best"


def overview_table(evidence: Evidence) -> Table:
    """Contenders by their place at the largest size, then references. Costs are those of the largest size."""
    labels = list(dict.fromkeys(row.label for row in evidence.architectures))
    sizes = _sizes(evidence)
    largest = sizes[-1]
    rows = {(row.label, row.size): row for row in evidence.architectures}
    quality = {size: _column(evidence, [row for row in evidence.architectures if row.size == size]) for size in sizes}
    labels.sort(key=lambda label: _place(evidence, rows.get((label, largest))))
    columns = [Column(name="architecture", numeric=False)]
    columns += [Column(name=size, hint=f"{_parameters(evidence, size)}, bits per byte") for size in sizes]
    level = compared(evidence)
    cost: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
        ("BrierLM", "0 to 100, sampled", "brier_lm", "brier_lm", {"estimator": "sampled"}),
        ("state", "", "cost", "state_bytes", {}),
        ("a token", f"one row{words(level)}", "latency", "time_per_token", {"clock": "wall", "batch": 1, **level}),
        ("training", "", "training", "seconds", {}),
    )
    found = {
        (label, name): evidence.find(rows[label, largest], metric, quantity, **at)
        for name, _, metric, quantity, at in cost
        for label in labels
        if (label, largest) in rows
    }
    for name, hint, *_ in cost:
        context = table.shared_note([f for (_, kind), f in found.items() if kind == name], "context")
        parts = [largest, f"after {notation.tokens(int(context))} tokens" if context else "", hint]
        columns.append(Column(name=name, hint=", ".join(part for part in parts if part)))
    lines = []
    for label in labels:
        cells = [table.text(label)]
        for size in sizes:
            row = rows.get((label, size))
            cells.append(table.absent("not run at this size") if row is None else quality[size][row])
        for name, *_ in cost:
            cells.append(
                table.number(found.get((label, name), Finding(reason="not run at this size", status="absent")))
            )
        lines.append(tuple(cells))
    seeds = min(len(row.seeds) for row in evidence.architectures)
    mean = "" if seeds == 1 else f", mean of {seeds} seeds"
    return Table(
        key="overview",
        title="All sizes at a glance",
        columns=tuple(columns),
        lines=tuple(lines),
        notes=(
            f"Bits per byte of held-out text, state reset at every window{mean}, with 95 % intervals. {BEST}: the "
            f"lowest of its column. {NEAR}: the paired difference to it does not exclude zero.",
        ),
    )


def _sizes(evidence: Evidence) -> list[str]:
    """From few parameters to many."""
    smallest: dict[str, float] = {}
    for row in evidence.architectures:
        value = evidence.find(row, "cost", "parameters", kind="total").value
        smallest[row.size] = min(smallest.get(row.size, float("inf")), float("inf") if value is None else value)
    return sorted(smallest, key=lambda size: smallest[size])


def _parameters(evidence: Evidence, size: str) -> str:
    found = [
        evidence.find(row, "cost", "parameters", kind="total") for row in evidence.architectures if row.size == size
    ]
    have = sorted((finding for finding in found if finding.value is not None), key=known)
    return f"{table.number(have[len(have) // 2]).text} parameters" if have else "parameters not measured"


def _column(evidence: Evidence, rows: list[Row]) -> dict[Row, TableCell]:
    """Bits per byte of rows that stand together, with their place."""
    found = {row: evidence.find(row, "likelihood", "bits_per_byte", state=STATE) for row in rows}
    have = sorted((row for row in rows if found[row].value is not None), key=lambda row: known(found[row]))
    cells = {row: table.number(finding) for row, finding in found.items()}
    for row in have:
        if row is have[0]:
            place = BEST
        else:
            pair = difference(evidence, row, have[0], STATE, comparisons=len(have) - 1)
            place = NEAR if pair is not None and not pair.excludes_zero else ""
        cells[row] = replace(cells[row], more=place)
    return cells


def _place(evidence: Evidence, row: Row | None) -> tuple[bool, float]:
    value = None if row is None else evidence.find(row, "likelihood", "bits_per_byte", state=STATE).value
    return value is None, value or 0.0
