"""How well a cell has learned the task it was trained on, at the length it was trained at and beyond.

Test texts of each length are read by teacher forcing: an answer's token counts as right if it is the likeliest after
all that stands before it. A text in which all are right is one that the model would have written greedily, by induction
over the answer's tokens.

    accuracy      right tokens / answer's tokens                 exact match     texts with all right / texts

Texts are drawn by the last stage's settings from what the task keeps for testing; they depend on the cell's seed and
the length alone, so all architectures of a suite answer the same questions. Intervals are Wilson's, over texts: tokens
of one text are not independent, but the share of right ones in a text varies at most as much as one trial does, so that
the interval of the accuracy is, if anything, too wide.

Beside them stands what the model has to remember it all in: the bytes of its live state after a text of that length.

Letters: b texts at once, t tokens, a answer's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from archbench import stats
from archbench.errors import ConfigError, UnsupportedError
from archbench.exercise import Exercise
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import Likelihood, Traits
from archbench.state import state_bytes
from archbench.task import Generator

NO_LIKELIHOOD = "this model gives no probabilities to tokens (it has no likelihood), and answers are judged by them"
NO_TASK = "this cell was trained on its corpus and not on a task"
MAX_LOG_PROBS = 2**24
"""Most log-probabilities held at once (64 MB of fp32); what lies before the first answer is read without any."""


@dataclass(frozen=True, kw_only=True)
class SkillSettings:
    """Texts have the training length times each of `multiples` or, where given, `lengths` in tokens. Of each length
    `examples` are asked, `batch` at once."""

    multiples: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] | None = None
    examples: int = 256
    batch: int = 32

    def __post_init__(self) -> None:
        for name in ("multiples", "lengths"):
            given = getattr(self, name)
            if given is not None and (not given or min(given) < 1):
                raise ConfigError(f"skill.{name}: {list(given)}; needs one number at least, all at least 1")
        for name in ("examples", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"skill.{name}: {getattr(self, name)}; must be at least 1")


class Outcome(NamedTuple):
    """Of each text the number of its answer's tokens, and how many of them were right."""

    n_asked: Int64[np.ndarray, " n"]
    n_right: Int64[np.ndarray, " n"]


class SkillMetric(Metric):
    name = "skill"
    version = 1
    settings = SkillSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "accuracy": Quantity(unit="fraction", better="higher", meaning="right tokens among the answers' tokens"),
        "exact_match": Quantity(unit="fraction", better="higher", meaning="texts with every token of the answer right"),
        "chance": Quantity(
            unit="fraction", better="neither", meaning="accuracy of guessing among all possible answers"
        ),
        "state_bytes": Quantity(unit="B", better="lower", meaning="memory held by the state of one row after a text"),
    }

    def cannot(self, traits: Traits, settings: SkillSettings) -> str | None:
        del settings
        return None if traits.likelihood else NO_LIKELIHOOD

    def measure(self, subject: Subject, settings: SkillSettings) -> Iterator[Measurement]:
        """Raises UnsupportedError for a model without likelihood."""
        if not isinstance(subject.model, Likelihood):
            raise UnsupportedError(f"skill: {NO_LIKELIHOOD}")
        exercise = subject.exercise
        if exercise is None:
            for quantity in self.quantities:
                yield Measurement(quantity=quantity, value=None, reason=NO_TASK)
            return
        generator = exercise.lessons(subject.codec, subject.corpus)[-1].generator
        lengths = settings.lengths or tuple(exercise.context * multiple for multiple in settings.multiples)
        for length in lengths:
            yield from _at_length(subject, exercise, generator, length, settings)


def _at_length(
    subject: Subject, exercise: Exercise, generator: Generator, length: int, settings: SkillSettings
) -> Iterator[Measurement]:
    at = {"task": exercise.name, "length": length}
    reason = _impossible(subject, generator, length)
    if reason:
        for quantity in SkillMetric.quantities:
            yield Measurement(quantity=quantity, value=None, at=at, reason=reason)
        return
    outcome, n_bytes = _examined(subject, generator, length, settings)
    protocol = f"{settings.examples} test texts of {length} tokens; {_training(subject, exercise)}"
    yield _accuracy(outcome, at, protocol)
    yield _exact(outcome, at, protocol)
    yield Measurement(
        quantity="chance", value=generator.chance ** (1 / outcome.n_asked[0]), at=at, protocol="by count of the answers"
    )
    yield Measurement(quantity="state_bytes", value=n_bytes, at=at, protocol="one row, live state, after a text")


