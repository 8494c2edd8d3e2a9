"""State-space duality, level `reference`: the recurrence of the paper, token by token, and its gradient written out.

    h_t = exp(step_t A) h_{t-1} + (step_t x_t) B_t'        (b, h, p, n), one scalar decay a head
    y_t = h_t C_t + D x_t

Slow and in any dtype: the oracle of the other levels, never chosen by "auto".

Source: Dao & Gu 2024 (arXiv 2405.21060), section 3.1 and equation 16.

Letters: b batch, t time, h heads, p head width, g groups of heads that share B and C, n state size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def starts_shape(*_: int) -> tuple[int, ...]:
    """Nothing is kept: `backward` runs the forward recurrence again."""
    return (0,)


def forward(
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
    _keep: bool,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"], Tensor]:
    """y, the last state, and an empty tensor."""
    states = _states(x, step, A, B, h0)
    C = C.repeat_interleave(x.shape[2] // C.shape[2], dim=2)
    outputs = [(states[t + 1] * C[:, t, :, None, :]).sum(-1) for t in range(x.shape[1])]
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D[:, None] * x
    return y, states[-1].clone(), x.new_empty(0)


def _states(x: Tensor, step: Tensor, A: Tensor, B: Tensor, h0: Tensor | None) -> list[Float[Tensor, "b h p n"]]:
    """The state before the first token, then after each."""
    b, t, h, p = x.shape
    B = B.repeat_interleave(h // B.shape[2], dim=2)
    states = [x.new_zeros(b, h, p, B.shape[3]) if h0 is None else h0]
    for i in range(t):
        decay = torch.exp(step[:, i] * A)[:, :, None, None]
        states.append(decay * states[-1] + (step[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None, :])
    return states


def backward(
    gy: Float[Tensor, "b t h p"] | None,
    gh: Float[Tensor, "b h p n"] | None,
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
    _starts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, step, A, B, C, D, h0, in that order; None for an input that is None.

    With k_t = dL/dh_t the recurrence runs backwards: k_t = gy_t C_t' + exp(step_{t+1} A) k_{t+1}.
    """
    n_heads, n_groups = x.shape[2], B.shape[2]
    states = _states(x, step, A, B, h0)
    B_of_head, C_of_head = (tensor.repeat_interleave(n_heads // n_groups, dim=2) for tensor in (B, C))
    gy = torch.zeros_like(x) if gy is None else gy
    gx = torch.zeros_like(x) if D is None else gy * D[:, None]
    gstep, gA = torch.zeros_like(step), torch.zeros_like(A)
    gB, gC = torch.zeros_like(B_of_head), torch.zeros_like(C_of_head)
    k = torch.zeros_like(states[0]) if gh is None else gh
    for t in reversed(range(x.shape[1])):
        k = k + gy[:, t, :, :, None] * C_of_head[:, t, :, None, :]
        decay = torch.exp(step[:, t] * A)
        into_exponent = decay * (k * states[t]).sum((-1, -2))
        k_times_B = (k * B_of_head[:, t, :, None, :]).sum(-1)
        gC[:, t] = (gy[:, t, :, :, None] * states[t + 1]).sum(2)
        gB[:, t] = (k * (step[:, t, :, None] * x[:, t])[..., None]).sum(2)
        gx[:, t] += step[:, t, :, None] * k_times_B
        gstep[:, t] = (x[:, t] * k_times_B).sum(-1) + into_exponent * A
        gA += (into_exponent * step[:, t]).sum(0)
        k = k * decay[:, :, None, None]
    gB, gC = (tensor.unflatten(2, (n_groups, -1)).sum(3) for tensor in (gB, gC))
    gD = None if D is None else (gy * x).sum((0, 1, 3))
    return gx, gstep, gA, gB, gC, gD, None if h0 is None else k.clone()
