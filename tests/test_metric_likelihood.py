"""Bits per byte and perplexity on models whose answer is known by hand, and against naive scoring."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.ngram import Ngram, NgramConfig
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.codec import ByteCodec, Codec, train_bpe
from archbench.data.corpus import Corpus
from archbench.data.document import Document
from archbench.errors import ConfigError, UnsupportedError
from archbench.history import History
from archbench.metric import Measurement, Subject
from archbench.metrics import likelihood
from archbench.metrics.likelihood import METRIC, LikelihoodSettings
from archbench.model import AutoregressiveModel, Emission, FlopFormulas, Phase, SequenceModel, Traits
from archbench.sampling import Sampling


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Chain(AutoregressiveModel):
    """A Markov chain: row i of `table` holds the probabilities of what follows token i."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.vocab_size = len(table)
        self.register_buffer("log_table", table.log())

    def initial_layers(self, batch_size: int) -> None:
        return None

    def hidden(self, tokens: Tensor, layers: None) -> tuple[Tensor, None]:
        return self.get_buffer("log_table")[tokens], None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        return 0

    def logits_flops(self) -> float:
        return 0


def uniform(vocab_size: int) -> Chain:
    return Chain(torch.full((vocab_size, vocab_size), 1 / vocab_size))


class LetterCodec(ByteCodec):
    """The boundary and the letters a, b, c, ...: one token a byte."""

    def __init__(self, n_letters: int) -> None:
        super().__init__()
        self.name, self.vocab_size = "letters", n_letters + 1

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8) - np.uint8(96)

    def decode(self, ids: np.ndarray) -> bytes:
        return (ids[ids != 0] + 96).astype(np.uint8).tobytes()

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) != 0).astype(np.int64)


def subject(
    model: SequenceModel, texts: Sequence[bytes], codec: Codec | None = None, context: int = 16, **traits: Any
) -> Subject:
    documents = tuple(Document(f"{index}.txt", text) for index, text in enumerate(texts))
    return Subject(
        label="tiny",
        architecture="test",
        config=None,
        model=model,
        traits=Traits(**{"likelihood": True, **traits}),
        codec=codec or ByteCodec(),
        corpus=Corpus(name="test", train=(), heldout=documents, sha256=""),
        history=History(),
        context=context,
        batch=4,
        seed=0,
        folder=Path(),
    )


def measure(cell: Subject, **settings: Any) -> dict[tuple[str, str], Measurement]:
    """By quantity and state."""
    found = list(METRIC.measure(cell, LikelihoodSettings(**settings)))
    assert len(found) == 3 * len({entry.at["state"] for entry in found})
    return {(entry.quantity, entry.at["state"]): entry for entry in found}


RULES = ("reset", "sliding", "carried")
TEXTS = [
    b"The quick brown fox jumps over the lazy dog, twice.",
    "Où est la bibliothèque ? Là-bas.".encode(),
    b"short",
    b"def f(x):\n    return x + 1\n\n\nprint(f(41))\n",
]


@pytest.mark.parametrize("rule", RULES)
def test_a_uniform_model_needs_log2_of_its_vocabulary(rule: str) -> None:
    found = measure(subject(uniform(256), TEXTS))
    n_bytes = sum(map(len, TEXTS))
    assert found["bits_per_byte", rule].value == pytest.approx(8, abs=1e-6)
    assert found["perplexity", rule].value == pytest.approx(256, rel=1e-6)
    assert found["heldout_bytes", rule].value == n_bytes
    assert len(found["bits_per_byte", rule].samples) == len(TEXTS)
    assert found["bits_per_byte", rule].at == {"state": rule, "context": 16}
    assert f"{n_bytes} bytes of 4 held-out documents" in found["bits_per_byte", rule].protocol


