"""BrierLM against cross-entropy, on made-up checkpoints whose correlation is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from test_report import Model, record, reference

from archbench.record import Record
from archbench.report.correlation import (
    Checkpoint,
    correlation,
    fisher_interval,
    pearson,
    spearman,
    studies,
)
from archbench.report.correlation_figure import correlation_figure, correlation_table
from archbench.report.drawing import Drawing, Omitted, house_style
from archbench.report.evidence import Evidence


def checkpoint(architecture: str, number: int, nats: float, brier: float | None, **more: Any) -> Iterator[Record]:
    """One cell: its perplexity in three states, and BrierLM by both estimators in token windows."""
    model = Model(f"{architecture} bytes={number}", bits=0, first=0, slope=0, state=0, growth=0)
    given = {"architecture": architecture, **more}
    yield record(model, "training", "seconds", 1.0, **given)
    for state, shift in (("carried", -0.2), ("reset", 0.0)):
        value = math.exp(nats + shift)
        yield record(model, "likelihood", "perplexity", value, at={"state": state, "context": 256}, **given)
    for window in ("tokens", "bytes"):
        at = {"estimator": "sampled", "window": window, "context": 128}
        bounds = {} if brier is None else {"low": brier - 1, "high": brier + 1, "confidence": 0.95}
        yield record(model, "brier_lm", "brier_lm", brier, at=at, reason="" if bounds else "noise", **bounds, **given)


def line(n: int, architecture: str = "transformer", slope: float = -5.0) -> list[Record]:
    """n checkpoints on a straight line."""
    return [r for i in range(n) for r in checkpoint(architecture, i, 1.0 + 0.1 * i, 40 + slope * 0.1 * i)]


def marks(xs: Sequence[float], ys: Sequence[float]) -> list[Checkpoint]:
    return [
        Checkpoint(architecture="a", name=str(i), nats=float(x), brier=float(y), low=None, high=None)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]


def test_coefficients_are_those_of_scipy_ties_included() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(4, 30)), draw.integers(5, size=(4, 30)).astype(float)
    for row in range(4):
        assert pearson(x, y)[row] == pytest.approx(scipy_stats.pearsonr(x[row], y[row]).statistic)
        assert spearman(x, y)[row] == pytest.approx(scipy_stats.spearmanr(x[row], y[row]).statistic)


def test_a_curve_has_ranks_in_perfect_order_and_no_straight_line() -> None:
    xs = [0.1 * i for i in range(12)]
    ys = [math.exp(-5 * x) for x in xs]
    straight, ranks = (correlation(marks(xs, ys), name) for name in ("Pearson", "Spearman"))
    assert ranks.value == -1
    assert straight.value == pytest.approx(scipy_stats.pearsonr(xs, ys).statistic)
    assert straight.value is not None and straight.value > -0.9


def test_fisher_z_by_hand() -> None:
    """r = 0.5, n = 28: z = 0.5493, half width 1.96 / 5 = 0.3920."""
    low, high, _ = fisher_interval(0.5, 28)
    assert (low, high) == (pytest.approx(math.tanh(0.5493 - 0.3920), abs=1e-4), pytest.approx(0.7356, abs=1e-3))
    assert fisher_interval(-1.0, 10) == (-1.0, -1.0, 0.95)


def noisy(n: int, seed: int) -> list[Checkpoint]:
    """Pairs of normal numbers whose correlation is -0.8."""
    draw = np.random.default_rng(seed)
    xs = draw.normal(size=n)
    return marks(xs.tolist(), (-0.8 * xs + 0.6 * draw.normal(size=n)).tolist())


@pytest.mark.parametrize(("n", "method"), [(12, "Fisher z"), (60, "bootstrap")])
@pytest.mark.parametrize(("coefficient", "truth"), [("Pearson", -0.8), ("Spearman", 6 / math.pi * math.asin(-0.4))])
def test_intervals_cover_as_often_as_they_say(n: int, method: str, coefficient: str, truth: float) -> None:
    """Spearman's of two normal numbers is 6 / pi asin(r / 2)."""
    found = [correlation(noisy(n, seed), coefficient) for seed in range(60)]
    assert {each.method for each in found} == {method}
    held = sum(each.interval.holds(truth) for each in found if each.interval is not None)
    assert held >= 52  # 95 % of 60, three standard deviations below


