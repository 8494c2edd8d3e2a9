"""Models for testing the contract's kit: two healthy ones that take its rarer paths, and many with one planted defect.

`Pairs` has no likelihood and writes two tokens a step; `Halting` writes one or two, each row as it likes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from archbench.architectures import transformer
from archbench.architectures.ngram import Ngram
from archbench.architectures.transformer import Transformer
from archbench.contract import VOCAB_SIZE
from archbench.layers import Embedding, KVCache, Linear
from archbench.model import (
    Architecture,
    AutoregressiveState,
    Batch,
    Emission,
    FlopFormulas,
    Loss,
    ParameterGroup,
    Phase,
    Reconstruction,
    SequenceModel,
    Speculative,
    Traits,
    decay_groups,
)
from archbench.sampling import Sampling, draw


class Pairs(SequenceModel):
    """Recurrent over pairs of tokens: h' = tanh(W h + E a + E' b); writes both tokens of the next pair at once."""

    width = 16

    def __init__(self, config: Any, generator: Generator | None = None) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.tables = nn.ModuleList(
            Embedding(self.vocab_size, self.width, std=0.5, generator=generator) for _ in range(2)
        )
        self.carry = Linear(self.width, self.width, generator=generator)
        self.heads = nn.ModuleList(Linear(self.width, self.vocab_size, generator=generator) for _ in range(2))

    def read_pair(self, pair: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.carry(state) + self.tables[0](pair[:, 0]) + self.tables[1](pair[:, 1]))

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, self.width)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        for pair in tokens.split(2, dim=1) if tokens.shape[1] else ():
            state = self.read_pair(pair, state)
        return state

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        pair = torch.stack([draw(head(state), sampling, generator) for head in self.heads], dim=1)
        return Emission(pair, torch.full((len(pair),), 2), self.read_pair(pair, state))

    def phases(self) -> list[Phase]:
        return [Phase(name="pairs", share=1.0, groups=decay_groups(self), loss=self.pair_loss)]

    def pair_loss(self, batch: Batch) -> Loss:
        state, losses = self.initial_state(len(batch.tokens)), []
        pairs = batch.tokens.split(2, dim=1)
        for pair, following in pairwise(pairs):
            state = self.read_pair(pair, state)
            losses += [F.cross_entropy(head(state), following[:, i]) for i, head in enumerate(self.heads)]
        return Loss(torch.stack(losses).mean())

    def flops(self) -> FlopFormulas:
        raise NotImplementedError("not needed here")


PAIRS = Architecture(
    config=transformer.TransformerConfig,
    build=Pairs,
    traits=lambda _config: Traits(likelihood=False, stride=2, lookahead=2, constant_state=True),
    paper="none",
)


class Halting(Ngram):
    """Writes two tokens, or one where that one is odd: rows advance at their own pace, as in speculative decoding."""

    def decode_step(self, state, sampling, generator):
        first = super().decode_step(state, sampling, generator)
        second = super().decode_step(first.state, sampling, generator)
        both = self.goes_on(first.tokens[:, 0], second.tokens[:, 0])
        pending = torch.where(both, second.state.pending, first.state.pending)
        layers = torch.where(both[:, None], second.state.layers, first.state.layers)
        tokens = torch.cat([first.tokens, second.tokens], dim=1)
        return Emission(tokens, 1 + both.long(), AutoregressiveState(pending, layers))

    def goes_on(self, first: Tensor, second: Tensor) -> Tensor:
        return first % 2 == 0


class AcceptsWhatItLikes(Halting):
    """Keeps second tokens by what they are: single steps look right, the text does not."""

    def goes_on(self, first, second):
        return second < 4


class AdvancesAllRows(Halting):
    """Drops a token of the text, but not of the state, where a row halts."""

    def decode_step(self, state, sampling, generator):
        tokens, counts, after = super().decode_step(state, sampling, generator)
        return Emission(tokens, counts, after._replace(pending=tokens[:, 1]))


class Drafting(Halting, Speculative):
    """Healthy where it is declared: second tokens are drafts, and even first ones let them stand."""

    def plain(self) -> Ngram:
        plain = Ngram(self.config)
        plain.load_state_dict(self.state_dict(), assign=True)
        return plain.eval()


class KeepsWrongDrafts(Drafting):
    """The second token is the next one of the alphabet, whatever the law says."""

    def decode_step(self, state, sampling, generator):
        tokens, counts, after = super().decode_step(state, sampling, generator)
        wrong = (tokens[:, 1] + 1) % self.vocab_size
        pending = torch.where(counts == 2, wrong, after.pending)
        return Emission(torch.stack([tokens[:, 0], wrong], dim=1), counts, after._replace(pending=pending))


class PlainDraftsAsWell(Drafting):
    def plain(self):
        return self


class PairsForgetWhatTheyWrote(Pairs):
    def decode_step(self, state, sampling, generator):
        return super().decode_step(state, sampling, generator)._replace(state=state)


class PairsReadTheFirstOfEachCall(Pairs):
    def prefill(self, tokens, state):
        return super().prefill(torch.cat([tokens[:, :2], tokens[:, 4:]], dim=1), state)


class PairsHaltHalfway(Pairs):
    def decode_step(self, state, sampling, generator):
        emission = super().decode_step(state, sampling, generator)
        return emission._replace(counts=emission.counts - 1)


class PairsMixRows(Pairs):
    def read_pair(self, pair, state):
        read = super().read_pair(pair, state)
        return read + 0.5 * read.flip(0)


class PairsHaveACode(Pairs, Reconstruction):
    """Healthy where it is declared: a pair's code is the state after reading it alone."""

    def posterior(self, tokens):
        pairs = tokens.view(-1, 2)
        mean = self.read_pair(pairs, self.initial_state(len(pairs))).view(len(tokens), -1, self.width)
        return mean, torch.full_like(mean, 0.1)

    def reconstruct(self, latent):
        return torch.stack([head(latent) for head in self.heads], dim=2).flatten(1, 2)


