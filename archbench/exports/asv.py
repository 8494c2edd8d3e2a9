"""airspeed velocity results: a folder that `asv publish` and `asv compare` read. Each export adds a commit to it.

    asv.conf.json                       written once, then yours
    results/benchmarks.json             what: a benchmark a quantity, with the cell and its coordinates as parameters
    results/HOST/machine.json           where
    results/HOST/COMMIT-existing.json   the numbers of one commit

asv knows one direction, smaller is better: see `archbench.series.as_smaller`; what is neither is left out. A benchmark
has a value for every combination of its parameters; NaN (asv's "skipped") stands where a combination does not exist or
is unsupported, null (its "failed") where the metric failed on that cell. asv wants 99 % intervals: ours are stretched.
Source: the files of asv 0.6 (benchmarks and results version 2, machine version 1).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import archbench
from archbench.errors import ConfigError
from archbench.export import Exported, Format, Source
from archbench.series import Series, as_smaller, cell_names, coordinate

ENVIRONMENT = "existing"
ABSENT = "'-'"
"""Stands for a coordinate that a number does not have though others of its benchmark do."""
COLUMNS = (
    "result", "params", "version", "started_at", "duration", "stats_ci_99_a", "stats_ci_99_b", "stats_q_25",
    "stats_q_75", "stats_number", "stats_repeat", "samples",
)  # fmt: skip

Combination = tuple[str, ...]


def write(source: Source, out: Path) -> Exported:
    commit, dirty = source.commit
    if commit is None:
        raise ConfigError(
            f"{source.file}: its records name no commit, and asv files numbers under one; run from a git checkout"
        )
    grouped: dict[str, list[Series]] = defaultdict(list)
    for series in source.series:
        smaller = as_smaller(series)
        if smaller is not None:
            grouped[f"{series.suite}.{smaller.measure}"].append(smaller)
    if not grouped:
        raise ConfigError(
            f"{source.file}: no number of it is better one way, so asv can follow none; export to bencher"
        )
    benchmarks = _Json(out / "results" / "benchmarks.json", 2)
    known = {name: entry for name, entry in benchmarks.read().items() if name != "version"}
    results, failed = {}, _failed(source)
    for name, group in grouped.items():
        known[name] = entry = _entry(name, group, known.get(name))
        results[name] = _result(entry, group, failed[group[0].metric], source)
    machine = _machine(source.environment)
    place = out / "results" / machine["machine"]
    benchmarks.write(known)
    _Json(place / "machine.json", 1).write(machine)
    path = place / f"{commit[:8]}-{ENVIRONMENT}.json"
    file = _Json(path, 2)
    before = file.read().get("results", {})  # another suite at the same commit
    repository = _repository(out)
    file.write(
        {
            "commit_hash": commit,
            "env_name": ENVIRONMENT,
            "date": _date(repository, commit, source),
            "params": {**machine, "python": source.environment.get("python", "")},
            "python": source.environment.get("python", ""),
            "requirements": {},
            "env_vars": {},
            "result_columns": list(COLUMNS),
            "results": {**before, **results},
            "durations": {},
        }
    )
    configuration = out / "asv.conf.json"
    notices = list(_notices(source, commit, dirty))
    if not configuration.exists():
        _Json(configuration, 1).write(_configuration(repository, out))
        if repository is None:
            notices.append(f"{configuration}: set 'repo' to the repository that holds commit {commit[:8]}")
    return Exported(paths=(path,), count=sum(map(len, grouped.values())), what="numbers", notices=tuple(notices))


class _Json:
    """A file that carries asv's version of its layout."""

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.version = path, version

    def read(self) -> dict[str, Any]:
        """What it holds; nothing where it does not exist. Raises ConfigError when it is not asv's."""
        if not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.path}: not JSON ({error.msg}, line {error.lineno}); export elsewhere") from None
        if not isinstance(found, dict) or found.get("version") != self.version:
            raise ConfigError(f"{self.path}: not asv's layout {self.version}; export elsewhere, or use asv update")
        return found

    def write(self, content: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**content, "version": self.version}, indent=1)  # NaN is asv's own word
        self.path.write_text(text + "\n", encoding="utf-8")


