"""Transformer-XL once more, slowly, from the paper's equations; it shares no code with the model and only reads its
weights by name.

`logits` goes one position, one head, one number at a time, in Python floats (fp64), with the four terms of the score of
section 3.3 in a double loop over positions. `loss` goes segment by segment as the authors train, with a memory tensor
that is detached and handed on, so that its gradients can be compared.

    (a) (Wq x_i) (Wk x_j)      content and content        (c) u (Wk x_j)          content alone
    (b) (Wq x_i) (Wr R_{i-j})  content and distance       (d) w (Wr R_{i-j})      distance alone

    E            embedding.weight                      U        unembedding.weight
    Wq, Wk, Wv   thirds of attention.qkv.weight        Wr       attention.distance.weight
    u, w         content_bias, distance_bias (shared by all layers; the paper calls w "v")
    R_n          [sin(n w_0) .. sin(n w_{d/2-1}), cos(n w_0) ..] with w_k = 10000^(-2k/d)

Token i of the segment that begins at b sees the tokens from max(0, b - M) to i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles.transformer_naive import Matrix, Vector, add, dot, feed_forward, norm, softmax, times


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
    d, e = config.d_model, config.d_model // config.n_heads
    M = config.segment if config.memory is None else config.memory
    rows = w[f"{name}.qkv.weight"]
    queries, keys, values = ([times(W, x) for x in inputs] for W in (rows[:d], rows[d : 2 * d], rows[2 * d :]))
    outputs = []
    for i in range(len(inputs)):
        first = max(0, i - i % config.segment - M)
        gathered: Vector = []
        for head in range(config.n_heads):
            own = slice(head * e, (head + 1) * e)
            scores = []
            for j in range(first, i + 1):
                apart = i - j if config.clamp is None else min(i - j, config.clamp)
                place = times(w[f"{name}.distance.weight"], sinusoid(apart, d))[own]
                a = dot(queries[i][own], keys[j][own])
                b = dot(queries[i][own], place)
                c = dot(w["content_bias"][head], keys[j][own])
                last = dot(w["distance_bias"][head], place)
                scores.append((a + b + c + last) / math.sqrt(e))
            shares = softmax(scores)
            seen = [values[j][own] for j in range(first, i + 1)]
            gathered += [sum(p * v[k] for p, v in zip(shares, seen, strict=True)) for k in range(e)]
        outputs.append(times(w[f"{name}.out.weight"], gathered))
    return outputs


def sinusoid(n: int, d: int) -> Vector:
    angles = [n * 10_000 ** (-2 * k / d) for k in range(d // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def loss(weights: Mapping[str, Tensor], config: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of one text [t + 1], segment after segment; memories are detached between segments."""
    d, H, N = config.d_model, config.n_heads, config.segment
    e = d // H
    M = N if config.memory is None else config.memory
    table = torch.tensor([sinusoid(n, d) for n in range(M + N)], dtype=torch.float64)
    memories = [torch.zeros(0, d, dtype=torch.float64) for _ in range(config.n_layers)]
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in zip(tokens[:-1].split(N), tokens[1:].split(N), strict=True):
        x = weights["embedding.weight"][inputs]
        for layer in range(config.n_layers):
            name = f"blocks.{layer}"
            own = _norm(weights[f"{name}.norm_attention.weight"], x, config.norm_eps)
            seen = torch.cat([memories[layer], own])
            memories[layer] = seen[max(0, len(seen) - M) :].detach()
            Wq, Wk, Wv = weights[f"{name}.attention.qkv.weight"].split(d)
            q, k, v = ((s @ W.T).view(-1, H, e) for s, W in ((own, Wq), (seen, Wk), (seen, Wv)))
            places = (table @ weights[f"{name}.attention.distance.weight"].T).view(-1, H, e)
            out = []
            for i in range(len(own)):
                stop = len(seen) - len(own) + i + 1
                by_distance = places[torch.arange(stop - 1, -1, -1)]
                score = ((q[i] + weights["content_bias"]) * k[:stop]).sum(-1)
                score = score + ((q[i] + weights["distance_bias"]) * by_distance).sum(-1)
                shares = (score / math.sqrt(e)).softmax(dim=0)
                out.append((shares[:, :, None] * v[:stop]).sum(0).flatten())
            x = x + torch.stack(out) @ weights[f"{name}.attention.out.weight"].T
            inner = _norm(weights[f"{name}.norm_ffn.weight"], x, config.norm_eps)
            gate, up = (inner @ weights[f"{name}.ffn.gate_up.weight"].T).chunk(2, dim=-1)
            x = x + (gate * gate.sigmoid() * up) @ weights[f"{name}.ffn.down.weight"].T
        scores = _norm(weights["norm.weight"], x, config.norm_eps) @ weights["unembedding.weight"].T
        total = total - scores.log_softmax(-1).gather(-1, targets[:, None]).sum()
    return total / (len(tokens) - 1)


def _norm(gain: Tensor, x: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
