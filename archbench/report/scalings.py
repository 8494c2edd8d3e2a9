"""Scaling laws of a run that has several sizes: a law a label, its check, crossings, and the curves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from archbench.report import drawing, notation, table
from archbench.report.budget import training_bytes
from archbench.report.drawing import Drawing
from archbench.report.evidence import Evidence
from archbench.report.palette import Style
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell
from archbench.scaling import Run, Scaling, crossing, fit

NAME, TITLE = "scaling", "Bits per byte against size"
STATE = "reset"
FEWEST = 2


def scalings(evidence: Evidence) -> dict[str, Scaling]:
    """The law of every label with two sizes or more, from every seed's own bits per byte. Budgets of a grid, which
    stand in the label, are joined."""
    runs: dict[str, list[Run]] = {}
    for row in evidence.architectures:
        parameters = evidence.find(row, "cost", "parameters", kind="total").value
        read = training_bytes(evidence, row).value
        if parameters is None or read is None:
            continue
        for record in evidence.records_of(row, "likelihood", "bits_per_byte", state=STATE):
            assert record.value is not None
            found = Run(parameters=parameters, bytes=read, loss=record.value, seed=record.seed)
            runs.setdefault(_of_any_budget(evidence, row), []).append(found)
    return {label: fit(own) for label, own in runs.items() if len({run.parameters for run in own}) >= FEWEST}


def _of_any_budget(evidence: Evidence, row: Row) -> str:
    """The label without the budget that a grid over budgets added to it."""
    budget = (evidence.config(row).get("training") or {}).get("budget") or {}
    for unit, amount in budget.items():
        if amount is not None:
            return row.label.removesuffix(f" {unit}={amount:g}")
    return row.label


def scaling_tables(evidence: Evidence, laws: Mapping[str, Scaling]) -> list[Table]:
    """The laws, and where they cross; nothing for a run of one size."""
    if not laws:
        return []
    tables = [
        Table(
            key="scaling",
            title="How quality scales with size",
            columns=(
                Column(name="architecture", numeric=False),
                Column(name="exponent", hint="of parameters"),
                Column(name="exponent of text", hint="of bytes"),
                Column(name="irreducible loss", hint="bits per byte"),
                Column(name="sizes"),
                Column(name="trainings"),
                Column(name="largest size, predicted"),
                Column(name="measured"),
            ),
            lines=tuple(_line(label, law) for label, law in laws.items()),
            notes=(
                "Bits per byte = E + A / parameters^exponent, and B / bytes^exponent where budgets differ, fitted by "
                "variable projection; intervals over redrawn trainings. With two sizes, or two budgets, E is left out, "
                "and of two sizes at two budgets only the larger budget counts. The prediction is that of the smaller "
                "sizes alone: where the measured value lies outside its interval, the law does not hold over this "
                "range. A flagged exponent stands where the search ends: these losses do not tell what it is.",
            ),
        )
    ]
    crossings = _crossings(evidence, laws)
    return [*tables, *([crossings] if crossings else [])]


def _line(label: str, scaling: Scaling) -> tuple[TableCell, ...]:
    bounds = scaling.exponent()
    shown, interval = notation.interval(scaling.law.a, *((bounds.low, bounds.high) if bounds else (None, None)))
    if scaling.predicted is None or scaling.held_out is None:
        predicted = table.absent("needs three sizes")
        measured = table.absent("needs three sizes")
    else:
        near = scaling.predicted_interval
        text, detail = notation.interval(scaling.predicted, *((near.low, near.high) if near else (None, None)))
        predicted = TableCell(text=text, detail=detail, sort=scaling.predicted)
        measured = TableCell(text=f"{scaling.held_out:.3f}", sort=scaling.held_out, flagged=scaling.refuted)
    floor = (
        TableCell(text=f"{scaling.law.E:.2f}", sort=scaling.law.E)
        if scaling.law.E
        else table.absent("not fitted, or 0")
    )
    return (
        table.text(label),
        TableCell(text=shown, detail=interval, sort=scaling.law.a, flagged=scaling.at_bound),
        TableCell(text=f"{scaling.law.b:.3g}", sort=scaling.law.b)
        if scaling.law.B
        else table.absent("not fitted, or 0"),
        floor,
        table.count(scaling.n_sizes),
        table.count(scaling.n_runs),
        predicted,
        measured,
    )


def _doubtful(laws: Mapping[str, Scaling], crossing: LawCrossing) -> list[str]:
    """Those of the two laws that their own check refutes, or whose exponent is not known."""
    pair = (crossing.better_before, crossing.better_after)
    return [label for label in pair if laws[label].refuted or laws[label].at_bound]


def _doubt(laws: Mapping[str, Scaling], crossing: LawCrossing) -> str:
    found = _doubtful(laws, crossing)
    return f"{notation.listed(found)} does not hold" if len(found) == 1 else "neither holds" if found else "hold"


def _crossings(evidence: Evidence, laws: Mapping[str, Scaling]) -> Table | None:
    n_bytes = max(
        (f.value or 0.0 for f in (training_bytes(evidence, row) for row in evidence.architectures)), default=0
    )
    found = [c for (a, x), (b, y) in combinations(laws.items(), 2) if (c := crossing(a, x, b, y, n_bytes)) is not None]
    if not found:
        return None
    return Table(
        key="scaling-crossovers",
        title="Where scaling laws cross",
        columns=(
            Column(name="better below", numeric=False),
            Column(name="better above", numeric=False),
            Column(name="parameters"),
            Column(name="redrawn laws that cross"),
            Column(name="the laws", numeric=False),
        ),
        lines=tuple(
            (
                table.text(c.better_before),
                table.text(c.better_after),
                TableCell(
                    text=notation.plain(c.parameters),
                    detail="" if c.interval is None else notation.interval(c.parameters, *c.interval[:2])[1],
                    sort=c.parameters,
                ),
                TableCell(text=notation.share(round(c.share, 2)), sort=c.share, flagged=c.share < 0.95),
                table.text(_doubt(laws, c), flagged=bool(_doubtful(laws, c))),
            )
            for c in found
        ),
        notes=("Between the smallest size and ten times the largest; beyond that no law is read. Flagged: not sure.",),
        folded=len(found) > 6,
    )


def scaling_figure(evidence: Evidence, styles: Mapping[Row, Style], laws: Mapping[str, Scaling]) -> list[Drawing]:
    """Every training as a mark, every law as a line with the band of its draws; nothing for a run of one size."""
    if not laws:
        return []
    rows = {label: [r for r in evidence.architectures if _of_any_budget(evidence, r) == label] for label in laws}
    first = {label: own[0] for label, own in rows.items()}
    figure, (axes,) = drawing.canvas(1, legend=list(laws))
    lines = []
    sizes = [law.law.largest for law in laws.values()] + [law.law.smallest for law in laws.values()]
    drawing.log_axis(axes, "x", sizes, "", least_factor=3.0)
    for label, scaling in laws.items():
        look, law = styles[first[label]], scaling.law
        own = rows[label]
        read = max(training_bytes(evidence, row).value or 0.0 for row in own)
        xs = np.geomspace(law.smallest, law.largest, 50)
        axes.plot(xs, [law.loss(x, read) for x in xs], color=look.colour, linestyle=look.line, linewidth=1.3)
        if scaling.draws:
            curves = np.array([[draw.loss(x, read) for x in xs] for draw in scaling.draws])
            low, high = np.percentile(curves, [2.5, 97.5], axis=0)
            axes.fill_between(xs, low, high, color=look.colour, alpha=0.12, linewidth=0)
        for row in own:
            parameters = evidence.find(row, "cost", "parameters", kind="total").value
            if parameters is None:
                continue  # a cell that is void, or could not be trained
            for record in evidence.records_of(row, "likelihood", "bits_per_byte", state=STATE):
                assert record.value is not None
                axes.plot(
                    [parameters], [record.value], color=look.colour, marker=look.marker, markerfacecolor=look.face,
                    linestyle="none", markersize=5,
                )  # fmt: skip
                lines.append(
                    {
                        "row": row.name, "label": label, "size": row.size, "seed": record.seed,
                        "parameters": parameters, "bits_per_byte": record.value,
                    }
                )  # fmt: skip
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"bits per byte ({STATE})")
    drawing.legend(figure, {row: styles[row] for row in first.values()}, list(first.values()))
    told = "; ".join(f"{label} falls with exponent {scaling.law.a:.3f}" for label, scaling in laws.items())
    return [
        Drawing(
            name=NAME,
            title=TITLE,
            caption="A mark a training; lines are the fitted laws, bands the laws of redrawn trainings.",
            alt=f"{TITLE}: {told}.",
            figure=figure,
            data=pd.DataFrame(lines),
        )
    ]
