"""Figures against context: time per token, time to first token and state bytes, with the crossovers marked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from archbench.report import drawing, notation
from archbench.report.crossings import Crossing, crossings, on_floor
from archbench.report.drawing import Drawing, Omitted
from archbench.report.evidence import Evidence, Finding, known, separated
from archbench.report.levels import compared
from archbench.report.palette import Style, one_a_label
from archbench.report.rows import Row

_MOST_PANELS = 3
_MOST_RINGS = 4
"""Of more crossovers than this in one panel, only those where the cheapest of all changes are marked."""
_MOST_SENTENCES = 3


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What is drawn. `noisy` quantities have intervals; `panel` is the coordinate that makes one panel each."""

    name: str
    title: str
    metric: str
    quantity: str
    axis: str
    unit: str
    at: dict[str, Any]
    panel: str | None
    noisy: bool


TIME_PER_TOKEN = Quantity(
    name="time_per_token",
    title="Time per generated token against context",
    metric="latency",
    quantity="time_per_token",
    axis="time per token",
    unit="s/token",
    at={"clock": "wall"},
    panel="batch",
    noisy=True,
)
TIME_TO_FIRST_TOKEN = Quantity(
    name="time_to_first_token",
    title="Time to first token against context",
    metric="latency",
    quantity="time_to_first_token",
    axis="time to first token",
    unit="s",
    at={"clock": "wall"},
    panel="batch",
    noisy=True,
)
STATE_BYTES = Quantity(
    name="state_bytes",
    title="State bytes against context",
    metric="cost",
    quantity="state_bytes",
    axis="state of one row",
    unit="B",
    at={},
    panel=None,
    noisy=False,
)
Curves = dict[Row, dict[float, Finding]]


