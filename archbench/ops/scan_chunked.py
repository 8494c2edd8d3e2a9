"""Selective scan, level `lean`: plain torch everywhere, in two levels of chunks, with its own backward pass.

A loop over tokens costs one small torch call per token; the whole sequence at once costs tensors of size
tokens x channels x states. Here a slab of 32 or 64 tokens is discretised at a time and seen as chunks of CHUNK tokens.
With a_t the decay and b_t the input, h_t = a_t h_{t-1} + b_t is solved

    inside all chunks at once, q = 1 .. CHUNK-1:   b_q += a_q b_{q-1},   a_q *= a_{q-1}
    then over the chunks, k = 0, 1, ...:           b_k += a_k h,         h = last of b_k

(after the first line a_q is the decay since its chunk began), which is slab / CHUNK + CHUNK calls, on tensors that stay
in cache. Products of decays only shrink, so nothing overflows; the usual shortcut, exp(S) cumsum(exp(-S) b), overflows
fp32 within a chunk of 64. Forward keeps the states at slab starts; backward rebuilds one slab at a time and solves the
mirrored recurrence g_t = p_t + a_{t+1} g_{t+1} the same way. Inside, channels stand last: products with what channels
or states share then run along long rows. The tensors of a slab are made once a call: fresh memory of that size is
handed out page by page, which takes longer than filling it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK = 8


def slab_tokens(b: int, d: int, n: int) -> int:
    """Tokens in a slab: fewer once a single token's states are so many that a long slab leaves the cache (measured)."""
    return 64 if b * d * n <= 8192 else 32


def starts_shape(b: int, t: int, d: int, n: int) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps for `backward`."""
    return (-(-t // slab_tokens(b, d, n)), b, n, d)


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
    keep: bool,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"], Tensor]:
    """y, the last state, and the states at slab starts (empty without `keep`)."""
    b, t, d = x.shape
    step = F.softplus(dt if dt_bias is None else dt + dt_bias)
    across, fed = A.t().contiguous(), step * x
    h = x.new_zeros(b, *across.shape) if h0 is None else h0.transpose(1, 2)
    y = x.new_empty(b, t, d)
    starts = x.new_empty(starts_shape(b, t, d, A.shape[1]) if keep else (0,))
    length = slab_tokens(b, *A.shape)
    room = _room(x, min(length, t), across, 3)
    for index, first in enumerate(range(0, t, length)):
        slab = slice(first, min(first + length, t))
        if keep:
            starts[index] = h
        _, states = _slab_states(step[:, slab], fed[:, slab], across, B[:, slab], h, room)
        y[:, slab] = (C[:, slab, None] @ states)[:, :, 0]
        h = states[:, -1].clone()
    if D is not None:
        y.addcmul_(D, x)
    if z is not None:
        y *= F.silu(z)
    return y, h.transpose(1, 2).clone(memory_format=torch.contiguous_format), starts


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
    starts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, h0, in that order; None for an input that is None."""
    b, t, d = x.shape
    raw = dt if dt_bias is None else dt + dt_bias
    step = F.softplus(raw)
    gout = torch.zeros_like(x) if gy is None else gy
    gate = None if z is None else torch.sigmoid(z)
    gy = gout if z is None or gate is None else gout * z * gate
    y = torch.empty_like(x) if z is not None else None
    across, fed = A.t().contiguous(), step * x
    g_times_B, into_step = x.new_empty(b, t, d), x.new_empty(b, t, d)
    gA, gB, gC = torch.zeros_like(across), B.new_empty(B.shape), C.new_empty(C.shape)
    # a_{t+1} g_{t+1} at the end of the slab
    carry = x.new_zeros(b, *across.shape) if gh is None else gh.transpose(1, 2)
    length = slab_tokens(b, *A.shape)
    room = _room(x, min(length, t), across, 4)
    for index in reversed(range(starts.shape[0])):
        slab = slice(index * length, min((index + 1) * length, t))
        h = starts[index]
        decay, states = _slab_states(step[:, slab], fed[:, slab], across, B[:, slab], h, room)
        if y is not None:
            y[:, slab] = (C[:, slab, None] @ states)[:, :, 0]
        gC[:, slab] = (states @ gy[:, slab, :, None])[..., 0]
        g = _slab_gradients(decay, gy[:, slab], C[:, slab], carry, room)
        gB[:, slab] = (g @ fed[:, slab, :, None])[..., 0]
        g_times_B[:, slab] = (B[:, slab, None] @ g)[:, :, 0]
        g *= decay
        carry = g[:, 0].clone()
        g[:, 0] *= h
        g[:, 1:] *= states[:, :-1]
        into_step[:, slab] = torch.mul(g, across, out=decay).sum(2)
        gA += g.mul_(step[:, slab, None]).sum((0, 1))
    gx = step * g_times_B
    gdt = (into_step + x * g_times_B) * torch.sigmoid(raw)
    gD = gz = None
    if D is not None:
        gx.addcmul_(D, gy)
        gD = (gy * x).sum((0, 1))
    if z is not None and gate is not None and y is not None:
        y = y if D is None else y.addcmul_(D, x)
        gz = gout * y * gate * (1 + z * (1 - gate))
    gbias = None if dt_bias is None else gdt.sum((0, 1))
    gh0 = None if h0 is None else carry.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return gx, gdt, gA.t().contiguous(), gB, gC, gD, gz, gbias, gh0


