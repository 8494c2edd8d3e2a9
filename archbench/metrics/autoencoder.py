"""How well a latent code carries its text: reconstruction of held-out text, and whether the code is used.

A model that writes through a latent code cannot be better than its code: a token that does not survive encoding and
decoding cannot be written on purpose. For a chunk x with posterior N(mu, sigma^2), three codes are decoded:

- `sampled`: mu + sigma e, as the models that learn the code see it;
- `mean`: mu, the best the code can do;
- `robust`: mu + 0.3 e, an error that a model's sample may have. A code that fails here is brittle: whoever is to learn
  it must hit it exactly.

Accuracy is the share of tokens, and of whole chunks, whose most likely reconstruction is the text itself. Good
accuracy alone is no good code. Two more figures say what it was bought with: the posterior's mean sigma (near 0: a
look-up table without order), and the collapsed dimensions, in which the posterior is the prior: those whose KL
divergence from N(0, 1) is below 0.1 nats in the mean over chunks.

Source: Shao et al. 2025, CALM, sections 2.2 and 7.3 (2510.27688).

Letters: c chunks, l latent width, k tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

from archbench import stats
from archbench.data.windows import HeldoutDocument, heldout_documents
from archbench.errors import ConfigError, UnsupportedError
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import Reconstruction, Traits

CODES = ("sampled", "mean", "robust")
COLLAPSED_NATS = 0.1
NO_RECONSTRUCTION = "this model has no latent code: it writes tokens directly"


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """`noise` is the standard deviation added to the mean for the robust code; `batch` the chunks encoded at once."""

    codes: tuple[str, ...] = CODES
    noise: float = 0.3
    max_bytes: int = 262_144
    max_document_bytes: int = 16_384
    batch: int = 1024

    def __post_init__(self) -> None:
        unknown = [code for code in self.codes if code not in CODES]
        if unknown or not self.codes:
            raise ConfigError(f"autoencoder.codes: {unknown or 'empty'}; allowed: {', '.join(CODES)}")
        if self.noise <= 0:
            raise ConfigError(f"autoencoder.noise: {self.noise}; must be above 0")
        if self.batch < 1:
            raise ConfigError(f"autoencoder.batch: {self.batch}; must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Of one document: how many chunks, tokens and chunks right by code, and sums of sigma and KL over its chunks."""

    chunks: int
    tokens_right: Mapping[str, int]
    chunks_right: Mapping[str, int]
    sigma: float
    kl: Float64[np.ndarray, " l"]


class AutoencoderMetric(Metric):
    name = "autoencoder"
    version = 1
    settings = AutoencoderSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "token_accuracy": Quantity(unit="fraction", better="higher", meaning="tokens that survive the latent code"),
        "chunk_accuracy": Quantity(unit="fraction", better="higher", meaning="whole chunks that survive it"),
        "posterior_sigma": Quantity(
            unit="latent", better="neither", meaning="mean standard deviation of a chunk's code; the prior has 1"
        ),
        "collapsed_dimensions": Quantity(
            unit="dimension", better="lower", meaning="dimensions of the code that say nothing of the text"
        ),
    }

    def cannot(self, traits: Traits, settings: AutoencoderSettings) -> str | None:
        del settings
        return None if traits.reconstruction else NO_RECONSTRUCTION

    def measure(self, subject: Subject, settings: AutoencoderSettings) -> Iterator[Measurement]:
        """Raises UnsupportedError for a model without a code or text without a chunk, DataError without text."""
        model, stride = subject.model, subject.traits.stride
        if not isinstance(model, Reconstruction):
            raise UnsupportedError(f"autoencoder: {NO_RECONSTRUCTION}")
        documents = heldout_documents(subject.corpus, subject.codec, settings.max_bytes, settings.max_document_bytes)
        generator = Generator(subject.model.device).manual_seed(subject.seed)
        whole = [document for document in documents if len(document.tokens) >= stride]
        if not whole:
            raise UnsupportedError(f"autoencoder: no held-out document has a chunk of {stride} tokens")
        surveys = [survey(model, document, stride, settings, generator) for document in whole]
        yield from _measurements(surveys, stride, settings)


