"""Writing text: decode steps until there are enough tokens, and a stream of text with stop strings.

A step may write several tokens and rows may differ in how many (drafts accepted, patches of K). What is written beyond
the number asked for is cut off.

Letters: b batch, t time, k tokens of one step.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor

from archbench.model import BOUNDARY, Emission
from archbench.sampling import Sampling
from archbench.state import State, select_rows


@runtime_checkable
class Writer(Protocol):
    """What writing needs of a model: its two verbs, and several steps at once. Every `SequenceModel` is one; so is a
    model with a drafter."""

    @property
    def device(self) -> torch.device: ...

    def initial_state(self, batch_size: int) -> State: ...

    def prefill(self, tokens: Int[Tensor, "b t"], state: State) -> State: ...

    def decode_step(self, state: State, sampling: Sampling, generator: Generator | None) -> Emission: ...

    def decode_steps(self, state: State, n: int, sampling: Sampling, generator: Generator | None) -> Emission: ...


def generate(
    model: Writer,
    tokens: Int[Tensor, "b t"],
    n_new: int,
    sampling: Sampling,
    generator: Generator | None = None,
) -> Int[Tensor, "b n_new"]:
    """The `n_new` tokens that follow each prompt. A model with a stride needs prompts of whole strides: `aligned`.

    Raises:
        ContextOverflow: prompt and continuation exceed the model's context limit.
    """
    with torch.no_grad():
        state = model.prefill(tokens, model.initial_state(len(tokens)))
        return continue_from(model, state, len(tokens), n_new, sampling, generator)


@torch.no_grad()
def continue_from(
    model: Writer,
    state: State,
    batch_size: int,
    n_new: int,
    sampling: Sampling,
    generator: Generator | None = None,
) -> Int[Tensor, "b n_new"]:
    """The `n_new` tokens that follow each of the `batch_size` rows of `state`. Gives up `state`."""
    steps, n = [torch.full((batch_size, 0), BOUNDARY, dtype=torch.long, device=model.device)], 0
    while n < n_new:
        emission = model.decode_steps(state, n_new - n, sampling, generator)
        tokens, counts, state = emission
        width = tokens.shape[1]
        if width > 1:  # rows may have written different numbers of tokens
            if batch_size > 1:
                steps.append(_apart(model, emission, n_new - n, sampling, generator))
                break
            width = int(counts)
            tokens = tokens[:, :width]
        steps.append(tokens)
        n += width
    return torch.cat(steps, dim=1)[:, :n_new]


def _apart(
    model: Writer, emission: Emission, n_new: int, sampling: Sampling, generator: Generator | None
) -> Int[Tensor, "b n_new"]:
    """The `n_new` tokens of each row from a first step on, where rows need not keep in step."""
    tokens, counts, state = emission
    rows = torch.arange(len(tokens), device=tokens.device)
    written = torch.zeros_like(rows)
    out = torch.full((len(rows), n_new), BOUNDARY, dtype=torch.long, device=tokens.device)
    while True:
        offset = torch.arange(tokens.shape[1], device=out.device)
        place = written[rows, None] + offset
        row, column = ((offset < counts[:, None]) & (place < n_new)).nonzero(as_tuple=True)
        out[rows[row], place[row, column]] = tokens[row, column]
        written[rows] += counts
        going = written[rows] < n_new
        if not going.any():
            return out
        if not going.all():  # a row that is done must not run into the context limit while others catch up
            rows, state = rows[going], select_rows(state, going.nonzero().squeeze(1))
        tokens, counts, state = model.decode_step(state, sampling, generator)


def aligned(tokens: Int[Tensor, "b t"], stride: int) -> Int[Tensor, "b T"]:
    """The prompt with boundaries in front, up to a multiple of `stride`: a text begins after a boundary anyway."""
    missing = -tokens.shape[1] % stride
    return torch.cat([tokens.new_full((len(tokens), missing), BOUNDARY), tokens], dim=1)


def stream(
    model: Writer,
    tokens: Int[Tensor, "1 t"],
    n_new: int,
    sampling: Sampling,
    generator: Generator | None,
    decode: Callable[[np.ndarray], bytes],
    stop: Sequence[str] = (),
    stop_tokens: Collection[int] = (),
) -> Iterator[str]:
    """The continuation of one prompt as text, piece by piece, each as soon as it is certain.

    It ends after `n_new` tokens, before a token of `stop_tokens`, or before a string of `stop`. `decode` is a codec's:
    ids to bytes, such that joined ids give joined bytes.
    """
    text = TextStream(stop)
    with torch.no_grad():
        state = model.prefill(tokens, model.initial_state(1))
    left = n_new
    while left > 0 and not text.stopped:
        with torch.no_grad():  # never across a yield: the switch belongs to the thread, not to this iterator
            emitted, counts, state = model.decode_step(state, sampling, generator)
        ids = emitted[0, : min(left, int(counts[0]))].tolist()
        end = next((place for place, id in enumerate(ids) if id in stop_tokens), None)
        left = 0 if end is not None else left - len(ids)
        piece = text.feed(decode(np.array(ids[:end], dtype=np.int64)))
        if piece:
            yield piece
    rest = text.close()
    if rest:
        yield rest


@torch.no_grad()
def write_until(
    model: Writer,
    state: State,
    batch_size: int,
    n_new: int,
    sampling: Sampling,
    generator: Generator | None,
    decode: Callable[[np.ndarray], bytes],
    stop: Sequence[str] = (),
    stop_tokens: Collection[int] = (),
) -> list[str]:
    """The text that each of the `batch_size` rows of `state` writes: of `n_new` tokens, or up to a token of
    `stop_tokens` or a string of `stop`. What `stream` gives, rows at a time. Gives up `state`.

    Rows that are done leave the batch, so that they neither cost time nor run into the context limit.
    """
    texts = [TextStream(stop) for _ in range(batch_size)]
    written, left = [""] * batch_size, [n_new] * batch_size
    rows = list(range(batch_size)) if n_new > 0 else []
    while rows:
        emitted, counts, state = model.decode_step(state, sampling, generator)
        going = []
        for place, (row, ids, count) in enumerate(zip(rows, emitted.tolist(), counts.tolist(), strict=True)):
            ids = ids[: min(left[row], count)]
            end = next((place for place, id in enumerate(ids) if id in stop_tokens), None)
            left[row] = 0 if end is not None else left[row] - len(ids)
            written[row] += texts[row].feed(decode(np.array(ids[:end], dtype=np.int64)))
            if left[row] and not texts[row].stopped:
                going.append(place)
        if going and len(going) < len(rows):
            state = select_rows(state, torch.tensor(going, device=emitted.device))
        rows = [rows[place] for place in going]
    return [begun + text.close() for begun, text in zip(written, texts, strict=True)]


class TextStream:
    """Bytes in, text out, at once but never more than is certain.

    Held back are an unfinished UTF-8 character and any ending that may become a stop string. The text ends before the
    stop string that is complete first (of several complete at once, the longest). Bytes that are no UTF-8 become
    U+FFFD. How the bytes were cut into pieces makes no difference.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        assert all(stop), "an empty stop string would stop before the first byte"
        self._stops = [string.encode() for string in stop]
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """The text that has become certain. After a stop string: nothing more."""
        if self.stopped:
            return ""
        self._held += piece
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            sure = min(found)[1]
        else:
            sure = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[:sure], self._held[sure:]
        return self._decoder.decode(certain)

    def close(self) -> str:
        """What was held back, now that nothing follows: an unfinished character becomes U+FFFD."""
        rest = b"" if self.stopped else self._held
        self._held, self.stopped = b"", True
        return self._decoder.decode(rest, final=True)


def _overlap(text: bytes, stop: bytes) -> int:
    """Length of the longest ending of `text` that begins `stop` without being the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
