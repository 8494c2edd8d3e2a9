"""mbpp-mini: small programming problems in MBPP's own schema, for models that were trained for minutes.

A problem is a template with a constant and tests. Templates are divided into training and test by a hash, so a test
problem combines operations that were all seen, in other combinations. Each template that is held out gives one test
problem: problems of one template would stand or fall together.

It measures whether a model that never leaves these templates composes them; it says nothing about MBPP, beside which
it is reported and never instead of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

from archbench.data.document import Document
from archbench.data.mbpp_mini_templates import templates
from archbench.data.problems import Problem

Split = Literal["train", "test"]

TRAIN_PROBLEMS = 8000
FIRST_IDS: dict[Split, int] = {"train": 1_000_001, "test": 2_000_001}
"""Task ids count from here: MBPP's own are 1 to 974."""

DRAWS = {"train": 1, "test": 8}
"""Sets of tests drawn for a problem. A wrong solution of a test problem should fail; training learns little from it."""

DONE = "[DONE]"


@cache
def problems(split: Split) -> tuple[Problem, ...]:
    """The problems of a side, the templates in a random order: of "test" one of each, of "train" as many as there are
    to be, again and again with other constants and tests."""
    chosen = [template for template in templates() if template.held_out == (split == "test")]
    number, first = (len(chosen) if split == "test" else TRAIN_PROBLEMS), FIRST_IDS[split]
    rng = np.random.default_rng(first)
    order = rng.permutation(len(chosen))
    return tuple(chosen[order[i % len(chosen)]].problem(first + i, rng, DRAWS[split]) for i in range(number))


def prompt(problem: Problem) -> str:
    """The question as models are trained on it: text and tests in a docstring, as InCoder's (Fried et al. 2022,
    2204.05999, appendix) are."""
    return "\n".join(['"""', problem.text, *problem.test_list, '"""', ""])


def solution(problem: Problem) -> str:
    return f"{problem.code}\n{DONE}\n"


def read() -> list[Document]:
    """Training problems with their solutions, one document each."""
    return documents(problems("train"))


def documents(chosen: Sequence[Problem]) -> list[Document]:
    return [Document(f"mbpp-mini/{p.task_id}", (prompt(p) + solution(p)).encode()) for p in chosen]
