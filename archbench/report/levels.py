"""Which level of the kernel ladder times are compared at.

Times of different levels are not comparable. Where a run took times at a level that all of its architectures decode at,
those are what tables, fronts and curves hold against each other; times of the best level that each has stand beside.
"""

from __future__ import annotations

from typing import Any

from archbench.report.evidence import Evidence

BEST = "best"
LADDER = ("lean", "native", "cuda", "reference")
"""Levels from the first choice to the last; all architectures have the first as a rule."""


def compared(evidence: Evidence) -> dict[str, Any]:
    """The coordinate at which times are compared: {"level": "lean"}, say; the best level where they share none; {} in
    records without levels."""
    found = [
        {record.at["level"] for record in evidence.records_of(row, "latency", "time_per_token") if _as_asked(record)}
        for row in evidence.architectures
        if evidence.records_of(row, "latency", "time_per_token")
    ]
    common = set.intersection(*found) if found else set()
    shared = next((level for level in LADDER if level in common), None)
    return {"level": shared} if shared else best(evidence)


def best(evidence: Evidence) -> dict[str, Any]:
    """The coordinate of what each architecture does at its best."""
    levels = {record.at.get("level") for record in evidence.records if record.metric == "latency"}
    return {"level": BEST} if BEST in levels else {}


def words(at: dict[str, Any]) -> str:
    """`, level lean`; "" without levels."""
    if "level" not in at:
        return ""
    return ", best level available" if at["level"] == BEST else f", level {at['level']}"


def _as_asked(record: Any) -> bool:
    """Whether decode steps ran at the level that was asked for."""
    level = record.at.get("level")
    return level is not None and record.backend.get("decode") == level
