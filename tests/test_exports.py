"""Exports, read back by the tools they are for where these are installed, and by their documented rules elsewhere."""

import csv
import dataclasses
import io
import json
import math
import random
import subprocess
import sys

import pytest
from export_records import cell, record, run_of, write_run

from archbench import cli, export
from archbench.errors import ConfigError, RecordError
from archbench.exports import asv, bencher, pytest_benchmark
from archbench.record import read
from archbench.series import as_smaller, series_of

FILES = ("pytest-benchmark", "github-action-benchmark", "bencher", "asv", "csv", "parquet")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "quick", run_of())


def by_name(records):
    return {series.name: series for series in series_of(records)}


# Series: names, seeds, directions


def test_names_are_readable_and_do_not_depend_on_the_order_of_coordinates():
    names = by_name(run_of())
    assert "quick/transformer/micro/latency.time_per_token[batch=1,clock=wall,context=2048]" in names
    assert "quick/mamba/micro/cost.parameters[kind=total]" in names
    one = record("a", "latency", "time_per_token", 1.0, at={"context": 8, "batch": 1})
    other = dataclasses.replace(one, at={"batch": 1, "context": 8})
    assert list(by_name([one])) == list(by_name([other]))


def test_another_metric_with_a_quantity_of_the_same_name_renames_nothing():
    before = by_name([record("a", "cost", "parameters", 1.0)])
    after = by_name([record("a", "cost", "parameters", 1.0), record("a", "design_cost", "parameters", 2.0)])
    assert set(before) < set(after) and len(after) == 2


def test_cells_of_one_label_are_told_apart_by_what_differs():
    codecs = [record("a", "cost", "parameters", 1.0, codec=codec, cell=codec) for codec in ("bytes", "bpe-1024")]
    assert [series.cell for series in series_of(codecs)] == ["a bytes", "a bpe-1024"]
    grid = [
        record("a", "cost", "parameters", 1.0, cell=str(rate), config={"training": {"learning_rate": rate}})
        for rate in (0.001, 0.002)
    ]
    assert [series.cell for series in series_of(grid)] == ["a learning_rate=0.001", "a learning_rate=0.002"]
    sizes = [record("a", "cost", "parameters", 1.0, size=size) for size in ("nano", "micro")]
    assert [series.name for series in series_of(sizes)] == [
        "quick/a/nano/cost.parameters",
        "quick/a/micro/cost.parameters",
    ]


def test_seeds_are_taken_together_and_one_seed_keeps_its_own_interval():
    names = by_name(run_of())
    three = names["quick/transformer/micro/likelihood.bits_per_byte[state=reset]"]
    assert three.seeds == (0, 1, 2) and three.over_seeds and three.value == pytest.approx(2.01)
    assert three.high - three.value == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)  # t(0.975, 2)
    one = names["quick/mamba/micro/likelihood.bits_per_byte[state=reset]"]
    assert (one.seeds, one.value, one.low, one.high) == ((0,), 2.0, 1.9, 2.2)


def test_intervals_are_stretched_by_the_law_they_were_made_by():
    names = by_name(run_of())
    low, high = names["quick/mamba/micro/likelihood.bits_per_byte[state=reset]"].bounds(0.99)
    assert ((2 - low) / 0.1, (high - 2) / 0.2) == pytest.approx((2.575829 / 1.959964,) * 2, rel=1e-5)
    three = names["quick/transformer/micro/likelihood.bits_per_byte[state=reset]"]
    assert three.bounds(0.99)[1] - three.value == pytest.approx(9.924843 * 0.01 / math.sqrt(3), rel=1e-5)
    assert names["quick/mamba/micro/skill.accuracy"].bounds(0.99) is None


@pytest.mark.parametrize(
    ("quantity", "value", "expected"),
    [
        ("time_per_token", 0.5, ("time_per_token", "s/token", 0.5)),
        ("prefill_rate", 4.0, ("inverse_prefill_rate", "s/token", 0.25)),
        ("accuracy", 0.75, ("one_minus_accuracy", "fraction", 0.25)),
        ("brier_lm", 5.0, ("hundred_minus_brier_lm", "points", 95.0)),
        ("parameters", 5.0, None),
        ("prefill_rate", 0.0, None),
    ],
)
def test_every_direction_can_be_told_as_smaller_is_better(quantity, value, expected):
    (series,) = series_of([record("a", "m", quantity, value)])
    found = as_smaller(series)
    assert expected == (found and (found.quantity, found.unit, found.value))


