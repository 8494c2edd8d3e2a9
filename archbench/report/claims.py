"""What a run says of published claims: those that it has the records for, with the records linked."""

from __future__ import annotations

import os
from pathlib import Path

from archbench.claims.claim import load_claims
from archbench.claims.judge import Outcome, judge
from archbench.claims.run import load_run
from archbench.report.table import Column, Table, TableCell


def claims_table(results: Path, folder: Path) -> Table | None:
    """The claims judged by a results file, or by the newest in a results folder, on its own; None where it has the
    records for none. Links are relative to `folder`, where the report lies."""
    found = [outcome for outcome in judge(load_claims(), [load_run(results)]) if not outcome.missing]
    if not found:
        return None
    return Table(
        key="claims",
        title="Published claims, judged by this run alone",
        columns=(
            Column(name="claim", numeric=False),
            Column(name="verdict", numeric=False),
            Column(name="why", numeric=False),
            Column(name="published", numeric=False),
            Column(name="would support it, would contradict it", numeric=False),
        ),
        lines=tuple(_line(outcome, folder) for outcome in found),
        notes=(
            "Supported or contradicted: at this scale, by these records, with the whole interval on one side. "
            "`archbench claims run` asks all runs, and tells what could not be judged.",
        ),
    )


def _line(outcome: Outcome, folder: Path) -> tuple[TableCell, ...]:
    claim, evidence = outcome.claim, outcome.evidence
    file, first = evidence[0]["file"], evidence[0]["line"]
    records = f"{len(evidence)} record{'s' * (len(evidence) > 1)}, the first in line {first}"
    return (
        TableCell(text=claim.text, detail=claim.id, sort=claim.id),
        TableCell(text=outcome.verdict, detail="exploratory" * outcome.exploratory, sort=outcome.verdict),
        TableCell(
            text=outcome.reason,
            detail=claim.note,
            more=records,
            href=Path(os.path.relpath(file, folder)).as_posix(),
            sort=outcome.reason,
        ),
        TableCell(text=outcome.published, detail=claim.source, sort=outcome.published),
        TableCell(text=claim.supports, detail=claim.contradicts, sort=claim.supports),
    )
