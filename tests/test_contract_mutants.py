"""The kit itself is tested: a real model with one planted defect each, caught by the promise that is meant for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from archbench.architectures import ngram, transformer
from archbench.architectures.ngram import Ngram, NgramConfig
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.contract import PROMISES, VOCAB_SIZE, Candidate, check, verify
from archbench.layers import KVCache
from archbench.model import (
    Architecture,
    AutoregressiveState,
    Batch,
    Emission,
    Loss,
    ParameterGroup,
    SequenceModel,
    Traits,
)
from archbench.sampling import Sampling

torch.set_num_threads(1)

TRANSFORMER = TransformerConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1)
NGRAM = NgramConfig(vocab_size=VOCAB_SIZE, order=3)


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
        self.shelf: dict[int, Any] = {}

    def initial_layers(self, batch_size):
        self.shelf[len(self.shelf)] = super().initial_layers(batch_size)
        return len(self.shelf) - 1

    def hidden(self, tokens, layers):
        hidden, self.shelf[layers] = super().hidden(tokens, self.shelf[layers])
        return hidden, layers


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


@dataclass(frozen=True)
class Mutant:
    """A defect, the promise that must catch it, and what its traits say if they are the defect."""

    defect: str
    caught_by: str
    build: type[SequenceModel] = Transformer
    traits: Traits | None = None
    config: Any = None

    def candidate(self) -> Candidate:
        counting = issubclass(self.build, Ngram)
        base: Architecture = ngram.ARCHITECTURE if counting else transformer.ARCHITECTURE
        traits = base.traits if self.traits is None else lambda _config: self.traits
        config = self.config or (NGRAM if counting else TRANSFORMER)
        return Candidate(architecture=replace(base, build=self.build, traits=traits), config=config)


def planted(build: type, caught_by: str) -> Mutant:
    return Mutant(build.__name__, caught_by, build=build)


LIMITED = replace(TRANSFORMER, max_context=40)

TWO_AHEAD = Traits(likelihood=True, lookahead=2)

MUTANTS = [
    planted(AttendsToTheFuture, "causality"),
    planted(AttendsToTheFuture, "chunked_prefill"),
    planted(LeaksALittle, "causality"),
    planted(LeaksALittle, "score_streams"),
    planted(MixesRows, "rows_are_independent"),
    planted(KnowsTheBatchSize, "batch_equals_single"),
    planted(ShiftsLaterPositions, "chunked_prefill"),
    planted(ShiftsLaterPositions, "decode_equals_parallel"),
    planted(ForgetsWhatItWrote, "decode_equals_parallel"),
    planted(ForgetsTheNewestRead, "chunked_prefill"),
    planted(ReadsNothingTwice, "empty_prefill"),
    planted(ScoresFromScratch, "score_streams"),
    planted(LeavesMassOver, "normalised"),
    planted(DrawsTooWarm, "draws_follow_likelihood"),
    planted(DrawsEachStepTwice, "draws_follow_likelihood"),
    planted(DrawsEachStepTwice, "decode_equals_parallel"),
    planted(PrefersTheLast, "greedy_is_certain"),
    planted(AlwaysNeedsAGenerator, "greedy_is_certain"),
    planted(KeepsItsCacheInTheModel, "states_branch"),
    planted(KeepsEveryPair, "state_grows_linearly"),
    planted(WritesOutsideTheVocabulary, "steps_write_strides"),
    planted(DropsAParameter, "phases_are_whole"),
    planted(TrainsAParameterTwice, "phases_are_whole"),
    planted(SpendsTooMuch, "phases_are_whole"),
    planted(CarriesADeadParameter, "gradients_arrive"),
    planted(ClimbsInsteadOfDescending, "training_learns"),
    planted(LooksTwoAhead, "lookahead_suffices"),
    planted(LosesItsCounts, "save_and_load"),
    planted(SharesPartOfATensor, "save_and_load"),
    planted(IgnoresTheSeed, "same_seed_same_result"),
    planted(LossDrawsAtLarge, "same_seed_same_result"),
    planted(TossesACoinOfPython, "same_seed_same_result"),
    planted(InitialisesAtLarge, "no_global_randomness"),
    planted(DrawsAtLarge, "no_global_randomness"),
    Mutant("says it has no likelihood", "likelihood_is_declared", traits=Traits(likelihood=False)),
    Mutant("says it writes pairs", "steps_write_strides", traits=Traits(likelihood=True, stride=2)),
    Mutant("says its cache is constant", "state_size_is_declared", traits=Traits(likelihood=True, constant_state=True)),
    Mutant("hides a constant state", "state_size_is_declared", build=Ngram, traits=Traits(likelihood=True)),
    Mutant("hides a limit", "context_limit", traits=Traits(likelihood=True), config=LIMITED),
    Mutant("invents a limit", "context_limit", traits=Traits(likelihood=True, context_limit=40)),
    Mutant("limit too high", "context_limit", traits=Traits(likelihood=True, context_limit=48), config=LIMITED),
    Mutant("limit too low", "context_limit", traits=Traits(likelihood=True, context_limit=36), config=LIMITED),
    Mutant("looks less far than said", "lookahead_suffices", build=LooksOneAhead, traits=TWO_AHEAD),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.defect}-{m.caught_by}".replace(" ", "_"))
def test_defect_is_caught_by_the_promise_meant_for_it(mutant: Mutant) -> None:
    promise = next(p for p in PROMISES if p.__name__ == mutant.caught_by)
    finding = verify(promise, mutant.candidate())
    assert finding.verdict == "broken", finding


def test_every_promise_has_a_mutant() -> None:
    assert {mutant.caught_by for mutant in MUTANTS} == {promise.__name__ for promise in PROMISES}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [(transformer.ARCHITECTURE, TRANSFORMER), (transformer.ARCHITECTURE, LIMITED), (ngram.ARCHITECTURE, NGRAM)],
    ids=["transformer", "limited transformer", "ngram"],
)
def test_healthy_models_break_no_promise(architecture: Architecture, config: Any) -> None:
    assert [finding for finding in check(architecture, config) if finding.verdict == "broken"] == []


def test_check_names_every_promise_once() -> None:
    names = [finding.name for finding in check(ngram.ARCHITECTURE)]
    assert names == [promise.__name__ for promise in PROMISES]


def test_a_model_that_cannot_be_built_breaks_promises_with_its_message() -> None:
    def build(config: Any, generator: Generator | None) -> Transformer:
        raise RuntimeError("no such layer")

    subject = Candidate(architecture=replace(transformer.ARCHITECTURE, build=build), config=TRANSFORMER)
    finding = verify(PROMISES[0], subject)
    assert finding.verdict == "broken"
    assert "RuntimeError: no such layer" in finding.detail


def test_promises_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    verify(PROMISES[-1], planted(InitialisesAtLarge, PROMISES[-1].__name__).candidate())
    assert torch.equal(torch.get_rng_state(), before)
