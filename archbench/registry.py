"""Finds architectures, metrics, tasks and export formats by name: our own files, and what other packages register.

A file in `archbench/architectures`, `archbench/metrics`, `archbench/tasks` or `archbench/exports` is found by existing;
its name is the architecture's, metric's, task's or format's name. Other packages use the entry-point groups of the same
names (`archbench.architectures`) and get the same treatment. While an architecture is being written, the path of its
.py file serves as its name.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archbench.errors import ConfigError, suggestion

_ARCHITECTURES = "archbench.architectures"

if TYPE_CHECKING:
    from archbench.export import Format
    from archbench.metric import DesignMetric, Metric, TimedMetric
    from archbench.model import Architecture
    from archbench.task import Task


def architectures() -> list[str]:
    """Names of all architectures there are, without importing any."""
    return _names("architectures")


def metrics() -> list[str]:
    """Names of all metrics there are, without importing any."""
    return _names("metrics")


def tasks() -> list[str]:
    """Names of all tasks there are, without importing any."""
    return _names("tasks")


def export_formats() -> list[str]:
    """Names of all export formats there are, without importing any."""
    return _names("exports")


@cache
def architecture(name: str) -> Architecture:
    """The architecture of that name, or the one that the .py file of that path exports as ARCHITECTURE.

    Raises:
        ConfigError: there is none, or its file or package cannot be imported.
    """
    return _found("architectures", name, "ARCHITECTURE")


@cache
def metric(name: str) -> Metric | TimedMetric | DesignMetric:
    """The metric of that name. Raises ConfigError when there is none."""
    return _found("metrics", name, "METRIC")


@cache
def task(name: str) -> Task:
    """The task of that name. Raises ConfigError when there is none."""
    return _found("tasks", name, "TASK")


@cache
def export_format(name: str) -> Format:
    """The export format of that name. Raises ConfigError when there is none."""
    return _found("exports", name, "FORMAT")


def source_files(architecture_name: str) -> list[Path]:
    """The files that define an architecture, for hashing what a checkpoint was trained by: its module, or all of its
    package, and those of the architectures here that it imports from."""
    found: dict[Path, None] = {}
    waiting = [architecture(architecture_name).build.__module__]
    while waiting:
        module = sys.modules[waiting.pop()]
        own = Path(module.__file__ or "")
        alone = module.__package__ in ("", None, _ARCHITECTURES)
        for file in [own] if alone else sorted(own.parent.glob("*.py")):
            if file not in found:
                found[file] = None
                waiting += _imported_architectures(file)
    return sorted(found)


def _imported_architectures(file: Path) -> list[str]:
    """Modules of this package's architectures that a file imports."""
    names = [
        name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    ]
    return [name for name in names if name.startswith(f"{_ARCHITECTURES}.") and name in sys.modules]


def label(name: str) -> str:
    """A short name for tables: the name itself, or the stem of a path."""
    return Path(name).stem if name.endswith(".py") else name


def _own(kind: str) -> dict[str, str]:
    package = importlib.import_module(f"archbench.{kind}")
    return {info.name: f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)}


def _names(kind: str) -> list[str]:
    return sorted({*_own(kind), *(point.name for point in entry_points(group=f"archbench.{kind}"))})


def _found(kind: str, name: str, export: str) -> Any:
    own = _own(kind)
    points = {point.name: point for point in entry_points(group=f"archbench.{kind}")}
    try:
        if name in own:
            return getattr(importlib.import_module(own[name]), export)
        if name in points:
            return points[name].load()
        if name.endswith(".py"):
            return getattr(_module_at(Path(name)), export)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"{kind.removesuffix('s')} {name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    raise ConfigError(f"there is no {kind.removesuffix('s')} '{name}'; {suggestion(name, {*own, *points})}")


def _module_at(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the path of a Python file that defines ARCHITECTURE")
    name = f"archbench_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being executed
    spec.loader.exec_module(module)
    return module
