"""The autoencoder metric on codes whose quality is known by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from archbench import registry
from archbench.codec import ByteCodec
from archbench.data.corpus import Corpus
from archbench.data.document import Document
from archbench.errors import ConfigError, UnsupportedError
from archbench.history import History
from archbench.metric import Measurement, Subject
from archbench.metrics.autoencoder import METRIC, AutoencoderSettings
from archbench.model import Emission, FlopFormulas, Phase, Reconstruction, SequenceModel, Traits
from archbench.sampling import Sampling
from archbench.state import State
from tests.tiny_subject import built

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Scale(SequenceModel, Reconstruction):
    """Pairs of bytes coded as two numbers, their values times `spread`; a third number says nothing. Decoding takes the
    nearest byte, so noise of s gets a byte wrong with probability P(|s e| > spread / 2)."""

    def __init__(self, spread: float, sigma: float) -> None:
        super().__init__()
        self.vocab_size = 256
        self.spread, self.sigma = spread, sigma
        self.register_buffer("place", torch.arange(256.0))

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        pairs = tokens.float().unflatten(1, (-1, 2)) * self.spread
        mean = torch.cat([pairs, torch.zeros_like(pairs[..., :1])], dim=-1)
        sigma = torch.full_like(mean, self.sigma)
        sigma[..., 2] = 1.0
        return mean, sigma

    def reconstruct(self, latent: Tensor) -> Tensor:
        numbers = latent[..., :2].flatten(1)
        return -(numbers[..., None] - self.spread * self.get_buffer("place")).abs()

    def phases(self) -> list[Phase]:
        raise NotImplementedError("not needed here")

    def initial_state(self, batch_size: int) -> State:
        raise NotImplementedError("not needed here")

    def prefill(self, tokens: Tensor, state: State) -> State:
        raise NotImplementedError("not needed here")

    def decode_step(self, state: State, sampling: Sampling, generator: torch.Generator | None) -> Emission:
        raise NotImplementedError("not needed here")

    def flops(self) -> FlopFormulas:
        raise NotImplementedError("not needed here")


def subject(model: SequenceModel, texts: list[bytes], stride: int = 2) -> Subject:
    documents = tuple(Document(f"text{i}", text) for i, text in enumerate(texts))
    return Subject(
        label="tiny",
        architecture="none",
        config=None,
        model=model.eval(),
        traits=Traits(likelihood=False, stride=stride, reconstruction=True),
        codec=ByteCodec(),
        corpus=Corpus(name="made up", train=(), heldout=documents, sha256=""),
        history=History(),
        context=16,
        batch=2,
        seed=0,
        folder=Path(),
    )


def texts(n: int = 6, length: int = 2001) -> list[bytes]:
    draws = torch.Generator().manual_seed(0)
    return [bytes(torch.randint(1, 128, (length,), generator=draws).tolist()) for _ in range(n)]


def measured(model: SequenceModel, **settings: object) -> dict[tuple[str, str], Measurement]:
    found = METRIC.measure(subject(model, texts()), AutoencoderSettings(**settings))
    return {(m.quantity, m.at.get("code", "")): m for m in found}


def right(noise: float, spread: float) -> float:
    """P(|noise e| < spread / 2)."""
    return torch.erf(torch.tensor(spread / 2 / noise / 2**0.5)).item()


@pytest.mark.parametrize(("spread", "sigma"), [(1.0, 0.3), (0.5, 0.4), (10.0, 0.01)])
def test_accuracies_are_those_of_the_noise(spread: float, sigma: float) -> None:
    found = measured(Scale(spread, sigma), noise=0.2)
    assert found["token_accuracy", "mean"].value == found["chunk_accuracy", "mean"].value == 1.0
    for code, noise in (("sampled", sigma), ("robust", 0.2)):
        expected = right(noise, spread)
        assert found["token_accuracy", code].value == pytest.approx(expected, abs=0.015)
        assert found["chunk_accuracy", code].value == pytest.approx(expected**2, abs=0.02)


def test_sigma_and_collapsed_dimensions_are_counted() -> None:
    found = measured(Scale(1.0, 0.3))
    assert found["posterior_sigma", ""].value == pytest.approx((0.3 + 0.3 + 1.0) / 3, rel=1e-6)
    assert found["collapsed_dimensions", ""].value == 1, "the third number is the prior"
    assert found["collapsed_dimensions", ""].low == found["collapsed_dimensions", ""].high == 1


def test_intervals_hold_the_value_and_come_from_documents() -> None:
    found = measured(Scale(1.0, 0.5))
    for key, measurement in found.items():
        assert measurement.low is not None and measurement.high is not None, key
        assert measurement.value is not None
        assert measurement.low <= measurement.value <= measurement.high
        assert measurement.confidence == 0.95
    accuracy = found["token_accuracy", "sampled"]
    assert len(accuracy.samples) == 6
    assert accuracy.low is not None and accuracy.low < accuracy.high
    assert "6,000 chunks of 2 tokens in 6 held-out documents" in accuracy.protocol
    assert {quantity for quantity, _ in found} == set(METRIC.quantities)


def test_batches_make_no_difference_to_the_mean_s_accuracy() -> None:
    class Lossy(Scale):
        def reconstruct(self, latent: Tensor) -> Tensor:
            return super().reconstruct(latent.round())

    whole, pieces = (measured(Lossy(0.4, 0.1), codes=("mean",), batch=batch) for batch in (4096, 7))
    assert set(whole) == {(q, "mean") for q in ("token_accuracy", "chunk_accuracy")} | {
        (q, "") for q in ("posterior_sigma", "collapsed_dimensions")
    }
    for key in whole:
        assert whole[key].value == pytest.approx(pieces[key].value, rel=1e-6)
    accuracy = whole["token_accuracy", "mean"].value
    assert accuracy is not None and 0.2 < accuracy < 0.9


def test_the_same_seed_gives_the_same_figures() -> None:
    first, second = measured(Scale(1.0, 0.5)), measured(Scale(1.0, 0.5))
    assert [m.value for m in first.values()] == [m.value for m in second.values()]


def test_what_is_no_whole_chunk_is_not_looked_at() -> None:
    model = Scale(1.0, 0.1)
    found = {m.quantity: m for m in METRIC.measure(subject(model, [b"abcde", b"xyz"]), AutoencoderSettings())}
    assert "3 chunks of 2 tokens in 2 held-out documents" in found["chunk_accuracy"].protocol
    with pytest.raises(UnsupportedError, match="no held-out document has a chunk of 8 tokens"):
        list(METRIC.measure(subject(model, [b"abcde", b"xyz"], stride=8), AutoencoderSettings()))


def test_models_without_a_code_are_told_why() -> None:
    settings = AutoencoderSettings()
    reason = METRIC.cannot(Traits(likelihood=True), settings)
    assert reason == "this model has no latent code: it writes tokens directly"
    assert METRIC.cannot(Traits(likelihood=False, reconstruction=True), settings) is None
    with pytest.raises(UnsupportedError, match="no latent code"):
        list(METRIC.measure(built("transformer", d_model=32, n_layers=1, n_heads=1), settings))


def test_it_measures_every_architecture_that_has_a_code() -> None:
    """Untrained codes reconstruct next to nothing, and are measured like any other."""
    measured_some = False
    for name in registry.architectures():
        architecture = registry.architecture(name)
        config = next(iter(architecture.candidates(256)), None)
        if config is None or not architecture.traits(config).reconstruction:
            continue
        model = architecture.build(config, torch.Generator().manual_seed(0))
        found = METRIC.measure(subject(model, texts(2, 203), architecture.traits(config).stride), AutoencoderSettings())
        values = {(m.quantity, m.at.get("code")): m.value for m in found}
        assert len(values) == 8
        accuracy = values["token_accuracy", "sampled"]
        assert accuracy is not None and 0 <= accuracy < 0.5
        measured_some = True
    assert measured_some


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codes": ("sampled", "best")}, r"codes: \['best'\]; allowed: sampled, mean, robust"),
        ({"codes": ()}, "codes: empty"),
        ({"noise": 0.0}, "noise: 0.0; must be above 0"),
        ({"batch": 0}, "batch: 0; must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderSettings(**settings)
