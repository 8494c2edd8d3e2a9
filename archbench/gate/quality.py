"""Tier 1: quality. Equal numbers need no test; others are tested for being worse, better, and equivalent.

The pairs are seeds where there are three of them, else the documents or items that both versions were asked. The margin
of an equivalence is `Noise.margin`: three standard deviations over seeds, or half a percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from archbench.gate.hosts import same_processor
from archbench.gate.noise import Noise
from archbench.gate.points import Point
from archbench.gate.quantities import rule_of
from archbench.gate.significance import ALPHA, Difference, fewest_lost, holm, mcnemar, over_seeds, paired
from archbench.gate.verdict import Finding, Verdict
from archbench.record import Record

SAME = 1e-6
"""Relative difference up to which two numbers count as equal: they are kept with more digits than they deserve."""
ENOUGH_SEEDS = 3

Pairs = dict[Point, tuple[Record, Record]]


@dataclass(frozen=True)
class _Question:
    """A finding waiting for the correction for the number of questions: the probabilities of a difference this bad and
    this good from one within the margin, and of one this small from one outside."""

    finding: Finding
    worse: float
    better: float
    apart: float


def hold_all(pairs: Pairs, everything: Pairs, noise: Noise, alpha: float = ALPHA) -> list[Finding]:
    """The verdicts on `pairs`. `everything` also has the weights of documents."""
    settled: list[Finding] = []
    questions: list[_Question] = []
    groups: dict[Point, list[tuple[Point, Record, Record]]] = {}
    for point, (baseline, current) in pairs.items():
        groups.setdefault(point._replace(seed=-1), []).append((point, baseline, current))
    for group in groups.values():
        open_ones = []
        for point, baseline, current in group:
            reason = _incomparable(baseline, current)
            if reason:
                settled.append(_finding(point, baseline, current, "incomparable", note=reason))
            elif _equal(baseline, current):
                settled.append(_finding(point, baseline, current, "same"))
            else:
                open_ones.append((point, baseline, current))
        if len(open_ones) >= ENOUGH_SEEDS and not _items(open_ones[0][2]):
            questions.append(_over_seeds(open_ones, noise))
        else:
            questions += [_asked(*one, everything, noise) for one in open_ones]
    return settled + _answered(questions, alpha)


def _answered(questions: Sequence[_Question], alpha: float) -> list[Finding]:
    worse = holm([question.worse for question in questions])
    better = holm([question.better for question in questions])
    return [_verdict(question, w, b, alpha) for question, w, b in zip(questions, worse, better, strict=True)]


def _verdict(question: _Question, worse: float, better: float, alpha: float) -> Finding:
    finding = question.finding
    if worse < alpha:
        return replace(finding, verdict="regressed", p=worse)
    if better < alpha:
        note = "better than noise explains: a leak, or an improvement to be accepted"
        return replace(finding, verdict="improved", p=better, note=note)
    if question.apart < alpha:
        if finding.exact:
            return replace(
                finding, verdict="changed", p=worse, note="other numbers on such a machine, within the margin"
            )
        return replace(finding, verdict="fine", p=worse)
    return replace(finding, verdict="undecided", p=worse)


def _asked(point: Point, baseline: Record, current: Record, everything: Pairs, noise: Noise) -> _Question:
    if _items(current) and _items(baseline) and len(baseline.samples) == len(current.samples):
        return _of_items(point, baseline, current)
    return _within(point, baseline, current, _difference(point, baseline, current, everything), noise)


def _difference(point: Point, baseline: Record, current: Record, everything: Pairs) -> Difference:
    """The difference of two numbers, and how much of it is chance."""
    assert baseline.value is not None and current.value is not None
    sign = -1.0 if current.better == "higher" else 1.0
    plain = Difference(mean=sign * (current.value - baseline.value), error=0.0, freedom=1)
    rule = rule_of(current)
    assert rule is not None
    n = len(current.samples)
    if rule.kind == "value" or n < 2 or n != len(baseline.samples):
        return plain
    weights = [1.0] * n
    if rule.weights:
        weighing = everything.get(point._replace(quantity=rule.weights))
        if weighing is None or weighing[0].samples != weighing[1].samples or len(weighing[0].samples) != n:
            return plain
        weights = weighing[1].samples
    found = paired(baseline.samples, current.samples, weights, sign)
    return replace(found, mean=plain.mean)


def _within(point: Point, baseline: Record, current: Record, difference: Difference, noise: Noise) -> _Question:
    assert baseline.value is not None
    margin = noise.margin(point.key, baseline.value)
    low, high = difference.interval()
    finding = replace(
        _finding(point, baseline, current, "undecided"),
        low=low,
        high=high,
        margin=margin,
        detectable=difference.detectable(margin),
    )
    return _Question(finding, difference.p_above(margin), difference.p_below(-margin), difference.p_equivalent(margin))


def _over_seeds(group: Sequence[tuple[Point, Record, Record]], noise: Noise) -> _Question:
    """One question of all seeds together."""
    point, baseline, current = group[0]
    sign = -1.0 if current.better == "higher" else 1.0
    before = [b.value for _, b, _ in group if b.value is not None]
    now = [c.value for _, _, c in group if c.value is not None]
    difference = over_seeds([sign * (c - b) for b, c in zip(before, now, strict=True)])
    question = _within(point, _mean(baseline, before), _mean(current, now), difference, noise)
    cell = f"{point.label}/{point.size}/{len(group)} seeds"
    return replace(question, finding=replace(question.finding, cell=cell))


def _mean(record: Record, values: Sequence[float]) -> Record:
    return replace(record, value=math.fsum(values) / len(values), samples=[])


def _of_items(point: Point, baseline: Record, current: Record) -> _Question:
    """McNemar's test has no margin: what is not worse, and could have been found to be, is fine."""
    n_lost = sum(before > now for before, now in zip(baseline.samples, current.samples, strict=True))
    n_won = sum(before < now for before, now in zip(baseline.samples, current.samples, strict=True))
    n = len(current.samples)
    finding = replace(
        _finding(point, baseline, current, "undecided", note=f"{n_lost} of {n} items lost, {n_won} won"),
        detectable=fewest_lost() / n if n else None,
    )
    return _Question(finding, mcnemar(n_lost, n_won), mcnemar(n_won, n_lost), 0.0 if n >= fewest_lost() else 1.0)