class PairsCodeEachToken(PairsHaveACode):
    def posterior(self, tokens):
        mean, sigma = super().posterior(tokens)
        return mean.repeat_interleave(2, dim=1), sigma.repeat_interleave(2, dim=1)


class PairsReconstructOne(PairsHaveACode):
    def reconstruct(self, latent):
        return super().reconstruct(latent)[:, ::2]


@contextmanager
def swapped(name: str, value: Any) -> Iterator[None]:
    """A part of the Transformer's module exchanged for the length of one pass."""
    own = getattr(transformer, name)
    setattr(transformer, name, value)
    try:
        yield
    finally:
        setattr(transformer, name, own)


class AttendsToTheFuture(Transformer):
    def hidden(self, tokens, layers):
        def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        with swapped("causal_attention", unmasked):
            return super().hidden(tokens, layers)


class LeaksALittle(Transformer):
    """A hundredth of the next position's last hidden vector."""

    def hidden(self, tokens, layers):
        hidden, layers = super().hidden(tokens, layers)
        return torch.cat([hidden[:, :-1] + 0.01 * hidden[:, 1:], hidden[:, -1:]], dim=1), layers


class MixesRows(Transformer):
    def hidden(self, tokens, layers):
        hidden, layers = super().hidden(tokens, layers)
        return hidden + 1e-4 * hidden.mean(dim=0, keepdim=True), layers


class KnowsTheBatchSize(Transformer):
    def hidden(self, tokens, layers):
        hidden, layers = super().hidden(tokens, layers)
        return hidden * (1.01 if len(tokens) > 1 else 1.0), layers


