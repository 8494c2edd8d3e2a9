"""Claims as data, beside the figures of `baselines/papers/*.yaml`:

    claims:
      - id: calm-reconstruction          unique over all files
        text: what is claimed, in our words
        source: "calm, section 2.2"      the paper's short name, then the place
        figures: [id, ...]               published figures of the same files that the claim rests on
        published: in words              where the paper prints none, or what a figure does not say
        scale: laptop                    the smallest at which the claim can be judged faithfully, see SCALES
        supports: ...                    what would support and what would contradict it, in words
        contradicts: ...
        suites: [quick]                  whose records are asked, the first that has them all
        check: {kind: ..., ...}          see `claims.check`
        note: what else to know
        how: `archbench ...`             what makes the records, where `archbench run SUITE` does not; without suites,
                                         only runs that `--results` names are asked

A claim holds no verdict: that is computed from records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archbench.claims.check import Check, FigureCheck, parse_check
from archbench.errors import ConfigError, SuiteError, suggestion
from archbench.papers import Papers, load_papers, paper_files
from archbench.parse import parse

SCALES = ("paper-cost", "laptop", "gpu")
"""From small to large: configurations of the papers' sizes counted and not trained; models of up to some million
parameters on a CPU; models trained on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published claim; the fields are told in the module."""

    id: str
    text: str
    source: str
    scale: str
    supports: str
    contradicts: str
    check: Check
    suites: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    published: str = ""
    note: str = ""
    how: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "text", "source", "supports", "contradicts"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name}: empty; every claim needs it")
        if self.scale not in SCALES:
            raise ConfigError(f"scale: '{self.scale}'; {suggestion(self.scale, SCALES)}")
        if not self.figures and not self.published:
            raise ConfigError("figures, published: found neither; say what was published")
        if not self.suites and not self.how:
            raise ConfigError("suites, how: found neither; say whose records decide, or how to make them")

    @property
    def paper(self) -> str:
        """The short name of the paper."""
        return self.source.partition(",")[0].strip()

    @property
    def commands(self) -> str:
        """What makes the records."""
        return self.how or " or ".join(f"`archbench run {suite}`" for suite in self.suites)

    def printed(self, papers: Papers) -> str:
        """What was published, in a line."""
        figures = [papers.figure(name) for name in self.figures]
        said = [f"{figure.value:g} {figure.unit} ({figure.of})" for figure in figures]
        return "; ".join([*said, *([self.published] if self.published else [])])


@dataclass(frozen=True, kw_only=True)
class Claims:
    """All claims, in the order of their files, and the figures they name."""

    papers: Papers
    claims: Sequence[Claim]

    def claim(self, claim_id: str) -> Claim:
        """Raises ConfigError when there is none of that id."""
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise ConfigError(f"claim '{claim_id}': not known; {suggestion(claim_id, [c.id for c in self.claims])}")


def load_claims(folder: Path | None = None) -> Claims:
    """Reads the claims of every file of a folder, the shipped one when none is given.

    Raises:
        SuiteError: a claim or figure cannot be read as written, or a claim names a paper or figure that there is not,
            or another's id; one line with file and place.
    """
    papers = load_papers(folder)
    known = {figure.id: figure for figure in papers.figures}
    found: dict[str, Claim] = {}
    places: dict[str, str] = {}
    for path, data in paper_files(folder):
        entries = data.get("claims", [])
        if not isinstance(entries, list):
            raise SuiteError(f"{path}: claims: found {type(entries).__name__}; expected a list")
        for number, entry in enumerate(entries):
            where = f"{path}: claims[{number}]"
            claim = _claim(entry, where)
            if claim.id in found:
                raise SuiteError(f"{where}.id: '{claim.id}' is taken by {places[claim.id]}; choose another")
            if claim.paper not in data["papers"]:
                raise SuiteError(
                    f"{where}.source: paper '{claim.paper}' is not known; {suggestion(claim.paper, data['papers'])}"
                )
            checked = [claim.check.figure] if isinstance(claim.check, FigureCheck) else []
            for figure in (*claim.figures, *checked):
                if figure not in known:
                    raise SuiteError(f"{where}: figure '{figure}' is not known; {suggestion(figure, known)}")
            for figure in checked:
                parts = [known[part] for part in known[figure].ratio or (figure,)]
                if not any(part.match for part in parts):
                    raise SuiteError(f"{where}.check.figure: '{figure}' has no match; nothing can be held against it")
            found[claim.id], places[claim.id] = claim, where
    return Claims(papers=papers, claims=tuple(found.values()))


def _claim(entry: Any, where: str) -> Claim:
    if not isinstance(entry, Mapping):
        raise SuiteError(f"{where}: found {entry!r}; expected a mapping")
    data = dict(entry)
    if "check" in data:
        data["check"] = parse_check(data["check"], f"{where}.check")
    return parse(Claim, data, where)


def rank(scale: str) -> int:
    """Where a scale stands among SCALES. Raises ConfigError for one that is none."""
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}: not known; {suggestion(scale, SCALES)}")
    return SCALES.index(scale)
