"""What models read: training windows at random places of one token stream, and held-out documents cut alike.

Training text is one long stream: documents in a seeded order, each followed by the boundary token 0. A batch is a
number of windows at places that depend on seed and step alone. So every architecture with the same codec trains on the
same windows, and a run resumes at any step without replaying those before. Models that look further ahead (multi-token
prediction) get the same windows with more tokens at the end.

Held-out text is cut in bytes of raw text, before encoding: all codecs are scored on the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt
from torch import Tensor

from archbench.codec import BOUNDARY_ID, Codec
from archbench.data.cache import cache_dir, cache_key, read_array, write_array
from archbench.data.corpus import Corpus
from archbench.data.document import Document, utf8_prefix
from archbench.data.examples import Examples, Rows
from archbench.errors import DataError


@dataclass(frozen=True)
class TokenStream:
    """tokens: documents, each followed by 0. n_bytes: of raw text in it. token_bytes: bytes each id stands for."""

    tokens: UInt[np.ndarray, " n"]
    n_bytes: int
    token_bytes: Int64[np.ndarray, " v"]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of raw text per token of the stream, boundaries counted as tokens."""
        return self.n_bytes / len(self.tokens)


def tokenize(documents: Iterable[Document], codec: Codec, seed: int) -> TokenStream:
    """Encode documents into one stream, in an order drawn from `seed`; kept in the cache by texts, codec and seed.

    The order given does not matter. Raises DataError when there are none.
    """
    ordered = sorted(documents, key=lambda document: document.sha256)
    if not ordered:
        raise DataError("no documents to make a token stream of; name a corpus that holds text")
    n_bytes = sum(len(document.text) for document in ordered)
    token_bytes = codec.token_bytes()
    key = cache_key("tokens", codec.fingerprint, str(seed), *(document.sha256 for document in ordered))
    path = cache_dir() / "tokens" / f"{key}.npy"
    kept = read_array(path)
    if kept is None or not _covers(kept, n_bytes, len(ordered), token_bytes):
        order = np.random.default_rng(seed).permutation(len(ordered))
        write_array(path, _concatenate([codec.encode(ordered[index].text) for index in order]))
        kept = read_array(path)
        assert kept is not None, "a cache file just written can be read"
    return TokenStream(kept, n_bytes, token_bytes)


def _concatenate(encoded: list[np.ndarray]) -> np.ndarray:
    boundary = np.array([BOUNDARY_ID], dtype=encoded[0].dtype)
    return np.concatenate([part for ids in encoded for part in (ids, boundary)])


def _covers(tokens: np.ndarray, n_bytes: int, n_documents: int, token_bytes: np.ndarray) -> bool:
    """Whether a cached stream can be what its key says: the right number of bytes and of boundaries."""
    if tokens.ndim != 1 or tokens.dtype.kind != "u" or not tokens.size or int(tokens.max()) >= len(token_bytes):
        return False
    counts = np.zeros(len(token_bytes), dtype=np.int64)
    for begin in range(0, len(tokens), 1_000_000):  # bincount makes 8 bytes of every token
        counts += np.bincount(tokens[begin : begin + 1_000_000], minlength=len(token_bytes))
    return int(counts @ token_bytes) == n_bytes and int(counts[BOUNDARY_ID]) == n_documents


class Windows(Examples):
    """Batches of training windows, any step in constant time.

    context: tokens a model reads per window. batch: windows per step. lookahead_max: the furthest target any model may
    ask for; it limits the places, so it must be equal across models that are compared.
    Raises DataError when the stream is too short, naming the numbers.
    """

    def __init__(self, stream: TokenStream, context: int, batch: int, seed: int, lookahead_max: int = 16) -> None:
        for name, value in (("context", context), ("batch", batch), ("lookahead_max", lookahead_max)):
            if value < 1:
                raise DataError(f"windows: {name} is {value}; allowed: 1 or more")
        if len(stream.tokens) < context + lookahead_max:
            raise DataError(
                f"windows: the training stream has {len(stream.tokens):,} tokens and one window needs "
                f"{context + lookahead_max:,} (context {context:,} + lookahead {lookahead_max}); "
                "use a longer corpus or a shorter context"
            )
        self.stream = stream
        self.context = context
        self.batch = batch
        self.seed = seed
        self.lookahead_max = lookahead_max

    def batch_at(self, step: int, lookahead: int = 1) -> Int64[Tensor, "b t"]:
        """The windows of a step: `context` tokens and `lookahead` more, [batch, context + lookahead].

        The tokens do not depend on `lookahead`, only their number does. Raises DataError outside 1..lookahead_max.
        """
        if not 1 <= lookahead <= self.lookahead_max:
            raise DataError(f"windows: lookahead is {lookahead}; allowed: 1 to {self.lookahead_max} (lookahead_max)")
        return torch.from_numpy(self._gather(step, 0, self.context + lookahead))

    def rows_at(self, step: int, lookahead: int) -> Rows:
        return Rows(self.batch_at(step, lookahead))

    def bytes_at(self, step: int) -> float:
        """Bytes of raw text under the step's next-token targets: what training on it consumes."""
        targets = self._gather(step, 1, self.context + 1)
        return int(self.stream.token_bytes[targets].sum())

    def _gather(self, step: int, begin: int, end: int) -> Int64[np.ndarray, "b t"]:
        n_places = len(self.stream.tokens) - self.context - self.lookahead_max + 1
        starts = np.random.default_rng([self.seed, step]).integers(n_places, size=self.batch)
        return self.stream.tokens[starts[:, None] + np.arange(begin, end)].astype(np.int64)


class HeldoutDocument(NamedTuple):
    """A held-out text as tokens, without a boundary; n_bytes is of the raw text they encode."""

    name: str
    tokens: Int64[Tensor, " t"]
    n_bytes: int


def heldout_documents(corpus: Corpus, codec: Codec, max_bytes: int, max_document_bytes: int) -> list[HeldoutDocument]:
    """The same held-out text for every codec: the beginnings of documents until `max_bytes` are reached.

    Documents come in the order of their hashes, so that a small budget is not one folder of the corpus; each is cut to
    `max_document_bytes`, the last to what is left, never within a character. Raises DataError for an empty budget.
    """
    if min(max_bytes, max_document_bytes) < 4:
        raise DataError(
            f"held-out text: max_bytes is {max_bytes} and max_document_bytes {max_document_bytes}; allowed: 4 or more"
        )
    taken = []
    room = max_bytes
    for document in sorted(corpus.heldout, key=lambda document: document.sha256):
        if room < 4:  # a character may have four bytes
            break
        text = utf8_prefix(document.text, min(room, max_document_bytes))
        room -= len(text)
        tokens = torch.from_numpy(codec.encode(text).astype(np.int64))
        taken.append(HeldoutDocument(document.name, tokens, len(text)))
    return taken
