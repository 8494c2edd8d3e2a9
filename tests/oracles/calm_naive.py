"""CALM once more, slowly: one chunk, one sample, one number at a time, in Python floats (fp64).

Written from the paper's equations (Shao et al. 2025) and the layers of its official code; it shares no code with the
model and only reads its weights by name. The backbone's blocks are those of the naive Transformer.

    autoencoder   encode: E -> block -> squeeze -> block -> norm -> mu, ln sigma; decode: the mirror image     section 2
    inputs        LN( W2 silu(W1 [E x_1; ..; E x_K]) )                                                       section 3.1
    energy head   x_0 = LN(We e), y = LN(Wh h); blocks; Wz silu(Wo LN(x))                                    section 3.2
    energy loss   2 E|x - y|^a - E|x - x'|^a over ordered pairs                                             eq. 9 and 10
    denoiser      x + gate MLP( LN(x)(1 + scale) + shift ), modulated by Wh h + MLP(time)                    section 7.4
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.oracles import transformer_naive
from tests.oracles.transformer_naive import Matrix, Vector, add, norm, times


def floats(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.double().tolist() for name, tensor in weights.items()}


def encode(w: Mapping[str, Any], config: Any, chunk: Sequence[int]) -> tuple[Vector, Vector]:
    """Mean and log standard deviation of one chunk's latent."""
    half = config.n_autoencoder_blocks // 2
    flat: Vector = []
    for token in chunk:
        x = list(w["autoencoder.embedding.weight"][token])
        for i in range(half):
            x = residual(w, f"autoencoder.encoder_tokens.{i}", config, x)
        flat += x
    x = affine(w, "autoencoder.squeeze", flat)
    for i in range(half):
        x = residual(w, f"autoencoder.encoder_chunk.{i}", config, x)
    both = affine(w, "autoencoder.to_latent", norm(w["autoencoder.encoder_norm.weight"], x, config.norm_eps))
    return both[: len(both) // 2], both[len(both) // 2 :]


def decode(w: Mapping[str, Any], config: Any, latent: Vector) -> Matrix:
    """Logits of each token of one chunk."""
    half = config.n_autoencoder_blocks // 2
    x = affine(w, "autoencoder.from_latent", latent)
    for i in range(half):
        x = residual(w, f"autoencoder.decoder_chunk.{i}", config, x)
    wide = affine(w, "autoencoder.expand", x)
    d = len(x)
    logits = []
    for place in range(config.chunk_size):
        x = wide[place * d : (place + 1) * d]
        for i in range(half):
            x = residual(w, f"autoencoder.decoder_tokens.{i}", config, x)
        x = norm(w["autoencoder.decoder_norm.weight"], x, config.norm_eps)
        logits.append(times(w["autoencoder.embedding.weight"], x))
    return logits


def residual(w: Mapping[str, Any], name: str, config: Any, x: Vector) -> Vector:
    return add(
        x, transformer_naive.feed_forward(w, f"{name}.ffn", config, norm(w[f"{name}.norm.weight"], x, config.norm_eps))
    )


def hidden(w: Mapping[str, Any], config: Any, chunks: Sequence[Sequence[int]]) -> Matrix:
    """The hidden vector after each chunk; the first stands at position 0."""
    stream = []
    for chunk in chunks:
        read: list[Vector] = []
        if config.inputs != "latent":
            flat = [number for token in chunk for number in w["lm.from_tokens.embedding.weight"][token]]
            inner = [silu(x) for x in affine(w, "lm.from_tokens.squeeze", flat)]
            read.append(layer_norm(affine(w, "lm.from_tokens.out", inner), w, "lm.from_tokens.norm"))
        if config.inputs != "discrete":
            read.append(affine(w, "lm.from_latent", encode(w, config, chunk)[0]))
        stream.append([sum(parts) for parts in zip(*read, strict=True)])
    backbone = _Backbone(config)
    for layer in range(config.n_layers):
        stream = transformer_naive.block(w, f"lm.blocks.{layer}", backbone, stream)
    return [norm(w["lm.norm.weight"], u, config.norm_eps) for u in stream]


class _Backbone:
    n_kv_heads = None

    def __init__(self, config: Any) -> None:
        self.d_model, self.n_heads = config.d_model, config.n_heads
        self.norm_eps, self.rope_theta = config.norm_eps, config.rope_theta


def energy_sample(w: Mapping[str, Any], config: Any, h: Vector, noise: Vector) -> Vector:
    """One latent drawn by the energy head."""
    y = layer_norm(affine(w, "lm.head.from_hidden", h), w, "lm.head.norm_hidden")
    x = layer_norm(affine(w, "lm.head.from_noise", noise), w, "lm.head.norm_noise")
    for i in range(config.head_blocks):
        name = f"lm.head.blocks.{i}"
        rows = [a + b for a, b in zip(w[f"{name}.from_x.weight"], w[f"{name}.from_y.weight"], strict=True)]
        joined = layer_norm(x, w, f"{name}.norm") + y
        u = [silu(a) for a in add(times(rows, joined), w[f"{name}.from_y.bias"])]
        v = [silu(a) for a in affine(w, f"{name}.middle", u)]
        both = affine(w, f"{name}.gates", v)
        gated = [silu(g) * value for g, value in zip(both[: len(x)], both[len(x) :], strict=True)]
        x = add(x, affine(w, f"{name}.out", gated))
    inner = [silu(a) for a in affine(w, "lm.head.widen", layer_norm(x, w, "lm.head.norm"))]
    return affine(w, "lm.head.out", inner)


def denoise(w: Mapping[str, Any], config: Any, x: Vector, time: float, h: Vector) -> Vector:
    """What the network of a flow or diffusion head says of one noisy latent."""
    net = "lm.head.net"
    angles = [time * 10_000 ** (-i / 128) for i in range(128)]
    told = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    told = affine(w, f"{net}.time_outer", [silu(a) for a in affine(w, f"{net}.time_inner", told)])
    condition = [silu(a) for a in add(affine(w, f"{net}.from_hidden", h), told)]
    x = affine(w, f"{net}.from_latent", x)
    d = len(x)
    for i in range(config.head_blocks):
        name = f"{net}.blocks.{i}"
        modulation = affine(w, f"{name}.modulation", condition)
        shift, scale, gate = modulation[:d], modulation[d : 2 * d], modulation[2 * d :]
        moved = modulated(layer_norm(x, w, f"{name}.norm"), shift, scale)
        inner = affine(w, f"{name}.outer", [silu(a) for a in affine(w, f"{name}.inner", moved)])
        x = [a + g * b for a, g, b in zip(x, gate, inner, strict=True)]
    modulation = affine(w, f"{net}.modulation", condition)
    return affine(w, f"{net}.out", modulated(layer_norm(x), modulation[:d], modulation[d:]))


def flow_sample(w: Mapping[str, Any], config: Any, h: Vector, start: Vector) -> Vector:
    """The latent to which the flow carries `start`."""
    x, step = start, 1 / config.flow_steps
    for i in range(config.flow_steps):
        slope = denoise(w, config, x, math.floor(1000 * i * step), h)
        if config.flow_solver == "midpoint":
            half = [a + step / 2 * b for a, b in zip(x, slope, strict=True)]
            slope = denoise(w, config, half, math.floor(1000 * (i * step + step / 2)), h)
        x = [a + step * b for a, b in zip(x, slope, strict=True)]
    return x


def energy_loss(samples: Matrix, targets: Matrix, exponent: float) -> float:
    """At one position."""
    n, m = len(samples), len(targets)
    to_targets = sum(distance(x, y) ** exponent for x in samples for y in targets)
    between = sum(distance(samples[i], samples[j]) ** exponent for i in range(n) for j in range(n) if i != j)
    return 2 * to_targets / (n * m) - between / (n * (n - 1))


def clipped_kl(means: Matrix, log_sigmas: Matrix, floor: float) -> float:
    """Mean over chunks of the sum over dimensions of max(floor, KL)."""
    total = 0.0
    for mean, log_sigma in zip(means, log_sigmas, strict=True):
        for mu, s in zip(mean, log_sigma, strict=True):
            total += max(floor, 0.5 * (mu * mu + math.exp(s) ** 2 - 1 - 2 * s))
    return total / len(means)


def distance(x: Vector, y: Vector) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))


def affine(w: Mapping[str, Any], name: str, x: Vector) -> Vector:
    return add(times(w[f"{name}.weight"], x), w[f"{name}.bias"])


def layer_norm(x: Vector, w: Mapping[str, Any] | None = None, name: str = "") -> Vector:
    mean = sum(x) / len(x)
    scale = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x) + 1e-6)
    normed = [(a - mean) / scale for a in x]
    if w is None:
        return normed
    return [g * a + b for g, a, b in zip(w[f"{name}.weight"], normed, w[f"{name}.bias"], strict=True)]


def modulated(x: Vector, shift: Vector, scale: Vector) -> Vector:
    return [a * (1 + s) + b for a, s, b in zip(x, scale, shift, strict=True)]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))
