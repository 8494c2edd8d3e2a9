"""Speculation and energy in the report: the numbers are those of the records, and claims need their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import MAMBA, TRANSFORMER, Model, measured, record, written

from archbench.record import Record
from archbench.report.drawing import house_style
from archbench.report.energies import energy_table
from archbench.report.evidence import Evidence
from archbench.report.palette import styles
from archbench.report.speculation import speculation_tables
from archbench.report.speculation_figure import speculation_figure
from archbench.report.table import Table, TableCell

MTP = Model("mtp", bits=2.0, first=1e-3, slope=0, state=0, growth=2048)
PAIRS = Model("pairs", bits=1, first=1, slope=0, state=1, growth=0)
NOT_READABLE = "/sys/class/powercap has no readable energy counter: there is no such folder on this machine"


def accepted(model: Model, shares: tuple[float, ...]) -> Iterator[Record]:
    at = {"sampling": "greedy"}
    for position, share in enumerate(shares, start=1):
        yield record(model, "speculation", "acceptance", share, at={**at, "position": position}, unit="fraction")
    yield record(model, "speculation", "tokens_per_step", sum(shares), at=at, unit="token/step")
    yield record(model, "speculation", "tokens_per_step_on_text", 1.25, at=at, unit="token/step")
    yield record(model, "speculation", "distinct_8grams", 0.5, at=at, unit="fraction")


def timed(batch: int, sampling: str, speedup: tuple[float, float, float], **proof: float) -> Iterator[Record]:
    at: dict[str, Any] = {"context": 128, "batch": batch, "sampling": sampling}
    value, low, high = speedup
    yield record(MTP, "speculation_speed", "tokens_per_step", 2.1, at=at, unit="token/step")
    for clock in ("wall", "cpu"):
        place = {**at, "clock": clock}
        yield record(
            MTP, "speculation_speed", "speedup", value, at=place, low=low, high=high, confidence=0.95, unit="ratio"
        )
        yield record(MTP, "speculation_speed", "break_even", 1.5, at=place, unit="token/step")
        yield record(MTP, "speculation_speed", "predicted_speedup", 1.4, at=place, unit="ratio")
        for way, seconds in (("plain", 2e-3), ("speculative", 2e-3 / value)):
            where = {**place, "decoding": way}
            yield record(MTP, "speculation_speed", "time_per_token", seconds, at=where, unit="s/token")
    for quantity, number in proof.items():
        yield record(MTP, "speculation_speed", quantity, number, at=at, unit="")


def exact(n: float = 2048, share: float = 1.0, unexplained: float = 0) -> dict[str, float]:
    return {"identical_tokens": share, "compared_tokens": n, "unexplained_differences": unexplained}


def usual() -> list[Record]:
    return [
        *accepted(TRANSFORMER, (1.0,)), *accepted(PAIRS, (1.0, 1.0)),
        *accepted(MTP, (1.0, 0.6, 0.5)), *timed(1, "greedy", (1.38, 1.3, 1.45), **exact()),
        *timed(4, "greedy", (0.98, 0.9, 1.1), **exact(n=100, share=0.97, unexplained=1)),
        *timed(4, "temperature 1", (0.8, 0.7, 0.9)),
        record(TRANSFORMER, "speculation_speed", "*", None, reason="the model writes one token a step by design"),
    ]  # fmt: skip


def cells(shown: Table) -> dict[tuple[str, ...], dict[str, TableCell]]:
    names = [column.name for column in shown.columns]
    return {tuple(cell.text for cell in line[:3]): dict(zip(names, line, strict=True)) for line in shown.lines}


def test_acceptance_by_position() -> None:
    acceptance, _ = speculation_tables(Evidence(usual()))
    lines = {key[0]: line for key, line in cells(acceptance).items()}
    assert list(lines) == ["transformer", "pairs", "mtp"]
    assert [lines["transformer"][f"token {position}"].text for position in (1, 2)] == ["100 %", "never"]
    line = lines["mtp"]
    assert [line[f"token {position}"].text for position in (1, 2, 3)] == ["100 %", "60 %", "50 %"]
    assert line["distinct 8-grams"].text == "50 %"


def test_the_speed_table_claims_only_what_its_interval_shows() -> None:
    _, speed = speculation_tables(Evidence(usual()))
    lines = cells(speed)
    assert lines["mtp", "1", "greedy"]["it"].text == "pays"
    assert lines["mtp", "4", "greedy"]["it"].text == "not decided"
    assert lines["mtp", "4", "temperature 1"]["it"].text == "costs"
    first = lines["mtp", "1", "greedy"]
    assert [first[name].text for name in ("break-even", "speed-up, predicted", "speed-up, measured")] == [
        "1.50", "1.40", "1.380",
    ]  # fmt: skip
    assert first["speed-up, measured"].detail == "[1.300, 1.450]"
    assert first["time per token"].text == "1.45 ms"  # the second of that name: with drafts
    assert any("transformer" in note for note in speed.notes)


def test_the_proof_stands_beside_the_speed() -> None:
    _, speed = speculation_tables(Evidence(usual()))
    lines = cells(speed)
    assert lines["mtp", "1", "greedy"]["same text"].text == "all of 2048"
    broken = lines["mtp", "4", "greedy"]["same text"]
    assert (broken.text, broken.detail, broken.flagged) == ("3 differ in 100", "1 of them no near-tie", True)
    assert lines["mtp", "4", "temperature 1"]["same text"].text == "equal in law"


def test_the_figure_has_acceptance_and_the_cost_model() -> None:
    evidence = Evidence(usual())
    with house_style():
        drawn = speculation_figure(evidence, styles(evidence.rows))
    assert drawn is not None
    assert len(drawn.figure.axes) == 2
    points = drawn.data[drawn.data["quantity"] == "speedup"]
    assert list(points["value"]) == [1.38, 0.98, 0.8]
    assert list(drawn.data[drawn.data["quantity"] == "acceptance"]["value"]) == [1.0, 0.6, 0.5]


def test_nothing_is_said_where_nothing_drafts() -> None:
    evidence = Evidence(list(accepted(TRANSFORMER, (1.0,))))
    assert [shown.key for shown in speculation_tables(evidence)] == ["acceptance"]
    assert speculation_tables(Evidence(list(energy(MTP)))) == []
    assert speculation_figure(evidence, styles(evidence.rows)) is None


def test_a_whole_report_has_the_tables_the_figure_and_each_number_once(tmp_path: Path) -> None:
    latencies = [r for model in (TRANSFORMER, MAMBA) for r in measured(model, batches=(1,)) if r.metric == "latency"]
    files = written([*latencies, *usual()], tmp_path)
    text = files.markdown.read_text(encoding="utf-8")
    assert "What drafting is worth" in text and "figures/speculation.png" in text
    assert "**Crossovers**" in text
    assert "speculation_speed.speedup" not in text
    assert "figure-speculation" in files.html.read_text(encoding="utf-8")


def energy(model: Model) -> Iterator[Record]:
    for source, factor in (("rapl", 1.0), ("nvml", 10.0)):
        for context in (128, 512):
            at = {"work": "decode", "context": context, "batch": 1, "source": source}
            yield record(
                model, "energy", "energy_per_token", 2.5e-3 * factor, at=at, unit="J/token", low=2.4e-3 * factor,
                high=2.6e-3 * factor, confidence=0.95,
            )  # fmt: skip
            yield record(model, "energy", "power", 40.0 * factor + context, at=at, unit="W")
        yield record(model, "energy", "power", 12.0 * factor, at={"work": "idle", "source": source}, unit="W")


def test_energy_stands_by_counter_beside_the_power_at_rest() -> None:
    shown = energy_table(Evidence(list(energy(MTP))))
    assert isinstance(shown, Table)
    by_counter = {line[3].text: line for line in shown.lines}
    assert by_counter["rapl"][4].text == "2.50 mJ"
    assert by_counter["rapl"][4].detail == "[2.40, 2.60]"
    assert by_counter["nvml"][5].text == "25.0 mJ"
    assert [cell.text for cell in by_counter["rapl"][-2:]] == ["552", "12"]
    assert "idle power is not subtracted" in shown.notes[0]


def test_energy_that_cannot_be_read_is_a_sentence_and_unasked_energy_is_nothing() -> None:
    refused = [
        record(MTP, "energy", quantity, None, reason=NOT_READABLE, at={"source": "rapl"})
        for quantity in ("energy_per_token", "power")
    ]
    assert energy_table(Evidence(refused)) == f"Energy per token: {NOT_READABLE}."
    assert energy_table(Evidence(usual())) is None


@pytest.mark.parametrize(("joules", "text"), [(3.2e-6, "3.20 µJ"), (0.5e-9, "0.500 nJ"), (2.0, "2 J")])
def test_joules_have_readable_units(joules: float, text: str) -> None:
    (made,) = [record(MTP, "energy", "energy_per_token", joules, at={"work": "prefill", "context": 8}, unit="J/token")]
    shown = energy_table(Evidence([made]))
    assert isinstance(shown, Table)
    assert shown.lines[0][4].text == text
