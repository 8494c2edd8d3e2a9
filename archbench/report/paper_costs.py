"""Costs of configurations that papers printed and nobody trained here, beside the figures of those papers.

A figure is held against what was counted by the rule that the paper is understood to count by; where that gives another
number than the paper's, the line says so, and what is known of the reason. Ratios are shown as printed, as they follow
from the printed figures, which are rounded, and as they follow from what was counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from archbench.papers import Figure, Match, Measured, Papers
from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding
from archbench.report.grid import coverage
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell

METRIC = "design_cost"
APART = 0.02
"""A count further than this from the printed figure is flagged, unless it is the figure in all its digits."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure and what was counted here; `reason` says why nothing was. `counted` False: by the paper's own formula,
    since there is no such model here. `rounded` is a ratio of the printed figures."""

    figure: Figure
    value: float | None = None
    counted: bool = True
    rounded: float | None = None
    reason: str = ""

    @property
    def deviation(self) -> float | None:
        """Relative to the printed figure; None where the two are not the same quantity."""
        kin = self.figure.match is not None and self.figure.match.kin
        return None if self.value is None or kin else self.value / self.figure.value - 1

    @property
    def agrees(self) -> bool:
        """Whether the printed digits come out, from exact numbers or from printed ones."""
        return any(v is not None and self.figure.agreement(v) for v in (self.value, self.rounded))

    @property
    def flagged(self) -> bool:
        return self.deviation is not None and not self.agrees and abs(self.deviation) > APART


def designs(evidence: Evidence) -> set[Row]:
    """The rows of which nothing was asked that needs training."""
    asked: dict[Row, set[str]] = {}
    for record in evidence.records:
        asked.setdefault(evidence.row_of(record), set()).add(record.metric)
    return {row for row, metrics in asked.items() if metrics == {METRIC}}


def compare(evidence: Evidence, papers: Papers) -> list[Comparison]:
    """Every figure of which at least a part was counted in this run."""
    found = []
    for figure in papers.figures:
        if figure.ratio is not None:
            parts = [papers.figure(part) for part in figure.ratio]
            over = [_counted(evidence, part) for part in parts]
            if all(part.value is not None for part in over) and any(part.counted for part in over):
                value = (over[0].value or 0.0) / (over[1].value or 1.0)
                found.append(Comparison(figure=figure, value=value, rounded=parts[0].value / parts[1].value))
        elif (own := _counted(evidence, figure)).value is not None and own.counted:
            found.append(own)
    return found


def _counted(evidence: Evidence, figure: Figure) -> Comparison:
    if figure.match is None:
        reason = "no such model here" if figure.exact is not None else "not counted"
        return Comparison(figure=figure, value=figure.exact, counted=False, reason=reason)
    findings = [_finding(evidence, part, figure.match) for part in figure.match.of]
    below = None if figure.match.over is None else _finding(evidence, figure.match.over, figure.match)
    for finding in (*findings, *((below,) if below else ())):
        if finding.value is None:
            return Comparison(figure=figure, reason=finding.reason)
    total = sum(finding.value or 0.0 for finding in findings)
    return Comparison(figure=figure, value=total / (below.value or 1.0) if below else total)


def _finding(evidence: Evidence, part: Measured, match: Match) -> Finding:
    for row in evidence.rows:
        if (row.architecture, row.size) == (part.architecture, part.size):
            return evidence.find(row, METRIC, match.quantity, **match.at)
    return Finding(reason=f"{part.architecture} {part.size} is not in this run", status="absent")


def summary(evidence: Evidence, papers: Papers) -> tuple[str, ...]:
    """What came out, in a paragraph."""
    found = [comparison for comparison in compare(evidence, papers) if comparison.deviation is not None]
    count = len(designs(evidence))
    opening = f"{count} configurations were counted, none trained."
    if not found:
        return (f"{opening} None of their figures is among those of the papers.",)
    exact = [comparison for comparison in found if comparison.agrees]
    near = [c for c in found if not c.agrees and not c.flagged]
    far = sorted((c for c in found if c.flagged), key=lambda c: -abs(c.deviation or 0.0))
    text = (
        f"{opening} Of {len(found)} printed figures, {len(exact)} come out in all their digits, {len(near)} more "
        f"within {notation.share(APART)}, and {len(far)} do not"
    )
    if far:
        named = [f"{c.figure.of} ({notation.percent(c.deviation or 0.0, signed=True)})" for c in far]
        text += f": {notation.listed(named)}"
    return (f"{text}.",)


def design_tables(evidence: Evidence, papers: Papers) -> list[Table]:
    """A table a paper, then the costs of every configuration by our convention, and by candidates drawn."""
    rows = _ordered(evidence)
    if not rows:
        return []
    found = compare(evidence, papers)
    told = [*dict.fromkeys(comparison.figure.paper for comparison in found)]
    beside = [_beside(evidence, papers, [c for c in found if c.figure.paper == paper], paper) for paper in told]
    draws = _by_draws(evidence, rows, found, papers)
    return [*beside, _costs(evidence, rows), _states(evidence, rows), *([draws] if draws else [])]


def _ordered(evidence: Evidence) -> list[Row]:
    """Architectures together, each from small to large; workers answer in any order."""
    rows = [row for row in evidence.rows if evidence.planned(row, METRIC)]
    size = {row: evidence.find(row, METRIC, "parameters", kind="total").value or 0.0 for row in rows}
    return sorted(rows, key=lambda row: (row.architecture, row.label, size[row]))


def _beside(evidence: Evidence, papers: Papers, found: Sequence[Comparison], paper: str) -> Table:
    here = {comparison.figure.id for comparison in found}
    parts = {part for comparison in found for part in comparison.figure.ratio or ()}
    shown = [*found, *(_counted(evidence, papers.figure(part)) for part in parts - here)]
    order = {figure.id: position for position, figure in enumerate(papers.figures)}
    shown.sort(key=lambda comparison: order[comparison.figure.id])
    lines = [
        (
            table.text(comparison.figure.of, comparison.figure.source.partition(",")[2].strip()),
            TableCell(text=_plain(comparison.figure.value, comparison.figure.unit), sort=comparison.figure.value),
            _here(evidence, comparison),
            _ours(evidence, papers, comparison),
            table.text(comparison.figure.note or "none"),
        )
        for comparison in shown
    ]
    return Table(
        key=f"paper-{paper}",
        title=papers.citations[paper],
        columns=(
            Column(name="figure", numeric=False),
            Column(name="printed"),
            Column(name="counted by the same rule", hint="and how far that is from it"),
            Column(name="by our rule", hint="causal 1/2"),
            Column(name="note", numeric=False),
        ),
        lines=tuple(lines),
        notes=(
            f"Flagged: further than {notation.share(APART)} from the printed figure, and not its digits, rounded or "
            "cut off.",
        ),
    )


def _here(evidence: Evidence, comparison: Comparison) -> TableCell:
    figure, value = comparison.figure, comparison.value
    if value is None:
        return table.absent(comparison.reason)
    if not comparison.counted:
        return TableCell(text=_plain(value, figure.unit), detail="the paper's formula; no such model here", sort=value)
    more = ""
    if comparison.rounded is not None:
        printed = figure.agreement(comparison.rounded)
        more = f"of the printed figures {comparison.rounded:.4g}{f', {printed}' if printed else ''}"
    elif figure.match is not None and figure.match.at.get("part") == "lasting" and len(figure.match.of) == 1:
        whole = _finding(evidence, figure.match.of[0], replace(figure.match, at={**figure.match.at, "part": "all"}))
        more = "" if whole.value is None else f"with the open segment {_plain(whole.value, figure.unit)}"
    return TableCell(
        text=_plain(value, figure.unit),
        detail=_verdict(comparison),
        more=more,
        sort=value,
        flagged=comparison.flagged,
    )


def _verdict(comparison: Comparison) -> str:
    if comparison.deviation is None:
        return "not the same quantity"
    exact = comparison.figure.agreement(comparison.value or 0.0)
    return exact or notation.percent(comparison.deviation, signed=True)


def _ours(evidence: Evidence, papers: Papers, comparison: Comparison) -> TableCell:
    """The same quantity by the formulas beside the layers and with half of causal attention."""
    figure = comparison.figure
    parts = [papers.figure(part) for part in figure.ratio] if figure.ratio else [figure]
    if not any(part.match is not None and "count" in part.match.at for part in parts):
        return table.text("the same" if comparison.counted else "none")
    values = [_counted(evidence, _by_our_rule(part)).value for part in parts]
    if None in values:
        return table.absent("not counted")
    value = (values[0] or 0.0) / (values[1] or 1.0) if len(values) > 1 else values[0] or 0.0
    return TableCell(text=_plain(value, figure.unit), sort=value)


def _by_our_rule(figure: Figure) -> Figure:
    if figure.match is None:
        return figure
    convention = {"count": "analytic", "causal": 0.5}
    at = {name: convention.get(name, value) for name, value in figure.match.at.items()}
    return replace(figure, match=replace(figure.match, at=at))


def _plain(value: float, unit: str) -> str:
    """As papers write it: 2.91e8 FLOPs, 281.96 M parameters, 1,585,152 numbers."""
    if unit.startswith("FLOP"):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    if unit == "parameter":
        return f"{value / 1e6:,.2f}".rstrip("0").rstrip(".") + " M"
    if unit == "number":
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _costs(evidence: Evidence, rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        window = evidence.find(row, METRIC, "training_flops_per_token", count="analytic", causal=0.5)
        context = window.coordinates.get("context")
        at = {} if context is None else {"context": context}

        def cell(quantity: str, row: Row = row, at: dict[str, object] = at, **more: object) -> TableCell:
            return table.number(evidence.find(row, METRIC, quantity, **at, **more))

        lines.append(
            (
                table.text(row.name),
                table.number(evidence.find(row, METRIC, "parameters", kind="total")),
                table.number(evidence.find(row, METRIC, "parameters", kind="non_embedding")),
                table.text("none")
                if context is None
                else TableCell(text=notation.tokens(float(context)), sort=float(context)),
                cell("training_flops_per_token", count="analytic", causal=0.5),
                cell("training_flops_per_token", count="analytic", causal=1.0),
                cell("prefill_flops_per_token", count="analytic", causal=0.5),
                cell("decode_flops_per_token", count="analytic", attention="average", draws=1),
                cell("decode_flops_per_token", count="analytic", attention="full", draws=1),
                _agreement(evidence, row, "published"),
                _agreement(evidence, row, "stand-in"),
                coverage(evidence, row, METRIC, "training_flops_per_token"),
            )
        )
    return Table(
        key="designs",
        title="Costs by our count",
        columns=(
            Column(name="configuration", numeric=False),
            Column(name="parameters"),
            Column(name="non-embedding"),
            Column(name="context", hint="tokens"),
            Column(name="training", hint="FLOP/token, causal 1/2"),
            Column(name="training", hint="FLOP/token, causal 1"),
            Column(name="prefill", hint="FLOP/token, causal 1/2"),
            Column(name="decode", hint="FLOP/token, average context"),
            Column(name="decode", hint="FLOP/token, full context"),
            Column(name="formula, meta", hint="largest difference"),
            Column(name="all three, smaller", hint="largest difference"),
            Column(name="operators met", hint="calls of a training step", numeric=False),
        ),
        lines=tuple(lines),
        notes=(
            "By the formulas beside the layers; traced on the meta device at the same size, and run at the smallest "
            "size with the same choices, where all three counts must agree. Flagged: more than "
            f"{notation.share(APART)} apart.",
            "A decode step that can write several tokens is charged to all of them, as if all were kept.",
        ),
    )


def _agreement(evidence: Evidence, row: Row, scale: str) -> TableCell:
    """The worst of the three works."""
    found = evidence.series(row, METRIC, "flops_disagreement", scale=scale)
    if not found:
        return table.number(evidence.missing(row, METRIC, "flops_disagreement", scale=scale))
    worst = max(found, key=lambda finding: finding.value or 0.0)
    return TableCell(
        text=notation.percent(worst.value or 0.0),
        sort=worst.value,
        flagged=(worst.value or 0.0) > APART,
    )


def _states(evidence: Evidence, rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        for held in evidence.series(row, METRIC, "state_numbers", part="all"):
            at = {"context": held.coordinates["context"]}
            lasting = evidence.find(row, METRIC, "state_numbers", part="lasting", **at)
            lines.append(
                (
                    table.text(row.name),
                    TableCell(text=notation.tokens(at["context"]), sort=float(at["context"])),
                    _digits(lasting),
                    _digits(held),
                    table.number(evidence.find(row, METRIC, "state_bytes", part="all", **at)),
                )
            )
    return Table(
        key="design-states",
        title="State of one row",
        columns=(
            Column(name="configuration", numeric=False),
            Column(name="context", hint="tokens"),
            Column(name="lasting", hint="numbers"),
            Column(name="with the open segment", hint="numbers"),
            Column(name="bytes", hint="of all, fp32"),
        ),
        lines=tuple(lines),
        notes=("Lasting: what is carried from segment to segment, which papers call memory.",),
    )


def _digits(finding: Finding) -> TableCell:
    cell = table.number(finding)
    return cell if finding.value is None else TableCell(text=f"{finding.value:,.0f}", sort=finding.value)


def _by_draws(evidence: Evidence, rows: Sequence[Row], found: Sequence[Comparison], papers: Papers) -> Table | None:
    """Of models that choose among candidates where others have probabilities."""
    series = {row: _draws(evidence, row) for row in rows}
    columns = sorted({draws for costs in series.values() for draws in costs})
    if len(columns) < 2:
        return None
    lines = tuple(
        (
            table.text(row.name),
            *(table.number(costs[draws]) if draws in costs else table.absent("not counted") for draws in columns),
        )
        for row, costs in series.items()
        if len(costs) > 1
    )
    return Table(
        key="draws",
        title="Writing a token, by candidates drawn",
        columns=(
            Column(name="configuration", numeric=False),
            *(
                Column(name=f"{draws} draw{'s' if draws > 1 else ''}", hint="FLOP/token, full context")
                for draws in columns
            ),
        ),
        lines=lines,
        notes=(
            "A model without probabilities writes at temperature 1 with one draw. Below that it draws candidates and "
            "chooses among them: a fixed number in a batch, at any temperature. The exact method at temperature 1/n "
            "draws n / sum P^n on average, P being the law of its next step, which is at least n / p^(n-1) with p its "
            "largest probability; so no count can be given without the text.",
            *_break_even(evidence, found, papers, columns),
        ),
    )


def _draws(evidence: Evidence, row: Row) -> dict[int, Finding]:
    found = evidence.series(row, METRIC, "decode_flops_per_token", count="analytic", attention="full")
    longest = max((f.coordinates["context"] for f in found), default=None)
    return {f.coordinates["draws"]: f for f in found if f.coordinates["context"] == longest}


def _break_even(
    evidence: Evidence, found: Sequence[Comparison], papers: Papers, counted: Sequence[int]
) -> Iterator[str]:
    """For each printed ratio of writing costs, the draws at which it would be 1; every draw costs the same."""
    for comparison in found:
        if comparison.figure.ratio is None:
            continue
        first, second = (papers.figure(part) for part in comparison.figure.ratio)
        if first.match is None or "draws" not in first.match.at:
            continue
        rival = _counted(evidence, second).value
        one, most = (
            _counted(evidence, replace(first, match=replace(first.match, at={**first.match.at, "draws": draws}))).value
            for draws in (1, counted[-1])
        )
        if rival is None or one is None or most is None:
            continue
        draws = 1 + (rival - one) * (counted[-1] - 1) / (most - one)
        yield f"At {draws:.1f} draws, {first.of} reach {second.of}."
