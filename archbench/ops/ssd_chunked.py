"""State-space duality, level `lean`: chunks of matrix products in plain torch, with their own backward pass.

A chunk of q tokens, with s_i the running sum of step A inside it, u_j = step_j x_j and H the state at its start:

    M[i, j] = (C_i . B_j) exp(s_i - s_j)  for i >= j, else 0       the chunk as masked attention
    y_i     = sum_j M[i, j] u_j + exp(s_i) C_i H'                  inside the chunk, and from what came before
    H_next  = exp(s_q) H + sum_j exp(s_q - s_j) u_j B_j'           passed on, one chunk after another

C_i . B_j is shared by the heads of a group, and so are the products with H: with one group these are few large matrix
products. Exponents are never positive; s_i - s_j is masked before the exponential, since above the diagonal it would
overflow. Padding to whole chunks has step 0, which decays nothing and adds nothing. Forward keeps H of every chunk.

Gradients of the exponents are summed from where each of them enters (rows and columns of M, chunk starts, chunk ends),
never as differences of large sums, so that they keep their accuracy where decays are strong.

Source: Dao & Gu 2024 (arXiv 2405.21060), section 6 and listing 1; the gradients are the same algebra transposed.

Letters: b batch, t time, c chunks, q tokens of a chunk, h heads, p head width, g groups, r heads of a group, n state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK = 32
"""Tokens of a chunk. On one CPU thread 32 was fastest for N = 32 and 64; 64 took 15 % longer, 128 60 % (measured)."""


def starts_shape(b: int, t: int, h: int, p: int, n: int) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps for `backward`."""
    return (b, -(-t // CHUNK), h, p, n)


class _Chunks(NamedTuple):
    """The inputs in whole chunks, and what forward and backward both need of them."""

    x: Float[Tensor, "b c q h p"]
    step: Float[Tensor, "b c q h"]
    u: Float[Tensor, "b c q h p"]
    B: Float[Tensor, "b c g q n"]
    C: Float[Tensor, "b c g q n"]
    into: Float[Tensor, "b c q h"]
    """exp(s_i): decay from the chunk's start to token i, that token's own included"""
    out: Float[Tensor, "b c q h"]
    """exp(s_q - s_j): decay from token j to the chunk's end"""
    L: Float[Tensor, "b c h q q"]
    """exp(s_i - s_j) on and below the diagonal"""


def forward(
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
    keep: bool,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"], Tensor]:
    """y, the last state, and the states at chunk starts (empty without `keep`)."""
    b, t, h, p = x.shape
    n = B.shape[3]
    H = x.new_zeros(b, h, p, n) if h0 is None else h0
    if t == 1 and not keep:
        return *_one_token(x, step, A, B, C, D, H), x.new_empty(0)
    starts = x.new_empty(starts_shape(b, t, h, p, n))
    if t == 0:
        return torch.zeros_like(x), H.clone(), starts if keep else x.new_empty(0)
    k = _chunked(x, step, A, B, C)
    M = _attention(k)
    y = (M @ _by_head(k.u)).transpose(2, 3).contiguous()
    added = _grouped(k.u * k.out[..., None], B.shape[2]).transpose(3, 4) @ k.B
    added = added.reshape(b, -1, h, p, n)
    for index in range(starts.shape[1]):
        starts[:, index] = H
        H = torch.addcmul(added[:, index], k.into[:, index, -1, :, None, None], H)
    y.addcmul_(_from_start(k, starts), k.into[..., None])
    if D is not None:
        y.addcmul_(D[:, None], k.x)
    return _unchunked(y, t), H, starts if keep else x.new_empty(0)


def _one_token(
    x: Float[Tensor, "b 1 h p"],
    step: Float[Tensor, "b 1 h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b 1 g n"],
    C: Float[Tensor, "b 1 g n"],
    D: Float[Tensor, " h"] | None,
    H: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b 1 h p"], Float[Tensor, "b h p n"]]:
    """The recurrence itself, for decoding."""
    n_groups = B.shape[2]
    decay = torch.exp(step[:, 0] * A)[:, :, None, None]
    u = (step[:, 0, :, None] * x[:, 0]).unflatten(1, (n_groups, -1))  # b g r p
    added = u[..., None] * B[:, 0, :, None, None, :]
    H = torch.addcmul(added.flatten(1, 2), decay, H)
    y = (H.unflatten(1, (n_groups, -1)) @ C[:, 0, :, None, :, None])[..., 0].flatten(1, 2)
    return (y if D is None else y.addcmul_(D[:, None], x[:, 0]))[:, None], H


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
    starts: Float[Tensor, "b c h p n"],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, step, A, B, C, D, h0, in that order; None for an input that is None."""
    b, t, h, p = x.shape
    n_groups, n = B.shape[2:]
    gH = x.new_zeros(b, h, p, n) if gh is None else gh
    if t == 0:
        zeros = [None if tensor is None else torch.zeros_like(tensor) for tensor in (x, step, A, B, C, D)]
        return *zeros, None if h0 is None else gH.clone()
    k = _chunked(x, step, A, B, C)
    M = _attention(k)
    gy = _in_chunks(torch.zeros_like(x) if gy is None else gy)

    # Through the states, last chunk first: gH is the gradient of the state after a chunk.
    gy_into = gy * k.into[..., None]
    gstart = (_grouped(gy_into, n_groups).transpose(3, 4) @ k.C).reshape(b, -1, h, p, n)
    gend = torch.empty_like(starts)
    gpassed = torch.empty_like(k.into[:, :, -1])  # b c h, of the exponent s_q by which a state is passed on
    for index in reversed(range(starts.shape[1])):
        gend[:, index] = gH
        decay = k.into[:, index, -1]
        gpassed[:, index] = decay * (gH * starts[:, index]).sum((-1, -2))
        gH = torch.addcmul(gstart[:, index], decay[:, :, None, None], gH)

    # From the state at the start of the chunk.
    starts_g = starts.reshape(b, -1, n_groups, h // n_groups * p, n)
    gC = _grouped(gy_into, n_groups) @ starts_g
    ginto = (gy_into * _from_start(k, starts)).sum(-1)  # b c q h, of s_i

    # Into the state at its end.
    gend_g = gend.reshape(starts_g.shape)
    gu = _ungrouped(k.B @ gend_g.transpose(3, 4), h)
    gu *= k.out[..., None]
    gout = (gu * k.u).sum(-1)  # b c q h, of s_q - s_j
    gB = _grouped(k.u * k.out[..., None], n_groups) @ gend_g

    # Inside the chunk.
    gy_h = _by_head(gy)
    gM = gy_h @ _by_head(k.u).transpose(3, 4)
    gu += (M.transpose(3, 4) @ gy_h).transpose(2, 3)
    gs = _between(gM * M)
    gscores = gM.mul_(k.L).unflatten(2, (n_groups, -1)).sum(3)  # b c g q q
    gC += gscores @ k.B
    gB += gscores.transpose(3, 4) @ k.C

    # s_i sums step A over the tokens up to i, so a token's exponent gathers from all i at or after it, from all chunk
    # ends of tokens before it, and from the passing on.
    gs += ginto.flip(2).cumsum(2).flip(2)
    gs[:, :, 1:] += gout[:, :, :-1].cumsum(2)
    gs += gpassed[:, :, None]
    gstep = gs * A + (gu * k.x).sum(-1)
    gA = (gs * k.step).sum((0, 1, 2))
    gx = gu.mul_(k.step[..., None])
    gD = None
    if D is not None:
        gx.addcmul_(D[:, None], gy)
        gD = (gy * k.x).sum((0, 1, 2, 4))
    gB, gC = (_unchunked(tensor.transpose(2, 3), t) for tensor in (gB, gC))
    return _unchunked(gx, t), _unchunked(gstep, t), gA, gB, gC, gD, None if h0 is None else gH


def _chunked(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> _Chunks:
    x, step, B, C = (_in_chunks(tensor) for tensor in (x, step, B, C))
    s = (step * A).cumsum(2)
    rows = s.transpose(2, 3).contiguous()
    L = rows[..., :, None] - rows[..., None, :]
    L.masked_fill_(_above(x.shape[2], x.device), float("-inf")).exp_()
    return _Chunks(
        x=x,
        step=step,
        u=x * step[..., None],
        B=B.transpose(2, 3),
        C=C.transpose(2, 3),
        into=s.exp(),
        out=(s[:, :, -1:] - s).exp_(),
        L=L,
    )


def _above(q: int, device: torch.device) -> Tensor:
    return torch.ones(q, q, dtype=torch.bool, device=device).triu_(1)


def _attention(k: _Chunks) -> Float[Tensor, "b c h q q"]:
    """M: scores are shared by the heads of a group, decays are a head's own."""
    scores = k.C @ k.B.transpose(3, 4)
    return (k.L.unflatten(2, (scores.shape[2], -1)) * scores[:, :, :, None]).flatten(2, 3)


def _from_start(k: _Chunks, starts: Float[Tensor, "b c h p n"]) -> Float[Tensor, "b c q h p"]:
    """C_i H' of every token, before its decay."""
    b, c, h, _, n = starts.shape
    return _ungrouped(k.C @ starts.reshape(b, c, k.C.shape[2], -1, n).transpose(3, 4), h)


def _between(K: Float[Tensor, "b c h q q"]) -> Float[Tensor, "b c q h"]:
    """Gradient of each token's exponent from those of s_i - s_j: token m lies in it when j < m <= i."""
    before = K.cumsum(-1)[..., :-1]  # [i, m - 1]: sum over j < m
    below = before.masked_fill_(_above(K.shape[-1], K.device)[:, 1:], 0)
    return F.pad(below.sum(-2), (1, 0)).transpose(2, 3)


def _in_chunks(tensor: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b c q *rest"]:
    """Whole chunks, zeros at the end; a text shorter than a chunk is one chunk of its own length."""
    t = tensor.shape[1]
    length = min(CHUNK, t)
    missing = -t % length
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)
    return tensor.unflatten(1, (-1, length))


def _unchunked(tensor: Float[Tensor, "b c q *rest"], t: int) -> Float[Tensor, "b t *rest"]:
    return tensor.flatten(1, 2)[:, :t].contiguous()


def _by_head(tensor: Float[Tensor, "b c q h p"]) -> Float[Tensor, "b c h q p"]:
    return tensor.transpose(2, 3).contiguous()


def _grouped(tensor: Float[Tensor, "b c q h p"], n_groups: int) -> Float[Tensor, "b c g q rp"]:
    """The heads of a group side by side as columns of one matrix."""
    return tensor.unflatten(3, (n_groups, -1)).flatten(4).transpose(2, 3)


def _ungrouped(tensor: Float[Tensor, "b c g q rp"], h: int) -> Float[Tensor, "b c q h p"]:
    tensor = tensor.transpose(2, 3)
    return tensor.reshape(*tensor.shape[:3], h, -1)
