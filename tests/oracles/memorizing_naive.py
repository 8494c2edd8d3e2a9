"""The Memorizing Transformer once more, slowly: one position, one head, one number at a time, in Python floats (fp64).

Written from the paper's description; it shares no code with the model and only reads its weights by name.

    Wq, Wk, Wv   rows of attention.qkv.weight          H, K and K heads of width e each
    q^           q / |q|
    c            exp(attention.log_scale), one a head  temperature of all scores in the layer that remembers
    g            sigmoid(attention.gate), one a head   weight of the memory
    R_p          rotation by the place p inside the segment, for local scores only
    memory       for a token of the segment that begins at b: tokens max(0, b - n_mem) .. b - 1; of these the k with
                 the largest c q^ . k^, a softmax over their scores alone            Wu et al. 2022, section 3.2

Every other layer: softmax(R q . R k / sqrt(e)) over the tokens of the own segment up to itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles.transformer_naive import (
    Matrix,
    Vector,
    add,
    dot,
    feed_forward,
    norm,
    rotated,
    softmax,
    times,
)


def logits(weights: Mapping[str, Tensor], config: Any, tokens: list[int]) -> Matrix:
    """The logits after each of the tokens."""
    w = {name: tensor.double().tolist() for name, tensor in weights.items()}
    stream = [list(w["embedding.weight"][token]) for token in tokens]
    for layer in range(config.n_layers):
        name = f"blocks.{layer}"
        normed = [norm(w[f"{name}.norm_attention.weight"], x, config.norm_eps) for x in stream]
        mixed = attention(w, f"{name}.attention", config, normed)
        after = [add(x, m) for x, m in zip(stream, mixed, strict=True)]
        stream = [
            add(a, feed_forward(w, f"{name}.ffn", config, norm(w[f"{name}.norm_ffn.weight"], a, config.norm_eps)))
            for a in after
        ]
    return [times(w["unembedding.weight"], norm(w["norm.weight"], x, config.norm_eps)) for x in stream]


def attention(w: Mapping[str, Any], name: str, config: Any, inputs: Matrix) -> Matrix:
    H, K = config.n_heads, config.n_heads if config.n_kv_heads is None else config.n_kv_heads
    e, N = config.d_model // H, config.segment
    remembers = f"{name}.gate" in w
    rows = w[f"{name}.qkv.weight"]
    Wq, Wk, Wv = rows[: H * e], rows[H * e : (H + K) * e], rows[(H + K) * e :]
    queries, keys, values = ([times(W, x) for x in inputs] for W in (Wq, Wk, Wv))
    outputs = []
    for p in range(len(inputs)):
        begin = p - p % N
        gathered: Vector = []
        for head in range(H):
            shared = slice(head // (H // K) * e, (head // (H // K) + 1) * e)
            q = queries[p][head * e : (head + 1) * e]
            ks = [key[shared] for key in keys[: p + 1]]
            vs = [value[shared] for value in values[: p + 1]]
            scale = 1 / math.sqrt(e)
            if remembers:
                q, ks = unit(q), [unit(k) for k in ks]
                scale = math.exp(w[f"{name}.log_scale"][head])
            turn = (lambda x, place: rotated(x, place, config.rope_theta)) if config.rotary else (lambda x, _place: x)
            near = [scale * dot(turn(q, p - begin), turn(ks[s], s - begin)) for s in range(begin, p + 1)]
            local = mean(softmax(near), vs[begin:])
            if not remembers:
                gathered += local
                continue
            kept = range(max(0, begin - config.memory), begin)
            best = sorted(((scale * dot(q, ks[s]), s) for s in kept), reverse=True)[: config.top_k]
            found = mean(softmax([score for score, _ in best]), [vs[s] for _, s in best]) if best else [0.0] * e
            g = 1 / (1 + math.exp(-w[f"{name}.gate"][head]))
            gathered += [g * m + (1 - g) * x for m, x in zip(found, local, strict=True)]
        outputs.append(times(w[f"{name}.out.weight"], gathered))
    return outputs


def mean(shares: Vector, vectors: Matrix) -> Vector:
    return [sum(p * v[i] for p, v in zip(shares, vectors, strict=True)) for i in range(len(vectors[0]))]


def unit(x: Vector) -> Vector:
    return [a / math.sqrt(dot(x, x)) for a in x]