def _room(x: Float[Tensor, "b t d"], length: int, across: Float[Tensor, "n d"], n: int) -> list[Tensor]:
    """Memory for n tensors of a slab: decays, states, decays since a chunk's start, gradients."""
    return [x.new_empty(x.shape[0], length, *across.shape) for _ in range(n)]


def _slab_states(
    step: Float[Tensor, "b s d"],
    fed: Float[Tensor, "b s d"],
    A: Float[Tensor, "n d"],
    B: Float[Tensor, "b s n"],
    h: Float[Tensor, "b n d"],
    room: list[Tensor],
) -> tuple[Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]]:
    """Decays of one slab, and the states after each of its tokens, from state `h`; `fed` is step times x."""
    decay, states, since_start = (memory[:, : step.shape[1]] for memory in room[:3])
    torch.mul(step[:, :, None], A, out=decay).exp_()
    torch.mul(fed[:, :, None], B[..., None], out=states)
    since_start.copy_(decay)
    whole = states.shape[1] // CHUNK * CHUNK
    a, s = (tensor[:, :whole].unflatten(1, (-1, CHUNK)) for tensor in (since_start, states))
    for q in range(1, CHUNK if whole else 0):
        s[:, :, q].addcmul_(a[:, :, q], s[:, :, q - 1])
        a[:, :, q] *= a[:, :, q - 1]
    for k in range(whole // CHUNK):
        s[:, k].addcmul_(a[:, k], h[:, None])
        h = s[:, k, -1]
    for t in range(whole, states.shape[1]):
        states[:, t].addcmul_(decay[:, t], h)
        h = states[:, t]
    return decay, states


def _slab_gradients(
    decay: Float[Tensor, "b s n d"],
    gy: Float[Tensor, "b s d"],
    C: Float[Tensor, "b s n"],
    carry: Float[Tensor, "b n d"],
    room: list[Tensor],
) -> Float[Tensor, "b s n d"]:
    """dL/dh after each token of one slab; `carry` is what flows into its last state from beyond the slab.

    The tail that fills no chunk is the last part in time, so the reverse pass meets it first.
    """
    n_tokens = gy.shape[1]
    g = torch.mul(gy[:, :, None], C[..., None], out=room[3][:, :n_tokens])
    whole = n_tokens // CHUNK * CHUNK
    for t in reversed(range(whole, n_tokens)):
        g[:, t] += carry
        carry = decay[:, t] * g[:, t]
    if not whole:
        return g
    # until_end[q]: the decay from q to the first token of the next chunk; that chunk's own first decay is in `carry`.
    until_end = room[2][:, :whole].unflatten(1, (-1, CHUNK))
    a, chunks = decay[:, :whole].unflatten(1, (-1, CHUNK)), g[:, :whole].unflatten(1, (-1, CHUNK))
    until_end[:, :, -1] = 1
    for q in reversed(range(CHUNK - 1)):
        chunks[:, :, q].addcmul_(a[:, :, q + 1], chunks[:, :, q + 1])
        torch.mul(a[:, :, q + 1], until_end[:, :, q + 1], out=until_end[:, :, q])
    for k in reversed(range(whole // CHUNK)):
        chunks[:, k].addcmul_(until_end[:, k], carry[:, None])
        carry = a[:, k, 0] * chunks[:, k, 0]
    return g
