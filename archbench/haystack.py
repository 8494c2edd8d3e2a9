"""Asking for one needle at many lengths and depths without reading the same filler twice.

    intro  filler[:place]  needle  filler[place:room]  question  answer

A text of some length has `room` tokens of filler and its needle before filler token `place`. All texts of a row have
the same filler, so they share what comes before their needles: one pass reads it and leaves a copy of its state at
every place. From each copy a branch goes on over the needle and the rest of the filler; a branch whose place a longer
text has too goes on with that one. Lengths are asked in ascending order.

Letters: b rows, i intro, f filler, n needle, q question, a answer, t time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from archbench.state import State, copy_state, select_rows, state_bytes


@runtime_checkable
class Reader(Protocol):
    """What asking needs of a model: that it reads, and gives tokens probabilities."""

    @property
    def device(self) -> torch.device: ...

    def initial_state(self, batch_size: int) -> State: ...

    def prefill(self, tokens: Int64[Tensor, "b t"], state: State) -> State: ...

    def score(self, tokens: Int64[Tensor, "b t"], state: State) -> tuple[Float[Tensor, "b t v"], State]: ...


class Texts(NamedTuple):
    """Rows of pieces, one needle each; the filler is as long as the longest text needs."""

    intro: Int64[Tensor, "b i"]
    filler: Int64[Tensor, "b f"]
    needle: Int64[Tensor, "b n"]
    question: Int64[Tensor, "b q"]
    answer: Int64[Tensor, "b a"]

    def room(self, length: int) -> int:
        """Tokens of filler in a text of `length` tokens."""
        fixed = (self.intro, self.needle, self.question, self.answer)
        return length - sum(piece.shape[1] for piece in fixed)

    def first(self, n: int) -> Texts:
        """The first n rows."""
        return Texts(*(piece[:n] for piece in self))

    def at(self, length: int) -> Texts:
        """With the filler of texts of that length."""
        return self._replace(filler=self.filler[:, : self.room(length)])


class Branch(NamedTuple):
    """The state after `place` and so many tokens of filler."""

    state: State
    n_filler: int


class Walk:
    """The pass over some rows, and the branches that longer texts still need.

    `places` are those of the needles, for every length that may be asked. `n_read` counts tokens read, over all rows;
    `largest_state` is the largest state of one row seen at the last length asked, in bytes.
    """

    def __init__(self, model: Reader, texts: Texts, places: Mapping[int, Sequence[int]]) -> None:
        self.model, self.texts, self.places = model, texts, places
        self.trunk: Branch | None = None
        self.kept: dict[int, Branch] = {}
        self.n_read = 0
        self.largest_state = 0.0

    def right(self, length: int, n_rows: int) -> dict[int, Bool[Tensor, "b a"]]:
        """For every place of this length, which tokens of the answer are the most likely ones given those before.

        Only the first `n_rows` rows are asked, now and later. Lengths ascend from call to call.
        """
        self._narrow(n_rows)
        room, found, self.largest_state = self.texts.room(length), {}, 0.0
        wanted_later = {place for other, places in self.places.items() if other > length for place in places}
        for place in sorted(set(self.places[length])):
            branch = self._filled(self._branch(place), room)
            self.largest_state = max(self.largest_state, state_bytes(branch.state) / n_rows)
            state = branch.state
            if place in wanted_later:
                self.kept[place] = branch
                state = copy_state(state)
            found[place] = self._answered(state)
        return found

    def _narrow(self, n_rows: int) -> None:
        if n_rows == len(self.texts.intro):
            return
        self.texts = self.texts.first(n_rows)
        rows = torch.arange(n_rows, device=self.model.device)
        if self.trunk is not None:
            self.trunk = self.trunk._replace(state=select_rows(self.trunk.state, rows))
        self.kept = {
            place: branch._replace(state=select_rows(branch.state, rows)) for place, branch in self.kept.items()
        }

    def _branch(self, place: int) -> Branch:
        """The state just after the needle at `place`."""
        if place in self.kept:
            return self.kept.pop(place)
        if self.trunk is None or self.trunk.n_filler > place:  # the last place of a shorter text may lie further on
            start = self.model.initial_state(len(self.texts.intro))
            self.trunk = Branch(self._read(self.texts.intro, start), 0)
        self.trunk = self._filled(self.trunk, place)
        return Branch(self._read(self.texts.needle, copy_state(self.trunk.state)), place)

    def _filled(self, branch: Branch, n_filler: int) -> Branch:
        """Reads on until so many tokens of filler are read."""
        return Branch(self._read(self.texts.filler[:, branch.n_filler : n_filler], branch.state), n_filler)

    def _read(self, tokens: Int64[Tensor, "b t"], state: State) -> State:
        self.n_read += tokens.numel()
        return self.model.prefill(tokens.to(self.model.device), state)

    def _answered(self, state: State) -> Bool[Tensor, "b a"]:
        tokens = torch.cat([self.texts.question, self.texts.answer], dim=1)
        self.n_read += tokens.numel()
        return _right(self.model, tokens, self.texts.answer.shape[1], state)


def read_whole(model: Reader, tokens: Int64[Tensor, "b t"], n_answer: int) -> tuple[Bool[Tensor, "b a"], float]:
    """Which of the last `n_answer` tokens of whole texts are the most likely ones given those before, and the bytes of
    one row's state before them."""
    state = model.prefill(tokens[:, :-n_answer].to(model.device), model.initial_state(len(tokens)))
    row_bytes = state_bytes(state) / len(tokens)
    return _right(model, tokens[:, -n_answer:], n_answer, state), row_bytes


def _right(model: Reader, tokens: Int64[Tensor, "b t"], n_answer: int, state: State) -> Bool[Tensor, "b a"]:
    """Greedy writing gives the whole answer exactly where all are: by induction, each follows the right ones."""
    log_probs, _ = model.score(tokens.to(model.device), state)
    return log_probs[:, -n_answer:].argmax(dim=-1).cpu() == tokens[:, -n_answer:]
