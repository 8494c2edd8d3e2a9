"""What all figures share: type and line sizes, legends outside the data, axes in readable units, saving.

Figures are made without pyplot, so nothing is kept open and no display is needed. The SVG holds letters as outlines:
it looks the same wherever it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from archbench.report import notation
from archbench.report.evidence import Finding
from archbench.report.palette import LineStyle, Style
from archbench.report.rows import Row

HALF, WIDE, HEIGHT = 5.35, 10.9, 3.75
"""Inches; two half figures and a gap make a wide one."""
_DPI = 144
_LETTERS_PER_INCH = 14.5
_LEGEND_LINE = 0.19
_ENTRY_LETTERS = 9
"""A legend entry's mark and gap, in letters."""
_INK, _FAINT = "#22262B", "#D9DDE3"

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "regular",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.edgecolor": "#8A919C",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "archbench",
    "path.simplify": True,
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with the numbers in it. `alt` is its content in words, for those who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    data: pd.DataFrame
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Omitted:
    """A figure that there is nothing to draw for."""

    name: str
    title: str
    reason: str


def omitted(name: str, title: str, findings: Iterable[Finding]) -> Omitted:
    """Omitted for the reasons of the findings that have no value."""
    reasons = dict.fromkeys(finding.reason for finding in findings if finding.value is None)
    return Omitted(name=name, title=title, reason="; ".join(reasons) or "no architecture in the records")


@contextmanager
def house_style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def canvas(
    panels: int,
    legend: Sequence[str] = (),
    wide: bool = False,
    share_y: bool = True,
    height: float = HEIGHT,
    across: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side, in lines of at most `across`, each `height` high; more than one makes
    it wide. A legend of more than one line makes it higher."""
    width = WIDE if wide or panels > 1 else HALF
    columns = panels if across is None else min(panels, across)
    lines = math.ceil(panels / columns)
    more = math.ceil(len(legend) / _legend_columns(legend, width)) - 1 if legend else 0
    figure = Figure(figsize=(width, height * lines + more * _LEGEND_LINE), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, sharey=share_y, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.set_axis_off()
    return figure, axes[:panels]


def _legend_columns(names: Sequence[str], width: float) -> int:
    longest = max(len(name) for name in names) + _ENTRY_LETTERS
    return max(1, min(len(names), int(width * _LETTERS_PER_INCH) // longest))


def save(drawing: Drawing, folder: Path) -> list[Path]:
    """NAME.png, NAME.svg and NAME.csv."""
    paths = [folder / f"{drawing.name}.{ending}" for ending in ("png", "svg", "csv")]
    figure = drawing.figure
    figure.set_dpi(_DPI)
    layout = figure.get_layout_engine()
    if layout is not None:  # once, for both files
        layout.execute(figure)
        figure.set_layout_engine("none")
    # Not `savefig`, which draws everything twice.
    FigureCanvasAgg(figure).print_png(paths[0], metadata={"Software": None})
    FigureCanvasSVG(figure).print_svg(paths[1], metadata={"Date": None, "Creator": None})
    drawing.data.to_csv(paths[2], index=False)
    return paths


def legend(
    figure: Figure,
    styles: dict[Row, Style],
    rows: Sequence[Row],
    marks: Literal["lines", "points", "bars"] = "lines",
) -> None:
    """Above the data, in as many columns as fit."""

    def handle(row: Row) -> Artist:
        look = styles[row]
        if marks == "bars":
            return Patch(facecolor=look.face, edgecolor=look.colour, hatch=hatch(look), label=row.name)
        line: LineStyle = look.line if marks == "lines" else "none"
        return Line2D(
            [], [], color=look.colour, marker=look.marker, markerfacecolor=look.face, linestyle=line, label=row.name
        )

    handles = [handle(row) for row in rows]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=_legend_columns([row.name for row in rows], figure.get_figwidth()),
        frameon=False,
        handlelength=2.6 if marks == "lines" else 1.3,
        columnspacing=1.6,
    )


def hatch(look: Style) -> str:
    """Bars of the second row of a label are striped in its colour."""
    return "" if look.face == look.colour else "////"


def context_axis(axes: Axes, contexts: Sequence[float]) -> None:
    """Logarithmic, ticks at the contexts measured (every other one if they crowd)."""
    ticks = sorted(set(contexts))
    axes.set_xscale("log")
    step = math.ceil(len(ticks) / 8)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1][::step][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: notation.tokens(x)))
    axes.set_xlabel("context (tokens; 1K = 1024)")


def log_axis(axes: Axes, which: str, values: Sequence[float], unit: str, least_factor: float = 6.0) -> None:
    """Logarithmic in readable units; always spans at least `least_factor`, so that it shows two labels or more."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = min(positive), max(positive)
    margin = max(1.25, math.sqrt(least_factor * low / high))
    low, high = low / margin, high * margin
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    subs = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0) if high / low < 5 else (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=14))
    axis.set_minor_locator(NullLocator() if len(subs) > 1 else LogLocator(base=10, subs=(2.0, 5.0), numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, unit)))
    axis.set_minor_formatter(NullFormatter())


def tick(value: float, unit: str) -> str:
    """`2 ms`, `500 µs`, `10 MB`: tick labels without trailing zeros."""
    factor, name = notation.scale(value, unit)
    return f"{value / factor:g} {name}".strip()


def thin(xs: Sequence[float], ys: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """Every k-th point and the last, for lines of more points than can be seen."""
    step = math.ceil(len(xs) / most)
    kept = sorted({*range(0, len(xs), step), len(xs) - 1}) if xs else []
    return [xs[i] for i in kept], [ys[i] for i in kept]
