"""The energy loss: a proper score of a law that can only be sampled.

    S(P, y) = E |x' - x''|^a - 2 E |x - y|^a         x, x', x'' ~ P; strictly proper for 0 < a < 2

Minus S is estimated without bias from N samples of the model and M samples of the posterior of the true latent:

    loss = 2/(N M) sum_{n,m} |x_n - y_m|^a - 1/(N (N-1)) sum_{n != k} |x_n - x_k|^a

Its value depends on the latent space: it does not compare between autoencoders.

Sources: Shao et al. 2025, eq. 9 and 10; Gneiting & Raftery 2007, section 4.3. The differences x_n - y_m are never held:
their squares come from |x|^2 + |y|^2 - 2 x y, a matrix product. Those between samples are few and may be exactly zero,
where the gradient is taken to be zero; they are kept exact.

Letters: p positions, n samples, m targets, l latent width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from archbench.ops.precision import without_autocast

TINY = 1e-12
"""Squared distances below this count as this, without gradient."""


def energy_loss(
    samples: Float[Tensor, "p n l"], targets: Float[Tensor, "p m l"], exponent: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over positions. Gradients flow to `samples` only; fp32 whatever autocast says. n >= 2."""
    with without_autocast(samples):  # distances are not to be rounded to bf16
        targets = targets.detach().float()
        # Moving both changes no distance, and near the targets less is lost to cancellation.
        centre = targets.mean(dim=1, keepdim=True)
        x, y = samples.float() - centre, targets - centre
        squares = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None] - 2 * x @ y.transpose(1, 2)
        to_targets = squares.clamp(min=TINY).pow(exponent / 2).mean()
        return 2 * to_targets - between(x, exponent)


def between(x: Float[Tensor, "p n l"], exponent: float = 1.0) -> Float[Tensor, ""]:
    """Mean of |x_i - x_j|^a over positions and ordered pairs i != j; the gradient at 0 is 0.

    The pairs (i, i + r mod n) and (i, i - r mod n) are the same ones twice, so shifts up to n/2 suffice.
    """
    n = x.shape[1]
    total = torch.zeros((), device=x.device)
    for shift in range(1, n // 2 + 1):
        squares = (x - x.roll(shift, dims=1)).square().sum(dim=-1)
        apart = squares > TINY
        distances = torch.where(apart, torch.where(apart, squares, 1.0).pow(exponent / 2), 0.0)
        total = total + (1 if 2 * shift == n else 2) * distances.sum()
    return total / (len(x) * n * (n - 1))


def energy_loss_flops(n_positions: int, n_samples: int, n_targets: int, width: int) -> int:
    """Forward and backward (towards the samples only) of the one matrix product; the rest is elementwise."""
    return 2 * 2 * n_positions * n_samples * n_targets * width
