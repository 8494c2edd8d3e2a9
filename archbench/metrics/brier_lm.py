"""BrierLM: how good the law of the next n tokens is, measured without asking the model for probabilities.

For a context with true continuation y and the model's law P of n-grams

    Brier-n = 2 P(y_1:n) - sum_x P(x_1:n)^2        in [-1, 1]; its mean is largest for the true law only

averaged over places in held-out text, n = 1..4; BrierLM = 100 (Brier-1 Brier-2 Brier-3 Brier-4)^(1/4), a factor below
0 counted as 0. Both estimators are unbiased for every place and every n:

- `sampled`, for every model: S independent continuations x^1..x^S of the same context. E 1{x^i = y} = P(y) and
  E 1{x^i = x^j} = sum_x P(x)^2, so 2 mean_i 1{x^i = y} - mean_{i<j} 1{x^i = x^j}.
- `teacher_forced`, for models with a likelihood: P(y_1:n) is exact, by reading y. The sum is reduced to one path
  x ~ P with its last token summed out:

      sum_{x_1:n} P(x_1:n)^2 = sum_{x_<n} P(x_<n)^2 sum_v p(v | x_<n)^2 = E_{x ~ P} [ P(x_<n) sum_v p(v | x_<n)^2 ]

  The bracket is known wholly after one more reading of the path, for all n at once, and for n = 1 it is no estimate.

Windows: n tokens, comparable only within one codec; or n symbols of raw text, a symbol being a byte, or the boundary
(which a model may write as well as any byte, else the scores of what follows would not be proper). Four tokens always
hold four symbols. Where each token is one byte, the two windows are the same and so is teacher forcing; elsewhere the
probability of n bytes is a sum over all ways to cut them into tokens, and only sampling is left.

Source: Shao et al. 2025, CALM, section 4.2 (2510.27688). Departures: factors below 0 are counted as 0 before the
product (two of them would make it positive), and no BrierLM is given while a factor's interval holds 0.

Letters: b batch, t time, v vocabulary, s continuations, n orders 1..4, p places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Generator, Tensor

from archbench import stats
from archbench.codec import Codec
from archbench.data.windows import HeldoutDocument, heldout_documents
from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import continue_from
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import BOUNDARY, Likelihood, SequenceModel
from archbench.sampling import PLAIN
from archbench.state import State, copy_state, tile_state

ORDERS = 4
ALIGNMENT = 8
"""Places are multiples of this many tokens, so that models that read in strides of 1, 2, 4 or 8 share them."""
ESTIMATORS = ("teacher_forced", "sampled")
WINDOWS = ("tokens", "bytes")
PLACES_SEED = 0
"""Fixed: every cell, whatever its seed, is measured at the same places."""


@dataclass(frozen=True, kw_only=True)
class BrierSettings:
    """`context`: the most tokens read before a place (see `phases_of`), None for half the context the cell trained
    with; `draws`: continuations per place of the sampled estimator; `batch`: places measured at once."""

    estimators: tuple[str, ...] = ESTIMATORS
    windows: tuple[str, ...] = WINDOWS
    positions: int = 1024
    context: int | None = None
    draws: int = 2
    max_bytes: int = 262_144
    max_document_bytes: int = 16_384
    batch: int = 64

    def __post_init__(self) -> None:
        for name, found, allowed in (("estimators", self.estimators, ESTIMATORS), ("windows", self.windows, WINDOWS)):
            unknown = [entry for entry in found if entry not in allowed]
            if unknown or not found:
                raise ConfigError(f"brier_lm.{name}: {unknown or 'empty'}; allowed: {', '.join(allowed)}")
        for name, least in (("positions", 1), ("draws", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"brier_lm.{name}: {getattr(self, name)}; must be at least {least}")
        if self.context is not None and (self.context < 0 or self.context % ALIGNMENT):
            raise ConfigError(f"brier_lm.context: {self.context}; must be a multiple of {ALIGNMENT}, or left out")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where continuations are measured. `document` numbers the document of each place."""

    contexts: Int[Tensor, "p t"]
    truth: Int[Tensor, "p n"]
    document: Int[np.ndarray, " p"]