def test_an_ngram_with_counts_set_by_hand() -> None:
    """Backoff constant 2, letters a and b of a vocabulary of 4:
    p1 = (0.5, 3.5, 1.5, 0.5) / 6; p(a | boundary) = (1 + 2 * 3.5/6) / 3 = 13/18; p(b | a) = (1 + 2 * 1.5/6) / 4 = 3/8.
    """
    model = Ngram(NgramConfig(vocab_size=4, order=2, backoff=2.0))
    model.counts(1).copy_(torch.tensor([0.0, 3, 1, 0]))
    model.counts(2)[0] = torch.tensor([0.0, 1, 0, 0])
    model.counts(2)[1] = torch.tensor([0.0, 1, 1, 0])
    found = measure(subject(model, [b"ab"], LetterCodec(3)))
    for rule in RULES:
        assert found["bits_per_byte", rule].value == pytest.approx(-math.log2(13 / 18 * 3 / 8) / 2, rel=1e-6)
        assert found["perplexity", rule].value == pytest.approx((13 / 18 * 3 / 8) ** -0.5, rel=1e-6)
    # One token a window: b stands after a fresh boundary, so p(b | boundary) = (0 + 2 * 1.5/6) / 3 = 1/6.
    found = measure(subject(model, [b"ab"], LetterCodec(3)), window=1, states=("reset",))
    assert found["bits_per_byte", "reset"].value == pytest.approx(-math.log2(13 / 18 / 6) / 2, rel=1e-6)


def test_a_predictor_that_is_always_right_needs_no_bits() -> None:
    table = torch.zeros(5, 5)
    table[[0, 1, 2, 3, 4], [1, 2, 3, 4, 1]] = 1  # a b c d a b ...
    found = measure(subject(Chain(table), [b"abcd" * 10, b"abcd" * 7], LetterCodec(4)))
    for rule in RULES:
        bpb = found["bits_per_byte", rule]
        assert bpb.value == pytest.approx(0, abs=1e-9) and found["perplexity", rule].value == pytest.approx(1)
        assert (bpb.low, bpb.high) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_text_of_probability_zero_has_a_reason_and_no_number() -> None:
    table = torch.zeros(5, 5)
    table[:, 4] = 1
    found = measure(subject(Chain(table), [b"abcd" * 10], LetterCodec(4)))
    for rule in RULES:
        for quantity in ("bits_per_byte", "perplexity"):
            assert found[quantity, rule].value is None and "probability of zero" in found[quantity, rule].reason
        assert found["heldout_bytes", rule].value == 40


