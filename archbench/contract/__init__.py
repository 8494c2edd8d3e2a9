"""The contract as functions: each promise of the interface is one function that tries it on a small model.

    findings = check(registry.architecture("transformer"))

A promise that raises is broken; one that does not apply says why. What holds for every architecture stands here; what
only one can promise stands in its own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from archbench.contract.drawing import draws_follow_likelihood, greedy_is_certain, normalised
from archbench.contract.reading import causality, chunked_prefill, decode_equals_parallel, empty_prefill, score_streams
from archbench.contract.repeats import no_global_randomness, same_seed_same_result, save_and_load
from archbench.contract.rows import batch_equals_single, rows_are_independent, states_branch
from archbench.contract.speculation import speculation_equals_plain, speculation_is_declared
from archbench.contract.subject import TOLERANCE, Candidate, Finding, Verdict, found
from archbench.contract.training import (
    answers_count_alone,
    gradients_arrive,
    phases_are_whole,
    repeats_count,
    training_learns,
)
from archbench.contract.traits import (
    context_limit,
    likelihood_is_declared,
    lookahead_suffices,
    reconstruction_is_declared,
    state_grows_linearly,
    state_size_is_declared,
    steps_write_strides,
)
from archbench.model import Architecture

__all__ = ["PROMISES", "TOLERANCE", "VOCAB_SIZE", "Candidate", "Finding", "Verdict", "check", "smallest", "verify"]

VOCAB_SIZE = 17

PROMISES: tuple[Callable[[Candidate], Finding], ...] = (
    likelihood_is_declared,
    reconstruction_is_declared,
    speculation_is_declared,
    steps_write_strides,
    context_limit,
    state_size_is_declared,
    state_grows_linearly,
    lookahead_suffices,
    chunked_prefill,
    empty_prefill,
    decode_equals_parallel,
    score_streams,
    causality,
    normalised,
    draws_follow_likelihood,
    greedy_is_certain,
    speculation_equals_plain,
    rows_are_independent,
    batch_equals_single,
    states_branch,
    phases_are_whole,
    gradients_arrive,
    training_learns,
    answers_count_alone,
    repeats_count,
    save_and_load,
    same_seed_same_result,
    no_global_randomness,
)


def check(architecture: Architecture, config: Any = None, seed: int = 0) -> list[Finding]:
    """Tries every promise on a model of `config`, by default the smallest one over a vocabulary of 17 tokens."""
    subject = Candidate(architecture=architecture, config=config or smallest(architecture), seed=seed)
    return [verify(promise, subject) for promise in PROMISES]


def verify(promise: Callable[[Candidate], Finding], subject: Candidate) -> Finding:
    """Tries one promise. Whatever a model raises breaks the promise: here it is the model that is tested."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return promise(subject)
        except Exception as error:
            message = " ".join(str(error).split())
            return found(promise.__name__, False, f"raised {type(error).__name__}: {message[:200]}")


def smallest(architecture: Architecture) -> Any:
    """The first candidate config, or the defaults where an architecture lists none."""
    return next(iter(architecture.candidates(VOCAB_SIZE)), None) or architecture.config(vocab_size=VOCAB_SIZE)
