"""The figure of speculative decoding: how far drafts hold, and whether the speed-up is what the costs predict."""

from __future__ import annotations

from typing import Any

import pandas as pd

from archbench.report import drawing, notation
from archbench.report.drawing import Drawing
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.palette import Style
from archbench.report.rows import Row
from archbench.report.speculation import acceptance, drafting

NAME, TITLE = "speculation", "Speculative decoding: acceptance, and what it is worth"


def speculation_figure(evidence: Evidence, styles: dict[Row, Style]) -> Drawing | None:
    """Acceptance by position, and measured against predicted speed-up; None where no architecture drafts."""
    accepting = {row: acceptance(evidence, row) for row in drafting(evidence)}
    points = _points(evidence)
    rows = [row for row in evidence.rows if row in accepting or any(row == point[0] for point in points)]
    if not rows:
        return None
    n_panels = int(bool(accepting)) + int(bool(points))
    figure, panels = drawing.canvas(n_panels, legend=[row.name for row in rows], share_y=False)
    if accepting:
        panel = panels[0]
        for row, curve in accepting.items():
            look, xs = styles[row], sorted(curve)
            panel.plot(
                xs, [100 * known(curve[x]) for x in xs], color=look.colour, linestyle=look.line, marker=look.marker,
                markerfacecolor=look.face,
            )  # fmt: skip
            for x in xs:
                low, high = curve[x].low, curve[x].high
                if low is not None and high is not None:
                    panel.vlines(x, 100 * low, 100 * high, color=look.colour, linewidth=1.1)
        panel.set_xticks(sorted({x for curve in accepting.values() for x in curve}))
        panel.set_ylim(0, 105)
        panel.set_xlabel("token of the step")
        panel.set_ylabel("steps that wrote it (%)")
    if points:
        panel = panels[-1]
        ends = [known(f) for _, _, predicted, measured in points for f in (predicted, measured)]
        low, high = min([*ends, 1.0]) / 1.15, max([*ends, 1.0]) * 1.15
        panel.plot([low, high], [low, high], color="#8A919C", linewidth=0.9, linestyle=(0, (4, 2)))
        panel.axhline(1, color="#8A919C", linewidth=0.9)
        for row, at, predicted, measured in points:
            look = styles[row]
            greedy = at.get("sampling") == "greedy"
            panel.plot(
                [known(predicted)], [known(measured)], color=look.colour, marker=look.marker, linestyle="none",
                markerfacecolor=look.colour if greedy else "white", zorder=4,
            )  # fmt: skip
            if measured.low is not None and measured.high is not None:
                panel.vlines(known(predicted), measured.low, measured.high, color=look.colour, linewidth=1.1)
        panel.set_xlim(low, high)
        panel.set_xlabel("predicted: tokens per step / break-even")
        panel.set_ylabel("measured speed-up")
    drawing.legend(figure, styles, rows)
    return Drawing(
        name=NAME,
        title=TITLE,
        caption=_caption(bool(accepting), bool(points)),
        alt=_alt(accepting, points),
        figure=figure,
        data=_data(accepting, points),
        wide=n_panels > 1,
    )


_Point = tuple[Row, dict[str, Any], Finding, Finding]


def _points(evidence: Evidence) -> list[_Point]:
    """Row, place, predicted and measured speed-up by wall clock."""
    found = []
    for row in evidence.rows:
        for measured in evidence.series(row, "speculation_speed", "speedup", clock="wall"):
            predicted = evidence.find(row, "speculation_speed", "predicted_speedup", **measured.coordinates)
            if predicted.value is not None:
                found.append((row, measured.coordinates, predicted, measured))
    return found


def _caption(accepting: bool, points: bool) -> str:
    parts = []
    if accepting:
        parts.append("How many steps wrote at least so many tokens, going on from the model's own text.")
    if points:
        parts.append(
            "Speed-up over plain decoding of the same weights, by batch and sampling (filled: greedy): above the solid "
            "line drafting pays, on the dashed one the cost model holds; bars are intervals."
        )
    return " ".join(parts)


def _alt(accepting: dict[Row, dict[int, Finding]], points: list[_Point]) -> str:
    told = [
        f"{row.name} accepts " + ", ".join(f"{notation.percent(known(curve[x]))} at {x}" for x in sorted(curve))
        for row, curve in accepting.items()
    ]
    told += [
        f"{row.name} at batch {at.get('batch')}, {at.get('sampling')}: speed-up {known(measured):.2f}, predicted "
        f"{known(predicted):.2f}"
        for row, at, predicted, measured in points
    ]
    return f"{TITLE}: {'; '.join(told)}."


def _data(accepting: dict[Row, dict[int, Finding]], points: list[_Point]) -> pd.DataFrame:
    lines: list[dict[str, Any]] = [
        {"row": row.name, "quantity": "acceptance", "position": x, "value": f.value, "low": f.low, "high": f.high}
        for row, curve in accepting.items()
        for x, f in sorted(curve.items())
    ]
    for row, at, predicted, measured in points:
        for name, finding in (("predicted_speedup", predicted), ("speedup", measured)):
            lines.append(
                {
                    "row": row.name, "quantity": name, "batch": at.get("batch"), "sampling": at.get("sampling"),
                    "value": finding.value, "low": finding.low, "high": finding.high,
                }
            )  # fmt: skip
    return pd.DataFrame(lines)
