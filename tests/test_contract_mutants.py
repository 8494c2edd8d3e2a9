"""The kit itself is tested: a real model with one planted defect each, caught by the promise that is meant for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator

from archbench.architectures import ngram, transformer
from archbench.architectures.ngram import Ngram, NgramConfig
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.contract import PROMISES, VOCAB_SIZE, Candidate, check, verify
from archbench.model import Architecture, SequenceModel, Traits
from tests import mutants
from tests.mutants import PAIRS, Halting, Pairs

torch.set_num_threads(1)

TRANSFORMER = TransformerConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1)
LIMITED = replace(TRANSFORMER, max_context=40)
NGRAM = NgramConfig(vocab_size=VOCAB_SIZE, order=3)


HOMES: dict[type[SequenceModel], tuple[Architecture, Any]] = {
    Transformer: (transformer.ARCHITECTURE, TRANSFORMER),
    Ngram: (ngram.ARCHITECTURE, NGRAM),
    Pairs: (PAIRS, TransformerConfig(vocab_size=VOCAB_SIZE)),
}


@dataclass(frozen=True)
class Mutant:
    """A defect, the promise that must catch it, what its traits say if they are the defect, and whether it raises."""

    defect: str
    caught_by: str
    build: type[SequenceModel] = Transformer
    traits: Traits | None = None
    config: Any = None
    raises: str = ""

    def candidate(self) -> Candidate:
        base, config = next(homes for kind, homes in HOMES.items() if issubclass(self.build, kind))
        traits = base.traits if self.traits is None else lambda _config: self.traits
        return Candidate(architecture=replace(base, build=self.build, traits=traits), config=self.config or config)


def planted(build: type, caught_by: str, raises: str = "") -> Mutant:
    return Mutant(build.__name__, caught_by, build=build, raises=raises)


UNLIMITED, TOO_HIGH = Traits(likelihood=True), Traits(likelihood=True, context_limit=48)
TWO_AHEAD = Traits(likelihood=True, lookahead=2)
REPEATING = Traits(likelihood=True, answers=True, repeats=True)
CODED_PAIRS = replace(PAIRS.traits(None), reconstruction=True)
DRAFTING = replace(ngram.ARCHITECTURE.traits(NGRAM), speculates=True)
OVERFLOW = "ContextOverflow"

MUTANTS = [
    planted(mutants.AttendsToTheFuture, "causality"),
    planted(mutants.AttendsToTheFuture, "chunked_prefill"),
    planted(mutants.LeaksALittle, "causality"),
    planted(mutants.LeaksALittle, "score_streams"),
    planted(mutants.MixesRows, "rows_are_independent"),
    planted(mutants.KnowsTheBatchSize, "batch_equals_single"),
    planted(mutants.ShiftsLaterPositions, "chunked_prefill"),
    planted(mutants.ShiftsLaterPositions, "decode_equals_parallel"),
    planted(mutants.ForgetsWhatItWrote, "decode_equals_parallel"),
    planted(mutants.ForgetsTheNewestRead, "chunked_prefill"),
    planted(mutants.ReadsNothingTwice, "empty_prefill"),
    planted(mutants.ScoresFromScratch, "score_streams"),
    planted(mutants.LeavesMassOver, "normalised"),
    planted(mutants.DrawsTooWarm, "draws_follow_likelihood"),
    planted(mutants.DrawsEachStepTwice, "draws_follow_likelihood"),
    planted(mutants.DrawsEachStepTwice, "decode_equals_parallel"),
    planted(mutants.PrefersTheLast, "greedy_is_certain"),
    planted(mutants.AlwaysNeedsAGenerator, "greedy_is_certain", "AttributeError"),
    planted(mutants.KeepsItsCacheInTheModel, "states_branch", "RuntimeError"),
    planted(mutants.RemembersInTheModel, "states_branch"),
    planted(mutants.KeepsEveryPair, "state_grows_linearly"),
    planted(mutants.WritesOutsideTheVocabulary, "steps_write_strides"),
    planted(mutants.WritesNothing, "steps_write_strides"),
    planted(mutants.WritesNothing, "decode_equals_parallel", "ValueError: a step wrote [0] tokens"),
    planted(mutants.DropsAParameter, "phases_are_whole"),
    planted(mutants.TrainsAParameterTwice, "phases_are_whole"),
    planted(mutants.SpendsTooMuch, "phases_are_whole"),
    planted(mutants.CarriesADeadParameter, "gradients_arrive"),
    planted(mutants.ClimbsInsteadOfDescending, "training_learns"),
    planted(mutants.LooksTwoAhead, "lookahead_suffices"),
    planted(mutants.LosesItsCounts, "save_and_load"),
    planted(mutants.SharesPartOfATensor, "save_and_load"),
    planted(mutants.IgnoresTheSeed, "same_seed_same_result"),
    planted(mutants.LossDrawsAtLarge, "same_seed_same_result"),
    planted(mutants.TossesACoinOfPython, "same_seed_same_result"),
    planted(mutants.InitialisesAtLarge, "same_seed_same_result"),
    planted(mutants.DrawsAtLarge, "no_global_randomness"),
    planted(mutants.AcceptsWhatItLikes, "draws_follow_likelihood"),
    planted(mutants.AdvancesAllRows, "decode_equals_parallel"),
    planted(mutants.PairsForgetWhatTheyWrote, "decode_equals_parallel"),
    planted(mutants.PairsReadTheFirstOfEachCall, "chunked_prefill"),
    planted(mutants.PairsHaltHalfway, "steps_write_strides"),
    planted(mutants.PairsMixRows, "rows_are_independent"),
    planted(mutants.PairsMixRows, "batch_equals_single"),
    Mutant("says it has no likelihood", "likelihood_is_declared", traits=Traits(likelihood=False)),
    Mutant("says it reconstructs", "reconstruction_is_declared", traits=Traits(likelihood=True, reconstruction=True)),
    Mutant("hides its code", "reconstruction_is_declared", build=mutants.PairsHaveACode),
    Mutant("codes each token", "reconstruction_is_declared", build=mutants.PairsCodeEachToken, traits=CODED_PAIRS),
    Mutant("writes pairs as one", "reconstruction_is_declared", build=mutants.PairsReconstructOne, traits=CODED_PAIRS),
    Mutant("says it speculates", "speculation_is_declared", traits=Traits(likelihood=True, speculates=True)),
    Mutant("drafts in silence", "speculation_is_declared", build=mutants.Drafting),
    Mutant("has no plain steps", "speculation_is_declared", build=mutants.PlainDraftsAsWell, traits=DRAFTING),
    Mutant("keeps wrong drafts", "speculation_equals_plain", build=mutants.KeepsWrongDrafts, traits=DRAFTING),
    Mutant("says it writes pairs", "steps_write_strides", traits=Traits(likelihood=True, stride=2)),
    Mutant("says its cache is constant", "state_size_is_declared", traits=Traits(likelihood=True, constant_state=True)),
    Mutant("hides a constant state", "state_size_is_declared", build=Ngram, traits=Traits(likelihood=True)),
    Mutant("hides a limit", "context_limit", traits=UNLIMITED, config=LIMITED, raises=OVERFLOW),
    Mutant("invents a limit", "context_limit", traits=Traits(likelihood=True, context_limit=40)),
    Mutant("limit too high", "context_limit", traits=TOO_HIGH, config=LIMITED, raises=OVERFLOW),
    Mutant("limit too low", "context_limit", traits=Traits(likelihood=True, context_limit=36), config=LIMITED),
    planted(mutants.LearnsWhatDoesNotCount, "answers_count_alone"),
    planted(mutants.KeepsExactnessToItself, "answers_count_alone"),
    Mutant("says tokens can stand often", "repeats_count", build=mutants.HearsOnlyOnce, traits=REPEATING),
    Mutant("looks less far than said", "lookahead_suffices", build=mutants.LooksOneAhead, traits=TWO_AHEAD),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.defect}-{m.caught_by}".replace(" ", "_"))
def test_defect_is_caught_by_the_promise_meant_for_it(mutant: Mutant) -> None:
    promise = next(p for p in PROMISES if p.__name__ == mutant.caught_by)
    finding = verify(promise, mutant.candidate())
    assert finding.verdict == "broken", finding
    # A mutant that fails for another reason than its defect proves nothing.
    assert finding.detail.startswith(f"raised {mutant.raises}") if mutant.raises else "raised" not in finding.detail


def test_every_promise_has_a_mutant() -> None:
    assert {mutant.caught_by for mutant in MUTANTS} == {promise.__name__ for promise in PROMISES}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (transformer.ARCHITECTURE, TRANSFORMER),
        (transformer.ARCHITECTURE, LIMITED),
        (ngram.ARCHITECTURE, NGRAM),
        (replace(ngram.ARCHITECTURE, build=Halting), NGRAM),
        (PAIRS, None),
    ],
    ids=["transformer", "limited transformer", "ngram", "halting ngram", "pairs"],
)
def test_healthy_models_break_no_promise(architecture: Architecture, config: Any) -> None:
    assert [finding for finding in check(architecture, config) if finding.verdict == "broken"] == []


def test_a_healthy_code_keeps_its_promise() -> None:
    coded = replace(PAIRS, build=mutants.PairsHaveACode, traits=lambda _config: CODED_PAIRS)
    finding = next(found for found in check(coded) if found.name == "reconstruction_is_declared")
    assert finding.verdict == "holds", finding.detail


def test_healthy_speculation_keeps_its_promises() -> None:
    drafting = replace(ngram.ARCHITECTURE, build=mutants.Drafting, traits=lambda _config: DRAFTING)
    verdicts = {finding.name: finding for finding in check(drafting, NGRAM)}
    assert [finding for finding in verdicts.values() if finding.verdict == "broken"] == []
    assert verdicts["speculation_is_declared"].verdict == verdicts["speculation_equals_plain"].verdict == "holds"


def test_without_likelihood_some_promises_do_not_apply_and_say_why() -> None:
    excused = {finding.name: finding.detail for finding in check(PAIRS) if finding.verdict == "does not apply"}
    assert "does not speculate" in excused.pop("speculation_equals_plain")
    assert "takes no weights" in excused.pop("answers_count_alone")
    assert "takes no repeats" in excused.pop("repeats_count")
    assert set(excused) == {"score_streams", "causality", "normalised", "draws_follow_likelihood"}
    assert all("no likelihood" in reason for reason in excused.values())


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
    verify(PROMISES[-1], planted(mutants.InitialisesAtLarge, PROMISES[-1].__name__).candidate())
    assert torch.equal(torch.get_rng_state(), before)
