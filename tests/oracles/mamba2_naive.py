"""Mamba-2 once more, slowly: one token, one head, one state at a time, in Python floats (fp64).

Written from Dao & Gu 2024 (2405.21060), sections 3.1 and 7 and figure 6; it shares no code with the model and only
reads its weights by name. Symbols of the paper and our names:

    D = expand d       inner channels, H = D / P heads of width P; channel c belongs to head c // P
    in_proj            rows in this order: z (D), x (D), B (G N), C (G N), dt (H)
    conv               over x, B and C alike, then silu
    step               softplus(dt + dt_bias), clamped to its limits, one for each head
    A                  -exp(A_log), one number for each head: "scalar times identity"                    section 2.4
    S_t[p][n]          exp(step A) S_{t-1}[p][n] + step B[n] x[p]
    y[p]               sum_n C[n] S_t[p][n] + Dskip x[p]
    group of head i    floor(i G / H): neighbouring heads share B and C                                  section 7.2
    norm               y * silu(z) first, then RMSNorm over each group of D / G channels                 section 7.1

It runs token by token with a carried state, so it is the oracle of the parallel pass and of decoding alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Vector = list[float]
Matrix = list[Vector]


class NaiveMamba2:
    """Reads one token after another; `windows` and `states` are the carried state of each layer."""

    def __init__(self, weights: Mapping[str, Tensor], config: Any) -> None:
        self.w: dict[str, Any] = {name: tensor.double().tolist() for name, tensor in weights.items()}
        self.config = config
        self.D = config.expand * config.d_model
        self.P, self.N, self.G = config.head_dim, config.d_state, config.n_groups
        self.H = self.D // self.P
        convolved = self.D + 2 * self.G * self.N
        n_layers = config.n_layers
        self.windows: list[Matrix] = [[[0.0] * convolved for _ in range(config.d_conv - 1)] for _ in range(n_layers)]
        self.states: list[list[Matrix]] = [
            [[[0.0] * self.N for _ in range(self.P)] for _ in range(self.H)] for _ in range(n_layers)
        ]

    def step(self, token: int) -> Vector:
        """The logits after reading one more token."""
        u = list(self.w["embedding.weight"][token])
        eps = self.config.norm_eps
        for layer in range(self.config.n_layers):
            mixed = self.mixer(layer, norm(self.w[f"blocks.{layer}.norm.weight"], u, eps))
            u = [a + b for a, b in zip(u, mixed, strict=True)]
        return times(self.w["unembedding.weight"], norm(self.w["norm.weight"], u, eps))

    def mixer(self, layer: int, u: Vector) -> Vector:
        D, P, N, G, H = self.D, self.P, self.N, self.G, self.H
        w = {key: self.w[f"blocks.{layer}.mixer.{key}"] for key in PARTS}
        projected = times(w["in_proj.weight"], u)
        z, xBC, dt = projected[:D], projected[D : 2 * D + 2 * G * N], projected[2 * D + 2 * G * N :]

        window = [*self.windows[layer], xBC]
        self.windows[layer] = window[1:]
        convolved = []
        for c in range(len(xBC)):
            total = w["conv_bias"][c] + sum(w["conv_weight"][c][j] * window[j][c] for j in range(len(window)))
            convolved.append(silu(total))
        x, B, C = convolved[:D], convolved[D : D + G * N], convolved[D + G * N :]

        y = [0.0] * D
        for head in range(H):
            group = head * G // H
            step = softplus(dt[head] + w["dt_bias"][head])
            step = max(step, self.config.step_floor)
            if self.config.step_ceiling is not None:
                step = min(step, self.config.step_ceiling)
            decay = math.exp(-step * math.exp(w["A_log"][head]))
            for p in range(P):
                c, S = head * P + p, self.states[layer][head][p]
                for n in range(N):
                    S[n] = decay * S[n] + step * B[group * N + n] * x[c]
                y[c] = sum(C[group * N + n] * S[n] for n in range(N)) + w["D"][head] * x[c]

        gated = [a * silu(b) for a, b in zip(y, z, strict=True)]
        width, out = D // G, []
        for first in range(0, D, width):
            gain = w["norm.weight"][first : first + width]
            out += norm(gain, gated[first : first + width], self.config.norm_eps)
        return times(w["out_proj.weight"], out)


PARTS = (
    "in_proj.weight", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight",
)  # fmt: skip


def norm(gain: Vector, u: Vector, eps: float) -> Vector:
    scale = math.sqrt(sum(x * x for x in u) / len(u) + eps)
    return [g * x / scale for g, x in zip(gain, u, strict=True)]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return x if x > 30 else math.log1p(math.exp(x))


def times(W: Matrix, x: Vector) -> Vector:
    return [sum(a * b for a, b in zip(row, x, strict=True)) for row in W]
