"""Looks that stay apart, and trainings that did not begin from first weights."""

from __future__ import annotations

import dataclasses

from test_report import MAMBA, TRANSFORMER, Model, measured

from archbench.record import Record
from archbench.report.budget import TRAINING_BYTES, budget
from archbench.report.evidence import Evidence
from archbench.report.palette import COLOURS, styles
from archbench.report.quality import budget_table, quality_table
from archbench.report.rows import Row
from archbench.report.verdict import headline

START = "results/base/checkpoints/abc"


def row(label: str, size: str = "micro") -> Row:
    return Row(
        label=label, size=size, codec="bytes", corpus="stdlib", variant=1, architecture=label, name=label,
        reference=False, seeds=(0,),
    )  # fmt: skip


def test_labels_share_no_colour_as_long_as_there_are_colours() -> None:
    rows = [row(f"label {i}") for i in range(len(COLOURS))]
    assert len(COLOURS) > 10
    assert len({look.colour for look in styles(rows).values()}) == len(rows)


def test_many_labels_share_no_look() -> None:
    rows = [row(f"label {i}") for i in range(8 * len(COLOURS))]
    assert len({(look.colour, look.marker) for look in styles(rows).values()}) == len(rows)


def test_sizes_of_a_label_share_its_colour_alone() -> None:
    rows = [row(f"label {i}", size) for i in range(20) for size in ("nano", "micro")]
    looks = styles(rows)
    assert looks[rows[0]].colour == looks[rows[1]].colour
    assert len({(look.colour, look.marker, look.face) for look in looks.values()}) == len(rows)


def started(model: Model) -> list[Record]:
    return [
        dataclasses.replace(r, config={**r.config, "start_from": START, "start_sha256": "0" * 64})
        for r in measured(model)
    ]


def test_a_row_that_began_from_trained_weights_is_flagged_everywhere() -> None:
    evidence = Evidence([*measured(TRANSFORMER), *started(MAMBA)])
    shown = quality_table(evidence)
    flags = {line[0].text: line[0].flagged for line in shown.lines}
    assert flags == {"transformer": False, "mamba": True}
    assert any(START in note and "mamba" in note for note in shown.notes)
    head = headline(evidence, [])
    assert f"mamba went on from the trained weights of {START}, whose training no budget counts" in head.exploratory
    assert not any("+0.0 %" in reason for reason in head.exploratory)


def test_its_training_counts_as_unmatched() -> None:
    evidence = Evidence([*measured(TRANSFORMER), *started(MAMBA)])
    match = budget(evidence, evidence.architectures)
    (spent,) = [axis for axis in match if axis.axis == TRAINING_BYTES]
    assert spent.mismatch == 0 and not spent.matched
    assert [axis.matched for axis in match if axis.axis == "parameters"] == [True]
    shown = budget_table(match)
    line = next(line for line in shown.lines if line[0].text.startswith(TRAINING_BYTES))
    assert (line[-1].text, line[-1].detail) == ("not matched", "mamba had training before")
    assert line[2].flagged and not line[1].flagged
    assert shown.notes[-1].startswith("mamba went on from trained weights")


def test_first_weights_are_not_flagged() -> None:
    evidence = Evidence([*measured(TRANSFORMER), *measured(MAMBA)])
    assert not any(line[0].flagged for line in quality_table(evidence).lines)
    assert not any("trained weights" in reason for reason in headline(evidence, []).exploratory)
