"""Learning rates by equal trials: every architecture tries the same ones, on the same budget and a seed of its own.

    tuning:
      learning_rates: [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
      budget: {bytes: 400_000}
      seed: 100
      size: micro        # where they are tried; left out: at every size of the suite

The trials are a suite like any other: cells, records, checkpoints, resumable. The rate with the best held-out result is
taken; if that is the lowest or the highest of the list, the optimum may lie beyond it, and the architecture's cells are
void: their records say so in place of numbers. An architecture whose cells name a learning rate of their own is not
tuned, since its trials would not be equal.

Source: Choi et al. 2019, 1910.05446 (rankings follow the tuning protocol); Porian et al. 2024, 2406.19146.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archbench import registry
from archbench.cell import Budget
from archbench.errors import ConfigError, SuiteError
from archbench.parse import parse
from archbench.record import Record
from archbench.suite import CellEntry, Suite, entries

JUDGES = (("likelihood", "bits_per_byte", "reset"), ("brier_lm", "brier_n", None))
"""What a trial is judged by: the first of these that it has; the Brier score of single tokens is the least noisy one of
a model without likelihood."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The declared search. Rates in any order; at least three, so that one of them has neighbours on both sides."""

    learning_rates: tuple[float, ...]
    budget: dict[str, float]
    seed: int = 100
    size: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.learning_rates)) < 3 or min(self.learning_rates) <= 0:
            raise ConfigError(
                f"learning_rates: {list(self.learning_rates)}; needs three different ones at least, all above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the trials of one label and size came to: results by learning rate (None where a trial failed), judged by
    `quantity`. `void` says why there is no valid rate, empty if there is one."""

    learning_rate: float
    quantity: str
    results: Mapping[float, float | None]
    tuning: Tuning
    void: str = ""

    def summary(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {
            "learning_rate": self.learning_rate,
            "trials": len(self.results),
            "results": {f"{rate:g}": value for rate, value in self.results.items()},
            "quantity": self.quantity,
            "budget": self.tuning.budget,
            "seed": self.tuning.seed,
        }


Choices = Mapping[tuple[str, str | None], Choice]
"""By label and size; the size is None where one choice serves all sizes."""


def parse_tuning(suite: Suite) -> Tuning:
    """Raises SuiteError with the place for an unknown key, an impossible value, or a seed that the cells train with."""
    where = f"{suite.path}: tuning"
    tuning = parse(Tuning, suite.tuning, where)
    parse(Budget, tuning.budget, f"{where}.budget")
    if tuning.seed in suite.seeds:
        raise SuiteError(f"{where}.seed: {tuning.seed} is one of the suite's seeds; a trial's seed must be another")
    return tuning


def trials(suite: Suite, only: Sequence[str] = ()) -> Suite:
    """The suite of the trials: every tuned cell with every rate, measured by held-out quality alone. `only` keeps those
    of these labels or architectures."""
    tuning = parse_tuning(suite)
    cells = []
    for entry, _ in _tuned(suite, tuning, only):
        for rate in sorted(set(tuning.learning_rates)):
            raw = {name: value for name, value in dataclasses.asdict(entry).items() if value not in (None, {}, False)}
            raw["label"] = _trial_label(entry, rate)
            raw["training"] = {**entry.training, "learning_rate": rate, "budget": tuning.budget}
            raw["metrics"] = [_judge(entry)]
            cells.append(raw)
    judged = {metric: suite.metrics.get(metric) for metric, _, _ in JUDGES}
    return dataclasses.replace(
        suite,
        name=f"{suite.name}-tuning",
        description=f"Learning rates for {suite.name}",
        cells=cells,
        seeds=[tuning.seed],
        grid={},
        metrics=judged,
        tuning=None,
    )


def choose(suite: Suite, records: Sequence[Record], only: Sequence[str] = ()) -> Choices:
    """The best rate of each tuned label and size, from the records of its trials."""
    tuning = parse_tuning(suite)
    found: dict[tuple[str, str | None], Choice] = {}
    for entry, size in _tuned(suite, tuning, only):
        label = entry.label or registry.label(entry.architecture)
        found[label, size] = _choice(entry, tuning, [r for r in records if size is None or r.size == size])
    return found


def _tuned(suite: Suite, tuning: Tuning, only: Sequence[str]) -> list[tuple[CellEntry, str | None]]:
    """The entries that are tuned, each once a size, with the size that its choice serves."""
    found: dict[tuple[str, str | None], CellEntry] = {}
    for entry in entries(suite):
        if entry.pretrained is not None or "learning_rate" in entry.training or _example(entry) is None:
            continue
        size = None if tuning.size else (entry.size or suite.size)
        label = entry.label or registry.label(entry.architecture)
        if only and label not in only and entry.architecture not in only:
            continue
        found.setdefault((label, size), dataclasses.replace(entry, size=tuning.size or size))
    return [(entry, size) for (_, size), entry in found.items()]


def _example(entry: CellEntry) -> Any:
    """Some config of the architecture; None for one that comes in no sizes (n-gram floors learn by reading)."""
    return next(iter(registry.architecture(entry.architecture).candidates(256)), None)


def _judge(entry: CellEntry) -> str:
    traits = registry.architecture(entry.architecture).traits(_example(entry))
    return "likelihood" if traits.likelihood else "brier_lm"


def _trial_label(entry: CellEntry, rate: float) -> str:
    return f"{entry.label or registry.label(entry.architecture)} at {rate:g}"


def _choice(entry: CellEntry, tuning: Tuning, records: Sequence[Record]) -> Choice:
    rates = sorted(set(tuning.learning_rates))
    of_rate = {rate: [r for r in records if r.label == _trial_label(entry, rate)] for rate in rates}
    for metric, quantity, state in JUDGES:
        results = {rate: _result(of_rate[rate], metric, quantity, state) for rate in rates}
        known = {rate: value for rate, value in results.items() if value is not None}
        if known:
            better = next(r.better for r in records if r.metric == metric and r.quantity == quantity)
            best = (min if better == "lower" else max)(known, key=lambda rate: known[rate])
            return Choice(
                learning_rate=best,
                quantity=f"{metric}.{quantity}",
                results=results,
                tuning=tuning,
                void=_edge(best, rates),
            )
    label = entry.label or registry.label(entry.architecture)
    return Choice(
        learning_rate=rates[len(rates) // 2],
        quantity="",
        results=dict.fromkeys(rates),
        tuning=tuning,
        void=f"no trial of {label} gave a held-out result",
    )


def _edge(best: float, rates: Sequence[float]) -> str:
    """Why the best rate may not be the optimum: nothing was tried beyond it. A trial that failed was tried."""
    side = {rates[0]: "lowest", rates[-1]: "highest"}.get(best)
    if side is None:
        return ""
    return f"the best learning rate, {best:g}, is the {side} one tried, so that the optimum may lie beyond; add others"


def _result(records: Sequence[Record], metric: str, quantity: str, state: str | None) -> float | None:
    for record in records:
        if record.metric == metric and record.quantity == quantity and record.status == "ok":
            if state is not None and record.at.get("state") != state:
                continue
            if quantity == "brier_n" and (record.at.get("n") != 1 or record.at.get("estimator") != "sampled"):
                continue
            return record.value
    return None
