"""Induction heads: what followed the trigger the first time follows it again.

    f b a ! d a c e ... b !  |  d

One trigger stands at a random place of a text of random symbols, and again at its end; the answer is the symbol that
came after the first one. One association, over any distance: attention that looks back at equal prefixes solves it (an
induction head), and a recurrence by storing one symbol and ignoring all others.

What is asked is the whole text before the answer; a hash of it decides whether it is for training or for testing.
Chance is 1 / (`symbols` - 1).

Source: Gu & Dao 2023, 2312.00752, section 4.1.2 and appendix E.1 (16 symbols with the trigger; trained at length 256,
tested from 64 to 1,048,576); Olsson et al. 2022, 2209.11895.
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
class InductionHeadsSettings:
    """`symbols` in all, the trigger among them."""

    symbols: int = 16

    def __post_init__(self) -> None:
        if self.symbols < 3:
            raise ConfigError(
                f"induction_heads.symbols: {self.symbols}; must be at least 3, the trigger and two others"
            )


class InductionHeads(SymbolGenerator):
    """Ordinary symbols are the ids 1 to `symbols` - 1; the trigger is the last."""

    def __init__(self, settings: InductionHeadsSettings, codec: Codec) -> None:
        self.trigger = settings.symbols
        super().__init__(
            "induction_heads", codec, n_symbols=settings.symbols, shortest=4, chance=1 / (settings.symbols - 1)
        )

    def example(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        context = self.question(split, lambda: self._context(length - 1, rng))
        first = int(np.argmax(context == self.trigger))
        tokens = np.append(context, context[first + 1])
        idle = np.ones(length, dtype=bool)
        idle[[first, first + 1, length - 2, length - 1]] = False
        return Example(tokens=tokens, answer=np.arange(length) == length - 1, idle=idle)

    def _context(self, n: int, rng: np.random.Generator) -> Int64[np.ndarray, " n"]:
        context = rng.integers(1, self.trigger, size=n)
        context[rng.integers(n - 2)] = self.trigger  # at least one symbol stands between the two
        context[-1] = self.trigger
        return context


class InductionHeadsTask(Task):
    name: ClassVar[str] = "induction_heads"
    summary: ClassVar[str] = "what followed the trigger follows it again"
    paper: ClassVar[str] = "Gu & Dao 2023, Mamba, 2312.00752"
    settings: ClassVar[type[InductionHeadsSettings]] = InductionHeadsSettings

    def generator(self, settings: InductionHeadsSettings, codec: Codec, corpus: Corpus) -> InductionHeads:
        del corpus
        return InductionHeads(settings, codec)


TASK = InductionHeadsTask()
