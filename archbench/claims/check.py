"""Checks as data: which numbers of which cells, and the bounds within which they support a claim.

    cells      {architecture, label, size, codec, corpus, config}: which cells; `label` is a shell pattern, `config` has
               dotted names of the record's config ("*": any value but none)
    reading    {metric, quantity, cells, at}: a number of each seed of such a cell; `at` its coordinates, where "max"
               takes the largest measured one
    check      kind: threshold | ordering | slope | correlation | figure, and what the kind needs, see the classes

A reading that stands beside another says only what differs from it. Nothing here reads a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from archbench.errors import ConfigError, SuiteError, suggestion
from archbench.parse import parse

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Which cells of a run. Where several sizes match and none is named, the largest that all readings of a check have
    is taken."""

    architecture: str | None = None
    label: str | None = None
    size: str | None = None
    codec: str | None = None
    corpus: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A number of a cell.

    Attributes:
        pool: several points that agree with `at` are one number, their mean; else there must be one.
        given_up: a record without a value whose reason begins with this counts as 0: metrics stop asking a model that
            has failed.
        spread: relative half-width taken for a number that was recorded without an interval and is no count; without
            it nothing is concluded from such a number. 0 means that it is a count all the same.
    """

    metric: str
    quantity: str
    cells: Cells
    at: dict[str, Any] = field(default_factory=dict)
    pool: bool = False
    given_up: str = ""
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a number must be for the claim to hold; both ends are included.

    `luck` is the half-width that the luck of training adds to a number of fewer than three seeds, whose intervals do
    not hold it: in the number's unit, and relative for ratios.
    """

    least: float | None = None
    most: float | None = None
    luck: float = 0.0

    def __post_init__(self) -> None:
        if self.luck < 0:
            raise ConfigError(f"luck: {self.luck}; must be at least 0")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ConfigError(f"least, most: {self.least} and {self.most}; nothing lies between")

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least:g}" if self.least == self.most else f"{self.least:g} to {self.most:g}"
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"


@dataclass(frozen=True, kw_only=True)
class Threshold(Bounds):
    """A number, or its ratio to another cell's, within bounds."""

    of: Reading
    over: Reading | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self)


@dataclass(frozen=True, kw_only=True)
class Ordering(Bounds):
    """A cell does better than each of its rivals, in the direction that the quantity calls better. What is bounded is
    the gain over the rival, at least 0 when nothing is said."""

    of: Reading
    rivals: tuple[Reading, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rivals:
            raise ConfigError("rivals: none; name at least one")
        if self.least is None and self.most is None:
            object.__setattr__(self, "least", 0.0)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A point of a slope: the number `of`, divided by that of `over` if there is one, at `x`."""

    x: float
    of: Reading
    over: Reading | None = None


@dataclass(frozen=True, kw_only=True)
class Slope(Bounds):
    """The exponent of a power law, a straight line through logarithms.

    The points are `places`, or those of the readings `of` and `over` along a coordinate (`at.context`) or a key of the
    config (`config.model.chunk_size`). With `rise`, what is fitted is the rise over the first point, which takes a
    constant part away: a + b x^s has exponent s.
    """

    of: Reading | None = None
    over: Reading | None = None
    along: str = ""
    places: tuple[Place, ...] = ()
    rise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self)
        if (self.of is not None and bool(self.along)) == bool(self.places):
            raise ConfigError("of, along, places: give of and along, or places")
        if self.along and self.along.partition(".")[0] not in ("at", "config"):
            raise ConfigError(f"along: '{self.along}'; expected at.NAME or config.NAME")
        if self.places and len(self.places) < 2:
            raise ConfigError("places: one; a slope needs two")


@dataclass(frozen=True, kw_only=True)
class Correlation(Bounds):
    """Of two numbers over all cells that have both."""

    x: Reading
    y: Reading
    coefficient: Literal["pearson", "spearman"] = "pearson"

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self)


@dataclass(frozen=True, kw_only=True)
class FigureCheck:
    """A published figure with a `match`, or a ratio of such, against the same number counted here: within `tolerance`
    of it, relative, or within one unit of its last printed digit."""

    figure: str
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance: {self.tolerance}; must be at least 0")


Check = Threshold | Ordering | Slope | Correlation | FigureCheck
KINDS: Mapping[str, type[Any]] = {
    "threshold": Threshold,
    "ordering": Ordering,
    "slope": Slope,
    "correlation": Correlation,
    "figure": FigureCheck,
}


def _bounded(bounds: Bounds) -> None:
    if bounds.least is None and bounds.most is None:
        raise ConfigError("least, most: found neither; give one or both")


def kind_of(check: Check) -> str:
    """The name of a check's kind."""
    return next(name for name, kind in KINDS.items() if kind is type(check))


def readings(check: Check) -> list[Reading]:
    """All readings of a check; a figure's stand in the figure's own `match`."""
    match check:
        case Threshold(of=of, over=over):
            found = [of, over]
        case Ordering(of=of, rivals=rivals):
            found = [of, *rivals]
        case Slope(of=of, over=over, places=places):
            found = [of, over, *(reading for place in places for reading in (place.of, place.over))]
        case Correlation(x=x, y=y):
            found = [x, y]
        case _:
            found = []
    return [reading for reading in found if reading is not None]


def parse_check(data: Any, where: str) -> Check:
    """Raises SuiteError with the place for an unknown kind or key, however deep."""
    if not isinstance(data, Mapping):
        raise SuiteError(f"{where}: found {type(data).__name__}; expected a mapping with a kind")
    given = dict(data)
    name = given.pop("kind", None)
    if name not in KINDS:
        raise SuiteError(f"{where}.kind: found {name!r}; {suggestion(str(name), KINDS)}")
    first = given.get("of")
    for key in ("of", "over", "x", "y"):
        if given.get(key) is not None:
            given[key] = _reading(given[key], first, f"{where}.{key}")
    if "rivals" in given:
        given["rivals"] = tuple(
            _reading(rival, first, f"{where}.rivals[{i}]") for i, rival in enumerate(_list(given, "rivals", where))
        )
    if "places" in given:
        places = _list(given, "places", where)
        given["places"] = tuple(_place(place, places[0], f"{where}.places[{i}]") for i, place in enumerate(places))
    return parse(KINDS[name], given, where)


def _list(data: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = data[key]
    if not isinstance(found, list) or not found:
        raise SuiteError(f"{where}.{key}: found {found!r}; expected a list")
    return found


def _place(data: Any, model: Any, where: str) -> Place:
    if not isinstance(data, Mapping) or not isinstance(model, Mapping):
        raise SuiteError(f"{where}: found {data!r}; expected x and of")
    given = dict(data)
    first = _merged(given.get("of"), model.get("of"))
    for key in ("of", "over"):
        if given.get(key) is not None:
            given[key] = _reading(given[key], first, f"{where}.{key}")
    return parse(Place, given, where)


def _merged(data: Any, model: Any) -> Any:
    if not isinstance(data, Mapping) or not isinstance(model, Mapping):
        return data
    return {**model, **data}


def _reading(data: Any, model: Any, where: str) -> Reading:
    """`model` is the reading whose parts are taken where this one is silent."""
    whole = _merged(data, model)
    if not isinstance(whole, Mapping):
        raise SuiteError(f"{where}: found {data!r}; expected metric, quantity, cells and at")
    given = dict(whole)
    given["cells"] = parse(Cells, given.get("cells"), f"{where}.cells")
    return parse(Reading, given, where)
