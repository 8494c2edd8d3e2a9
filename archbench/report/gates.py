"""The table of gates between a memory and local attention: a row a trained model, a column a head."""

from __future__ import annotations

from archbench.report import table
from archbench.report.evidence import Evidence
from archbench.report.table import Column, Table, TableCell


def gate_table(evidence: Evidence) -> Table | None:
    """None where no model has gates."""
    trained: dict[tuple[str, int], dict[tuple[int, int], float]] = {}
    for row in evidence.rows:
        for record in evidence.records_of(row, "gates", "gate"):
            if record.value is not None:
                at = (record.at["layer"], record.at["head"])
                trained.setdefault((row.name, record.seed), {})[at] = record.value
    if not trained:
        return None
    heads = sorted({head for gates in trained.values() for head in gates})
    several = len({seed for _, seed in trained}) > 1
    lines = [
        (
            table.text(f"{name}, seed {seed}" if several else name),
            *(_gate(gates[head]) if head in gates else table.text("none") for head in heads),
            _gate(max(gates.values()) - min(gates.values())),
        )
        for (name, seed), gates in trained.items()
    ]
    return Table(
        key="gates",
        title="How far each head trusts its memory",
        columns=(
            Column(name="architecture", numeric=False),
            *(Column(name=f"layer {layer}, head {head}", hint="weight of the memory") for layer, head in heads),
            Column(name="spread", hint="largest less smallest"),
        ),
        lines=tuple(lines),
        notes=(
            "Layers are those that have a memory. Gates that all stand where they began (0.5, unless `gate_init` says "
            "otherwise) were not trained. Heads of one seed are not those of another.",
        ),
    )


def _gate(value: float) -> TableCell:
    return TableCell(text=f"{value:.3f}", sort=value)
