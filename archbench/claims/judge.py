"""Verdicts: a claim's check on the first run that has its records.

    supported       every number lies, with its whole interval, where the claim puts it
    contradicted    one lies wholly outside
    not testable at this scale
                    records are missing or have no interval, the interval holds both, or the claim needs a larger scale

An ordering against several rivals is supported only where each is beaten; a single one that is clearly ahead
contradicts it. A verdict is about these records at their scale, not about the paper's models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from archbench.claims.check import kind_of
from archbench.claims.claim import SCALES, Claim, Claims, rank
from archbench.claims.estimate import SEEDS
from archbench.claims.kinds import Finding, findings
from archbench.claims.run import Line, Run
from archbench.errors import UnsupportedError
from archbench.papers import Papers

Verdict = Literal["supported", "contradicted", "not testable at this scale"]
VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "not testable at this scale")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a claim. `found` are the numbers looked at, of `run`; `missing` says that there were none."""

    claim: Claim
    verdict: Verdict
    reason: str
    papers: Papers = field(repr=False)
    found: tuple[Finding, ...] = ()
    run: Run | None = None
    exploratory: bool = False

    @property
    def missing(self) -> bool:
        return not self.found

    @property
    def published(self) -> str:
        """What the paper printed, in a line."""
        return self.claim.printed(self.papers)

    @property
    def measured(self) -> str:
        """The numbers, in a line."""
        return "; ".join(shown(finding) for finding in self.found)

    @property
    def evidence(self) -> list[dict[str, Any]]:
        """The records that were used, each with its place."""
        run = self.run
        return [] if run is None else [_record(line, run) for line in _lines(self.found)]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **described(self.claim, self.papers),
            "verdict": self.verdict,
            "reason": self.reason,
            "measured": self.measured,
            "numbers": [_number(finding) for finding in self.found],
            "exploratory": self.exploratory,
            "evidence": self.evidence,
        }


def described(claim: Claim, papers: Papers) -> dict[str, Any]:
    """A claim as plain data, before it is judged."""
    return {
        "id": claim.id,
        "text": claim.text,
        "source": claim.source,
        "published": claim.printed(papers),
        "scale": claim.scale,
        "supports": claim.supports,
        "contradicts": claim.contradicts,
        "suites": list(claim.suites),
        "check": kind_of(claim.check),
        "note": claim.note,
    }


def judge(claims: Claims, runs: Sequence[Run], scale: str | None = None, any_suite: bool = False) -> list[Outcome]:
    """One outcome a claim.

    Args:
        runs: the newest first. Each claim is asked of those of its own suites, in its order of suites; with
            `any_suite` of the others after them.
        scale: judge at this scale: what needs a larger one is not testable. None takes what there is.

    Raises:
        ConfigError: `scale` is none of SCALES.
    """
    limit = SCALES[-1] if scale is None else SCALES[rank(scale)]
    return [outcome(claim, runs, claims.papers, limit, any_suite) for claim in claims.claims]


def outcome(claim: Claim, runs: Sequence[Run], papers: Papers, scale: str, any_suite: bool = False) -> Outcome:
    """What becomes of one claim at a scale."""
    if rank(claim.scale) > rank(scale):
        return _untestable(claim, f"its smallest faithful scale is {claim.scale}", papers)
    own = [run for suite in claim.suites for run in runs if run.suite == suite]
    asked = [*own, *(run for run in runs if any_suite and run not in own)]
    large = [run for run in asked if rank(run.scale) >= rank(claim.scale) and rank(run.scale) <= rank(scale)]
    reasons = []
    for run in large:
        try:
            found = tuple(findings(claim.check, run, papers))
        except UnsupportedError as error:
            reasons.append(str(error))
            continue
        return _judged(claim, run, found, papers)
    if reasons:
        return _untestable(claim, f"{reasons[0]}; such records come from {claim.commands}", papers)
    missing = f"no records; they come from {claim.commands}"
    if claim.scale == SCALES[-1] or asked:
        there = f"there are those of {asked[0].scale} scale only" if asked else missing
        missing = f"its smallest faithful scale is {claim.scale}; {there}"
    return _untestable(claim, f"{missing}; {claim.note}" if claim.note and asked else missing, papers)


