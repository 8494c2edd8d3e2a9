"""The table of written programs: pass@k on MBPP, and beside it on mbpp-mini, with what tells models apart that pass
nothing.

Brackets here are over problems even where there are several trainings: those of two seeds would say nothing. What each
seed gave stands beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from archbench.record import Record
from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding, freeze
from archbench.report.grid import asked, coordinate
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell
from archbench.report.verdict import equality
from archbench.stats import CONFIDENCE, percentile_interval, resampled_ratios, wilson_interval

METRICS = ("mbpp", "mbpp_mini")


def code_tables(evidence: Evidence) -> list[Table]:
    """One table, by metric, protocol and temperature; none where nobody asked."""
    rows, notes = asked(evidence, METRICS)
    return [_table(evidence, rows, notes)] if rows else []


def _table(evidence: Evidence, rows: Sequence[Row], notes: tuple[str, ...]) -> Table:
    ks = sorted({int(f.coordinates["k"]) for row in rows for metric in METRICS
                 for f in evidence.series(row, metric, "pass_at_k")} or {1})  # fmt: skip
    lines, compared = [], False
    for metric in METRICS:
        having = [row for row in rows if evidence.planned(row, metric)]
        for at in _points(evidence, having, metric):
            best = _best(evidence, having, metric, at)
            compared = compared or best is not None
            for row in having:
                lines.append(
                    (
                        table.text(row.name),
                        table.text(str(at.get("protocol", metric))),
                        _decoding(at),
                        table.number(evidence.find(row, metric, "problems", **_only(at, "protocol"))),
                        *(_passing(evidence, row, metric, {**at, "k": k}) for k in ks),
                        _behind(evidence, row, best, metric, at),
                        _mean_cell(evidence, row, metric, "valid_syntax", at),
                        table.number(evidence.find(row, metric, "solution_bits_per_byte", **_only(at, "protocol"))),
                    )
                )
    return Table(
        key="code",
        title="Programs written: MBPP, and mbpp-mini beside it",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="protocol", numeric=False),
            Column(name="decoding", numeric=False),
            Column(name="problems"),
            *(Column(name=f"pass@{k}") for k in ks),
            Column(name="to the best", hint="pass@1, same problems"),
            Column(name="valid syntax", hint="share of completions"),
            Column(name="bits per byte", hint="of the solutions"),
        ),
        lines=tuple(lines),
        notes=(
            f"Brackets of shares hold {notation.share(CONFIDENCE)} intervals over problems; they do not cover the luck "
            "of a training, which the seeds' own values show. pass@k is the unbiased estimate.",
            "mbpp-mini is generated, and asks for combinations of operations that were trained in other combinations. "
            "It says nothing about MBPP, on which models of this size are expected to pass nothing.",
            *([f"To the best: {equality(evidence, list(rows), 'rows are ')}"] if compared else []),
            *notes,
        ),
    )


def _points(evidence: Evidence, rows: Sequence[Row], metric: str) -> list[dict[str, Any]]:
    """Every protocol and temperature that completions were drawn under; one without either where all failed."""
    found = {freeze(_only(f.coordinates, "protocol", "temperature"))
             for row in rows for f in evidence.series(row, metric, "pass_at_k")}  # fmt: skip
    for row in rows:
        for record in evidence.problems_of(row, metric):
            if record.quantity == "pass_at_k":
                found.add(freeze(_only(record.at, "protocol", "temperature")))
    return [dict(point) for point in sorted(found)] or [{}] * bool(rows)


def _only(at: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: at[name] for name in names if name in at}


def _decoding(at: dict[str, Any]) -> TableCell:
    temperature = at.get("temperature")
    if temperature is None:
        return coordinate(None)
    return TableCell(text=f"temperature {temperature:g}" if temperature else "greedy", sort=float(temperature))


def _best(evidence: Evidence, rows: Sequence[Row], metric: str, at: dict[str, Any]) -> Row | None:
    """The row with the highest pass@1, if any passes at all and there are others of its size and corpus."""
    passing = {row: evidence.find(row, metric, "pass_at_k", **at, k=1).value or 0.0 for row in rows}
    best = max(rows, key=lambda row: passing[row])
    return best if passing[best] and len({row.arena for row in rows}) == 1 < len(rows) else None


def _passing(evidence: Evidence, row: Row, metric: str, at: dict[str, Any]) -> TableCell:
    drawn = evidence.find(row, metric, "pass_at_k", **{**at, "k": 1})
    if at["k"] > 1 and drawn.value is not None and not evidence.series(row, metric, "pass_at_k", **at):
        return table.text("too few drawn")
    return _mean_cell(evidence, row, metric, "pass_at_k", at)


def _mean_cell(evidence: Evidence, row: Row, metric: str, quantity: str, at: dict[str, Any]) -> TableCell:
    """The mean over problems and seeds, with an interval over problems, and each seed's value."""
    records = evidence.records_of(row, metric, quantity, **at)
    found = evidence.find(row, metric, quantity, **at)
    values = _by_problem(records)
    if len(records) < 2 or values is None:
        return table.number(found)
    low, high = _over_problems(values)
    pooled = Finding(value=float(values.mean()), low=low, high=high, confidence=CONFIDENCE, over="samples",
                     n=len(values), seeds=len(records), unit=found.unit, better=found.better, at=found.at)  # fmt: skip
    cell = table.number(pooled)
    each = ", ".join(notation.percent(record.value or 0.0) for record in records)
    return TableCell(text=cell.text, detail=cell.detail, more=f"seeds {each}", sort=cell.sort)


def _behind(evidence: Evidence, row: Row, best: Row | None, metric: str, at: dict[str, Any]) -> TableCell:
    """pass@1 minus that of the best row, problem by problem."""
    if best is None:
        return table.text("nothing to compare")
    if row == best:
        return TableCell(text="best", sort=0.0)
    mine, theirs = (_by_problem(evidence.records_of(each, metric, "pass_at_k", **at, k=1)) for each in (row, best))
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return table.text("not comparable", "other problems, or none")
    extra = mine - theirs
    interval = percentile_interval(resampled_ratios(extra, np.ones_like(extra)))
    shown = notation.percent(float(extra.mean()), signed=True)
    detail = f"[{notation.percent(interval.low, signed=True)}, {notation.percent(interval.high, signed=True)}]"
    more = "" if interval.high < 0 else "not told apart"
    return TableCell(text=shown, detail=detail, more=more, sort=float(extra.mean()))


def _by_problem(records: Sequence[Record]) -> np.ndarray | None:
    """Each problem's mean over seeds; None where there is none, or seeds were asked different problems."""
    if not records or len({len(record.samples) for record in records}) != 1 or not records[0].samples:
        return None
    return np.mean([record.samples for record in records], axis=0)


def _over_problems(values: np.ndarray) -> tuple[float, float]:
    if set(values.tolist()) in ({0.0}, {1.0}):  # resampling would give no width
        interval = wilson_interval(round(values.sum()), len(values))
    else:
        interval = percentile_interval(resampled_ratios(values, np.ones_like(values)))
    return interval.low, interval.high
