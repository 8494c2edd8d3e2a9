"""The residual stream of lean decode loops: norms and the products that follow them in few and cheap calls.

- Matrices lie transposed, [inputs, outputs], with the norm's gain and the root of the width multiplied into them.
- The stream has one more column that holds sqrt(d eps), so that a norm is one vector norm and one division.

Half types keep gains and norms apart in fp32, as rounding asks for it.

Letters: b rows, d width, o outputs, i inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class LeanStream:
    """How streams of this width and type are normed and multiplied."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        self._width, self._eps = width, eps
        self._folds = dtype in (torch.float32, torch.float64)
        self.wide = torch.promote_types(dtype, torch.float32)
        """What norms and recurrences are computed in."""

    def begun(self, x: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d_plus_1"], Float[Tensor, "b d"]]:
        """A stream that begins with x: with its further column, and a view without it to add to."""
        stream = F.pad(x, (0, 1), value=math.sqrt(self._width * self._eps))
        return stream, stream[:, : self._width]

    def product(
        self, gain: Float[Tensor, " d"], weight: Float[Tensor, "o d"]
    ) -> tuple[Float[Tensor, " d"], Float[Tensor, "d o"]]:
        """A norm's gain and the matrix behind it as `normed` and torch.mm want them."""
        gain = gain.detach() * math.sqrt(self._width)
        return gain.to(self.wide), transposed(weight * gain if self._folds else weight)

    def normed(
        self, stream: Float[Tensor, "b d_plus_1"], x: Float[Tensor, "b d"], gain: Float[Tensor, " d"]
    ) -> Float[Tensor, "b d"]:
        """What is to be multiplied by the matrix that `product` made with this gain."""
        if self._folds:
            return x / torch.linalg.vector_norm(stream, 2, -1, True)
        return self.final(stream, x, gain)

    def final(
        self, stream: Float[Tensor, "b d_plus_1"], x: Float[Tensor, "b d"], gain: Float[Tensor, " d"]
    ) -> Float[Tensor, "b d"]:
        """The norm itself, gain included."""
        return (x / torch.linalg.vector_norm(stream, 2, -1, True, dtype=self.wide) * gain).to(x.dtype)


def transposed(weight: Float[Tensor, "o i"]) -> Float[Tensor, "i o"]:
    return weight.detach().t().contiguous()
