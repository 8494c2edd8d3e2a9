"""The table of gates between a memory and local attention: a row a model, a column a head."""

from __future__ import annotations

from archbench.report import table
from archbench.report.evidence import Evidence
from archbench.report.table import Column, Table


def gate_table(evidence: Evidence) -> Table | None:
    """None where no model has gates."""
    found = {row: evidence.series(row, "gates", "gate") for row in evidence.rows}
    rows = [row for row, gates in found.items() if gates]
    if not rows:
        return None
    heads = sorted({(gate.coordinates["layer"], gate.coordinates["head"]) for row in rows for gate in found[row]})
    lines = []
    for row in rows:
        gates = {(gate.coordinates["layer"], gate.coordinates["head"]): gate for gate in found[row]}
        lines.append(
            (
                table.text(row.name),
                *(table.number(gates[head]) if head in gates else table.text("none") for head in heads),
                table.number(evidence.find(row, "gates", "spread")),
            )
        )
    return Table(
        key="gates",
        title="How far each head trusts its memory",
        columns=(
            Column(name="architecture", numeric=False),
            *(Column(name=f"layer {layer}, head {head}", hint="weight of the memory") for layer, head in heads),
            Column(name="spread", hint="largest less smallest"),
        ),
        lines=tuple(lines),
        notes=("Layers are those that have a memory. Gates that all stand where they began (0.5) were not trained.",),
    )
