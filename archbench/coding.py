"""Writing programs: a model is given problems, its completions are judged in the sandbox, and pass@k is estimated.

    pass@k of a problem   1 - C(n - c, k) / C(n, k), for n completions of which c pass; then the mean over problems

Two graded quantities stand beside it, because models that never pass still differ from each other: the bits per byte
of the reference solution after its prompt, and the share of completions that are Python at all.

Source: Chen et al. 2021, 2107.03374, section 2.1 (the unbiased estimator).
"""

from __future__ import annotations

import ast
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from archbench.completions import Answers, Question, Writing, answer
from archbench.data.problems import Problem
from archbench.environment import usable_cores
from archbench.errors import SandboxError
from archbench.metric import Measurement, Quantity, Subject
from archbench.model import Likelihood
from archbench.sandbox import Limits, Verdict, open_sandbox
from archbench.stats import Interval, bootstrap_mean, bootstrap_ratio, pass_at_k, wilson_interval

KS = (1, 10, 100)
"""Pass@k is given at these k, as far as there are completions."""

NOT_PYTHON = "does not parse"

QUANTITIES: Mapping[str, Quantity] = {
    "pass_at_k": Quantity(
        unit="fraction",
        better="higher",
        meaning="chance that one of k completions passes all tests, mean over problems",
    ),
    "valid_syntax": Quantity(unit="fraction", better="higher", meaning="share of completions that parse as Python"),
    "solution_bits_per_byte": Quantity(
        unit="bit/byte", better="lower", meaning="of the reference solutions, given their prompts"
    ),
    "problems": Quantity(unit="problem", better="neither", meaning="how many were asked"),
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How problems are put.

    Attributes:
        name: as records say it.
        shots: text before every prompt.
        prompt: what is asked.
        solution: what should follow the prompt, up to a stop string.
        cpu_s: processor time a completion may take; on the clock it is three times that.
    """

    name: str
    shots: str
    prompt: Callable[[Problem], str]
    solution: Callable[[Problem], str]
    cpu_s: int


def measure(subject: Subject, problems: Sequence[Problem], protocol: Protocol, how: Writing) -> Iterator[Measurement]:
    """All quantities over `problems`, with intervals over problems.

    Raises:
        DataError: a problem's tests cannot be judged.
    """
    asked = [Question(number=p.task_id, prompt=protocol.shots + protocol.prompt(p), reference=protocol.solution(p))
             for p in problems]  # fmt: skip
    answers = answer(subject, asked, how)
    at = {"protocol": protocol.name}
    said = f"{protocol.name}; {_named(problems)}{_unfit(subject, answers)}"
    yield Measurement(quantity="problems", value=len(problems), at=at, protocol=said)
    yield _solution_bits(subject, asked, answers, at, said)
    for temperature in how.temperatures:
        here = {**at, "temperature": temperature}
        if reason := answers.refused.get(temperature):
            for quantity in ("pass_at_k", "valid_syntax"):
                yield Measurement(quantity=quantity, value=None, at=here, reason=reason)
            continue
        drawn = f"{how.samples} completions each at temperature {temperature:g}" if temperature else "greedy"
        texts = [found.completions[temperature] for found in answers.each]
        yield from _of_texts(problems, texts, protocol.cpu_s, here, f"{said}; {drawn}, at most {how.new_tokens} tokens")


def _named(problems: Sequence[Problem]) -> str:
    """`20 problems, 11 to 30`: which, where they stand in a row."""
    numbers = sorted(problem.task_id for problem in problems)
    in_a_row = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{len(numbers)} problems" + (f", {numbers[0]} to {numbers[-1]}" if in_a_row and len(numbers) > 1 else "")


def parses(program: str) -> bool:
    """Whether a text is Python, and not nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dubious escapes: valid all the same
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(program.strip())


def judge(items: Sequence[tuple[str, Problem]], cpu_s: int) -> list[Verdict]:
    """The verdicts on (program, problem) pairs, in their order.

    What is no Python cannot pass and is not run, and equal pairs are judged once: of what small models write, that is
    nearly all.

    Raises:
        SandboxError: nothing here could confine a program.
        DataError: a problem's tests cannot be judged.
    """
    programs = [item for item in dict.fromkeys(items) if parses(item[0])]
    with open_sandbox(limits=Limits(cpu_s=cpu_s, wall_s=3.0 * cpu_s)) as sandbox:
        found = dict(zip(programs, sandbox.judge_all(programs, _free_cores()), strict=True))
        return [found.get(item) or Verdict(False, NOT_PYTHON, 0.0, sandbox.rung) for item in items]


def _free_cores() -> int:
    """Those of this process, which waits while others judge, and those that nobody uses."""
    return max(torch.get_num_threads(), usable_cores() - round(os.getloadavg()[0]))


def _of_texts(
    problems: Sequence[Problem], texts: Sequence[Sequence[str]], cpu_s: int, at: Mapping[str, Any], said: str
) -> Iterator[Measurement]:
    """Of each problem's completions at one temperature."""
    yield _mean("valid_syntax", [float(np.mean([parses(text) for text in group])) for group in texts], at, said)
    n = len(texts[0])
    ks = [k for k in KS if k <= n]
    try:
        verdicts = judge([(text, p) for p, group in zip(problems, texts, strict=True) for text in group], cpu_s)
    except SandboxError as error:
        for k in ks:
            yield Measurement(quantity="pass_at_k", value=None, at={**at, "k": k}, reason=str(error))
        return
    passed = np.array([verdict.passed for verdict in verdicts]).reshape(-1, n).sum(axis=1)
    said = f"{said}; sandbox '{verdicts[0].rung}': {_outcomes(verdicts)}"
    for k in ks:
        yield _mean("pass_at_k", [pass_at_k(n, int(correct), k) for correct in passed], {**at, "k": k}, said)


def _outcomes(verdicts: Sequence[Verdict]) -> str:
    """`7 passed, 12 failed, 3 timed out`, the most frequent first."""
    kinds = Counter(verdict.result.partition(":")[0] for verdict in verdicts)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _mean(quantity: str, values: Sequence[float], at: Mapping[str, Any], said: str) -> Measurement:
    return _measurement(quantity, float(np.mean(values)), values, _over_problems(values), at, said)


def _over_problems(values: Sequence[float]) -> Interval | None:
    """Of the mean. Where all fail, or none, resampling would give an interval of no width: then Wilson's."""
    if set(values) in ({0.0}, {1.0}):
        return wilson_interval(round(sum(values)), len(values))
    return bootstrap_mean(values, range(len(values)))


def _solution_bits(
    subject: Subject, asked: Sequence[Question], answers: Answers, at: Mapping[str, Any], said: str
) -> Measurement:
    quantity = "solution_bits_per_byte"
    if not isinstance(subject.model, Likelihood):
        return Measurement(quantity=quantity, value=None, at=at, reason="this model has no likelihood")
    bits = [found.nats / math.log(2) for found in answers.each if found.nats is not None]
    if too_long := len(asked) - len(bits):
        reason = f"{too_long} of {len(asked)} prompts with their solutions exceed the context limit of "
        reason += f"{subject.traits.context_limit} tokens"
        return Measurement(quantity=quantity, value=None, at=at, reason=reason)
    sizes = [len(question.reference.encode()) for question in asked]
    each = [b / n for b, n in zip(bits, sizes, strict=True)]
    return _measurement(quantity, sum(bits) / sum(sizes), each, bootstrap_ratio(bits, sizes), at, said)


def _measurement(
    quantity: str, value: float, samples: Sequence[float], interval: Interval | None, at: Mapping[str, Any], said: str
) -> Measurement:
    return Measurement(
        quantity=quantity,
        value=value,
        samples=samples,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=interval.confidence if interval else None,
        at=at,
        protocol=said,
    )


def _unfit(subject: Subject, answers: Answers) -> str:
    """What is said of prompts without room for an answer, which count as not solved."""
    n = sum(not found.fits for found in answers.each)
    limit = subject.traits.context_limit
    return f", of which {n} leave no room in a context of {limit} tokens and count as not solved" if n else ""
