"""Passkey retrieval: a number hidden in a long text of filler, asked for at the end.

    intro  filler ...  The pass key is 12345. Remember it. 12345 is the pass key.  filler ...  question  12345

The number has a fixed count of digits, leading zeros allowed, so chance is 10^-digits; the filler begins at a random
phase and is cut so that the text has an exact number of tokens. Pieces are encoded apart from each other and digits one
by one, so every codec asks for the same number of symbols. A hash of a number says whether it is kept for testing, so
that every digit stands at every place in both splits: were it the last digit, as seems simpler, models that learn which
digits are likely would fail for that alone.

Variants. `keys`: several needles, each of a word ("The pass key of apple is ..."), and the question names one.
`overwrite`: the key is stated twice with different numbers, and the later one counts. `decoys`: that share of the
filler's sentences state other numbers ("The zip code is 90721. Remember it."), so that finding digits is not enough;
`decoy_words` says whether their nouns are those of training or others. `filler`: the paper's sentences, words of the
corpus in random order, or letters drawn from the corpus by a Markov chain of order 3.

Source: Mohtashami & Jaggi 2023, 2305.16300, section 4.2 and its code; Munkhdalai et al. 2024, 2404.07143, section 4.2.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError
from archbench.task import Example, Generator, Split, Task, held_out

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there. "
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = " What is the pass key? The pass key is "
NAMED_QUESTION = " What is the pass key of {word}? The pass key of {word} is "
WORDS = (
    "apple", "river", "stone", "cloud", "tiger", "maple", "ocean", "candle", "silver", "garden", "rocket", "violin",
)  # fmt: skip
DECOYS = {
    "seen": ("zip code", "room number", "phone line", "ticket number", "bus number", "order number", "page number",
             "serial number", "lock code", "house number", "flight number", "account number"),
    "unseen": ("pin code", "locker number", "train number", "badge number", "invoice number", "street number"),
}  # fmt: skip

Tokens = Int64[np.ndarray, " _"]


@dataclass(frozen=True, kw_only=True)
class PasskeySettings:
    """`digits` of the key; in training, a share `far` of the needles lie at least `far_block` tokens before the end,
    where a local window does not reach; the others lie anywhere. `intro` False leaves the announcement out, so that a
    first stage can be short. The other fields choose a variant."""

    digits: int = 5
    intro: bool = True
    filler: Literal["grass", "words", "markov"] = "grass"
    decoys: float = 0.0
    decoy_words: Literal["seen", "unseen"] = "seen"
    keys: int = 1
    overwrite: bool = False
    far: float = 0.5
    far_block: int = 128

    def __post_init__(self) -> None:
        if not 2 <= self.digits <= 9:
            raise ConfigError(f"passkey.digits: {self.digits}; must lie between 2 and 9")
        if not 1 <= self.keys <= len(WORDS):
            raise ConfigError(f"passkey.keys: {self.keys}; must lie between 1 and {len(WORDS)}")
        if self.overwrite and self.keys > 1:
            raise ConfigError(f"passkey.overwrite: with keys {self.keys}; choose one of the two variants")
        for name in ("far", "decoys"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"passkey.{name}: {getattr(self, name)}; must lie between 0 and 1")
        if self.far_block < 1:
            raise ConfigError(f"passkey.far_block: {self.far_block}; must be at least 1")


class Parts(NamedTuple):
    """The pieces of one text but for the filler, in tokens. The needles stand in this order; needle number `asked`
    holds the answer."""

    intro: Tokens
    needles: tuple[Tokens, ...]
    question: Tokens
    answer: Tokens
    asked: int

    @property
    def fixed(self) -> int:
        """Tokens that are not filler."""
        return len(self.intro) + sum(map(len, self.needles)) + len(self.question) + len(self.answer)


class Filler(ABC):
    """Text in which nothing is hidden."""

    @abstractmethod
    def tokens(self, n: int, rng: np.random.Generator) -> Tokens:
        """n tokens from a random phase."""


class Passkey(Generator):
    """Draws texts, whole or in parts."""

    def __init__(self, settings: PasskeySettings, codec: Codec, corpus: Corpus) -> None:
        self.settings, self.codec = settings, codec
        self.filler = _filler(settings, codec, corpus)
        self.chance = 10.0**-settings.digits
        self.shortest = self._longest_fixed()

    @property
    def _n_needles(self) -> int:
        return 2 if self.settings.overwrite else self.settings.keys

    def parts(self, split: Split, rng: np.random.Generator) -> Parts:
        """A key, its needle or needles, and the question."""
        numbers = [self._number(split, rng) for _ in range(self._n_needles)]
        words = list(rng.permutation(WORDS)[: self.settings.keys])
        asked = 1 if self.settings.overwrite else int(rng.integers(self.settings.keys))
        return self._parts(numbers, words, asked)

    def draw(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        parts = self.parts(split, rng)
        room = length - parts.fixed
        if room < 0:
            raise ConfigError(f"passkey: a text of {length} tokens; these settings need at least {self.shortest}")
        after_last = len(parts.question) + len(parts.answer)
        latest = room
        if rng.random() < self.settings.far:
            latest = max(0, room + after_last - self.settings.far_block)
        places = np.sort(rng.integers(latest + 1, size=len(parts.needles)))
        return self.placed(parts, places.tolist(), self.filler.tokens(room, rng))

    def placed(self, parts: Parts, places: Sequence[int], filler: Tokens) -> Example:
        """The text whose needles stand before filler tokens `places`, in ascending order."""
        pieces, idle, begin = [parts.intro], [False], 0
        for needle, place in zip(parts.needles, places, strict=True):
            pieces += [filler[begin:place], needle]
            idle += [True, False]
            begin = place
        pieces += [filler[begin:], parts.question, parts.answer]
        idle += [True, False, False]
        lengths = [len(piece) for piece in pieces]
        answer = np.zeros(sum(lengths), dtype=bool)
        answer[len(answer) - len(parts.answer) :] = True
        return Example(tokens=np.concatenate(pieces), answer=answer, idle=np.repeat(idle, lengths))

    def around(self, parts: Parts, place: int, room: int, rng: np.random.Generator) -> tuple[Parts, list[int]]:
        """The needles in some order and their places among `room` filler tokens, the asked one at `place`: the others
        stand anywhere, but an overwritten number before the one that counts."""
        latest = place if self.settings.overwrite else room
        places = rng.integers(latest + 1, size=len(parts.needles))
        places[parts.asked] = place
        order = np.argsort(places, kind="stable")
        needles = tuple(parts.needles[i] for i in order)
        asked = int(np.flatnonzero(order == parts.asked)[0])
        return parts._replace(needles=needles, asked=asked), [int(places[i]) for i in order]

    def _number(self, split: Split, rng: np.random.Generator) -> str:
        while True:
            number = int(rng.integers(10**self.settings.digits))
            if held_out(np.array([self.settings.digits, number])) == (split == "test"):
                return f"{number:0{self.settings.digits}d}"

    def _parts(self, numbers: Sequence[str], words: Sequence[str], asked: int) -> Parts:
        names = list(words) if self.settings.keys > 1 else [""] * len(numbers)
        needles = tuple(self._needle(number, name) for number, name in zip(numbers, names, strict=True))
        return Parts(self._intro(), needles, self._question(names[asked]), self._digits(numbers[asked]), asked)

    def _longest_fixed(self) -> int:
        """Tokens that are not filler, at most: all texts have as many, but for names of different lengths."""
        names = WORDS if self.settings.keys > 1 else ("",)
        number = "0" * self.settings.digits
        needle = max(len(self._needle(number, name)) for name in names)
        question = max(len(self._question(name)) for name in names)
        return len(self._intro()) + self._n_needles * needle + question + len(self._digits(number))

    def _intro(self) -> Tokens:
        return self._encode(INTRO if self.settings.intro else "")

    def _needle(self, number: str, name: str) -> Tokens:
        of_name, key = f" of {name}" if name else "", self._digits(number)
        before, after = self._encode(f"The pass key{of_name} is "), self._encode(f" is the pass key{of_name}. ")
        return np.concatenate([before, key, self._encode(". Remember it. "), key, after])

    def _question(self, name: str) -> Tokens:
        return self._encode(NAMED_QUESTION.format(word=name) if name else QUESTION)

    def _digits(self, number: str) -> Tokens:
        return np.concatenate([self._encode(digit) for digit in number])

    def _encode(self, text: str) -> Tokens:
        return encoded(self.codec, text)


def encoded(codec: Codec, text: str) -> Tokens:
    return codec.encode(text.encode()).astype(np.int64)


class _Repeated(Filler):
    """One text over and over."""

    def __init__(self, tokens: Tokens) -> None:
        self.unit = tokens

    def tokens(self, n: int, rng: np.random.Generator) -> Tokens:
        phase = int(rng.integers(len(self.unit)))
        return np.resize(np.roll(self.unit, -phase), n)


class _Sentences(Filler):
    """Sentences in random order; a share of them state a number."""

    def __init__(self, plain: Sequence[Tokens], nouns: Sequence[Tokens], share: float, digits: Sequence[Tokens],
                 n_digits: int, end: Tokens) -> None:  # fmt: skip
        self.plain, self.nouns, self.share, self.digits = plain, nouns, share, digits
        self.n_digits, self.end = n_digits, end

    def tokens(self, n: int, rng: np.random.Generator) -> Tokens:
        mean = (1 - self.share) * np.mean([len(p) for p in self.plain]) + self.share * (
            np.mean([len(p) for p in self.nouns]) + self.n_digits + len(self.end)
        )
        pieces = [np.empty(0, dtype=np.int64)]
        total = 0
        phase = int(rng.integers(20))
        while total < n + phase:
            count = int((n + phase - total) / mean) + 8
            decoys = rng.random(count) < self.share
            plain, nouns = rng.integers(len(self.plain), size=count), rng.integers(len(self.nouns), size=count)
            numbers = rng.integers(10, size=(count, self.n_digits))
            for i in range(count):
                if decoys[i]:
                    pieces += [self.nouns[nouns[i]], *(self.digits[d] for d in numbers[i]), self.end]
                else:
                    pieces.append(self.plain[plain[i]])
            total = sum(map(len, pieces))
        return np.concatenate(pieces)[phase : phase + n]


class _Markov(Filler):
    """Characters of the corpus, each drawn by the three before it."""

    def __init__(self, followers: dict[str, str], codec: Codec) -> None:
        self.followers, self.codec = followers, codec

    def tokens(self, n: int, rng: np.random.Generator) -> Tokens:
        keys = list(self.followers)
        pieces = [np.empty(0, dtype=np.int64)]
        total = 0
        while total < n:
            text = keys[int(rng.integers(len(keys)))]
            letters = list(text)
            for draw in rng.random(4096):
                choices = self.followers.get(text)
                if not choices:
                    text = keys[int(draw * len(keys))]
                    continue
                letters.append(choices[int(draw * len(choices))])
                text = text[1:] + letters[-1]
            pieces.append(encoded(self.codec, "".join(letters) + " "))
            total += len(pieces[-1])
        return np.concatenate(pieces)[:n]


def _filler(settings: PasskeySettings, codec: Codec, corpus: Corpus) -> Filler:
    if settings.filler == "markov":
        if settings.decoys:
            raise ConfigError("passkey.decoys: not with filler 'markov'; choose 'grass' or 'words'")
        return _Markov(_followers(_letters(corpus)), codec)
    if settings.filler == "grass" and not settings.decoys:
        return _Repeated(encoded(codec, GRASS))
    if settings.filler == "grass":
        plain = [encoded(codec, sentence.strip() + ". ") for sentence in GRASS.strip().rstrip(".").split(". ")]
    else:
        words = sorted(set(re.findall(r"[a-z]{3,9}", _letters(corpus))))[:4000]
        if not words:
            raise ConfigError("passkey.filler: 'words', and the corpus has none; choose 'grass'")
        plain = [encoded(codec, word + " ") for word in words]
    return _Sentences(
        plain,
        [encoded(codec, f"The {noun} is ") for noun in DECOYS[settings.decoy_words]],
        settings.decoys,
        [encoded(codec, str(digit)) for digit in range(10)],
        settings.digits,
        encoded(codec, ". Remember it. "),
    )


def _letters(corpus: Corpus) -> str:
    """Lower-case prose of the corpus's training text, without digits."""
    text = b" ".join(document.text[:4000] for document in corpus.train[:60]).decode(errors="ignore").lower()
    return re.sub(r"[^a-z.,]+", " ", text)


@cache
def _followers(text: str) -> dict[str, str]:
    """For every three characters those that follow, as often as they do."""
    found: dict[str, list[str]] = {}
    for i in range(len(text) - 3):
        found.setdefault(text[i : i + 3], []).append(text[i + 3])
    return {key: "".join(letters) for key, letters in found.items()}


class PasskeyTask(Task):
    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "a number hidden in filler, asked for at the end"
    paper: ClassVar[str] = "Mohtashami & Jaggi 2023, Landmark Attention, 2305.16300"
    settings: ClassVar[type[PasskeySettings]] = PasskeySettings

    def generator(self, settings: PasskeySettings, codec: Codec, corpus: Corpus) -> Passkey:
        return Passkey(settings, codec, corpus)


TASK = PasskeyTask()
