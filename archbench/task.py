"""What a task is: a generator of texts that ask a question, with the answer marked.

A task trains (through a `curriculum`) and examines (through a metric); its training and test texts never share what is
asked. A file in `archbench/tasks` exports its instance as `TASK`; the file's name is the task's name.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Int64

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError

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


class SymbolGenerator(Generator):
    """Texts of plain symbols: the token ids 1 to `n_symbols`, whatever text a codec has them stand for."""

    def __init__(self, task: str, codec: Codec, *, n_symbols: int, shortest: int, chance: float) -> None:
        """Raises ConfigError when the codec has too few tokens."""
        if n_symbols >= codec.vocab_size:
            raise ConfigError(
                f"{task}: needs {n_symbols} symbols; codec {codec.name} has {codec.vocab_size - 1} beside the "
                "boundary; choose a larger codec or fewer symbols"
            )
        self.task, self.n_symbols, self.shortest, self.chance = task, n_symbols, shortest, chance

    def draw(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        if length < self.shortest:
            raise ConfigError(f"{self.task}: a text of {length} tokens; these settings need at least {self.shortest}")
        return self.example(length, split, rng)

    @abstractmethod
    def example(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        """A text of `length` tokens, which is at least `shortest`."""

    def question(self, split: Split, make: Callable[[], Int64[np.ndarray, " n"]]) -> Int64[np.ndarray, " n"]:
        """The first of the questions that `make` draws which belongs to the split.

        Raises ConfigError when none does: then there are too few different ones.
        """
        for _ in range(_MOST_DRAWS):
            asked = make()
            if held_out(asked) == (split == "test"):
                return asked
        raise ConfigError(f"{self.task}: these settings allow too few questions to keep some for testing; raise them")


HELD_OUT = 8
"""One question in so many is kept for testing."""
_MOST_DRAWS = 1000
"""A test question not found in so many draws does not exist: 7/8 to this power is 1e-58."""


def held_out(asked: Int64[np.ndarray, " n"]) -> bool:
    """Whether a question is kept for testing. A hash of it decides, so that nothing about a text tells which."""
    digest = hashlib.blake2b(np.ascontiguousarray(asked, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


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
