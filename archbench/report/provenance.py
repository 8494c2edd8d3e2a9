"""Where each number came from: config, data, source, seed, versions, machine, threads, backend and load.

What is the same for the whole run is said once; what differs stands with its cell.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from archbench.record import Record
from archbench.report.evidence import Evidence
from archbench.report.rows import Row, cell_id, flatten

MOST_CELLS = 200
_MOST_VALUES = 4


@dataclass(frozen=True, kw_only=True)
class CellProvenance:
    """Everything needed to make one cell's numbers again. `config` is JSON."""

    heading: str
    facts: tuple[tuple[str, str], ...]
    config: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """`common` holds for every record; cells follow in the order of the tables. `left_out` counts those not shown."""

    common: tuple[tuple[str, str], ...]
    cells: tuple[CellProvenance, ...]
    left_out: int


def provenance(evidence: Evidence) -> Provenance:
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    holders: dict[str, int] = defaultdict(int)
    of_cell: dict[tuple[str, str, str], list[tuple[Record, dict[str, Any]]]] = defaultdict(list)
    for record in evidence.records:
        facts = dict(_facts(record))
        of_cell[cell_id(record)].append((record, facts))
        for name, value in facts.items():
            values[name].setdefault(repr(value), value)
            holders[name] += 1
    n_records = len(evidence.records)
    common = [
        name
        for name in values
        if len(values[name]) == 1 and (holders[name] == n_records or name.startswith("settings of"))
    ]
    varying = [name for name in values if name not in common]
    order = {row: index for index, row in enumerate(evidence.rows)}
    groups = sorted(of_cell.values(), key=lambda group: (order[evidence.row_of(group[0][0])], group[0][0].seed))
    return Provenance(
        common=tuple((name, _shown(next(iter(values[name].values())))) for name in common),
        cells=tuple(_cell(evidence.row_of(group[0][0]), group, varying) for group in groups[:MOST_CELLS]),
        left_out=max(0, len(groups) - MOST_CELLS),
    )


def _facts(record: Record) -> Iterator[tuple[str, Any]]:
    """What may differ from record to record, by name."""
    yield "suite", record.suite
    yield "run", record.run
    yield "command", record.command
    yield "corpus", record.corpus
    yield "codec", record.codec
    yield "data sha256", record.data_sha256
    yield "source sha256", record.source_sha256
    yield from flatten(record.environment)
    for name, backend in record.backend.items():
        yield f"backend of {name}", backend
    yield f"settings of {record.metric}", json.dumps(record.settings, ensure_ascii=False, sort_keys=True)
    if record.metric == "training" and record.protocol and not record.at:
        yield "training protocol", record.protocol


def _cell(row: Row, group: Sequence[tuple[Record, dict[str, Any]]], varying: Sequence[str]) -> CellProvenance:
    head = group[0][0]
    created = sorted(record.created for record, _ in group if record.created)
    lines = [("cell", head.cell), ("checkpoint", head.checkpoint), ("seed", str(head.seed)), ("size", head.size)]
    if created:
        lines.append(("measured", created[0] if created[0] == created[-1] else f"{created[0]} to {created[-1]}"))
    for name in varying:
        found = [facts[name] for _, facts in group if name in facts]
        if found:
            lines.append((name, _range(found)))
    return CellProvenance(
        heading=f"{row.name}, seed {head.seed}",
        facts=tuple((name, value or "not recorded") for name, value in lines),
        config=json.dumps(head.config, indent=1, ensure_ascii=False, sort_keys=True),
    )


def _range(values: Sequence[Any]) -> str:
    """`0.4 to 1.9` for numbers that vary, the first few for words; lists go element by element."""
    distinct = list({repr(value): value for value in values}.values())
    if len(distinct) == 1:
        return _shown(distinct[0])
    if all(type(value) in (int, float) for value in distinct):
        return f"{min(distinct)} to {max(distinct)}"
    if all(type(value) is list for value in distinct) and len({len(value) for value in distinct}) == 1:
        return ", ".join(_range(list(column)) for column in zip(*distinct, strict=True))
    more = len(distinct) - _MOST_VALUES
    return ", ".join(_shown(value) for value in distinct[:_MOST_VALUES]) + (f" and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    if type(value) is list:
        return ", ".join(map(str, value)) or "not recorded"
    return str(value) if value not in (None, "") else "not recorded"