def test_a_rate_turned_over_keeps_the_order_of_its_bounds():
    rate = record("a", "m", "prefill_rate", 4.0, low=2.0, high=5.0, confidence=0.95, samples=[2.0, 4.0, 5.0])
    (series,) = series_of([rate])
    found = as_smaller(series)
    assert (found.low, found.value, found.high, found.samples) == (0.2, 0.25, 0.5, (0.5, 0.25, 0.2))
    endless = as_smaller(dataclasses.replace(series, low=-1.0))
    assert endless.value == 0.25 and endless.low is None and endless.high is None


# pytest-benchmark


def test_statistics_are_those_of_pytest_benchmark():
    stats = pytest.importorskip("pytest_benchmark.stats", reason="pytest-benchmark is not installed")
    draw = random.Random(0)
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 30, 31):
        theirs = stats.Stats()
        for value in (data := [draw.lognormvariate(0, 1) for _ in range(n)]):
            theirs.update(value)
        ours = pytest_benchmark.stats(data)
        for field in stats.Stats.fields:
            expected = getattr(theirs, field)
            assert ours[field] == (expected if isinstance(expected, str) else pytest.approx(expected)), (n, field)


def test_pytest_benchmark_compares_two_exports_and_sees_what_became_slower(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    for name, slower in (("before", 1.0), ("after", 1.3)):
        folder = write_run(tmp_path / name, [*cell("mamba", slower=slower), *cell("transformer")])
        export.export(folder, "pytest-benchmark", tmp_path / f"{name}.json")
    words = ["compare", "before.json", "after.json", "--csv=table.csv", "--columns=median,rounds", "--name=long"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert len(rows) == 2 * 2 * 2 * 2  # runs, cells, contexts, time and inverse rate
    medians = {}
    for row in rows:
        assert row["rounds"] == "9"
        medians.setdefault(row["name"].split("/", 1)[1], []).append(float(row["median"]))
    point = "micro/latency.time_per_token[batch=1,clock=wall,context=2048]"
    ratios = {name: max(pair) / min(pair) for name, pair in medians.items()}
    (slow,) = (ratio for name, ratio in ratios.items() if name.endswith(f"mamba/{point}"))
    (same,) = (ratio for name, ratio in ratios.items() if name.endswith(f"transformer/{point}"))
    assert (slow, same) == (pytest.approx(1.3), 1.0)


def test_pytest_benchmark_storage_loads_the_file_with_our_numbers_beside(run):
    storage = pytest.importorskip("pytest_benchmark.storage.file", reason="pytest-benchmark is not installed")
    (path,) = export.export(run, "pytest-benchmark").paths
    loaded = {bench["fullname"]: bench for bench in storage.FileStorage(run, None).load_benchmarks(str(path))}
    bench = loaded["quick/mamba/micro/latency.time_per_token[batch=1,clock=wall,context=2048]"]
    series = by_name(run_of())[bench["fullname"]]
    assert (bench["median"], bench["min"], bench["max"]) == (series.value, series.samples[0], series.samples[-1])
    info = bench["extra_info"]
    assert (info["value"], info["low"], info["high"]) == (series.value, series.low, series.high)
    assert info["quantities"]["likelihood.bits_per_byte[state=reset]"] == {"value": 2.0, "unit": "bit/byte"}
    assert not any("context=128" in name for name in info["quantities"])  # another point's
    assert json.loads(path.read_text())["commit_info"]["id"].startswith("0123")


# github-action-benchmark: the rules of its README and of the schema in src/extract.ts


def check_action_file(path):
    entries = json.loads(path.read_text())
    assert isinstance(entries, list) and entries
    for entry in entries:
        assert set(entry) <= {"name", "unit", "value", "range", "extra"} and {"name", "unit", "value"} <= set(entry)
        assert type(entry["value"]) in (int, float) and math.isfinite(entry["value"])
        assert all(isinstance(entry[key], str) for key in entry if key != "value")
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry for entry in entries}


def test_the_action_gets_a_file_a_direction(run):
    exported = export.export(run, "github-action-benchmark")
    smaller, bigger = map(check_action_file, exported.paths)
    assert exported.paths[0].name == "smaller-is-better.json"
    assert {name.split("/")[-1].split("[")[0] for name in bigger} == {"latency.prefill_rate", "skill.accuracy"}
    assert not any("parameters" in name for name in {**smaller, **bigger})
    entry = smaller["quick/mamba/micro/likelihood.bits_per_byte[state=reset]"]
    assert (entry["value"], entry["unit"], entry["range"]) == (2.0, "bit/byte", "± 0.15")
    assert "ci95=[1.9, 2.2]" in entry["extra"] and "seeds=0" in entry["extra"]


def test_a_file_that_would_be_empty_is_absent_even_if_an_earlier_export_left_one(run, tmp_path):
    out = tmp_path / "out"
    assert len(export.export(run, "github-action-benchmark", out).paths) == 2
    only_lower = write_run(tmp_path / "lower", [record("a", "likelihood", "bits_per_byte", 2.0)])
    (path,) = export.export(only_lower, "github-action-benchmark", out).paths
    check_action_file(path)
    assert [file.name for file in out.iterdir()] == ["smaller-is-better.json"]
    neither = write_run(tmp_path / "neither", [record("a", "cost", "parameters", 2.0)])
    with pytest.raises(ConfigError, match="no number of it is better"):
        export.export(neither, "github-action-benchmark", out)


# Bencher: the JSON schema and the limits of its reference page


def test_bencher_file_keeps_to_its_schema_and_limits(run):
    (path,) = export.export(run, "bencher").paths
    found = json.loads(path.read_text())
    numbers = 0
    for name, measures in found.items():
        assert 0 < len(name) <= 1024 and not name.endswith("-bencher-ignore")
        for slug, metric in measures.items():
            assert (
                0 < len(slug) <= 64
                and slug.strip("-") == slug
                and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
            )
            assert {"value"} <= set(metric) <= {"value", "lower_value", "upper_value"}
            assert metric.get("lower_value", -math.inf) <= metric["value"] <= metric.get("upper_value", math.inf)
            numbers += 1
    assert numbers == len(series_of(run_of()))
    point = found["quick/mamba/micro[batch=1,clock=wall,context=2048]"]
    assert set(point) == {"latency-time-per-token", "latency-prefill-rate"}
    assert found["quick/mamba/micro[state=reset]"]["likelihood-bits-per-byte"] == {
        "value": 2.0, "lower_value": 1.9, "upper_value": 2.2,
    }  # fmt: skip


def test_what_is_too_long_for_bencher_is_cut_and_still_told_apart():
    slugs = {bencher.slug(f"{'metric' * 12}.{quantity}") for quantity in ("one", "two")}
    assert len(slugs) == 2 and all(len(slug) == 64 for slug in slugs)
    (series,) = series_of([record("l" * 2000, "cost", "parameters", 1.0)])
    assert len(bencher.benchmark(series)) == 1024


# asv


def git(folder, *words):
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def asv_tool(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "asv", *words], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_asv_publishes_the_exports_of_ten_commits_and_finds_the_planted_step(tmp_path):
    pytest.importorskip("asv", reason="asv is not installed")
    git(tmp_path, "init", "--quiet", "--initial-branch=trunk")
    out, commits = tmp_path / "asv", []
    for number in range(10):
        git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", f"commit {number}")
        commits.append(git(tmp_path, "rev-parse", "HEAD"))
        environment = {**record("a", "m", "q", 1.0).environment, "commit": commits[-1]}
        slower = 1.3 if number >= 5 else 1.0
        noise = 1 + 0.002 * (-1) ** number
        records = [
            *cell("mamba", slower=slower * noise, environment=environment),
            *cell("transformer", slower=noise, environment=environment),
        ]
        export.export(write_run(tmp_path / f"run{number}", records), "asv", out)
    done = asv_tool(out, "publish")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "html" / "regressions.json").read_text())["regressions"]
    planted = {
        f"quick.latency.{quantity}('mamba/micro', 1, 'wall', {context})"
        for quantity in ("time_per_token", "inverse_prefill_rate")
        for context in (128, 2048)
    }
    assert {entry[0] for entry in found} == planted
    for _name, _path, _params, _index, last, best, (jump,) in found:
        assert last / best == pytest.approx(1.3, rel=0.02)
        assert jump[0] is None and jump[2] < jump[3]  # one commit, from best to last
    done = asv_tool(out, "compare", commits[4], commits[5])
    assert done.returncode == 0, done.stdout + done.stderr
    marked = [line for line in done.stdout.splitlines() if line.startswith("| +")]
    assert len(marked) == 4 and all("('mamba/micro'" in line for line in marked)
    assert not [line for line in done.stdout.splitlines() if line.startswith("| -")]


