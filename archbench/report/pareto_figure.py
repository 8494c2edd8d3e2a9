"""Pareto fronts: quality against what it costs to use, one panel a cost; what nothing beats on both is on the front."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from archbench.report import drawing
from archbench.report.budget import largest_shared_context
from archbench.report.drawing import Drawing, Omitted
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.levels import compared
from archbench.report.palette import Style
from archbench.report.rows import Row

NAME, TITLE = "pareto", "Quality against the cost of use"
STATE = "reset"


def pareto_figure(evidence: Evidence, styles: Mapping[Row, Style]) -> Drawing | Omitted:
    """Bits per byte against time per token and against memory of the state, at the longest context all rows have."""
    rows = evidence.architectures
    bits = {row: evidence.find(row, "likelihood", "bits_per_byte", state=STATE) for row in rows}
    context = largest_shared_context(evidence, rows)
    at = {} if context is None else {"context": context}
    timed = {"clock": "wall", "batch": 1, **at, **compared(evidence)}
    costs: dict[str, tuple[str, Callable[[Row], Finding]]] = {
        "time per token": (
            "s/token", lambda row: evidence.find(row, "latency", "time_per_token", **timed),
        ),
        "state of one row": ("B", lambda row: evidence.find(row, "cost", "state_bytes", **at)),
    }  # fmt: skip
    panels: dict[str, dict[Row, tuple[Finding, Finding]]] = {}
    for name, (_, find) in costs.items():
        pairs = {row: (find(row), bits[row]) for row in rows}
        drawn = {row: (c, b) for row, (c, b) in pairs.items() if c.value and b.value is not None}
        if len(drawn) > 1:
            panels[name] = drawn
    if not panels:
        return drawing.omitted(NAME, TITLE, list(bits.values()))
    shown = list(dict.fromkeys(row for drawn in panels.values() for row in drawn))
    figure, axes = drawing.canvas(len(panels), legend=[row.name for row in shown])
    lines = []
    for panel, (name, drawn) in zip(axes, panels.items(), strict=True):
        drawing.log_axis(panel, "x", [known(cost) for cost, _ in drawn.values()], costs[name][0], least_factor=3.0)
        best = front({row: (known(cost), known(b)) for row, (cost, b) in drawn.items()})
        panel.step(
            [known(drawn[row][0]) for row in best], [known(drawn[row][1]) for row in best],
            where="post", color="#8A919C", linewidth=1.0, zorder=2,
        )  # fmt: skip
        for row, (cost, b) in drawn.items():
            look = styles[row]
            panel.errorbar(
                [known(cost)], [known(b)], xerr=_bars(cost), yerr=_bars(b), color=look.colour, marker=look.marker,
                markerfacecolor=look.face, markersize=7, capsize=2, elinewidth=1.0, linestyle="none", zorder=4,
            )  # fmt: skip
            lines.append(
                {
                    "cost": name, "row": row.name, "size": row.size, "value": cost.value, "low": cost.low,
                    "high": cost.high, "bits_per_byte": b.value, "bits_low": b.low, "bits_high": b.high,
                    "on_front": row in best, "surely_beaten": beaten(drawn, row),
                }
            )  # fmt: skip
        panel.set_xlabel(name + ("" if context is None else f" after {context} tokens"))
    axes[0].set_ylabel(f"bits per byte ({STATE})")
    drawing.legend(figure, dict(styles), shown, marks="points")
    told = "; ".join(
        f"by {name} {', '.join(row.name for row in front({r: (known(c), known(b)) for r, (c, b) in drawn.items()}))}"
        for name, drawn in panels.items()
    )
    sure = sorted({row.name for drawn in panels.values() for row in drawn if not beaten(drawn, row)})
    return Drawing(
        name=NAME,
        title=TITLE,
        caption="Lower left is better; bars are intervals. On the grey front nothing else is better in both. Within "
        f"the intervals these may be on a front: {', '.join(sure)}.",
        alt=f"{TITLE}: on the front {told}.",
        figure=figure,
        data=pd.DataFrame(lines),
        wide=len(panels) > 1,
    )


def front(points: Mapping[Row, tuple[float, float]]) -> list[Row]:
    """The rows that no other row beats in one of (cost, loss) and equals in the other, by rising cost."""
    best: list[Row] = []
    lowest = float("inf")
    for row in sorted(points, key=lambda row: points[row]):
        if points[row][1] < lowest:
            best.append(row)
            lowest = points[row][1]
    return best


def beaten(drawn: Mapping[Row, tuple[Finding, Finding]], row: Row) -> bool:
    """Whether some other row is below this one in both, beyond the intervals of both."""
    cost, bits = drawn[row]
    return any(_high(c) < _low(cost) and _high(b) < _low(bits) for other, (c, b) in drawn.items() if other != row)


def _low(finding: Finding) -> float:
    return known(finding) if finding.low is None else finding.low


def _high(finding: Finding) -> float:
    return known(finding) if finding.high is None else finding.high


def _bars(finding: Finding) -> list[list[float]] | None:
    if finding.low is None or finding.high is None:
        return None
    value = known(finding)
    return [[max(0.0, value - finding.low)], [max(0.0, finding.high - value)]]