def _judged(claim: Claim, run: Run, found: tuple[Finding, ...], papers: Papers) -> Outcome:
    sides = [finding.side for finding in found]
    verdict: Verdict = VERDICTS[2]
    if "outside" in sides:
        verdict = "contradicted"
    elif all(side == "inside" for side in sides):
        verdict = "supported"
    few = {finding.estimate.seeds for finding in found if 0 < finding.estimate.seeds < SEEDS}
    exploratory = bool(few)
    telling = [f for f in found if f.side == "outside"] or [f for f in found if f.side != "inside"] or list(found)
    refused = dict.fromkeys(line.record.reason for finding in telling for line in finding.lines if line.record.reason)
    reason = "; ".join([*(_sentence(finding) for finding in telling), *refused])
    if exploratory:
        reason += f"; {_few(min(few), telling)}"
    return Outcome(
        claim=claim, verdict=verdict, reason=reason, papers=papers, found=found, run=run, exploratory=exploratory
    )


def _untestable(claim: Claim, reason: str, papers: Papers) -> Outcome:
    return Outcome(claim=claim, verdict=VERDICTS[2], reason=reason, papers=papers)


def shown(finding: Finding) -> str:
    """`token_accuracy of calm: 0.9966 [0.9954, 0.9976] fraction`."""
    return f"{finding.what}: {_value(finding)}{f' {finding.unit}' if finding.unit else ''}"


def _sentence(finding: Finding) -> str:
    said = f"{finding.what} is {_value(finding)}"
    claimed = f"claimed is {finding.bounds}"
    return {
        "inside": f"{said}; {claimed}",
        "outside": f"{said}; {claimed}",
        "both": f"{said}; {claimed}, and the interval holds both",
        "unknown": f"{said}; {claimed}, and without an interval nothing follows",
    }[finding.side]


def _value(finding: Finding) -> str:
    value, low, high, _ = finding.estimate
    if low is None or high is None or low == high == value:
        return _digits(value)
    return f"{_digits(value)} [{_digits(low)}, {_digits(high)}]"


def _digits(value: float) -> str:
    """Four digits; what rounding leaves of a zero is one."""
    return f"{0.0 if abs(value) < 1e-9 else value:.4g}"


def _few(seeds: int, found: Sequence[Finding]) -> str:
    luck = max(finding.luck for finding in found)
    trained = "one training" if seeds == 1 else f"{seeds} trainings"
    if luck:
        return f"exploratory: {trained} each, {luck:g} allowed for its luck"
    return f"exploratory: {trained} each, whose luck is not in the interval"


def _lines(found: Sequence[Finding]) -> list[Line]:
    return list({line.number: line for finding in found for line in finding.lines}.values())


def _record(line: Line, run: Run) -> dict[str, Any]:
    record = line.record
    return {
        "file": "" if run.file is None else run.file.as_posix(),
        "line": line.number,
        "run": record.run,
        "suite": record.suite,
        "job": record.job,
        "cell": record.cell,
        "label": record.label,
        "size": record.size,
        "seed": record.seed,
        "metric": record.metric,
        "quantity": record.quantity,
        "at": record.at,
        "value": record.value,
        "reason": record.reason,
        "low": record.low,
        "high": record.high,
        "unit": record.unit,
    }


def _number(finding: Finding) -> dict[str, Any]:
    value, low, high, seeds = finding.estimate
    return {
        "what": finding.what,
        "value": value,
        "low": low,
        "high": high,
        "unit": finding.unit,
        "seeds": seeds,
        "claimed": str(finding.bounds),
    }
