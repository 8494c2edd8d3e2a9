"""What a report holds, in reading order, before it becomes Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass

from archbench.report.bar_figures import brier_components, budget_strip, throughput
from archbench.report.budget import budget
from archbench.report.context_figures import STATE_BYTES, TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, against_context
from archbench.report.costs import cost_tables
from archbench.report.drawing import Drawing, Omitted
from archbench.report.evidence import Evidence
from archbench.report.learning_figures import loss_curves, quality_against_flops
from archbench.report.others import failures_table, other_table
from archbench.report.palette import styles
from archbench.report.provenance import Provenance, provenance
from archbench.report.quality import budget_table, quality_table
from archbench.report.table import Table
from archbench.report.verdict import Headline, headline

FIGURES = (
    "budget", "quality", "loss", "time_per_token", "time_to_first_token", "state_bytes", "brier", "throughput",
)  # fmt: skip
"""Names of all figures a report can have."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """`budget_figure` stands with the budget tables; `omitted` says of each figure and table that is not there, why."""

    headline: Headline
    quality: Table
    budgets: tuple[Table, ...]
    budget_figure: Drawing | None
    figures: tuple[Drawing, ...]
    costs: tuple[Table, ...]
    others: Table | None
    failures: Table | None
    provenance: Provenance
    omitted: tuple[str, ...]

    @property
    def drawings(self) -> list[Drawing]:
        return [*([self.budget_figure] if self.budget_figure else []), *self.figures]


def contents(evidence: Evidence) -> Contents:
    """Builds everything; call it in `drawing.house_style()`."""
    looks = styles(evidence.rows)
    several = len(evidence.arenas) > 1
    matches = [
        (f"size {size}, {corpus}" if several else "", budget(evidence, rows))
        for (size, corpus), rows in evidence.arenas.items()
    ]
    strip = budget_strip(matches, looks)
    found: list[Drawing | Omitted] = [quality_against_flops(evidence, looks), loss_curves(evidence, looks)]
    remarks: list[str] = []
    for what in (TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, STATE_BYTES):
        figure, sentences = against_context(evidence, looks, what)
        found.append(figure)
        remarks += sentences
    found += [brier_components(evidence, looks), throughput(evidence, looks)]
    quality = quality_table(evidence)
    budgets = [budget_table(match, place) for place, match in matches]
    costs, without = cost_tables(evidence)
    others = other_table(evidence)
    return Contents(
        headline=headline(evidence, remarks),
        quality=quality,
        budgets=tuple(budgets),
        budget_figure=strip if isinstance(strip, Drawing) else None,
        figures=tuple(figure for figure in found if isinstance(figure, Drawing)),
        costs=tuple(costs),
        others=others,
        failures=failures_table(evidence, [quality, *budgets, *costs]),
        provenance=provenance(evidence),
        omitted=(*(f"{f.title}: {f.reason}." for f in (strip, *found) if isinstance(f, Omitted)), *without),
    )