def test_asv_results_say_what_failed_and_what_does_not_exist(run, tmp_path):
    exported = export.export(run, "asv", tmp_path / "asv")
    benchmarks = json.loads((tmp_path / "asv/results/benchmarks.json").read_text())
    (path,) = exported.paths
    assert path.name == "01234567-existing.json" and (path.parent / "machine.json").exists()
    results = json.loads(path.read_text())["results"]
    entry = benchmarks["quick.latency.inverse_prefill_rate"]
    assert entry["param_names"] == ["cell", "batch", "clock", "context"] and entry["unit"] == "s/token"
    assert set(results) | {"version"} == set(benchmarks) and "quick.cost.parameters" not in benchmarks
    for name, row in results.items():
        assert len(row[0]) == math.prod(map(len, benchmarks[name]["params"])), name
    later = [*run_of(), *cell("calm")]
    later = [r for r in later if (r.label, r.metric) not in {("calm", "likelihood"), ("calm", "memory")}]
    later += [record("mamba", "memory", "peak_rss", 1e8, size="nano"), record("calm", "likelihood", "*", None)]
    export.export(write_run(tmp_path / "later", later), "asv", tmp_path / "asv")
    results = json.loads(path.read_text())["results"]
    benchmarks = json.loads((tmp_path / "asv/results/benchmarks.json").read_text())
    assert benchmarks["quick.memory.peak_rss"]["params"] == [["'transformer/micro'", "'mamba/nano'"]]
    assert benchmarks["quick.likelihood.bits_per_byte"]["params"][0] == ["'transformer/micro'", "'mamba/micro'"]


