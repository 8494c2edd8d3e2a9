"""Passkey records as grids: for each row and kind of text, how many answers were right at each length and depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from archbench.report.evidence import Evidence
from archbench.report.rows import Row
from archbench.stats import wilson_interval

METRIC = "passkey"
SOLVED, LOW = 0.9, 0.5
"""A share counts as solved from SOLVED on, if its interval lies above LOW."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """So many of n answers right; `digits` is the share of right digits. n = 0 has a reason."""

    right: int = 0
    n: int = 0
    digits: float | None = None
    reason: str = ""
    status: str = "ok"

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def bounds(self) -> tuple[float, float]:
        low, high, _ = wilson_interval(self.right, self.n)
        return low, high

    @property
    def solved(self) -> bool:
        return self.n > 0 and self.value >= SOLVED and self.bounds[0] > LOW


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What one row answered in the texts of one variant. `learned` is "trained" or "zero-shot"."""

    row: Row
    variant: str
    learned: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: dict[tuple[int, float], Tally]
    distances: dict[tuple[int, float], int]

    @property
    def name(self) -> str:
        return self.row.name if self.learned == "trained" else f"{self.row.name} ({self.learned})"

    def over_depths(self, length: int) -> Tally:
        """All depths of a length together."""
        found = [self.cells[length, depth] for depth in self.depths if (length, depth) in self.cells]
        missing = next((tally for tally in found if not tally.n), None)
        if missing or not found:
            return missing or Tally(reason=f"not recorded; {METRIC} gave nothing at {length} tokens", status="absent")
        digits = [tally.digits for tally in found if tally.digits is not None]
        return Tally(
            right=sum(tally.right for tally in found),
            n=sum(tally.n for tally in found),
            digits=sum(digits) / len(digits) if len(digits) == len(found) else None,
        )

    @property
    def solved_to(self) -> int:
        """The largest length solved at every depth, as all shorter ones are; 0 for none."""
        reached = 0
        for length in self.lengths:
            if not all((length, d) in self.cells and self.cells[length, d].solved for d in self.depths):
                break
            reached = length
        return reached


def grids(evidence: Evidence) -> list[Grid]:
    """One for each row and variant, in order of appearance; the first variant is the one that heatmaps show."""
    found = []
    for row in evidence.rows:
        points: dict[tuple[str, str], dict[tuple[int, float], dict[str, Any]]] = {}
        answered = [finding.coordinates for finding in evidence.series(row, METRIC, "exact_match")]
        refused = [r.at for r in evidence.problems_of(row, METRIC) if r.quantity == "exact_match"]
        for at in (*answered, *refused):
            points.setdefault((at["variant"], at["learned"]), {})[at["length"], at["depth"]] = at
        for (variant, learned), ats in points.items():
            found.append(
                Grid(
                    row=row,
                    variant=variant,
                    learned=learned,
                    lengths=tuple(sorted({length for length, _ in ats})),
                    depths=tuple(sorted({depth for _, depth in ats})),
                    cells={place: _tally(evidence, row, at) for place, at in ats.items()},
                    distances={place: at["distance"] for place, at in ats.items() if "distance" in at},
                )
            )
    order = variants(evidence)
    return sorted(found, key=lambda grid: order.index(grid.variant))


def variants(evidence: Evidence) -> list[str]:
    """Names of the kinds of texts, in the order they were asked."""
    return list(dict.fromkeys(r.at["variant"] for r in evidence.records if r.metric == METRIC and "variant" in r.at))


def _tally(evidence: Evidence, row: Row, at: dict[str, Any]) -> Tally:
    exact = evidence.find(row, METRIC, "exact_match", **at)
    if exact.value is None:
        return Tally(reason=exact.reason, status=exact.status)
    digits = evidence.find(row, METRIC, "token_accuracy", **at).value
    return Tally(right=round(sum(exact.samples)), n=len(exact.samples), digits=digits)
