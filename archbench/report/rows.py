"""Rows: which cells stand together in a line of a table, and what that line is called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archbench.record import Record

CellId = tuple[str, str, str]
"""Cell, label and size: one cell may be shown under two labels."""
_Place = tuple[str, str, str, str, int]
"""Label, size, codec, corpus, and which of a grid's cells."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table. `reference` rows are floors (n-gram models): see `_references`."""

    label: str
    size: str
    codec: str
    corpus: str
    variant: int
    architecture: str
    name: str
    reference: bool
    seeds: tuple[int, ...]

    @property
    def arena(self) -> tuple[str, str]:
        """Rows are held against each other only within one size and corpus."""
        return self.size, self.corpus


def cell_id(record: Record) -> CellId:
    return record.cell, record.label, record.size


def rows_of(records: Sequence[Record]) -> dict[CellId, Row]:
    """Cell -> row, in order of first appearance. Cells that differ only in their seed share a row.

    Of several cells with equal label, size, codec, corpus and seed (a grid), the first of each seed make one row, the
    second another, and so on. A row's name says no more than is needed to tell it from the others.
    """
    first: dict[CellId, Record] = {}
    for record in records:
        first.setdefault(cell_id(record), record)
    references = _references(records)
    taken: dict[tuple[Any, ...], int] = defaultdict(int)
    key_of: dict[CellId, _Place] = {}
    for cell, record in first.items():
        place = (record.label, record.size, record.codec, record.corpus)
        taken[place, record.seed] += 1
        key_of[cell] = (*place, taken[place, record.seed])
    cells_of: dict[_Place, list[CellId]] = defaultdict(list)
    for cell, key in key_of.items():
        cells_of[key].append(cell)
    made: dict[_Place, Row] = {}
    for key, cells in cells_of.items():
        siblings = [other for other in cells_of if other[0] == key[0]]
        parts = [part for index, part in enumerate(key[:4]) if index == 0 or len({k[index] for k in siblings}) > 1]
        grid = [other for other in siblings if other[:4] == key[:4]]
        if len(grid) > 1:
            parts.append(_difference(first[cells[0]], [first[cells_of[other][0]] for other in grid]))
        made[key] = Row(
            label=key[0],
            size=key[1],
            codec=key[2],
            corpus=key[3],
            variant=key[4],
            architecture=first[cells[0]].architecture,
            name=" ".join(parts),
            reference=cells[0] in references,
            seeds=tuple(sorted({first[cell].seed for cell in cells})),
        )
    return {cell: made[key] for cell, key in key_of.items()}


def _references(records: Sequence[Record]) -> set[CellId]:
    """Cells that are floors and not contenders: no trained parameter, or asked neither for their training nor for
    their cost while other cells were."""
    cells = {cell_id(record) for record in records}
    contenders = {cell_id(record) for record in records if record.metric in ("training", "cost")}
    untrained = {
        cell_id(record)
        for record in records
        if record.quantity == "parameters" and record.at.get("kind") == "total" and record.value == 0
    }
    return untrained | (cells - contenders if contenders else set())


def _difference(record: Record, siblings: Sequence[Record]) -> str:
    """`learning_rate=0.002`: the settings in which a record's config differs from those of its siblings."""
    flat = [dict(flatten(sibling.config)) for sibling in siblings]
    varying = [name for name in flat[0] if name != "seed" and len({repr(f.get(name)) for f in flat}) > 1]
    own = dict(flatten(record.config))
    shown = [f"{name.rsplit('.', 1)[-1]}={own.get(name)}" for name in varying[:2]]
    return " ".join(shown) or f"variant {siblings.index(record) + 1}"


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested mapping."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
