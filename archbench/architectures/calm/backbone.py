"""The continuous language model: a causal Transformer over chunks, read in as tokens, with a head that draws.

    u_i = LN( W2 silu(W1 [E x_1; ...; E x_K]) )        of chunk i; E is not the autoencoder's table
    h   = Transformer(u)                               positions count chunks
    z_{i+1} ~ head(h_i)

Reading back tokens and not latents is what the paper found best; `inputs` can have the latent's mean through one matrix
instead, or both added (the ablation of table 5).

Source: Shao et al. 2025, section 3.

Letters: b batch, c chunks, k tokens of a chunk, d width, l latent width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.architectures.calm.config import CalmConfig
from archbench.architectures.calm.diffusion import DiffusionHead
from archbench.architectures.calm.flow import FlowHead
from archbench.architectures.calm.heads import EnergyHead, Head
from archbench.architectures.calm.parts import Affine, layer_norm
from archbench.architectures.transformer import Block, TransformerConfig
from archbench.layers import Embedding, KVCache, RMSNorm, Stack, empty_cache, rotary_angles
from archbench.ops.decode import decoders
from archbench.ops.decode_weights import DecoderWeights

HEADS: Mapping[str, type[EnergyHead | DiffusionHead | FlowHead]] = {
    "energy": EnergyHead,
    "diffusion": DiffusionHead,
    "flow": FlowHead,
}


class TokenInputs(nn.Module):
    """A chunk's tokens as one vector."""

    def __init__(self, config: CalmConfig, generator: Generator | None) -> None:
        super().__init__()
        d = config.d_model
        self.embedding = Embedding(config.vocab_size, d, std=1.0, generator=generator)
        self.squeeze = Affine(config.chunk_size * d, 2 * d, generator=generator)
        self.out = Affine(2 * d, d, generator=generator)
        self.norm = layer_norm(d)

    def forward(self, chunks: Int[Tensor, "b c k"]) -> Float[Tensor, "b c d"]:
        return self.norm(self.out(F.silu(self.squeeze(self.embedding(chunks).flatten(2)))))

    def flops(self, n: int) -> int:
        return self.squeeze.flops(n) + self.out.flops(n)


class ContinuousLM(nn.Module):
    """Inputs, backbone and head."""

    def __init__(self, config: CalmConfig, generator: Generator | None) -> None:
        super().__init__()
        self.backbone_config = backbone = TransformerConfig(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            d_ffn=config.d_ffn,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
        )
        tokens, latent = config.inputs != "latent", config.inputs != "discrete"
        self.from_tokens = TokenInputs(config, generator) if tokens else None
        self.from_latent = Affine(config.latent_width, config.d_model, generator=generator) if latent else None
        self.blocks: Stack[Block] = Stack(Block(backbone, generator) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head: Head = HEADS[config.head](config, generator)
        self.decoders = decoders()

    @property
    def reads_latents(self) -> bool:
        return self.from_latent is not None

    def initial_layers(self, batch_size: int) -> tuple[KVCache, ...]:
        weight, config = self.norm.weight, self.backbone_config
        make = partial(empty_cache, batch_size, config.kv_heads, config.head_dim)
        return tuple(make(device=weight.device, dtype=weight.dtype) for _ in self.blocks)

    def forward(
        self,
        chunks: Int[Tensor, "b c k"],
        latents: Float[Tensor, "b c l"] | None,
        layers: tuple[KVCache, ...],
    ) -> tuple[Float[Tensor, "b c d"], tuple[KVCache, ...]]:
        """The hidden vector after each chunk. `latents` are wanted when `reads_latents`. Gives up `layers`."""
        read = []
        if self.from_tokens is not None:
            read.append(self.from_tokens(chunks))
        if self.from_latent is not None:
            assert latents is not None
            read.append(self.from_latent(latents))
        x, config = sum(read[1:], start=read[0]), self.backbone_config
        decoder = self.decoders.serving(self, chunks.shape[1], self._weights)
        if decoder is not None:
            found = decoder.read(chunks[:, :, 0], layers, layers[0].length, embedded=x, logits=False)
            return self.norm(found.stream), found.caches
        angles = rotary_angles(layers[0].length, chunks.shape[1], config.head_dim, config.rope_theta, x.device)
        caches = []
        for block, cache in zip(self.blocks, layers, strict=True):
            x, cache = block(x, angles, cache)
            caches.append(cache)
        return self.norm(x), tuple(caches)

    def _weights(self) -> DecoderWeights:
        """What a decode step needs of the blocks. It looks no token up and predicts none, so any matrix stands in."""
        config, no_table = self.backbone_config, self.norm.weight[None]
        return DecoderWeights(
            embedding=no_table,
            blocks=tuple(block.weights() for block in self.blocks),
            norm=self.norm.weight,
            unembedding=no_table,
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            eps=config.norm_eps,
            angles=partial(
                rotary_angles, head_dim=config.head_dim, theta=config.rope_theta, device=torch.device("cpu")
            ),
        )

    def flops(self, n: int, context: int, causal: float, passes: int) -> float:
        """Reading n chunks after `context` chunks, without the head: forward only, or 3 passes with the backward one.
        The latents' matrix has an input without gradient: at most 2 passes."""
        tokens = self.from_tokens.flops(n) if self.from_tokens is not None else 0
        latents = self.from_latent.flops(n) if self.from_latent is not None else 0
        blocks = sum(block.flops(n, context, causal) for block in self.blocks)
        return passes * (tokens + blocks) + min(passes, 2) * latents