def _items(record: Record) -> bool:
    rule = rule_of(record)
    return rule is not None and rule.kind == "items" and set(record.samples) <= {0.0, 1.0} and bool(record.samples)


def _incomparable(baseline: Record, current: Record) -> str:
    """Why two numbers are of different things; "" when they are of the same."""
    if baseline.metric_version != current.metric_version:
        return f"version {current.metric_version} of the metric, in the baseline {baseline.metric_version}"
    if baseline.data_sha256 != current.data_sha256:
        return f"another text ({current.corpus} {current.data_sha256[:8]}, in the baseline {baseline.data_sha256[:8]})"
    if baseline.unit != current.unit:
        return f"in {current.unit}, in the baseline in {baseline.unit}"
    for name in sorted(baseline.settings.keys() & current.settings.keys()):
        before, now = baseline.settings[name], current.settings[name]
        if before != now:
            return f"measured with {name} {now}, in the baseline {before}"
    return ""


def _equal(baseline: Record, current: Record) -> bool:
    assert baseline.value is not None and current.value is not None
    return math.isclose(baseline.value, current.value, rel_tol=SAME)


def _finding(point: Point, baseline: Record, current: Record, verdict: Verdict, note: str = "") -> Finding:
    return Finding(
        tier=1,
        cell=point.cell,
        quantity=point.name,
        verdict=verdict,
        baseline=baseline.value,
        current=current.value,
        unit=current.unit,
        exact=same_processor(baseline, current),
        note=note,
    )
