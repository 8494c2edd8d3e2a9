"""Figures of learning: bits per byte against training FLOPs, and the loss curves of each training phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from archbench.record import Record
from archbench.report import drawing
from archbench.report.drawing import Drawing, Omitted
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.palette import Style, one_a_label
from archbench.report.quality import STATES
from archbench.report.rows import Row

_MOST_PHASES = 3
_BINS = 60


def quality_against_flops(evidence: Evidence, styles: dict[Row, Style]) -> Drawing | Omitted:
    """Final points with intervals; sizes of one label are joined; references are horizontal lines."""
    name, title = "quality", "Bits per byte against training FLOPs"
    state = max(STATES, key=lambda s: sum(_bits(evidence, row, s).value is not None for row in evidence.architectures))
    points = {
        row: (evidence.find(row, "training", "flops"), _bits(evidence, row, state)) for row in evidence.architectures
    }
    drawn = {row: pair for row, pair in points.items() if pair[0].value and pair[1].value is not None}
    if not drawn:
        return drawing.omitted(name, title, [finding for pair in points.values() for finding in pair])
    figure, (axes,) = drawing.canvas(1, legend=[row.name for row in drawn])
    flops = [known(pair[0]) for pair in drawn.values()]
    curves = {row: evidence.records_of(row, "likelihood", "bits_per_byte", state=state) for row in drawn}
    flops += [x for records in curves.values() for record in records for x in record.along.get("flops", ())]
    drawing.log_axis(axes, "x", flops, "FLOP", least_factor=3.0)
    for row, records in curves.items():
        for record in records:
            if record.along.get("flops"):
                axes.plot(*drawing.thin(record.along["flops"], record.samples), color=styles[row].colour, alpha=0.6)
    for label in dict.fromkeys(row.label for row in drawn):
        sizes = sorted((row for row in drawn if row.label == label), key=lambda row: known(drawn[row][0]))
        if len(sizes) > 1:
            axes.plot(
                [known(drawn[row][0]) for row in sizes],
                [known(drawn[row][1]) for row in sizes],
                color=styles[sizes[0]].colour,
                linestyle=styles[sizes[0]].line,
                linewidth=1.2,
            )
    for row, (spent, bits) in drawn.items():
        _point(axes, spent, bits, styles[row])
    floors = {row: _bits(evidence, row, state) for row in evidence.references}
    floors = {row: finding for row, finding in floors.items() if finding.value is not None}
    above = _frame(axes, [bits for _, bits in drawn.values()], floors)
    for row, finding in floors.items():
        if row.name in above:
            continue
        axes.axhline(known(finding), color=styles[row].colour, linestyle=styles[row].line, linewidth=1.2)
        axes.annotate(
            row.name, (1, known(finding)), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="#4A5058",
        )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel(f"bits per byte ({state})")
    drawing.legend(figure, styles, list(drawn), marks="points")
    left = [row.name for row in points if row not in drawn]
    caption = "Held-out bits per byte (lower is better) at the end of training; bars are intervals."
    if above:
        caption += f" References above the frame: {', '.join(f'{name} {value:.2f}' for name, value in above.items())}."
    if left:
        caption += f" Without a point, see the quality table: {', '.join(left)}."
    data = pd.DataFrame(
        {
            "row": row.name, "label": row.label, "size": row.size, "reference": row.reference, "state": state,
            "training FLOPs": spent.value, "bits_per_byte": bits.value, "low": bits.low, "high": bits.high,
            "seeds": bits.seeds,
        }
        for row, (spent, bits) in {
            **drawn, **{row: (evidence.find(row, "training", "flops"), finding) for row, finding in floors.items()}
        }.items()
    )  # fmt: skip
    told = "; ".join(
        f"{row.name} {known(bits):.3f} after {drawing.tick(known(spent), 'FLOP')}"
        for row, (spent, bits) in drawn.items()
    )
    return Drawing(name=name, title=title, caption=caption, alt=f"{title}: {told}.", figure=figure, data=data)


def _frame(axes: Axes, drawn: list[Finding], floors: dict[Row, Finding]) -> dict[str, float]:
    """Fits the y axis to the points with their intervals; returns the references that lie far above them."""
    lows = [finding.low if finding.low is not None else known(finding) for finding in drawn]
    highs = [finding.high if finding.high is not None else known(finding) for finding in drawn]
    low, high = min(lows), max(highs)
    span = max(high - low, 0.02)
    near = [known(finding) for finding in floors.values() if known(finding) <= high + span]
    high = max([high, *near])
    axes.set_ylim(low - 0.18 * span, high + 0.18 * span)
    return {row.name: known(finding) for row, finding in floors.items() if known(finding) > high}


def _bits(evidence: Evidence, row: Row, state: str) -> Finding:
    return evidence.find(row, "likelihood", "bits_per_byte", state=state)


def _point(axes: Axes, spent: Finding, bits: Finding, look: Style) -> None:
    value = known(bits)
    below, above = (value - bits.low, bits.high - value) if bits.low is not None and bits.high is not None else (0, 0)
    axes.errorbar(
        [known(spent)], [value], yerr=[[below], [above]], color=look.colour, marker=look.marker,
        markerfacecolor=look.face, markersize=7, capsize=3, elinewidth=1.3, linestyle="none", zorder=4,
    )  # fmt: skip


def loss_curves(evidence: Evidence, styles: dict[Row, Style]) -> Drawing | Omitted:
    """Training loss against bytes read; a panel a phase, as losses of different phases are different things, and a
    size where labels come in several: then sizes stand side by side."""
    name, title = "loss", "Training loss against bytes read"
    phases: dict[str, dict[Row, list[Record]]] = {}
    for row in evidence.architectures:
        for record in evidence.records_of(row, "training", "loss"):
            if len(record.along.get("bytes", ())) > 1 and len(record.along["bytes"]) == len(record.samples):
                phases.setdefault(str(record.at.get("phase", "training")), {}).setdefault(row, []).append(record)
    if not phases:
        rows = evidence.architectures
        return drawing.omitted(name, title, [evidence.missing(row, "training", "loss") for row in rows])
    shown = list(phases)[:_MOST_PHASES]
    rows = [row for row in evidence.architectures if any(row in phases[phase] for phase in shown)]
    styles, entries = one_a_label(styles, rows)
    sizes: list[str | None] = list(dict.fromkeys(row.size for row in rows)) if len(entries) < len(rows) else [None]
    places = [(phase, size) for phase in shown for size in sizes]
    across = len(sizes) if len(sizes) > 1 else None
    figure, panels = drawing.canvas(len(places), [row.name for row in entries], share_y=False, across=across)
    for panel, (phase, size) in zip(panels, places, strict=True):
        here = {row: records for row, records in phases[phase].items() if size in (None, row.size)}
        if not here:
            panel.set_axis_off()
            continue
        curves = {row: _smoothed(records) for row, records in here.items()}
        for index, (row, (xs, ys)) in enumerate(curves.items()):
            every = max(1, len(xs) // 6)
            look = styles[row]
            panel.plot(
                xs,
                ys,
                color=look.colour,
                linestyle=look.line,
                linewidth=1.4,
                alpha=0.9,
                marker=look.marker,
                markerfacecolor=look.face,
                markersize=4.5,
                markevery=(index * every // 4 % every, every),
            )
        _loss_range(panel, [y for _, ys in curves.values() for y in ys])
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: drawing.tick(x, "B")))
        panel.set_xlabel("training text read")
        panel.set_ylabel("loss (nats per token)")
        titles = [f"phase {phase}"] if len(shown) > 1 else []
        titles += [f"size {size}"] if size is not None else []
        panel.set_title(", ".join(titles))
    drawing.legend(figure, styles, entries)
    caption = (
        f"Means over seeds and over {_BINS} equal stretches of the phase's text; the first may lie above the frame. "
        "Compare only within a phase and a codec. Every logged point of every seed is in the CSV."
    )
    if len(phases) > len(shown):
        caption += f" Not drawn, but in the CSV: {', '.join(list(phases)[_MOST_PHASES:])}."
    data = pd.concat(
        [
            pd.DataFrame({"row": row.name, "seed": record.seed, "phase": phase, **record.along, "loss": record.samples})
            for phase, rows_of in phases.items()
            for row, records in rows_of.items()
            for record in records
        ]
    )
    ends = "; ".join(
        f"{row.name} ends phase {phase} at {_smoothed(records)[1][-1]:.3f}"
        for phase in shown
        for row, records in phases[phase].items()
    )
    return Drawing(
        name=name, title=title, caption=caption, alt=f"{title}: {ends}.", figure=figure, data=data, wide=len(places) > 1
    )


def _smoothed(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """The mean loss of all seeds in equal stretches of the text read, at the mean place of their steps."""
    xs = np.concatenate([record.along["bytes"] for record in records])
    ys = np.concatenate([record.samples for record in records])
    share = (xs - xs.min()) / max(xs.max() - xs.min(), 1.0)
    bins = np.minimum((share * _BINS).astype(int), _BINS - 1)
    filled = np.unique(bins)
    return [float(xs[bins == b].mean()) for b in filled], [float(ys[bins == b].mean()) for b in filled]


def _loss_range(panel: Axes, losses: list[float]) -> None:
    """Cuts off the first drop, which would flatten the rest: up to the 97th percentile with a margin."""
    ordered = sorted(losses)
    low, high = ordered[0], ordered[int(0.97 * (len(ordered) - 1))]
    margin = 0.08 * (high - low) or 0.1
    panel.set_ylim(low - margin, high + margin)
