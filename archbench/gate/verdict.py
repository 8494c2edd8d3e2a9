"""What the gate finds: one finding a quantity, and the exit code of all of them together.

    same          equal, to the last digit that can be asked for
    fine          different, and shown to be no worse than the margin allows
    changed       different where nothing may differ by itself: to be acknowledged
    improved      better by more than the margin; in a gate to be acknowledged too, since a leak looks like that
    regressed     worse by more than the margin
    vanished      measured in the baseline and not now
    undecided     neither worse nor fine could be shown
    incomparable  the two numbers are of different things
    new           not in the baseline
    watched       too noisy here to block anything, or never blocking

Which of them fail a comparison depends on what it was asked to fail on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal[
    "same", "fine", "changed", "improved", "regressed", "vanished", "undecided", "incomparable", "new", "watched"
]
FailOn = Literal["nothing", "regression", "change"]

FINE, REGRESSED, UNMEASURED, UNDECIDED = 0, 1, 2, 3
"""Exit codes. Bad usage is UNMEASURED too: nothing is known then."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One quantity of one cell in two versions.

    `low` and `high` bound the difference, worse being positive, in the quantity's unit or, where `relative`, as a share
    of the baseline; `margin` is what is allowed, `detectable` the smallest difference that would be found four times of
    five, on the same scale. `p` is the probability, adjusted for the number of questions asked, of a difference as bad
    as this one from a version that is just within the margin.
    """

    tier: int
    cell: str
    quantity: str
    verdict: Verdict
    baseline: float | None = None
    current: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    detectable: float | None = None
    relative: bool = False
    p: float | None = None
    exact: bool = False
    note: str = ""

    def blocks(self, fail_on: FailOn) -> bool:
        """Whether this finding alone fails a comparison that is to fail on that."""
        if fail_on == "nothing" or self.tier == 3:
            return False
        if self.verdict in ("regressed", "vanished"):
            return True
        if self.verdict == "changed" and self.tier == 0:
            return True
        if fail_on == "regression":
            return False
        return self.verdict in ("changed", "improved") or (self.exact and self.verdict == "undecided")

    @property
    def change(self) -> float | None:
        """(current - baseline) / |baseline|."""
        if self.baseline is None or self.current is None or not self.baseline:
            return None
        return (self.current - self.baseline) / abs(self.baseline)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All findings, and what else a reader should know. `acknowledged` are changes that the baseline file itself went
    through; they were accepted and block nothing."""

    title: str
    findings: Sequence[Finding]
    fail_on: FailOn
    notes: Sequence[str] = ()
    acknowledged: Sequence[Finding] = ()

    @property
    def blocking(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.blocks(self.fail_on)]

    @property
    def exit_code(self) -> int:
        if self.blocking:
            return REGRESSED
        if self.fail_on == "nothing":
            return FINE
        verdicts = {finding.verdict for finding in self.findings if finding.tier < 3}
        if "incomparable" in verdicts:
            return UNMEASURED
        return UNDECIDED if "undecided" in verdicts else FINE

    @property
    def counts(self) -> dict[int, dict[str, int]]:
        """How many findings of each verdict, by tier."""
        counts: dict[int, dict[str, int]] = {}
        for finding in sorted(self.findings, key=lambda finding: finding.tier):
            of_tier = counts.setdefault(finding.tier, {})
            of_tier[finding.verdict] = of_tier.get(finding.verdict, 0) + 1
        return counts

    def to_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "title": self.title,
            "exit_code": self.exit_code,
            "verdict": HEADLINES[self.exit_code],
            "fail_on": self.fail_on,
            "notes": list(self.notes),
            "findings": [
                {**dataclasses.asdict(finding), "change": finding.change, "blocks": finding.blocks(self.fail_on)}
                for finding in self.findings
            ],
            "acknowledged": [dataclasses.asdict(finding) for finding in self.acknowledged],
        }


HEADLINES = {FINE: "fine", REGRESSED: "regressed", UNMEASURED: "could not be measured", UNDECIDED: "undecided"}
