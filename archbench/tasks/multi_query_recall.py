"""Multi-query associative recall: many keys with a value each, then every key again, which asks for its value.

    A 4  B 3  C 6  F 1   .  .  C  6   .  .  F  1  A  4   .  .  .  .  B  3
    pairs                queries, their answers, and filler between them

All `pairs` must be held at once, so a state of constant size runs out of room as their number grows, whatever its
length; a cache of keys and values does not. Each key stands once among the pairs and is asked once. Queries come soon
after the pairs far more often than late: the distance follows a power law.

A model that knows which values a text holds, but not which belongs to which key, gets one in `pairs` right; chance is
1/`values`.

What is asked are the pairs as they are listed; a hash of them decides whether they are for training or for testing.

Source: Arora et al. 2023, Zoology, 2312.04927, section 3 and appendix. Departures: the model reads the answer after
each query (there: a random token); filler tokens are of their own kind, so that none can be taken for a key; values
are drawn with replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int64

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError
from archbench.task import Example, Split, SymbolGenerator, Task


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecallSettings:
    """`pairs` of one of `keys` kinds of keys and one of `values` kinds of values; `fillers` kinds of tokens stand
    between the queries. The weight of a query at the x-th place after the pairs is x^(power - 1)."""

    pairs: int = 8
    keys: int = 64
    values: int = 64
    fillers: int = 64
    power: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("pairs", 1), ("keys", self.pairs), ("values", 2), ("fillers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"multi_query_recall.{name}: {getattr(self, name)}; must be at least {least}")
        if not 0 < self.power <= 1:
            raise ConfigError(f"multi_query_recall.power: {self.power}; must lie in (0, 1]")


class MultiQueryRecall(SymbolGenerator):
    """Keys are the ids from 1 on, values and fillers follow."""

    def __init__(self, settings: MultiQueryRecallSettings, codec: Codec) -> None:
        self.settings = settings
        super().__init__(
            "multi_query_recall",
            codec,
            n_symbols=settings.keys + settings.values + settings.fillers,
            shortest=4 * settings.pairs,
            chance=float(settings.values) ** -settings.pairs,
        )

    def example(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        settings = self.settings
        pairs = self.question(split, lambda: self._pairs(rng))
        keys, values = pairs[0::2], pairs[1::2]
        fillers = rng.integers(settings.fillers, size=length) + 1 + settings.keys + settings.values
        tokens = np.concatenate([pairs, fillers[len(pairs) :]])
        places = np.arange(1, (length - len(pairs)) // 2 + 1)
        weights = places ** (settings.power - 1)
        chosen = rng.choice(places, size=settings.pairs, replace=False, p=weights / weights.sum())
        queries = len(pairs) + 2 * (chosen - 1)
        tokens[queries], tokens[queries + 1] = keys, values
        answer = np.zeros(length, dtype=bool)
        answer[queries + 1] = True
        return Example(tokens=tokens, answer=answer, idle=tokens > settings.keys + settings.values)

    def _pairs(self, rng: np.random.Generator) -> Int64[np.ndarray, " n"]:
        """Keys, all different, at even places and their values at odd ones."""
        settings = self.settings
        keys = rng.choice(settings.keys, size=settings.pairs, replace=False) + 1
        values = rng.integers(settings.values, size=settings.pairs) + 1 + settings.keys
        return np.stack([keys, values], axis=1).flatten()


class MultiQueryRecallTask(Task):
    name: ClassVar[str] = "multi_query_recall"
    summary: ClassVar[str] = "pairs of keys and values, then every key asks for its value (MQAR)"
    paper: ClassVar[str] = "Arora et al. 2023, Zoology, 2312.04927"
    settings: ClassVar[type[MultiQueryRecallSettings]] = MultiQueryRecallSettings

    def generator(self, settings: MultiQueryRecallSettings, codec: Codec, corpus: Corpus) -> MultiQueryRecall:
        del corpus
        return MultiQueryRecall(settings, codec)


TASK = MultiQueryRecallTask()
