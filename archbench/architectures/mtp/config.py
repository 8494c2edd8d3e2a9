"""Sizes and choices of multi-token prediction, and how many layers stand where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from archbench.architectures.transformer import TransformerConfig
from archbench.errors import ConfigError

HeadType = Literal["replicated", "layer", "sequential"]
Match = Literal["params", "trunk"]
Curriculum = Literal["none", "forward", "reverse"]
Training = Literal["joint", "frozen_trunk"]
Decoding = Literal["self_speculative", "next_token"]
DraftPolicy = Literal["point", "stochastic"]
Backward = Literal["sequential", "naive"]

SMALL_VOCABULARY = 1024
"""Up to this many tokens an unembedding a head is cheaper than a layer a head."""
NARROW = 512
"""Below this width the plain sum of losses spoils next-token prediction."""


@dataclass(frozen=True, kw_only=True)
class MTPConfig(TransformerConfig):
    """A Transformer of `n_layers` layers in all, which predicts `n_future` tokens at each position.

    Attributes:
        head_type: what heads 2..n are: an unembedding each (`replicated`), a decoder block each (`layer`), or a chain
            of blocks that see the tokens between (`sequential`). None: `replicated` for vocabularies up to 1024
            tokens, else `layer`.
        match: `params` takes the heads' layers from the trunk, so that the parameters are the Transformer's; `trunk`
            leaves the trunk whole and adds the heads to it.
        loss_ratio: head i weighs loss_ratio^(i-1); 1 is the plain sum. None: 0.5 below d_model 512, else 1.
        curriculum: `forward` adds the heads one after the other over the training, `reverse` takes them away.
        backward: `sequential` holds one head's logits at a time, `naive` those of all.
        training: `frozen_trunk` first trains the next-token path for `trunk_share` of the budget, then heads 2..n on
            what it has become.
        draft_length: the most tokens a decode step writes, None for n_future.
        draft_policy: when sampling, drafts are drawn from their heads (`stochastic`) or the likeliest ones (`point`).
    """

    n_future: int = 4
    head_type: HeadType | None = None
    match: Match = "params"
    loss_ratio: float | None = None
    curriculum: Curriculum = "none"
    backward: Backward = "sequential"
    training: Training = "joint"
    trunk_share: float = 0.75
    decoding: Decoding = "self_speculative"
    draft_length: int | None = None
    draft_policy: DraftPolicy = "stochastic"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                options = ", ".join(map(str, allowed))
                raise ConfigError(f"mtp.{name}: {getattr(self, name)!r}; allowed: {options}")
        if self.n_future < 1:
            raise ConfigError(f"mtp.n_future: {self.n_future}; must be at least 1")
        if self.tie_embeddings:
            raise ConfigError("mtp.tie_embeddings: True; the paper's unembeddings are no embeddings: leave it False")
        if self.n_trunk_layers < 1:
            needed = self.n_layers - self.n_trunk_layers + 1
            raise ConfigError(
                f"mtp.n_layers: {self.n_layers} leave no trunk beside {self.n_future} heads of type {self.heads}; take "
                f"{needed} or more, fewer heads (n_future), head_type: replicated or match: trunk"
            )
        if not self.weight_ratio > 0:
            raise ConfigError(f"mtp.loss_ratio: {self.loss_ratio}; must be above 0")
        if not 0 < self.trunk_share < 1:
            raise ConfigError(f"mtp.trunk_share: {self.trunk_share}; must lie between 0 and 1")
        if self.training == "frozen_trunk" and (self.n_future == 1 or self.curriculum != "none"):
            raise ConfigError(
                f"mtp.training: frozen_trunk with n_future {self.n_future} and curriculum {self.curriculum}; it trains "
                "heads 2..n all at once in its second phase: take n_future 2 or more and curriculum none"
            )
        if not 1 <= self.block <= self.n_future:
            raise ConfigError(f"mtp.draft_length: {self.draft_length}; must lie in [1, n_future {self.n_future}]")

    @property
    def heads(self) -> HeadType:
        """The head type, None resolved."""
        if self.head_type is not None:
            return self.head_type
        return "replicated" if self.vocab_size <= SMALL_VOCABULARY else "layer"

    @property
    def weight_ratio(self) -> float:
        """The loss ratio, None resolved."""
        if self.loss_ratio is not None:
            return self.loss_ratio
        return 0.5 if self.d_model < NARROW else 1.0

    @property
    def n_path_layers(self) -> int:
        """Layers of the next-token path: the trunk's and head 1's."""
        moved = self.match == "params" and self.heads != "replicated"
        return self.n_layers - (self.n_future - 1) * moved

    @property
    def n_trunk_layers(self) -> int:
        """Layers whose output all heads read. Head 1 of type `layer` is one block above it, else nothing."""
        return self.n_path_layers - (self.heads == "layer")

    @property
    def block(self) -> int:
        """Most tokens a decode step reads and writes; 1 is plain next-token decoding."""
        if self.decoding == "next_token":
            return 1
        return self.n_future if self.draft_length is None else self.draft_length

    @property
    def n_parameters(self) -> int:
        """Parameters, embeddings included."""
        d = self.d_model
        block = (2 * self.n_heads + 2 * self.kv_heads) * self.head_dim * d + 3 * d * self.ffn_width + 2 * d
        head = {"replicated": self.vocab_size * d, "layer": block, "sequential": block + 2 * d * d + 2 * d}[self.heads]
        return 2 * self.vocab_size * d + d + self.n_path_layers * block + (self.n_future - 1) * head

    def active_heads(self, progress: float) -> int:
        """How many heads, from the first on, are trained at `progress` in [0, 1) of the budget.

        Source: Aynetdinov & Akbik 2025.
        """
        reached = int(progress * self.n_future)
        if self.curriculum == "forward":
            return min(self.n_future, reached + 1)
        if self.curriculum == "reverse":
            return max(1, self.n_future - reached)
        return self.n_future

    def loss_weights(self) -> list[float]:
        """The weight of each head's loss."""
        return [self.weight_ratio**i for i in range(self.n_future)]


_CHOICES: dict[str, tuple[object, ...]] = {
    "head_type": (None, *get_args(HeadType)),
    "match": get_args(Match),
    "curriculum": get_args(Curriculum),
    "backward": get_args(Backward),
    "training": get_args(Training),
    "decoding": get_args(Decoding),
    "draft_policy": get_args(DraftPolicy),
}
