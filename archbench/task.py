"""What a task is: a generator of texts that ask a question, with the answer marked.

A task trains (through a `curriculum`) and examines (through a metric); its training and test texts never share what is
asked. A file in `archbench/tasks` exports its instance as `TASK`; the file's name is the task's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Int64

from archbench.codec import Codec
from archbench.data.corpus import Corpus

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text, without the boundary that every model reads first.

    Attributes:
        answer: the tokens that are to be predicted; only they are learned and judged.
        idle: tokens that could be said again without changing what is asked or answered.
    """

    tokens: Int64[np.ndarray, " n"]
    answer: Bool[np.ndarray, " n"]
    idle: Bool[np.ndarray, " n"]


class Generator(ABC):
    """Draws texts of one task under settled settings.

    Attributes:
        shortest: least number of tokens that a text can have.
        chance: probability that guessing among all possible answers is right in every token.
    """

    shortest: int
    chance: float

    @abstractmethod
    def draw(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        """A text of exactly `length` tokens. Raises ConfigError when it would be shorter than `shortest`."""


class Task(ABC):
    """A kind of question."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    settings: ClassVar[type[Any]]
    """A frozen keyword-only dataclass: what a suite may set."""

    @abstractmethod
    def generator(self, settings: Any, codec: Codec, corpus: Corpus) -> Generator:
        """Raises ConfigError when the codec cannot say what the task needs."""
