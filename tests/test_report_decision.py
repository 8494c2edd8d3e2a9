"""What to choose: needs, ties and reasons; Pareto fronts; scaling laws in a report."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
from test_report import (
    FLAGS,
    MAMBA,
    TRANSFORMER,
    Model,
    a_browser,
    measured,
    record,
    usual,
    without_likelihood,
    written,
)
from test_report_looks import row
from typer.testing import CliRunner

from archbench.cli import app
from archbench.errors import ConfigError
from archbench.parse import parse_bytes
from archbench.record import RecordFile
from archbench.report.choice import Need, at_context, decide, decision_table, panel_data
from archbench.report.drawing import Omitted, house_style
from archbench.report.evidence import Evidence
from archbench.report.palette import styles
from archbench.report.pareto_figure import front, pareto_figure
from archbench.report.scalings import scaling_figure, scaling_tables, scalings


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence([*measured(TRANSFORMER), *measured(MAMBA), *without_likelihood("calm")])


def test_without_limits_quality_decides(evidence: Evidence) -> None:
    decision = decide(evidence, Need(context=512))
    assert decision.best is not None and decision.best.row.name == "mamba"
    assert [candidate.row.name for candidate in decision.ranked] == ["mamba", "transformer"]
    assert decision.tied == ()
    (other,) = decision.others
    assert other.row.name == "calm" and other.refused == "" and "no likelihood" in other.bits.reason
    assert decision.sentence() == "With 512 tokens of context: choose mamba (1.934 [1.914, 1.954] bits per byte)."


def test_a_need_that_is_not_met_is_a_reason(evidence: Evidence) -> None:
    fast = decide(evidence, Need(context=512, seconds_per_token=1.4e-3))
    assert fast.best is not None and fast.best.row.name == "transformer"
    refused = {candidate.row.name: candidate.refused for candidate in fast.others}
    assert re.fullmatch(r"time per token 1\.\d+ ms is above 1\.40 ms", refused["mamba"])
    small = decide(evidence, Need(context=512, memory=1e6))
    assert small.best is None and small.sentence().endswith("no architecture of this run meets that.")
    far = decide(evidence, Need(context=10**6, memory=1e9))
    assert "was not measured" in {candidate.row.name: candidate.refused for candidate in far.others}["mamba"]


def test_memory_is_weights_and_state(evidence: Evidence) -> None:
    (mamba,) = [c for c in decide(evidence, Need(context=512)).ranked if c.row.name == "mamba"]
    assert mamba.memory == 4 * 4.1e5 + 180_000


def test_what_cannot_be_told_apart_is_named() -> None:
    close = Model("close", bits=MAMBA.bits + 0.001, first=1e-3, slope=0, state=1e5, growth=0)
    decision = decide(Evidence([*measured(MAMBA), *measured(close), *measured(TRANSFORMER)]), Need(context=512))
    assert [candidate.row.name for candidate in decision.tied] == ["close"]
    assert "close cannot be told from it by quality" in decision.sentence()


def test_between_contexts_values_are_straight_in_logarithms() -> None:
    points = {100.0: 1.0, 400.0: 4.0}
    assert at_context(points, 200) == pytest.approx(2.0)
    assert at_context(points, 100) == 1.0
    assert at_context(points, 99) is None and at_context(points, 401) is None and at_context({}, 1) is None


def test_an_impossible_need_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory -1; must be above 0"):
        Need(context=1, memory=-1)


def test_the_table_and_the_panel_agree(evidence: Evidence) -> None:
    shown = decision_table(evidence)
    assert shown is not None and {line[1].text for line in shown.lines} <= {"mamba", "transformer", "none"}
    data = panel_data(evidence)
    assert data is not None and [row["name"] for row in data["rows"]] == ["transformer", "mamba"]
    assert [row["apart"] for row in data["rows"]] == [["mamba"], ["transformer"]]
    assert [row["name"] for row in data["unranked"]] == ["calm"]
    json.dumps(data, allow_nan=False)


def test_one_architecture_is_no_decision() -> None:
    alone = Evidence(list(measured(MAMBA)))
    assert decision_table(alone) is None and panel_data(alone) is None


def test_the_command_chooses(tmp_path: Path) -> None:
    RecordFile(tmp_path / "run.jsonl").append(usual())
    found = CliRunner().invoke(app, ["choose", str(tmp_path), "--context", "512", "--ms-per-token", "1.4"])
    assert found.exit_code == 0 and "choose transformer" in found.output, found.output
    none = CliRunner().invoke(app, ["choose", str(tmp_path), "--context", "512", "--memory", "10"])
    assert none.exit_code == 1 and "no architecture" in none.output


def test_a_front_is_what_nothing_beats() -> None:
    places = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (3.0, 2.0), "d": (4.0, 1.0), "e": (5.0, 5.0)}
    assert [found.name for found in front({row(name): place for name, place in places.items()})] == ["a", "b", "d"]


def test_the_pareto_figure_says_who_is_surely_beaten() -> None:
    worse = Model("worse", bits=2.5, first=5e-3, slope=1e-6, state=1e7, growth=4096)
    found = Evidence([*measured(MAMBA), *measured(TRANSFORMER), *measured(worse)])
    with house_style():
        drawing = pareto_figure(found, styles(found.rows))
    assert not isinstance(drawing, Omitted)
    data = drawing.data.set_index(["cost", "row"])
    assert bool(data.loc[("time per token", "worse"), "surely_beaten"])
    assert not data.loc[("time per token", "worse"), "on_front"]
    assert data.loc[("state of one row", "mamba"), "on_front"]
    with house_style():
        assert isinstance(pareto_figure(Evidence(list(without_likelihood("calm"))), {}), Omitted)


def sized(label: str, law: object, sizes: tuple[float, ...] = (1e5, 4e5, 1e6)) -> list:
    names = {1e5: "nano", 4e5: "micro", 1e6: "mini"}
    records = []
    for parameters in sizes:
        bits = law(parameters)  # type: ignore[operator]
        model = Model(
            label, bits=bits, first=1e-3, slope=0, state=1e5, growth=0, parameters=parameters, size=names[parameters]
        )
        records += [r for seed in range(3) for r in measured(model, seed, (1,), 6)]
    return records


WANTED_OF_A_LAW = (("cost", "parameters"), ("likelihood", "bits_per_byte"), ("training", "bytes"))


def test_laws_of_several_sizes_are_fitted_and_cross() -> None:
    records = [*sized("early", lambda n: 1.0 + 9 * n**-0.2), *sized("late", lambda n: 0.6 + 28 * n**-0.28)]
    found = Evidence(records)
    laws = scalings(found)
    assert laws["early"].law.a == pytest.approx(0.2, abs=0.08) and laws["early"].n_sizes == 3
    titles = [table.title for table in scaling_tables(found, laws)]
    assert titles[0] == "How quality scales with size"
    with house_style():
        (drawing,) = scaling_figure(found, styles(found.rows), laws)
    assert len(drawing.data) == 18
    void = Model("late", bits=1, first=1, slope=0, state=1, growth=0, parameters=4e6, size="small")
    lacking = [record(void, *wanted, None, reason="void") for wanted in WANTED_OF_A_LAW]
    with house_style():
        (again,) = scaling_figure(Evidence([*records, *lacking]), styles(Evidence([*records, *lacking]).rows), laws)
    assert len(again.data) == 18, "a cell that gave no numbers is no mark"
    assert scalings(Evidence(list(measured(MAMBA)))) == {}


@pytest.mark.slow
def test_the_panel_decides_in_a_browser(tmp_path: Path) -> None:
    browser = a_browser()
    page = written(usual(), tmp_path / "run").html.read_text(encoding="utf-8")
    press = (
        "<script>addEventListener('load', () => { const f = document.querySelector('form.panel');"
        "const told = f.querySelector('output'); const first = told.textContent;"
        "f.elements.context.value = 512; f.elements.time.value = 1.4; f.dispatchEvent(new Event('input'));"
        "document.title = first + '|' + told.textContent; });</script>"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(page.replace("</body>", press + "</body>"), encoding="utf-8")
    words = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    dumped = subprocess.run(words, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([^<]*)</title>", dumped.stdout)
    assert title, dumped.stderr[-500:]
    first, then = title.group(1).split("|")
    assert first.startswith("Choose mamba: 1.93 [1.91, 1.95] bits per byte.")
    assert then.startswith("Choose transformer: 2.05") and "mamba: time 1." in then
    assert "CONSOLE" not in dumped.stderr


def test_labels_cannot_end_the_embedded_data(tmp_path: Path) -> None:
    records = [dataclasses.replace(r, label=r.label.replace("mamba", "</script>")) for r in usual()]
    page = written(records, tmp_path).html.read_text(encoding="utf-8")
    embedded = page.split('id="decision-data">')[1].split("</script>")[0]
    assert "\\u003c/script>" in embedded and json.loads(embedded)


@pytest.mark.parametrize(
    ("text", "value"), [("2e6", 2e6), ("8GB", 8e9), ("512 MiB", 512 * 2**20), ("1.5kB", 1500), ("10B", 10)]
)
def test_bytes_are_read_with_and_without_units(text: str, value: float) -> None:
    assert parse_bytes(text, "--memory") == value


@pytest.mark.parametrize("text", ["8 GB of it", "GB", "-3", "", "1e", "8 apples"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number of bytes, such as 2e6"):
        parse_bytes(text, "--memory")
