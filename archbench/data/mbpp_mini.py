"""mbpp-mini: small programming problems in MBPP's own schema, for models that were trained for minutes.

A problem is a template with constants: a family (a list to a number, a list to a list, a string, a number) and an
operation from each of its slots, such as "the largest of the squares of the even numbers". Templates are divided into
training and test by a hash of their operations, so a test problem combines operations that were all seen in other
combinations. Expected values come from running the operations, not the printed code; a test holds both together.

It measures whether a model that never leaves these templates composes them; it says nothing about MBPP, beside which
it is reported and never instead of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from archbench.data.document import Document
from archbench.data.problems import Problem

TEST_SHARE = 0.15
TRAIN_PROBLEMS = 8000
TEST_PROBLEMS = 200
FIRST_TEST_ID = 1_000_000
"""Task ids of test problems start here, those of training at 1: far from MBPP's own 1 to 974."""

DONE = "[DONE]"


@dataclass(frozen=True)
class Operation:
    """`name` for the function's name, `words` for the text, `code` for the solution ("{}" stands for what it is applied
    to, "{c}" for a constant), and what it does to a value and a constant."""

    name: str
    words: str
    code: str
    apply: Callable[[Any, int], Any]


WHICH = (
    Operation("", "numbers", "", lambda _x, _: True),
    Operation("even", "even numbers", "x % 2 == 0", lambda x, _: x % 2 == 0),
    Operation("odd", "odd numbers", "x % 2 == 1", lambda x, _: x % 2 == 1),
    Operation("positive", "positive numbers", "x > 0", lambda x, _: x > 0),
    Operation("negative", "negative numbers", "x < 0", lambda x, _: x < 0),
    Operation("above", "numbers above {c}", "x > {c}", lambda x, c: x > c),
    Operation("below", "numbers below {c}", "x < {c}", lambda x, c: x < c),
)
CHANGED = (
    Operation("", "", "x", lambda x, _: x),
    Operation("square", "squares of the ", "x * x", lambda x, _: x * x),
    Operation("double", "doubles of the ", "2 * x", lambda x, _: 2 * x),
    Operation("half", "halves of the ", "x // 2", lambda x, _: x // 2),
    Operation("negated", "negatives of the ", "-x", lambda x, _: -x),
    Operation("next", "successors of the ", "x + 1", lambda x, _: x + 1),
)
GATHERED = (
    Operation("sum", "sum of the ", "sum({})", lambda xs, _: sum(xs)),
    Operation("max", "largest of the ", "max({})", lambda xs, _: max(xs)),
    Operation("min", "smallest of the ", "min({})", lambda xs, _: min(xs)),
    Operation("count", "count of the ", "len({})", lambda xs, _: len(xs)),
    Operation("first", "first of the ", "{}[0]", lambda xs, _: xs[0]),
    Operation("last", "last of the ", "{}[-1]", lambda xs, _: xs[-1]),
    Operation("list", "list of the ", "{}", lambda xs, _: xs),
    Operation("sorted", "sorted list of the ", "sorted({})", lambda xs, _: sorted(xs)),
    Operation("reversed", "reversed list of the ", "{}[::-1]", lambda xs, _: xs[::-1]),
)
PART = (
    Operation("", "text", "s", lambda s, _: s),
    Operation("head", "first {c} letters", "s[:{c}]", lambda s, c: s[:c]),
    Operation("tail", "last {c} letters", "s[-{c}:]", lambda s, c: s[-c:]),
    Operation("rest", "text without its first {c} letters", "s[{c}:]", lambda s, c: s[c:]),
)
SHAPE = (
    Operation("upper", "in upper case", "{}.upper()", lambda s, _: s.upper()),
    Operation("reversed", "in reverse", "{}[::-1]", lambda s, _: s[::-1]),
    Operation("twice", "written twice", "{} + {}", lambda s, _: s + s),
    Operation("sorted", "as a sorted list of letters", "sorted({})", lambda s, _: sorted(s)),
    Operation("length", "as their number of letters", "len({})", lambda s, _: len(s)),
    Operation("title", "with a capital letter", "{}.title()", lambda s, _: s.title()),
    Operation("dashed", "joined by dashes", "'-'.join({})", lambda s, _: "-".join(s)),
)
FIRST = (
    Operation("add", "adds {c} to a number", "n + {c}", lambda n, c: n + c),
    Operation("subtract", "subtracts {c} from a number", "n - {c}", lambda n, c: n - c),
    Operation("multiply", "multiplies a number by {c}", "n * {c}", lambda n, c: n * c),
    Operation("divide", "divides a number by {c} rounding down", "n // {c}", lambda n, c: n // c),
    Operation("rest", "takes the remainder of a number by {c}", "n % {c}", lambda n, c: n % c),
)
THEN = (
    Operation("", "", "{}", lambda n, _: n),
    Operation("squared", " and squares it", "({}) ** 2", lambda n, _: n**2),
    Operation("negated", " and negates it", "-({})", lambda n, _: -n),
    Operation("text", " and makes a text of it", "str({})", lambda n, _: str(n)),
    Operation("even", " and says if it is even", "({}) % 2 == 0", lambda n, _: n % 2 == 0),
    Operation("listed", " and puts it into a list", "[{}]", lambda n, _: [n]),
    Operation("absolute", " and takes its absolute value", "abs({})", lambda n, _: abs(n)),
)
WORDS = ("apple", "banjo", "cedar", "delta", "ember", "frost", "grape", "heron", "ivory", "jelly", "koala", "lemon")


@dataclass(frozen=True)
class Template:
    """A family and one operation from each of its slots."""

    family: str
    operations: tuple[Operation, ...]

    @property
    def name(self) -> str:
        return "_".join([part.name for part in self.operations if part.name] or ["same"])

    @property
    def held_out(self) -> bool:
        """Whether it is for testing. Decided by the operations' names, so that changing others moves nothing."""
        digest = hashlib.sha256(f"{self.family} {[part.name for part in self.operations]}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32

    def problem(self, task_id: int, rng: np.random.Generator) -> Problem:
        constant = int(rng.integers(2, 5 if self.family == "text" else 10))
        name = f"{self.family}_{self.name}"
        tests = []
        while len(tests) < 3:
            given = self._given(rng)
            try:
                expected = self._expected(given, constant)
            except (ValueError, IndexError):  # nothing is left to take the largest or the first of
                continue
            test = f"assert {name}({given!r}) == {expected!r}"
            tests += [test] if test not in tests else []
        text, body = self._text().replace("{c}", str(constant)), self._body().replace("{c}", str(constant))
        return Problem(
            task_id=task_id,
            text=f"Write a function that {text}.",
            code=f"def {name}({self._parameter}):\n    return {body}",
            test_list=tuple(tests),
        )

    @property
    def _parameter(self) -> str:
        return {"list": "a", "text": "s", "number": "n"}[self.family]

    def _given(self, rng: np.random.Generator) -> Any:
        if self.family == "number":
            return int(rng.integers(-20, 60))
        if self.family == "text":
            return str(rng.choice(WORDS))
        return [int(x) for x in rng.integers(-9, 20, size=int(rng.integers(3, 6)))]

    def _expected(self, given: Any, c: int) -> Any:
        if self.family == "list":
            gathered, changed, which = self.operations
            return gathered.apply([changed.apply(x, c) for x in given if which.apply(x, c)], c)
        inner, outer = self.operations
        return outer.apply(inner.apply(given, c), c)

    def _text(self) -> str:
        if self.family == "list":
            gathered, changed, which = self.operations
            return f"gives the {gathered.words}{changed.words}{which.words} in a list"
        inner, outer = self.operations
        if self.family == "text":
            return f"gives the {inner.words}{' of a text' if inner.name in ('head', 'tail') else ''} {outer.words}"
        return f"{inner.words}{outer.words}"

    def _body(self) -> str:
        if self.family == "list":
            gathered, changed, which = self.operations
            made = f"[{changed.code} for x in a{f' if {which.code}' if which.code else ''}]"
            return gathered.code.replace("{}", made)
        inner, outer = self.operations
        return outer.code.replace("{}", inner.code)


@cache
def templates() -> tuple[Template, ...]:
    """All of them, in a fixed order."""
    lists = [Template("list", (g, x, w)) for g in GATHERED for x in CHANGED for w in WHICH]
    texts = [Template("text", (p, s)) for p in PART for s in SHAPE]
    numbers = [Template("number", (f, t)) for f in FIRST for t in THEN]
    return tuple(lists + texts + numbers)


@cache
def problems(split: str) -> tuple[Problem, ...]:
    """The "train" or "test" problems. Test problems are one of each held-out template in turn; no text comes twice."""
    held_out = split == "test"
    chosen = [template for template in templates() if template.held_out == held_out]
    number, first_id = (TEST_PROBLEMS, FIRST_TEST_ID) if held_out else (TRAIN_PROBLEMS, 1)
    rng = np.random.default_rng(FIRST_TEST_ID if held_out else 0)
    order = rng.permutation(len(chosen))
    return tuple(chosen[order[i % len(chosen)]].problem(first_id + i, rng) for i in range(number))


def prompt(problem: Problem) -> str:
    """The question as models are trained on it: text and tests in a docstring, as InCoder's (Fried et al. 2022,
    2204.05999, appendix) are."""
    return "\n".join(['"""', problem.text, *problem.test_list, '"""', ""])


def solution(problem: Problem) -> str:
    return f"{problem.code}\n{DONE}\n"


def read() -> Iterable[Document]:
    """Training problems with their solutions, one document each."""
    return documents(problems("train"))


def documents(chosen: Sequence[Problem]) -> list[Document]:
    return [Document(f"mbpp-mini/{p.task_id}", (prompt(p) + solution(p)).encode()) for p in chosen]
