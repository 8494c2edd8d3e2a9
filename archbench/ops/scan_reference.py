"""Selective scan, level `reference`: the recurrence of the paper, one token at a time, and its gradient written out.

    step_t = softplus(dt_t + dt_bias)                      (b, d)
    h_t    = exp(step_t A) h_{t-1} + step_t x_t B_t        (b, d, n)
    y_t    = (sum_n C_t h_t + D x_t) silu(z_t)

Slow and in any dtype: the oracle of the other levels, never chosen by "auto".

Source: Gu & Dao 2023 (arXiv 2312.00752), section 3; the Euler form of B as in the authors' code, not the paper's eq. 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def starts_shape(*_: int) -> tuple[int, ...]:
    """Nothing is kept: `backward` runs the forward recurrence again."""
    return (0,)


def forward(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h0: Float[Tensor, "b d n"] | None,
    _keep: bool,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"], Tensor]:
    """y, the last state, and an empty tensor."""
    step = F.softplus(dt if dt_bias is None else dt + dt_bias)
    states = _states(step, x, A, B, h0)
    outputs = [(states[t + 1] * C[:, t, None, :]).sum(-1) for t in range(x.shape[1])]
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z)
    return y, states[-1].clone(), x.new_empty(0)


def _states(step: Tensor, x: Tensor, A: Tensor, B: Tensor, h0: Tensor | None) -> list[Float[Tensor, "b d n"]]:
    """h_0 (the state before the first token), h_1, ..., h_t."""
    states = [x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0]
    for t in range(x.shape[1]):
        decay = torch.exp(step[:, t, :, None] * A)
        states.append(decay * states[-1] + (step[:, t] * x[:, t])[:, :, None] * B[:, t, None, :])
    return states


def backward(
    gy: Float[Tensor, "b t d"] | None,
    gh: Float[Tensor, "b d n"] | None,
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h0: Float[Tensor, "b d n"] | None,
    _starts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, h0, in that order; None for an input that is None.

    With g_t = dL/dh_t the recurrence runs backwards: g_t = gy_t C_t + exp(step_{t+1} A) g_{t+1}.
    """
    raw = dt if dt_bias is None else dt + dt_bias
    step = F.softplus(raw)
    states = _states(step, x, A, B, h0)
    gy = torch.zeros_like(x) if gy is None else gy
    gz = None
    if z is not None:
        ungated = torch.zeros_like(x) if D is None else D * x
        for t in range(x.shape[1]):
            ungated[:, t] += (states[t + 1] * C[:, t, None, :]).sum(-1)
        s = torch.sigmoid(z)
        gz = gy * ungated * s * (1 + z * (1 - s))
        gy = gy * z * s
    gx = torch.zeros_like(x) if D is None else gy * D
    gstep, gA, gB, gC = torch.zeros_like(x), torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    g = torch.zeros_like(states[0]) if gh is None else gh
    for t in reversed(range(x.shape[1])):
        g = g + gy[:, t, :, None] * C[:, t, None, :]
        decay = torch.exp(step[:, t, :, None] * A)
        into_decay = g * decay * states[t]
        g_times_B = (g * B[:, t, None, :]).sum(-1)
        gC[:, t] = (gy[:, t, :, None] * states[t + 1]).sum(1)
        gB[:, t] = (g * (step[:, t] * x[:, t])[:, :, None]).sum(1)
        gx[:, t] += step[:, t] * g_times_B
        gstep[:, t] = x[:, t] * g_times_B + (into_decay * A).sum(-1)
        gA += (into_decay * step[:, t, :, None]).sum(0)
        g = g * decay
    gdt = gstep * torch.sigmoid(raw)
    gD = None if D is None else (gy * x).sum((0, 1))
    gbias = None if dt_bias is None else gdt.sum((0, 1))
    return gx, gdt, gA, gB, gC, gD, gz, gbias, None if h0 is None else g.clone()
