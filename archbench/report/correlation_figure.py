"""The table and the scatter plot of BrierLM against cross-entropy."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from archbench.report import drawing, table
from archbench.report.correlation import (
    COEFFICIENTS,
    FEWEST,
    PAPER,
    Checkpoint,
    Correlation,
    Study,
    correlation,
    studies,
)
from archbench.report.drawing import Drawing, Omitted
from archbench.report.evidence import Evidence
from archbench.report.palette import Style, styles
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell

NAME, TITLE = "correlation", "BrierLM against cross-entropy"
ESTIMATORS = {"teacher_forced": "teacher-forced", "sampled": "sampled"}
_MOST_PANELS = 2


def correlation_table(evidence: Evidence) -> Table | None:
    """All checkpoints of a study in one line, then each architecture's own where it has several; None where no study
    has checkpoints enough."""
    found = _large(evidence)
    if not found:
        return None
    lines = []
    for study in found:
        groups = {"all": study.checkpoints}
        if len(study.architectures) > 1:
            groups |= {name: own for name in study.architectures if len(own := study.of(name)) > 1}
        lines += [_line(study, name, checkpoints) for name, checkpoints in groups.items()]
    paper = [TableCell(text=f"{PAPER[name]:.3f}", sort=PAPER[name]) for name in COEFFICIENTS]
    lines.append(
        (
            table.text("Shao et al. 2025, figure 3", "published"),
            table.text("teacher-forced"),
            table.text("subwords"),
            table.text("not given"),
            *paper,
        )
    )
    notes = [
        "Pearson's and Spearman's coefficients of BrierLM and nats per token, over trained cells. Below 20 checkpoints "
        "the interval is Fisher's z, else a bootstrap over checkpoints."
    ]
    notes += [
        f"{study.refused} checkpoints on {study.codec} ({ESTIMATORS[study.estimator]}) have no BrierLM and are left "
        "out; the reasons stand below."
        for study in found
        if study.refused
    ]
    return Table(
        key="correlation",
        title=TITLE,
        columns=(
            Column(name="checkpoints of", numeric=False),
            Column(name="estimator", numeric=False),
            Column(name="codec", numeric=False),
            Column(name="checkpoints"),
            *(Column(name=name) for name in COEFFICIENTS),
        ),
        lines=tuple(lines),
        notes=tuple(notes),
        rule_after=len(lines) - 1,
    )


def _large(evidence: Evidence) -> list[Study]:
    return [study for study in studies(evidence) if len(study.checkpoints) >= FEWEST]


def _line(study: Study, name: str, checkpoints: tuple[Checkpoint, ...]) -> tuple[TableCell, ...]:
    return (
        table.text(name, study.corpus),
        table.text(ESTIMATORS[study.estimator], f"context {study.context}"),
        table.text(study.codec, f"window {study.window}, {study.state}"),
        table.count(len(checkpoints)),
        *(_coefficient(correlation(checkpoints, coefficient)) for coefficient in COEFFICIENTS),
    )


def _coefficient(found: Correlation) -> TableCell:
    if found.value is None or found.interval is None:
        return table.absent(found.reason)
    low, high, _ = found.interval
    return TableCell(text=f"{found.value:.3f}", detail=f"[{low:.3f}, {high:.3f}]", more=found.method, sort=found.value)


def correlation_figure(evidence: Evidence) -> Drawing | Omitted:
    """One panel an estimator of the largest studies; a colour an architecture."""
    found = _large(evidence)
    if not found:
        most = max((len(study.checkpoints) for study in studies(evidence)), default=0)
        reason = f"at most {most} trained cells have both numbers under one protocol; {FEWEST} are needed"
        return Omitted(name=NAME, title=TITLE, reason=reason)
    shown = found[:_MOST_PANELS]
    looks = _looks(evidence, shown)
    figure, panels = drawing.canvas(len(shown), legend=[row.name for row in looks])
    by_name = {row.name: look for row, look in looks.items()}
    for panel, study in zip(panels, shown, strict=True):
        for name in study.architectures:
            look, own = by_name[name], study.of(name)
            panel.plot(
                [c.nats for c in own], [c.brier for c in own], color=look.colour, marker=look.marker,
                markerfacecolor=look.face, linestyle="none", zorder=4,
            )  # fmt: skip
            for c in own:
                if c.low is not None and c.high is not None:
                    panel.vlines(c.nats, c.low, c.high, color=look.colour, linewidth=0.9, alpha=0.6)
        told = correlation(study.checkpoints, "Pearson"), correlation(study.checkpoints, "Spearman")
        panel.set_title(
            f"{ESTIMATORS[study.estimator]}, {study.codec}: r = {_short(told[0])}, ρ = {_short(told[1])}, "
            f"n = {len(study.checkpoints)}"
        )
        panel.set_xlabel("cross-entropy (nats per token)")
    panels[0].set_ylabel("BrierLM")
    drawing.legend(figure, looks, list(looks), marks="points")
    return Drawing(
        name=NAME,
        title=TITLE,
        caption=f"Each mark is a trained cell, bars are its BrierLM's interval. Published: r = {PAPER['Pearson']:.3f}, "
        f"ρ = {PAPER['Spearman']:.3f}, over checkpoints of Transformers (Shao et al. 2025, figure 3).",
        alt=f"{TITLE}: "
        + "; ".join(
            f"{ESTIMATORS[s.estimator]} on {s.codec}, {len(s.checkpoints)} checkpoints, Pearson "
            f"{_short(correlation(s.checkpoints, 'Pearson'))}"
            for s in shown
        )
        + ".",
        figure=figure,
        data=pd.DataFrame(
            {
                "checkpoint": c.name, "architecture": c.architecture, "corpus": study.corpus, "codec": study.codec,
                "estimator": study.estimator, "nats_per_token": c.nats, "brier_lm": c.brier, "low": c.low,
                "high": c.high,
            }
            for study in found
            for c in study.checkpoints
        ),
        wide=len(shown) > 1,
    )  # fmt: skip


def _short(found: Correlation) -> str:
    return "none" if found.value is None else f"{found.value:.3f}"


def _looks(evidence: Evidence, shown: list[Study]) -> dict[Row, Style]:
    """A look an architecture, whatever its sizes, budgets and labels."""
    first: dict[str, Row] = {}
    for row in evidence.architectures:
        first.setdefault(row.architecture, replace(row, name=row.architecture, label=row.architecture))
    wanted = {name for study in shown for name in study.architectures}
    looks = styles(list(first.values()))
    return {row: look for row, look in looks.items() if row.name in wanted}
