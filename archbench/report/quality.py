"""The quality table and the budget table: how well each architecture reads, and on how equal a budget."""

from __future__ import annotations

from archbench.report import notation, table
from archbench.report.budget import TOLERANCE, AxisMatch
from archbench.report.evidence import Evidence, Finding
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell

STATES = ("reset", "sliding", "carried")
"""What may be remembered from one evaluation window to the next; `reset` gives every architecture the same context."""
ESTIMATORS = (("teacher_forced", "teacher-forced"), ("sampled", "sampled"))


def quality_table(evidence: Evidence) -> Table:
    """Architectures first, then references; one line a row."""
    rows = evidence.rows
    window = brier_window(evidence)
    bits = {state: [evidence.find(row, "likelihood", "bits_per_byte", state=state) for row in rows] for state in STATES}
    perplexity = [
        evidence.find(row, "likelihood", "perplexity", state="reset", **_at_context(bits["reset"][index]))
        for index, row in enumerate(rows)
    ]
    brier = {
        estimator: [evidence.find(row, "brier_lm", "brier_lm", estimator=estimator, window=window) for row in rows]
        for estimator, _ in ESTIMATORS
    }
    columns, metrics = [Column(name="architecture", numeric=False)], [""]
    cells: list[list[TableCell]] = [[_heading(evidence, row) for row in rows]]
    for state in STATES:
        columns.append(Column(name=f"bits per byte, {state}", hint=_context_hint(bits[state])))
        metrics.append("likelihood")
        cells.append([_with_context(finding, bits[state]) for finding in bits[state]])
    columns.append(Column(name="perplexity", hint="per token, reset"))
    metrics.append("likelihood")
    cells.append([table.number(finding) for finding in perplexity])
    for estimator, name in ESTIMATORS:
        columns.append(Column(name=f"BrierLM, {name}", hint=f"0 to 100, {window} window"))
        metrics.append("brier_lm")
        cells.append([table.number(finding) for finding in brier[estimator]])
    for name, metric, quantity, at in (
        ("parameters", "cost", "parameters", {"kind": "total"}),
        ("training FLOPs", "training", "flops", {}),
        ("training time", "training", "seconds", {}),
    ):
        columns.append(Column(name=name))
        metrics.append(metric)
        cells.append([table.number(evidence.find(row, metric, quantity, **at)) for row in rows])
    columns.append(Column(name="seeds"))
    metrics.append("")
    cells.append([table.count(len(row.seeds)) for row in rows])
    asked = {metric for metric in metrics if not metric or any(evidence.planned(row, metric) for row in rows)}
    shown = [index for index, metric in enumerate(metrics) if metric in asked]
    scored = asked & {"likelihood", "brier_lm"}
    return Table(
        key="quality",
        title="Quality on held-out text" if scored else "What was trained",
        columns=tuple(columns[index] for index in shown),
        lines=tuple(zip(*(cells[index] for index in shown), strict=True)),
        notes=(
            *([_interval_note([f for found in bits.values() for f in found])] if scored else []),
            *_scored_note(evidence),
            *_codec_note(rows),
            *start_notes(evidence, rows),
        ),
        rule_after=len(evidence.architectures) if evidence.references else None,
    )


def brier_window(evidence: Evidence) -> str:
    """Bytes where codecs differ, else tokens; whichever was measured when only one was."""
    recorded = {
        finding.coordinates.get("window")
        for row in evidence.rows
        for quantity in ("brier_lm", "brier_n")
        for finding in evidence.series(row, "brier_lm", quantity)
    }
    preferred = "bytes" if len({row.codec for row in evidence.rows}) > 1 else "tokens"
    return preferred if preferred in recorded or not recorded else str(sorted(map(str, recorded))[0])


