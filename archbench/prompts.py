"""Prompts for metrics that measure costs: pieces of held-out text, each call other ones.

A prompt read twice in a row would find caches, branch predictors and, in models that store what they read, memories
already warm. Two subjects with the same codec and seed get the same prompts in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.data.windows import heldout_documents
from archbench.errors import UnsupportedError
from archbench.model import BOUNDARY

LEAST_BYTES = 1_000_000
BYTES_PER_TOKEN = 16
"""Held-out text asked for per token of the longest prompt; a byte-pair token stands for less."""


@dataclass(frozen=True)
class HeldoutStream:
    """Held-out documents one after the other, a boundary behind each; `bytes_per_token` of raw text, boundaries not
    counted."""

    tokens: Int[Tensor, " t"]
    bytes_per_token: float

    def require(self, n: int) -> None:
        """Raises UnsupportedError when there are no two different pieces of n tokens."""
        if len(self.tokens) <= n:
            raise UnsupportedError(f"the held-out text has {len(self.tokens)} tokens; fresh prompts of {n} need more")


def heldout_stream(corpus: Corpus, codec: Codec, longest: int) -> HeldoutStream:
    """Enough text for prompts of `longest` tokens, if the corpus has it."""
    n_bytes = max(LEAST_BYTES, BYTES_PER_TOKEN * longest)
    documents = heldout_documents(corpus, codec, n_bytes, n_bytes)
    boundary = torch.tensor([BOUNDARY])
    tokens = torch.cat([part for document in documents for part in (document.tokens, boundary)])
    n_tokens = len(tokens) - len(documents)
    return HeldoutStream(tokens, sum(document.n_bytes for document in documents) / n_tokens)


@dataclass
class Prompts:
    """Pieces of a stream at random places."""

    stream: HeldoutStream
    seed: int
    _last: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def take(self, rows: int, n: int) -> Int[Tensor, "b t"]:
        """`rows` pieces of n tokens; where there are places enough, none begins where one of the last call began.

        Raises UnsupportedError when the stream is too short.
        """
        self.stream.require(n)
        places = len(self.stream.tokens) - n + 1
        taken = self._last.get(n, torch.empty(0, dtype=torch.long))
        starts = self._places(places, rows)
        while places > len(taken) and (stale := torch.isin(starts, taken)).any():
            starts = torch.where(stale, self._places(places, rows), starts)
        self._last[n] = starts
        return self.stream.tokens[starts[:, None] + torch.arange(n)]

    def _places(self, places: int, rows: int) -> Int[Tensor, " b"]:
        return torch.randint(places, (rows,), generator=self._generator)
