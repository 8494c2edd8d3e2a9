"""Which drafts stay: the step that makes speculation exact.

The next-token head reads the pending token and the drafts at once and gives, at every index, the law p of the token
that follows if all drafts up to there are right. Drafts are kept from the left up to the first that is refused; in its
place, or after the last, comes one token of p's own. So a step writes one token at least, all of them distributed as if
they had been written one by one; greedy, where p is certain, the very same tokens.

- `point`: a draft y is a guess without a law. It must be kept with probability p(y), else the token comes from p
  without y. Both at once: draw from p, and keep y if it was drawn. One uniform number an index, in order.
- `stochastic`: y was drawn from a law q. It is kept with probability min(1, p(y) / q(y)), else the token comes from
  max(0, p - q), normalised. First the uniform numbers of all drafts, then one for the token.

Sources: Stern et al. 2018, section 3 (greedy); Leviathan et al. 2023, section 2.3 and appendix A.1 (sampled).

Letters: b batch, k tokens of a block, v vocabulary; a block has k - 1 drafts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench.architectures.mtp.config import DraftPolicy
from archbench.sampling import PLAIN, Sampling, draw, probabilities


class Speculation:
    """The drafts of one step and what becomes of them."""

    def __init__(self, sampling: Sampling, generator: Generator | None, policy: DraftPolicy) -> None:
        self.sampling, self.generator = sampling, generator
        self.drawn = policy == "stochastic" and not sampling.greedy
        self.laws: list[Tensor] = []

    def pick(self, logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
        """The next draft of each row, from the logits of its head."""
        if not self.drawn:
            return logits.argmax(dim=-1)
        self.laws.append(probabilities(logits, self.sampling))
        return draw(logits, self.sampling, self.generator)

    def verify(
        self, logits: Float[Tensor, "b k v"], drafts: Int[Tensor, "b k-1"]
    ) -> tuple[Int[Tensor, "b k"], Int[Tensor, " b"]]:
        """Tokens written and how many of them count."""
        if not self.laws:
            return verified(logits, drafts, self.sampling, self.generator)
        return verified_against(logits, drafts, torch.stack(self.laws, dim=1), self.sampling, self.generator)


def verified(
    logits: Float[Tensor, "b k v"], drafts: Int[Tensor, "b k-1"], sampling: Sampling, generator: Generator | None
) -> tuple[Int[Tensor, "b k"], Int[Tensor, " b"]]:
    """Tokens written and how many of them count, for drafts that are guesses (or greedy decoding)."""
    tokens = draw(logits.flatten(0, 1), sampling, generator).view(logits.shape[:2])
    kept = (tokens[:, :-1] == drafts).cumprod(dim=1).sum(dim=1)
    return tokens, kept + 1


def verified_against(
    logits: Float[Tensor, "b k v"],
    drafts: Int[Tensor, "b k-1"],
    laws: Float[Tensor, "b k-1 v"],
    sampling: Sampling,
    generator: Generator | None,
) -> tuple[Int[Tensor, "b k"], Int[Tensor, " b"]]:
    """Tokens written and how many of them count, for drafts drawn from `laws`."""
    p = probabilities(logits, sampling)
    of_draft = drafts[..., None]
    p_draft, q_draft = p[:, :-1].gather(-1, of_draft)[..., 0], laws.gather(-1, of_draft)[..., 0]
    uniform = torch.rand(drafts.shape, generator=generator, dtype=torch.float64, device=logits.device)
    kept = (uniform * q_draft < p_draft).long().cumprod(dim=1).sum(dim=1)
    rest = (p[:, :-1] - laws).clamp(min=0)
    # Where p equals q nothing is refused but by rounding, and nothing would be left to draw from.
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p[:, :-1])
    row = torch.arange(len(kept), device=kept.device)
    last = draw(torch.cat([rest, p[:, -1:]], dim=1)[row, kept].log(), PLAIN, generator)
    tokens = torch.cat([drafts, last[:, None]], dim=1)
    tokens[row, kept] = last
    return tokens, kept + 1
