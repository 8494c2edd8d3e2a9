"""Figures of skills, a panel a task: accuracy against the length of the text, and against the bytes of the state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from archbench.report import drawing, notation
from archbench.report.drawing import Drawing, Omitted
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.palette import Style, styles
from archbench.report.rows import Row
from archbench.report.skills import Entrant, entrants, title

ACROSS = 3
_QUIET = "#8A919C"


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A figure with a panel a task, and the look of every name."""

    figure: Figure
    panels: dict[str, Axes]
    looks: dict[str, Style]


def skill_figures(evidence: Evidence) -> list[Drawing | Omitted]:
    """Both figures; none where no cell was asked for its skill."""
    found = entrants(evidence)
    if not found:
        return []
    drawn = [entrant for entrant in found if entrant.accuracy]
    if not drawn:
        missing = [evidence.missing(entrant.row, "skill", "accuracy") for entrant in found]
        return [drawing.omitted(name, heading, missing) for name, heading in (_LENGTH, _STATE)]
    return [_against_length(evidence, drawn), _against_state(evidence, drawn)]


_LENGTH = ("skill_length", "Skills: accuracy against length")
_STATE = ("skill_state", "Skills: accuracy against the bytes of the state")


def _against_length(evidence: Evidence, drawn: list[Entrant]) -> Drawing:
    stage = _set(drawn)
    for entrant in drawn:
        panel, look = stage.panels[entrant.task], stage.looks[entrant.name]
        lengths = sorted(entrant.accuracy)
        _line(panel, [float(length) for length in lengths], [entrant.accuracy[x] for x in lengths], look)
    for task, panel in stage.panels.items():
        own = [entrant for entrant in drawn if entrant.task == task]
        drawing.context_axis(panel, [float(x) for entrant in own for x in entrant.accuracy])
        panel.set_xlabel("length (tokens; 1K = 1024)")
        for trained_at in {entrant.trained_at for entrant in own}:
            panel.axvline(trained_at, color=_QUIET, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        _mark_chance(evidence, panel, own)
    return Drawing(
        name=_LENGTH[0],
        title=_LENGTH[1],
        caption="Answers' tokens that are right, on questions kept from training; bars are 95 % intervals over texts. "
        "Upright dots: the longest texts trained on. Level dashes: chance.",
        alt=_alt(drawn),
        figure=stage.figure,
        data=_data(evidence, drawn),
        wide=True,
    )


def _against_state(evidence: Evidence, drawn: list[Entrant]) -> Drawing:
    stage = _set(drawn)
    sizes = {
        entrant.row: {length: evidence.find(entrant.row, "skill", "state_bytes", length=length).value or 0.0
                      for length in sorted(entrant.accuracy)}
        for entrant in drawn
    }  # fmt: skip
    for task, panel in stage.panels.items():
        own = [entrant for entrant in drawn if entrant.task == task]
        drawing.log_axis(panel, "x", [size for entrant in own for size in sizes[entrant.row].values()], "B")
        panel.set_xlabel("state of one row")
        for entrant in own:
            curve = sizes[entrant.row]
            _line(panel, list(curve.values()), [entrant.accuracy[x] for x in curve], stage.looks[entrant.name])
        _mark_chance(evidence, panel, own)
    return Drawing(
        name=_STATE[0],
        title=_STATE[1],
        caption="The same accuracies at the bytes that the live state of one row holds after such a text. A line joins "
        "the lengths of one architecture: upright where the state is constant, to the right where it grows.",
        alt=f"{_STATE[1]}: {_sizes_in_words(drawn, sizes)}.",
        figure=stage.figure,
        data=_data(evidence, drawn),
        wide=True,
    )


def _set(drawn: list[Entrant]) -> _Stage:
    named: dict[str, Row] = {}
    for entrant in drawn:  # one look a name, whichever task it stands in
        named.setdefault(entrant.name, replace(entrant.row, label=entrant.name, name=entrant.name))
    looks = styles(list(named.values()))
    tasks = list(dict.fromkeys(entrant.task for entrant in drawn))
    figure, axes = drawing.canvas(len(tasks), legend=list(named), wide=True, across=ACROSS)
    panels = dict(zip(tasks, axes, strict=True))
    for index, (task, panel) in enumerate(panels.items()):
        panel.set_title(title(task))
        panel.set_ylim(-4, 104)
        if index % ACROSS == 0:
            panel.set_ylabel("accuracy (%)")
    drawing.legend(figure, looks, list(named.values()))
    return _Stage(figure=figure, panels=panels, looks={name: looks[row] for name, row in named.items()})


def _line(panel: Axes, xs: list[float], findings: list[Finding], look: Style) -> None:
    ys = [100 * known(finding) for finding in findings]
    panel.plot(xs, ys, color=look.colour, linestyle=look.line, marker=look.marker, markerfacecolor=look.face)
    for x, finding in zip(xs, findings, strict=True):
        if finding.low is not None and finding.high is not None:
            panel.vlines(x, 100 * finding.low, 100 * finding.high, color=look.colour, linewidth=1.1)


def _mark_chance(evidence: Evidence, panel: Axes, own: list[Entrant]) -> None:
    chances = {evidence.find(entrant.row, "skill", "chance").value for entrant in own} - {None}
    for chance in chances:
        panel.axhline(100 * (chance or 0.0), color=_QUIET, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)


def _alt(drawn: list[Entrant]) -> str:
    said = []
    for entrant in drawn:
        ends = [
            f"{notation.plain(known(entrant.accuracy[x]), 'fraction')} at {notation.tokens(x)}"
            for x in dict.fromkeys((min(entrant.accuracy), max(entrant.accuracy)))
        ]
        said.append(f"{title(entrant.task)}, {entrant.name}: {', '.join(ends)}")
    return f"{_LENGTH[1]}. {'; '.join(said)}."


def _sizes_in_words(drawn: list[Entrant], sizes: dict[Row, dict[int, float]]) -> str:
    said = []
    for entrant in drawn:
        ends = dict.fromkeys(notation.plain(size, "B") for size in sizes[entrant.row].values())
        said.append(f"{title(entrant.task)}, {entrant.name}: {' to '.join(list(ends)[:: max(1, len(ends) - 1)])}")
    return "; ".join(said)


def _data(evidence: Evidence, drawn: list[Entrant]) -> pd.DataFrame:
    lines = []
    for entrant in drawn:
        for length, finding in sorted(entrant.accuracy.items()):
            others = {
                quantity: evidence.find(entrant.row, "skill", quantity, length=length).value
                for quantity in ("exact_match", "chance", "state_bytes")
            }
            lines.append(
                {
                    "task": entrant.task,
                    "row": entrant.row.name,
                    "architecture": entrant.row.architecture,
                    "trained_at": entrant.trained_at,
                    "length": length,
                    "accuracy": finding.value,
                    "low": finding.low,
                    "high": finding.high,
                    **others,
                    "n": finding.n,
                    "seeds": finding.seeds,
                }
            )
    return pd.DataFrame(lines)