class ShiftsLaterPositions(Transformer):
    """Rotary positions of every chunk but the first are one too far."""

    def hidden(self, tokens, layers):
        angles, offset = transformer.rotary_angles, int(layers[0].length > 0)
        with swapped("rotary_angles", lambda start, *rest: angles(start + offset, *rest)):
            return super().hidden(tokens, layers)


class ForgetsWhatItWrote(Transformer):
    """Keys and values of decoded tokens are dropped: the cache's length stays behind."""

    def decode_step(self, state, sampling, generator):
        lengths = [cache.length for cache in state.layers]
        tokens, counts, after = super().decode_step(state, sampling, generator)
        layers = tuple(KVCache(c.keys, c.values, n) for c, n in zip(after.layers, lengths, strict=True))
        return Emission(tokens, counts, AutoregressiveState(after.pending, layers))


class ForgetsTheNewestRead(Transformer):
    """After a prompt the pending token is the last but one."""

    def prefill(self, tokens, state):
        state = super().prefill(tokens, state)
        return state._replace(pending=tokens[:, -2]) if tokens.shape[1] > 1 else state


class ReadsNothingTwice(Transformer):
    def prefill(self, tokens, state):
        return super().prefill(tokens if tokens.shape[1] else state.pending[:, None], state)


class ScoresFromScratch(Transformer):
    def score(self, tokens, state):
        return super().score(tokens, self.initial_state(len(tokens)))


class LeavesMassOver(Transformer):
    def score(self, tokens, state):
        log_probs, state = super().score(tokens, state)
        return log_probs - 0.01, state


class DrawsTooWarm(Transformer):
    def decode_step(self, state, sampling, generator):
        return super().decode_step(state, Sampling(temperature=1.25 * sampling.temperature), generator)


class DrawsEachStepTwice(Transformer):
    """Every second token repeats the one before: single tokens are right, pairs are not."""

    def decode_step(self, state, sampling, generator):
        tokens, counts, state = super().decode_step(state, sampling, generator)
        repeated = self.prefill(tokens, state)
        return Emission(tokens.repeat(1, 2), 2 * counts, repeated)


class PrefersTheLast(Transformer):
    def decode_step(self, state, sampling, generator):
        if not sampling.greedy:
            return super().decode_step(state, sampling, generator)
        hidden, layers = self.hidden(state.pending[:, None], state.layers)
        token = VOCAB_SIZE - 1 - self.logits(hidden[:, -1]).flip(-1).argmax(dim=-1)
        return Emission(token[:, None], torch.ones_like(token), AutoregressiveState(token, layers))


class AlwaysNeedsAGenerator(Transformer):
    def decode_step(self, state, sampling, generator):
        torch.rand((), generator=Generator().set_state(generator.get_state()))
        return super().decode_step(state, sampling, generator)


class KeepsItsCacheInTheModel(Transformer):
    """The state is a ticket: copies hold the same ticket."""

    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        self.shelf: dict[int, Any] = {}  # by ticket

    def train(self, mode=True):
        self.shelf.clear()
        return super().train(mode)

    def initial_layers(self, batch_size):
        self.shelf[len(self.shelf)] = super().initial_layers(batch_size)
        return len(self.shelf) - 1

    def hidden(self, tokens, layers):
        hidden, self.shelf[layers] = super().hidden(tokens, self.shelf[layers])
        return hidden, layers


class RemembersInTheModel(Ngram):
    """Reads on from what was read last, whichever state that belonged to."""

    def initial_layers(self, batch_size):
        self.last = super().initial_layers(batch_size)
        return self.last.clone()

    def hidden(self, tokens, layers):
        hidden, self.last = super().hidden(tokens, self.last if self.last.shape == layers.shape else layers)
        return hidden, self.last.clone()


class KeepsEveryPair(Ngram):
    """A state that grows with the square of what was read."""

    def initial_layers(self, batch_size):
        return {"own": super().initial_layers(batch_size), "pairs": torch.zeros(batch_size, 1, 1)}

    def hidden(self, tokens, layers):
        hidden, own = super().hidden(tokens, layers["own"])
        n = layers["pairs"].shape[1] + tokens.shape[1]
        return hidden, {"own": own, "pairs": torch.zeros(len(tokens), n, n)}