def budget_table(match: list[AxisMatch], name: str = "") -> Table:
    """Axes as lines, so that a mismatch is read across."""
    rows = [entry.row for entry in match[0].entries]
    lines = []
    for axis in match:
        cells = [table.text(axis.axis + (" (declared)" if axis.declared else ""), axis.note)]
        for entry in axis.entries:
            cell = table.number(entry.finding)
            if entry.deviation is None and not cell.reason:
                cell = TableCell(text=cell.text, detail="no value to hold it against", sort=cell.sort)
            elif entry.deviation is not None:
                detail = "reference point" if entry is axis.contenders[0] else deviation(entry.deviation)
                cell = TableCell(text=cell.text, detail=detail, sort=cell.sort, flagged=not entry.matched)
            cells.append(cell)
        cells.append(_verdict(axis))
        lines.append(tuple(cells))
    return Table(
        key="budget",
        transposed=True,
        title="What was matched, and how well" + (f", {name}" if name else ""),
        columns=(
            Column(name="axis", numeric=False),
            *(Column(name=row.name) for row in rows),
            Column(name=f"matched within {notation.share(TOLERANCE)}", numeric=False),
        ),
        lines=tuple(lines),
        notes=(
            "Declared: what the suite set out to make equal; only along these is anything ranked. The other axes are "
            "outcomes, which need not be equal.",
            *(
                f"{name} went on from trained weights; what their training spent is not in its figures."
                for name in dict.fromkeys(e.row.name for axis in match for e in axis.entries if e.started)
            ),
        ),
    )


def deviation(value: float) -> str:
    """`+1.3 %`, or `×12` where per cent stop being readable."""
    return notation.percent(value, signed=True) if value < 2 else notation.ratio(1 + value)


def _verdict(axis: AxisMatch) -> TableCell:
    if len(axis.contenders) < 2:
        return table.text("nothing to hold it against", "fewer than two architectures ran")
    if before := [entry.row.name for entry in axis.contenders if entry.started]:
        return table.text("not matched", f"{notation.listed(before)} had training before", flagged=True)
    if axis.mismatch is None:
        missing = [entry.row.name for entry in axis.contenders if entry.deviation is None]
        return table.text("not known", f"no value for {notation.listed(missing)}")
    if axis.matched:
        return table.text("matched", f"within {notation.percent(abs(axis.mismatch))}")
    return table.text("not matched", f"up to {deviation(axis.mismatch)}", flagged=True)


def _heading(evidence: Evidence, row: Row) -> TableCell:
    return table.text(row.name, "reference" if row.reference else "", flagged=bool(evidence.start_of(row)))


def start_notes(evidence: Evidence, rows: list[Row]) -> tuple[str, ...]:
    """One note for each row whose training went on from weights that it was given."""
    starts = {row.name: evidence.start_of(row) for row in rows}
    return tuple(
        f"Flagged: {name} went on from the trained weights of {start}; that training is in none of the budgets here."
        for name, start in starts.items()
        if start
    )


def _at_context(finding: Finding) -> dict[str, object]:
    context = finding.coordinates.get("context")
    return {} if context is None else {"context": context}


def _context_hint(findings: list[Finding]) -> str:
    shared = table.shared_note(findings, "context")
    return f"window {shared} tokens" if shared else ""


def _with_context(finding: Finding, column: list[Finding]) -> TableCell:
    cell = table.number(finding)
    context = finding.coordinates.get("context")
    if cell.reason or context is None or table.shared_note(column, "context"):
        return cell
    return TableCell(text=cell.text, detail=f"{cell.detail} window {context}".strip(), sort=cell.sort)


def _interval_note(findings: list[Finding]) -> str:
    """What the square brackets are."""
    known = [finding for finding in findings if finding.has_interval and finding.confidence is not None]
    if not known:
        return "No interval was recorded for bits per byte: differences cannot be judged."
    confidences = sorted({f"{100 * finding.confidence:g} %" for finding in known if finding.confidence is not None})
    spans = {finding.over for finding in known}
    over = {
        frozenset({"samples"}): "over held-out documents; they do not cover the luck of one training",
        frozenset({"seeds"}): "over seeds (t distribution); the value is the mean of the seeds",
    }.get(frozenset(spans), "over seeds where a row has several, else over held-out documents")
    return f"Brackets hold {notation.listed(confidences)} intervals {over}."


def _scored_note(evidence: Evidence) -> tuple[str, ...]:
    """How much text was read, if it was the same for all."""
    found = {f.value for row in evidence.rows for f in evidence.series(row, "likelihood", "heldout_bytes")}
    if len(found) != 1:
        return ()
    return (f"Scored: {notation.plain(float(found.pop() or 0), 'B')} of held-out text.",)


def _codec_note(rows: list[Row]) -> tuple[str, ...]:
    codecs = sorted({row.codec for row in rows})
    if len(codecs) == 1:
        return ()
    return (f"Codecs differ ({notation.listed(codecs)}): compare bits per byte, not perplexity.",)
