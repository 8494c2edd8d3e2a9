"""The floor: a count-based n-gram model. A trained model that does not beat it has learned nothing of order.

    p_1(w)     = (count(w) + a / V) / (count + a)                       order 1: unigram
    p_k(w | c) = (count(c, w) + a p_{k-1}(w)) / (count(c) + a)          order k: backs off to the shorter context

with c the last k - 1 tokens. It learns by reading the same windows as every other cell (its phase has no parameters,
hence no gradient step) and goes through the same metrics.

Source: MacKay & Peto 1995, A hierarchical Dirichlet language model, eq. 19, with one constant a for all orders.

Letters: b batch, t time, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench.errors import ConfigError
from archbench.model import Architecture, AutoregressiveModel, Batch, Loss, Phase, Traits

MAX_CELLS = 2**26
"""Largest count table: 256 MB of 32-bit counts."""


@dataclass(frozen=True, kw_only=True)
class NgramConfig:
    """`order` 1 is the unigram, 2 the bigram, ...; `backoff` is the constant a, in counts."""

    vocab_size: int
    order: int = 2
    backoff: float = 4.0

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ConfigError(f"ngram.vocab_size: {self.vocab_size}; must be at least 2")
        if self.order < 1 or self.vocab_size**self.order > MAX_CELLS:
            raise ConfigError(
                f"ngram.order: {self.order} needs a table of vocab_size^order = {self.vocab_size}^{self.order} counts; "
                f"it must be at least 1 and the table at most {MAX_CELLS}"
            )
        if self.backoff <= 0:
            raise ConfigError(f"ngram.backoff: {self.backoff}; must be above 0")


class Ngram(AutoregressiveModel):
    """State: the last order - 1 tokens, boundaries before the first."""

    def __init__(self, config: NgramConfig, generator: Generator | None = None) -> None:
        del generator  # counts begin at zero
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        for order in range(1, config.order + 1):
            # Whole numbers: fp32 stops counting at 2^24.
            self.register_buffer(f"counts_{order}", torch.zeros([config.vocab_size] * order, dtype=torch.int32))

    def counts(self, order: int) -> Tensor:
        return self.get_buffer(f"counts_{order}")

    def phases(self) -> list[Phase]:
        return [Phase(name="count", share=1.0, groups=(), loss=self.count)]

    def count(self, batch: Batch) -> Loss:
        """Counts the n-grams of the windows; the loss reported is the nats per token before they were counted."""
        tokens = batch.tokens
        longest = self.config.order
        with torch.no_grad():
            loss = self.next_token_loss(batch).value
            padded = torch.cat([tokens.new_zeros(len(tokens), longest - 1), tokens[:, 1:]], dim=1)
            if longest > 1:
                padded[:, longest - 2] = tokens[:, 0]
            for order in range(1, longest + 1):
                grams = padded.unfold(1, order, 1)[:, longest - order :].reshape(-1, order)
                counts = self.counts(order)
                counts.index_put_(tuple(grams.T), counts.new_ones(len(grams)), accumulate=True)
        return Loss(loss)

    def initial_layers(self, batch_size: int) -> Int[Tensor, "b k"]:
        return torch.zeros(batch_size, max(0, self.config.order - 2), dtype=torch.long, device=self.device)

    def hidden(
        self, tokens: Int[Tensor, "b t"], layers: Int[Tensor, "b k"]
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b k"]]:
        """The log-probabilities themselves: a count table has no other hidden vector."""
        history = torch.cat([layers, tokens], dim=1)
        a, t = self.config.backoff, tokens.shape[1]
        probs = (self.counts(1) + a / self.vocab_size) / (self.counts(1).sum() + a)
        probs = probs.expand(*tokens.shape, -1)
        for order in range(2, self.config.order + 1):
            context = history.unfold(1, order - 1, 1)[:, -t:]
            found = self.counts(order)[tuple(context.unbind(-1))]
            probs = (found + a * probs) / (found.sum(dim=-1, keepdim=True) + a)
        return probs.log(), history[:, history.shape[1] - layers.shape[1] :].clone()

    def logits(self, hidden: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        return hidden

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        del context, causal
        return 3 * n * self.vocab_size * self.config.order

    def logits_flops(self) -> float:
        return 0


ARCHITECTURE = Architecture(
    config=NgramConfig,
    build=Ngram,
    traits=lambda _config: Traits(likelihood=True, constant_state=True),
    paper="MacKay & Peto 1995, A hierarchical Dirichlet language model",
)
