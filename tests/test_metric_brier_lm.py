"""BrierLM on laws that can be enumerated, on predictors that are always right or wrong, and both estimators at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.codec import ByteCodec, Codec, train_bpe
from archbench.data.corpus import Corpus
from archbench.data.document import Document
from archbench.data.windows import heldout_documents
from archbench.errors import ConfigError
from archbench.history import History
from archbench.metric import Measurement, Subject
from archbench.metrics.brier_lm import (
    ALIGNMENT,
    METRIC,
    BrierSettings,
    Symbols,
    continuations,
    find_places,
    measure_terms,
    phases_of,
    sampled_terms,
    teacher_forced_terms,
)
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


class Patches(SequenceModel):
    """The same chain without a likelihood, written one to three tokens a step, differently in each row."""

    class State(NamedTuple):
        chain: Any
        steps: Tensor

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain, self.vocab_size = chain, chain.vocab_size

    def phases(self) -> list[Phase]:
        return []

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> State:
        return self.State(self.chain.initial_state(batch_size), torch.arange(batch_size))

    def prefill(self, tokens: Tensor, state: State) -> State:
        return self.State(self.chain.prefill(tokens, state.chain), state.steps)

    def decode_step(self, state: State, sampling: Sampling, generator: Generator | None) -> Emission:
        counts, chain, written = 1 + state.steps % 3, state.chain, []
        for place in range(3):
            before = chain.pending
            token, _, chain = self.chain.decode_step(chain, sampling, generator)
            kept = torch.where(place < counts, token[:, 0], before)
            chain = chain._replace(pending=kept)
            written.append(kept)
        return Emission(torch.stack(written, dim=1), counts, self.State(chain, state.steps + 1))


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
    model: SequenceModel, texts: Sequence[bytes], codec: Codec, context: int = 16, seed: int = 0, **traits: Any
) -> Subject:
    documents = tuple(Document(f"{index}.txt", text) for index, text in enumerate(texts))
    return Subject(
        label="tiny",
        architecture="test",
        config=None,
        model=model,
        traits=Traits(**{"likelihood": True, **traits}),
        codec=codec,
        corpus=Corpus(name="test", train=(), heldout=documents, sha256=""),
        history=History(),
        context=context,
        batch=4,
        seed=seed,
        folder=Path(),
    )


def measure(cell: Subject, **settings: Any) -> dict[tuple[Any, ...], Measurement]:
    """Brier-n by (estimator, window, n), BrierLM by (estimator, window)."""
    found: dict[tuple[Any, ...], Measurement] = {}
    for entry in METRIC.measure(cell, BrierSettings(**settings)):
        order = (entry.at["n"],) if entry.quantity == "brier_n" else ()
        found[(entry.at["estimator"], entry.at["window"], *order)] = entry
    return found


BOTH = [(estimator, window) for estimator in ("teacher_forced", "sampled") for window in ("tokens", "bytes")]

# --- the estimators against an enumerated law: three states that keep to themselves, no boundary

STATES = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.25, 0.05, 0.7]])


def three_states() -> Chain:
    table = torch.zeros(4, 4)
    table[1:, 1:] = torch.tensor(STATES)
    table[0, 1:] = torch.tensor(STATES[0])
    return Chain(table)


def enumerated(start: int, truth: Sequence[int]) -> list[float]:
    """2 P(y_1:n) - sum_x P(x_1:n)^2, over all 3^n continuations."""

    def probability(path: Sequence[int]) -> float:
        return float(np.prod([STATES[a - 1, b - 1] for a, b in zip([start, *path], path, strict=False)]))

    return [
        2 * probability(truth[:n]) - sum(probability(path) ** 2 for path in product((1, 2, 3), repeat=n))
        for n in range(1, 5)
    ]


REPETITIONS = 50_000
START, TRUTH = 2, [2, 3, 3, 1]


def after_start(model: SequenceModel, n: int) -> Any:
    return model.prefill(torch.full((n, 1), START), model.initial_state(n))


def assert_unbiased(terms: np.ndarray) -> None:
    error = terms.std(axis=0) / len(terms) ** 0.5
    assert (np.abs(terms.mean(axis=0) - enumerated(START, TRUTH)) <= 4 * error + 1e-6).all()


@pytest.mark.parametrize("draws", [2, 5])
@pytest.mark.parametrize("model", [three_states(), Patches(three_states())], ids=["tokens", "patches"])
def test_09_the_sampled_estimator_is_unbiased(model: SequenceModel, draws: int) -> None:
    generator = torch.Generator().manual_seed(draws)
    written = continuations(model, after_start(model, REPETITIONS), REPETITIONS, draws, generator).numpy()
    terms = sampled_terms(np.tile(TRUTH, (REPETITIONS, 1)), written)
    assert_unbiased(terms)
    assert np.abs(terms).max() <= 2


def test_09_the_teacher_forced_estimator_is_unbiased_and_varies_less() -> None:
    model, generator = three_states(), torch.Generator().manual_seed(0)
    truth = torch.tensor(TRUTH).expand(REPETITIONS, 4)
    terms = teacher_forced_terms(model, after_start(model, REPETITIONS), truth, generator)
    assert_unbiased(terms)
    written = continuations(model, after_start(model, REPETITIONS), REPETITIONS, 2, generator).numpy()
    assert (terms.std(axis=0) < 0.2 * sampled_terms(truth.numpy(), written).std(axis=0)).all()
    assert terms[:, 0].std() == pytest.approx(0, abs=1e-6)  # exact for n = 1


def test_more_draws_vary_less() -> None:
    model, generator = three_states(), torch.Generator().manual_seed(0)
    truth = np.tile(TRUTH, (5000, 1))
    spread = [
        sampled_terms(truth, continuations(model, after_start(model, 5000), 5000, draws, generator).numpy()).std(axis=0)
        for draws in (2, 8)
    ]
    assert (spread[1] < spread[0]).all()


# --- whole measurements with a known answer

CYCLE = [b"abcd" * 10, b"abcd" * 25, b"abcd" * 7]


def always(*following: int) -> Chain:
    """Token i is followed by following[i] with certainty."""
    table = torch.zeros(len(following), len(following))
    table[range(len(following)), list(following)] = 1
    return Chain(table)


def test_a_predictor_that_is_always_right_scores_100() -> None:
    found = measure(subject(always(1, 2, 3, 4, 1), CYCLE, LetterCodec(4)))
    assert len(found) == 4 * 5
    for pair in BOTH:
        assert [found[(*pair, n)].value for n in range(1, 5)] == pytest.approx([1] * 4)
        assert found[pair].value == pytest.approx(100)


def test_a_predictor_that_is_always_wrong_scores_minus_one_and_nothing() -> None:
    found = measure(subject(always(5, 5, 5, 5, 5, 5), CYCLE, LetterCodec(5)))
    for pair in BOTH:
        assert [found[(*pair, n)].value for n in range(1, 5)] == pytest.approx([-1] * 4)
        assert found[pair].value == 0


def test_a_uniform_predictor_scores_its_vocabulary_to_the_minus_n() -> None:
    found = measure(subject(Chain(torch.full((5, 5), 0.2)), CYCLE, LetterCodec(4)))
    for n in range(1, 5):
        assert found["teacher_forced", "tokens", n].value == pytest.approx(5.0**-n, rel=1e-5)
    assert found["teacher_forced", "tokens"].value == pytest.approx(100 * 5**-2.5, rel=1e-5)


def random_text(n: int, seed: int) -> bytes:
    """Letters a, b, c, most of them followed by the next."""
    rng = np.random.default_rng(seed)
    steps = rng.choice(3, size=n, p=[0.2, 0.6, 0.2])
    return bytes((97 + np.cumsum(steps) % 3).astype(np.uint8))


def tiny_transformer(vocab_size: int, max_context: int | None = None) -> Transformer:
    config = TransformerConfig(vocab_size=vocab_size, d_model=16, n_layers=2, n_heads=2, max_context=max_context)
    model = Transformer(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.unembedding.weight *= 6  # far from uniform, so that 4-grams repeat
    return model


def test_both_estimators_agree_on_a_transformer() -> None:
    """The truth is the same at every place, so the differences are those of the draws alone."""
    cell = subject(tiny_transformer(4), [random_text(900, seed) for seed in range(8)], LetterCodec(3))
    settings = BrierSettings(draws=2, context=16)
    places = find_places(heldout_documents(cell.corpus, cell.codec, 10**5, 10**5), 16, 800)
    terms = measure_terms(cell, places, settings)
    difference = terms["sampled", "tokens"] - terms["teacher_forced", "tokens"]
    error = difference.std(axis=0) / len(difference) ** 0.5
    assert (np.abs(difference.mean(axis=0)) <= 4 * error).all()
    assert (error < 0.05).all() and (terms["sampled", "tokens"][:, 3] != 0).mean() > 0.05  # the test can fail
    np.testing.assert_array_equal(terms["sampled", "tokens"], terms["sampled", "bytes"])


def test_teacher_forcing_a_transformer_equals_the_enumerated_law() -> None:
    """Each of 4^4 continuations scored on its own."""
    model, context, truth = tiny_transformer(4), torch.tensor([[1, 2, 3, 1]]), torch.tensor([2, 3, 1, 1])
    with torch.no_grad():
        paths = torch.tensor(list(product(range(4), repeat=4)))
        text = torch.cat([context.expand(len(paths), -1), paths], dim=1)
        log_probs, _ = model.score(text, model.initial_state(len(text)))
        chosen = log_probs.gather(-1, text[..., None])[:, 4:, 0].double().cumsum(dim=-1).exp()
        n_rows = 4000
        state = model.prefill(context.expand(n_rows, -1), model.initial_state(n_rows))
        terms = teacher_forced_terms(model, state, truth.expand(n_rows, 4), torch.Generator().manual_seed(0))
    for n in range(1, 5):
        law = {tuple(path[:n].tolist()): chance[n - 1].item() for path, chance in zip(paths, chosen, strict=True)}
        expected = 2 * law[tuple(truth[:n].tolist())] - sum(chance**2 for chance in law.values())
        error = terms[:, n - 1].std() / n_rows**0.5
        assert abs(terms[:, n - 1].mean() - expected) <= 4 * error + 1e-5


def test_interval_holds_the_value_and_is_made_of_documents() -> None:
    found = measure(subject(tiny_transformer(4), [random_text(300, seed) for seed in range(8)], LetterCodec(3)))
    first = found["teacher_forced", "tokens", 1]
    assert len(first.samples) == 8 and first.confidence == 0.95
    assert first.low is not None and first.high is not None and first.value is not None
    assert min(first.samples) < first.low < first.value < first.high < max(first.samples)


def test_brier_lm_has_an_interval_where_every_factor_is_clear() -> None:
    chain = Chain(torch.tensor([[0.1, 0.3, 0.3, 0.3], [0, 0.2, 0.6, 0.2], [0, 0.2, 0.2, 0.6], [0, 0.6, 0.2, 0.2]]))
    found = measure(subject(chain, [random_text(900, seed) for seed in range(8)], LetterCodec(3)))
    score = found["teacher_forced", "tokens"]
    factors = [found["teacher_forced", "tokens", n].value for n in range(1, 5)]
    assert score.value == pytest.approx(100 * np.prod(factors) ** 0.25)
    assert score.low is not None and score.high is not None and score.low < score.value < score.high


def test_brier_lm_is_refused_while_a_factor_may_be_zero() -> None:
    texts = [bytes(np.random.default_rng(seed).integers(97, 123, size=200).astype(np.uint8)) for seed in range(4)]
    found = measure(subject(Chain(torch.full((256, 256), 1 / 256)), texts, ByteCodec()))
    assert found["sampled", "bytes", 4].value == 0
    assert found["sampled", "bytes"].value is None
    assert "Brier-4 = 0 lies in [0, 0], which holds 0" in found["sampled", "bytes"].reason
    assert found["teacher_forced", "tokens"].value is not None


def test_a_single_document_has_values_but_no_interval_and_no_brier_lm() -> None:
    found = measure(subject(always(1, 2, 3, 4, 1), CYCLE[:1], LetterCodec(4)))
    first = found["sampled", "tokens", 1]
    assert first.value == 1 and first.low is first.high is first.confidence is None
    assert found["sampled", "tokens"].value is None and "no interval" in found["sampled", "tokens"].reason


# --- what is measured where


def test_a_model_without_likelihood_is_sampled_and_says_why_not_more() -> None:
    texts = [random_text(900, seed) for seed in range(6)]
    cell = subject(Patches(three_states()), texts, LetterCodec(3), likelihood=False)
    found = measure(cell, draws=8)
    exact = measure(subject(three_states(), texts, LetterCodec(3)))
    for n in range(1, 5):
        assert found["teacher_forced", "tokens", n].value is None
        assert "no likelihood" in found["teacher_forced", "tokens", n].reason
        sampled, expected = found["sampled", "tokens", n], exact["teacher_forced", "tokens", n].value
        assert sampled.low is not None and sampled.high is not None and expected is not None
        half = (sampled.high - sampled.low) / 2
        assert abs(sampled.value - expected) < 2 * half + 0.01
    assert found["teacher_forced", "tokens"].value is None


def test_places_are_aligned_seeded_and_preceded_by_their_context() -> None:
    documents = heldout_documents(
        subject(always(1, 1), [random_text(90, 0), random_text(50, 1)], LetterCodec(3)).corpus,
        LetterCodec(3),
        10**5,
        10**5,
    )
    everything = find_places(documents, 16, 10**6)
    lengths = [len(document.tokens) for document in documents]
    assert len(everything.truth) == sum((length - 4 - 16) // 8 + 1 for length in lengths)
    for context, truth, index in zip(everything.contexts, everything.truth, everything.document, strict=True):
        text = documents[index].tokens
        begins = range(16, len(text) - 3, 8)
        assert any(torch.equal(text[s - 16 : s], context) and torch.equal(text[s : s + 4], truth) for s in begins)
    few = find_places(documents, 16, 5)
    assert len(few.truth) == 5
    assert torch.equal(few.contexts, find_places(documents, 16, 5).contexts)


def test_the_seed_of_a_cell_moves_the_draws_and_not_the_places() -> None:
    def values(seed: int, estimator: str) -> list[float | None]:
        cell = subject(tiny_transformer(4), [random_text(300, s) for s in range(3)], LetterCodec(3), seed=seed)
        found = measure(cell, positions=40)
        return [found[estimator, "tokens", n].value for n in range(1, 5)]

    assert values(0, "sampled") == values(0, "sampled") != values(1, "sampled")
    assert values(0, "teacher_forced")[0] == pytest.approx(values(1, "teacher_forced")[0])  # exact for n = 1


def test_the_context_is_half_the_window_unless_set_and_is_printed() -> None:
    cell = subject(tiny_transformer(4), [random_text(300, seed) for seed in range(3)], LetterCodec(3), context=48)
    default = measure(cell, positions=20)["sampled", "tokens", 2]
    assert default.at == {"n": 2, "estimator": "sampled", "window": "tokens", "context": 24}
    assert "contexts of 24 to 24 tokens" in default.protocol and "20 places" in default.protocol
    assert measure(cell, positions=20, context=8)["sampled", "tokens", 2].at["context"] == 8


def test_bytes_of_a_larger_vocabulary_are_sampled_only() -> None:
    text = "the cat sat on the mat and the dog sat on the log. "
    bpe = train_bpe([Document("t", text.encode() * 20)], 270)
    table = torch.full((270, 270), 1e-4)
    table[:, 1:5] = 1
    cell = subject(Chain(table / table.sum(dim=1, keepdim=True)), [text.encode() * k for k in (6, 7, 8)], bpe)
    found = measure(cell, positions=50)
    assert found["teacher_forced", "tokens", 1].value is not None
    assert found["teacher_forced", "bytes", 1].value is None
    assert "sums over all ways" in found["teacher_forced", "bytes"].reason
    assert found["sampled", "bytes", 4].value is not None


def test_symbols_are_the_first_bytes_of_the_text_and_the_boundary_is_one_of_its_own() -> None:
    text = "the cat sat on the mat. héé "
    bpe = train_bpe([Document("t", (text * 20).encode())], 270)
    tokens = bpe.encode(text.encode()).astype(np.int64)
    lengths = bpe.token_bytes()[tokens]
    assert lengths.max() > 1
    symbols = Symbols(bpe)
    for start in range(len(tokens) - 3):
        begin = lengths[:start].sum()
        found = symbols(tokens[None, start : start + 4])
        assert bytes(found[0].tolist()) == text.encode()[begin : begin + 4]
    assert symbols(np.array([[0, 0, 0, 0]])).tolist() == [[256] * 4]
    long = int(np.argmax(bpe.token_bytes() == 2))
    assert symbols(np.array([[[0, long, 0, 0]]])).tolist() == [[[256, *bpe.decode(np.array([long])), 256]]]


@pytest.mark.parametrize(
    ("traits", "settings", "reason"),
    [
        ({"stride": 16}, {"context": 8}, "not a multiple of the model's stride 16"),
        ({"context_limit": 11}, {"context": 8}, "context limit is 11 tokens"),
        ({}, {"context": 800}, "no held-out document has 800"),
    ],
)
def test_what_cannot_be_measured_has_its_reason(traits: dict[str, Any], settings: dict[str, Any], reason: str) -> None:
    found = measure(subject(tiny_transformer(5), CYCLE, LetterCodec(4), **traits), **settings)
    assert len(found) == 20
    assert all(entry.value is None and reason in entry.reason for entry in found.values())


def test_a_context_limit_that_just_suffices() -> None:
    cell = subject(tiny_transformer(5, max_context=12), CYCLE, LetterCodec(4), context_limit=12)
    assert measure(cell, context=8)["sampled", "tokens", 4].value is not None


@pytest.mark.parametrize("bad", [{"draws": 1}, {"context": 12}, {"windows": ("words",)}, {"estimators": ()}])
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"brier_lm.{next(iter(bad))}"):
        BrierSettings(**bad)


def test_contexts_vary_in_length_so_that_no_segment_border_is_asked_alone():
    """A model that works in segments of 64 has no local context at a border; 128 tokens end at one."""
    assert phases_of(128) == 8
    assert [128 - ALIGNMENT * phase for phase in range(phases_of(128))] == [128, 120, 112, 104, 96, 88, 80, 72]
    assert phases_of(24) == 1
    assert phases_of(0) == 1
