"""Does BrierLM order checkpoints as their cross-entropy does? Correlations over a run's own checkpoints.

    Pearson     of BrierLM and nats per token        straight lines
    Spearman    of their ranks                       any monotone relation

A checkpoint is a trained cell that has both numbers; all of a study share corpus, codec, likelihood window, and
BrierLM's estimator and context, since neither number means the same across these. Cells whose BrierLM was refused (a
factor's interval holds 0) are left out and counted: they are the weakest ones, so the range is cut there. Floors
without training are no checkpoints.

Intervals are percentile bootstraps over checkpoints; from fewer than 20, where that is too narrow, by Fisher's z,
atanh r +- z s / sqrt(n - 3), with s = 1 for Pearson and s^2 = 1 + r^2 / 2 for Spearman. Both treat checkpoints as
independent draws, which trainings of one recipe on one text are not quite.

Sources: Shao et al. 2025 (CALM), 2510.27688, figure 3, whose checkpoints are Transformers trained by cross-entropy;
Fisher 1921; Bonett & Wright 2000, Psychometrika 65 (Spearman's interval).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

from archbench.record import Record
from archbench.report.evidence import Evidence
from archbench.report.rows import CellId, cell_id
from archbench.stats import CONFIDENCE, RESAMPLES, Interval, percentile_interval

PAPER: Mapping[str, float] = {"Pearson": -0.966, "Spearman": -0.991}
"""Shao et al. 2025, figure 3."""
FEWEST = 5
FEW = 20
"""Below so many checkpoints the interval is Fisher's."""
_STATES = ("reset", "sliding", "carried")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Cross-entropy in nats per token, and BrierLM with its own interval where it has one."""

    architecture: str
    name: str
    nats: float
    brier: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Study:
    """The checkpoints that may be held against each other. `refused` counts those without a BrierLM."""

    corpus: str
    codec: str
    estimator: str
    context: int
    window: int
    state: str
    checkpoints: tuple[Checkpoint, ...]
    refused: int

    def of(self, architecture: str) -> tuple[Checkpoint, ...]:
        return tuple(c for c in self.checkpoints if c.architecture == architecture)

    @property
    def architectures(self) -> list[str]:
        return list(dict.fromkeys(c.architecture for c in self.checkpoints))


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A coefficient with its interval, or the reason why there is none. `method` says how the interval was made."""

    n: int
    value: float | None = None
    interval: Interval | None = None
    method: str = ""
    reason: str = ""


def studies(evidence: Evidence) -> list[Study]:
    """Every group of checkpoints with at least one pair of numbers, the teacher-forced estimator first."""
    entropy = _cross_entropies(evidence)
    found: dict[tuple[Any, ...], list[Checkpoint]] = defaultdict(list)
    refused: dict[tuple[Any, ...], int] = defaultdict(int)
    for record in evidence.records:
        cell = cell_id(record)
        if record.metric != "brier_lm" or record.quantity != "brier_lm" or cell not in entropy:
            continue
        if record.at.get("window") != "tokens" or evidence.row_of(record).reference:
            continue
        nats, window, state = entropy[cell]
        key = (record.corpus, record.codec, str(record.at["estimator"]), int(record.at["context"]), window, state)
        if record.value is None:
            refused[key] += 1
            continue
        found[key].append(
            Checkpoint(
                architecture=record.architecture,
                name=f"{evidence.row_of(record).name} seed {record.seed}",
                nats=nats,
                brier=record.value,
                low=record.low,
                high=record.high,
            )
        )
    names = ("corpus", "codec", "estimator", "context", "window", "state")
    made = [
        Study(**dict(zip(names, key, strict=True)), checkpoints=tuple(checkpoints), refused=refused[key])
        for key, checkpoints in found.items()
    ]
    return sorted(made, key=lambda study: (-len(study.checkpoints), study.estimator != "teacher_forced"))


def _cross_entropies(evidence: Evidence) -> dict[CellId, tuple[float, int, str]]:
    """Nats per token, window and state of each cell, all of the first state that the run has."""
    perplexities = [
        r for r in evidence.records if (r.metric, r.quantity, r.status) == ("likelihood", "perplexity", "ok")
    ]
    measured = {str(record.at.get("state")) for record in perplexities}
    state = next((state for state in _STATES if state in measured), None)
    return {
        cell_id(record): (math.log(_value(record)), int(record.at["context"]), str(state))
        for record in perplexities
        if record.at.get("state") == state
    }


def _value(record: Record) -> float:
    assert record.value is not None
    return record.value


def pearson(x: Float64[np.ndarray, "*r n"], y: Float64[np.ndarray, "*r n"]) -> Float64[np.ndarray, "*r"]:
    """Along the last axis; not a number where one of the two does not vary."""
    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (x, y))
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    ratio = np.where(scale > 0, (x * y).sum(axis=-1), math.nan) / np.where(scale > 0, scale, 1.0)
    return np.asarray(np.clip(ratio, -1.0, 1.0))


def spearman(x: Float64[np.ndarray, "*r n"], y: Float64[np.ndarray, "*r n"]) -> Float64[np.ndarray, "*r"]:
    """Pearson's of the ranks, ties sharing their mean rank."""
    return pearson(*(np.asarray(rankdata(v, axis=-1), dtype=np.float64) for v in (x, y)))


COEFFICIENTS: Mapping[str, Callable[..., Any]] = {"Pearson": pearson, "Spearman": spearman}


def correlation(checkpoints: Sequence[Checkpoint], coefficient: str) -> Correlation:
    """One of the COEFFICIENTS of BrierLM and cross-entropy."""
    n = len(checkpoints)
    if n < FEWEST:
        return Correlation(n=n, reason=f"{n} checkpoint{'s' * (n != 1)} with both numbers; {FEWEST} are needed")
    x, y = np.array([c.nats for c in checkpoints]), np.array([c.brier for c in checkpoints])
    compute = COEFFICIENTS[coefficient]
    value = float(compute(x, y))
    if math.isnan(value):
        return Correlation(n=n, reason="all checkpoints have the same BrierLM or the same cross-entropy")
    if n < FEW:
        spread = 1.0 if coefficient == "Pearson" else math.sqrt(1 + value**2 / 2)
        return Correlation(n=n, value=value, interval=fisher_interval(value, n, spread), method="Fisher z")
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    drawn = compute(x[draws], y[draws])
    interval = percentile_interval(drawn[~np.isnan(drawn)])
    return Correlation(n=n, value=value, interval=interval, method="bootstrap")


def fisher_interval(r: float, n: int, spread: float = 1.0, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a correlation r of n pairs; [r, r] where r is 1 or -1, which no interval can be put round."""
    if abs(r) >= 1:
        return Interval(r, r, confidence)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * spread / math.sqrt(n - 3)
    return Interval(math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), confidence)
