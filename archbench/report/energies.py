"""The energy table: joules per token by work, batch and context, beside the power drawn then and at rest."""

from __future__ import annotations

from archbench.report import table
from archbench.report.evidence import Evidence
from archbench.report.grid import asked, context_columns, contexts_of, coordinate, nothing, points_of
from archbench.report.table import Column, Table

WORKS = ("prefill", "decode", "training_step")


def energy_table(evidence: Evidence) -> Table | str | None:
    """Works and batches down, contexts across; a sentence where nothing could be read, None where nobody asked."""
    rows, notes = asked(evidence, ("energy",))
    if not rows:
        return None
    contexts = contexts_of(evidence, rows, "energy", ["energy_per_token"])
    if not contexts:
        return "Energy per token: " + nothing(evidence, "energy", "energy_per_token")
    lines = []
    for row in rows:
        for at in points_of(evidence, row, "energy", "energy_per_token", ("work", "batch", "source")):
            if at.get("work") not in WORKS:
                continue
            power = evidence.find(row, "energy", "power", **at)
            idle = evidence.find(row, "energy", "power", work="idle", source=at.get("source"))
            lines.append(
                (
                    table.text(row.name),
                    table.text(str(at["work"]).replace("_", " ")),
                    coordinate(at.get("batch")),
                    table.text(str(at.get("source", "any"))),
                    *(
                        table.number(evidence.find(row, "energy", "energy_per_token", **at, context=context))
                        for context in contexts
                    ),
                    table.number(power),
                    table.number(idle),
                )
            )
    return Table(
        key="energy",
        title="Energy per token, gross",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="work", numeric=False),
            Column(name="batch", hint="rows"),
            Column(name="counter", numeric=False),
            *context_columns(contexts),
            Column(name="power", hint="W, longest context"),
            Column(name="idle power", hint="W"),
        ),
        lines=tuple(lines),
        notes=(
            "Joules per token by the counters of the whole processor (rapl) or GPU (nvml), whoever else used it; idle "
            "power is not subtracted.",
            *notes,
        ),
    )
