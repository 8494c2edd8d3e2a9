"""Selective copying: remember the items that stand among noise, and write them down in their order.

    . . c . a . . . d . a . .  |  c a d a

`items` tokens of `values` kinds, drawn with replacement, stand at random places among noise (one token); after the
marker they are written out. Where the items stand says nothing about what they are, so a model must choose by content
what it lets into its state: a model whose dynamics do not depend on its input cannot.

Departure: the paper has the model answer at so many markers in a row; here, as everywhere in archbench, a model reads
what it has written. Items repeat, so the one just written alone does not tell which comes next.

What is asked is the row of items; a hash of it decides whether it is for training or for testing. Chance is
1/`values` an item.

Source: Gu & Dao 2023, 2312.00752, sections 3.1 and 4.1.1 and appendix E.1 (length 4096, 16 items, 16 tokens in all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError
from archbench.task import Example, Split, SymbolGenerator, Task


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingSettings:
    """`items` to be copied, each of one of `values` kinds; noise and marker are two further tokens."""

    items: int = 16
    values: int = 14

    def __post_init__(self) -> None:
        if self.items < 1:
            raise ConfigError(f"selective_copying.items: {self.items}; must be at least 1")
        if self.values < 2:
            raise ConfigError(f"selective_copying.values: {self.values}; must be at least 2")


class SelectiveCopying(SymbolGenerator):
    """Items are the ids 1 to `values`; noise and marker follow."""

    def __init__(self, settings: SelectiveCopyingSettings, codec: Codec) -> None:
        self.items, self.values = settings.items, settings.values
        self.noise, self.marker = settings.values + 1, settings.values + 2
        super().__init__(
            "selective_copying",
            codec,
            n_symbols=self.marker,
            shortest=2 * settings.items + 1,
            chance=float(settings.values) ** -settings.items,
        )

    def example(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        items = self.question(split, lambda: rng.integers(1, self.values + 1, size=self.items))
        tokens = np.full(length, self.noise, dtype=np.int64)
        mixed = length - 1 - self.items
        tokens[np.sort(rng.choice(mixed, size=self.items, replace=False))] = items
        tokens[mixed] = self.marker
        tokens[mixed + 1 :] = items
        return Example(tokens=tokens, answer=np.arange(length) > mixed, idle=tokens == self.noise)


class SelectiveCopyingTask(Task):
    name: ClassVar[str] = "selective_copying"
    summary: ClassVar[str] = "items among noise, to be written out in their order"
    paper: ClassVar[str] = "Gu & Dao 2023, Mamba, 2312.00752"
    settings: ClassVar[type[SelectiveCopyingSettings]] = SelectiveCopyingSettings

    def generator(self, settings: SelectiveCopyingSettings, codec: Codec, corpus: Corpus) -> SelectiveCopying:
        del corpus
        return SelectiveCopying(settings, codec)


TASK = SelectiveCopyingTask()
