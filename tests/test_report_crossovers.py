"""Intervals of crossovers, on curves whose crossing is known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
from test_report import MAMBA, TRANSFORMER, Model, measured

from archbench.report.context_figures import between
from archbench.report.crossings import Crossing, crossings
from archbench.report.crossovers import crossover_table
from archbench.report.evidence import Evidence, Finding

CONTEXTS = (128.0, 512.0, 2048.0, 8192.0)


def curve(
    heights: Mapping[float, float], noise: float, seed: int, n: int = 40, shared: float = 0.0
) -> dict[float, Finding]:
    """Samples round each height; `shared` is the spread that all curves have in common, sample by sample."""
    found = {}
    for index, (x, height) in enumerate(heights.items()):
        common, own = random.Random(index), random.Random(1000 * seed + index)
        samples = [height * math.exp(common.gauss(0, shared) + own.gauss(0, noise)) for _ in range(n)]
        median = sorted(samples)[n // 2]
        found[x] = Finding(
            value=median, low=median * 0.9, high=median * 1.1, confidence=0.95, over="samples", n=n,
            samples=tuple(samples),
        )  # fmt: skip
    return found


def rising(noise: float, seed: int = 1, **more: float) -> dict[float, Finding]:
    return curve({x: x / 1000 for x in CONTEXTS}, noise, seed, **more)


def level(noise: float, seed: int = 2, **more: float) -> dict[float, Finding]:
    return curve(dict.fromkeys(CONTEXTS, 1.0), noise, seed, **more)


def only(found: list[Crossing]) -> Crossing:
    (crossing,) = found
    assert crossing.low is not None and crossing.high is not None
    return crossing


def width(crossing: Crossing) -> float:
    assert crossing.low is not None and crossing.high is not None
    return math.log(crossing.high / crossing.low)


def test_the_interval_holds_the_true_crossing_and_narrows_with_the_noise() -> None:
    """x / 1000 meets 1 at 1000."""
    wide, narrow = (only(crossings({"a": rising(s), "b": level(s)}, noisy=True)) for s in (0.3, 0.03))
    for crossing in (wide, narrow):
        assert crossing.low is not None and crossing.high is not None
        assert crossing.low < 1000 < crossing.high
    assert width(wide) > 5 * width(narrow)


def test_intervals_cover_as_often_as_they_say() -> None:
    held = 0
    for trial in range(100):
        found = only(crossings({"a": rising(0.2, 2 * trial), "b": level(0.2, 2 * trial + 1)}, noisy=True))
        assert found.low is not None and found.high is not None
        held += found.low <= 1000 <= found.high
    assert held >= 88  # 95 % of 100, three standard deviations below


def test_what_both_curves_share_does_not_widen_the_interval() -> None:
    """Samples are pairs: a slow moment of the machine slows both."""
    alone = only(crossings({"a": rising(0.3, 1), "b": level(0.3, 2)}, noisy=True))
    paired = only(crossings({"a": rising(0.02, 1, shared=0.3), "b": level(0.02, 2, shared=0.3)}, noisy=True))
    assert width(paired) < width(alone) / 3


def test_an_interval_may_leave_the_contexts_measured() -> None:
    """1.02 against 1 at the last context: the order there is not sure, so no upper bound is."""
    heights = {x: (0.5 if x < 8192 else 1.02) for x in CONTEXTS}
    found = only(crossings({"a": curve(heights, 0.3, 1), "b": level(0.3)}, noisy=True))
    assert found.high == math.inf and found.low is not None and found.low > 2048
    assert between(found).startswith("above ")


def test_a_mean_over_seeds_is_drawn_from_its_interval() -> None:
    def over_seeds(heights: dict[float, float]) -> dict[float, Finding]:
        return {
            x: Finding(value=y, low=0.9 * y, high=1.1 * y, confidence=0.95, over="seeds", n=3, seeds=3)
            for x, y in heights.items()
        }

    found = only(
        crossings(
            {"a": over_seeds({x: x / 1000 for x in CONTEXTS}), "b": over_seeds(dict.fromkeys(CONTEXTS, 1.0))},
            noisy=True,
        )
    )
    # log(a / b) at 1000 has the spread sqrt(2) 0.1 / 1.96; the slope is 1; bounds are 1.96 spreads off.
    assert math.log(found.high / 1000) == pytest.approx(math.sqrt(2) * 0.1, rel=0.35)
    assert math.log(1000 / found.low) == pytest.approx(math.sqrt(2) * 0.1, rel=0.35)


def test_values_without_intervals_and_exact_ones_have_none() -> None:
    bare = {x: Finding(value=x / 1000) for x in CONTEXTS}
    flat = {x: Finding(value=1.0) for x in CONTEXTS}
    for noisy in (True, False):
        (found,) = crossings({"a": bare, "b": flat}, noisy=noisy)
        assert (found.low, found.high) == (None, None)
        assert between(found) == ""


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (850.0, 1126.4, "850 to 1.1K"), (0.0, 900.0, "below 900"), (850.0, math.inf, "above 850"),
        (0.0, math.inf, "anywhere, or nowhere"),
    ],
)  # fmt: skip
def test_intervals_in_words(low: float, high: float, said: str) -> None:
    made = Crossing(cheaper_before="a", cheaper_after="b", x=1000, y=1, resolved=True, low=low, high=high)
    assert between(made) == said


def test_the_table_lists_every_crossover_with_its_interval() -> None:
    shown = crossover_table(Evidence([*measured(TRANSFORMER), *measured(MAMBA)]))
    assert shown is not None
    lines = {(cells[0].text, cells[0].detail): cells for cells in shown.lines}
    cells = lines["time per token", "batch 1"]
    assert [cell.text for cell in cells[1:3]] == ["transformer", "mamba"]
    assert cells[3].sort == pytest.approx(1000, rel=0.15)  # 0.6 ms + 1.1 us x = 1.7 ms
    assert cells[5].text == "resolved"
    low, high = (float(part) for part in cells[4].text.replace("1.0K", "1024").replace("1.1K", "1126").split(" to "))
    assert low < (cells[3].sort or 0) < high
    other = Model("other", bits=2, first=1, slope=0, state=400_000, growth=0)
    exact = crossover_table(Evidence([*measured(TRANSFORMER), *measured(other)]))
    assert exact is not None
    (state,) = [cells for cells in exact.lines if cells[0].text == "state of one row"]
    assert state[4].text == "exact at the points"
    assert crossover_table(Evidence(list(measured(MAMBA)))) is None
