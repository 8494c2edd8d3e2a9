"""The report, from records made here: its numbers are those of the records, and nothing is missing without a reason."""

from __future__ import annotations

import csv
import dataclasses
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archbench.errors import RecordError
from archbench.record import Record, RecordFile
from archbench.report import ReportFiles, notation, write_report
from archbench.report.budget import budget, declared_axes
from archbench.report.crossings import crossings
from archbench.report.evidence import Evidence, Finding
from archbench.report.latencies import LATENCIES, latency_table
from archbench.report.pairs import difference
from archbench.report.palette import styles
from archbench.report.quality import quality_table
from archbench.report.table import Table, TableCell
from archbench.report.verdict import headline

CONTEXTS = (128, 512, 2048, 8192)
UNITS = {
    "seconds": "s", "cpu_seconds": "s", "tokens_per_second": "token/s", "bytes_per_second": "B/s", "flops": "FLOP",
    "flops_per_second": "FLOP/s", "matmul_utilisation": "fraction", "loss": "nat/token", "steps": "step",
    "bits_per_byte": "bit/byte", "perplexity": "ratio", "heldout_bytes": "B", "brier_n": "fraction",
    "brier_lm": "points", "parameters": "parameter", "state_bytes": "B", "flops_disagreement": "fraction",
    "training_flops_per_byte": "FLOP/B", "time_to_first_token": "s", "time_per_token": "s/token",
    "prefill_rate": "token/s", "peak_rss": "B", "accepted": "token",
}  # fmt: skip
NO_LIKELIHOOD = "this model gives no probabilities to tokens (it has no likelihood); brier_lm compares it with others"
REFUSED = "no geometric mean: brier_3 = 0.012 lies in [-0.004, 0.027], which holds 0; measure on more text"
OUT_OF_MEMORY = "the worker was killed: out of memory (peak 11.2 GiB | limit 8 GiB)\nsee <log>"


class Model:
    """What a made-up architecture would measure."""

    def __init__(
        self, label: str, *, bits: float, first: float, slope: float, state: float, growth: float,
        parameters: float = 4e5, size: str = "micro", half: float = 0.02,
    ) -> None:  # fmt: skip
        self.label, self.size, self.bits, self.half, self.parameters = label, size, bits, half, parameters
        self.first, self.slope, self.state, self.growth = first, slope, state, growth

    def per_token(self, context: int, batch: int) -> float:
        return (self.first + self.slope * context) * (0.7 + 0.3 * batch)

    def state_bytes(self, context: int) -> float:
        return self.state + self.growth * context


TRANSFORMER = Model("transformer", bits=2.052, first=0.6e-3, slope=1.1e-6, state=0, growth=2048)
MAMBA = Model("mamba", bits=1.934, first=1.7e-3, slope=0, state=180_000, growth=0, parameters=4.1e5)


def record(model: Model, metric: str, quantity: str, value: float | None, **more: Any) -> Record:
    seed = more.pop("seed", 0)
    unit = UNITS.get(quantity, "FLOP/token" if quantity.endswith("flops_per_token") else "")
    given: dict[str, Any] = {
        "suite": "quick", "run": "20261121T101500", "job": f"{model.label}-{model.size}-{seed}-{metric}",
        "cell": f"cell-{model.label}-{model.size}-{seed}", "checkpoint": f"weights-{model.label}-{model.size}-{seed}",
        "label": model.label, "architecture": model.label, "size": model.size, "codec": "bytes", "corpus": "stdlib",
        "seed": seed, "metric": metric, "metric_version": 1, "quantity": quantity, "unit": unit,
        "better": "lower", "status": "ok" if value is not None else "unsupported", "value": value,
        "command": "archbench run quick --only transformer,mamba", "created": "2026-11-21T10:15:00+00:00",
        "config": {
            "model": {"d_model": 128, "n_layers": 4},
            "training": {"budget": {"bytes": 2e6, "tokens": None, "flops": None}, "learning_rate": 4e-3},
            "match": "parameters",
        },
        "data_sha256": "d" * 64, "source_sha256": "5" * 64, "backend": {"selective_scan": "native"},
        "settings": {"batch": 16},
        "environment": {
            "cpu": "AMD EPYC 9B14", "machine": "x86_64", "cores": 2, "memory_bytes": 25_769_803_776, "python": "3.11.7",
            "system": "Linux 6.18", "packages": {"torch": "2.13.0", "numpy": "2.3.5"}, "host": "0a1b2c3d4e5f",
            "commit": "09f3568", "load_average": [round(0.4 + seed / 10, 2), 0.6, 0.7],
        },
    }  # fmt: skip
    return Record(**{**given, **more})


