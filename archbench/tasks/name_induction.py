"""Induction on names of two tokens: whoever was introduced as F s is meant again wherever F stands.

    old T ro likes rain . we saw B ky there . then T [ro] sang . B [ky] and ro came . ...

A story is made of sentences from a fixed stock; some have a name in them. First each of its `characters` is introduced,
then `mentions` more follow, of any of them; between the sentences runs filler, sentences without a name, cut so that
the text has an exact number of tokens. A name is a token of its own kind and a word like any other. Asked is the second
token of each later mention.

Were second tokens of their own kind too, a model would soon know which ones a story has, and learn for long no more
than to guess among them; so many words stand in a story that this helps little.

First and second tokens of test stories' names are never together in training: one pair in eight, chosen by a hash, is
kept for testing, and test stories have no other names. With probability `p_rare` a training name is any of the other
pairs, drawn uniformly; otherwise one of 64 that are always the same (a Zipf law over them), which a model may rather
learn by heart than look up. Chance is 1/`words` a mention.

Source: Gloeckle et al. 2024, 2404.19737, section 4.1, where stories for children get names of two tokens, and the loss
is over all their tokens. Departures: the sentences are made of random words, and only answers are learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from jaxtyping import Int64

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError
from archbench.task import Example, Split, SymbolGenerator, Task, held_out

N_SENTENCES = 120
N_COMMON = 64
"""Names that come back in training where `p_rare` is below one."""
STOCK_SEED = 2404_19737


@dataclass(frozen=True, kw_only=True)
class NameInductionSettings:
    """How many kinds there are of `words` and of `firsts`, the first tokens of names; `characters` of a story and how
    often one is mentioned again; `p_rare` is the share of training names that are drawn afresh. Sentences have from the
    first to the second of `words_per_sentence`, without a name and their end."""

    words: int = 64
    firsts: int = 64
    characters: int = 4
    mentions: int = 8
    p_rare: float = 1.0
    words_per_sentence: tuple[int, int] = (3, 7)

    def __post_init__(self) -> None:
        least = {"words": 2, "firsts": self.characters, "characters": 1, "mentions": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"name_induction.{name}: {getattr(self, name)}; must be at least {bound}")
        if not 0 <= self.p_rare <= 1:
            raise ConfigError(f"name_induction.p_rare: {self.p_rare}; must lie between 0 and 1")
        fewest, most = self.words_per_sentence
        if not 0 <= fewest <= most:
            raise ConfigError(
                f"name_induction.words_per_sentence: {[fewest, most]}; needs two numbers from 0 up, the smaller first"
            )


class Sentence:
    """Words of a fixed sentence; a name stands before word `slot`, if there is one."""

    def __init__(self, words: Int64[np.ndarray, " n"], slot: int, end: int) -> None:
        self.before, self.after = words[:slot], np.append(words[slot:], end)

    def about(self, name: Int64[np.ndarray, " 2"] | None) -> Int64[np.ndarray, " n"]:
        parts = [self.before, self.after] if name is None else [self.before, name, self.after]
        return np.concatenate(parts)


class NameInduction(SymbolGenerator):
    """Ids: first tokens of names, words, and the end of a sentence."""

    def __init__(self, settings: NameInductionSettings, codec: Codec) -> None:
        self.settings = settings
        self.end = settings.firsts + settings.words + 1
        super().__init__(
            "name_induction",
            codec,
            n_symbols=self.end,
            shortest=(settings.characters + settings.mentions) * (settings.words_per_sentence[1] + 3),
            chance=float(settings.words) ** -settings.mentions,
        )
        self.stock = self._stock()
        self.names = {"train": _names(settings, "train"), "test": _names(settings, "test")}
        if len(set(self.names["test"][:, 0])) < settings.characters:
            raise ConfigError(
                f"name_induction.firsts: {settings.firsts} with {settings.words} words leave too few names for "
                f"testing {settings.characters} characters; raise them"
            )
        self.common = np.random.default_rng([STOCK_SEED, 1]).permutation(self.names["train"])[:N_COMMON]

    def example(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        settings = self.settings
        names = self._characters(split, rng)
        who = np.concatenate([np.arange(len(names)), rng.integers(len(names), size=settings.mentions)])
        told = [
            self.stock[i].about(names[w]) for i, w in zip(rng.integers(N_SENTENCES, size=len(who)), who, strict=True)
        ]
        room = length - sum(map(len, told))
        filler = self._filler(room, rng)
        pieces, idle, begin = [], [], 0
        for place, sentence in zip(np.sort(rng.integers(room + 1, size=len(told))), told, strict=True):
            pieces += [filler[begin:place], sentence]
            idle += [True, False]
            begin = place
        tokens = np.concatenate([*pieces, filler[begin:]])
        idle_at = np.repeat([*idle, True], [*map(len, pieces), len(filler) - begin])
        second = np.append(False, tokens[:-1] <= settings.firsts)
        return Example(tokens=tokens, answer=second & (np.cumsum(second) > len(names)), idle=idle_at)

    def _characters(self, split: Split, rng: np.random.Generator) -> Int64[np.ndarray, "c 2"]:
        """Names with different first tokens."""
        while True:
            found = np.stack([self._name(split, rng) for _ in range(self.settings.characters)])
            if len(set(found[:, 0])) == len(found):
                return found

    def _name(self, split: Split, rng: np.random.Generator) -> Int64[np.ndarray, " 2"]:
        if split == "test" or rng.random() < self.settings.p_rare:
            return self.names[split][rng.integers(len(self.names[split]))]
        weights = 1 / np.arange(1, len(self.common) + 1)
        return self.common[rng.choice(len(self.common), p=weights / weights.sum())]

    def _filler(self, n: int, rng: np.random.Generator) -> Int64[np.ndarray, " n"]:
        shortest = self.settings.words_per_sentence[0] + 1
        drawn = rng.integers(N_SENTENCES, size=n // shortest + 2)
        text = np.concatenate([self.stock[i].about(None) for i in drawn])
        phase = int(rng.integers(shortest))
        return text[phase : phase + n]

    def _stock(self) -> list[Sentence]:
        rng = np.random.default_rng([STOCK_SEED, 0])
        first_word = self.settings.firsts + 1
        stock = []
        for _ in range(N_SENTENCES):
            n = int(rng.integers(self.settings.words_per_sentence[0], self.settings.words_per_sentence[1] + 1))
            words = rng.integers(self.settings.words, size=n) + first_word
            stock.append(Sentence(words, int(rng.integers(n + 1)), self.end))
        return stock


@cache
def _names(settings: NameInductionSettings, split: Split) -> Int64[np.ndarray, "n 2"]:
    """All pairs of a first and a second token that belong to the split."""
    firsts, words = np.arange(settings.firsts) + 1, np.arange(settings.words) + 1 + settings.firsts
    pairs = np.stack(np.meshgrid(firsts, words, indexing="ij"), axis=-1).reshape(-1, 2)
    kept = np.array([held_out(pair) for pair in pairs])
    return pairs[kept if split == "test" else ~kept]


class NameInductionTask(Task):
    name: ClassVar[str] = "name_induction"
    summary: ClassVar[str] = "the second token of a name, once its bearer was introduced"
    paper: ClassVar[str] = (
        "Gloeckle et al. 2024, Better & faster large language models via multi-token prediction, 2404.19737"
    )
    settings: ClassVar[type[NameInductionSettings]] = NameInductionSettings

    def generator(self, settings: NameInductionSettings, codec: Codec, corpus: Corpus) -> NameInduction:
        del corpus
        return NameInduction(settings, codec)


TASK = NameInductionTask()
