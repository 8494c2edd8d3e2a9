"""What has no table of its own: other quantities, failures and refusals, and where the numbers came from."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from archbench.record import Record
from archbench.report import notation, table
from archbench.report.evidence import Evidence, Row, coordinates, flatten
from archbench.report.table import Column, Table

SHOWN_ELSEWHERE = {
    "training": {
        "seconds", "cpu_seconds", "tokens_per_second", "bytes_per_second", "flops", "flops_per_second",
        "matmul_utilisation", "loss",
    },
    "likelihood": {"bits_per_byte", "perplexity"},
    "brier_lm": {"brier_lm", "brier_n"},
    "cost": {
        "parameters", "training_flops_per_token", "prefill_flops_per_token", "decode_flops_per_token",
        "flops_disagreement", "state_bytes", "training_flops_per_byte",
    },
    "latency": {"time_to_first_token", "time_per_token", "prefill_rate"},
    "memory": {"peak_rss", "peak_device"},
}  # fmt: skip
"""Metric -> quantities that the other tables and figures show."""
MOST_LINES = 150
MOST_CELLS = 300


def other_table(evidence: Evidence) -> Table | None:
    """Every quantity that no other table or figure shows; metrics of third parties land here."""
    pairs = dict.fromkeys((r.metric, r.quantity) for r in evidence.records if r.status == "ok")
    lines = []
    for metric, quantity in pairs:
        if quantity in SHOWN_ELSEWHERE.get(metric, ()):
            continue
        for row in evidence.rows:
            for finding in evidence.series(row, metric, quantity):
                at = coordinates(finding.coordinates) or "everywhere"
                cells = (table.text(f"{metric}.{quantity}"), table.text(row.name), table.text(at))
                lines.append((*cells, table.number(finding), table.text(finding.unit or "none")))
    if not lines:
        return None
    left = len(lines) - MOST_LINES
    notes = (f"{left} further lines are left out here; they are in the results file.",) if left > 0 else ()
    return Table(
        key="others",
        title="Other quantities",
        columns=(
            Column(name="quantity", numeric=False),
            Column(name="architecture", numeric=False),
            Column(name="at", numeric=False),
            Column(name="value"),
            Column(name="unit", numeric=False),
        ),
        lines=tuple(lines[:MOST_LINES]),
        notes=notes,
    )


def failures_table(evidence: Evidence, tables: Sequence[Table]) -> Table | None:
    """Every reason in full: those of the records, then those of numbers that the tables looked for in vain."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in evidence.problems():
        groups[record.status, record.metric, record.reason].append(record)
    order = {"failed": 0, "unsupported": 1}
    lines = []
    for (status, metric, reason), records in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        rows = dict.fromkeys(evidence.row_of(record) for record in records)
        quantities = list(dict.fromkeys(record.quantity for record in records if record.quantity))
        seeds = sorted({record.seed for record in records})
        lines.append(
            (
                table.text(status, flagged=status == "failed"),
                table.text(notation.listed([row.name for row in rows]), f"seeds {', '.join(map(str, seeds))}"),
                table.text(metric, notation.listed(quantities) if quantities else ""),
                table.text(_where(records)),
                table.text(reason),
            )
        )
    told = {record.reason for record in evidence.problems()}
    absences: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for shown in tables:
        for line in shown.lines:
            for column, cell in zip(shown.columns, line, strict=True):
                if cell.reason and cell.reason not in told and not any(cell.reason.endswith(known) for known in told):
                    absences[cell.reason].append(f"{shown.title}: {column.name}")
                    names[cell.reason].append(line[0].text)
    for reason, places in absences.items():
        lines.append(
            (
                table.text("not recorded"),
                table.text(notation.listed(list(dict.fromkeys(names[reason])))),
                table.text("; ".join(list(dict.fromkeys(places))[:6])),
                table.text("everywhere"),
                table.text(reason),
            )
        )
    if not lines:
        return None
    return Table(
        key="failures",
        title="Failed, unsupported and not recorded",
        columns=tuple(
            Column(name=name, numeric=False) for name in ("status", "architecture", "metric", "at", "reason in full")
        ),
        lines=tuple(lines),
    )


