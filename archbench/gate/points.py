"""Records of two runs laid beside each other: the same quantity of the same cell at the same place.

A cell is told by its label, size, codec and seed, as tables tell it; not by its hash, which an added option changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from archbench.errors import RecordError
from archbench.gate.quantities import rule_of
from archbench.record import Record, read


class Point(NamedTuple):
    """What a number is of. `at` are the sorted coordinates as JSON."""

    label: str
    size: str
    codec: str
    seed: int
    metric: str
    quantity: str
    at: str

    @property
    def cell(self) -> str:
        return f"{self.label}/{self.size}/seed{self.seed}"

    @property
    def name(self) -> str:
        """`bits_per_byte [context 64, state reset]`, for people."""
        at = ", ".join(f"{name} {value}" for name, value in json.loads(self.at).items())
        return f"{self.quantity} [{at}]" if at else self.quantity

    @property
    def key(self) -> str:
        """The quantity of a row whatever its seed, as noise files name it."""
        return f"{self.label}/{self.size}/{self.codec} {self.metric}.{self.quantity} {self.at}"


def point_of(record: Record) -> Point:
    at = json.dumps(record.at, sort_keys=True)
    return Point(record.label, record.size, record.codec, record.seed, record.metric, record.quantity, at)


def gated(records: Iterable[Record]) -> dict[Point, Record]:
    """The records with a value that the gate looks at; a later one replaces an earlier one."""
    return {point_of(record): record for record in records if record.status == "ok" and rule_of(record) is not None}


def read_records(path: str | Path, what: str) -> list[Record]:
    """The records of a file, or of the newest run of a folder. Raises RecordError with `what` in front."""
    try:
        return read(path)
    except RecordError as error:
        raise RecordError(f"{what} {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{what} {path}: cannot be read ({error}); give a results file or folder") from None


def why_missing(point: Point, records: Sequence[Record]) -> str:
    """What the current records say in place of a number."""
    of_cell = [r for r in records if (r.label, r.size, r.codec, r.seed) == point[:4]]
    if not of_cell:
        return "the cell is gone"
    of_metric = [r for r in of_cell if r.metric == point.metric]
    for record in of_metric:
        if record.status != "ok" and (record.quantity == "*" or point_of(record) == point):
            return f"{record.status}: {record.reason}"
    return "the quantity is gone" if of_metric else f"{point.metric} was not measured"
