"""Differences between two rows that saw the same text: of pairs, since most of the spread is common to both.

Two intervals that overlap do not mean that two models cannot be told apart: documents differ much more from each other
than models do, and a hard document is hard for both. With one seed the pairs are documents, with several they are
seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from archbench.record import Record
from archbench.report.evidence import Evidence
from archbench.report.rows import Row
from archbench.stats import percentile_interval, resampled_ratios

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Bits per byte of one row minus those of another, with an interval over `over` ("documents" or "seeds")."""

    value: float
    low: float
    high: float
    over: str

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(evidence: Evidence, a: Row, b: Row, state: str, comparisons: int = 1) -> Difference | None:
    """The difference a - b of bits per byte, or None where the records do not pair.

    `comparisons` is how many such intervals are read together; each is widened so that all of them hold with 95 %
    (Bonferroni).
    """
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    of_a, of_b = (_by_seed(evidence, row, "bits_per_byte", state) for row in (a, b))
    seeds = sorted(of_a.keys() & of_b.keys())
    if len(seeds) > 1:
        return _over_seeds([_value(of_a[seed]) - _value(of_b[seed]) for seed in seeds], confidence)
    if not seeds:
        return None
    seed = seeds[0]
    weights = [_by_seed(evidence, row, "heldout_bytes", state).get(seed) for row in (a, b)]
    if weights[0] is None or weights[1] is None or weights[0].samples != weights[1].samples:
        return None
    return _over_documents(of_a[seed], of_b[seed], weights[0].samples, confidence)


def _by_seed(evidence: Evidence, row: Row, quantity: str, state: str) -> dict[int, Record]:
    return {record.seed: record for record in evidence.records_of(row, "likelihood", quantity, state=state)}


def _value(record: Record) -> float:
    assert record.value is not None
    return record.value


def _over_documents(a: Record, b: Record, weights: list[float], confidence: float) -> Difference | None:
    if not len(a.samples) == len(b.samples) == len(weights) > 1:
        return None
    sizes = np.asarray(weights)
    extra = (np.asarray(a.samples) - np.asarray(b.samples)) * sizes
    interval = percentile_interval(resampled_ratios(extra, sizes), confidence)
    return Difference(value=_value(a) - _value(b), low=interval.low, high=interval.high, over="documents")


def _over_seeds(differences: list[float], confidence: float) -> Difference:
    n = len(differences)
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * spread / math.sqrt(n)
    return Difference(value=mean, low=mean - half, high=mean + half, over="seeds")
