"""How many seeds a difference needs, and how small a difference a number of seeds can resolve.

Two architectures trained on the same seeds see the same data in the same order, so that their differences are paired.
With n pairs whose differences have standard deviation s, the t-statistic of a true difference D follows the noncentral
t-distribution with n - 1 degrees of freedom and noncentrality D sqrt(n) / s. A two-sided test at `confidence` finds D
with probability `power` when the noncentrality puts that much of it beyond the critical value.

Source: Cohen 1988, Statistical power analysis, section 2.4.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy.special import nctdtrinc, stdtrit

from archbench.errors import RecordError
from archbench.record import Record

CONFIDENCE, POWER = 0.95, 0.8
MOST = 1000
"""Seeds beyond which nobody will go; more is reported as that."""


def resolvable(sd: float, n: int, confidence: float = CONFIDENCE, power: float = POWER) -> float:
    """The smallest difference that n pairs find with that power; infinite for fewer than two."""
    if n < 2:
        return math.inf
    critical = stdtrit(n - 1, (1 + confidence) / 2)
    return float(nctdtrinc(n - 1, 1 - power, critical)) * sd / math.sqrt(n)


def needed(sd: float, delta: float, confidence: float = CONFIDENCE, power: float = POWER) -> int | None:
    """The fewest seeds that find a difference of `delta` with that power; None where `MOST` are too few."""
    return next((n for n in range(2, MOST + 1) if resolvable(sd, n, confidence, power) <= delta), None)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How much the difference between two rows of one size varies with the seed: standard deviation over n seeds."""

    size: str
    first: str
    second: str
    sd: float
    n: int


def pooled(spreads: Sequence[Spread]) -> float:
    """One standard deviation of several, weighed by their degrees of freedom."""
    freedom = sum(spread.n - 1 for spread in spreads)
    return math.sqrt(sum((spread.n - 1) * spread.sd**2 for spread in spreads) / freedom)


def spreads(
    records: Sequence[Record], metric: str = "likelihood", quantity: str = "bits_per_byte", state: str = "reset"
) -> list[Spread]:
    """The spread of every pair of labels that were trained on two common seeds at least, within one size and corpus.

    Raises:
        RecordError: no pair was.
    """
    values: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        asked = record.metric == metric and record.quantity == quantity and record.at.get("state", state) == state
        if asked and record.status == "ok" and record.value is not None and record.size != "custom":
            values[record.size, record.corpus][record.label][record.seed] = record.value
    found = []
    for (size, _), by_label in values.items():
        for first, second in combinations(by_label, 2):
            common = sorted(by_label[first].keys() & by_label[second].keys())
            if len(common) > 1:
                gaps = [by_label[first][seed] - by_label[second][seed] for seed in common]
                mean = math.fsum(gaps) / len(gaps)
                sd = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1))
                found.append(Spread(size=size, first=first, second=second, sd=sd, n=len(gaps)))
    if not found:
        raise RecordError(
            f"no two labels have {metric}.{quantity} on two common seeds, so the luck of training is not known; "
            "give a run with several seeds by --noise, or the standard deviation by --sd"
        )
    return found
