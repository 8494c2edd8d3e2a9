"""The table of crossovers: from which context which of two architectures is the cheaper one, and how sure that is."""

from __future__ import annotations

from archbench.report import notation, table
from archbench.report.context_figures import STATE_BYTES, TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, between, panels_of
from archbench.report.crossings import Crossing, crossings
from archbench.report.evidence import Evidence
from archbench.report.table import Column, Table, TableCell

MOST_LINES = 100


def crossover_table(evidence: Evidence) -> Table | None:
    """Every crossover of every two architectures of one size and corpus, those within the noise included; None where no
    two curves cross."""
    lines = []
    for what in (TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, STATE_BYTES):
        for key, curves in panels_of(evidence, what).items():
            at = f"{what.panel} {key}" if key is not None else ""
            for arena in dict.fromkeys(row.arena for row in curves):
                named = {row.name: curve for row, curve in curves.items() if row.arena == arena}
                lines += [_line(what.axis, at, crossing, what.noisy) for crossing in crossings(named, what.noisy)]
    if not lines:
        return None
    left = len(lines) - MOST_LINES
    notes = (
        "Interpolated between the contexts measured, straight in logarithms. Intervals: bootstrap over samples, drawn "
        "alike for both curves. Within the noise: on one side of it the two are nowhere apart beyond their intervals.",
        *((f"{left} further lines are left out here; the CSVs of the figures have all curves.",) if left > 0 else ()),
    )
    return Table(
        key="crossovers",
        title="Crossovers",
        columns=(
            Column(name="quantity", numeric=False),
            Column(name="lower before", numeric=False),
            Column(name="lower after", numeric=False),
            Column(name="context", hint="tokens"),
            Column(name="95 % interval", hint="tokens", numeric=False),
            Column(name="verdict", numeric=False),
        ),
        lines=tuple(lines[:MOST_LINES]),
        notes=notes,
        folded=True,
    )


def _line(axis: str, at: str, crossing: Crossing, noisy: bool) -> tuple[TableCell, ...]:
    interval = between(crossing) or ("an interval needs 6 samples a point" if noisy else "exact at the points")
    return (
        table.text(axis, at),
        table.text(crossing.cheaper_before),
        table.text(crossing.cheaper_after),
        TableCell(text=notation.tokens(crossing.x), sort=crossing.x),
        table.text(interval),
        table.text("resolved" if crossing.resolved else "within the noise"),
    )
