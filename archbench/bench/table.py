"""The table of a bench run: a row a target, and what the figures came to. Reads records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from archbench.record import Record

HEADINGS = ("target", "level", "ours", "peer", "figure", "must", "stretch", "verdict", "notes")


class Row(NamedTuple):
    """Texts in the order of HEADINGS; `question` says what is compared."""

    target: str
    level: str
    ours: str
    peer: str
    figure: str
    must: str
    stretch: str
    verdict: str
    notes: str
    question: str


def rows(records: Sequence[Record]) -> list[Row]:
    """One row a target in the order measured; the newest answer where there are several."""
    deciding: dict[str, Record] = {}
    sides: dict[tuple[str, str], Record] = {}
    for record in records:
        if record.quantity == "figure" and record.at.get("clock") != "wall":
            deciding[record.cell] = record
        elif record.quantity != "figure" and record.at.get("clock") == "cpu":
            sides[record.cell, record.quantity] = record
    return [_row(record, sides) for record in deciding.values()]


def verdict(record: Record) -> str:
    """One of "met", "met (stretch)", "not met", or why there is no figure."""
    if record.value is None:
        return f"not measured: {record.reason}"
    must, stretch = record.settings["must"], record.settings["stretch"]
    if not reached(record.value, must, record.better):
        return "not met"
    return "met (stretch)" if stretch is not None and reached(record.value, stretch, record.better) else "met"


def reached(value: float, bound: float, better: str) -> bool:
    """Whether a figure is as good as the bound."""
    return value >= bound if better == "higher" else value <= bound


def _row(record: Record, sides: dict[tuple[str, str], Record]) -> Row:
    settings = record.settings
    sign = "≥" if record.better == "higher" else "≤"
    unit = record.unit if record.unit == "x" else f" {record.unit}"
    figure = "" if record.value is None else f"{_short(record.value)}{unit}"
    if record.value is not None and record.low is not None and record.high is not None:
        figure += f" [{_short(record.low)}, {_short(record.high)}]"
    return Row(
        target=record.cell,
        level=settings["level"],
        ours=_side(settings["ours"], sides.get((record.cell, "ours"))),
        peer=_side(settings["peer"], sides.get((record.cell, "peer"))),
        figure=figure,
        must=f"{sign} {_short(settings['must'])}",
        stretch="" if settings["stretch"] is None else f"{sign} {_short(settings['stretch'])}",
        verdict=verdict(record),
        notes=_notes(record),
        question=settings["question"],
    )


def _notes(record: Record) -> str:
    """Figures beside the figure, and why a target was missed, where that is known."""
    missed = record.value is not None and verdict(record) == "not met"
    why = record.settings.get("why_missed", "") if missed else ""
    return "; ".join(filter(None, [record.protocol, why]))


def _side(name: str, seconds: Record | None) -> str:
    if seconds is None or seconds.value is None:
        return name
    value, unit = seconds.value, "s"
    for smaller in ("ms", "µs", "ns"):
        if value >= 1:
            break
        value, unit = value * 1000, smaller
    return f"{name}: {_short(value)} {unit}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def tally(found: Sequence[Row]) -> str:
    """How many targets were met."""
    return f"{sum(row.verdict.startswith('met') for row in found)} of {len(found)} targets met."


def markdown(records: Sequence[Record]) -> str:
    """The table in Markdown, with how many targets were met on top."""
    found = rows(records)
    lines = [
        tally(found),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
        *("| " + " | ".join(row[: len(HEADINGS)]) + " |" for row in found),
    ]
    return "\n".join(lines) + "\n"
