"""Infini-attention once more, slowly: one position, one head, one number at a time, in Python floats (fp64).

Written from the paper's equations; it shares no code with the model and only reads its weights by name. What is not the
attention (norms, rotation, feed-forward) comes from the Transformer's oracle.

    phi(x)       elu(x) + 1                                               Katharopoulos et al. 2020, eq. 7
    A_dot        softmax(R q . R k / sqrt(e)) v over the own segment, positions counted from its start
    A_mem        linear: sum_j (phi(q) . phi(k_j)) v_j / (sum_j phi(q) . phi(k_j) + eps) over all tokens j of earlier
                 segments, which is what reading M and z comes to         Munkhdalai et al. 2024, eq. 7 and 8
                 delta:  phi(q) M / (phi(q) . z + eps), M += phi(k_j)^T (v_j - phi(k_j) M / (phi(k_j) . z + eps)) with
                 the M and z before the segment                           eq. 7 and 9
    A            g A_mem + (1 - g) A_dot, g = 1 / (1 + exp(-beta)) of the head     eq. 10

    Without gates in the weights there is no memory: A = A_dot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles.transformer_naive import Matrix, Vector, add, dot, feed_forward, norm, rotated, softmax, times


def logits(weights: Mapping[str, Tensor], config: Any, tokens: list[int]) -> Matrix:
    """The logits after each of the tokens, which stand at the start of a text."""
    w = {name: tensor.double().tolist() for name, tensor in weights.items()}
    stream = [list(w["embedding.weight"][token]) for token in tokens]
    for layer in range(config.n_layers):
        name = f"blocks.{layer}"
        normed = [norm(w[f"{name}.norm_attention.weight"], u, config.norm_eps) for u in stream]
        after = [add(u, m) for u, m in zip(stream, attention(w, f"{name}.attention", config, normed), strict=True)]
        stream = [
            add(a, feed_forward(w, f"{name}.ffn", config, norm(w[f"{name}.norm_ffn.weight"], a, config.norm_eps)))
            for a in after
        ]
    return [times(w["unembedding.weight"], norm(w["norm.weight"], u, config.norm_eps)) for u in stream]


def attention(w: Mapping[str, Any], name: str, config: Any, inputs: Matrix) -> Matrix:
    H, G = config.n_heads, config.n_heads if config.n_kv_heads is None else config.n_kv_heads
    e = config.d_model // H
    rows = w[f"{name}.qkv.weight"]
    Wq, Wk, Wv = rows[: H * e], rows[H * e : (H + G) * e], rows[(H + G) * e :]
    queries, keys, values = ([times(W, x) for x in inputs] for W in (Wq, Wk, Wv))
    gates = w.get(f"{name}.gate")
    concatenated: Matrix = [[] for _ in inputs]
    for h in range(H):
        g = h // (H // G)
        q = [x[h * e : (h + 1) * e] for x in queries]
        k, v = ([x[g * e : (g + 1) * e] for x in xs] for xs in (keys, values))
        inside = local(config, q, k, v)
        if gates is None:
            mixed = inside
        else:
            weight = 1 / (1 + math.exp(-gates[h]))
            outside = kernel_attention(config, q, k, v) if config.update == "linear" else delta_memory(config, q, k, v)
            mixed = [
                [a * weight + b * (1 - weight) for a, b in zip(m, d, strict=True)]
                if p >= config.segment or config.first_segment == "strict"
                else d
                for p, (m, d) in enumerate(zip(outside, inside, strict=True))
            ]
        for p, out in enumerate(mixed):
            concatenated[p] += out
    return [times(w[f"{name}.out.weight"], out) for out in concatenated]


def local(config: Any, q: Matrix, k: Matrix, v: Matrix) -> Matrix:
    """A_dot of one head."""
    N, e = config.segment, len(q[0])

    def turned(x: Vector, p: int) -> Vector:
        return rotated(x, p % N, config.rope_theta) if config.rotary else x

    out = []
    for p in range(len(q)):
        seen = range(p - p % N, p + 1)
        shares = softmax([dot(turned(q[p], p), turned(k[j], j)) / math.sqrt(e) for j in seen])
        out.append([sum(share * v[j][i] for share, j in zip(shares, seen, strict=True)) for i in range(e)])
    return out


def kernel_attention(config: Any, q: Matrix, k: Matrix, v: Matrix) -> Matrix:
    """A_mem of one head, linear: from the list of all earlier keys and values, without M and z."""
    out = []
    for p in range(len(q)):
        past = range(p - p % config.segment)
        shares = [dot(phi(q[p]), phi(k[j])) for j in past]
        total = sum(shares) + config.memory_eps
        out.append(
            [sum(share * v[j][i] for share, j in zip(shares, past, strict=True)) / total for i in range(len(q[p]))]
        )
    return out


def delta_memory(config: Any, q: Matrix, k: Matrix, v: Matrix) -> Matrix:
    """A_mem of one head, delta: M and z as the paper writes them."""
    e = len(q[0])
    M, z = [[0.0] * e for _ in range(e)], [0.0] * e
    out: Matrix = []
    for start in range(0, len(q), config.segment):
        positions = range(start, min(start + config.segment, len(q)))
        out += [look_up(M, z, q[p], config.memory_eps) for p in positions]
        residuals = [
            [a - b for a, b in zip(v[p], look_up(M, z, k[p], config.memory_eps), strict=True)] for p in positions
        ]
        for p, residual in zip(positions, residuals, strict=True):
            for i, f in enumerate(phi(k[p])):
                z[i] += f
                M[i] = [m + f * r for m, r in zip(M[i], residual, strict=True)]
    return out


def look_up(M: Matrix, z: Vector, x: Vector, eps: float) -> Vector:
    f = phi(x)
    norm = dot(f, z) + eps
    return [sum(f[i] * M[i][j] for i in range(len(f))) / norm for j in range(len(f))]


def phi(x: Vector) -> Vector:
    return [a + 1 if a > 0 else math.exp(a) for a in x]
