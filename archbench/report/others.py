"""What has no table of its own: other quantities, and every failure and refusal with its reason in full."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from archbench.record import Record
from archbench.report import notation, table
from archbench.report.evidence import Evidence, coordinates
from archbench.report.table import Column, Table, TableCell

SHOWN_ELSEWHERE = {
    "training": {
        "seconds", "cpu_seconds", "tokens_per_second", "bytes_per_second", "flops", "flops_per_second",
        "matmul_utilisation", "loss", "steps",
    },
    "likelihood": {"bits_per_byte", "perplexity", "heldout_bytes"},
    "brier_lm": {"brier_lm", "brier_n"},
    "cost": {
        "parameters", "training_flops_per_token", "prefill_flops_per_token", "decode_flops_per_token",
        "flops_disagreement", "state_bytes", "training_flops_per_byte",
    },
    "design_cost": {
        "parameters", "training_flops_per_token", "training_flops", "prefill_flops_per_token",
        "decode_flops_per_token", "state_numbers", "state_bytes", "flops_disagreement",
    },
    "latency": {"time_to_first_token", "time_per_token", "prefill_rate"},
    "memory": {"peak_rss", "peak_device"},
    "energy": {"energy_per_token", "power"},
    "passkey": {
        "exact_match", "token_accuracy", "effective_length", "chance", "stage", "seconds", "projected_seconds",
        "state_bytes", "projected_state_bytes", "tokens_read", "text_bytes",
    },
    "mbpp": {"pass_at_k", "valid_syntax", "solution_bits_per_byte", "problems"},
    "mbpp_mini": {"pass_at_k", "valid_syntax", "solution_bits_per_byte", "problems"},
    "skill": {"accuracy", "exact_match", "chance", "state_bytes"},
    "speculation_speed": {
        "speedup", "predicted_speedup", "break_even", "tokens_per_step", "time_per_token", "identical_tokens",
        "compared_tokens", "unexplained_differences",
    },
    "gates": {"gate", "spread"},
    "speculation": {"tokens_per_step", "acceptance", "tokens_per_step_on_text", "distinct_8grams"},
}  # fmt: skip
"""Metric -> quantities that the other tables and figures show."""
MOST_LINES = 150


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
        title="What no other table shows",
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
    lines = [*_recorded(evidence), *_looked_for(evidence, tables)]
    if not lines:
        return None
    heads = ("status", "architecture", "what", "at", "reason in full")
    return Table(
        key="failures",
        title="Failed, unsupported and not recorded",
        columns=tuple(Column(name=name, numeric=False) for name in heads),
        lines=tuple(lines),
    )


def _recorded(evidence: Evidence) -> Iterator[tuple[TableCell, ...]]:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in evidence.problems():
        groups[record.status, record.reason].append(record)
    order = {"failed": 0, "unsupported": 1}
    for (status, reason), records in sorted(groups.items(), key=lambda group: order[group[0][0]]):
        rows = dict.fromkeys(evidence.row_of(record) for record in records)
        seeds = sorted({record.seed for record in records})
        metrics = list(dict.fromkeys(record.metric for record in records))
        quantities = list(dict.fromkeys(record.quantity for record in records if record.quantity != "*"))
        yield (
            table.text(status, flagged=status == "failed"),
            table.text(
                notation.listed([row.name for row in rows]),
                f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
            ),
            table.text(notation.listed(metrics), notation.listed(quantities) if quantities else ""),
            table.text(_where(records)),
            table.text(reason),
        )


def _looked_for(evidence: Evidence, tables: Sequence[Table]) -> Iterator[tuple[TableCell, ...]]:
    told = tuple({record.reason for record in evidence.problems()})
    places: dict[str, dict[str, None]] = defaultdict(dict)
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for shown in tables:
        for line in shown.lines:
            for column, cell in zip(shown.columns, line, strict=True):
                if cell.reason and not cell.reason.endswith(told):
                    name, what = (column.name, line[0].text) if shown.transposed else (line[0].text, column.name)
                    names[cell.reason][name] = None
                    places[cell.reason][what] = None
    for reason, found in places.items():
        yield (
            table.text("not recorded"),
            table.text(notation.listed(list(names[reason]))),
            table.text(", ".join(found)),
            table.text("everywhere"),
            table.text(reason),
        )


def _where(records: Sequence[Record]) -> str:
    """`context 256 and 512, batch 1`: the values of each coordinate."""
    values: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for name, value in record.at.items():
            if str(value) not in values[name]:
                values[name].append(str(value))
    return ", ".join(f"{name} {notation.listed(found)}" for name, found in values.items()) or "everywhere"
