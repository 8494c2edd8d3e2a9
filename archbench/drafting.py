"""Speculative decoding of a byte model through a drafter with subwords of its own.

    draft     the drafter writes a few subwords, that is, k bytes in a few of its steps
    verify    the verifier scores all k bytes in one pass, from a copy of its state
    accept    the longest beginning whose every byte is among the verifier's `rank` most likely
    go on     after a rejected byte the verifier writes bytes of its own until a boundary byte (ASCII white space or
              punctuation), where the drafter can start on a subword again

A recurrent state cannot be cut back as a cache of keys can, so after a rejection the accepted bytes are read again from
the state that was kept. With rank 1 a byte is accepted only where greedy decoding writes it: whatever the drafter
drafts, the text is the verifier's own greedy text, up to ties within floating-point error between reading many tokens
at once and one at a time. With a larger rank the text changes; it is then not what either model would write.

The drafter has read the text up to a boundary; the bytes after it are `unread`. A subword mostly begins with its space
(byte-pair encodings of GPT-2's kind), so the boundary byte itself stays unread, and the next draft must begin with the
unread bytes: only subwords that agree with them are drafted, and they do not count as drafted.

Source: Wang et al. 2024, 2401.13660, section 3.2 and algorithm 1. Departures: the restriction to agreeing subwords (the
paper restarts after the space); after a rejection the drafter reads the text again from its last boundary instead of
keeping a copy of its state for each subword.

Letters: k drafted bytes, u unread bytes, v vocabulary.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench.codec import Codec
from archbench.errors import ConfigError, UnsupportedError
from archbench.model import BOUNDARY, AutoregressiveModel, AutoregressiveState, Emission, Speculative
from archbench.sampling import GREEDY, Sampling
from archbench.state import copy_state

N_BYTES = 256
BOUNDARY_BYTES = frozenset(bytes([BOUNDARY]) + (string.whitespace + string.punctuation).encode())
LONGEST_ALONE = 32
"""Bytes the verifier writes by itself at most before the drafter is asked again, boundary or not."""
LONGEST_UNREAD = 32
"""Unread bytes beyond which the drafter reads on without a boundary, as in text that has none."""


class Tally(NamedTuple):
    """What happened so far. `passes` are calls of the verifier while writing; `drafted` and `accepted` are bytes."""

    rounds: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    written: int = 0


class DraftedState(NamedTuple):
    """The verifier has read all of the text, the drafter all but the `unread` bytes at its end."""

    verifier: AutoregressiveState
    drafter: AutoregressiveState
    unread: Int[Tensor, "1 u"]
    tally: Tally


class Drafted(Speculative):
    """Writes as a model does (`initial_state`, `prefill`, `decode_step`), one text at a time, greedily.

    A step is a round and writes at least one byte.

    Args:
        verifier: whose text it is; its tokens are bytes.
        drafter: any next-token model; only speed depends on it.
        codec: the drafter's.
        n_subwords: subwords drafted in a round. The paper has 3.
        rank: a byte is accepted among this many most likely ones; 1 is exact. The paper has 3.

    Raises:
        UnsupportedError: the verifier does not read bytes, or the codec is not the drafter's.
        ConfigError: n_subwords or rank is out of range.
    """

    def __init__(
        self,
        verifier: AutoregressiveModel,
        drafter: AutoregressiveModel,
        codec: Codec,
        *,
        n_subwords: int = 3,
        rank: int = 1,
    ) -> None:
        if verifier.vocab_size != N_BYTES:
            raise UnsupportedError(
                f"drafting: the verifier has a vocabulary of {verifier.vocab_size}; "
                f"it must read bytes ({N_BYTES}): train it with the codec 'bytes'"
            )
        if codec.vocab_size > drafter.vocab_size:
            raise UnsupportedError(
                f"drafting: codec {codec.name} has {codec.vocab_size} tokens, the drafter {drafter.vocab_size}; "
                "give the codec that the drafter was trained with"
            )
        if n_subwords < 1:
            raise ConfigError(f"drafting.n_subwords: {n_subwords}; must be at least 1")
        if not 1 <= rank <= N_BYTES:
            raise ConfigError(f"drafting.rank: {rank}; must lie in [1, {N_BYTES}], 1 for the verifier's greedy text")
        self.verifier, self.drafter, self.codec = verifier, drafter, codec
        self.n_subwords, self.rank = n_subwords, rank
        self._pieces = [codec.decode(np.array([id])) for id in range(codec.vocab_size)]
        if drafter.boundary < len(self._pieces):
            self._pieces[drafter.boundary] = bytes([BOUNDARY])
        self._beginning_with: dict[int, list[int]] = {}
        for id, piece in enumerate(self._pieces):
            if piece:
                self._beginning_with.setdefault(piece[0], []).append(id)

    @property
    def device(self) -> torch.device:
        return self.verifier.device

    def plain(self) -> AutoregressiveModel:
        """The verifier. Its greedy text is also this one's with `rank` 1."""
        return self.verifier

    def initial_state(self, batch_size: int) -> DraftedState:
        """Raises UnsupportedError for more than one row: each would have other bytes unread."""
        if batch_size != 1:
            raise UnsupportedError(f"drafting: {batch_size} texts at once; it writes one at a time")
        verifier = self.verifier.initial_state(1)
        return DraftedState(verifier, self.drafter.initial_state(1), _ids(b"", verifier.pending), Tally())

    def prefill(self, tokens: Int[Tensor, "1 t"], state: DraftedState) -> DraftedState:
        """Reads bytes. Gives up `state`."""
        drafter, unread = self._read(_bytes(state.unread) + _bytes(tokens), state.drafter)
        verifier = self.verifier.prefill(tokens, state.verifier)
        return DraftedState(verifier, drafter, _ids(unread, state.unread), state.tally)

    def decode_step(self, state: DraftedState, sampling: Sampling, generator: Generator | None) -> Emission:
        """One round. Gives up `state`. Raises UnsupportedError unless `sampling` is greedy."""
        del generator
        if not sampling.greedy:
            raise UnsupportedError(f"drafting: temperature {sampling.temperature}; drafted text is greedy, give 0")
        unread = _bytes(state.unread)
        draft, ahead = self._draft(unread, copy_state(state.drafter))
        tally = state.tally._replace(rounds=state.tally.rounds + 1, drafted=state.tally.drafted + len(draft))
        verifier, written, n_accepted = state.verifier, b"", 0
        if draft:
            tokens = _ids(draft, state.unread)
            log_probs, after = self.verifier.score(tokens, copy_state(verifier))
            n_accepted = accepted(log_probs[0], tokens[0], self.rank)
            if n_accepted == len(draft):
                return self._emission(draft, n_accepted, 1, tally, after, ahead, b"")
            written = draft[:n_accepted] + bytes([int(log_probs[0, n_accepted].argmax())])
            verifier = self.verifier.prefill(_ids(written, state.unread), verifier)
        passes = 2 if draft else 0
        # At least one byte of the verifier's own; then on to a boundary.
        while len(written) == n_accepted or (
            written[-1] not in BOUNDARY_BYTES and len(written) < n_accepted + LONGEST_ALONE
        ):
            token, _, verifier = self.verifier.decode_step(verifier, GREEDY, None)
            written += _bytes(token)
            passes += 1
        drafter, unread = self._read(unread + written, state.drafter)
        return self._emission(written, n_accepted, passes, tally, verifier, drafter, unread)

    def decode_steps(self, state: DraftedState, n: int, sampling: Sampling, generator: Generator | None) -> Emission:
        """One round."""
        del n
        return self.decode_step(state, sampling, generator)

    def _emission(
        self,
        written: bytes,
        n_accepted: int,
        passes: int,
        tally: Tally,
        verifier: AutoregressiveState,
        drafter: AutoregressiveState,
        unread: bytes,
    ) -> Emission:
        tally = tally._replace(
            passes=tally.passes + passes,
            accepted=tally.accepted + n_accepted,
            written=tally.written + len(written),
        )
        tokens = _ids(written, verifier.pending)
        counts = torch.tensor([len(written)], device=tokens.device)
        return Emission(tokens, counts, DraftedState(verifier, drafter, _ids(unread, tokens), tally))

    def _draft(self, owed: bytes, state: AutoregressiveState) -> tuple[bytes, AutoregressiveState]:
        """The drafter's next subwords as bytes, those `owed` (unread) left out, and its state after them."""
        draft, n_drafted = b"", 0
        while owed or n_drafted < self.n_subwords:
            predicted, layers = self.drafter.predict(state.pending[:, None], state.layers)
            logits = predicted[0, -1, : len(self._pieces)]
            if owed:
                agreeing = self._agreeing(owed)
                if not agreeing:
                    break  # no subword goes on from here: the verifier writes by itself
                id = agreeing[int(logits[agreeing].argmax())]
            else:
                id = int(logits.argmax())
            piece = self._pieces[id]
            draft += piece[len(owed) :]
            n_drafted += len(piece) > len(owed) or not piece
            owed = owed[len(piece) :]
            state = AutoregressiveState(torch.full_like(state.pending, id), layers)
        return draft, state

    def _agreeing(self, owed: bytes) -> list[int]:
        """Subwords that begin with the bytes owed, or that those begin with."""
        ids = self._beginning_with.get(owed[0], ())
        return [id for id in ids if self._pieces[id].startswith(owed) or owed.startswith(self._pieces[id])]

    def _read(self, text: bytes, state: AutoregressiveState) -> tuple[AutoregressiveState, bytes]:
        """Lets the drafter read `text` up to its last boundary byte; also returns the bytes from there on."""
        end = max((place for place, byte in enumerate(text) if byte in BOUNDARY_BYTES), default=0)
        if len(text) - end > LONGEST_UNREAD:
            end = len(text)
        ids: list[int] = []
        for number, document in enumerate(text[:end].split(bytes([BOUNDARY]))):
            if number:
                ids.append(self.drafter.boundary)
            if document:  # what is no UTF-8 is read as U+FFFD: a draft may be wrong, the text cannot
                ids.extend(self.codec.encode(document.decode(errors="replace").encode()).tolist())
        tokens = torch.tensor([ids], dtype=torch.long, device=state.pending.device)
        return self.drafter.prefill(tokens, state), text[end:]


def accepted(log_probs: Float[Tensor, "k v"], tokens: Int[Tensor, " k"], rank: int) -> int:
    """Length of the longest beginning of `tokens` in which each is among the `rank` most likely, ties to the lowest id
    (so that rank 1 is the greedy choice)."""
    own = log_probs.gather(1, tokens[:, None])
    lower = torch.arange(log_probs.shape[1], device=tokens.device) < tokens[:, None]
    n_before = ((log_probs > own) | ((log_probs == own) & lower)).sum(1)
    return int((n_before < rank).long().cumprod(0).sum())


def _ids(text: bytes, beside: Tensor) -> Int[Tensor, "1 t"]:
    """The bytes as tokens on the device of another tensor."""
    return torch.tensor([list(text)], dtype=torch.long, device=beside.device)


def _bytes(tokens: Int[Tensor, "1 t"]) -> bytes:
    ids: Sequence[int] = tokens[0].tolist()
    return bytes(ids)
