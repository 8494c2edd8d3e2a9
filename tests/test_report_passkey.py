"""The passkey part of a report, from records made here: reach, other texts, costs, heatmaps and words."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archbench.record import Record, RecordFile
from archbench.report import write_report
from archbench.report.evidence import Evidence
from archbench.report.passkey import passkey_remarks, passkey_tables
from archbench.report.passkey_grids import Tally, grids
from archbench.report.table import Table, TableCell

LENGTHS, DEPTHS = (512, 32_768, 2**20), (0.0, 0.5, 1.0)
DEAR = (
    "beyond the budget: projected 9.8e+03 s and 1.2e+10 bytes of states at 1048576 tokens; it is 600 s and 4e+09 bytes"
)
STAGES = [{"context": 128, "replay": 1.0}, {"context": 256, "replay": 1.0}, {"context": 512, "replay": 30_000.0}]
VARIANTS = [{"name": "plain", "settings": {}}, {"name": "decoys", "settings": {"decoys": 0.3}}]


def record(label: str, quantity: str, value: float | None, **more: Any) -> Record:
    model = {"segment": 128, "frontend_conv": 8} if label != "full" else {}
    task = {"name": "passkey", "stages": STAGES}
    given: dict[str, Any] = {
        "suite": "long_context", "run": "r", "job": f"{label}-passkey", "cell": f"cell-{label}", "checkpoint": label,
        "label": label, "architecture": label, "size": "custom", "codec": "bytes", "corpus": "stdlib", "seed": 0,
        "metric": "passkey", "metric_version": 1, "quantity": quantity, "unit": "", "better": "higher",
        "status": "ok" if value is not None else "unsupported", "value": value,
        "settings": {"variants": VARIANTS},
        "config": {"model": model, "training": {"budget": {"tokens": 4e6}, "context": 512, "task": task}},
    }  # fmt: skip
    return Record(**{**given, **more})


def answers(label: str, length: int, depth: float, right: int, n: int = 10, **more: Any) -> Iterator[Record]:
    at = {"variant": "plain", "learned": "trained", "length": length, "depth": depth, **more}
    if at["variant"] == "plain":
        at["distance"] = round((1 - depth) * (length - 300))
    samples = [1.0] * right + [0.0] * (n - right)
    yield record(label, "exact_match", right / n, samples=samples, at=at)
    yield record(label, "token_accuracy", right / n + 0.1 * (1 - right / n), at=at)


def measured() -> list[Record]:
    """`memory` solves all plain texts, `full` none beyond 32K, which it is not asked for; `local` the end alone."""
    found = []
    for label, solved in (("memory", True), ("full", True), ("local", False)):
        plain = {"variant": "plain", "learned": "trained"}
        found.append(record(label, "stage", 2.0 if label == "local" else 3.0, at={"of": 3}))
        found.append(record(label, "chance", 1e-5, at=plain))
        found.append(record(label, "effective_length", {"memory": 2**20, "full": 512, "local": 0}[label], at=plain))
        for length in LENGTHS:
            at = {**plain, "length": length}
            refused = label == "full" and length == 2**20
            for depth in DEPTHS:
                if refused:
                    place = {**at, "depth": depth, "distance": 1}
                    found += [record(label, q, None, at=place, reason=DEAR) for q in ("exact_match", "token_accuracy")]
                else:
                    right = 10 if depth == 1.0 or (solved and (label == "memory" or length == 512)) else 0
                    found += answers(label, length, depth, right)
            state = 16_900.0 if label == "memory" else 1024.0 * length
            found.append(record(label, "projected_state_bytes", state, at=at))
            found.append(record(label, "projected_seconds", 9800.0 if refused else length / 1e4, at=at))
            if not refused:
                found.append(record(label, "seconds", length / 1e4, at=at))
                found.append(record(label, "state_bytes", state, at=at))
                found += [
                    record(label, "tokens_read", n, at={**at, "way": w}) for w, n in (("shared", 3), ("apart", 5))
                ]
        for depth in DEPTHS:
            found += answers(label, 512, depth, 3 if label == "memory" else 10, variant="decoys")
    return found


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    return {table.key: table for table in passkey_tables(Evidence(measured()))}


def cells(table: Table, row: str) -> dict[str, TableCell]:
    (line,) = [line for line in table.lines if line[0].text == row]
    return dict(zip([column.name for column in table.columns], line, strict=True))


def test_shares_are_sums_over_depths_with_wilson_intervals(tables: dict[str, Table]) -> None:
    memory, local = (cells(tables["passkey"], name) for name in ("memory", "local"))
    assert (memory["1M"].text, memory["1M"].detail) == ("30/30", "[0.89, 1.00]")
    assert (local["32K"].text, local["32K"].more) == ("10/30", "digits 40 %")
    assert memory["effective length"].text == "1M" and local["effective length"].text == "below 512"
    assert (memory["learned"].text, memory["learned"].detail) == ("stage 3 of 3", "windows of 128, 256 and 512")
    assert memory["learned"].more == "replay 30000, convolution of 8 in front"
    assert local["learned"].text == "stage 2 of 3"


def test_what_was_not_run_gives_its_reason_and_its_projected_cost(tables: dict[str, Table]) -> None:
    reach, cost = (cells(tables[key], "full")["1M"] for key in ("passkey", "passkey-cost"))
    assert reach.reason == DEAR and reach.text == "beyond the budget"
    assert (cost.text, cost.detail) == ("projected 2.72 h", "state 1.07 GB")
    assert cells(tables["passkey-cost"], "memory")["1M"].more == "read 60 %"
    (smaller,) = [note for note in tables["passkey-cost"].notes if "times less" in note]
    assert "the state of memory takes 16.9 kB a row" in smaller and "1.07 GB of full" in smaller


def test_notes_hold_chance_and_segments(tables: dict[str, Table]) -> None:
    notes = " ".join(tables["passkey"].notes)
    assert "Chance: 1e-05 for all digits" in notes
    assert f"{(32_768 - 300) // 128} at 32K" in notes and "(memory and local)" in notes


def test_caveats_come_from_the_records(tables: dict[str, Table]) -> None:
    other = tables["passkey-texts"]
    assert cells(other, "memory")["decoys"].text == "9/30"
    notes = " ".join(other.notes)
    assert "Caveat: memory solves 1M of plain, but answers 9/30 at 512 of decoys." in notes
    assert "Caveat: full" not in notes
    assert "plain: filler alone; decoys: decoys 0.3" in notes


def test_remarks_name_what_solves_and_what_does_not() -> None:
    solved, full, failed = passkey_remarks(Evidence(measured()))
    assert solved == (
        "Passkey, memory: solved at every depth up to 1M tokens (30/30 there, interval [0.89, 1.00]); trained in "
        "windows of 128, 256 and 512 tokens, filler replay 30000, convolution of 8 in front."
    )
    assert "full: solved at every depth up to 512 tokens" in full
    assert failed == ("Passkey, not solved at every depth even at 512 tokens: local (training reached stage 2 of 3).")


def test_trained_and_zero_shot_rows_stand_apart() -> None:
    records = [*measured(), *answers("plain_lm", 512, 0.0, 0, learned="zero-shot")]
    records = [r for r in records if r.label != "plain_lm" or "learned" in r.at]
    (reach, *_) = passkey_tables(Evidence(records))
    assert cells(reach, "plain_lm")["learned"].text == "zero-shot"
    assert [grid.name for grid in grids(Evidence(records)) if grid.learned == "zero-shot"] == ["plain_lm (zero-shot)"]


def test_solved_needs_a_share_and_enough_samples() -> None:
    assert Tally(right=4, n=4).solved and Tally(right=18, n=20).solved
    assert not Tally(right=3, n=3).solved and not Tally(right=17, n=20).solved
    assert not Tally(reason="not run").solved


def test_seeds_are_pooled() -> None:
    second = [
        Record(**{**vars(r), "seed": 1, "cell": r.cell + "1", "value": None if r.value is None else r.value * 1.0})
        for r in measured()
    ]
    (reach, *_) = passkey_tables(Evidence([*measured(), *second]))
    assert cells(reach, "memory")["1M"].text == "60/60"


def test_without_passkey_records_there_is_nothing() -> None:
    other = [Record(**{**vars(measured()[0]), "metric": "training", "quantity": "seconds", "at": {}})]
    assert passkey_tables(Evidence(other)) == [] and passkey_remarks(Evidence(other)) == []


def test_the_report_has_the_heatmap_and_its_numbers(tmp_path: Path) -> None:
    RecordFile(tmp_path / "run.jsonl").append(measured())
    files = write_report(tmp_path)
    assert {path.name for path in files.figures if path.stem == "passkey"} == {"passkey.png", "passkey.svg"}
    (data,) = [path for path in files.data if path.stem == "passkey"]
    lines = list(csv.DictReader(data.read_text(encoding="utf-8").splitlines()))
    (one,) = [
        n for n in lines if (n["row"], n["length"], n["depth"], n["variant"]) == ("memory", "32768", "0.0", "plain")
    ]
    assert (one["right"], one["asked"], one["segments away"]) == ("10.0", "10", "253.0")
    refused = [n for n in lines if n["row"] == "full" and n["length"] == str(2**20)]
    assert len(refused) == 3 and all(n["asked"] == "0" and n["reason"] == DEAR for n in refused)
    text = files.markdown.read_text(encoding="utf-8")
    assert "Passkey: answers with every digit right, by length and depth" in text
    assert text.count("Passkey is necessary, not sufficient") == 1
    assert DEAR.split(";")[0] in text and "What no other table shows" not in text