class WritesOutsideTheVocabulary(Transformer):
    def decode_step(self, state, sampling, generator):
        emission = super().decode_step(state, sampling, generator)
        return emission._replace(tokens=emission.tokens + VOCAB_SIZE)


class WritesNothing(Transformer):
    def decode_step(self, state, sampling, generator):
        emission = super().decode_step(state, sampling, generator)
        return emission._replace(counts=torch.zeros_like(emission.counts))


class DropsAParameter(Transformer):
    def phases(self):
        (phase,) = super().phases()
        return [replace(phase, groups=phase.groups[:1])]


class TrainsAParameterTwice(Transformer):
    def phases(self):
        (phase,) = super().phases()
        again = ParameterGroup(name="again", parameters=[self.norm.weight])
        return [replace(phase, groups=[*phase.groups, again])]


class SpendsTooMuch(Transformer):
    def phases(self):
        (phase,) = super().phases()
        return [phase, phase]


class CarriesADeadParameter(Transformer):
    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        self.dead = nn.Parameter(torch.ones(3))


class ClimbsInsteadOfDescending(Transformer):
    def next_token_loss(self, batch):
        value = super().next_token_loss(batch).value
        return Loss(value.detach() * 2 - value)


class LooksTwoAhead(Transformer):
    def next_token_loss(self, batch):
        hidden, _ = self.hidden(batch.tokens[:, :-2], self.initial_layers(len(batch.tokens)))
        return Loss(nn.functional.cross_entropy(self.logits(hidden).flatten(0, 1), batch.tokens[:, 2:].flatten()))


class LosesItsCounts(Ngram):
    """The tables are not part of the state dict."""

    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        for order in range(1, config.order + 1):
            table = self.counts(order)
            delattr(self, f"counts_{order}")
            self.register_buffer(f"counts_{order}", table, persistent=False)


class SharesPartOfATensor(Transformer):
    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        self.register_buffer("part", self.embedding.weight.detach()[:3])


class IgnoresTheSeed(Transformer):
    def __init__(self, config, generator=None):
        super().__init__(config, Generator().manual_seed(0))


class InitialisesAtLarge(Transformer):
    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        nn.init.normal_(self.unembedding.weight, std=0.05)


class DrawsAtLarge(Transformer):
    def decode_step(self, state, sampling, generator):
        return super().decode_step(state, sampling, generator if sampling.greedy else torch.default_generator)


class LossDrawsAtLarge(Transformer):
    def next_token_loss(self, batch: Batch) -> Loss:
        return Loss(super().next_token_loss(batch).value * (1 + 0.01 * torch.rand(())))


class TossesACoinOfPython(Transformer):
    def next_token_loss(self, batch: Batch) -> Loss:
        return Loss(super().next_token_loss(batch).value * (1 + 0.01 * random.random()))


class LooksOneAhead(Transformer):
    """A loss of next tokens only, though windows hold two tokens beyond the context."""

    def next_token_loss(self, batch):
        return super().next_token_loss(batch._replace(tokens=batch.tokens[:, :-1]))


class LearnsWhatDoesNotCount(Transformer):
    """Takes weights, and learns every token alike."""

    def next_token_loss(self, batch):
        told = super().next_token_loss(batch)
        return told._replace(value=super().next_token_loss(batch._replace(weights=None)).value)


class KeepsExactnessToItself(Transformer):
    def next_token_loss(self, batch):
        return super().next_token_loss(batch)._replace(parts={})


class HearsOnlyOnce(Transformer):
    """Takes repeats, and reads every token once."""

    def next_token_loss(self, batch):
        return super().next_token_loss(batch._replace(repeats=None))