def tiny_transformer(vocab_size: int = 256, max_context: int | None = None) -> Transformer:
    config = TransformerConfig(vocab_size=vocab_size, d_model=16, n_layers=2, n_heads=2, max_context=max_context)
    model = Transformer(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.unembedding.weight *= 20  # far from uniform, so that context matters
    return model


def nats_of(model: AutoregressiveModel, context: bytes, token: int) -> float:
    text = torch.tensor([[*context, token]])
    log_probs, _ = model.score(text, model.initial_state(1))
    return -log_probs[0, -1, token].item()


def naive_context(rule: str, text: bytes, place: int, window: int) -> bytes:
    """The context each token is to be scored with, from the words of the definitions; stride is half a window."""
    if rule == "carried":
        return text[:place]
    if rule == "reset":
        return text[place - place % window : place]
    stride, begin = window // 2, 0
    while place >= begin + window:
        begin += stride
    return text[begin:place]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_rule_equals_scoring_token_by_token(rule: str, batch: int) -> None:
    """Documents of unequal length, batched or not, filled up or dropped on the way, and a window that fits none."""
    model, window = tiny_transformer(), 12
    with torch.no_grad():
        expected = [
            sum(nats_of(model, naive_context(rule, text, place, window), byte) for place, byte in enumerate(text))
            for text in sorted(TEXTS, key=lambda text: Document("", text).sha256)
        ]
    found = measure(subject(model, TEXTS), window=window, batch=batch, states=(rule,))
    total = sum(map(len, TEXTS))
    assert found["bits_per_byte", rule].value == pytest.approx(sum(expected) / math.log(2) / total, rel=1e-5)
    bits = np.array(found["bits_per_byte", rule].samples) * np.array(found["heldout_bytes", rule].samples)
    np.testing.assert_allclose(bits * math.log(2), expected, rtol=1e-5)


def test_a_constant_state_is_carried_in_wide_batches_with_the_same_result() -> None:
    table = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    model = Chain(table / table.sum(dim=1, keepdim=True))
    texts = [*TEXTS, b"x" * 100]
    narrow = measure(subject(model, texts), states=("carried",), window=8, batch=4)
    wide = measure(subject(model, texts, constant_state=True), states=("carried",), window=8, batch=4)
    np.testing.assert_allclose(
        narrow["bits_per_byte", "carried"].samples, wide["bits_per_byte", "carried"].samples, rtol=1e-6
    )


def test_windows_longer_than_the_documents_make_all_rules_equal() -> None:
    found = measure(subject(tiny_transformer(), TEXTS), window=1000)
    values = [found["bits_per_byte", rule].value for rule in RULES]
    assert values == [pytest.approx(values[0], rel=1e-6)] * 3
    short = measure(subject(tiny_transformer(), TEXTS), window=4)
    assert short["bits_per_byte", "reset"].value != pytest.approx(values[0], rel=1e-3)


def test_long_windows_are_scored_in_streamed_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(subject(tiny_transformer(), TEXTS), window=40)
    monkeypatch.setattr(likelihood, "MAX_LOG_PROBS", 5000)
    streamed = measure(subject(tiny_transformer(), TEXTS), window=40)
    for key, entry in whole.items():
        assert streamed[key].value == pytest.approx(entry.value, rel=1e-5)


def test_codecs_are_scored_on_the_same_bytes() -> None:
    bpe = train_bpe([Document("t", b"the cat sat on the mat and the dog sat on the log. " * 20)], 262)
    texts = [b"the cat and the dog sat. " * 4, "naïve the mat".encode()]
    in_bytes = measure(subject(uniform(256), texts))["heldout_bytes", "reset"]
    cell = subject(uniform(bpe.vocab_size), texts, bpe)
    found = measure(cell)
    assert found["heldout_bytes", "reset"].value == in_bytes.value == sum(map(len, texts))
    n_tokens = sum(len(bpe.encode(text)) for text in texts)
    assert n_tokens < sum(map(len, texts))
    assert found["bits_per_byte", "reset"].value == pytest.approx(n_tokens * math.log2(262) / in_bytes.value)


def test_interval_holds_the_value_and_comes_from_documents() -> None:
    bpb = measure(subject(tiny_transformer(), TEXTS))["bits_per_byte", "reset"]
    assert bpb.low is not None and bpb.high is not None and bpb.value is not None
    assert min(bpb.samples) <= bpb.low < bpb.value < bpb.high <= max(bpb.samples)
    assert bpb.confidence == 0.95
    single = measure(subject(tiny_transformer(), TEXTS[:1]))["bits_per_byte", "reset"]
    assert single.value is not None and single.low is single.high is single.confidence is None


def test_a_context_limit_leaves_a_reason_in_place_of_a_number() -> None:
    cell = subject(tiny_transformer(max_context=16), TEXTS, context=16, context_limit=16)
    found = measure(cell)
    assert found["bits_per_byte", "reset"].value is not None
    assert found["bits_per_byte", "sliding"].value is not None
    assert found["bits_per_byte", "carried"].value is None
    assert "context limit is 16 tokens" in found["bits_per_byte", "carried"].reason
    assert measure(cell, window=32)["bits_per_byte", "reset"].value is None


class Mute(SequenceModel):
    """Writes, but gives no probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 256

    def phases(self) -> list[Phase]:
        return []

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        return state

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        ones = torch.ones(len(state), dtype=torch.long)
        return Emission(ones[:, None], ones, state)


def test_a_model_without_likelihood_is_refused_with_the_reason() -> None:
    assert METRIC.cannot(Traits(likelihood=True), LikelihoodSettings()) is None
    assert "no likelihood" in str(METRIC.cannot(Traits(likelihood=False), LikelihoodSettings()))
    with pytest.raises(UnsupportedError, match="no likelihood"):
        list(METRIC.measure(subject(Mute(), TEXTS, likelihood=False), LikelihoodSettings()))


@pytest.mark.parametrize(
    "bad", [{"states": ("rest",)}, {"states": ()}, {"window": 0}, {"stride_share": 0.0}, {"batch": 0}]
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"likelihood.{next(iter(bad))}"):
        LikelihoodSettings(**bad)
