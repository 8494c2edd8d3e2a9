"""Runs as claims see them: the records of a results file with their line numbers, cells that differ in their seed
together."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from archbench.claims.check import Cells
from archbench.errors import RecordError
from archbench.record import Record, from_json, newest

COUNTED = ("cost", "design_cost")
"""Metrics whose numbers are counts: no sample, no interval, and the same for every seed."""
UNTAUGHT = ("latency", "memory", "energy")
"""Metrics whose numbers do not depend on what was learned, so that one training tells as much as several."""


class Line(NamedTuple):
    """A record and where it stands, counted from 1."""

    record: Record
    number: int


@dataclass(frozen=True, eq=False)
class Row:
    """Cells that differ in their seed only. `lines` are of all their records."""

    label: str
    architecture: str
    size: str
    codec: str
    corpus: str
    config: Mapping[str, Any]
    lines: Sequence[Line]

    @property
    def name(self) -> str:
        return f"{self.label} {self.size} {self.codec}"

    @property
    def parameters(self) -> float | None:
        """All of them, where a cost metric counted them."""
        found = [
            line.record.value
            for line in self.lines
            if line.record.quantity == "parameters" and line.record.at.get("kind") == "total"
        ]
        return found[0] if found else None

    def matches(self, cells: Cells) -> bool:
        """Whether a selector means this row."""
        for name in ("architecture", "size", "codec", "corpus"):
            wanted = getattr(cells, name)
            if wanted is not None and wanted != getattr(self, name):
                return False
        if cells.label is not None and not fnmatchcase(self.label, cells.label):
            return False
        return all(_has(setting(self.config, key), wanted) for key, wanted in cells.config.items())


@dataclass(frozen=True, eq=False)
class Run:
    """The newest run of a results folder. `file` is None for records that lie in no file."""

    suite: str
    file: Path | None
    rows: Sequence[Row] = field(repr=False)

    @property
    def name(self) -> str:
        return self.suite if self.file is None else self.file.parent.name

    @property
    def records(self) -> Iterable[Record]:
        return (line.record for row in self.rows for line in row.lines)

    @cached_property
    def scale(self) -> str:
        """The scale of what was run: of `claims.claim.SCALES`."""
        if all(record.metric == "design_cost" for record in self.records):
            return "paper-cost"
        on_gpu = any("cuda" in record.backend.values() or ", cuda" in record.protocol for record in self.records)
        return "gpu" if on_gpu else "laptop"


def setting(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _has(found: Any, wanted: Any) -> bool:
    return found is not None if wanted == "*" else bool(found == wanted)


def run_of(lines: Iterable[Line], file: Path | None = None) -> Run:
    """Lines of one results file as a run. A failure that a later try of the same job mended is left out, and of
    several answers for one cell and point the last one counts.

    Raises:
        RecordError: there are none.
    """
    found = list(lines)
    if not found:
        raise RecordError(f"{file or 'records'}: holds no records yet; run the suite with `archbench run`")
    answered = {line.record.job for line in found if line.record.status != "failed"}
    last: dict[tuple[Any, ...], Line] = {}
    for line in found:
        record = line.record
        if record.status != "failed" or record.job not in answered:
            last[record.cell, record.label, record.size, record.metric, record.quantity, _frozen(record.at)] = line
    groups: dict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in last.values():
        record = line.record
        place = (record.label, record.architecture, record.size, record.codec, record.corpus)
        groups[(*place, _frozen(record.config))].append(line)
    return Run(found[-1].record.suite, file, [_row(group) for group in groups.values()])


def _row(lines: Sequence[Line]) -> Row:
    record = lines[0].record
    place = (record.label, record.architecture, record.size, record.codec, record.corpus)
    return Row(*place, config=record.config, lines=lines)


def _frozen(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


def load_run(path: Path) -> Run:
    """The newest run of a results folder, or of a results file. Raises RecordError for a damaged one."""
    file = newest(path)
    text = file.read_text(encoding="utf-8").split("\n")
    whole = text[:-1]  # what no newline ends is being written, or was cut short
    lines = (Line(from_json(line, f"{file}:{i}"), i) for i, line in enumerate(whole, start=1) if line.strip())
    return run_of(lines, file)


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run's own or one that holds such folders; the newest run first.

    Raises:
        RecordError: a folder holds no run, or a results file is damaged.
    """
    runs = []
    for folder in folders:
        if folder.is_file() or any(folder.glob("*.jsonl")):
            inside = [folder]
        else:
            inside = sorted({file.parent for file in folder.glob("*/*.jsonl") if file.stat().st_size})
        if not inside:
            raise RecordError(f"{folder}: holds no results; `archbench run SUITE` writes results/SUITE")
        runs += [load_run(path) for path in inside]
    return sorted(runs, key=lambda run: run.file.name if run.file else "", reverse=True)