def _entry(name: str, group: Sequence[Series], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The benchmark. Its parameters' values of earlier exports stay, so that asv finds their numbers; a coordinate that
    is new begins a new history, as does another version of the metric."""
    version = str(group[0].metric_version)
    if before is not None and before["version"] != version:
        before = None
    old_names = list(before["param_names"]) if before else ["cell"]
    names = [*old_names, *sorted({name for series in group for name in series.at} - set(old_names))]
    params: list[list[str]] = [list(values) for values in before["params"]] if before else [[]]
    params += [[ABSENT] if before else [] for _ in range(len(names) - len(params))]
    for series in group:
        for values, value in zip(params, _combination(series, names), strict=True):
            if value not in values:
                values.append(value)
    return {
        "name": name,
        "code": "",
        "param_names": names,
        "params": params,
        "type": "track",
        "unit": group[0].unit,
        "version": version,
        "timeout": 60.0,
    }


def _combination(series: Series, names: Iterable[str]) -> Combination:
    """Values of the parameters as Python would print them; asv shows text without its quotes."""
    return tuple(
        repr(_cell(series)) if name == "cell" else _literal(series.at[name]) if name in series.at else ABSENT
        for name in names
    )


def _cell(series: Series) -> str:
    return "/".join(part for part in (series.cell, series.size) if part)


def _literal(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else repr(coordinate(value))


def _result(entry: Mapping[str, Any], group: Sequence[Series], failed: set[str], source: Source) -> list[Any]:
    """A row in the order of COLUMNS: for each combination of parameters, the last varying fastest."""
    found = {_combination(series, entry["param_names"]): series for series in group}
    values: list[float | None] = []
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS[5:11], "samples")}
    for combination in itertools.product(*entry["params"]):
        series = found.get(combination)
        if series is None:
            values.append(None if combination[0] in failed else math.nan)
        else:
            values.append(series.value)
        for name, cell in _statistics(series).items():
            columns[name].append(cell)
    stored = [column if any(cell is not None for cell in column) else None for column in columns.values()]
    return [values, entry["params"], entry["version"], _when(source), None, *stored]


def _statistics(series: Series | None) -> dict[str, Any]:
    """All of asv's statistics or none of them: it does not look for single ones."""
    wide = series.bounds(0.99) if series else None
    narrow = series.bounds(0.5) if series else None
    if series is None or wide is None or narrow is None:
        return dict.fromkeys((*COLUMNS[5:11], "samples"))
    return {
        "stats_ci_99_a": wide[0],
        "stats_ci_99_b": wide[1],
        "stats_q_25": narrow[0],
        "stats_q_75": narrow[1],
        "stats_number": 1,
        "stats_repeat": series.n,
        "samples": list(series.samples) if series.is_time and series.samples else None,
    }


def _failed(source: Source) -> defaultdict[str, set[str]]:
    """Metric -> the cells, as parameters, on which it failed."""
    names = cell_names(source.records)
    found: defaultdict[str, set[str]] = defaultdict(set)
    for record in source.records:
        if record.status == "failed":
            found[record.metric].add(repr(names[record.cell, record.label, record.size]))
    return found


def _machine(environment: Mapping[str, Any]) -> dict[str, str]:
    name = environment.get("host") or "unknown"
    return {
        "machine": re.sub(r"[^\w.-]", "-", name),
        "arch": environment.get("machine", ""),
        "cpu": environment.get("cpu", ""),
        "num_cpu": str(environment.get("cores", "")),
        "os": environment.get("system", ""),
        "ram": str(environment.get("memory_bytes", "")),
    }


def _repository(out: Path) -> Path | None:
    """The git repository around the folder, or else around this package."""
    places = [*out.resolve().parents, Path(archbench.__file__).resolve().parents[1]]
    return next((place for place in places if (place / ".git").exists()), None)


def _date(repository: Path | None, commit: str, source: Source) -> int:
    """When the commit was made, in ms; when the run was, where the repository does not say."""
    if repository is not None:
        command = ["git", "-C", str(repository), "show", "-s", "--format=%ct", commit]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return int(done.stdout) * 1000
        except (OSError, subprocess.SubprocessError):
            return _when(source)
    return _when(source)


def _when(source: Source) -> int:
    return int(datetime.fromisoformat(source.last.created).timestamp() * 1000)


def _configuration(repository: Path | None, out: Path) -> dict[str, Any]:
    return {
        "project": "archbench",
        "repo": os.path.relpath(repository, out.resolve()) if repository else ".",
        "branches": ["HEAD"],
        "environment_type": "existing",
        "results_dir": "results",
        "html_dir": "html",
    }


def _notices(source: Source, commit: str, dirty: bool) -> Iterable[str]:
    if dirty:
        yield f"the source had changes that are not committed; their numbers are filed under {commit[:8]}"
    left = sum(as_smaller(series) is None for series in source.series)
    if left:
        yield f"{left} numbers are neither better nor worse, or have no inverse; asv has no place for them"


FORMAT = Format(
    about="asv results: a folder for asv publish and asv compare, a commit each export; smaller is better throughout",
    target="asv",
    is_folder=True,
    write=write,
)
