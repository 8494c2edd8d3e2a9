"""Tier 0: what never varies. Every change is a finding; the baseline file, rewritten in the same commit, acknowledges
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from archbench.gate.hosts import same_processor, same_software, torch_of
from archbench.gate.points import Point
from archbench.gate.quantities import rule_of
from archbench.gate.verdict import Finding
from archbench.record import Record

COUNT_TOLERANCE = 1e-12
"""Relative; counts are integers, or ratios of integers."""
NEAR_HERE, NEAR_ELSEWHERE = 1e-5, 1e-3
"""Relative tolerance of the first step's numbers, on the same class of processor and on another: a sum of fp32 numbers
may be added up in another order."""


def hold(point: Point, baseline: Record, current: Record) -> Finding | None:
    """What became of one number of the ledger; None where it cannot be told on this machine."""
    rule = rule_of(current)
    assert rule is not None and rule.tier == 0, point
    if rule.kind == "traced" and not same_software(baseline, current):
        return None
    if rule.kind == "near":
        tolerance = NEAR_HERE if same_processor(baseline, current) else NEAR_ELSEWHERE
    else:
        tolerance = COUNT_TOLERANCE
    said = list(_differences(baseline, current, tolerance))
    return Finding(
        tier=0,
        cell=point.cell,
        quantity=point.name,
        verdict="changed" if said else "same",
        baseline=baseline.value,
        current=current.value,
        unit=current.unit,
        note="; ".join(said),
    )


def kernels(pairs: dict[Point, tuple[Record, Record]]) -> Iterator[Finding]:
    """Kernel levels that differ between two runs on one class of processor: a step down is a regression that no count
    shows."""
    seen: set[tuple[str, str]] = set()
    for point, (baseline, current) in pairs.items():
        if not same_processor(baseline, current):
            continue
        for operation in sorted(baseline.backend.keys() | current.backend.keys()):
            before, now = (r.backend.get(operation, "not run") for r in (baseline, current))
            if before != now and (point.cell, operation) not in seen:
                seen.add((point.cell, operation))
                note = f"ran at level '{now}', in the baseline at '{before}'"
                yield Finding(tier=0, cell=point.cell, quantity=f"kernel of {operation}", verdict="changed", note=note)


def untold(baseline: Record, current: Record) -> str:
    """Why counts of what ran cannot be held against each other here."""
    if torch_of(baseline) != torch_of(current):
        return f"the baseline ran on torch {torch_of(baseline) or 'unknown'}, this on {torch_of(current) or 'unknown'}"
    return f"the baseline's kernels were {_levels(baseline)}, here they are {_levels(current)}"


def _levels(record: Record) -> str:
    return ", ".join(f"{operation} {level}" for operation, level in sorted(record.backend.items())) or "none"


def _differences(baseline: Record, current: Record, tolerance: float) -> Iterator[str]:
    assert baseline.value is not None and current.value is not None
    if current.quantity == "operator_calls":
        yield from _operators(baseline.protocol, current.protocol)
    elif not math.isclose(baseline.value, current.value, rel_tol=tolerance):
        yield "differs"
    elif current.quantity == "gradient_norm":
        yield from _gradients(baseline, current, tolerance)


def _operators(baseline: str, current: str) -> Iterator[str]:
    """`mm 12 -> 13`, for each operator that is called another number of times."""
    before, now = _calls(baseline), _calls(current)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name, 0) != now.get(name, 0):
            yield f"{name} {before.get(name, 0)} -> {now.get(name, 0)}"


def _calls(protocol: str) -> dict[str, int]:
    return {name: int(n) for name, n in (words.split(" ") for words in protocol.split(", ") if words)}


def _gradients(baseline: Record, current: Record, tolerance: float) -> Iterator[str]:
    """Parameters whose gradient has another size. What is rounding beside the largest of them does not count."""
    before, now = (
        dict(zip(r.protocol.removeprefix("of ").split(", "), r.samples, strict=True)) for r in (baseline, current)
    )
    if before.keys() != now.keys():
        yield f"other parameters: {', '.join(sorted(before.keys() ^ now.keys()))}"
        return
    slack = tolerance * 1e-2 * (baseline.value or 0.0)
    for name, norm in before.items():
        if not math.isclose(norm, now[name], rel_tol=tolerance, abs_tol=slack):
            yield f"{name} {now[name] / norm:.4g} x as large" if norm else f"{name} 0 -> {now[name]:.4g}"