def test_a_cell_that_fails_after_it_was_measured_is_null_and_one_that_vanished_is_nan(run, tmp_path):
    out = tmp_path / "asv"
    before = [*run_of(), record("mamba", "memory", "peak_rss", 1e8), record("calm", "memory", "peak_rss", 1e8)]
    before = [r for r in before if r.status != "failed"]
    export.export(write_run(tmp_path / "before", before), "asv", out)
    (path,) = export.export(run, "asv", out).paths
    values, (cells,) = json.loads(path.read_text())["results"]["quick.memory.peak_rss"][:2]
    assert dict(zip(cells, map(str, values), strict=True)) == {
        "'transformer/micro'": "200000000.0", "'mamba/micro'": "None", "'calm/micro'": "nan",
    }  # fmt: skip


def test_two_suites_share_an_asv_folder_and_its_configuration_is_left_alone(run, tmp_path):
    out = tmp_path / "asv"
    export.export(run, "asv", out)
    (out / "asv.conf.json").write_text("mine")
    other = write_run(tmp_path / "smoke", run_of(suite="smoke"))
    (path,) = export.export(other, "asv", out).paths
    names = set(json.loads(path.read_text())["results"])
    assert {"quick.likelihood.bits_per_byte", "smoke.likelihood.bits_per_byte"} <= names
    assert (out / "asv.conf.json").read_text() == "mine"


def test_asv_needs_a_commit_and_says_when_it_is_not_all(tmp_path):
    environment = record("a", "m", "q", 1.0).environment
    nowhere = write_run(tmp_path / "nowhere", cell("mamba", environment={**environment, "commit": None}))
    with pytest.raises(ConfigError, match="name no commit"):
        export.export(nowhere, "asv")
    dirty = write_run(tmp_path / "dirty", cell("mamba", environment={**environment, "commit": f"{'a' * 40}+"}))
    exported = export.export(dirty, "asv")
    assert exported.paths[0].name == "aaaaaaaa-existing.json" and "not committed" in exported.notices[0]
    (dirty / "exports/asv/results/benchmarks.json").write_text("{}")
    with pytest.raises(ConfigError, match="not asv's layout"):
        export.export(dirty, "asv")


# Tables


def check_table(table, records):
    assert len(table) == len(records) and [c for c in table if c.startswith("at.")] == [
        "at.batch", "at.clock", "at.context", "at.kind", "at.state",
    ]  # fmt: skip
    for row, expected in zip(table.to_dict("records"), records, strict=True):
        assert list(row["samples"]) == expected.samples
        for name in ("value", "low", "high", "confidence", "seed", "label", "cell", "quantity", "unit", "status"):
            found, wanted = row[name], getattr(expected, name)
            assert (wanted is None and found != found) or found == wanted or (wanted is None and found is None), name
        assert json.loads(row["config"]) == expected.config
        for name in ("batch", "clock", "context", "kind", "state"):
            found = row[f"at.{name}"]
            absent = found is None or found != found or str(found) == "<NA>"
            assert absent if name not in expected.at else found == expected.at[name]