def test_what_cannot_be_correlated_has_a_reason() -> None:
    four = correlation(marks([1, 2, 3, 4], [4, 3, 2, 1]), "Pearson")
    assert (four.n, four.value, four.reason) == (4, None, "4 checkpoints with both numbers; 5 are needed")
    assert "same BrierLM" in correlation(marks([1, 2, 3, 4, 5], [2] * 5), "Spearman").reason


def test_a_study_pairs_the_numbers_of_each_cell_in_token_windows_and_one_state() -> None:
    (study,) = studies(Evidence([*line(6), *reference("unigram", 4.6)]))
    assert (study.estimator, study.context, study.window, study.state) == ("sampled", 128, 256, "reset")
    assert [c.nats for c in study.checkpoints] == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    assert [c.brier for c in study.checkpoints] == pytest.approx([40, 39.5, 39, 38.5, 38, 37.5])
    assert correlation(study.checkpoints, "Pearson").value == pytest.approx(-1)


def test_codecs_and_protocols_are_not_mixed() -> None:
    other = [replace(r, codec="bpe-1024", cell=f"{r.cell}-bpe") for r in line(5)]
    found = studies(Evidence([*line(6), *other]))
    assert [(study.codec, len(study.checkpoints)) for study in found] == [("bytes", 6), ("bpe-1024", 5)]


def test_refused_scores_are_left_out_and_counted() -> None:
    refused = [r for i in (90, 91) for r in checkpoint("transformer", i, 3.0, None)]
    (study,) = studies(Evidence([*line(5), *refused]))
    assert (len(study.checkpoints), study.refused) == (5, 2)
    shown = correlation_table(Evidence([*line(5), *refused]))
    assert shown is not None
    assert any(note.startswith("2 checkpoints on bytes (sampled) have no BrierLM") for note in shown.notes)


def test_the_table_has_all_checkpoints_each_architecture_and_the_published_figures() -> None:
    evidence = Evidence([*line(6), *line(4, "mamba", slope=+5.0)])
    shown = correlation_table(evidence)
    assert shown is not None
    lines = {cells[0].text: cells for cells in shown.lines}
    assert [lines["all"][3].text, lines["transformer"][3].text] == ["10", "6"]
    assert (lines["transformer"][4].text, lines["transformer"][4].detail) == ("-1.000", "[-1.000, -1.000]")
    assert lines["mamba"][4].reason == "4 checkpoints with both numbers; 5 are needed"
    assert [cell.text for cell in lines["Shao et al. 2025, figure 3"][4:]] == ["-0.966", "-0.991"]


def test_the_figure_has_a_colour_an_architecture_and_its_numbers() -> None:
    with house_style():
        drawn = correlation_figure(Evidence([*line(6), *line(5, "mamba")]))
        assert isinstance(drawn, Drawing)
    assert list(drawn.data["architecture"]) == ["transformer"] * 6 + ["mamba"] * 5
    assert "n = 11" in drawn.figure.axes[0].get_title(loc="left")
    colours = {marks.get_color() for marks in drawn.figure.axes[0].get_lines()}
    assert len(colours) == 2


def test_too_few_checkpoints_leave_a_sentence_instead() -> None:
    evidence = Evidence(line(4))
    assert correlation_table(evidence) is None
    drawn = correlation_figure(evidence)
    assert isinstance(drawn, Omitted)
    assert drawn.reason == "at most 4 trained cells have both numbers under one protocol; 5 are needed"
