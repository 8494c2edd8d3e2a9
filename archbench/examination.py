"""Asking a model for hidden numbers: texts are drawn row by row, and rows are read in groups.

Texts with one needle share their filler over all depths and lengths, and are read by a `haystack.Walk`. Texts with
several are built whole and read each by itself, since where the others stand differs from text to text.

Letters: b rows, a answer, t time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from archbench.haystack import Reader, Texts, Walk, read_whole
from archbench.tasks.passkey import Parts, Passkey


class Answers(NamedTuple):
    """What one length gave.

    Attributes:
        right: for each depth and row, which digits are right.
        row_bytes: the largest state of one row.
        n_read: tokens read, over all rows.
        text_bytes: mean size of a text, in bytes of raw text.
    """

    right: list[Bool[Tensor, "b a"]]
    row_bytes: float
    n_read: int
    text_bytes: float

    @property
    def exact(self) -> list[Bool[Tensor, " b"]]:
        """For each depth, which rows have every digit right."""
        return [right.all(dim=1) for right in self.right]

    @property
    def mean(self) -> float:
        """Exact match, the mean over depths."""
        return float(torch.stack(self.exact).float().mean())


class Examination:
    """Texts of one generator asked of one model, lengths in ascending order.

    `most_rows` says how many rows a length can have, and never grows with the length; `batch` of them are read at once.
    Rows depend on `seed` and their number alone.
    """

    def __init__(
        self,
        model: Reader,
        generator: Passkey,
        *,
        lengths: Sequence[int],
        depths: Sequence[float],
        most_rows: Callable[[int], int],
        batch: int,
        seed: int,
    ) -> None:
        self.model, self.generator, self.seed = model, generator, seed
        self.lengths, self.depths, self.most_rows, self.batch = lengths, depths, most_rows, batch
        self.token_bytes = generator.codec.token_bytes()
        first = self._parts(0)[0]
        self.n_intro, self.fixed, self.several = len(first.intro), first.fixed, len(first.needles) > 1
        self.walks: dict[int, Walk] = {}

    def places(self, length: int) -> list[int]:
        """Tokens of filler before the needle at each depth. (With `several`, texts differ in how many there are.)"""
        assert not self.several
        return [round(depth * (length - self.fixed)) for depth in self.depths]

    def ask(self, length: int, n_rows: int) -> Answers:
        """The first rows at every depth; of no length more than of a shorter one."""
        ask = self._ask_apart if self.several else self._ask_walking
        groups = []
        for begin in range(0, n_rows, self.batch):
            groups.append(ask(length, range(begin, min(begin + self.batch, n_rows))))
        longer = [other for other in self.lengths if other > length]
        self.walks = {  # the others' states are not needed any more
            begin: walk
            for begin, walk in self.walks.items()
            if begin < n_rows and any(begin < self.most_rows(other) for other in longer)
        }
        return Answers(
            right=[torch.cat(rows) for rows in zip(*(group.right for group in groups), strict=True)],
            row_bytes=max(group.row_bytes for group in groups),
            n_read=sum(group.n_read for group in groups),
            text_bytes=float(np.average([g.text_bytes for g in groups], weights=[len(g.right[0]) for g in groups])),
        )

    def _parts(self, row: int) -> tuple[Parts, np.random.Generator]:
        rng = np.random.default_rng([self.seed, row])
        return self.generator.parts("test", rng), rng

    def _ask_walking(self, length: int, rows: range) -> Answers:
        if rows.start not in self.walks:
            self.walks[rows.start] = self._walk(rows)
        walk = self.walks[rows.start]
        read_before = walk.n_read
        right = walk.right(length, len(rows))
        n_bytes = sum(float(self.token_bytes[tokens].sum()) for tokens in walk.texts.at(length))
        return Answers(
            right=[right[place] for place in self.places(length)],
            row_bytes=walk.largest_state,
            n_read=walk.n_read - read_before,
            text_bytes=n_bytes / len(rows),
        )

    def _walk(self, rows: range) -> Walk:
        lengths = [length for length in self.lengths if rows.start < self.most_rows(length)]
        pieces = []
        for row in rows:
            parts, rng = self._parts(row)
            filler = self.generator.filler.tokens(max(lengths) - self.fixed, rng)
            pieces.append((parts.intro, filler, parts.needles[0], parts.question, parts.answer))
        texts = Texts(*(torch.from_numpy(np.stack(piece)) for piece in zip(*pieces, strict=True)))
        return Walk(self.model, texts, {length: self.places(length) for length in lengths})

    def _ask_apart(self, length: int, rows: range) -> Answers:
        found, row_bytes, n_bytes = [], 0.0, 0.0
        for depth in self.depths:
            tokens, n_answer = self._whole_texts(length, rows, depth)
            right, size = read_whole(self.model, tokens, n_answer)
            found.append(right)
            row_bytes = max(row_bytes, size)
            n_bytes += float(self.token_bytes[tokens].sum())
        n_texts = len(rows) * len(self.depths)
        return Answers(found, row_bytes, n_texts * length, n_bytes / n_texts)

    def _whole_texts(self, length: int, rows: range, depth: float) -> tuple[Int64[Tensor, "b t"], int]:
        """One text a row, and how many tokens answer it."""
        texts, n_answer = [], 0
        for row in rows:
            parts, rng = self._parts(row)
            room = length - parts.fixed
            filler = self.generator.filler.tokens(room, rng)
            parts, places = self.generator.around(parts, round(depth * room), room, rng)
            texts.append(self.generator.placed(parts, places, filler).tokens)
            n_answer = len(parts.answer)
        return torch.from_numpy(np.stack(texts)), n_answer
