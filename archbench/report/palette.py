"""One look a label, the same in every figure: colour, marker and line style.

The colours are those of Okabe and Ito, told apart by readers with every common colour blindness; yellow is left out,
being too faint on white. Labels take them in order of first appearance in the records, so a rerun of a suite looks the
same; marker and line style differ too, so a figure survives a grey printer. References are grey.

Source: Okabe & Ito 2008, Color universal design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
GREYS = ("#5F6670", "#8A919C", "#3D434B")


@dataclass(frozen=True, kw_only=True)
class Style:
    colour: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]


def styles(labels: Sequence[str], references: Sequence[str] = ()) -> dict[str, Style]:
    """label -> style; the lists are in order of first appearance."""
    looks = {
        label: Style(
            colour=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            line=LINES[index % len(LINES)],
        )
        for index, label in enumerate(dict.fromkeys(labels))
    }
    for index, label in enumerate(dict.fromkeys(references)):
        looks[label] = Style(colour=GREYS[index % len(GREYS)], marker=".", line=LINES[1 + index % (len(LINES) - 1)])
    return looks
