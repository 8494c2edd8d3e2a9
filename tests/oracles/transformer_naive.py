"""The Transformer once more, slowly: one position, one head, one number at a time, in Python floats (fp64).

Written from the papers' equations alone; it shares no code with the model and only reads its weights by name.

    E            embedding.weight                      token -> u, the residual vector (width d)
    N_g          RMSNorm with gain g                   g_i u_i / sqrt(mean(u^2) + eps)    Zhang & Sennrich 2019, eq. 4
    Wq, Wk, Wv   rows of attention.qkv.weight          H, K and K heads of width e each
    R_p          rotation of the pairs (i, i + e/2)    by p theta^(-2i/e)                    Su et al. 2021, eq. 15
    Attn         softmax(q k / sqrt(e)) v              over positions 0 .. p                 Vaswani et al. 2017, eq. 1
                 query head j reads key head j // (H/K)                                      Ainslie et al. 2023
    W1, W3, W2   gate, up (ffn.gate_up) and down       W2(silu(W1 x) * W3 x)                 Shazeer 2020, eq. 6
    U            unembedding.weight                    logits = U N(u)

One block: a = u + Wo Attn(N u);  u' = a + W2(silu(W1 N a) * W3 N a).              Touvron et al. 2023, section 2.1
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Vector = list[float]
Matrix = list[Vector]


def logits(weights: Mapping[str, Tensor], config: Any, tokens: list[int]) -> Matrix:
    """The logits after each of the tokens, which stand at positions 0, 1, ..."""
    w = {name: tensor.double().tolist() for name, tensor in weights.items()}
    stream = [list(w["embedding.weight"][token]) for token in tokens]
    for layer in range(config.n_layers):
        stream = block(w, f"blocks.{layer}", config, stream)
    return [times(w["unembedding.weight"], norm(w["norm.weight"], u, config.norm_eps)) for u in stream]


def block(w: Mapping[str, Any], name: str, config: Any, stream: Matrix) -> Matrix:
    normed = [norm(w[f"{name}.norm_attention.weight"], u, config.norm_eps) for u in stream]
    mixed = attention(w, f"{name}.attention", config, normed)
    after = [add(u, m) for u, m in zip(stream, mixed, strict=True)]
    return [
        add(a, feed_forward(w, f"{name}.ffn", config, norm(w[f"{name}.norm_ffn.weight"], a, config.norm_eps)))
        for a in after
    ]


def attention(w: Mapping[str, Any], name: str, config: Any, inputs: Matrix) -> Matrix:
    H, K = config.n_heads, config.n_heads if config.n_kv_heads is None else config.n_kv_heads
    e = config.d_model // H
    rows = w[f"{name}.qkv.weight"]
    Wq, Wk, Wv = rows[: H * e], rows[H * e : (H + K) * e], rows[(H + K) * e :]
    queries, keys, values = ([times(W, x) for x in inputs] for W in (Wq, Wk, Wv))
    outputs = []
    for p in range(len(inputs)):
        concatenated: Vector = []
        for j in range(H):
            g = j // (H // K)
            q = rotated(queries[p][j * e : (j + 1) * e], p, config.rope_theta)
            scores = []
            for s in range(p + 1):
                k = rotated(keys[s][g * e : (g + 1) * e], s, config.rope_theta)
                scores.append(dot(q, k) / math.sqrt(e))
            shares = softmax(scores)
            for i in range(e):
                concatenated.append(sum(shares[s] * values[s][g * e + i] for s in range(p + 1)))
        outputs.append(times(w[f"{name}.out.weight"], concatenated))
    return outputs


def feed_forward(w: Mapping[str, Any], name: str, config: Any, x: Vector) -> Vector:
    rows = w[f"{name}.gate_up.weight"]
    W1, W3 = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    inner = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(times(W1, x), times(W3, x), strict=True)]
    return times(w[f"{name}.down.weight"], inner)


def rotated(x: Vector, position: int, theta: float) -> Vector:
    half = len(x) // 2
    out = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


def norm(gain: Vector, u: Vector, eps: float) -> Vector:
    scale = math.sqrt(sum(x * x for x in u) / len(u) + eps)
    return [g * x / scale for g, x in zip(gain, u, strict=True)]


def softmax(scores: Vector) -> Vector:
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]


def times(W: Matrix, x: Vector) -> Vector:
    return [dot(row, x) for row in W]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def add(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]