def measured(model: Model, seed: int = 0, batches: tuple[int, ...] = (1, 4), repeats: int = 50) -> Iterator[Record]:
    """All records of one cell."""
    noise = random.Random(seed + sum(map(ord, model.label)))
    luck = 0.01 * seed * (-1) ** seed
    flops = 6 * model.parameters * 2e6 * (1.12 if model.label == "mamba" else 1.0)
    protocol = {"protocol": "fp32, 1 threads, cpu, 1 sessions"}
    for quantity, value in (
        ("seconds", 310.0), ("cpu_seconds", 305.0), ("tokens_per_second", 6450.0), ("bytes_per_second", 6450.0),
        ("flops", flops), ("flops_per_second", flops / 310), ("matmul_utilisation", 0.31), ("steps", 976.0),
    ):  # fmt: skip
        yield record(model, "training", quantity, value, seed=seed, **protocol)
    steps = [2e6 * (i + 1) / 60 for i in range(60)]
    losses = [model.bits * 0.69 + 2.6 * math.exp(-i / 9) + noise.gauss(0, 0.02) for i in range(60)]
    along = {"bytes": steps, "flops": [s * flops / 2e6 for s in steps], "seconds": [s * 310 / 2e6 for s in steps]}
    at = {"phase": "train"}
    yield record(model, "training", "loss", losses[-1], samples=losses, along=along, at=at, seed=seed, **protocol)
    for state, shift in (("reset", 0.0), ("sliding", -0.03), ("carried", -0.06 if model.growth == 0 else 0.02)):
        bits = model.bits + shift + luck
        interval = {"low": bits - model.half, "high": bits + model.half, "confidence": 0.95, "samples": [bits] * 24}
        at = {"state": state, "context": 256}
        yield record(model, "likelihood", "bits_per_byte", bits, at=at, seed=seed, **interval)
        yield record(model, "likelihood", "perplexity", 2**bits, at=at, seed=seed)
        yield record(model, "likelihood", "heldout_bytes", 131072.0, at=at, seed=seed)
    for estimator in ("teacher_forced", "sampled"):
        for n, value in enumerate((0.31, 0.12, 0.05, 0.021), start=1):
            at = {"n": n, "estimator": estimator, "window": "tokens", "context": 128}
            width = 0.004 if estimator == "teacher_forced" else 0.012
            yield record(
                model, "brier_lm", "brier_n", value, at=at, seed=seed, low=value - width, high=value + width,
                confidence=0.95, samples=[value] * 24,
            )  # fmt: skip
        at = {"estimator": estimator, "window": "tokens", "context": 128}
        if estimator == "sampled":
            yield record(model, "brier_lm", "brier_lm", None, reason=REFUSED, at=at, seed=seed)
        else:
            yield record(
                model, "brier_lm", "brier_lm", 7.91, at=at, seed=seed, low=7.4, high=8.4, confidence=0.95
            )  # fmt: skip
    yield record(model, "cost", "parameters", model.parameters, at={"kind": "total"}, seed=seed)
    yield record(model, "cost", "parameters", model.parameters - 32768, at={"kind": "non_embedding"}, seed=seed)
    for context in CONTEXTS:
        yield record(model, "cost", "state_bytes", model.state_bytes(context), at={"context": context}, seed=seed)
        for work, factor in (("training", 6), ("prefill", 2), ("decode", 2)):
            for way, off in (("analytic", 1.0), ("traced", 1.0), ("meta", 1.0 if work != "decode" else 1.05)):
                at = {"count": way, "context": context, "causal": 0.5}
                value = factor * model.parameters * off + model.growth * context * factor / 8
                yield record(model, "cost", f"{work}_flops_per_token", value, at=at, seed=seed)
            wrong = 0.05 if work == "decode" else 0.0
            yield record(model, "cost", "flops_disagreement", wrong, at={"work": work, "context": context}, seed=seed)
        at = {"context": context}
        yield record(model, "cost", "training_flops_per_byte", flops / 2e6, at=at, seed=seed)
        for work in ("training_step", "prefill", "decode"):
            at = {"work": work, "context": context, "batch": 1}
            yield record(model, "memory", "peak_rss", 9e6 + 700.0 * context, at=at, seed=seed)
        for batch in batches:
            for clock in ("wall", "cpu"):
                at = {"context": context, "batch": batch, "clock": clock}
                for quantity, middle in (
                    ("time_per_token", model.per_token(context, batch)),
                    ("time_to_first_token", model.per_token(context, batch) * context / 9),
                    ("prefill_rate", 9 / model.per_token(context, batch)),
                ):
                    samples = [middle * noise.lognormvariate(0, 0.06) for _ in range(repeats)]
                    median = sorted(samples)[repeats // 2]
                    yield record(
                        model, "latency", quantity, median, at=at, seed=seed, samples=samples, low=median * 0.97,
                        high=median * 1.04, confidence=0.95,
                    )  # fmt: skip


def reference(label: str, bits: float) -> Iterator[Record]:
    model = Model(label, bits=bits, first=1e-4, slope=0, state=0, growth=0)
    for each in measured(model):
        if each.metric in ("likelihood", "brier_lm"):
            yield each


def failed(label: str) -> Iterator[Record]:
    model = Model(label, bits=0, first=0, slope=0, state=0, growth=0)
    for metric in ("training", "likelihood", "brier_lm", "cost", "latency", "memory"):
        yield record(model, metric, "*", None, status="failed", reason=OUT_OF_MEMORY)


def without_likelihood(label: str) -> Iterator[Record]:
    model = Model(label, bits=2.4, first=0.5e-3, slope=0.3e-6, state=20_000, growth=512)
    for each in measured(model):
        if each.metric != "likelihood":
            yield each
    yield record(model, "likelihood", "*", None, reason=NO_LIKELIHOOD)


def usual() -> list[Record]:
    """Two architectures, one without likelihood, one that failed, two references and a third party's quantity."""
    return [
        *measured(TRANSFORMER), *measured(MAMBA), *without_likelihood("calm"), *failed("memorizing"),
        *reference("unigram", 4.61), *reference("bigram", 3.42),
        record(MAMBA, "draft", "accepted", 2.75, at={"drafter": "subword"}),
    ]  # fmt: skip


def written(records: list[Record], folder: Path) -> ReportFiles:
    RecordFile(folder / "20261121T101500.jsonl").append(records)
    return write_report(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    return written(usual(), tmp_path_factory.mktemp("quick"))


def md_tables(path: Path) -> list[list[list[str]]]:
    """Every table of a Markdown file as rows of cells, its rule line left out."""
    tables: list[list[list[str]]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def table_with(path: Path, head: str) -> list[dict[str, str]]:
    """The Markdown table that has a column of this name, as dictionaries; hints are dropped from the heads."""
    for table in md_tables(path):
        heads = [re.sub(r"<br>.*", "", cell) for cell in table[0]]
        if head in heads:
            return [dict(zip(heads, row, strict=True)) for row in table[1:]]
    raise AssertionError(f"no table has a column {head}")


class Page(HTMLParser):
    """What the tests look at in a page: ids, links, tables, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.attributes.append((tag, found))
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag in ("td", "th"):
            self.cells.append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.cells[-1] += data


def test_numbers_of_the_quality_table_are_those_of_the_records(report: ReportFiles) -> None:
    rows = {row["architecture"].split()[0]: row for row in table_with(report.markdown, "bits per byte, reset")}
    assert list(rows) == ["transformer", "mamba", "calm", "memorizing", "unigram", "bigram"]
    assert rows["transformer"]["bits per byte, reset"] == r"2.052 \[2.032, 2.072\]"
    assert rows["mamba"]["bits per byte, reset"] == r"1.934 \[1.914, 1.954\]"
    assert rows["mamba"]["bits per byte, carried"].startswith("1.874")
    assert rows["transformer"]["perplexity"] == "4.15"  # 2^2.052 = 4.1468
    assert rows["transformer"]["parameters"] == "400 k"
    assert rows["mamba"]["training time"] == "5.17 min"
    assert rows["mamba"]["BrierLM, teacher-forced"] == r"7.91 \[7.40, 8.40\]"


def test_a_missing_number_is_its_reason_and_never_blank(report: ReportFiles) -> None:
    rows = {row["architecture"].split()[0]: row for row in table_with(report.markdown, "bits per byte, reset")}
    assert rows["calm"]["bits per byte, reset"].startswith("*this model gives no probabilities")
    assert rows["transformer"]["BrierLM, sampled"].startswith("*no geometric mean")
    assert rows["memorizing"]["bits per byte, reset"] == "*the worker was killed: out of memory*"
    assert rows["memorizing"]["training FLOPs"] == "*same reason*"
    cells = [cell for table in md_tables(report.markdown) for row in table[1:] for cell in row]
    cells += Page(report.html.read_text(encoding="utf-8")).cells
    for cell in cells:
        assert cell.strip(), "a blank cell"
        assert not re.search(r"\b(nan|NaN|None|inf)\b", cell), cell


def test_every_reason_stands_in_full_in_the_list_of_failures(report: ReportFiles) -> None:
    reasons = [row["reason in full"] for row in table_with(report.markdown, "reason in full")]
    for reason in (NO_LIKELIHOOD, REFUSED, OUT_OF_MEMORY):
        shown = reason.translate(str.maketrans({"|": r"\|", "[": r"\[", "]": r"\]", "<": "&lt;", "\n": " "}))
        assert shown in reasons
    rows = table_with(report.markdown, "reason in full")
    (unplanned,) = [row for row in rows if row["reason in full"] == "not measured; this run has no cost job for it"]
    assert (unplanned["status"], unplanned["architecture"]) == ("not recorded", "unigram and bigram")


def test_the_budget_table_says_what_was_matched(report: ReportFiles) -> None:
    rows = {row["axis"]: row for row in table_with(report.markdown, "axis")}
    verdict = "matched within 5 %"
    assert rows["parameters (declared)"]["mamba"] == "410 k (+2.5 %)"
    assert rows["parameters (declared)"][verdict] == "matched (within 2.5 %)"
    assert rows["training bytes (declared)"]["mamba"] == "2 MB (0.0 %)"
    assert rows["training FLOPs"]["mamba"] == "5.51 TFLOP ⚠ (+15 %)"  # 1.12 * 4.1e5 / 4e5 = 1.148
    assert rows["training FLOPs"][verdict] == "not matched ⚠ (up to +15 %)"
    assert rows["state bytes (at 8192 tokens)"]["transformer"] == "16.8 MB (reference point)"
    assert rows["state bytes (at 8192 tokens)"]["mamba"] == "180 kB ⚠ (−99 %)"


def said(records: list[Record]) -> str:
    head = headline(Evidence(records), [])
    return " ".join([*head.paragraphs, *(f"Exploratory: {reason}." for reason in head.exploratory)])


def quality(records: list[Record]) -> dict[str, dict[str, TableCell]]:
    shown = quality_table(Evidence(records))
    heads = [column.name for column in shown.columns]
    return {line[0].text: dict(zip(heads, line, strict=True)) for line in shown.lines}


def test_a_winner_is_named_only_where_intervals_are_apart() -> None:
    apart = said([*measured(TRANSFORMER), *measured(MAMBA)])
    assert "mamba has the lowest: its interval does not overlap with that of transformer" in apart
    assert "At equal parameters (within 2.5 %) and training bytes (exactly)" in apart
    wide = Model("mamba", bits=2.03, first=1.7e-3, slope=0, state=180_000, growth=0, parameters=4.1e5)
    close = said([*measured(TRANSFORMER), *measured(wide)])
    assert "the intervals of mamba and transformer overlap, so this run does not tell them apart" in close
    assert "has the lowest" not in close
    blind = [r for r in [*measured(TRANSFORMER), *measured(MAMBA)] if r.quantity not in ("parameters", "loss")]
    assert "nothing is ranked" in said(blind)


def test_exploratory_needs_a_reason() -> None:
    large = Model("mamba", bits=1.934, first=1e-3, slope=0, state=1e5, growth=0, parameters=4.4e5)
    text = said([*measured(TRANSFORMER), *measured(large)])
    assert "Exploratory: one seed, where 3 are needed" in text
    assert "Exploratory: parameters of mamba differ by +10 % from transformer" in text
    seeds = [r for model in (TRANSFORMER, MAMBA) for seed in range(3) for r in measured(model, seed, (1,), 6)]
    assert "Exploratory" not in said(seeds)


def test_a_failed_cell_neither_blocks_nor_joins_the_comparison() -> None:
    text = said([*failed("memorizing"), *measured(TRANSFORMER), *measured(MAMBA)])
    assert "mamba has the lowest" in text
    assert "memorizing has no bits per byte: the worker was killed: out of memory" in text


def test_an_order_that_depends_on_the_state_is_said() -> None:
    steady = Model("mamba", bits=2.052, first=1e-3, slope=0, state=1e5, growth=0)
    records = [r for r in measured(steady) if r.at.get("state") != "reset"]
    worse = Model("mamba", bits=2.2, first=1e-3, slope=0, state=1e5, growth=0)
    records += [r for r in measured(worse) if r.at.get("state") == "reset"]
    text = said([*measured(TRANSFORMER), *records])
    assert "transformer has the lowest" in text
    assert "With the state carried through each document, mamba has the lowest instead" in text


def test_flops_per_byte_are_those_of_the_training_window() -> None:
    config = {"training": {"budget": {"bytes": 2e6}, "context": 512}, "match": "training_flops"}
    records = [
        dataclasses.replace(each, config=config, value=each.value * (each.at["context"] == 512 or 1.5))
        for model in (TRANSFORMER, MAMBA)
        for each in measured(model)
        if each.quantity == "training_flops_per_byte" and each.value is not None
    ]
    evidence = Evidence(records)
    (match,) = [axis for axis in budget(evidence, evidence.architectures) if axis.axis == "training FLOPs per byte"]
    assert (match.declared, match.note) == (True, "in windows of 512 tokens")
    assert [entry.finding.value for entry in match.entries] == [2.4e6, pytest.approx(2.7552e6)]


def test_what_is_not_below_the_floor_is_named() -> None:
    poor = Model("mamba", bits=3.41, first=1e-3, slope=0, state=1e5, growth=0)
    text = said([*measured(TRANSFORMER), *measured(poor), *reference("bigram", 3.42)])
    assert "Not clearly below the bigram reference (3.420 [3.400, 3.440]): mamba" in text


def test_several_seeds_become_a_mean_with_an_interval_over_seeds() -> None:
    records = [r for seed in range(3) for r in measured(MAMBA, seed, (1,), 6)]
    row = quality(records)["mamba"]
    values = [1.934, 1.924, 1.954]
    mean = sum(values) / 3
    half = 4.302653 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2) / math.sqrt(3)  # t(0.975, 2 df)
    cell = row["bits per byte, reset"]
    assert (cell.text, cell.detail) == (f"{mean:.3f}", f"[{mean - half:.3f}, {mean + half:.3f}]")
    assert row["seeds"].text == "3"
    assert (row["parameters"].text, row["parameters"].detail) == ("410 k", "")  # equal in all seeds
    assert "over seeds (t distribution)" in quality_table(Evidence(records)).notes[0]


def test_several_sizes_are_compared_each_by_itself() -> None:
    large = Model("mamba", bits=1.71, first=3e-3, slope=0, state=4e5, growth=0, parameters=1e6, size="mini")
    records = [*measured(MAMBA), *measured(large), *measured(TRANSFORMER)]
    assert list(quality(records)) == ["mamba micro", "mamba mini", "transformer"]
    text = said(records)
    assert "At size micro on stdlib" in text
    assert "At size mini on stdlib" in text
    assert "mamba mini has the lowest" not in text
    looks = styles(Evidence(records).rows)
    micro, mini, _ = looks.values()
    assert micro.colour == mini.colour
    assert (micro.marker, micro.face) != (mini.marker, mini.face)


def test_one_architecture_alone_is_enough(tmp_path: Path) -> None:
    files = written([r for r in measured(MAMBA) if r.metric == "likelihood"], tmp_path)
    text = files.markdown.read_text(encoding="utf-8")
    assert "There is no second architecture" in text
    assert "not measured; this run has no training job for it" in text
    assert files.figures == ()
    assert "Time per generated token against context: not measured; this run has no latency job for it" in text


def test_a_grid_names_its_rows_by_what_differs() -> None:
    records = []
    for rate in (0.002, 0.004):
        for each in measured(MAMBA, batches=(1,), repeats=6):
            config = {**each.config, "training": {**each.config["training"], "learning_rate": rate}}
            records.append(dataclasses.replace(each, config=config, cell=f"cell-{rate}"))
    assert list(quality(records)) == ["mamba learning_rate=0.002", "mamba learning_rate=0.004"]


def test_crossings_by_hand() -> None:
    """y = x / 100 meets y = 2 at x = 200, halfway between 100 and 400 on a logarithmic axis."""

    def curve(values: dict[float, float], half: float | None) -> dict[float, Finding]:
        return {
            x: Finding(value=y, low=None if half is None else y - half, high=None if half is None else y + half)
            for x, y in values.items()
        }

    rising, level = {100.0: 1.0, 400.0: 4.0}, {100.0: 2.0, 400.0: 2.0, 900.0: 2.0}
    (exact,) = crossings({"rising": curve(rising, None), "level": curve(level, None)}, noisy=False)
    assert (exact.x, exact.y) == (pytest.approx(200), pytest.approx(2))
    assert (exact.cheaper_before, exact.cheaper_after, exact.resolved) == ("rising", "level", True)
    (narrow,) = crossings({"rising": curve(rising, 0.2), "level": curve(level, 0.2)}, noisy=True)
    assert narrow.resolved
    (wide,) = crossings({"rising": curve(rising, 0.6), "level": curve(level, 0.6)}, noisy=True)
    assert not wide.resolved
    assert (
        crossings({"a": curve({1.0: 1.0, 2.0: 1.0}, None), "b": curve({1.0: 2.0, 2.0: 3.0}, None)}, noisy=False) == []
    )


def test_crossovers_of_time_are_found_and_said(report: ReportFiles) -> None:
    text = report.markdown.read_text(encoding="utf-8")
    assert re.search(
        r"Time per token at batch 1: transformer is lower up to ≈ [89]\d\d tokens of context, then mamba", text
    )
    assert "State of one row: calm is lower up to ≈ 3" in text  # 20,000 + 512 x = 180,000 at 312, on a straight line


def test_csv_holds_what_was_drawn(report: ReportFiles) -> None:
    files = {path.stem: list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) for path in report.data}
    assert set(files) == {
        "budget", "quality", "loss", "time_per_token", "time_to_first_token", "state_bytes", "brier", "throughput",
        "pareto",
    }  # fmt: skip
    state = {(row["row"], int(row["context"])): float(row["state_bytes (B)"]) for row in files["state_bytes"]}
    assert state["transformer", 2048] == TRANSFORMER.state_bytes(2048)
    assert state["mamba", 8192] == 180_000
    points = {row["row"]: row for row in files["quality"]}
    assert float(points["mamba"]["low"]) == pytest.approx(1.914)
    assert {(row["row"], row["batch"]) for row in files["time_per_token"]} == {
        (name, batch) for name in ("transformer", "mamba", "calm") for batch in ("1", "4")
    }
    assert len([row for row in files["loss"] if row["row"] == "mamba"]) == 60


def test_percentiles_only_from_enough_samples() -> None:
    def cells(repeats: int) -> list[TableCell]:
        shown = latency_table(Evidence(list(measured(MAMBA, repeats=repeats))), *LATENCIES[0], {})
        assert isinstance(shown, Table)
        return [cell for line in shown.lines for cell in line[2:]]

    assert all(re.match(r"p90 \d", cell.more) for cell in cells(44))
    assert all(cell.more == "" for cell in cells(43))


def test_flops_that_disagree_are_flagged(report: ReportFiles) -> None:
    rows = {row["work"]: row for row in table_with(report.markdown, "work") if row["architecture"] == "mamba"}
    assert rows["decode"]["128"] == "820 k ⚠ (traced 0.0 %, meta +5.0 %) (counts differ by 5.0 %)"
    assert rows["prefill"]["128"] == "820 k (all three agree)"
    assert "causal attention counts 0.5 of the full square" in report.markdown.read_text(encoding="utf-8")


def test_links_of_the_markdown_exist(report: ReportFiles) -> None:
    links = re.findall(r"\]\(([^)]+)\)", report.markdown.read_text(encoding="utf-8"))
    assert sum(link.startswith("figures/") for link in links) == 3 * 9
    for link in links:
        assert (report.markdown.parent / link).stat().st_size > 0
    assert {path.suffix for path in report.figures} == {".png", ".svg"}


def test_the_page_asks_for_nothing_and_has_each_id_once(report: ReportFiles) -> None:
    text = report.html.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert "http:" not in text and "https:" not in text
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.attributes:
        target = attributes.get("href") or attributes.get("src") or ""
        assert tag not in ("script", "img", "iframe", "object") or "src" not in attributes
        if target.startswith("#"):
            assert target[1:] in page.ids, target
        elif target != "data:,":
            assert (report.html.parent / target).exists(), target
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in page.ids


def test_tables_of_the_page_can_be_sorted_by_keyboard_and_hearing(report: ReportFiles) -> None:
    page = Page(report.html.read_text(encoding="utf-8"))
    heads = [attributes for tag, attributes in page.attributes if tag == "th" and attributes.get("scope") == "col"]
    assert heads and all(head.get("aria-sort") == "none" for head in heads)
    assert sum(tag == "button" for tag, _ in page.attributes) == len(heads)
    svgs = [attributes for tag, attributes in page.attributes if tag == "svg"]
    assert len(svgs) == 9 and all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)


def test_markup_in_records_stays_text(tmp_path: Path) -> None:
    evil = Model("<script>alert(1)</script>|x", bits=2.0, first=1e-3, slope=0, state=1e5, growth=0)
    files = written([r for r in measured(evil) if r.metric in ("likelihood", "training")], tmp_path)
    assert "<script>alert" not in files.html.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`]*`", "", files.markdown.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "<script>" not in prose
    assert all(len(row) == len(table[0]) for table in md_tables(files.markdown) for row in table)


def test_looks_are_stable_and_distinct() -> None:
    rows = Evidence(usual()).rows
    looks = styles(rows)
    assert looks == styles(rows)
    trained = [look for row, look in looks.items() if not row.reference]
    assert len({look.colour for look in trained}) == len({look.marker for look in trained}) == len(trained)


def test_a_later_success_replaces_a_failure() -> None:
    model = Model("memorizing", bits=2.0, first=1e-3, slope=0, state=1e5, growth=0)
    assert Evidence(list(failed("memorizing"))).problems() != []
    evidence = Evidence([*failed("memorizing"), *measured(model)])
    assert evidence.problems() == [r for r in evidence.records if r.status == "unsupported"]
    assert evidence.find(evidence.rows[0], "training", "seconds").value == 310.0


def test_declared_axes_follow_the_suite() -> None:
    assert declared_axes([{"training": {"budget": {"flops": 1e12, "bytes": None}}, "match": "non_embedding"}]) == {
        "training FLOPs", "non-embedding parameters",
    }  # fmt: skip
    assert declared_axes([{}]) == {"parameters", "training bytes", "training FLOPs"}


@pytest.mark.parametrize(
    ("value", "low", "high", "unit", "text", "bounds"),
    [
        (1.23456, 1.2, 1.27, "bit/byte", "1.235", "[1.200, 1.270]"),
        (0.00123, 0.00119, 0.00127, "s/token", "1.230 ms", "[1.190, 1.270]"),
        (4_100_000, None, None, "parameter", "4.10 M", ""),
        (7_440, None, None, "s", "2.07 h", ""),
        (0.314, None, None, "fraction", "31.4 %", ""),
        (512, None, None, "B", "512 B", ""),
        (123_456.0, 100_000.0, 150_000.0, "B", "123 kB", "[100, 150]"),
        (0.0, None, None, "s", "0 s", ""),
    ],
)
def test_numbers_are_read_with_units_and_earned_digits(
    value: float, low: float | None, high: float | None, unit: str, text: str, bounds: str
) -> None:
    assert notation.interval(value, low, high, unit) == (text, bounds)


def test_contexts_and_reasons_are_short() -> None:
    assert [notation.tokens(c) for c in (256, 1024, 1331, 131072, 2**20)] == ["256", "1K", "1.3K", "128K", "1M"]
    assert notation.shorten("it is too long; use less") == "it is too long"
    assert len(notation.shorten("word " * 40)) <= 48


def test_reports_need_no_torch() -> None:
    code = "import sys, archbench.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such file or folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.slow
def test_ten_thousand_records_make_a_page_under_two_megabytes(tmp_path: Path) -> None:
    records = []
    for seed in range(5):
        for index in range(8):
            model = Model(f"model{index}", bits=2 + index / 20, first=1e-3, slope=1e-6 * index, state=1e5, growth=64)
            records += measured(model, seed, (1, 4, 16), 20)
    RecordFile(tmp_path / "big.jsonl").append((records * 2)[:10_000])
    files = write_report(tmp_path)  # how long it takes: `archbench bench overheads/report`
    assert files.html.stat().st_size < 2_000_000


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--v=0",
)  # fmt: skip


def a_browser() -> str:
    """One that is installed; without any the test is skipped."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    return found or pytest.skip(f"no browser found: none of {', '.join(BROWSERS)} is installed")


@pytest.mark.slow
def test_the_page_opens_in_a_browser_and_sorts(report: ReportFiles, tmp_path: Path) -> None:
    browser = a_browser()
    probe = tmp_path / "probe.html"
    press = (
        "<script>addEventListener('load', () => { const t = document.querySelector('table.quality');"
        "t.querySelectorAll('th button')[1].click();"
        "document.title = [...t.tBodies[0].rows].map((r) => r.cells[0].innerText.split(/\\s/)[0]).join(',')"
        " + ' ' + t.tHead.rows[0].cells[1].getAttribute('aria-sort'); });</script>"
    )
    probe.write_text(report.html.read_text(encoding="utf-8").replace("</body>", press + "</body>"), encoding="utf-8")

    def open_page(*more: str) -> subprocess.CompletedProcess[str]:
        profile = tmp_path / f"profile{len(list(tmp_path.iterdir()))}"
        words = [browser, *FLAGS, f"--user-data-dir={profile}", *more]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)

    picture = tmp_path / "page.png"
    shot = open_page(f"--screenshot={picture}", "--window-size=1280,3000", report.html.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG"), shot.stderr[-500:]
    assert "CONSOLE" not in shot.stderr, shot.stderr[-2000:]
    dumped = open_page("--dump-dom", probe.as_uri()).stdout
    title = re.search(r"<title>([^<]*)</title>", dumped)
    assert title and title.group(1) == "mamba,transformer,bigram,unigram,calm,memorizing ascending"


def paired(shift, spread, seeds=(0,)):
    """Two models on the same 24 documents, which differ by far more from each other than the models do."""
    noise = np.random.default_rng(0)
    documents = noise.uniform(1, 3, 24)
    for name, offset in (("transformer", 0.0), ("mamba", shift)):
        for seed in seeds:
            samples = documents + offset + spread * noise.standard_normal(24)
            model = Model(name, bits=float(samples.mean()), first=1e-3, slope=0, state=1e3, growth=0)
            at = {"state": "reset", "context": 256}
            bounds = {"low": model.bits - 0.3, "high": model.bits + 0.3, "confidence": 0.95}
            yield record(
                model, "likelihood", "bits_per_byte", model.bits, at=at, seed=seed, samples=list(samples), **bounds
            )
            yield record(model, "likelihood", "heldout_bytes", 24e3, at=at, seed=seed, samples=[1e3] * 24)


def rows_by_name(evidence):
    return {row.name: row for row in evidence.rows}


def test_differences_are_taken_document_by_document():
    evidence = Evidence(list(paired(-0.1, 0.02)))
    rows = rows_by_name(evidence)
    found = difference(evidence, rows["mamba"], rows["transformer"], "reset")
    assert found.over == "documents"
    assert found.value == pytest.approx(-0.1, abs=0.02)
    assert found.excludes_zero
    assert found.high - found.low < 0.05
    wider = difference(evidence, rows["mamba"], rows["transformer"], "reset", comparisons=7)
    assert wider.high - wider.low > found.high - found.low
    noise = Evidence(list(paired(0.0, 0.3)))
    rows = rows_by_name(noise)
    assert not difference(noise, rows["mamba"], rows["transformer"], "reset").excludes_zero


def test_with_several_seeds_the_pairs_are_seeds():
    evidence = Evidence(list(paired(-0.2, 0.02, seeds=(0, 1, 2))))
    rows = rows_by_name(evidence)
    found = difference(evidence, rows["mamba"], rows["transformer"], "reset")
    assert found.over == "seeds"
    assert found.excludes_zero


def test_documents_that_differ_do_not_pair():
    records = list(paired(-0.1, 0.02))
    records[-1] = dataclasses.replace(records[-1], samples=[2e3] * 24)
    evidence = Evidence(records)
    rows = rows_by_name(evidence)
    assert difference(evidence, rows["mamba"], rows["transformer"], "reset") is None
