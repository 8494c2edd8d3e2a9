"""Suites: YAML files that say what to compare. Data only; a typo is one line naming file, key and the nearest name.

A suite gives defaults (corpus, codec, size, training, seeds, metrics) and a list of cells that may override them. A
`grid`, of the suite or of a cell, maps dotted keys to lists of values and expands to every combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archbench import registry
from archbench.errors import ConfigError, SuiteError, suggestion
from archbench.parse import parse, read_yaml

_NAMED = ("size", "label")
"""Grid keys that tell cells apart in tables by themselves; the others are added to the label."""

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite as written, each part checked for known keys; `plan` resolves it into cells and jobs.

    Attributes:
        match: what a named size is solved for: parameters, non_embedding, training_flops or state_bytes.
        training: keys of `Training`; a cell's own replace these one by one.
        metrics: metric name -> its settings.
        tuning: the search for learning rates (see `archbench.tuning`); None for none.
    """

    name: str
    path: str
    cells: list[dict[str, Any]]
    training: dict[str, Any]
    description: str = ""
    corpus: str = "stdlib"
    codec: str = "bytes"
    size: str = "micro"
    match: str = "parameters"
    seeds: list[int] = field(default_factory=lambda: [0])
    grid: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class CellEntry:
    """One entry of `cells`. What is left out comes from the suite. `model` holds keys of the architecture's config;
    `metrics` restricts which of the suite's metrics are measured; `start_from` is a checkpoint's folder, whose config
    and weights the training goes on from. `pretrained` is a checkpoint's folder whose model is measured as it is; where
    `optional` is true and the folder holds none, the cell is left out and a notice says so."""

    architecture: str
    label: str | None = None
    size: str | None = None
    corpus: str | None = None
    codec: str | None = None
    start_from: str | None = None
    pretrained: str | None = None
    optional: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pretrained is None:
            if self.optional:
                raise ConfigError("optional: true; only a cell that is pretrained can be left out")
            return
        for key in ("size", "codec", "start_from", "model"):
            if getattr(self, key):
                raise ConfigError(f"{key}: {getattr(self, key)!r}; the pretrained checkpoint decides it, leave it out")
        for key in self.training:
            if key not in ("context", "batch"):
                raise ConfigError(f"training.{key}: nothing is trained in a pretrained cell; allowed: context, batch")


def suite_folder() -> Path:
    """Where the suites that come with archbench lie: in the installed package, or in a checkout beside it."""
    inside = _PACKAGE / "suites"
    return inside if inside.is_dir() else _PACKAGE.parent / "suites"


def available() -> list[str]:
    """Names of the suites that come with archbench."""
    return sorted(path.stem for path in suite_folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a suite given by name or by path. Raises SuiteError when there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if not path.is_file():
            raise SuiteError(f"{name}: no such file; give a suite's name ({', '.join(available())}) or a YAML file")
        return path
    own = suite_folder() / f"{name}.yaml"
    if not own.is_file():
        raise SuiteError(f"suite '{name}' is not known; {suggestion(name, available())} A path works as well.")
    return own


def load_suite(name: str, settings: Sequence[str] = ()) -> Suite:
    """Reads a suite by name or path, with `--set` changes such as "training.budget.bytes=1e6" applied first.

    Raises:
        SuiteError: the file cannot be read as a suite; the message is one line with the place.
    """
    path = find(name)
    where = str(path)
    data = read_yaml(path.read_text(encoding="utf-8"), where)
    if not isinstance(data, dict):
        raise SuiteError(f"{where}: found {type(data).__name__}; a suite is a mapping with at least 'cells'")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise SuiteError(f"--set {setting}: expected KEY=VALUE, for example training.budget.bytes=1e6")
        set_dotted(data, key, read_yaml(value, f"--set {key}"), f"--set {key}")
    for key in ("name", "path"):
        if key in data:
            raise SuiteError(f"{where}: {key}: unknown key; the file's name is the suite's name")
    suite = parse(Suite, {**data, "name": path.stem, "path": where}, f"{where}: ")
    if not suite.cells:
        raise SuiteError(f"{where}: cells: found none; a suite needs at least one")
    return suite


def entries(suite: Suite) -> list[CellEntry]:
    """The suite's cell entries, each expanded over its own grid and, unless pretrained, the suite's."""
    expanded = []
    for number, raw in enumerate(suite.cells):
        where = f"{suite.path}: cells[{number}]"
        entry = parse(CellEntry, raw, where)
        shared = {} if entry.pretrained is not None else suite.grid
        for point in _combinations({**shared, **entry.grid}, where):
            data = {**raw, "grid": {}}
            for key, value in point.items():
                set_dotted(data, key, value, f"{where}.grid.{key}")
            told_apart = [_told(key, value) for key, value in point.items() if key not in _NAMED]
            if told_apart and "label" not in point:
                data["label"] = " ".join([entry.label or registry.label(entry.architecture), *told_apart])
            expanded.append(parse(CellEntry, data, where))
    return expanded


def _told(key: str, value: Any) -> str:
    """A grid's coordinate in a label: "learning_rate=0.004", and of a mapping its entries: "bytes=1e+06"."""
    if isinstance(value, dict):
        return " ".join(f"{name}={part:g}" for name, part in value.items())
    return f"{key.split('.')[-1]}={value}"


def set_dotted(data: dict[str, Any] | list[Any], key: str, value: Any, where: str) -> None:
    """Sets data[a][b][c] for the key "a.b.c", making mappings on the way and copying those it changes. A number
    indexes a list."""
    head, _, rest = key.partition(".")
    holder: Any = data
    index: Any = head
    if isinstance(data, list):
        if not head.isdigit() or int(head) >= len(data):
            raise SuiteError(f"{where}: '{head}' is no index of a list of {len(data)}")
        index = int(head)
    if not rest:
        holder[index] = value
        return
    inner = holder[index] if isinstance(data, list) else data.get(head)
    if inner is None:
        inner = {}
    if not isinstance(inner, (dict, list)):
        raise SuiteError(f"{where}: '{head}' holds {inner!r}, which has no keys")
    copied = list(inner) if isinstance(inner, list) else dict(inner)
    holder[index] = copied
    set_dotted(copied, rest, value, where)


def _combinations(grid: Mapping[str, list[Any]], where: str) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = [{}]
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise SuiteError(f"{where}.grid.{key}: found {values!r}; expected a list of values")
        points = [{**point, key: value} for point in points for value in values]
    return points
