"""Sharpening a law that can only be sampled: chunks x with probability P(x)^(1/T) / Z, 0 < T < 1.

Exact (rejection): with n = floor(1/T) and a = 1/T - n,

    1. draw n chunks; unless all are the same x*, begin again. (They are x* with probability P(x*)^n.)
    2. if a > 0: for i = 1, 2, ... draw x; if x = x* accept; else begin again at 1 with probability a/i.

Step 2 accepts with probability sum_k (1-p)^k prod_{j<=k} (1 - a/j) p = p^a for p = P(x*), so x* comes with P(x*)^(n+a).
Draws grow without bound on flat laws: there is a limit, and an error when it is met.

Batch (approximate, T = 1/n only): draw N_s chunks, count c_x, and for m = n, n-1, ..., 1 take the first m that some
count reaches; x is chosen with weight C(c_x, m). Biased for finite N_s, right in the limit. As T goes to 0 it becomes
the most frequent chunk of the batch, which is what temperature 0 means here.

Source: Shao et al. 2025, section 5, algorithms 1 and 2.

Letters: b rows, s draws, k tokens of a chunk, r rows asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64, Int
from torch import Generator, Tensor

from archbench.errors import UnsupportedError

Sampler = Callable[[Tensor, int], Tensor]
"""(rows, s) -> chunks [r, s, k]: s independent draws of each of these rows (indices [r])."""

NEAR = 1e-9
"""1/T this near to an integer is that integer."""


def split_power(temperature: float) -> tuple[int, float]:
    """n and a, with 1/T = n + a and 0 <= a < 1."""
    power = 1 / temperature
    if abs(power - round(power)) <= NEAR:
        return round(power), 0.0
    return math.floor(power), power - math.floor(power)


def exact(
    sampler: Sampler, n_rows: int, temperature: float, max_draws: int, generator: Generator, device: torch.device
) -> tuple[Int[Tensor, "b k"], Int[Tensor, " b"]]:
    """One chunk a row with law P^(1/T) / Z, and how many chunks each row drew for it.

    Raises:
        UnsupportedError: a row would draw more than `max_draws` chunks.
    """
    n, rest = split_power(temperature)
    waiting = torch.arange(n_rows, device=device)  # rows at step 1
    trying = waiting[:0]  # rows at step 2
    trial = torch.zeros(n_rows, device=device)  # i of step 2
    draws = torch.zeros(n_rows, dtype=torch.long, device=device)
    found: Tensor | None = None
    while len(waiting) or len(trying):
        agreed, failed = waiting[:0], trying[:0]
        if len(waiting):
            chunks = sampler(waiting, n)
            draws[waiting] += n
            found = chunks.new_zeros(n_rows, chunks.shape[2]) if found is None else found
            same = (chunks == chunks[:, :1]).all(dim=2).all(dim=1)
            agreed, waiting = waiting[same], waiting[~same]
            found[agreed] = chunks[same, 0]
            trial[agreed] = 0
        if len(trying):
            assert found is not None
            chunk = sampler(trying, 1)[:, 0]
            draws[trying] += 1
            trial[trying] += 1
            missed = trying[(chunk != found[trying]).any(dim=1)]
            uniform = torch.rand(len(missed), generator=generator, device=device)
            restart = uniform < rest / trial[missed]
            failed, trying = missed[restart], missed[~restart]
        waiting = torch.cat([waiting, failed])
        if rest > 0:
            trying = torch.cat([trying, agreed])
        if len(unfinished := torch.cat([waiting, trying])) and int(draws[unfinished].max()) >= max_draws:
            raise UnsupportedError(
                f"calm: no chunk was accepted in {max_draws} draws at temperature {temperature:g}; raise max_draws, or "
                "use temperature_method batch"
            )
    assert found is not None, "there are rows"
    return found, draws


def batch(draw: Callable[[], Tensor], temperature: float, generator: Generator) -> Int[Tensor, "b k"]:
    """One chunk a row, picked from its draws, [b, s, k], which `draw` makes.

    Raises:
        UnsupportedError: 1/T is no integer; before anything is drawn.
    """
    n, rest = split_power(temperature)
    if rest:
        allowed = f"1/{n} = {1 / n:.4g} or 1/{n + 1} = {1 / (n + 1):.4g}"
        raise UnsupportedError(
            f"calm: temperature {temperature:g} is not 1/n, which temperature_method batch needs; nearest: {allowed}; "
            "or use temperature_method exact"
        )
    chunks = draw()
    weights = batch_weights(counts(chunks), n)
    cumulative = weights.cumsum(dim=1)
    uniform = torch.rand(len(chunks), 1, generator=generator, dtype=torch.float64, device=chunks.device)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=chunks.shape[1] - 1)
    return chunks.gather(1, chosen[:, :, None].expand(-1, -1, chunks.shape[2]))[:, 0]


def batch_weights(count: Int[Tensor, "b s"], n: int) -> Float64[Tensor, "b s"]:
    """Weight of each draw, so that all draws of a chunk counted c weigh C(c, m) together, up to a factor a row.

    C(c, m) / c is the product of (c - j) over j = 1 .. m-1, up to m!: zero by itself for c < m. Factors are taken
    relative to the largest count's, since their product may be no fp64 number.
    """
    most = count.amax(dim=1, keepdim=True)
    m = most.clamp(max=n)
    weights = torch.ones_like(count, dtype=torch.float64)
    for j in range(1, int(m.max())):
        factor = (count - j).double() / (most - j).clamp(min=1).double()
        weights = torch.where(j < m, weights * factor, weights)
    return weights


def most_frequent(chunks: Int[Tensor, "b s k"]) -> Int[Tensor, "b k"]:
    """The chunk drawn most often in each row; of several, the one drawn first."""
    chosen = counts(chunks).argmax(dim=1)
    return chunks.gather(1, chosen[:, None, None].expand(-1, -1, chunks.shape[2]))[:, 0]


def counts(chunks: Int[Tensor, "b s k"]) -> Int[Tensor, "b s"]:
    """How often each draw's chunk was drawn in its row."""
    return (chunks[:, :, None] == chunks[:, None]).all(dim=3).sum(dim=2)