def test_csv_reads_back_to_equal_values(run):
    import pandas as pd

    (path,) = export.export(run, "csv").paths
    table = pd.read_csv(path, float_precision="round_trip", converters={"samples": json.loads})
    check_table(table, read(run))


def test_parquet_reads_back_to_equal_values(run):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pandas as pd

    (path,) = export.export(run, "parquet").paths
    table = pd.read_parquet(path)
    assert str(table["at.context"].dtype) == "Int64" and str(table["value"].dtype) == "Float64"
    check_table(
        table.astype({"value": object, "low": object, "high": object, "confidence": object}).replace({pd.NA: None}),
        read(run),
    )


def test_coordinates_of_several_kinds_become_text(tmp_path):
    from archbench.tabular import frame

    points = [{"x": 1}, {"x": "all"}, {}, {"x": 2.5}]
    table = frame([record("a", "m", "q", 1.0, at=at) for at in points])
    assert table["at.x"].tolist()[:2] == ["1", "all"] and table["at.x"].isna().tolist() == [False, False, True, False]
    numbers = frame([record("a", "m", "q", 1.0, at=at) for at in ({"x": 1}, {"x": 2.5}, {"y": True})])
    assert (str(numbers["at.x"].dtype), str(numbers["at.y"].dtype)) == ("Float64", "boolean")


# All formats


@pytest.fixture(scope="module")
def committed():
    return export.source("results/quick")


@pytest.mark.parametrize("name", FILES)
def test_the_committed_run_exports(name, committed, tmp_path):
    if name == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    form = export.named(name)
    exported = form.write(committed, tmp_path if form.is_folder else tmp_path / "file")
    rows = len(committed.records)
    ok = sum(record.status == "ok" for record in committed.records)
    directed = sum(record.status == "ok" and record.better != "neither" for record in committed.records)
    expected = {"bencher": ok, "csv": rows, "parquet": rows, "github-action-benchmark": directed, "asv": directed}
    assert exported.count == expected.get(name, exported.count) > 0
    assert all(path.stat().st_size for path in exported.paths)


def test_names_of_the_committed_run_are_unique(committed):
    assert len({series.name for series in committed.series}) == len(committed.series)


def said(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["archbench", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_the_command_writes_beside_the_run_and_says_what(run, monkeypatch, capsys):
    code, out, _ = said(["export", run, "--to", "bencher"], monkeypatch, capsys)
    assert code == 0 and (run / "exports/bencher.json").exists() and "metrics:" in out
    assert read(run)  # what is written is not taken for records
    code, out, _ = said(["list", "formats"], monkeypatch, capsys)
    assert code == 0 and all(name in out for name in FILES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RUN", "--to", "parquett"), "--to parquett: there is no such format; did you mean 'parquet'?"),
        (("nowhere", "--to", "csv"), "nowhere: no such file or folder; `archbench run SUITE` writes results/SUITE"),
        (("FAILED", "--to", "csv"), "none of its 1 records is ok"),
        (("RUN", "--to", "asv", "--out", "FILE"), "is a file; this format is a folder"),
    ],
)
def test_mistakes_are_one_line(words, message, run, tmp_path, monkeypatch, capsys):
    failed = write_run(tmp_path / "failed", [record("a", "m", "q", None, status="failed", reason="killed")])
    (tmp_path / "file").write_text("")
    places = {"RUN": run, "FAILED": failed, "FILE": tmp_path / "file"}
    code, _, error = said(["export", *(places.get(word, word) for word in words)], monkeypatch, capsys)
    assert code == 2 and message in error and error.count("\n") == 1 and error.startswith("archbench: ")


def test_what_is_not_a_record_raises(tmp_path):
    with pytest.raises(RecordError, match="holds no"):
        export.export(write_run(tmp_path / "empty", []), "csv")


def test_asv_literals_are_python():
    assert [asv._literal(value) for value in (2048, 0.5, "wall", (1, 2))] == ["2048", "0.5", "'wall'", "'1x2'"]