@torch.no_grad()
def survey(
    model: Reconstruction, document: HeldoutDocument, stride: int, settings: AutoencoderSettings, generator: Generator
) -> Survey:
    """A document from its beginning, in whole chunks; what is left over at the end is not looked at."""
    chunks = len(document.tokens) // stride
    tokens_right, chunks_right = dict.fromkeys(settings.codes, 0), dict.fromkeys(settings.codes, 0)
    sigma_sum, kl_sum = 0.0, np.zeros(1)
    for piece in document.tokens[: chunks * stride].to(generator.device).split(settings.batch * stride):
        mean, sigma = (part[0].float() for part in model.posterior(piece[None]))
        for code in settings.codes:
            latent = encoded(code, mean, sigma, settings.noise, generator)
            written = model.reconstruct(latent[None])[0].argmax(dim=-1)
            right = (written == piece).view(-1, stride)
            tokens_right[code] += int(right.sum())
            chunks_right[code] += int(right.all(dim=1).sum())
        sigma_sum += float(sigma.mean(dim=1).double().sum())
        kl_sum = kl_sum + kl_from_prior(mean, sigma).double().sum(dim=0).cpu().numpy()
    return Survey(chunks=chunks, tokens_right=tokens_right, chunks_right=chunks_right, sigma=sigma_sum, kl=kl_sum)


def encoded(
    code: str, mean: Float[Tensor, "c l"], sigma: Float[Tensor, "c l"], noise: float, generator: Generator
) -> Float[Tensor, "c l"]:
    """One of the three codes of each chunk."""
    if code == "mean":
        return mean
    drawn = torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean + (sigma if code == "sampled" else noise) * drawn


def kl_from_prior(mean: Float[Tensor, "c l"], sigma: Float[Tensor, "c l"]) -> Float[Tensor, "c l"]:
    """KL divergence in nats of N(mean, sigma^2) from N(0, 1), by dimension."""
    return 0.5 * (mean.square() + sigma.square() - 1) - sigma.log()


def _measurements(surveys: Sequence[Survey], stride: int, settings: AutoencoderSettings) -> Iterator[Measurement]:
    chunks = np.array([found.chunks for found in surveys], dtype=np.float64)
    protocol = (
        f"{int(chunks.sum()):,} chunks of {stride} tokens in {len(surveys)} held-out documents; robust: the mean plus "
        f"noise of {settings.noise:g}; interval by bootstrap over documents"
    )
    for code in settings.codes:
        at = {"code": code}
        tokens = np.array([found.tokens_right[code] for found in surveys], dtype=np.float64)
        whole = np.array([found.chunks_right[code] for found in surveys], dtype=np.float64)
        yield _ratio("token_accuracy", tokens, chunks * stride, at, protocol)
        yield _ratio("chunk_accuracy", whole, chunks, at, protocol)
    sigma = np.array([found.sigma for found in surveys])
    yield _ratio("posterior_sigma", sigma, chunks, {}, protocol)
    kl = np.stack([found.kl for found in surveys])
    counts = (stats.resampled_ratios(kl, chunks) < COLLAPSED_NATS).sum(axis=1)
    interval = stats.percentile_interval(counts) if len(surveys) > 1 else None
    yield Measurement(
        quantity="collapsed_dimensions",
        value=float((kl.sum(axis=0) / chunks.sum() < COLLAPSED_NATS).sum()),
        low=interval and interval.low,
        high=interval and interval.high,
        confidence=interval and interval.confidence,
        protocol=f"{protocol}; {kl.shape[1]} dimensions, collapsed below {COLLAPSED_NATS} nats in the mean",
    )


def _ratio(
    quantity: str,
    numerators: Float64[np.ndarray, " n"],
    denominators: Float64[np.ndarray, " n"],
    at: Mapping[str, Any],
    protocol: str,
) -> Measurement:
    interval = stats.bootstrap_ratio(numerators, denominators)
    return Measurement(
        quantity=quantity,
        value=float(numerators.sum() / denominators.sum()),
        samples=(numerators / denominators).tolist(),
        low=interval and interval.low,
        high=interval and interval.high,
        confidence=interval and interval.confidence,
        at=at,
        protocol=protocol,
    )


METRIC = AutoencoderMetric()