def _impossible(subject: Subject, generator: Generator, length: int) -> str:
    """Why texts of this length cannot be asked; "" when they can."""
    limit = subject.traits.context_limit
    if length < generator.shortest:
        return f"texts of this task have at least {generator.shortest} tokens"
    if limit is not None and length > limit:
        return f"needs {length} tokens of context; this model's limit is {limit}"
    return ""


def _training(subject: Subject, exercise: Exercise) -> str:
    """What the cell was trained on, and how far it got."""
    n_stages, last = len(exercise.stages), subject.history.last
    said = f"trained on texts of up to {exercise.context}"
    if last is None or "stage" not in last.parts:
        return f"{said}; no training log"
    # Parts are means since the log's previous point; a stage that began in between is not whole yet.
    return f"{said}, stage {int(last.parts['stage'])} of {n_stages} reached"


@torch.no_grad()
def _examined(subject: Subject, generator: Generator, length: int, settings: SkillSettings) -> tuple[Outcome, int]:
    """What was right in each text, and the bytes of the state after one."""
    rng = np.random.default_rng([subject.seed, length])
    examples = [generator.draw(length, "test", rng) for _ in range(settings.examples)]
    n_right = []
    for begin in range(0, len(examples), settings.batch):
        group = examples[begin : begin + settings.batch]
        tokens = torch.from_numpy(np.stack([example.tokens for example in group]))
        answers = torch.from_numpy(np.stack([example.answer for example in group]))
        n_right += _right(subject, tokens, answers).sum(dim=1).tolist()
    model, first = subject.model, torch.from_numpy(examples[0].tokens)[None]
    whole = first[:, : length - length % subject.traits.stride].to(model.device)
    n_bytes = state_bytes(model.prefill(whole, model.initial_state(1)))
    n_asked = np.array([example.answer.sum() for example in examples])
    return Outcome(n_asked, np.array(n_right)), n_bytes


def _right(subject: Subject, tokens: Int64[Tensor, "b t"], answers: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Which tokens of the answers are the likeliest ones."""
    model = subject.model
    assert isinstance(model, Likelihood), NO_LIKELIHOOD
    first = int(answers.any(dim=0).int().argmax())
    first -= first % subject.traits.stride
    tokens = tokens.to(model.device)
    state = model.prefill(tokens[:, :first], model.initial_state(len(tokens)))
    likeliest = [torch.zeros_like(tokens[:, :first])]
    step = max(1, MAX_LOG_PROBS // (len(tokens) * model.vocab_size))
    for piece in tokens[:, first:].split(step, dim=1):
        log_probs, state = model.score(piece, state)
        likeliest.append(log_probs.argmax(dim=-1))
    return (torch.cat(likeliest, dim=1) == tokens).cpu() & answers


def _accuracy(outcome: Outcome, at: Mapping[str, object], protocol: str) -> Measurement:
    value = float(outcome.n_right.sum() / outcome.n_asked.sum())
    interval = stats.wilson_interval(round(value * len(outcome.n_asked)), len(outcome.n_asked))
    return _share("accuracy", value, interval, outcome.n_right / outcome.n_asked, at, protocol)


def _exact(outcome: Outcome, at: Mapping[str, object], protocol: str) -> Measurement:
    right = outcome.n_right == outcome.n_asked
    interval = stats.wilson_interval(int(right.sum()), len(right))
    return _share("exact_match", float(right.mean()), interval, right.astype(float), at, protocol)


def _share(
    quantity: str,
    value: float,
    interval: stats.Interval,
    samples: Sequence[float] | np.ndarray,
    at: Mapping[str, object],
    protocol: str,
) -> Measurement:
    return Measurement(
        quantity=quantity,
        value=value,
        samples=list(map(float, samples)),
        low=interval.low,
        high=interval.high,
        confidence=interval.confidence,
        at=at,
        protocol=protocol,
    )


METRIC = SkillMetric()
