"""The model of sequences: two training problems, reading chunk by chunk, and writing K tokens a step.

Letters: b batch, t time (tokens), c chunks, k tokens of a chunk, d width, l latent width, n draws, v vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.architectures.calm import temperature
from archbench.architectures.calm.autoencoder import Autoencoder
from archbench.architectures.calm.backbone import ContinuousLM
from archbench.architectures.calm.config import CalmConfig
from archbench.architectures.calm.heads import Noise
from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import aligned
from archbench.layers import KVCache
from archbench.model import (
    BOUNDARY,
    Batch,
    Emission,
    FlopFormulas,
    Loss,
    ParameterGroup,
    Phase,
    Reconstruction,
    SequenceModel,
    decay_groups,
)
from archbench.ops.precision import without_autocast
from archbench.sampling import Sampling

MAX_LOGITS = 2**24
"""Most logits held at once while drawing (64 MB of fp32)."""

GREEDY_SEED = 0
"""Temperature 0 looks at the same noise at every step and in every row, so that it needs no generator."""


class CalmState(NamedTuple):
    """`pending` is the last chunk of each row: part of the text, not yet seen by the layers."""

    pending: Int[Tensor, "b k"]
    layers: tuple[KVCache, ...]


class Calm(SequenceModel, Reconstruction):
    """State: one key-value cache a layer, with a position per chunk."""

    prefill_chunk = 4096
    """Longest stretch of tokens read in one pass; a multiple of every chunk size."""

    def __init__(self, config: CalmConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.autoencoder = Autoencoder(config, generator)
        self.lm = ContinuousLM(config, generator)
        self.train()

    def train(self, mode: bool = True) -> Calm:
        """The autoencoder stays in evaluation mode: it is trained by a loss that does its own dropping, and otherwise
        frozen."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    # Reading

    def initial_state(self, batch_size: int) -> CalmState:
        shape = (batch_size, self.config.chunk_size)
        pending = torch.full(shape, BOUNDARY, dtype=torch.long, device=self.device)
        return CalmState(pending, self.lm.initial_layers(batch_size))

    def prefill(self, tokens: Int[Tensor, "b t"], state: CalmState) -> CalmState:
        """Raises ConfigError when t is no multiple of K."""
        chunks = self._chunked(tokens)
        step = self.prefill_chunk // self.config.chunk_size
        for piece in chunks.split(step, dim=1) if chunks.shape[1] else ():
            inputs = torch.cat([state.pending[:, None], piece[:, :-1]], dim=1)
            _, layers = self._read(inputs, state.layers)
            state = CalmState(piece[:, -1].clone(), layers)
        return state

    def _chunked(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b c k"]:
        b, t = tokens.shape
        k = self.config.chunk_size
        if t % k:
            raise ConfigError(
                f"calm: {t} tokens are no whole chunks of {k}; put boundaries in front (archbench.generation.aligned) "
                "or cut the text"
            )
        return tokens.reshape(b, t // k, k)

    def _read(
        self, chunks: Int[Tensor, "b c k"], layers: tuple[KVCache, ...]
    ) -> tuple[Float[Tensor, "b c d"], tuple[KVCache, ...]]:
        latents = self._frozen_codes(chunks)[0] if self.lm.reads_latents else None
        return self.lm(chunks, latents, layers)

    # The latent code

    def posterior(self, tokens: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b c l"], Float[Tensor, "b c l"]]:
        """Raises ConfigError when t is no multiple of K."""
        chunks = self._chunked(tokens)
        mean, log_sigma = self.autoencoder.encode(chunks.flatten(0, 1))
        return mean.unflatten(0, chunks.shape[:2]), log_sigma.exp().unflatten(0, chunks.shape[:2])

    def reconstruct(self, latent: Float[Tensor, "b c l"]) -> Float[Tensor, "b t v"]:
        logits = self.autoencoder.decode(latent.flatten(0, 1))
        return logits.unflatten(0, latent.shape[:2]).flatten(1, 2)

    @torch.no_grad()
    def _frozen_codes(self, chunks: Int[Tensor, "b c k"]) -> tuple[Float[Tensor, "b c l"], Float[Tensor, "b c l"]]:
        """Mean and standard deviation as the language model sees them: without gradient, in full precision."""
        with without_autocast(chunks):
            return self.posterior(chunks.flatten(1))

    # Training

    def phases(self) -> list[Phase]:
        share, config = self.config.autoencoder_share, self.config
        return [
            Phase(
                name="autoencoder",
                share=share,
                groups=_scaled(self.autoencoder, config.autoencoder_lr_scale),
                loss=self.autoencoder_loss,
            ),
            Phase(
                name=config.head,
                share=1 - share,
                groups=_scaled(self.lm, config.lm_lr_scale),
                loss=self.latent_loss,
            ),
        ]

    def window(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b c k"]:
        """A training window as chunks, the first of which is only read: boundaries and the rest of t mod K tokens.

        So a window of context + 1 tokens has the next-token targets of any other architecture, and a text's beginning,
        which `aligned` fills up in the same way, is nothing new.

        Raises:
            ConfigError: there is no chunk to predict.
        """
        chunks = self._chunked(aligned(tokens, self.config.chunk_size))
        if chunks.shape[1] < 2:
            raise ConfigError(
                f"calm: a window of {tokens.shape[1]} tokens has no chunk of {self.config.chunk_size} to predict; "
                "raise training.context"
            )
        return chunks

    def autoencoder_loss(self, batch: Batch) -> Loss:
        """Phase 1, on the chunks that phase 2 predicts."""
        chunks = self.window(batch.tokens)[:, 1:].flatten(0, 1)
        found = self.autoencoder.loss(chunks, batch.generator)
        return Loss(found.loss, found._asdict() | {"loss": found.loss.detach()})

    def latent_loss(self, batch: Batch) -> Loss:
        """Phase 2: the head's loss at the frozen posterior of each next chunk."""
        chunks = self.window(batch.tokens)
        hidden, _ = self._read(chunks[:, :-1], self.lm.initial_layers(len(chunks)))
        mean, sigma = self._frozen_codes(chunks[:, 1:])
        return self.lm.head.loss(hidden.flatten(0, 1), mean.flatten(0, 1), sigma.flatten(0, 1), batch.generator)

    # Writing

    def decode_step(self, state: CalmState, sampling: Sampling, generator: Generator | None) -> Emission:
        """Writes one chunk.

        At temperature 1 that is one draw. Below, see `temperature`. At 0 it is the most frequent of `n_candidates`
        draws from noise that is fixed once and for all: the limit of the batch method.

        Raises:
            UnsupportedError: top-k or top-p, a temperature above 1, one that the method cannot have, or too many draws.
        """
        hidden, layers = self._read(state.pending[:, None], state.layers)
        tokens = self._write(hidden[:, 0], sampling, generator)
        counts = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        return Emission(tokens, counts, CalmState(tokens, layers))

    def _write(
        self, hidden: Float[Tensor, "b d"], sampling: Sampling, generator: Generator | None
    ) -> Int[Tensor, "b k"]:
        _require_supported(sampling)
        if sampling.greedy:
            fixed = Generator("cpu" if hidden.is_meta else hidden.device).manual_seed(GREEDY_SEED)
            drawn = self._draw(hidden, self.config.n_candidates, Noise(fixed, shared=True))
            return temperature.most_frequent(drawn)
        assert generator is not None, "sampling needs a generator: no global random state is used"
        noise = Noise(generator)
        if sampling.temperature == 1:
            return self._draw(hidden, 1, noise)[:, 0]
        if self.config.temperature_method == "batch":
            return temperature.batch(
                lambda: self._draw(hidden, self.config.n_candidates, noise), sampling.temperature, generator
            )
        tokens, _ = temperature.exact(
            lambda rows, n: self._draw(hidden[rows], n, noise),
            len(hidden),
            sampling.temperature,
            self.config.max_draws,
            generator,
            hidden.device,
        )
        return tokens

    def _draw(self, hidden: Float[Tensor, "b d"], n: int, noise: Noise) -> Int[Tensor, "b n k"]:
        """n independent next chunks of each row."""
        latents = self.lm.head.sample(hidden, n, noise).flatten(0, 1)
        step = max(1, MAX_LOGITS // (self.config.chunk_size * self.vocab_size))
        chunks = [self.autoencoder.decode(piece).argmax(dim=-1) for piece in latents.split(step)]
        return torch.cat(chunks).unflatten(0, (len(hidden), n))

    def flops(self) -> FlopFormulas:
        return CalmFlops(self)

    def lasting(self, state: CalmState) -> tuple[Any, ...]:
        return tuple(cache.valid() for cache in state.layers)


class CalmFlops(FlopFormulas):
    """Formulas in tokens, of work done in chunks."""

    def __init__(self, model: Calm) -> None:
        self.model, self.config = model, model.config

    def training(self, context: int, causal: float = 0.5) -> float:
        lm, autoencoder, share = self.model.lm, self.model.autoencoder, self.config.autoencoder_share
        n = -(-(context + 1) // self.config.chunk_size) - 1
        first = 3 * (autoencoder.encoder_flops(n) + autoencoder.decoder_flops(n))
        second = lm.flops(n, 0, causal, passes=3) + lm.head.training_flops(n) + autoencoder.encoder_flops(n)
        return share * first + (1 - share) * (second + self._inputs(n))

    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        chunks, before = n // self.config.chunk_size, context // self.config.chunk_size
        return self.model.lm.flops(chunks, before, causal, passes=1) + self._inputs(chunks)

    def decode(self, context: int) -> float:
        """One chunk at temperature 1."""
        lm, before = self.model.lm, context // self.config.chunk_size
        written = lm.head.sampling_flops(1) + self.model.autoencoder.decoder_flops(1)
        return lm.flops(1, before, 1.0, passes=1) + self._inputs(1) + written

    def further_draw(self) -> float:
        """What depends on the hidden vector alone is computed once a step."""
        return self.model.lm.head.further_flops(1) + self.model.autoencoder.decoder_flops(1)

    def _inputs(self, n: int) -> float:
        """Encoding what is read, where the backbone reads latents."""
        return self.model.autoencoder.encoder_flops(n) if self.model.lm.reads_latents else 0.0


def _scaled(module: nn.Module, lr_scale: float) -> list[ParameterGroup]:
    return [replace(group, lr_scale=lr_scale) for group in decay_groups(module)]


def _require_supported(sampling: Sampling) -> None:
    if sampling.top_k is not None or sampling.top_p is not None:
        raise UnsupportedError(
            "calm: top_k and top_p cut off unlikely tokens, and this model gives no probabilities; leave them out"
        )
    if sampling.temperature > 1:
        raise UnsupportedError(
            f"calm: temperature {sampling.temperature:g}; without probabilities a law can only be sharpened: at most 1"
        )