def _where(records: Sequence[Record]) -> str:
    """`context 256 and 512, batch 1`: the values of each coordinate."""
    values: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for name, value in record.at.items():
            if str(value) not in values[name]:
                values[name].append(str(value))
    return ", ".join(f"{name} {notation.listed(found)}" for name, found in values.items()) or "everywhere"


@dataclass(frozen=True, kw_only=True)
class CellProvenance:
    """Everything needed to make one cell's numbers again. `varying` are environment facts that changed in the run."""

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
    by_cell: dict[str, list[Record]] = defaultdict(list)
    for record in evidence.records:
        by_cell[record.cell].append(record)
    seen: dict[str, set[str]] = defaultdict(set)
    missing_somewhere: set[str] = set()
    flat = [dict(_facts(record)) for record in evidence.records]
    keys = dict.fromkeys(name for facts in flat for name in facts)
    for facts in flat:
        for name in keys:
            seen[name].add(repr(facts[name])) if name in facts else missing_somewhere.add(name)
    common = {name for name in keys if len(seen[name]) == 1 and name not in missing_somewhere}
    varying = [name for name in keys if name not in common]
    facts_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record, facts in zip(evidence.records, flat, strict=True):
        facts_of[record.cell].append(facts)
    order = {row: index for index, row in enumerate(evidence.rows)}
    cells = sorted(by_cell, key=lambda cell: (order[evidence.row_of(by_cell[cell][0])], by_cell[cell][0].seed))
    return Provenance(
        common=tuple((name, _shown(flat[0][name])) for name in keys if name in common),
        cells=tuple(
            _cell(evidence.row_of(by_cell[cell][0]), by_cell[cell], facts_of[cell], varying)
            for cell in cells[:MOST_CELLS]
        ),
        left_out=max(0, len(cells) - MOST_CELLS),
    )


def _facts(record: Record) -> Iterable[tuple[str, Any]]:
    """What may differ from record to record, by dotted name."""
    yield "suite", record.suite
    yield "run", record.run
    yield "command", record.command
    yield "corpus", record.corpus
    yield "codec", record.codec
    yield "data sha256", record.data_sha256
    yield "source sha256", record.source_sha256
    yield from flatten(record.environment)
    for name, backend in record.backend.items():
        yield f"backend {name}", backend


def _cell(
    row: Row, records: Sequence[Record], facts: Sequence[dict[str, Any]], varying: Sequence[str]
) -> CellProvenance:
    head = records[0]
    created = sorted(record.created for record in records if record.created)
    lines = [("cell", head.cell), ("checkpoint", head.checkpoint), ("seed", str(head.seed)), ("size", head.size)]
    if created:
        lines.append(("measured", created[0] if created[0] == created[-1] else f"{created[0]} to {created[-1]}"))
    for name in varying:
        values = [fact[name] for fact in facts if name in fact]
        if values:
            lines.append((name, _range(values)))
    config = json.dumps(head.config, indent=1, ensure_ascii=False, sort_keys=True)
    heading = f"{row.name}, seed {head.seed}"
    return CellProvenance(heading=heading, facts=tuple((n, v or "not recorded") for n, v in lines), config=config)


def _range(values: Sequence[Any]) -> str:
    """`0.4 to 1.9` for numbers that vary, all of them for words; lists go element by element."""
    distinct = list({repr(value): value for value in values}.values())
    if len(distinct) == 1:
        return _shown(distinct[0])
    if all(type(value) in (int, float) for value in distinct):
        return f"{min(distinct)} to {max(distinct)}"
    if all(type(value) in (list, tuple) for value in distinct) and len({len(value) for value in distinct}) == 1:
        return ", ".join(_range(list(column)) for column in zip(*distinct, strict=True))
    more = len(distinct) - 4
    return ", ".join(_shown(value) for value in distinct[:4]) + (f" and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    if type(value) in (list, tuple):
        return ", ".join(map(str, value)) or "not recorded"
    return str(value) if value not in (None, "") else "not recorded"
