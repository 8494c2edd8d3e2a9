"""The lean decode loop of attention models whose layers keep states of their own: one token of every row.

Norms, projections and feed-forward are this loop's (see `lean_stream`); what becomes of a layer's queries, keys and
values is its caller's.

Letters: b rows, d width, w projected width, m width of all heads, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from archbench.ops.decode_weights import BlockWeights
from archbench.ops.lean_stream import LeanStream, transposed

Attend: TypeAlias = Callable[[int, Tensor], Tensor]
"""(layer, its projected token [b, w]) -> what it gathers [b, m]; reads and writes the layer's state."""

LONGEST = {"lean": 1}
"""New tokens of a row, at most, that a level reads."""


class BackboneWeights(NamedTuple):
    embedding: Float[Tensor, "v d"]
    blocks: Sequence[BlockWeights]
    norm: Float[Tensor, " d"]
    unembedding: Float[Tensor, "v d"]
    eps: float


class LeanBackbone:
    """A model's weights, ready for steps."""

    def __init__(self, weights: BackboneWeights) -> None:
        table = weights.embedding
        stream = self._stream = LeanStream(table.shape[1], weights.eps, table.dtype)
        self._gain, self._unembedding = stream.product(weights.norm, weights.unembedding)
        self._blocks = [
            (
                *stream.product(block.norm_attention, block.qkv),
                transposed(block.out),
                *stream.product(block.norm_ffn, block.gate_up),
                transposed(block.down),
            )
            for block in weights.blocks
        ]

    def hidden(self, embedded: Float[Tensor, "b 1 d"], attend: Attend) -> Float[Tensor, "b 1 d"]:
        """What the last norm makes of a token of each row."""
        stream, x = self._read(embedded[:, 0], attend)
        return self._stream.final(stream, x, self._gain)[:, None]

    def logits(self, embedded: Float[Tensor, "b 1 d"], attend: Attend) -> Float[Tensor, "b 1 v"]:
        """Logits of what follows a token of each row."""
        stream, x = self._read(embedded[:, 0], attend)
        return torch.mm(self._stream.normed(stream, x, self._gain), self._unembedding)[:, None]

    def _read(self, embedded: Float[Tensor, "b d"], attend: Attend) -> tuple[Tensor, Tensor]:
        normed = self._stream.normed
        stream, x = self._stream.begun(embedded)
        for layer, (gain_attention, qkv, out, gain_ffn, gate_up, down) in enumerate(self._blocks):
            x.addmm_(attend(layer, torch.mm(normed(stream, x, gain_attention), qkv)), out)
            gate, up = torch.mm(normed(stream, x, gain_ffn), gate_up).chunk(2, 1)
            x.addmm_(F.silu(gate).mul_(up), down)
        return stream, x
