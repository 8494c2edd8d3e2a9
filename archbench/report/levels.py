"""Which level of the kernel ladder times are compared at.

Times of different levels are not comparable. Where a run took times at a level that all architectures have, those are
what tables, fronts and curves hold against each other; times of the best level that each has stand beside them.
"""

from __future__ import annotations

from typing import Any

from archbench.report.evidence import Evidence

BEST = "best"


def compared(evidence: Evidence) -> dict[str, Any]:
    """The coordinate at which times are compared: {"level": "lean"}, say; {} in records without levels."""
    levels = levels_of(evidence)
    common = [level for level in levels if level != BEST]
    return {"level": common[0] if common else BEST} if levels else {}


def best(evidence: Evidence) -> dict[str, Any]:
    """The coordinate of what each architecture does at its best."""
    return {"level": BEST} if BEST in levels_of(evidence) else {}


def levels_of(evidence: Evidence) -> list[str]:
    """The levels at which times were taken, in the order of the records."""
    found = (record.at.get("level") for record in evidence.records if record.metric == "latency")
    return list(dict.fromkeys(str(level) for level in found if level))


def words(at: dict[str, Any]) -> str:
    """`, level lean`; "" without levels."""
    level = at.get("level")
    return f", level {level}" if level and level != BEST else ", best level available" if level else ""
