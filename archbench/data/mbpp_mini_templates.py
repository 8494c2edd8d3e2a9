"""The templates of mbpp-mini: a family and one operation from each of its slots.

    list     a list of numbers: gather( change(x) for x that fit )      "the largest of the squares of the even numbers"
    text     a word: shape(part)                                         "the first 3 letters in upper case"
    number   a number: then(first)                                       "adds 4 to a number and squares it"

Expected values come from running the operations, not the printed code; a test of ours holds both together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from archbench.data.problems import Problem

TEST_SHARE = 0.25
N_TESTS = 3


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
    Operation("head", "first {c} letters of a text", "s[:{c}]", lambda s, c: s[:c]),
    Operation("tail", "last {c} letters of a text", "s[-{c}:]", lambda s, c: s[-c:]),
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
SLOTS = {"list": (GATHERED, CHANGED, WHICH), "text": (PART, SHAPE), "number": (FIRST, THEN)}
"""The operations of each family's slots."""

WORDS = ("apple", "banjo", "cedar", "delta", "ember", "frost", "grape", "heron", "ivory", "jelly", "koala", "lemon")


@dataclass(frozen=True)
class Template:
    """`operations`: one from each of the family's slots."""

    family: str
    operations: tuple[Operation, ...]

    @property
    def name(self) -> str:
        return "_".join([self.family, *(part.name for part in self.operations if part.name)])

    @property
    def held_out(self) -> bool:
        """Whether it is for testing. Decided by the operations' names, so that changing others moves nothing."""
        digest = hashlib.sha256(f"{self.family} {[part.name for part in self.operations]}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32

    def problem(self, task_id: int, rng: np.random.Generator, draws: int = 1) -> Problem:
        """A problem with constant and tests drawn from `rng`: of `draws` sets of tests that which tells most near
        misses apart."""
        constant = int(rng.integers(2, 5 if self.family == "text" else 10))
        inputs = [self._inputs(constant, rng) for _ in range(draws)]
        best = inputs[0] if draws == 1 else max(inputs, key=lambda found: self._n_told(found, constant))
        tests = (f"assert {self.name}({given!r}) == {self.expected(given, constant)!r}" for given in best)
        return Problem(
            task_id=task_id,
            text=f"Write a function that {self._text()}.".replace("{c}", str(constant)),
            code=f"def {self.name}({PARAMETER[self.family]}):\n    return {self._body()}".replace("{c}", str(constant)),
            test_list=tuple(tests),
        )

    def expected(self, given: Any, c: int) -> Any:
        """What the function answers.

        Raises:
            IndexError, ValueError: it has no answer, as there is no largest of no numbers.
        """
        if self.family == "list":
            gathered, changed, which = self.operations
            return gathered.apply([changed.apply(x, c) for x in given if which.apply(x, c)], c)
        inner, outer = self.operations
        return outer.apply(inner.apply(given, c), c)

    @cached_property
    def neighbours(self) -> tuple[Template, ...]:
        """The templates that differ from this in one operation: what a near miss computes."""
        return tuple(self._neighbours())

    def _neighbours(self) -> Iterator[Template]:
        for place, allowed in enumerate(SLOTS[self.family]):
            for other in allowed:
                if other is not self.operations[place]:
                    yield Template(self.family, (*self.operations[:place], other, *self.operations[place + 1 :]))

    def _n_told(self, inputs: list[Any], constant: int) -> int:
        """How many neighbours answer at least one of the inputs differently."""
        own = [self.expected(given, constant) for given in inputs]
        return sum([other._answer(given, constant) for given in inputs] != own for other in self.neighbours)

    def _answer(self, given: Any, constant: int) -> Any:
        try:
            return self.expected(given, constant)
        except (ValueError, IndexError):
            return NOTHING

    def _inputs(self, constant: int, rng: np.random.Generator) -> list[Any]:
        inputs: list[Any] = []
        while len(inputs) < N_TESTS:
            given = self._given(rng)
            if given not in inputs and self._answer(given, constant) is not NOTHING:
                inputs.append(given)
        return inputs

    def _given(self, rng: np.random.Generator) -> Any:
        if self.family == "number":
            return int(rng.integers(-20, 60))
        if self.family == "text":
            return WORDS[rng.integers(len(WORDS))]
        return rng.integers(-9, 20, size=rng.integers(3, 6)).tolist()

    def _text(self) -> str:
        if self.family == "list":
            gathered, changed, which = self.operations
            return f"gives the {gathered.words}{changed.words}{which.words} in a list"
        inner, outer = self.operations
        if self.family == "text":
            return f"gives the {inner.words} {outer.words}"
        return f"{inner.words}{outer.words}"

    def _body(self) -> str:
        if self.family == "list":
            gathered, changed, which = self.operations
            made = f"[{changed.code} for x in a{f' if {which.code}' if which.code else ''}]"
            return gathered.code.replace("{}", made)
        inner, outer = self.operations
        return outer.code.replace("{}", inner.code)


PARAMETER = {"list": "a", "text": "s", "number": "n"}
NOTHING = object()
"""Stands for no answer."""


def templates() -> Iterator[Template]:
    """All of them, in a fixed order."""
    for family, slots in SLOTS.items():
        for operations in product(*slots):
            yield Template(family, operations)