class BrierLM(Metric):
    name = "brier_lm"
    version = 2
    settings = BrierSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "brier_n": Quantity(unit="fraction", better="higher", meaning="Brier score of the next n tokens or bytes"),
        "brier_lm": Quantity(
            unit="points", better="higher", meaning="100 times the geometric mean of Brier-1 to Brier-4"
        ),
    }

    def measure(self, subject: Subject, settings: BrierSettings) -> Iterator[Measurement]:
        """Raises DataError when there is no held-out text."""
        half = max(ALIGNMENT, subject.context // 2 // ALIGNMENT * ALIGNMENT)
        context = half if settings.context is None else settings.context
        documents = heldout_documents(subject.corpus, subject.codec, settings.max_bytes, settings.max_document_bytes)
        places = find_places(documents, context, settings.positions)
        reason = _impossible(subject, context, places)
        terms = {} if reason else measure_terms(subject, places, settings)
        one_byte = bool((subject.codec.token_bytes()[1:] == 1).all())
        for estimator in settings.estimators:
            for window in settings.windows:
                at = {"estimator": estimator, "window": window, "context": context}
                missing = reason or _unsupported(subject, estimator, window, one_byte)
                if missing:
                    yield from _refused(at, missing)
                else:
                    key = ("teacher_forced", "tokens") if estimator == "teacher_forced" else (estimator, window)
                    yield from _measurements(terms[key], places, at, settings)


def _impossible(subject: Subject, context: int, places: Places) -> str:
    """Why nothing can be measured at all; empty when it can."""
    stride, limit = subject.traits.stride, subject.traits.context_limit
    reads = context + -(-ORDERS // stride) * stride
    if context % stride:
        return f"a context of {context} tokens is not a multiple of the model's stride {stride}; set brier_lm.context"
    if limit is not None and reads > limit:
        return f"context and continuation are {reads} tokens, and the model's context limit is {limit} tokens"
    if not len(places.document):
        return f"no held-out document has {context} + {ORDERS} tokens; lower brier_lm.context or give longer documents"
    return ""


def _unsupported(subject: Subject, estimator: str, window: str, one_byte: bool) -> str:
    """Why this estimator does not exist for this model and window; empty when it does."""
    if estimator == "sampled":
        return ""
    if not subject.traits.likelihood:
        return "this model gives no probabilities to tokens (it has no likelihood); see the sampled estimator"
    if window == "bytes" and not one_byte:
        return "the probability of n bytes sums over all ways to cut them into tokens; see the sampled estimator"
    return ""


def find_places(documents: Sequence[HeldoutDocument], context: int, positions: int) -> Places:
    """At most `positions` places with `context` tokens before them in their document and ORDERS after.

    They are drawn without replacement from all multiples of ALIGNMENT, by the lengths of the documents alone: the same
    for every model with the same codec.
    """
    first = -(-context // ALIGNMENT) * ALIGNMENT
    candidates = [
        (index, start)
        for index, document in enumerate(documents)
        for start in range(first, len(document.tokens) - ORDERS + 1, ALIGNMENT)
    ]
    rng = np.random.default_rng(PLACES_SEED)
    chosen = sorted(rng.permutation(len(candidates))[:positions].tolist())
    picked = [candidates[choice] for choice in chosen]
    return Places(
        contexts=_cut(documents, picked, -context, 0),
        truth=_cut(documents, picked, 0, ORDERS),
        document=np.array([index for index, _ in picked], dtype=np.int64),
    )


def _cut(
    documents: Sequence[HeldoutDocument], places: Sequence[tuple[int, int]], begin: int, end: int
) -> Int[Tensor, "p t"]:
    rows = [documents[index].tokens[start + begin : start + end] for index, start in places]
    return torch.stack(rows) if rows else torch.zeros(0, end - begin, dtype=torch.long)


@torch.no_grad()
def measure_terms(
    subject: Subject, places: Places, settings: BrierSettings
) -> dict[tuple[str, str], Float64[np.ndarray, "p n"]]:
    """The estimate at every place by estimator and window: those that the settings ask for and the model has."""
    model = subject.model
    generator = torch.Generator(model.device).manual_seed(subject.seed)
    forced = "teacher_forced" in settings.estimators and subject.traits.likelihood
    symbols = Symbols(subject.codec)
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    order: list[int] = []
    for dropped, batch in _batches(places, settings.batch):
        order += batch
        context = places.contexts[batch, dropped:].to(model.device)
        truth = places.truth[batch].to(model.device)
        state = model.prefill(context, model.initial_state(len(context)))
        if forced:
            terms = teacher_forced_terms(model, copy_state(state), truth, generator)
            found.setdefault(("teacher_forced", "tokens"), []).append(terms)
        if "sampled" in settings.estimators:
            written = continuations(model, state, len(truth), settings.draws, generator).cpu().numpy()
            expected = truth.cpu().numpy()
            for window in settings.windows:
                pair = (expected, written) if window == "tokens" else (symbols(expected), symbols(written))
                found.setdefault(("sampled", window), []).append(sampled_terms(*pair))
    back = np.argsort(order)
    return {key: np.concatenate(parts)[back] for key, parts in found.items()}


def phases_of(context: int) -> int:
    """In how many steps of ALIGNMENT contexts vary, from a little over half of `context` to all of it.

    Were all of one length, a model that works in segments would be asked at one place of its segment only: at a border
    it has no local context at all.
    """
    return max(1, min(8, context // (2 * ALIGNMENT)))


def _batches(places: Places, size: int) -> Iterator[tuple[int, list[int]]]:
    """Batches of places with contexts of one length, and how many tokens that leaves out at their beginning. Neighbours
    get different lengths, so no document has one length only."""
    n_phases = phases_of(places.contexts.shape[1])
    for phase in range(n_phases):
        members = list(range(phase, len(places.truth), n_phases))
        for begin in range(0, len(members), size):
            yield phase * ALIGNMENT, members[begin : begin + size]


def continuations(
    model: SequenceModel, state: State, batch_size: int, draws: int, generator: Generator
) -> Int[Tensor, "b s n"]:
    """`draws` independent continuations of ORDERS tokens of each row. Gives up `state`.

    Models whose steps write fewer tokens take more steps; tokens beyond ORDERS are cut off, which leaves the law of
    the first ORDERS as it is.
    """
    tiled = tile_state(state, draws)
    return continue_from(model, tiled, batch_size * draws, ORDERS, PLAIN, generator).view(batch_size, draws, ORDERS)


def sampled_terms(truth: Int[np.ndarray, "b n"], draws: Int[np.ndarray, "b s n"]) -> Float64[np.ndarray, "b n"]:
    """2 mean_i 1{x^i = y} - mean_{i<j} 1{x^i = x^j}, equality being on the first n symbols."""
    hits = np.logical_and.accumulate(draws == truth[:, None], axis=-1).mean(axis=1)
    pairs = [
        np.logical_and.accumulate(draws[:, i] == draws[:, j], axis=-1)
        for i, j in combinations(range(draws.shape[1]), 2)
    ]
    return 2 * hits - np.mean(pairs, axis=0)


def teacher_forced_terms(
    model: SequenceModel, state: State, truth: Int[Tensor, "b n"], generator: Generator
) -> Float64[np.ndarray, "b n"]:
    """2 P(y_1:n) - P(x_<n) sum_v p(v | x_<n)^2 with one path x drawn per row. Gives up `state`."""
    assert isinstance(model, Likelihood)
    path = continuations(model, copy_state(state), len(truth), 1, generator)[:, 0]
    both = torch.stack([truth, path], dim=1)
    log_probs, _ = model.score(both.flatten(0, 1), tile_state(state, 2))
    probs = log_probs.double().exp().unflatten(0, (-1, 2))
    taken = probs.gather(-1, both[..., None]).squeeze(-1).cumprod(dim=-1)
    before = torch.cat([torch.ones_like(taken[:, 1, :1]), taken[:, 1, :-1]], dim=1)  # P(x_<n)
    collision = before * probs[:, 1].square().sum(dim=-1)
    return (2 * taken[:, 0] - collision).cpu().numpy()


class Symbols:
    """Tokens as symbols of raw text: the first ORDERS of each run of ORDERS tokens. A byte is its value."""

    boundary = 256

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._known: dict[int, tuple[int, ...]] = {BOUNDARY: (self.boundary,)}

    def __call__(self, tokens: Int[np.ndarray, "*rows n"]) -> Int[np.ndarray, "*rows n"]:
        rows = [
            list(chain.from_iterable(self._of(token) for token in row))[:ORDERS]
            for row in tokens.reshape(-1, ORDERS).tolist()
        ]
        return np.array(rows, dtype=np.int64).reshape(tokens.shape)

    def _of(self, token: int) -> tuple[int, ...]:
        if token not in self._known:
            # An imported model may write special tokens that stand for no text: as outcomes they count like boundaries.
            self._known[token] = tuple(self._codec.decode(np.array([token]))) or (self.boundary,)
        return self._known[token]


def _measurements(
    terms: Float64[np.ndarray, "p n"], places: Places, at: Mapping[str, Any], settings: BrierSettings
) -> Iterator[Measurement]:
    """Documents are the clusters: their sums and counts are resampled, all orders by the same draws."""
    names, cluster = np.unique(places.document, return_inverse=True)
    count = np.bincount(cluster).astype(np.float64)
    sums = np.zeros((len(names), ORDERS))
    np.add.at(sums, cluster, terms)
    means = sums.sum(axis=0) / count.sum()
    intervals = [stats.bootstrap_ratio(sums[:, n], count) for n in range(ORDERS)]
    draws = f"{settings.draws} draws" if at["estimator"] == "sampled" else "exact probability, one-path collision"
    shortest = at["context"] - ALIGNMENT * (phases_of(at["context"]) - 1)
    protocol = (
        f"contexts of {shortest} to {at['context']} tokens from a fresh state; {len(terms)} places (multiples of "
        f"{ALIGNMENT} tokens) in {len(names)} held-out documents; next 1-{ORDERS} {at['window']}; {draws}; "
        "interval by bootstrap over documents"
    )
    for n, interval in enumerate(intervals):
        yield Measurement(
            quantity="brier_n",
            value=float(means[n]),
            samples=(sums[:, n] / count).tolist(),
            low=interval and interval.low,
            high=interval and interval.high,
            confidence=interval and interval.confidence,
            at={"n": n + 1, **at},
            protocol=protocol,
        )
    orders = [f"Brier-{n}" for n in range(1, ORDERS + 1)]
    try:
        value = 100 * stats.geometric_mean(means.tolist(), intervals, orders)
    except UnsupportedError as error:
        yield Measurement(quantity="brier_lm", value=None, at=at, protocol=protocol, reason=str(error))
        return
    resampled = stats.resampled_ratios(sums, count).clip(0.0, None).prod(axis=1)
    interval = stats.percentile_interval(100 * resampled ** (1 / ORDERS))
    yield Measurement(
        quantity="brier_lm",
        value=value,
        low=interval.low,
        high=interval.high,
        confidence=interval.confidence,
        at=at,
        protocol=protocol,
    )


def _refused(at: Mapping[str, Any], reason: str) -> Iterator[Measurement]:
    for n in range(1, ORDERS + 1):
        yield Measurement(quantity="brier_n", value=None, at={"n": n, **at}, reason=reason)
    yield Measurement(quantity="brier_lm", value=None, at=at, reason=reason)


METRIC = BrierLM()
