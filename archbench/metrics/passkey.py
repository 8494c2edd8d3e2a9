"""Passkey retrieval over a grid of lengths and depths: a number hidden in filler and asked for at the end.

Depth is where the needle stands as a share of the filler before the question: 0 at the front, 1 just before the
question, where memory is not needed and attention over the last words suffices. An answer counts if every digit of it
is the most likely token after the right ones before it, which is when greedy writing would give it. Texts are the test
split's: their numbers are asked in no training. All models of a seed get the same texts, and one row has the same
number and filler at every depth and length, so that one pass serves them all (see `archbench.haystack`); with several
needles each text is read by itself.

The effective length is the largest at which, and at all shorter ones, the mean over depths is at least 0.85.

Longer texts are asked only while they fit the budgets. Time is projected from the longest length done, in proportion
to the FLOPs of reading; the state's size along the line through the two sizes last seen. What does not fit is a data
point: no exact match, the projected cost, and the reason. Seconds are CPU seconds on a CPU, where the metric may run in
company, and wall seconds elsewhere.

Sources: Mohtashami & Jaggi 2023, 2305.16300, section 4.2 (the task); Hsieh et al. 2024, 2404.06654, section 4 (the
threshold); Munkhdalai et al. 2024, 2404.07143, table 3, prints token accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch

from archbench.errors import ConfigError
from archbench.examination import Answers, Examination
from archbench.haystack import Reader
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import Traits
from archbench.parse import parse
from archbench.projection import Projection
from archbench.state import state_bytes
from archbench.stats import wilson_interval
from archbench.tasks.passkey import TASK, Passkey, PasskeySettings

EFFECTIVE = 0.85
HELD = 3
"""States of a group of rows alive at once: the pass, a kept branch, and the branch that is read on."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Texts of one kind, the same for all cells: the task's `settings`. Where they say nothing of `digits`, a cell that
    was trained on the task is asked for as many as it learned. `lengths` None means those of the metric."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises SuiteError for settings that the task does not know: before anything is trained."""
        parse(PasskeySettings, self.settings, f"metrics.passkey.variants.{self.name}.settings")


