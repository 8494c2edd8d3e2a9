"""Writing programs: a model is given problems, its completions are judged in the sandbox, and pass@k is estimated.

    pass@k of a problem   1 - C(n - c, k) / C(n, k), for n completions of which c pass; then the mean over problems

Two graded quantities stand beside it, because a model that never passes still differs from another: the bits per byte
of the reference solution after its prompt, and the share of completions that are valid Python at all.

Source: Chen et al. 2021, 2107.03374, section 2.1 (the unbiased estimator).
"""

from __future__ import annotations

import ast
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from archbench.data.problems import Problem
from archbench.errors import ContextOverflow, SandboxError
from archbench.generation import aligned, write_until
from archbench.metric import Measurement, Quantity, Subject
from archbench.model import Likelihood
from archbench.sampling import Sampling
from archbench.sandbox import open_sandbox
from archbench.state import State, copy_state, tile_state
from archbench.stats import bootstrap_mean, bootstrap_ratio, pass_at_k

KS = (1, 10, 100)

QUANTITIES: Mapping[str, Quantity] = {
    "pass_at_k": Quantity(
        unit="fraction",
        better="higher",
        meaning="chance that one of k completions passes all tests; mean",
    ),
    "valid_syntax": Quantity(unit="fraction", better="higher", meaning="share of completions that parse as Python"),
    "solution_bits_per_byte": Quantity(
        unit="bit/byte", better="lower", meaning="of the reference solution, given its prompt"
    ),
    "problems": Quantity(unit="problem", better="neither", meaning="how many were asked"),
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How problems are put.

    Attributes:
        name: as records say it.
        shots: text before every prompt; encoded and read once.
        prompt: what is asked.
        solution: what should follow the prompt, for its bits per byte.
        program: the program to judge, from prompt's problem and the completion.
        stop: strings that end a completion.
    """

    name: str
    shots: str
    prompt: Callable[[Problem], str]
    solution: Callable[[Problem], str]
    program: Callable[[str], str]
    stop: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How completions are drawn: `samples` of each problem at `temperature` (0 is greedy, and then one suffices), of at
    most `new_tokens` tokens."""

    samples: int
    temperature: float
    new_tokens: int


@dataclass(frozen=True)
class Answers:
    """What a model made of one problem."""

    problem: Problem
    completions: list[str]
    nats: float | None
    n_bytes: int


def measure(subject: Subject, problems: Sequence[Problem], protocol: Protocol, how: Writing) -> Iterator[Measurement]:
    """All quantities over `problems`, with bootstrap intervals over problems."""
    answers = list(_answers(subject, problems, protocol, how))
    decoding = "greedy" if how.temperature == 0 else f"temperature {how.temperature:g}"
    said = f"{protocol.name}; {len(problems)} problems, {how.samples} completions each, {decoding}, at most "
    said += f"{how.new_tokens} tokens"
    at = {"protocol": protocol.name, "temperature": how.temperature}
    yield Measurement(quantity="problems", value=len(problems), at=at, protocol=said)
    yield from _passes(answers, protocol, how, at, said)
    valid = [sum(_parses(protocol.program(text)) for text in each.completions) / how.samples for each in answers]
    yield _mean("valid_syntax", valid, at, said)
    yield _solution_bits(subject, answers, at, said)


def _answers(subject: Subject, problems: Sequence[Problem], protocol: Protocol, how: Writing) -> Iterator[Answers]:
    model, codec = subject.model, subject.codec
    sampling = Sampling(temperature=how.temperature)
    generator = torch.Generator(model.device).manual_seed(subject.seed)
    with torch.inference_mode():
        after_shots = _read(subject, protocol.shots, model.initial_state(1))
        for problem in problems:
            state = _read(subject, protocol.prompt(problem), copy_state(after_shots))
            nats, n_bytes = _surprise(subject, protocol.solution(problem), copy_state(state))
            try:
                texts = write_until(
                    model, tile_state(state, how.samples), how.samples, how.new_tokens, sampling, generator,
                    codec.decode, protocol.stop,
                )  # fmt: skip
            except ContextOverflow:
                texts = [""] * how.samples  # no room to answer is no answer
            yield Answers(problem, texts, nats, n_bytes)


def _read(subject: Subject, text: str, state: State) -> State:
    if not text:
        return state
    ids = torch.from_numpy(subject.codec.encode(text.encode()).astype(np.int64))[None].to(subject.model.device)
    return subject.model.prefill(aligned(ids, subject.traits.stride), state)


def _surprise(subject: Subject, text: str, state: State) -> tuple[float | None, int]:
    """Nats of `text` after `state`, if the model has a likelihood, and its bytes."""
    raw, model = text.encode(), subject.model
    if not isinstance(model, Likelihood):
        return None, len(raw)
    ids = torch.from_numpy(subject.codec.encode(raw).astype(np.int64))[None].to(model.device)
    log_probs, _ = model.score(ids, state)
    return -float(log_probs.gather(2, ids[..., None]).double().sum()), len(raw)


def _passes(
    answers: Sequence[Answers], protocol: Protocol, how: Writing, at: Mapping[str, Any], said: str
) -> Iterator[Measurement]:
    items = [(protocol.program(text), each.problem) for each in answers for text in each.completions]
    try:
        with open_sandbox() as sandbox:
            verdicts = sandbox.judge_all(items, workers=max(1, (os.cpu_count() or 2) // 2))
            rung = sandbox.rung
    except SandboxError as error:
        yield Measurement(quantity="pass_at_k", value=None, at={**at, "k": 1}, reason=str(error), protocol=said)
        return
    passed = np.array([verdict.passed for verdict in verdicts]).reshape(len(answers), how.samples).sum(axis=1)
    for k in (k for k in KS if k <= how.samples):
        shares = [pass_at_k(how.samples, int(c), k) for c in passed]
        yield _mean("pass_at_k", shares, {**at, "k": k}, f"{said}; judged in sandbox '{rung}'")


def _mean(quantity: str, values: Sequence[float], at: Mapping[str, Any], said: str) -> Measurement:
    interval = bootstrap_mean(values, range(len(values)))
    return Measurement(
        quantity=quantity,
        value=float(np.mean(values)),
        samples=values,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=interval.confidence if interval else None,
        at=at,
        protocol=said,
    )


def _solution_bits(subject: Subject, answers: Sequence[Answers], at: Mapping[str, Any], said: str) -> Measurement:
    quantity = "solution_bits_per_byte"
    if not isinstance(subject.model, Likelihood):
        return Measurement(quantity=quantity, value=None, at=at, reason="this model has no likelihood")
    bits = [(each.nats or 0.0) / math.log(2) for each in answers]
    sizes = [each.n_bytes for each in answers]
    interval = bootstrap_ratio(bits, sizes)
    return Measurement(
        quantity=quantity,
        value=sum(bits) / sum(sizes),
        samples=[b / n for b, n in zip(bits, sizes, strict=True)],
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=interval.confidence if interval else None,
        at=at,
        protocol=said,
    )


def _parses(program: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dubious escapes: valid all the same
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(program.strip())
