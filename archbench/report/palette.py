"""One look a row, the same in every figure: colour, marker and line style.

The first seven colours are those of Okabe and Ito, told apart by readers with every common colour blindness; yellow is
left out, being too faint on white. Four more were chosen to be at least as far from these and from each other, as
readers with full sight, protanopia, deuteranopia and tritanopia see them. Labels take them in order of first appearance
in the records, so a rerun of a suite looks the same; marker and line style differ too, so a figure survives a grey
printer, and where there are more labels than colours the twins of a colour have other markers. Sizes of one label share
its colour. References are grey.

Source: Okabe & Ito 2008, Color universal design.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from archbench.report.rows import Row

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#9A68FE", "#BE354B", "#6B1E07",
    "#080EB6",
)  # fmt: skip
GREYS = ("#5F6670", "#8A919C", "#3D434B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LineStyle = Literal["-", "none"] | tuple[float, Sequence[float]]
LINES: tuple[LineStyle, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


@dataclass(frozen=True, kw_only=True)
class Style:
    """`face` is the marker's fill: white from the second row of a label on."""

    colour: str
    marker: str
    line: LineStyle
    face: str


def styles(rows: Sequence[Row]) -> dict[Row, Style]:
    """The look of each row; the rows are in order of first appearance."""
    looks = {}
    labels: dict[bool, dict[str, int]] = {False: {}, True: {}}
    siblings: dict[str, int] = defaultdict(int)
    for row in rows:
        index = labels[row.reference].setdefault(row.label, len(labels[row.reference]))
        nth = siblings[row.label]
        siblings[row.label] += 1
        colours = GREYS if row.reference else COLOURS
        colour = colours[index % len(colours)]
        shift = 2 * (index // len(COLOURS))  # labels of one colour: markers 13 = 5 (mod 8) apart, so eight in turn
        looks[row] = Style(
            colour=colour,
            marker="." if row.reference else MARKERS[(index + shift + 3 * nth) % len(MARKERS)],
            line=LINES[(index + nth + int(row.reference)) % len(LINES)],
            face=colour if nth == 0 else "white",
        )
    return looks


def one_a_label(styles: dict[Row, Style], rows: Sequence[Row]) -> tuple[dict[Row, Style], list[Row]]:
    """For figures with a panel a size: one look and one line of the legend for all sizes of a label, unless a size has
    several rows of it or its sizes differ in text or codec. Returns looks of rows and entries, and the entries."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.label, row)
    kinds = {(row.label, row.codec, row.corpus) for row in rows}
    places = {(row.label, row.size) for row in rows}
    if len({row.size for row in rows}) < 2 or len(kinds) > len(first) or len(places) < len(rows):
        return styles, list(rows)
    looks = {row: styles[first[row.label]] for row in rows}
    entries = [replace(row, name=row.label) for row in first.values()]
    return {**looks, **{entry: styles[first[entry.label]] for entry in entries}}, entries
