"""Skills in the report: every number is that of a record, and a row is found again under one name at every task."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_report import Model, record, written

from archbench.record import Record
from archbench.report.drawing import Drawing, Omitted, house_style
from archbench.report.evidence import Evidence
from archbench.report.skill_figures import skill_figures
from archbench.report.skills import entrants, skill_remarks, skill_tables
from archbench.report.table import Table, TableCell

LENGTHS = (256, 512, 2048)
UNITS = {"accuracy": "fraction", "exact_match": "fraction", "chance": "fraction", "state_bytes": "B"}
SHARES = ("accuracy", "exact_match")
TOO_LONG = "needs 2048 tokens of context; this model's limit is 512"


def model(label: str) -> Model:
    return Model(label, bits=1, first=1, slope=0, state=1, growth=0)


def skill(
    architecture: str,
    task: str,
    shares: tuple[float | None, ...],
    *,
    growth: float = 0,
    seed: int = 0,
    label: str | None = None,
    heads: int = 1,
) -> Iterator[Record]:
    own = model(label or f"{architecture}: {task}")
    config = {
        "model": {"d_model": 64, "n_future": heads},
        "training": {"context": 256, "task": {"name": task}},
        "match": "parameters",
    }
    for length, share in zip(LENGTHS, shares, strict=True):
        at = {"task": task, "length": length}
        state = 1000 + growth * length
        values = {"accuracy": share, "exact_match": share and share**2, "chance": 0.1, "state_bytes": state}
        for quantity, value in values.items():
            known = (
                {"low": value - 0.01, "high": value + 0.01, "confidence": 0.95} if value and quantity in SHARES else {}
            )
            missing = {"reason": TOO_LONG} if share is None else {}
            yield record(
                own, "skill", quantity, None if share is None else value, at=at, config=config, unit=UNITS[quantity],
                architecture=architecture, seed=seed, better="higher", **known, **missing,
            )  # fmt: skip


def usual() -> list[Record]:
    return [
        *skill("mamba", "induction_heads", (1.0, 1.0, 0.98)),
        *skill("transformer", "induction_heads", (0.95, 0.875, None), growth=1024),
        *skill("mamba", "name_induction", (0.5, 0.4, 0.3)),
        *skill("mtp", "name_induction", (0.75, 0.5, 0.25), growth=2048),
    ]


def by_heading(shown: Table) -> dict[str, dict[str, TableCell]]:
    names = [column.name for column in shown.columns]
    return {line[0].text: dict(zip(names, line, strict=True)) for line in shown.lines}


def test_tasks_against_architectures() -> None:
    matrix, _ = skill_tables(Evidence(usual()))
    assert [column.name for column in matrix.columns] == ["task", "mamba", "transformer", "mtp", "chance"]
    lines = by_heading(matrix)
    assert list(lines) == ["induction heads", "name induction"]
    mamba = lines["induction heads"]["mamba"]
    assert (mamba.text, mamba.more) == ("100.0 %", "98 % at 2K")
    transformer = lines["induction heads"]["transformer"]
    assert (transformer.text, transformer.detail, transformer.more) == ("95.0 %", "[94.0, 96.0]", "87.5 % at 512")
    assert lines["induction heads"]["mtp"].text == "not tried"
    assert lines["name induction"]["mtp"].more == "25 % at 2K"
    assert lines["induction heads"]["chance"].text == "10 %"
    assert "trained at 256" in lines["induction heads"]["task"].detail


def test_every_length_has_a_line_and_what_is_missing_its_reason() -> None:
    _, lengths = skill_tables(Evidence(usual()))
    assert lengths.folded
    assert len(lengths.lines) == 12
    long = next(line for line in lengths.lines if line[1].text == "transformer" and line[2].text == "2K")
    assert long[3].reason == TOO_LONG
    short = next(line for line in lengths.lines if line[1].text == "transformer" and line[2].text == "256")
    assert [cell.text for cell in short[3:]] == ["95.0 %", "90.2 %", "10 %", "263 kB"]


def test_rows_of_one_architecture_are_told_apart_by_their_settings() -> None:
    tasks = ("name_induction", "polynomial_arithmetic")
    shares = (0.8, 0.7, 0.6)
    pairs = [r for task in tasks for n in (1, 2) for r in skill("mtp", task, shares, heads=n, label=f"{task} {n}")]
    found = entrants(Evidence([*pairs, *skill("mtp", "induction_heads", shares)]))
    assert [entrant.name for entrant in found] == ["mtp n_future=1", "mtp n_future=2"] * 2 + ["mtp"]


def test_rows_of_one_architecture_and_settings_keep_their_labels() -> None:
    twins = [r for label in ("slow", "fast") for r in skill("mtp", "name_induction", (0.7, 0.6, 0.5), label=label)]
    assert [entrant.name for entrant in entrants(Evidence(twins))] == ["slow", "fast"]


def test_a_sentence_for_each_task() -> None:
    assert skill_remarks(Evidence(usual())) == [
        "Induction heads: learned by mamba and transformer (at least 90 % right at the training length), mamba still "
        "at 2K tokens.",
        "Name induction: learned by none of mamba and mtp.",
    ]
    only = Evidence(list(skill("transformer", "induction_heads", (0.95, 0.875, 0.5))))
    assert skill_remarks(only)[0].endswith("training length), none of them at 2K tokens.")


def test_seeds_are_joined() -> None:
    records = [r for seed in (0, 1) for r in skill("mamba", "induction_heads", (0.5 + seed / 2, 0.5, 0.5), seed=seed)]
    matrix, _ = skill_tables(Evidence(records))
    assert by_heading(matrix)["induction heads"]["mamba"].text.startswith("75")


def test_figures_have_a_panel_a_task_and_their_numbers() -> None:
    with house_style():
        against_length, against_state = skill_figures(Evidence(usual()))
    assert isinstance(against_length, Drawing) and isinstance(against_state, Drawing)
    for drawn in (against_length, against_state):
        assert [axes.get_title(loc="left") for axes in drawn.figure.axes] == ["induction heads", "name induction"]
        assert len(drawn.data) == 11
    curves = {tuple(line.get_ydata()) for line in against_length.figure.axes[0].lines}
    assert (100.0, 100.0, 98.0) in curves and (95.0, 87.5) in curves
    lines = against_state.figure.axes[0].lines
    assert {tuple(line.get_xdata()) for line in lines} >= {(1000.0,) * 3, (1000.0 + 1024 * 256, 1000.0 + 1024 * 512)}
    assert "100 % at 256, 98 % at 2K" in against_length.alt


def test_one_name_has_one_look_at_every_task() -> None:
    with house_style():
        figure = skill_figures(Evidence(usual()))[0]
    assert isinstance(figure, Drawing)
    colours = [axes.lines[0].get_color() for axes in figure.figure.axes]
    assert colours[0] == colours[1]  # mamba comes first in both


def test_nothing_but_reasons_is_an_omission() -> None:
    with house_style():
        found = skill_figures(Evidence(list(skill("transformer", "induction_heads", (None, None, None)))))
    assert all(isinstance(figure, Omitted) and TOO_LONG in figure.reason for figure in found)
    matrix, lengths = skill_tables(Evidence(list(skill("transformer", "induction_heads", (None, None, None)))))
    assert by_heading(matrix)["induction heads"]["transformer"].reason == TOO_LONG
    assert len(lengths.lines) == 3


def test_runs_without_skills_show_none() -> None:
    records = [record(model("transformer"), "likelihood", "bits_per_byte", 2.0, at={"state": "reset"})]
    assert skill_tables(Evidence(records)) == []
    assert skill_figures(Evidence(records)) == []


def test_the_whole_report(tmp_path: Path) -> None:
    report = written(usual(), tmp_path)
    text = report.markdown.read_text()
    assert "Skills learned" in text and "98 % at 2K" in text
    assert "Skills learned" in report.html.read_text()
    with next(path for path in report.data if path.name == "skill_length.csv").open() as file:
        lines = list(csv.DictReader(file))
    first = lines[0]
    assert (first["task"], first["length"], float(first["accuracy"])) == ("induction_heads", "256", pytest.approx(1.0))
