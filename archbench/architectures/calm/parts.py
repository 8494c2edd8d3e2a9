"""The small parts that the autoencoder and the heads are made of: matrices with bias, their FLOPs, layer norms.

The paper draws every matrix from N(0, 0.02^2), which suits widths from 512 up; here 1/sqrt(fan-in) is used at every
width. At width 64 the paper's rule reconstructs 77 % of the bytes after the training in which this one reaches 96 %.
"""

from __future__ import annotations

from torch import Generator, nn

from archbench.layers import draw_normal


class Affine(nn.Linear):
    """A matrix with bias: weights from N(0, std), bias 0."""

    def __init__(self, d_in: int, d_out: int, *, std: float | None = None, generator: Generator | None = None) -> None:
        super().__init__(d_in, d_out)
        draw_normal(self.weight, d_in**-0.5 if std is None else std, generator)
        nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Nothing: `__init__` draws the weights once, from its generator, not from global random state."""

    def flops(self, n: int) -> int:
        return 2 * n * self.in_features * self.out_features


def layer_norm(width: int, affine: bool = True) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
