"""The autoencoder: a chunk of K tokens becomes one Gaussian vector and comes back, each chunk by itself.

    encoder   E x -> block -> flatten, squeeze (K d -> d) -> block -> norm -> (mu, ln sigma)
    decoder   z -> widen (l -> d) -> block -> expand (d -> K d) -> block at each place -> norm -> E^T

A block is x + W2( silu(W1 N(x)) * W3 N(x) ); E is one table for both ends. There is no attention and no position but
what squeeze and expand know. The latent is made robust for a model that will draw it, not predict it exactly:

    z     = dropped( mu + sigma eps ) of the chunk with tokens dropped to 0;  targets are the whole tokens
    loss  = K CE + beta mean over chunks( sum_i max(lambda, KL_i) )     KL_i = (mu_i^2 + sigma_i^2 - 1)/2 - ln sigma_i

Without the floor lambda many dimensions collapse to noise; without KL and dropping, reconstruction is better and the
language model cannot be trained on the latents.

Source: Shao et al. 2025, section 2. Departures: initial weights (see parts); token 0, the boundary, stands for a
dropped token, which the official code does with whatever token has id 0.

Letters: n chunks, k tokens of a chunk, d width, l latent width, v vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.architectures.calm.config import CalmConfig
from archbench.architectures.calm.parts import Affine
from archbench.layers import Embedding, RMSNorm, Stack, SwiGLU
from archbench.model import BOUNDARY
from archbench.ops.cross_entropy import cross_entropy


class Reconstructed(NamedTuple):
    """What one training step of the autoencoder found; scalars. `loss` and `cross_entropy` (per token) in nats."""

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    sigma: Float[Tensor, ""]


class Block(nn.Module):
    """A residual gated feed-forward."""

    def __init__(self, config: CalmConfig, generator: Generator | None) -> None:
        super().__init__()
        width, inner = config.autoencoder_width, config.autoencoder_ffn_width
        self.norm = RMSNorm(width, config.norm_eps)
        self.ffn = SwiGLU(width, inner, out_std=inner**-0.5, generator=generator)

    def forward(self, x: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
        return x + self.ffn(self.norm(x))


class Autoencoder(nn.Module):
    """Its behaviour does not depend on training mode: what is dropped in training is dropped by `loss`."""

    def __init__(self, config: CalmConfig, generator: Generator | None) -> None:
        super().__init__()
        self.config = config
        width, latent, chunk = config.autoencoder_width, config.latent_width, config.chunk_size
        half = config.n_autoencoder_blocks // 2

        def blocks() -> Stack[Block]:
            return Stack(Block(config, generator) for _ in range(half))

        self.embedding = Embedding(config.vocab_size, width, std=0.3 * width**-0.5, generator=generator)
        self.encoder_tokens = blocks()
        self.squeeze = Affine(chunk * width, width, generator=generator)
        self.encoder_chunk = blocks()
        self.encoder_norm = RMSNorm(width, config.norm_eps)
        self.to_latent = Affine(width, 2 * latent, generator=generator)
        self.from_latent = Affine(latent, width, generator=generator)
        self.decoder_chunk = blocks()
        self.expand = Affine(width, chunk * width, generator=generator)
        self.decoder_tokens = blocks()
        self.decoder_norm = RMSNorm(width, config.norm_eps)

    def encode(self, chunks: Int[Tensor, "n k"]) -> tuple[Float[Tensor, "n l"], Float[Tensor, "n l"]]:
        """Mean and log standard deviation of each chunk's latent, fp32."""
        x = self.embedding(chunks)
        for block in self.encoder_tokens:
            x = block(x)
        x = self.squeeze(x.flatten(1))[:, None]
        for block in self.encoder_chunk:
            x = block(x)
        mean, log_sigma = self.to_latent(self.encoder_norm(x[:, 0])).float().chunk(2, dim=-1)
        return mean, log_sigma

    def decode(self, latent: Float[Tensor, "n l"]) -> Float[Tensor, "n k v"]:
        """Logits of each chunk's tokens."""
        x = self.from_latent(latent)[:, None]
        for block in self.decoder_chunk:
            x = block(x)
        x = self.expand(x).view(len(latent), self.config.chunk_size, -1)
        for block in self.decoder_tokens:
            x = block(x)
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def loss(self, chunks: Int[Tensor, "n k"], generator: Generator) -> Reconstructed:
        """Of reconstructing chunks from dropped tokens through a drawn and dropped latent."""
        kept = 1 - self.config.dropout
        device = chunks.device
        seen = torch.rand(chunks.shape, generator=generator, device=device) < kept
        mean, log_sigma = self.encode(torch.where(seen, chunks, BOUNDARY))
        sigma = log_sigma.exp()
        latent = mean + sigma * torch.randn(mean.shape, generator=generator, device=device)
        kept_latent = torch.rand(latent.shape, generator=generator, device=device) < kept
        logits = self.decode(latent * kept_latent / kept)
        nats = cross_entropy(logits, chunks)
        kl = kl_divergence(mean, log_sigma)
        loss = chunks.shape[1] * nats + self.config.kl_weight * clipped(kl, self.config.kl_floor)
        accuracy = (logits.detach().argmax(dim=-1) == chunks).float().mean()
        found = (nats, accuracy, kl.sum(dim=-1).mean(), sigma.mean())
        return Reconstructed(loss, *(part.detach() for part in found))

    def encoder_flops(self, n: int) -> float:
        """Of encoding n chunks."""
        chunk = self.config.chunk_size
        blocks = _flops(self.encoder_tokens, n * chunk) + _flops(self.encoder_chunk, n)
        return blocks + self.squeeze.flops(n) + self.to_latent.flops(n)

    def decoder_flops(self, n: int) -> float:
        """Of decoding n latents into logits."""
        chunk = self.config.chunk_size
        logits = 2 * n * chunk * self.embedding.weight.numel()
        blocks = _flops(self.decoder_chunk, n) + _flops(self.decoder_tokens, n * chunk)
        return logits + blocks + self.from_latent.flops(n) + self.expand.flops(n)


def kl_divergence(mean: Float[Tensor, "n l"], log_sigma: Float[Tensor, "n l"]) -> Float[Tensor, "n l"]:
    """KL divergence in nats of N(mean, sigma^2) from N(0, 1), by dimension."""
    return 0.5 * (mean.square() + (2 * log_sigma).exp() - 1) - log_sigma


def clipped(kl: Float[Tensor, "n l"], floor: float) -> Float[Tensor, ""]:
    """Mean over chunks of the sum over dimensions of max(floor, KL): below the floor there is no gradient.

    Source: Shao et al. 2025, eq. 4. The maximum is taken for each chunk and dimension, before any mean.
    """
    return kl.clamp(min=floor).sum(dim=-1).mean()


def _flops(blocks: Stack[Block], n: int) -> int:
    return sum(block.ffn.flops(n) for block in blocks)