def against_context(
    evidence: Evidence, styles: dict[Row, Style], what: Quantity
) -> tuple[Drawing | Omitted, list[str]]:
    """The figure, and sentences about the crossovers of its first panel, or of every size where there are several."""
    found_at = panels_of(evidence, what)
    if not found_at:
        rows = evidence.architectures
        missing = [evidence.missing(row, what.metric, what.quantity, **what.at) for row in rows]
        return drawing.omitted(what.name, what.title, missing), []
    panels = _by_size(found_at, what)
    several = len({row.size for curves in panels.values() for row in curves}) > 1
    smallest = list(_by_size(dict([next(iter(found_at.items()))]), what))
    keys = _chosen(smallest if several else list(panels))
    told = [key for key in keys if key in smallest]
    rows = [row for row in evidence.architectures if any(row in panels[key] for key in keys)]
    styles, rows = one_a_label(styles, rows)
    figure, axes = drawing.canvas(len(keys), legend=[row.name for row in rows])
    found = {key: _crossings(panels[key], what.noisy) for key in keys}
    everything = [f for key in keys for curve in panels[key].values() for f in curve.values()]
    values = [v for f in everything for v in (f.value, f.low, f.high) if v is not None and v > 0]
    floor = min((known(f) for f in everything if known(f) > 0), default=1.0)
    values = [value for value in values if value > floor / 20]  # a t interval of two seeds can reach far below
    for index, (panel, key) in enumerate(zip(axes, keys, strict=True)):
        drawing.log_axis(panel, "y", values, what.unit)
        _curves(panel, panels[key], styles)
        drawing.context_axis(panel, [x for curve in panels[key].values() for x in curve])
        _mark(panel, found[key].marked)
        if key:
            panel.set_title(key)
        if index == 0:
            panel.set_ylabel(what.axis)
    drawing.legend(figure, styles, rows)
    sentences = []
    for key in told:
        at = f" at {key}" if len(keys) > 1 else ""
        most = max(1, _MOST_SENTENCES // len(told))
        sentences += [_sentence(crossing, what.axis, at) for crossing in found[key].marked[:most]]
        sentences += _always_lowest(panels[key], what, at)
    return Drawing(
        name=what.name,
        title=what.title,
        caption=_caption(what, found, keys, list(panels)),
        alt=_alt(what, {row: curve for key in told for row, curve in panels[key].items()}),
        figure=figure,
        data=_data(what, found_at),
        wide=len(keys) > 1,
    ), sentences


def panels_of(evidence: Evidence, what: Quantity) -> dict[Any, Curves]:
    """The curves of each panel; of one without a panel coordinate, under None."""
    panels: dict[Any, Curves] = {}
    level = compared(evidence) if what.metric == "latency" else {}
    for row in evidence.architectures:
        for finding in evidence.series(row, what.metric, what.quantity, **what.at, **level):
            context = finding.coordinates.get("context")
            if context is None or float(context) <= 0 or known(finding) <= 0:
                continue
            key = finding.coordinates.get(what.panel) if what.panel else None
            panels.setdefault(key, {}).setdefault(row, {})[float(context)] = finding
    return dict(sorted(panels.items(), key=lambda item: (item[0] is not None, item[0])))


def _by_size(panels: dict[Any, Curves], what: Quantity) -> dict[str, Curves]:
    """The curves of each panel by its title: one a size where there are several, since sizes are not compared."""
    sizes = list(dict.fromkeys(row.size for curves in panels.values() for row in curves))
    found: dict[str, Curves] = {}
    for key, curves in panels.items():
        for size in sizes:
            words = [f"size {size}"] if len(sizes) > 1 else []
            words += [f"{what.panel} {key}"] if key is not None else []
            mine = {row: curve for row, curve in curves.items() if row.size == size}
            if mine:
                found[", ".join(words)] = mine
    return found


def _chosen(keys: list[str]) -> list[str]:
    """All panels, or the smallest, the middle and the largest."""
    return keys if len(keys) <= _MOST_PANELS else [keys[0], keys[len(keys) // 2], keys[-1]]


def _curves(panel: Axes, curves: Curves, styles: dict[Row, Style]) -> None:
    bottom, top = panel.get_ylim()
    for row, curve in curves.items():
        look = styles[row]
        xs = sorted(curve)
        panel.plot(
            xs,
            [known(curve[x]) for x in xs],
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markerfacecolor=look.face,
        )
        banded = [x for x in xs if curve[x].has_interval]
        if banded:
            low = [max(curve[x].low or bottom, bottom) for x in banded]
            high = [min(curve[x].high or top, top) for x in banded]
            if len(banded) == 1:
                panel.vlines(banded, low, high, color=look.colour, alpha=0.5, linewidth=4)
            else:
                panel.fill_between(banded, low, high, color=look.colour, alpha=0.18, linewidth=0)


@dataclass(frozen=True, kw_only=True)
class _Crossovers:
    """`marked` are drawn and told; `others` counts resolved ones that are not; `noise` those within the intervals."""

    marked: list[Crossing]
    others: int
    noise: int


def _crossings(curves: Curves, noisy: bool) -> _Crossovers:
    """The crossovers within each arena: across sizes or corpora they mean nothing."""
    marked: list[Crossing] = []
    others = noise = 0
    for arena in dict.fromkeys(row.arena for row in curves):
        named = {row.name: curve for row, curve in curves.items() if row.arena == arena}
        found = crossings(named, noisy)
        resolved = [crossing for crossing in found if crossing.resolved]
        kept = resolved if len(resolved) <= _MOST_RINGS else [c for c in resolved if on_floor(c, named)]
        marked += kept
        others += len(resolved) - len(kept)
        noise += len(found) - len(resolved)
    return _Crossovers(marked=sorted(marked, key=lambda crossing: crossing.x), others=others, noise=noise)


def _mark(panel: Axes, marked: list[Crossing]) -> None:
    left, right = panel.get_xlim()
    for index, crossing in enumerate(marked):
        panel.plot(
            [crossing.x], [crossing.y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor="#22262B",
            markeredgewidth=1.1, zorder=5,
        )  # fmt: skip
        if len(marked) > _MOST_RINGS:
            continue
        above = index % 2 == 0
        near_right = crossing.x > left**0.2 * right**0.8
        panel.annotate(
            notation.tokens(crossing.x),
            (crossing.x, crossing.y),
            xytext=(0 if not near_right else -4, 13 if above else -13),
            textcoords="offset points",
            ha="right" if near_right else "center",
            va="bottom" if above else "top",
            fontsize=9,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            zorder=6,
        )


def _sentence(crossing: Crossing, axis: str, at: str) -> str:
    span = between(crossing)
    return (
        f"{axis[0].upper()}{axis[1:]}{at}: {crossing.cheaper_before} is lower up to ≈ {notation.tokens(crossing.x)} "
        f"tokens of context, then {crossing.cheaper_after}{span and f' (95 % interval: {span})'}."
    )


def between(crossing: Crossing) -> str:
    """`850 to 1.1K`: the interval of a crossing's context; "" where it has none."""
    if crossing.low is None or crossing.high is None:
        return ""
    if crossing.low > 0 and crossing.high < math.inf:
        return f"{notation.tokens(crossing.low)} to {notation.tokens(crossing.high)}"
    low = f"above {notation.tokens(crossing.low)}" if crossing.low > 0 else ""
    high = f"below {notation.tokens(crossing.high)}" if crossing.high < math.inf else ""
    return low or high or "anywhere, or nowhere"


def _always_lowest(curves: Curves, what: Quantity, at: str) -> list[str]:
    """A sentence for each arena in which one row is the lowest at every context, beyond the intervals."""
    sentences = []
    for arena in dict.fromkeys(row.arena for row in curves):
        among = {row: curve for row, curve in curves.items() if row.arena == arena}
        contexts = sorted(set.intersection(*(set(curve) for curve in among.values())))
        for row, curve in among.items():
            others = [other for name, other in among.items() if name != row]
            clear = all(
                known(curve[x]) < known(other[x]) and (not what.noisy or separated(curve[x], other[x]))
                for other in others
                for x in contexts
            )
            if others and contexts and clear:
                span = " to ".join(dict.fromkeys(notation.tokens(x) for x in (contexts[0], contexts[-1])))
                axis = f"{what.axis[0].upper()}{what.axis[1:]}{at}"
                sentences.append(f"{axis}: {row.name} is lowest at every context measured ({span} tokens).")
    return sentences


def _caption(what: Quantity, found: dict[str, _Crossovers], keys: list[str], every: list[str]) -> str:
    parts = ["Wall-clock medians; bands are intervals." if what.noisy else "Measured from the live state."]
    if any(found[key].marked for key in keys):
        parts.append(
            "Rings mark crossovers, interpolated between the contexts measured"
            + ("; in brackets 95 % intervals." if what.noisy else ".")
        )
    for key in keys:
        at = f"At {key}" if key and len(keys) > 1 else ""
        told = [
            f"{c.cheaper_after} below {c.cheaper_before} from {notation.tokens(c.x)}{between(c) and f' ({between(c)})'}"
            for c in found[key].marked
        ]
        if told:
            parts.append(f"{at}: {', '.join(told)}." if at else f"{', '.join(told)}.")
        if found[key].others:
            parts.append(f"{found[key].others} more{at and f' {at.lower()}'} among those that are not the cheapest.")
        if found[key].noise:
            parts.append(f"{found[key].noise} more{at and f' {at.lower()}'} within the noise, not marked.")
    if not any(c.marked or c.others or c.noise for c in found.values()):
        parts.append("No curves cross within the contexts measured.")
    if len(every) > len(keys):
        parts.append(f"Not drawn, but in the CSV: {notation.listed([key for key in every if key not in keys])}.")
    return " ".join(parts)


def _alt(what: Quantity, curves: Curves) -> str:
    ends = []
    for row, curve in curves.items():
        first, last = min(curve), max(curve)
        ends.append(
            f"{row.name} from {notation.plain(known(curve[first]), what.unit)} at {notation.tokens(first)} "
            f"to {notation.plain(known(curve[last]), what.unit)} at {notation.tokens(last)}"
        )
    return f"{what.title}: {'; '.join(ends)}."


def _data(what: Quantity, panels: dict[Any, Curves]) -> pd.DataFrame:
    lines = [
        {
            "row": row.name,
            "label": row.label,
            "size": row.size,
            **({what.panel: key} if what.panel else {}),
            "context": int(context),
            f"{what.quantity} ({what.unit})": finding.value,
            "low": finding.low,
            "high": finding.high,
            "n": finding.n,
            "seeds": finding.seeds,
        }
        for key, curves in panels.items()
        for row, curve in curves.items()
        for context, finding in sorted(curve.items())
    ]
    return pd.DataFrame(lines)
