"""Figures without a continuous axis: the budget strip, Brier-n, training throughput."""

from __future__ import annotations

import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from archbench.report import drawing, notation
from archbench.report.budget import TOLERANCE, AxisMatch
from archbench.report.drawing import Drawing, Omitted
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.palette import Style, one_a_label
from archbench.report.quality import ESTIMATORS, brier_window, deviation
from archbench.report.rows import Row

_STEPS = (0.05, 0.2, 1.0, 10.0, 100.0, 1000.0)
"""Where the strip has ticks, on both sides: relative deviations."""


def budget_strip(arenas: list[tuple[str, list[AxisMatch]]], styles: dict[Row, Style]) -> Drawing | Omitted:
    """How far each row is from the first one, axis by axis; the band is what counts as matched."""
    name, title = "budget", "What was matched: deviation from the first architecture"
    several = [(place, match) for place, match in arenas if len(match[0].contenders) > 1]
    if not several:
        return Omitted(name=name, title=title, reason="there is no second architecture to hold against the first")
    shown = several[:3]
    rows = list(dict.fromkeys(entry.row for _, match in shown for entry in match[0].contenders[1:]))
    styles, entries = one_a_label(styles, rows)
    figure, panels = drawing.canvas(len(shown), legend=[row.name for row in entries], wide=True, height=3.4)
    axes_names = [match.axis for match in shown[0][1]]
    extent = 0.0
    for panel, (place, match) in zip(panels, shown, strict=True):
        panel.axvspan(-TOLERANCE, TOLERANCE, color="#0B7A4B", alpha=0.12, linewidth=0)
        panel.axvline(0, color="#8A919C", linewidth=0.8)
        others = [entry.row for entry in match[0].contenders][1:]
        for position, axis in enumerate(match):
            for entry in axis.contenders[1:]:
                offset = (others.index(entry.row) - (len(others) - 1) / 2) * min(0.22, 0.7 / len(others))
                if entry.deviation is None:
                    continue
                look = styles[entry.row]
                extent = max(extent, abs(entry.deviation))
                panel.plot(
                    [entry.deviation], [position + offset], marker=look.marker, color=look.colour,
                    markerfacecolor=look.face, markersize=7.5, linestyle="none", zorder=4,
                )  # fmt: skip
        panel.set_xscale("symlog", linthresh=TOLERANCE, linscale=0.9)
        panel.set_yticks(range(len(axes_names)), axes_names)
        panel.set_ylim(len(axes_names) - 0.5, -0.5)
        panel.set_xlabel(f"deviation from {match[0].contenders[0].row.name}")
        if place:
            panel.set_title(place)
    limit = next((step for step in _STEPS[1:] if step >= extent * 1.15), extent * 1.3)
    ticks = [step for step in _STEPS if step <= limit]
    ticks = ticks if len(panels) < 3 else ticks[::2]  # narrow panels
    for panel in panels:
        panel.set_xlim(-min(limit * 1.3, 1.6), limit * 1.3)
        panel.xaxis.set_major_locator(FixedLocator([*(-t for t in ticks[::-1] if t <= 1), 0, *ticks]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    drawing.legend(figure, styles, entries, marks="points")
    data = pd.DataFrame(
        {
            "axis": axis.axis, "declared": axis.declared, "at": axis.note, "row": entry.row.name,
            "size": entry.row.size, "value": entry.finding.value, "unit": entry.finding.unit,
            "deviation": entry.deviation, "matched": entry.matched, "reason": entry.finding.reason,
        }
        for _, match in several
        for axis in match
        for entry in axis.entries
    )  # fmt: skip
    told = "; ".join(
        f"{entry.row.name} {axis.axis} {deviation(entry.deviation)}"
        for axis in shown[0][1]
        for entry in axis.contenders[1:]
        if entry.deviation is not None
    )
    return Drawing(
        name=name,
        title=title,
        caption=f"Green band: matched within {notation.share(TOLERANCE)}. The scale is linear inside it and "
        "logarithmic outside. A missing mark is a missing value; the table gives its reason.",
        alt=f"{title}: {told}.",
        figure=figure,
        data=data,
        wide=True,
    )


def _tick(value: float) -> str:
    if value == 0:
        return "equal"
    if abs(value) > 2:
        return f"×{1 + value:.0f}"
    return f"{value * 100:+.0f} %".replace("-", "\N{MINUS SIGN}")


def brier_components(evidence: Evidence, styles: dict[Row, Style]) -> Drawing | Omitted:
    """Brier-n by n; the geometric mean needs all four clearly above zero."""
    name, title = "brier", "Brier-n by length n"
    window = brier_window(evidence)
    rows = evidence.rows
    found: dict[str, dict[Row, dict[int, Finding]]] = {}
    for estimator, _ in ESTIMATORS:
        for row in rows:
            for finding in evidence.series(row, "brier_lm", "brier_n", estimator=estimator, window=window):
                n = finding.coordinates.get("n")
                if type(n) is int:
                    found.setdefault(estimator, {}).setdefault(row, {})[n] = finding
    if not found:
        return drawing.omitted(name, title, [evidence.missing(row, "brier_lm", "brier_n") for row in rows])
    shown = [row for row in rows if any(row in by_row for by_row in found.values())]
    figure, panels = drawing.canvas(len(found), legend=[row.name for row in shown])
    lengths = sorted({n for by_row in found.values() for values in by_row.values() for n in values})
    for panel, (estimator, by_row) in zip(panels, found.items(), strict=True):
        width = 0.8 / len(by_row)
        for index, (row, values) in enumerate(by_row.items()):
            xs = [lengths.index(n) + (index - (len(by_row) - 1) / 2) * width for n in values]
            heights = [100 * known(finding) for finding in values.values()]
            look = styles[row]
            panel.bar(
                xs, heights, width=width * 0.84, facecolor=look.face, edgecolor=look.colour, hatch=drawing.hatch(look),
                linewidth=0.8,
            )  # fmt: skip
            for x, finding in zip(xs, values.values(), strict=True):
                if finding.low is not None and finding.high is not None:
                    panel.vlines(x, 100 * finding.low, 100 * finding.high, color="#22262B", linewidth=1.1, zorder=4)
        panel.axhline(0, color="#8A919C", linewidth=0.8)
        panel.set_xticks(range(len(lengths)), [f"n = {n}" for n in lengths])
        panel.grid(axis="x", visible=False)
        if len(found) > 1:
            panel.set_title(dict(ESTIMATORS)[estimator])
    panels[0].set_ylabel(f"Brier-n × 100 ({window} window)")
    drawing.legend(figure, styles, shown, marks="bars")
    data = pd.DataFrame(
        {
            "row": row.name, "size": row.size, "estimator": estimator, "window": window, "n": n,
            "brier_n (fraction)": f.value, "low": f.low, "high": f.high, "seeds": f.seeds,
        }
        for estimator, by_row in found.items()
        for row, values in by_row.items()
        for n, f in values.items()
    )  # fmt: skip
    told = "; ".join(
        f"{row.name} ({estimator}) " + ", ".join(f"n={n}: {100 * known(f):.1f}" for n, f in values.items())
        for estimator, by_row in found.items()
        for row, values in by_row.items()
    )
    return Drawing(
        name=name,
        title=title,
        caption="Higher is better; lines are intervals. BrierLM is given only where every interval excludes zero.",
        alt=f"{title}: {told}.",
        figure=figure,
        data=data,
        wide=len(found) > 1,
    )


def throughput(evidence: Evidence, styles: dict[Row, Style]) -> Drawing | Omitted:
    """Bytes of text per second of training, and how much of the machine's matrix speed that was."""
    name, title = "throughput", "Training speed"
    rows = evidence.architectures
    speeds = {row: evidence.find(row, "training", "bytes_per_second") for row in rows}
    shares = {row: evidence.find(row, "training", "matmul_utilisation") for row in rows}
    drawn = [row for row in rows if speeds[row].value is not None]
    if not drawn:
        return drawing.omitted(name, title, speeds.values())
    figure, (panel,) = drawing.canvas(1, height=max(drawing.HEIGHT, 0.9 + 0.3 * len(drawn)))
    for position, row in enumerate(drawn):
        look, speed, share = styles[row], speeds[row], shares[row]
        panel.barh(
            position, known(speed), height=0.6, facecolor=look.face, edgecolor=look.colour, hatch=drawing.hatch(look),
            linewidth=0.8,
        )  # fmt: skip
        told = "" if share.value is None else f", {notation.percent(share.value)}"
        panel.annotate(
            notation.plain(known(speed), "B/s") + told, (known(speed), position), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    panel.set_yticks(range(len(drawn)), [row.name for row in drawn])
    panel.set_ylim(max(len(drawn), 3) - 0.5, -0.5)
    panel.set_xlim(0, 1.5 * max(known(speeds[row]) for row in drawn))
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: drawing.tick(x, "B/s") if x else "0"))
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("text read per second of training")
    data = pd.DataFrame(
        {
            "row": row.name, "size": row.size, "bytes_per_second": speeds[row].value,
            "matmul_utilisation": shares[row].value, "reason": speeds[row].reason or shares[row].reason,
        }
        for row in rows
    )  # fmt: skip
    told = "; ".join(f"{row.name} {notation.plain(known(speeds[row]), 'B/s')}" for row in drawn)
    caption = "Higher is better. Per cent: share of the best matrix product's speed in the same process."
    left = [row.name for row in rows if row not in drawn]
    if left:
        caption += f" Without a bar, see the tables: {', '.join(left)}."
    return Drawing(name=name, title=title, caption=caption, alt=f"{title}: {told}.", figure=figure, data=data)
