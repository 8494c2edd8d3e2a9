"""Heatmaps of passkey retrieval: one panel a row, lengths across, depths down."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from archbench.report import drawing, notation
from archbench.report.drawing import Drawing
from archbench.report.evidence import Evidence
from archbench.report.passkey_grids import Grid, Tally, grids

_COLOURS = LinearSegmentedColormap.from_list("answers", ["#F7F4EE", "#9CC6DE", "#0B5C8F"])
_ACROSS = 3
_HEIGHT = 2.3


def passkey_heatmaps(evidence: Evidence) -> list[Drawing]:
    """The rows' answers in texts of the first variant; nothing where no cell was asked."""
    found = grids(evidence)
    if not found:
        return []
    shown = [grid for grid in found if grid.variant == found[0].variant]
    figure, panels = drawing.canvas(len(shown), wide=True, share_y=False, height=_HEIGHT, across=_ACROSS)
    for axes, grid in zip(panels, shown, strict=True):
        _panel(axes, grid)
    figure.supxlabel("length (tokens; 1K = 1024)", fontsize="medium")
    figure.supylabel("depth of the needle", fontsize="medium")
    figure.colorbar(ScalarMappable(Normalize(0, 1), _COLOURS), ax=panels, label="exact match", shrink=0.7, aspect=30)
    name, title = "passkey", "Passkey: answers with every digit right, by length and depth"
    return [
        Drawing(
            name=name,
            title=title,
            caption="In each cell, right answers of those asked. Depth 0 is the front of the text; at depth 1 the "
            "needle stands just before the question and no memory is needed. Hatched: not run, the tables say why.",
            alt=f"{title}: {'; '.join(_told(grid) for grid in shown)}.",
            figure=figure,
            data=pd.DataFrame(line for grid in found for line in _lines(evidence, grid)),
            wide=True,
        )
    ]


def _panel(axes: Axes, grid: Grid) -> None:
    axes.set_xlim(-0.5, len(grid.lengths) - 0.5)
    axes.set_ylim(len(grid.depths) - 0.5, -0.5)
    axes.grid(False)
    axes.set_xticks(range(len(grid.lengths)), [notation.tokens(length) for length in grid.lengths])
    axes.set_yticks(range(len(grid.depths)), [f"{depth:g}" for depth in grid.depths])
    axes.set_title(grid.name)
    for x, length in enumerate(grid.lengths):
        for y, depth in enumerate(grid.depths):
            _cell(axes, x, y, grid.cells.get((length, depth), Tally(reason="not recorded")))


def _cell(axes: Axes, x: int, y: int, tally: Tally) -> None:
    place = (x - 0.5, y - 0.5)
    if not tally.n:
        axes.add_patch(Rectangle(place, 1, 1, facecolor="white", edgecolor="#B9C0C8", hatch="////", linewidth=0))
        return
    axes.add_patch(Rectangle(place, 1, 1, facecolor=_COLOURS(tally.value), edgecolor="white", linewidth=0.8))
    ink = "white" if tally.value > 0.6 else "#22262B"
    axes.text(x, y, f"{tally.right}/{tally.n}", ha="center", va="center", fontsize=8, color=ink)


def _told(grid: Grid) -> str:
    parts = []
    for length in grid.lengths:
        tally = grid.over_depths(length)
        parts.append(f"{notation.tokens(length)} {f'{tally.right}/{tally.n}' if tally.n else 'not run'}")
    return f"{grid.name} {', '.join(parts)}"


def _lines(evidence: Evidence, grid: Grid) -> list[dict[str, object]]:
    segment = evidence.config(grid.row).get("model", {}).get("segment")
    lines = []
    for (length, depth), tally in sorted(grid.cells.items()):
        distance = grid.distances.get((length, depth))
        low, high = tally.bounds if tally.n else (None, None)
        lines.append(
            {
                "row": grid.row.name, "learned": grid.learned, "variant": grid.variant, "length": length,
                "depth": depth, "distance": distance,
                "segments away": distance // segment if segment and distance is not None else None,
                "right": tally.right if tally.n else None, "asked": tally.n,
                "exact match": tally.value if tally.n else None, "low": low, "high": high,
                "token accuracy": tally.digits, "reason": tally.reason,
            }
        )  # fmt: skip
    return lines
