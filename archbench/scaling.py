"""Scaling laws: how a loss falls with size and data, how sure that is, and where two laws cross.

    L(N, D) = E + A N^-a + B D^-b        N parameters, D bytes of training text, L bits per byte

Terms that the runs cannot tell apart are left out: the data term where all runs read equally much, the size term where
all are equally large, and E where one of the terms that remain has only two places to stand on (two numbers cannot hold
three). Two sizes at two budgets differ in three things, too few for two terms: only the runs of the larger budget count
then. For given exponents the law is linear in E, A and B, which are kept from being negative; so only the exponents are
searched, on a grid and then locally (variable projection). The parabola through the minima of equal-compute curves is
not used: it is biased even without noise. Intervals are percentiles over runs drawn with replacement within each (N,
D), which says how the luck of training moves the law, not whether the law holds: for that the largest size is left out
and predicted, by a law that may have a term less.

Sources: Hoffmann et al. 2022, 2203.15556, section 3.3 (the law); Golub & Pereyra 2003 (variable projection); Besiroglu
et al. 2024, 2404.10102 (how fits of it fail).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from jaxtyping import Float64
from scipy.optimize import brentq, minimize, nnls

from archbench.errors import UnsupportedError
from archbench.stats import CONFIDENCE, Interval, percentile_interval

REACH = 10.0
"""How far beyond the largest size measured a law may be read."""
RESAMPLES = 100
_EXPONENTS = np.geomspace(0.02, 1.5, 40)
_FEWEST_FOR_FLOOR = 3
"""Sizes, and budgets if they have a term, from which on an irreducible loss E is fitted."""
BOUNDS = (1e-3, 3.0)
"""Between these an exponent is searched."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained model: parameters, bytes of training text, held-out loss."""

    parameters: float
    bytes: float
    loss: float
    seed: int = 0

    @property
    def place(self) -> tuple[float, float]:
        return self.parameters, self.bytes


@dataclass(frozen=True, kw_only=True)
class Law:
    """E, A, a, B, b as above; A or B is 0 where its term was left out. Read up to `largest` times REACH parameters."""

    E: float
    A: float
    a: float
    B: float
    b: float
    smallest: float
    largest: float

    def loss(self, parameters: float, n_bytes: float) -> float:
        """The loss the law gives. Raises UnsupportedError more than REACH times beyond the sizes it was fitted to."""
        if parameters > REACH * self.largest * (1 + 1e-9):
            raise UnsupportedError(
                f"{parameters:.3g} parameters are more than {REACH:g} times the largest size measured "
                f"({self.largest:.3g}); a law is not read that far out"
            )
        return self._at(parameters, n_bytes)

    def _at(self, parameters: float, n_bytes: float) -> float:
        return self.E + self.A * parameters**-self.a + self.B * n_bytes**-self.b


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A law with what it rests on.

    `draws` are laws of redrawn runs. `held_out` is the largest size's mean loss, `predicted` what the law of the other
    sizes gives for it, with an interval; None where too few sizes remain.
    """

    law: Law
    draws: tuple[Law, ...]
    n_runs: int
    n_sizes: int
    held_out: float | None = None
    predicted: float | None = None
    predicted_interval: Interval | None = None

    @property
    def at_bound(self) -> bool:
        """Whether the size exponent ended where the search does: then the losses do not tell what it is."""
        return not BOUNDS[0] * 1.01 < self.law.a < BOUNDS[1] * 0.99

    @property
    def refuted(self) -> bool:
        """Whether the largest size's loss lies outside what the smaller sizes' law gives for it."""
        near = self.predicted_interval
        return near is not None and self.held_out is not None and not near.holds(self.held_out)

    def exponent(self) -> Interval | None:
        """Bounds of the size exponent over the draws."""
        return percentile_interval([law.a for law in self.draws]) if len(self.draws) > 1 else None


@dataclass(frozen=True, kw_only=True)
class LawCrossing:
    """The size from which on `better_after` has the lower loss, at equal bytes. `share` of the draws cross within the
    readable range; the interval is over those."""

    better_before: str
    better_after: str
    parameters: float
    interval: Interval | None
    share: float


def fit(runs: Sequence[Run], resamples: int = RESAMPLES, seed: int = 0) -> Scaling:
    """The law of these runs, its draws, and its check on the largest size.

    Raises:
        UnsupportedError: fewer than two sizes.
    """
    sizes = sorted({run.parameters for run in runs})
    if len(sizes) < 2:
        raise UnsupportedError(f"{len(sizes)} size(s) measured; a scaling law needs two at least")
    runs = _telling(runs)
    whole = _law(runs)
    smaller = _telling([run for run in runs if run.parameters < sizes[-1]])
    budgets = {run.bytes for run in smaller}
    # A law of one budget says nothing of others.
    largest = [run for run in runs if run.parameters == sizes[-1] and (len(budgets) > 1 or run.bytes in budgets)]
    check: dict[str, float | Interval | None] = {}
    if len(sizes) > 2 and largest:
        law = _law(smaller)

        def predicted(law: Law) -> float:
            return float(np.mean([law._at(run.parameters, run.bytes) for run in largest]))

        spread = [predicted(drawn) for drawn in _draws(smaller, law, resamples, seed)]
        check = {
            "held_out": float(np.mean([run.loss for run in largest])),
            "predicted": predicted(law),
            "predicted_interval": percentile_interval(spread) if len(spread) > 1 else None,
        }
    draws = _draws(runs, whole, resamples, seed)
    return Scaling(law=whole, draws=draws, n_runs=len(runs), n_sizes=len(sizes), **check)  # type: ignore[arg-type]


def _telling(runs: Sequence[Run]) -> Sequence[Run]:
    """All runs, but of two sizes at two budgets those of the larger budget that both have."""
    sizes, budgets, places = ({getattr(run, what) for run in runs} for what in ("parameters", "bytes", "place"))
    if not (len(sizes) == len(budgets) == 2 and len(places) > 2):
        return runs
    shared = max(read for read in budgets if all((size, read) in places for size in sizes))
    return [run for run in runs if run.bytes == shared]


def crossing(first: str, a: Scaling, second: str, b: Scaling, n_bytes: float) -> LawCrossing | None:
    """Where the laws of two architectures cross at `n_bytes` of training text, between the smallest size that both
    have and REACH times the largest; None where they do not."""
    low = max(a.law.smallest, b.law.smallest)
    high = REACH * min(a.law.largest, b.law.largest)
    at = _root(a.law, b.law, n_bytes, low, high)
    if at is None:
        return None
    roots = [_root(x, y, n_bytes, low, high) for x, y in zip(a.draws, b.draws, strict=False)]
    found = [root for root in roots if root is not None]
    before, after = (first, second) if a.law._at(low, n_bytes) < b.law._at(low, n_bytes) else (second, first)
    return LawCrossing(
        better_before=before,
        better_after=after,
        parameters=at,
        interval=percentile_interval(found, CONFIDENCE) if len(found) > 1 else None,
        share=len(found) / len(roots) if roots else 0.0,
    )


def _root(a: Law, b: Law, n_bytes: float, low: float, high: float) -> float | None:
    def gap(log_size: float) -> float:
        size = float(np.exp(log_size))
        return a._at(size, n_bytes) - b._at(size, n_bytes)

    ends = gap(np.log(low)), gap(np.log(high))
    if not low < high or ends[0] * ends[1] >= 0:
        return None
    return float(np.exp(brentq(gap, np.log(low), np.log(high))))


def _draws(runs: Sequence[Run], whole: Law, resamples: int, seed: int) -> tuple[Law, ...]:
    """Laws, each searched near `whole`, of runs drawn with replacement within each place. Seeds that all places share
    are drawn alike, so that two architectures trained on the same seeds move together. Nothing where every
    place has one run."""
    places: dict[tuple[float, float], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        places.setdefault(run.place, []).append(run)
    if all(len(group) == 1 for group in places.values()):
        return ()
    generator = np.random.default_rng(seed)
    most = max(len(group) for group in places.values())
    laws = []
    for _ in range(resamples):
        picks = generator.integers(0, most, most)
        drawn = [group[pick % len(group)] for group in places.values() for pick in picks[: len(group)]]
        laws.append(_law(drawn, near=whole))
    return tuple(laws)


@dataclass(frozen=True)
class _Terms:
    """Which exponents are searched, and whether there is an E."""

    sizes: Float64[np.ndarray, " r"]
    data: Float64[np.ndarray, " r"]
    losses: Float64[np.ndarray, " r"]
    with_size: bool
    with_data: bool
    with_floor: bool
    unit: tuple[float, float] = field(default=(1.0, 1.0))

    def solve(self, exponents: Sequence[float]) -> tuple[Float64[np.ndarray, " c"], float]:
        """The best non-negative coefficients for these exponents, and the residual's norm."""
        left = list(exponents)
        columns = [np.ones_like(self.losses)] if self.with_floor else []
        if self.with_size:
            columns.append(self.sizes ** -left.pop(0))
        if self.with_data:
            columns.append(self.data ** -left.pop(0))
        return nnls(np.stack(columns, axis=1), self.losses)


