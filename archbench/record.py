"""Records: what a run leaves behind, one JSON line per quantity, readable without torch.

A record holds the raw samples, not only their summary, and everything needed to know where the number came from. Every
planned job ends in at least one record: `ok`, `unsupported` with its reason, or `failed` with its error. Only an `ok`
record holds a value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from archbench.errors import RecordError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1

Better = Literal["lower", "higher", "neither"]
Status = Literal["ok", "unsupported", "failed"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured quantity of one cell, with its provenance.

    `cell` names what was asked for (architecture, config, data, budget, seed) and is stable across versions of the
    code; `checkpoint` also depends on the source that trained it; `job` names the (cell, metric, settings, source)
    whose answer this is, so that a second run knows what is done. `at` holds the coordinates of the point (context,
    batch, state carried or reset, ...). `samples` are the raw observations behind `value`; `along` gives, per
    sample, its position on named axes when the samples form a curve (loss against bytes). `low` and `high` bound
    `value` with confidence `confidence`; both are None when no interval was computed.
    """

    suite: str
    run: str
    job: str
    cell: str
    checkpoint: str
    label: str
    architecture: str
    size: str
    codec: str
    corpus: str
    seed: int
    metric: str
    metric_version: int
    quantity: str
    unit: str
    better: Better
    status: Status
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    samples: list[float] = field(default_factory=list)
    along: dict[str, list[float]] = field(default_factory=dict)
    at: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    data_sha256: str = ""
    source_sha256: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status == "ok":
            assert self.value is not None and math.isfinite(self.value), f"{self.metric}.{self.quantity}: {self.value}"
        else:
            assert self.value is None and self.reason, f"{self.metric}.{self.quantity}: a {self.status} needs a reason"

    def to_json(self) -> str:
        """One line of strict JSON (no NaN, no infinity)."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


_FIELDS = {f.name for f in dataclasses.fields(Record)}


def from_json(line: str, where: str) -> Record:
    """Parses one line.

    Raises:
        RecordError: the line is no record of a schema this version reads; the message begins with `where`.
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: not JSON ({error.msg} at column {error.colno}); delete the line") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise RecordError(f"{where}: not an archbench record (no 'schema' key); is this a results file?")
    if data["schema"] != SCHEMA:
        raise RecordError(f"{where}: record schema {data['schema']}, this version reads {SCHEMA}; run the suite again")
    unknown, missing = set(data) - _FIELDS, {"metric", "quantity", "status", "label"} - set(data)
    if unknown or missing:
        found = f"unknown keys {sorted(unknown)}" if unknown else f"missing keys {sorted(missing)}"
        raise RecordError(f"{where}: {found}; run the suite again")
    try:
        return Record(**data)
    except (TypeError, AssertionError) as error:
        raise RecordError(f"{where}: not a valid record ({error}); run the suite again") from None


class RecordFile:
    """A results file that only ever grows, by whole lines.

    Each append is flushed to disk before it returns, so a run killed at any moment loses at most the job in flight. A
    last line cut short by such a kill is dropped when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_bytes()
            whole = text.rfind(b"\n") + 1
            if whole != len(text):
                with path.open("r+b") as file:
                    file.truncate(whole)

    def append(self, records: Iterable[Record]) -> None:
        text = "".join(record.to_json() + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Record]:
        return iter(read(self.path)) if self.path.exists() and self.path.stat().st_size else iter(())


def read(path: str | Path) -> list[Record]:
    """Reads the records of a results file, or of the newest run in a results folder. A failure that a later try of
    the same job mended is left out.

    Raises:
        RecordError: nothing is there, or a line is damaged (the message names file and line).
    """
    file = newest(Path(path))
    lines = file.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if number == len(lines):
            break  # no newline at its end: a run is being written, or was killed while writing
        records.append(from_json(line, f"{file}:{number}"))
    if not records:
        raise RecordError(f"{file}: holds no records yet; run the suite with `archbench run`")
    answered = {record.job for record in records if record.status != "failed"}
    return [record for record in records if record.status != "failed" or record.job not in answered]


def newest(path: Path) -> Path:
    """`path` itself if it is a file, else the newest `*.jsonl` in it (run files begin with their start time)."""
    if path.is_file():
        return path
    if not path.exists():
        raise RecordError(f"{path}: no such file or folder; `archbench run SUITE` writes results/SUITE")
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise RecordError(f"{path}: holds no *.jsonl results file; `archbench run SUITE` writes one")
    return files[-1]


def load(path: str | Path) -> pd.DataFrame:
    """The records at `path` as a pandas DataFrame: one row a record, `at` spread into columns named `at.NAME`."""
    import pandas as pd

    rows = []
    for record in read(path):
        row = dataclasses.asdict(record)
        row.update({f"at.{name}": value for name, value in row["at"].items()})
        rows.append(row)
    return pd.DataFrame(rows)
