"""Two sets of records held against each other, tiers 0 and 1. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from archbench.errors import GateError
from archbench.gate import ledger, quality
from archbench.gate.hosts import described, same_processor
from archbench.gate.noise import UNKNOWN, Noise
from archbench.gate.points import Point, gated, why_missing
from archbench.gate.quantities import rule_of
from archbench.gate.verdict import Comparison, FailOn, Finding
from archbench.record import Record

_OF_ANY_TEXT = ("cost",)
"""Metrics whose numbers do not depend on what the text says."""


def compare(
    baseline: Sequence[Record],
    current: Sequence[Record],
    *,
    title: str,
    fail_on: FailOn,
    tiers: Collection[int] = (0, 1),
    noise: Noise = UNKNOWN,
) -> Comparison:
    """All findings of these tiers, the worst first.

    Raises:
        GateError: the two have no cell in common, or no quantity that is gated.
    """
    before, now = gated(baseline), gated(current)
    _require_common(baseline, current, before)
    pairs = {point: (before[point], now[point]) for point in before.keys() & now.keys()}
    pairs = {point: pairs[point] for point in sorted(pairs)}
    findings: list[Finding] = []
    notes = [_where(*next(iter(pairs.values())))] if pairs else []
    if 0 in tiers:
        untold: Counter[str] = Counter()
        for point, (b, c) in pairs.items():
            if _tier(c) == 0:
                found = None if _other_text(point, b, c) else ledger.hold(point, b, c)
                if found is None:
                    untold["the text is another" if _other_text(point, b, c) else ledger.untold(b, c)] += 1
                else:
                    findings.append(found)
        findings += ledger.kernels(pairs)
        notes += [f"{n} counts were not held against the baseline's: {reason}" for reason, n in untold.items()]
    if 1 in tiers:
        asked = {point: pair for point, pair in pairs.items() if _tier(pair[1]) == 1}
        findings += quality.hold_all(asked, pairs, noise)
        if noise is UNKNOWN and any(f.margin is not None for f in findings):
            notes.append("no noise file: margins are 0.5 % of the baseline; `archbench noise SUITE` measures them")
    findings += _unmatched(before, now, current, tiers)
    findings.sort(key=lambda f: (not f.blocks(fail_on), f.verdict == "same", f.tier))
    return Comparison(title=title, findings=findings, fail_on=fail_on, notes=notes)


def _unmatched(
    before: dict[Point, Record], now: dict[Point, Record], current: Sequence[Record], tiers: Collection[int]
) -> list[Finding]:
    findings = []
    for point in sorted(before.keys() ^ now.keys()):
        gone = point in before
        record = before[point] if gone else now[point]
        if _tier(record) not in tiers:
            continue
        findings.append(
            Finding(
                tier=_tier(record),
                cell=point.cell,
                quantity=f"{point.metric}: {point.name}",
                verdict="vanished" if gone else "new",
                baseline=record.value if gone else None,
                current=None if gone else record.value,
                unit=record.unit,
                note=why_missing(point, current) if gone else "",
            )
        )
    return findings


def _require_common(baseline: Sequence[Record], current: Sequence[Record], before: dict[Point, Record]) -> None:
    cells = [sorted({point.cell for point in map(_cell_of, side)}) for side in (baseline, current)]
    if not set(cells[0]) & set(cells[1]):
        shown = [", ".join(names[:4]) + (", ..." if len(names) > 4 else "") for names in cells]
        raise GateError(f"no cell in common: the baseline has {shown[0]}; now there are {shown[1]}")
    if not before:
        raise GateError("the baseline has no quantity that is compared (times of separate runs are not)")


def _cell_of(record: Record) -> Point:
    return Point(record.label, record.size, record.codec, record.seed, "", "", "{}")


def _tier(record: Record) -> int:
    rule = rule_of(record)
    assert rule is not None, record.quantity
    return rule.tier


def _other_text(point: Point, baseline: Record, current: Record) -> bool:
    return point.metric not in _OF_ANY_TEXT and baseline.data_sha256 != current.data_sha256


def _where(baseline: Record, current: Record) -> str:
    if same_processor(baseline, current):
        return f"both on {described(current)}: equal code gives equal numbers"
    return f"now on {described(current)}; baseline on {described(baseline)}: equal within the noise is asked for"
