"""The table of written programs: intervals over problems, seeds pooled, pairs with the best, MBPP beside mbpp-mini."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import MAMBA, TRANSFORMER, Model, md_tables, measured, record, written

from archbench.record import Record
from archbench.report.code import code_tables
from archbench.report.evidence import Evidence
from archbench.report.table import Table, TableCell
from archbench.stats import wilson_interval

MINI = {"protocol": "mbpp-mini@0shot", "temperature": 0.0}
REAL = {"protocol": "mbpp@lm-eval-3shot", "temperature": 0.0}


def passed(model: Model, metric: str, at: dict[str, Any], values: list[float], seed: int = 0, k: int = 1) -> Record:
    mean = sum(values) / len(values)
    return record(
        model, metric, "pass_at_k", mean, at={**at, "k": k}, seed=seed, samples=values, unit="fraction",
        low=max(0.0, mean - 0.1), high=min(1.0, mean + 0.1), confidence=0.95,
    )  # fmt: skip


def scores(model: Model, share: float, seeds: tuple[int, ...] = (0,)) -> Iterator[Record]:
    """MBPP: nothing of 50 problems. mbpp-mini: `share` of 100, the easy ones first, and a little luck."""
    for seed in seeds:
        for metric, at, values in (
            ("mbpp", REAL, [0.0] * 50),
            ("mbpp_mini", MINI, [float(n < 100 * share + 4 * seed) for n in range(100)]),
        ):
            protocol = {"protocol": at["protocol"]}
            yield passed(model, metric, at, values, seed)
            yield record(model, metric, "valid_syntax", 0.9, at=at, seed=seed, unit="fraction")
            yield record(model, metric, "problems", len(values), at=protocol, seed=seed, unit="problem")
            yield record(model, metric, "solution_bits_per_byte", 0.25, at=protocol, seed=seed, unit="bit/byte")


def lines(table: Table) -> dict[tuple[str, str], dict[str, TableCell]]:
    names = [column.name for column in table.columns]
    return {(line[0].text, line[1].text): dict(zip(names, line, strict=True)) for line in table.lines}


def table_of(records: list[Record]) -> Table:
    (table,) = code_tables(Evidence(records))
    return table


def test_mbpp_comes_first_and_mbpp_mini_beside_it() -> None:
    table = table_of([*scores(TRANSFORMER, 0.5), *scores(MAMBA, 0.3)])
    assert [(line[0].text, line[1].text) for line in table.lines] == [
        ("transformer", "mbpp@lm-eval-3shot"),
        ("mamba", "mbpp@lm-eval-3shot"),
        ("transformer", "mbpp-mini@0shot"),
        ("mamba", "mbpp-mini@0shot"),
    ]
    found = lines(table)["transformer", "mbpp-mini@0shot"]
    assert {name: found[name].text for name in ("decoding", "problems", "pass@1", "bits per byte")} == {
        "decoding": "greedy", "problems": "100", "pass@1": "50.0 %", "bits per byte": "0.250",
    }  # fmt: skip
    assert found["pass@1"].detail == "[40.0, 60.0]"
    assert any("says nothing about MBPP" in note for note in table.notes)


def test_rows_are_held_against_the_best_problem_by_problem() -> None:
    found = lines(table_of([*scores(TRANSFORMER, 0.5), *scores(MAMBA, 0.3)]))
    assert found["transformer", "mbpp-mini@0shot"]["to the best"].text == "best"
    behind = found["mamba", "mbpp-mini@0shot"]["to the best"]
    assert behind.text == "\N{MINUS SIGN}20 %" and not behind.more
    assert found["mamba", "mbpp@lm-eval-3shot"]["to the best"].text == "nothing to compare"  # nothing passes


def test_what_the_pairs_do_not_tell_apart_is_said() -> None:
    draw = random.Random(0)
    one = [float(draw.random() < 0.5) for _ in range(100)]
    two = [value if draw.random() < 0.7 else 1 - value for value in one]
    at = {**MINI, "temperature": 0.5}
    table = table_of([passed(TRANSFORMER, "mbpp_mini", at, one), passed(MAMBA, "mbpp_mini", at, two)])
    cells = [line["to the best"] for line in lines(table).values()]
    assert sorted(cell.text == "best" for cell in cells) == [False, True]
    assert next(cell for cell in cells if cell.text != "best").more == "not told apart"
    assert {line["decoding"].text for line in lines(table).values()} == {"temperature 0.5"}


def test_seeds_are_pooled_over_problems_and_shown() -> None:
    found = lines(table_of([*scores(TRANSFORMER, 0.4, (0, 1, 2)), *scores(MAMBA, 0.3, (0, 1, 2))]))
    cell = found["transformer", "mbpp-mini@0shot"]["pass@1"]
    assert cell.sort == pytest.approx(0.44) and cell.more == "seeds 40 %, 44 %, 48 %"
    low, high = map(float, cell.detail.strip("[]").split(", "))
    assert 30 < low < 40 and 48 < high < 58  # over problems: the three seeds are much nearer to each other
    assert found["mamba", "mbpp-mini@0shot"]["to the best"].text == "\N{MINUS SIGN}10 %"


def test_where_nothing_passes_the_interval_still_has_width() -> None:
    cell = lines(table_of(list(scores(TRANSFORMER, 0.4, (0, 1)))))["transformer", "mbpp@lm-eval-3shot"]["pass@1"]
    assert cell.text == "0.0 %"
    assert cell.detail == f"[0.0, {100 * wilson_interval(0, 50).high:.1f}]"


def test_pass_at_10_of_a_row_with_too_few_completions() -> None:
    many = passed(TRANSFORMER, "mbpp_mini", {**MINI, "temperature": 0.5}, [0.5] * 9 + [0.0], k=10)
    found = table_of([*scores(TRANSFORMER, 0.5), passed(TRANSFORMER, "mbpp_mini", {**MINI, "temperature": 0.5},
                     [0.5, 0.1] * 5), many])  # fmt: skip
    by_decoding = {line[2].text: line for line in found.lines if line[1].text == MINI["protocol"]}
    names = [column.name for column in found.columns]
    assert by_decoding["greedy"][names.index("pass@10")].text == "too few drawn"
    assert by_decoding["temperature 0.5"][names.index("pass@10")].text == "45 %"


def test_a_missing_number_has_its_reason() -> None:
    reason = "no sandbox for untrusted code on this machine; install bubblewrap"
    refused = [
        record(TRANSFORMER, "mbpp_mini", "pass_at_k", None, at={**MINI, "k": 1}, reason=reason),
        record(TRANSFORMER, "mbpp_mini", "valid_syntax", 0.75, at=MINI, unit="fraction"),
        record(MAMBA, "mbpp_mini", "*", None, status="failed", reason="RuntimeError: out of memory"),
    ]
    found = lines(table_of(refused))
    assert found["transformer", "mbpp-mini@0shot"]["pass@1"].reason == reason
    assert found["transformer", "mbpp-mini@0shot"]["valid syntax"].text == "75 %"
    assert "out of memory" in found["mamba", "mbpp-mini@0shot"]["pass@1"].reason


def test_no_table_where_nobody_asked() -> None:
    assert code_tables(Evidence(list(measured(TRANSFORMER)))) == []


def test_the_report_holds_the_table_once(tmp_path: Path) -> None:
    records = [*scores(TRANSFORMER, 0.5), *scores(MAMBA, 0.3)]
    files = written(records, tmp_path)
    heads = [rows[0] for rows in md_tables(files.markdown)]
    assert sum("protocol" in head and any("pass@1" in cell for cell in head) for head in heads) == 1
    assert "mbpp_mini.pass_at_k" not in files.markdown.read_text()