def _law(runs: Sequence[Run], near: Law | None = None) -> Law:
    """The best law; the search starts at the exponents of `near`, else at the best of a grid."""
    sizes, data = np.array([run.parameters for run in runs]), np.array([run.bytes for run in runs])
    # In units of their geometric means, so that coefficients are of the size of losses.
    unit = float(np.exp(np.log(sizes).mean())), float(np.exp(np.log(data).mean()))
    n_sizes, n_data = len(np.unique(sizes)), len(np.unique(data))
    own_data = len({run.place for run in runs}) > n_sizes  # data that is a function of size cannot be told from it
    with_data = n_data > 1 and own_data
    fewest = min(n_sizes, n_data) if with_data else n_sizes
    terms = _Terms(
        sizes=sizes / unit[0],
        data=data / unit[1],
        losses=np.array([run.loss for run in runs]),
        with_size=n_sizes > 1,
        with_data=with_data,
        with_floor=fewest >= _FEWEST_FOR_FLOOR,
    )
    n_exponents = terms.with_size + terms.with_data
    if near is None:
        start = min(product(_EXPONENTS, repeat=n_exponents), key=lambda point: terms.solve(point)[1])
    else:
        start = ((near.a,) if terms.with_size else ()) + ((near.b,) if terms.with_data else ())
    polished = minimize(
        lambda point: terms.solve(list(np.clip(point, *BOUNDS)))[1], start, method="Nelder-Mead",
        options={"xatol": 1e-4, "fatol": 1e-9, "maxiter": 200},
    )  # fmt: skip
    exponents = list(np.clip(polished.x, *BOUNDS))
    coefficients = list(terms.solve(exponents)[0])
    floor = coefficients.pop(0) if terms.with_floor else 0.0
    a, A = (exponents.pop(0), coefficients.pop(0)) if terms.with_size else (0.0, 0.0)
    b, B = (exponents.pop(0), coefficients.pop(0)) if terms.with_data else (0.0, 0.0)
    return Law(
        E=float(floor),
        A=float(A * unit[0] ** a),
        a=float(a),
        B=float(B * unit[1] ** b),
        b=float(b),
        smallest=float(sizes.min()),
        largest=float(sizes.max()),
    )
