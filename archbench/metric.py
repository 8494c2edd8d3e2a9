"""What a metric is: a named question to a model, answered by raw samples with units.

There are three kinds. A `Metric` measures one trained subject by itself; several subjects may be measured at once, in
parallel processes. A `TimedMetric` offers probes, each of which takes one sample; the runner holds the machine alone
and interleaves the probes of all subjects at equal coordinates, so that a drift of the machine touches all of them
alike and the samples of two subjects form pairs. A `DesignMetric` needs no weights, only what a cell asks for: a cell
that is asked nothing else is never trained, and may be too large to be.

A metric file exports its instance as `METRIC`; the file's name is the metric's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.exercise import Exercise
from archbench.history import History
from archbench.model import SequenceModel, Traits
from archbench.record import Better


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What a number means: its unit, which direction is better, and one line for people."""

    unit: str
    better: Better
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One value of one quantity at the coordinates `at`, with the samples behind it.

    `reason` is set, and `value` None, where the quantity does not exist or cannot be given honestly.
    """

    quantity: str
    value: float | None
    samples: Sequence[float] = ()
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    at: Mapping[str, Any] = field(default_factory=dict)
    along: Mapping[str, Sequence[float]] = field(default_factory=dict)
    protocol: str = ""
    reason: str = ""
    backend: Mapping[str, str] = field(default_factory=dict)
    """The level each operation ran at, where it was looked at for this value alone."""


class Companion(NamedTuple):
    """Another trained cell that a metric needs, on the same device."""

    model: SequenceModel
    codec: Codec


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained cell, as metrics see it. The model is in eval mode on the device it will be measured on.

    `context` and `batch` are those of its training windows, in tokens and rows; `folder` is its checkpoint's folder;
    `seed` seeds every draw a metric makes; `exercise` is the task it was trained on, None for the corpus's text;
    `beside` are the other cells that a timed metric asked for, by label.
    """

    label: str
    architecture: str
    config: Any
    model: SequenceModel
    traits: Traits
    codec: Codec
    corpus: Corpus
    history: History
    context: int
    batch: int
    seed: int
    folder: Path
    exercise: Exercise | None = None
    beside: Mapping[str, Companion] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Design:
    """A cell as it is asked for, trained or not. `context` and `batch` are those of its training windows, in tokens and
    rows; `tokens` is its training budget, None where that is given in another unit."""

    label: str
    architecture: str
    config: Any
    traits: Traits
    context: int
    batch: int
    tokens: float | None


class _Described(ABC):
    name: ClassVar[str]
    version: ClassVar[int]
    """Raised whenever the meaning of a number changes; records of unequal versions are not comparable."""
    settings: ClassVar[type[Any]]
    """A frozen keyword-only dataclass: what a suite may set."""
    quantities: ClassVar[Mapping[str, Quantity]]
    timed: ClassVar[bool]
    trained: ClassVar[bool] = True
    """Whether it measures trained weights."""

    def cannot(self, traits: Traits, settings: Any) -> str | None:
        """Why this metric does not exist for a model with these traits; None when it does."""
        del traits, settings
        return None


class Metric(_Described):
    """A metric of one subject that does not mind company on the machine."""

    timed = False

    @abstractmethod
    def measure(self, subject: Subject, settings: Any) -> Iterator[Measurement]:
        """Yields measurements of the declared quantities."""


class DesignMetric(_Described):
    """A metric of what a cell asks for. It does not mind company on the machine."""

    timed = False
    trained = False

    @abstractmethod
    def measure(self, design: Design, settings: Any) -> Iterator[Measurement]:
        """Yields measurements of the declared quantities."""


class Sample(NamedTuple):
    """One number in its quantity's unit; `at` adds coordinates to the probe's (which clock, say)."""

    quantity: str
    value: float
    at: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Takes one sample of each of its quantities per call. `at` says where on the grid; probes of different subjects
    at the same place are interleaved."""

    at: Mapping[str, Any]
    sample: Callable[[], Sequence[Sample]]
    protocol: str = ""


class TimedMetric(_Described):
    """A metric that needs the machine to itself.

    `settings` has a field `repeats`: the number of samples taken from each probe, after one warm-up that is thrown
    away.
    """

    timed = True

    def beside(self, settings: Any) -> Sequence[str]:
        """Labels of other cells of the run that are needed, of the same seed; they are not measured themselves."""
        del settings
        return ()

    @abstractmethod
    def probes(self, subject: Subject, settings: Any) -> list[Probe | Measurement]:
        """The probes of one subject; a Measurement stands where a point of the grid cannot be measured, with the
        reason."""
