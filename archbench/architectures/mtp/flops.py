"""What multi-token prediction costs: all heads in training, draft and verification in a decode step."""

from __future__ import annotations

from collections.abc import Sequence

from archbench.architectures.mtp.config import MTPConfig
from archbench.architectures.mtp.heads import ExtraHeads
from archbench.architectures.transformer import Block
from archbench.layers import Linear
from archbench.model import FlopFormulas

MEAN_OVER = 1000
"""Points of the training at which a curriculum's active heads are counted."""


class MTPFlops(FlopFormulas):
    """A curriculum costs what it costs on average over the training: at its beginning a trace shows another number.

    A decode step drafts and verifies whole blocks, whatever is then kept.
    """

    def __init__(self, config: MTPConfig, blocks: Sequence[Block], unembedding: Linear, heads: ExtraHeads) -> None:
        self.config, self.blocks, self.unembedding, self.heads = config, blocks, unembedding, heads

    def training(self, context: int, causal: float = 0.5) -> float:
        config = self.config
        path = self._path(context, 0, causal) + context * self._logits
        bodies = [self.heads.training_flops(head, context, causal) for head in range(2, config.n_future + 1)]
        logits = context * self._logits
        if config.training == "frozen_trunk":
            trunk = sum(block.flops(context, 0, causal) for block in self.blocks[: config.n_trunk_layers])
            # Logits need two of the three passes: a frozen unembedding has no gradient of its own, and one of a head's
            # own hands none on to a frozen trunk.
            heads = trunk + 3 * sum(bodies) + 2 * logits * len(bodies)
            return config.trunk_share * 3 * path + (1 - config.trunk_share) * heads
        active = [config.active_heads(i / MEAN_OVER) for i in range(MEAN_OVER)]
        shares = [sum(n >= head for n in active) / MEAN_OVER for head in range(2, config.n_future + 1)]
        return 3 * (path + sum(share * (body + logits) for share, body in zip(shares, bodies, strict=True)))

    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        return self._path(n, context, causal) + self.heads.read_flops(n, context, causal)

    def decode(self, context: int) -> float:
        limit = self.config.max_context
        k = 1 if context == 0 else self.config.block if limit is None else min(self.config.block, limit - context)
        draft = self.heads.draft_flops(k - 1, context) + (k - 1) * self._logits if k > 1 else 0.0
        return draft + self.prefill(k, context) + k * self._logits

    @property
    def _logits(self) -> int:
        return self.unembedding.flops(1)

    def _path(self, n: int, context: int, causal: float) -> float:
        return sum(block.flops(n, context, causal) for block in self.blocks)
