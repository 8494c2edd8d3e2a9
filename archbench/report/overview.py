"""The overview of a comparison at several sizes: one line an architecture, one column a size, and what use costs.

In each column the lowest bits per byte carry "best", and "≈ best" those whose difference to it, paired by seed or by
document, does not exclude zero: the column then does not tell which of them is better. Rows are ranked only within an
arena (one size and corpus) and along a declared budget that they share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from archbench.report import notation, table
from archbench.report.budget import budget, declared_and_matched, largest_shared_context
from archbench.report.evidence import Evidence, known, separated
from archbench.report.levels import compared, words
from archbench.report.pairs import difference
from archbench.report.quality import brier_window
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell
from archbench.report.verdict import rankings

STATE = "reset"
BEST, NEAR = "best", "≈ best"

Line = tuple[str, str, str, int]
"""Label, codec, corpus, and which of a grid's cells: what sizes of one architecture have in common."""


def overview_table(evidence: Evidence) -> Table | None:
    """Contenders by their place at the largest size. Costs are those of the largest size, at the longest context that
    all have. None in a run without architectures."""
    rows = {(_line(row), row.size): row for row in evidence.architectures}
    sizes = _sizes(evidence)
    if not sizes:
        return None
    largest = sizes[-1]
    lines = sorted(
        dict.fromkeys(_line(row) for row in evidence.architectures),
        key=lambda line: _place(evidence, rows.get((line, largest))),
    )
    cells = {row: cell for arena in evidence.arenas.values() for row, cell in _ranked(evidence, arena).items()}
    at_largest = [rows[line, largest] for line in lines if (line, largest) in rows]
    costs = _costs(evidence, at_largest)
    beside = [_beside(evidence, at_largest, metric, quantity, at) for _, _, metric, quantity, at in costs]
    columns = [Column(name="architecture", numeric=False)]
    columns += [Column(name=size, hint=f"{_parameters(evidence, size)}, bits per byte") for size in sizes]
    columns += [Column(name=name, hint=", ".join(part for part in (largest, hint) if part)) for name, hint, *_ in costs]
    made = []
    for line in lines:
        found = [table.text(_name(line, lines))]
        for size in sizes:
            row = rows.get((line, size))
            found.append(table.absent("not run at this size") if row is None else cells[row])
        top = rows.get((line, largest))
        for column in beside:
            found.append(table.absent("not run at this size") if top is None else column[top])
        made.append(tuple(found))
    seeds = min(len(row.seeds) for row in evidence.architectures)
    mean = "" if seeds == 1 else f", mean of {seeds} seeds"
    return Table(
        key="overview",
        title="All sizes at a glance",
        columns=tuple(columns),
        lines=tuple(made),
        notes=(
            f"Bits per byte of held-out text, state reset at every window{mean}, with 95 % intervals. {BEST}: the "
            f"lowest of its column. {NEAR}: the paired difference to it does not exclude zero.",
            "In the other columns best and ≈ best go by value and by intervals that overlap.",
            *(told for size in sizes for told in rankings(evidence, _at(evidence, size), size)),
        ),
    )


def largest_size(evidence: Evidence) -> tuple[str, ...]:
    """What the largest size's ranking says, in sentences."""
    sizes = _sizes(evidence)
    return rankings(evidence, _at(evidence, sizes[-1]), sizes[-1]) if sizes else ()


def _line(row: Row) -> Line:
    return row.label, row.codec, row.corpus, row.variant


def _name(line: Line, lines: list[Line]) -> str:
    """The label, and what tells it from others of that label."""
    same = [other for other in lines if other[0] == line[0]]
    parts = [str(part) for i, part in enumerate(line[1:], start=1) if len({other[i] for other in same}) > 1]
    return " ".join([line[0], *parts])


def _costs(evidence: Evidence, rows: list[Row]) -> list[tuple[str, str, str, str, dict[str, Any]]]:
    """Name, hint, metric, quantity and place of what is shown beside quality."""
    context, level = largest_shared_context(evidence, rows), compared(evidence)
    at = {} if context is None else {"context": context}
    after = "" if context is None else f"after {notation.tokens(context)} tokens"
    window = brier_window(evidence)
    return [
        (
            "BrierLM",
            f"0 to 100, sampled, {window} window",
            "brier_lm",
            "brier_lm",
            {"estimator": "sampled", "window": window},
        ),
        ("state", after, "cost", "state_bytes", at),
        (
            "a token",
            f"{after}, one row{words(level)}",
            "latency",
            "time_per_token",
            {"clock": "wall", "batch": 1, **at, **level},
        ),
        ("training", "", "training", "seconds", {}),
    ]


def _sizes(evidence: Evidence) -> list[str]:
    """From few parameters to many."""
    smallest: dict[str, float] = {}
    for row in evidence.architectures:
        value = evidence.find(row, "cost", "parameters", kind="total").value
        smallest[row.size] = min(smallest.get(row.size, float("inf")), float("inf") if value is None else value)
    return sorted(smallest, key=lambda size: smallest[size])


def _parameters(evidence: Evidence, size: str) -> str:
    found = [evidence.find(row, "cost", "parameters", kind="total") for row in _at(evidence, size)]
    have = sorted((finding for finding in found if finding.value is not None), key=known)
    return f"{table.number(have[len(have) // 2]).text} parameters" if have else "parameters not measured"


def _ranked(evidence: Evidence, rows: list[Row]) -> dict[Row, TableCell]:
    """Bits per byte of the rows of one arena, with their places where they share a declared budget."""
    found = {row: evidence.find(row, "likelihood", "bits_per_byte", state=STATE) for row in rows}
    cells = {row: table.number(finding) for row, finding in found.items()}
    have = sorted((row for row in rows if found[row].value is not None), key=lambda row: known(found[row]))
    if len(have) < 2 or not declared_and_matched(budget(evidence, rows), have):
        return cells
    for row in have:
        place = BEST
        if row is not have[0]:
            pair = difference(evidence, row, have[0], STATE, comparisons=len(have) - 1)
            place = NEAR if pair is not None and not pair.excludes_zero else ""
        cells[row] = replace(cells[row], more=place)
    return cells


def _at(evidence: Evidence, size: str) -> list[Row]:
    return [row for row in evidence.architectures if row.size == size]


def _beside(
    evidence: Evidence, rows: list[Row], metric: str, quantity: str, at: dict[str, Any]
) -> dict[Row, TableCell]:
    """A column beside quality: the best, and those whose intervals overlap with its."""
    found = {row: evidence.find(row, metric, quantity, **at) for row in rows}
    cells = {row: table.number(finding) for row, finding in found.items()}
    have = [row for row in rows if found[row].value is not None]
    if len(have) < 2 or len({row.corpus for row in rows}) > 1:
        return cells
    sign = -1 if found[have[0]].better == "higher" else 1
    first = min(have, key=lambda row: sign * known(found[row]))
    for row in have:
        near = found[row].has_interval and not separated(found[first], found[row])
        cells[row] = replace(cells[row], more=BEST if row is first else NEAR if near else cells[row].more)
    return cells


def _place(evidence: Evidence, row: Row | None) -> tuple[bool, float]:
    value = None if row is None else evidence.find(row, "likelihood", "bits_per_byte", state=STATE).value
    return value is None, value or 0.0
