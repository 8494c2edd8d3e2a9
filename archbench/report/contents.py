"""What a report holds, in reading order, before it becomes Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass

from archbench.papers import load_papers
from archbench.report.bar_figures import brier_components, budget_strip, throughput
from archbench.report.budget import budget
from archbench.report.choice import decision_table, panel_data
from archbench.report.code import code_tables
from archbench.report.context_figures import STATE_BYTES, TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, against_context
from archbench.report.correlation_figure import correlation_figure, correlation_table
from archbench.report.costs import cost_tables
from archbench.report.crossovers import crossover_table
from archbench.report.drawing import Drawing, Omitted
from archbench.report.energies import energy_table
from archbench.report.evidence import Evidence
from archbench.report.gates import gate_table
from archbench.report.learning_figures import loss_curves, quality_against_flops
from archbench.report.others import failures_table, other_table
from archbench.report.overview import overview_table
from archbench.report.palette import styles
from archbench.report.paper_costs import design_tables, designs, summary
from archbench.report.pareto_figure import pareto_figure
from archbench.report.passkey import passkey_remarks, passkey_tables
from archbench.report.passkey_figure import passkey_heatmaps
from archbench.report.provenance import Provenance, provenance
from archbench.report.quality import budget_table, quality_table
from archbench.report.scalings import scaling_figure, scaling_tables, scalings
from archbench.report.skill_figures import skill_figures
from archbench.report.skills import skill_remarks, skill_tables
from archbench.report.speculation import speculation_tables
from archbench.report.speculation_figure import speculation_figure
from archbench.report.table import Table
from archbench.report.verdict import Headline, counted_headline, headline

FIGURES = (
    "budget", "quality", "loss", "time_per_token", "time_to_first_token", "state_bytes", "brier", "throughput",
    "correlation", "speculation", "skill_length", "skill_state", "passkey", "pareto", "scaling",
)  # fmt: skip
"""Names of all figures a report can have."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """`budget_figure` stands with the budget tables; `designs` are of configurations that nobody trained; `omitted`
    says of each figure and table that is not there, why. `quality` is None when nothing at all was trained."""

    headline: Headline
    quality: Table | None
    budgets: tuple[Table, ...]
    budget_figure: Drawing | None
    figures: tuple[Drawing, ...]
    costs: tuple[Table, ...]
    designs: tuple[Table, ...]
    others: Table | None
    failures: Table | None
    provenance: Provenance
    omitted: tuple[str, ...]
    correlation: Table | None = None
    skills: tuple[Table, ...] = ()
    scaling: tuple[Table, ...] = ()
    decision: Table | None = None
    panel: dict[str, object] | None = None
    claims: Table | None = None
    overview: Table | None = None

    @property
    def drawings(self) -> list[Drawing]:
        return [*([self.budget_figure] if self.budget_figure else []), *self.figures]


def contents(evidence: Evidence, claims: Table | None = None) -> Contents:
    """Builds everything but `claims`, which are of the results file; call it in `drawing.house_style()`."""
    counted = designs(evidence)
    tables = tuple(design_tables(evidence, load_papers()))
    trained = Evidence([record for record in evidence.records if evidence.row_of(record) not in counted])
    if not trained.records:
        return Contents(
            headline=counted_headline(evidence, summary(evidence, load_papers())),
            quality=None,
            budgets=(),
            budget_figure=None,
            figures=(),
            costs=(),
            designs=tables,
            others=other_table(evidence),
            failures=failures_table(evidence, tables),
            provenance=provenance(evidence),
            omitted=(),
            claims=claims,
        )
    return _of_trained(trained, evidence, tables, claims)


def _of_trained(evidence: Evidence, everything: Evidence, designs: tuple[Table, ...], claims: Table | None) -> Contents:
    looks = styles(evidence.rows)
    several = len(evidence.arenas) > 1
    matches = [
        (f"size {size}, {corpus}" if several else "", budget(evidence, rows))
        for (size, corpus), rows in evidence.arenas.items()
    ]
    strip = budget_strip(matches, looks)
    laws = scalings(evidence)
    found: list[Drawing | Omitted] = [
        pareto_figure(evidence, looks),
        quality_against_flops(evidence, looks),
        *scaling_figure(evidence, looks, laws),
        loss_curves(evidence, looks),
    ]
    remarks: list[str] = []
    for what in (TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, STATE_BYTES):
        figure, sentences = against_context(evidence, looks, what)
        found.append(figure)
        remarks += sentences
    found += [brier_components(evidence, looks), throughput(evidence, looks), correlation_figure(evidence)]
    speculation = speculation_figure(evidence, looks)
    found += [speculation] if speculation else []
    found += [*skill_figures(evidence), *passkey_heatmaps(evidence)]
    gates = gate_table(evidence)
    skills = [*skill_tables(evidence), *passkey_tables(evidence), *([gates] if gates else []), *code_tables(evidence)]
    remarks = [*skill_remarks(evidence), *passkey_remarks(evidence), *remarks]
    quality = quality_table(evidence)
    budgets = [budget_table(match, place) for place, match in matches]
    costs, without = cost_tables(evidence)
    energy, crossovers = energy_table(evidence), crossover_table(evidence)
    costs += [*speculation_tables(evidence), *([crossovers] if crossovers else [])]
    costs += [energy] if isinstance(energy, Table) else []
    without += [energy] if isinstance(energy, str) else []
    others = other_table(everything)
    return Contents(
        headline=headline(evidence, remarks),
        quality=quality,
        budgets=tuple(budgets),
        budget_figure=strip if isinstance(strip, Drawing) else None,
        figures=tuple(figure for figure in found if isinstance(figure, Drawing)),
        costs=tuple(costs),
        designs=designs,
        others=others,
        failures=failures_table(everything, [quality, *skills, *budgets, *costs, *designs]),
        provenance=provenance(everything),
        omitted=(*(f"{f.title}: {f.reason}." for f in (strip, *found) if isinstance(f, Omitted)), *without),
        correlation=correlation_table(evidence),
        skills=tuple(skills),
        claims=claims,
        scaling=tuple(scaling_tables(evidence, laws)),
        decision=decision_table(evidence),
        panel=panel_data(evidence),
        overview=overview_table(evidence) if len({row.size for row in evidence.architectures}) > 1 else None,
    )