@dataclass(frozen=True, kw_only=True)
class PasskeyMetricSettings:
    """What is asked, and how far.

    Attributes:
        lengths: tokens of a text, question and answer included.
        samples: texts at each length and depth, as far as `token_budget` tokens a depth and `max_seconds` allow, but
            `least_samples`.
        batch: rows read at once.
        always, proceed: lengths above `always` are asked only if the mean exact match at the length before is at least
            `proceed`.
        max_seconds, max_state_bytes: what one length may cost; the bytes are of all states that are alive at once.
    """

    lengths: tuple[int, ...] = (512, 4096, 32_768)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
    samples: int = 20
    least_samples: int = 4
    token_budget: float = 2.0**20
    batch: int = 4
    always: int = 32_768
    proceed: float = 0.0
    max_seconds: float = 600.0
    max_state_bytes: float = 4e9
    variants: tuple[Variant, ...] = (Variant(name="plain"),)

    def __post_init__(self) -> None:
        for name in ("samples", "least_samples", "batch", "always"):
            if getattr(self, name) < 1:
                raise ConfigError(f"passkey.{name}: {getattr(self, name)}; must be at least 1")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"passkey.depths: {list(self.depths)}; needs numbers between 0 and 1")
        if not 0 <= self.proceed <= 1:
            raise ConfigError(f"passkey.proceed: {self.proceed}; must lie between 0 and 1")
        for name in ("token_budget", "max_seconds", "max_state_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"passkey.{name}: {getattr(self, name)}; must be above 0")
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"passkey.variants: {names}; needs at least one, each with a name of its own")
        for lengths in (self.lengths, *(v.lengths for v in self.variants if v.lengths is not None)):
            if not lengths or list(lengths) != sorted(set(lengths)):
                raise ConfigError(f"passkey.lengths: {list(lengths)}; needs lengths in ascending order")

    def samples_at(self, length: int) -> int:
        return min(self.samples, max(self.least_samples, int(self.token_budget // length)))


class PasskeyMetric(Metric):
    name = "passkey"
    version = 1
    settings = PasskeyMetricSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "exact_match": Quantity(unit="fraction", better="higher", meaning="answers with every digit right"),
        "token_accuracy": Quantity(unit="fraction", better="higher", meaning="digits that are right"),
        "effective_length": Quantity(
            unit="token", better="higher", meaning=f"largest length with exact match {EFFECTIVE} up to it, over depths"
        ),
        "chance": Quantity(unit="fraction", better="neither", meaning="exact match of guessing digits"),
        "stage": Quantity(unit="stage", better="higher", meaning="stage of the curriculum that training reached"),
        "seconds": Quantity(unit="s", better="lower", meaning="time that a length took, all depths and samples"),
        "projected_seconds": Quantity(unit="s", better="lower", meaning="the same, projected before it began"),
        "state_bytes": Quantity(unit="B", better="lower", meaning="memory held by the state of one row, at most"),
        "projected_state_bytes": Quantity(unit="B", better="lower", meaning="the same, projected before it began"),
        "tokens_read": Quantity(unit="token", better="lower", meaning="tokens read for a length, all rows"),
        "text_bytes": Quantity(unit="B", better="neither", meaning="raw bytes of a text of that length, mean"),
    }

    def cannot(self, traits: Traits, settings: Any) -> str | None:
        del settings
        if not traits.likelihood:
            return "this model gives no probabilities to tokens (it has no likelihood), so no digit of it can be judged"
        return None

    def measure(self, subject: Subject, settings: PasskeyMetricSettings) -> Iterator[Measurement]:
        """Raises ConfigError when the codec cannot say what the task needs, or a length is too short for a text."""
        trained = subject.exercise is not None and subject.exercise.name == TASK.name
        if trained:
            yield _stage(subject)
        for variant in settings.variants:
            own = subject.exercise.settings if trained and subject.exercise else {}
            learned = {name: own[name] for name in ("digits",) if name in own}
            where = f"metrics.passkey.variants.{variant.name}.settings"
            text = parse(PasskeySettings, {**learned, **variant.settings}, where)
            generator = TASK.generator(text, subject.codec, subject.corpus)
            at = {"variant": variant.name, "learned": "trained" if trained else "zero-shot"}
            lengths = settings.lengths if variant.lengths is None else variant.lengths
            yield from _Examined(subject, settings, generator, lengths, at).measurements()


class _Examined:
    """One variant of the texts, asked of one subject."""

    def __init__(
        self,
        subject: Subject,
        settings: PasskeyMetricSettings,
        generator: Passkey,
        lengths: tuple[int, ...],
        at: Mapping[str, Any],
    ) -> None:
        if lengths[0] < generator.shortest:
            raise ConfigError(
                f"passkey.lengths: {lengths[0]}; texts of variant {at['variant']} need at least {generator.shortest} "
                "tokens"
            )
        self.subject, self.settings, self.generator, self.lengths, self.at = subject, settings, generator, lengths, at
        self.model = cast(Reader, subject.model)
        self.examination = Examination(
            self.model,
            generator,
            lengths=lengths,
            depths=settings.depths,
            most_rows=settings.samples_at,
            batch=settings.batch,
            seed=subject.seed,
        )
        self.projection = Projection([self._size_after(n) for n in (lengths[0] // 2, lengths[0])])
        self.n_rows = settings.samples
        self.done: dict[int, Answers] = {}
        self.seconds: dict[int, float] = {}

    def measurements(self) -> Iterator[Measurement]:
        yield Measurement(quantity="chance", value=self.generator.chance, at=self.at)
        for length in self.lengths:
            refusal = self._beyond_limit(length)
            if refusal is None:
                self.n_rows = self._fitting(length)
                yield from self._projected(length)
                refusal = self._too_dear(length) or self._too_poor(length) or self._ask(length)
            if refusal is None:
                yield from self._results(length)
            else:
                yield from self._not_run(length, refusal)
        yield self._effective_length()

    @torch.inference_mode()
    def _ask(self, length: int) -> str | None:
        """Adds the answers of this length, or says why there are none."""
        begin = self._clock()
        try:
            answers = self.examination.ask(length, self.n_rows)
        except torch.OutOfMemoryError:
            return f"out of the device's memory at {length} tokens"
        self.done[length], self.seconds[length] = answers, self._clock() - begin
        self.projection.learn(length, self._work(length, self.n_rows), self.seconds[length], answers.row_bytes)
        return None

    def _results(self, length: int) -> Iterator[Measurement]:
        answers, protocol = self.done[length], self._protocol()
        for depth, right, exact in zip(self.settings.depths, answers.right, answers.exact, strict=True):
            n_right, n = int(exact.sum()), len(exact)
            bounds = wilson_interval(n_right, n)
            at = self._at(length, depth)
            yield Measurement(
                quantity="exact_match",
                value=n_right / n,
                samples=exact.float().tolist(),
                low=bounds.low,
                high=bounds.high,
                confidence=bounds.confidence,
                at=at,
                protocol=protocol,
            )
            each = right.float().mean(dim=1).tolist()
            yield Measurement(quantity="token_accuracy", value=sum(each) / n, samples=each, at=at, protocol=protocol)
        at = {**self.at, "length": length}
        yield Measurement(quantity="seconds", value=self.seconds[length], at=at, protocol=self._clock_name)
        yield Measurement(quantity="state_bytes", value=answers.row_bytes, at=at, protocol="one row, live state")
        yield Measurement(quantity="text_bytes", value=answers.text_bytes, at=at)
        apart = sum(len(exact) for exact in answers.exact) * length
        for way, n_read in (("shared", answers.n_read), ("apart", apart)):
            yield Measurement(quantity="tokens_read", value=n_read, at={**at, "way": way})

    def _not_run(self, length: int, reason: str) -> Iterator[Measurement]:
        for quantity in ("exact_match", "token_accuracy"):
            for depth in self.settings.depths:
                yield Measurement(quantity=quantity, value=None, at=self._at(length, depth), reason=reason)

    def _effective_length(self) -> Measurement:
        reached, short = 0, ""
        for length in self.lengths:
            if length not in self.done:
                short = f"; {length} tokens were not run"
                break
            if self.done[length].mean < EFFECTIVE:
                break
            reached = length
        protocol = f"exact match at least {EFFECTIVE} in the mean over depths, at this length and all shorter{short}"
        return Measurement(quantity="effective_length", value=reached, at=self.at, protocol=protocol)

    def _beyond_limit(self, length: int) -> str | None:
        limit = self.subject.traits.context_limit
        if limit is None or length <= limit:
            return None
        return f"needs {length} tokens of context; this model's limit is {limit}"

    def _too_poor(self, length: int) -> str | None:
        """Why a model that failed before is not asked again."""
        if length <= self.settings.always or not self.done:
            return None
        last = max(self.done)
        if (mean := self.done[last].mean) >= self.settings.proceed:
            return None
        return (
            f"failed before: exact match {mean:.2f} at {last} tokens; lengths above {self.settings.always} are asked "
            f"from {self.settings.proceed:g} on"
        )

    def _fitting(self, length: int) -> int:
        """How many rows of this length fit the budget of time, between the least and the most there can be."""
        settings, most = self.settings, min(self.n_rows, self.settings.samples_at(length))
        seconds, _ = self.projection.expected(length, self._work(length, most))
        if seconds is None or seconds <= settings.max_seconds:
            return most
        return max(min(most, settings.least_samples), int(most * settings.max_seconds / seconds))

    def _too_dear(self, length: int) -> str | None:
        """Why a length does not fit the budgets."""
        settings = self.settings
        seconds, row_bytes = self.projection.expected(length, self._work(length, self.n_rows))
        held = HELD * min(settings.batch, self.n_rows) * row_bytes
        if (seconds or 0.0) <= settings.max_seconds and held <= settings.max_state_bytes:
            return None
        time_needed = "" if seconds is None else f"{seconds:.3g} s and "
        return (
            f"beyond the budget: projected {time_needed}{held:.3g} bytes of states at {length} tokens; it is "
            f"{settings.max_seconds:.3g} s and {settings.max_state_bytes:.3g} bytes"
        )

    def _projected(self, length: int) -> Iterator[Measurement]:
        at, (before, last) = {**self.at, "length": length}, self.projection.basis
        seconds, row_bytes = self.projection.expected(length, self._work(length, self.n_rows))
        if seconds is not None:
            protocol = f"from {self.projection.longest} tokens, by the FLOPs of reading; {self._clock_name}"
            yield Measurement(quantity="projected_seconds", value=seconds, at=at, protocol=protocol)
        protocol = f"one row, on the line through {before} and {last} tokens"
        yield Measurement(quantity="projected_state_bytes", value=row_bytes, at=at, protocol=protocol)

    def _work(self, length: int, n_rows: int) -> float:
        """FLOPs of reading rows of a length: up to the last needle once, and from each needle to the end."""
        flops, examination = self.subject.model.flops(), self.examination
        whole = flops.prefill(length)
        row = whole * len(self.settings.depths)
        if not examination.several:
            before = [flops.prefill(max(1, examination.n_intro + place)) for place in examination.places(length)]
            row += max(before) - sum(before)
        return row * n_rows

    @torch.inference_mode()
    def _size_after(self, n: int) -> tuple[int, float]:
        tokens = torch.from_numpy(self.generator.filler.tokens(n, np.random.default_rng(0)))[None]
        return n, float(state_bytes(self.model.prefill(tokens.to(self.model.device), self.model.initial_state(1))))

    def _at(self, length: int, depth: float) -> dict[str, Any]:
        """`distance` are the tokens between needle and question; with several needles texts differ in it."""
        at = {**self.at, "length": length, "depth": depth}
        if self.examination.several:
            return at
        room = length - self.examination.fixed
        return {**at, "distance": room - round(depth * room)}

    def _protocol(self) -> str:
        usual, own = asdict(PasskeySettings()), asdict(self.generator.settings)
        told = [f"{name} {value}" for name, value in own.items() if value != usual[name]]
        way = "each text by itself" if self.examination.several else "one pass a row serves all depths and lengths"
        return (
            f"teacher-forced, equal to greedy writing; {', '.join(told) or 'default texts'}; {way}; "
            f"{_taught(self.subject)}"
        )

    def _clock(self) -> float:
        return time.process_time() if self.model.device.type == "cpu" else time.perf_counter()

    @property
    def _clock_name(self) -> str:
        return "CPU seconds" if self.model.device.type == "cpu" else "wall seconds"


def _stage(subject: Subject) -> Measurement:
    exercise, last = subject.exercise, subject.history.last
    assert exercise is not None
    at = {"of": len(exercise.stages)}
    if last is None or "stage" not in last.parts:
        return Measurement(quantity="stage", value=None, at=at, reason="the training log names no stage")
    # A point's parts are means over its steps: a stage begun between two points counts from the next one on.
    return Measurement(quantity="stage", value=int(last.parts["stage"]), at=at, protocol=_taught(subject))


def _taught(subject: Subject) -> str:
    """What the model was trained on, in words."""
    exercise = subject.exercise
    if exercise is None:
        return f"zero-shot: trained on the text of {subject.corpus.name} alone"
    windows = ", ".join(
        f"{stage.context}{f' (replay {stage.replay:g})' if stage.replay > 1 else ''}" for stage in exercise.stages
    )
    return f"trained on task {exercise.name} in windows of {windows} tokens"


METRIC = PasskeyMetric()
