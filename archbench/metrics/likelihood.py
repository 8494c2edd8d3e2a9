"""Likelihood of held-out text: bits per byte and perplexity, under three rules for what the model may remember.

    bits per byte = total nats / ln 2 / bytes of raw text        perplexity = exp(total nats / tokens)

Bits per byte compare across codecs, perplexities only within one. All bytes are scored, the first token of each
document included: it is predicted after the boundary. The rules, for a window of W tokens:

- `reset`: the document is cut into windows of W tokens and the state is fresh at each. W is a hidden advantage here:
  compare at equal W.
- `sliding`: windows of W tokens overlap; each token is scored once, by the window that ends soonest after it, so with
  at least W - stride tokens of context where the document has them.
- `carried`: the state is carried through the whole document; the window is only the size of the pieces read.
  A model whose state grows pays attention over the whole document for this.

Source: bits per byte as in Gao et al. 2020, The Pile, section 3.1; the sliding window as in Press et al. 2021,
Shortformer, section 2.

Letters: b batch, t time, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from archbench import stats
from archbench.data.windows import HeldoutDocument, heldout_documents
from archbench.errors import ConfigError, UnsupportedError
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import BOUNDARY, Likelihood, SequenceModel, Traits
from archbench.state import State, select_rows

STATES = ("reset", "sliding", "carried")
NO_LIKELIHOOD = "this model gives no probabilities to tokens (it has no likelihood); brier_lm compares it with others"
MAX_LOG_PROBS = 2**24
"""Most log-probabilities held at once (64 MB of fp32); longer windows are scored in streamed pieces."""
MAX_NATS_PER_TOKEN = 700.0
"""exp of more than this is no fp64 number."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings:
    """`window` in tokens, None for the context the cell trained with; `stride_share` is how far the sliding window
    moves, as a share of it; `batch` is the number of windows scored at once."""

    states: tuple[str, ...] = STATES
    window: int | None = None
    stride_share: float = 0.5
    max_bytes: int = 262_144
    max_document_bytes: int = 16_384
    batch: int = 16

    def __post_init__(self) -> None:
        unknown = [state for state in self.states if state not in STATES]
        if unknown or not self.states:
            raise ConfigError(f"likelihood.states: {unknown or 'empty'}; allowed: {', '.join(STATES)}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"likelihood.window: {self.window}; must be at least 1 token, or left out")
        if not 0 < self.stride_share <= 1:
            raise ConfigError(f"likelihood.stride_share: {self.stride_share}; must lie in (0, 1]")
        if self.batch < 1:
            raise ConfigError(f"likelihood.batch: {self.batch}; must be at least 1")

    def stride(self, window: int) -> int:
        """Tokens by which the sliding window moves."""
        return max(1, round(window * self.stride_share))


class Piece(NamedTuple):
    """Tokens begin:end of a document are read after a boundary; those from `first` on are scored."""

    document: int
    begin: int
    end: int
    first: int


class LikelihoodMetric(Metric):
    name = "likelihood"
    version = 1
    settings = LikelihoodSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "bits_per_byte": Quantity(unit="bit/byte", better="lower", meaning="bits to encode a byte of held-out text"),
        "perplexity": Quantity(unit="ratio", better="lower", meaning="exp of the mean nats per token of the codec"),
        "heldout_bytes": Quantity(unit="B", better="neither", meaning="bytes of raw held-out text that were scored"),
    }

    def cannot(self, traits: Traits, settings: LikelihoodSettings) -> str | None:
        del settings
        return None if traits.likelihood else NO_LIKELIHOOD

    def measure(self, subject: Subject, settings: LikelihoodSettings) -> Iterator[Measurement]:
        """Raises UnsupportedError for a model without likelihood, DataError when there is no held-out text."""
        model = subject.model
        if not isinstance(model, Likelihood):
            raise UnsupportedError(f"likelihood: {NO_LIKELIHOOD}")
        documents = heldout_documents(subject.corpus, subject.codec, settings.max_bytes, settings.max_document_bytes)
        window = subject.context if settings.window is None else settings.window
        for rule in settings.states:
            longest = max(len(document.tokens) for document in documents)
            reads = longest if rule == "carried" else min(longest, window)
            limit = subject.traits.context_limit
            if limit is not None and reads > limit:
                at = {"state": rule, "context": window}
                reason = f"{reads} tokens must be read in one go, and the model's context limit is {limit} tokens"
                for quantity in self.quantities:
                    yield Measurement(quantity=quantity, value=None, at=at, reason=reason)
                continue
            nats = document_nats(model, subject.traits, documents, rule, window, settings)
            yield from _measurements(documents, nats, rule, window, settings)


@torch.no_grad()
def document_nats(
    model: SequenceModel,
    traits: Traits,
    documents: Sequence[HeldoutDocument],
    rule: str,
    window: int,
    settings: LikelihoodSettings,
) -> Float64[np.ndarray, " n"]:
    """-ln P of each document under one of the rules."""
    if rule == "carried":
        return _carried(model, traits, documents, window, settings.batch)
    stride = window if rule == "reset" else settings.stride(window)
    pieces = [
        piece
        for index, document in enumerate(documents)
        for piece in overlapping(index, len(document.tokens), window, stride)
    ]
    return _separate(model, documents, pieces, settings.batch)


