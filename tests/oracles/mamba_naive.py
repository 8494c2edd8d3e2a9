"""Mamba once more, slowly: one token, one channel, one state at a time, in Python floats (fp64).

Written from Gu & Dao 2023 (2312.00752), sections 2, 3.2 and 3.4 and algorithm 2; it shares no code with the model and
only reads its weights by name. Symbols of the paper and our names:

    D = expand d       channels                          N      states of a channel      R      rank of the step size
    in_proj   (2D, d)  rows 0 .. D-1 make x, the rest the gate z
    conv      (D, W)   x'_t[c] = b[c] + sum_j w[c, j] x_{t-W+1+j}[c], then silu
    x_proj             rows: R for the step size, N for B, N for C
    Delta              softplus(dt_proj r + dt_bias), one for each channel                        algorithm 2, line 5
    A                  -exp(A_log), real and diagonal                                             section 3.6
    h_t[c, n]          exp(Delta A) h_{t-1}[c, n] + Delta B[n] x[c]                               eq. 2a, 4
    y_t[c]             sum_n C[n] h_t[c, n] + Dskip[c] x[c], times silu(z[c])                     eq. 2b, figure 3

Equation 4 discretises B by a full zero-order hold; here, as in the authors' code, by Delta B (its first-order term).
The whole runs token by token with a carried state, so it is the oracle of the parallel pass and of decoding alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Vector = list[float]
Matrix = list[Vector]


class NaiveMamba:
    """Reads one token after another; `windows` and `states` are the carried state of each layer."""

    def __init__(self, weights: Mapping[str, Tensor], config: Any) -> None:
        self.w: dict[str, Any] = {name: tensor.double().tolist() for name, tensor in weights.items()}
        self.config = config
        self.D = config.expand * config.d_model
        n_layers, width, N = config.n_layers, config.d_conv, config.d_state
        self.windows: list[Matrix] = [[[0.0] * self.D for _ in range(width - 1)] for _ in range(n_layers)]
        self.states: list[Matrix] = [[[0.0] * N for _ in range(self.D)] for _ in range(n_layers)]

    def step(self, token: int) -> Vector:
        """The logits after reading one more token."""
        u = list(self.w["embedding.weight"][token])
        for layer in range(self.config.n_layers):
            name = f"blocks.{layer}"
            mixed = self.mixer(layer, norm(self.w[f"{name}.norm.weight"], u, self.config.norm_eps))
            u = [a + b for a, b in zip(u, mixed, strict=True)]
        return times(self.w["unembedding.weight"], norm(self.w["norm.weight"], u, self.config.norm_eps))

    def mixer(self, layer: int, u: Vector) -> Vector:
        D, N = self.D, self.config.d_state
        w = {key: self.w[f"blocks.{layer}.mixer.{key}"] for key in PARTS}
        xz = times(w["in_proj.weight"], u)
        x, z = xz[:D], xz[D:]

        window = [*self.windows[layer], x]  # the convolution's last W inputs, oldest first
        self.windows[layer] = window[1:]
        for c in range(D):
            total = w["conv_bias"][c] + sum(w["conv_weight"][c][j] * window[j][c] for j in range(len(window)))
            x = [*x[:c], silu(total), *x[c + 1 :]]

        rBC = times(w["x_proj.weight"], x)
        r, B, C = rBC[: -2 * N], rBC[-2 * N : -N], rBC[-N:]
        raw = times(w["dt_proj.weight"], r)
        y = []
        for c in range(D):
            delta = softplus(raw[c] + w["dt_bias"][c])
            h = self.states[layer][c]
            for n in range(N):
                A = -math.exp(w["A_log"][c][n])
                h[n] = math.exp(delta * A) * h[n] + delta * B[n] * x[c]
            out = sum(C[n] * h[n] for n in range(N)) + w["D"][c] * x[c]
            y.append(out * silu(z[c]))
        return times(w["out_proj.weight"], y)


PARTS = (
    "in_proj.weight", "conv_weight", "conv_bias", "x_proj.weight", "dt_proj.weight", "dt_bias", "A_log", "D",
    "out_proj.weight",
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
