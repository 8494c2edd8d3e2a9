"""Figures that papers published, as data: `baselines/papers/*.yaml`, each figure with its source.

    papers:                              short name -> authors, year, title, number
    figures:
      - id: calm-m-inference             unique over all files
        value: 2.9e8                     as printed, in `unit`
        unit: FLOP/token
        of: what the figure is of
        source: "calm, Table 1"          the paper's short name, then the place
        step: 1e7                        one unit in the last printed digit; left out for what was read off a plot
        exact: 1_585_152                 the number behind a rounded one, where the paper's own formula gives it
        ratio: [id, id]                  of two other figures, the value being the first over the second
        match: {...}                     what can be measured here and held against it, see `Match`
        note: where the paper's rule is not clear, or what else to know

Only those with a `match` are held against measurements; the others are there to be cited. Facts only, in our words.
A file may hold `claims` as well, which `archbench.claims` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archbench.errors import ConfigError, SuiteError, suggestion
from archbench.parse import parse, read_yaml

_PACKAGE = Path(__file__).resolve().parent
_TOLERANCE = 1e-9
"""Relative; decimal fractions of a file are no binary ones."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A configuration by name: the architecture and one of its published sizes."""

    architecture: str
    size: str


@dataclass(frozen=True, kw_only=True)
class Match:
    """A measured quantity: of `of`, summed over several configurations, divided by that of `over` if there is one.

    `at` are the coordinates of the measurement, in so far as they matter. With `kin` it is no more than related to the
    figure (FLOPs to time, say): worth seeing beside it, and no deviation from it.
    """

    quantity: str
    of: tuple[Measured, ...]
    over: Measured | None = None
    at: dict[str, Any] = field(default_factory=dict)
    kin: bool = False


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published number; the fields are told in the module."""

    id: str
    value: float
    unit: str
    of: str
    source: str
    step: float | None = None
    exact: float | None = None
    ratio: tuple[str, str] | None = None
    match: Match | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "unit", "of", "source"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name}: empty; every figure needs one")
        if self.match is not None and not self.value:
            raise ConfigError("value: 0; nothing can be held against it")
        if self.step is not None and not self.step > 0:
            raise ConfigError(f"step: {self.step}; must be above 0")
        if self.ratio is not None and self.match is not None:
            raise ConfigError("ratio, match: found both; a ratio of figures is measured through them")

    @property
    def paper(self) -> str:
        """The short name of the paper."""
        return self.source.partition(",")[0].strip()

    def agreement(self, value: float) -> str:
        """How `value` is the figure in all digits that the paper prints: "as printed", or "as printed, cut off" where
        rounding would give another last digit; "" when it is not."""
        if self.step is None:
            return ""
        slack = _TOLERANCE * abs(self.value)
        if abs(value - self.value) <= self.step / 2 + slack:
            return "as printed"
        return "as printed, cut off" if -slack <= value - self.value < self.step else ""


@dataclass(frozen=True, kw_only=True)
class Papers:
    """All files together. `citations` maps short names to papers; figures keep the order of their files."""

    citations: Mapping[str, str]
    figures: Sequence[Figure]

    def figure(self, figure_id: str) -> Figure:
        """Raises ConfigError when there is none of that id."""
        for figure in self.figures:
            if figure.id == figure_id:
                return figure
        raise ConfigError(f"figure '{figure_id}': not known; {suggestion(figure_id, [f.id for f in self.figures])}")


def papers_folder() -> Path:
    """Where the files lie: in the installed package, or in a checkout beside it."""
    inside = _PACKAGE / "baselines" / "papers"
    return inside if inside.is_dir() else _PACKAGE.parent / "baselines" / "papers"


def paper_files(folder: Path | None = None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every file of a folder, the shipped one when none is given, with what it holds under its keys.

    Raises:
        SuiteError: a file is no YAML, lacks a key or has one too many.
    """
    folder = papers_folder() if folder is None else folder
    for path in sorted(folder.glob("*.yaml")):
        data = read_yaml(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(data, Mapping) or not {"papers", "figures"} <= set(data) <= {"papers", "figures", "claims"}:
            found = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise SuiteError(f"{path}: found {found}; expected the keys papers and figures, perhaps claims")
        yield path, data


def load_papers(folder: Path | None = None) -> Papers:
    """Reads every file of a folder, the shipped one when none is given.

    Raises:
        SuiteError: a file cannot be read as written, an id is given twice, or a figure names a paper or figure that
            there is not; one line with file and place.
    """
    citations: dict[str, str] = {}
    figures: dict[str, Figure] = {}
    places: dict[str, str] = {}
    for path, data in paper_files(folder):
        own = _citations(data["papers"], f"{path}: papers")
        citations |= own
        if not isinstance(data["figures"], list):
            raise SuiteError(f"{path}: figures: found {type(data['figures']).__name__}; expected a list")
        for number, entry in enumerate(data["figures"]):
            where = f"{path}: figures[{number}]"
            figure = _figure(entry, where)
            if figure.paper not in own:
                raise SuiteError(
                    f"{where}.source: paper '{figure.paper}' is not known; {suggestion(figure.paper, own)}"
                )
            if figure.id in figures:
                raise SuiteError(f"{where}.id: '{figure.id}' is taken by {places[figure.id]}; choose another")
            figures[figure.id], places[figure.id] = figure, where
    for figure in figures.values():
        for part in figure.ratio or ():
            if part not in figures:
                raise SuiteError(f"{places[figure.id]}.ratio: no figure '{part}'; {suggestion(part, figures)}")
    return Papers(citations=citations, figures=tuple(figures.values()))


def _citations(data: Any, where: str) -> dict[str, str]:
    if not isinstance(data, Mapping) or not all(isinstance(text, str) for text in data.values()):
        raise SuiteError(f"{where}: expected short names, each with its paper as text")
    return {str(name): text for name, text in data.items()}


def _figure(entry: Any, where: str) -> Figure:
    """Nested mappings are parsed first, since `parse` looks at one level."""
    data = dict(entry) if isinstance(entry, Mapping) else entry
    if isinstance(data, dict) and isinstance(data.get("match"), Mapping):
        match = dict(data["match"])
        if isinstance(match.get("of"), Mapping):
            match["of"] = [match["of"]]
        if isinstance(match.get("of"), list):
            match["of"] = [parse(Measured, part, f"{where}.match.of[{i}]") for i, part in enumerate(match["of"])]
        if match.get("over") is not None:
            match["over"] = parse(Measured, match["over"], f"{where}.match.over")
        data["match"] = parse(Match, match, f"{where}.match")
    return parse(Figure, data, where)