def overlapping(document: int, n: int, window: int, stride: int) -> Iterator[Piece]:
    """Windows begun every `stride` tokens until one reaches the end; each token is scored in the first that has it.

    With stride = window they follow one another without overlap.
    """
    scored = begin = 0
    while scored < n:
        end = min(begin + window, n)
        yield Piece(document, begin, end, scored)
        scored = end
        begin += stride


def _separate(
    model: SequenceModel, documents: Sequence[HeldoutDocument], pieces: Sequence[Piece], batch: int
) -> Float64[np.ndarray, " n"]:
    """Scores pieces independently, each from a fresh state, the longest first.

    Shorter ones are filled up at the end: what follows a token cannot change its probability.
    """
    nats = np.zeros(len(documents))
    pieces = sorted(pieces, key=lambda piece: piece.begin - piece.end)
    for start in range(0, len(pieces), batch):
        group = pieces[start : start + batch]
        tokens = _padded([documents[piece.document].tokens[piece.begin : piece.end] for piece in group])
        found, _ = _token_nats(model, tokens, model.initial_state(len(group)))
        for piece, row in zip(group, found, strict=True):
            nats[piece.document] += row[piece.first - piece.begin : piece.end - piece.begin].sum().item()
    return nats


def _carried(
    model: SequenceModel, traits: Traits, documents: Sequence[HeldoutDocument], window: int, batch: int
) -> Float64[np.ndarray, " n"]:
    """Streams documents of similar length side by side; a row leaves its batch when its document ends."""
    nats = np.zeros(len(documents))
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index].tokens))
    if not traits.constant_state:  # states grow with the text: hold no more tokens than a batch of windows does
        batch = max(1, min(batch, batch * window // len(documents[order[0]].tokens)))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        tokens = _padded([documents[index].tokens for index in group])
        lengths = [len(documents[index].tokens) for index in group]  # descending
        n_rows, state = len(group), model.initial_state(len(group))
        for begin in range(0, lengths[0], window):
            going = sum(length > begin for length in lengths)
            if going < n_rows:
                n_rows, state = going, select_rows(state, torch.arange(going, device=model.device))
            found, state = _token_nats(model, tokens[:n_rows, begin : begin + window], state)
            for index, length, row in zip(group, lengths, found, strict=False):
                nats[index] += row[: max(0, length - begin)].sum().item()
    return nats


def _padded(rows: list[Int[Tensor, " _"]]) -> Int[Tensor, "b t"]:
    return pad_sequence(rows, batch_first=True, padding_value=BOUNDARY)


def _token_nats(model: SequenceModel, tokens: Int[Tensor, "b t"], state: State) -> tuple[Float64[Tensor, "b t"], State]:
    """-ln p of every token, on the CPU, and the state after them. Gives up `state`."""
    assert isinstance(model, Likelihood), NO_LIKELIHOOD
    step = max(1, MAX_LOG_PROBS // (len(tokens) * model.vocab_size))
    parts = []
    for piece in tokens.to(model.device).split(step, dim=1):
        log_probs, state = model.score(piece, state)
        parts.append(-log_probs.gather(-1, piece[..., None]).squeeze(-1).double().cpu())
    return torch.cat(parts, dim=1), state


def _measurements(
    documents: Sequence[HeldoutDocument],
    nats: Float64[np.ndarray, " n"],
    rule: str,
    window: int,
    settings: LikelihoodSettings,
) -> Iterator[Measurement]:
    n_bytes = np.array([float(document.n_bytes) for document in documents])
    n_tokens = np.array([len(document.tokens) for document in documents])
    at = {"state": rule, "context": window}
    protocol = (
        f"{_describe(rule, window, settings)}; all {n_bytes.sum():,.0f} bytes of {len(documents)} held-out documents, "
        "first tokens after the boundary included"
    )
    yield Measurement(
        quantity="heldout_bytes", value=float(n_bytes.sum()), samples=n_bytes.tolist(), at=at, protocol=protocol
    )
    if not np.isfinite(nats).all() or (nats / n_tokens).max() > MAX_NATS_PER_TOKEN:
        reason = "the model gives the text a probability of zero (or one too small to be told from it)"
        for quantity in ("bits_per_byte", "perplexity"):
            yield Measurement(quantity=quantity, value=None, at=at, protocol=protocol, reason=reason)
        return
    bits = nats / math.log(2)
    interval = stats.bootstrap_ratio(bits, n_bytes)
    yield Measurement(
        quantity="bits_per_byte",
        value=bits.sum() / n_bytes.sum(),
        samples=(bits / n_bytes).tolist(),
        low=interval and interval.low,
        high=interval and interval.high,
        confidence=interval and interval.confidence,
        at=at,
        protocol=protocol,
    )
    interval = stats.bootstrap_ratio(nats, n_tokens)
    yield Measurement(
        quantity="perplexity",
        value=math.exp(nats.sum() / n_tokens.sum()),
        samples=np.exp(nats / n_tokens).tolist(),
        low=interval and math.exp(interval.low),
        high=interval and math.exp(interval.high),
        confidence=interval and interval.confidence,
        at=at,
        protocol=protocol,
    )


def _describe(rule: str, window: int, settings: LikelihoodSettings) -> str:
    if rule == "reset":
        return f"state reset at every window of {window} tokens"
    if rule == "sliding":
        moved = settings.stride(window)
        return f"window of {window} tokens moved by {moved}, fresh state at each, every token scored once"
    return f"state carried through each document, read {window} tokens at a time"


METRIC = LikelihoodMetric()
