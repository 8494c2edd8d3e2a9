"""Polynomial arithmetic in F7[X]/(X^5): an expression of polynomials, and the coefficients of what it comes to.

    _ _ _ _  + p0 p1 p2 p3 p4  - q0 q1 q2 q3 q4  =  |  r0 r1 r2 r3 r4

Operations are negation, sum, product and composition p(q(X)), drawn uniformly, as are all coefficients; each is written
before its operands, so no brackets are needed. A polynomial is its coefficients from that of 1 upwards, of which all
from X^`degree` on are dropped. The number of operations is uniform from 1 to the most that the length has room for,
hence a longer text holds harder expressions, beyond any that were trained on; `operations` sets another limit. Blanks
before the expression give the text its exact length.

What is asked is the expression; a hash of it decides whether it is for training or for testing. Chance is
1/`modulus` a coefficient.

Source: Gloeckle et al. 2024, 2404.19737, section 4.2 (1 to 5 operations in training, up to 10 in tests). Its notation
is not known to us; ours is prefix notation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Int64

from archbench.codec import Codec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError
from archbench.task import Example, Split, SymbolGenerator, Task

Operator = Literal["negate", "add", "multiply", "compose"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
Polynomial = Int64[np.ndarray, " d"]


@dataclass(frozen=True, kw_only=True)
class PolynomialArithmeticSettings:
    """Coefficients are numbers modulo a prime `modulus`; `degree` of them are kept; `operators` that occur; at most
    `operations` in one expression, None for as many as a text has room for."""

    modulus: int = 7
    degree: int = 5
    operators: tuple[Operator, ...] = OPERATORS
    operations: int | None = None

    def __post_init__(self) -> None:
        if self.modulus < 2 or any(self.modulus % k == 0 for k in range(2, int(self.modulus**0.5) + 1)):
            raise ConfigError(f"polynomial_arithmetic.modulus: {self.modulus}; must be a prime")
        if self.degree < 1:
            raise ConfigError(f"polynomial_arithmetic.degree: {self.degree}; must be at least 1")
        if not self.operators or len(set(self.operators)) < len(self.operators):
            allowed = ", ".join(OPERATORS)
            raise ConfigError(
                f"polynomial_arithmetic.operators: {list(self.operators)}; name some of {allowed}, each once"
            )
        if self.operations is not None and self.operations < 1:
            raise ConfigError(f"polynomial_arithmetic.operations: {self.operations}; must be at least 1")


class PolynomialArithmetic(SymbolGenerator):
    """Ids: the numbers 0 to `modulus` - 1, the four operators, the sign of equality, and the blank."""

    def __init__(self, settings: PolynomialArithmeticSettings, codec: Codec) -> None:
        self.settings = settings
        self.sign: dict[Operator, int] = {name: settings.modulus + 1 + i for i, name in enumerate(OPERATORS)}
        self.equals = settings.modulus + len(OPERATORS) + 1
        self.blank = self.equals + 1
        super().__init__(
            "polynomial_arithmetic",
            codec,
            n_symbols=self.blank,
            shortest=self._length(settings.operations or 1),
            chance=float(settings.modulus) ** -settings.degree,
        )

    def _length(self, operations: int) -> int:
        """Tokens of the longest expression of so many operations, with its value."""
        degree = self.settings.degree
        return operations + (operations + 1) * degree + 1 + degree

    def most(self, length: int) -> int:
        """The most operations in a text of that length."""
        degree = self.settings.degree
        return self.settings.operations or (length - 2 * degree - 1) // (degree + 1)

    def example(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        values: list[Polynomial] = []

        def expression() -> Int64[np.ndarray, " n"]:
            tokens, value = self._drawn(int(rng.integers(1, self.most(length) + 1)), rng)
            values.append(value)
            return np.array(tokens, dtype=np.int64)

        asked = self.question(split, expression)
        n_blanks = length - len(asked) - 1 - self.settings.degree
        tokens = np.concatenate([np.full(n_blanks, self.blank), asked, [self.equals], values[-1] + 1])
        place = np.arange(length)
        return Example(tokens=tokens, answer=place >= length - self.settings.degree, idle=place < n_blanks)

    def _drawn(self, operations: int, rng: np.random.Generator) -> tuple[list[int], Polynomial]:
        """An expression's tokens and its value."""
        settings = self.settings
        if operations == 0:
            value = rng.integers(settings.modulus, size=settings.degree)
            return (value + 1).tolist(), value
        operator = settings.operators[rng.integers(len(settings.operators))]
        if operator == "negate":
            tokens, value = self._drawn(operations - 1, rng)
            return [self.sign[operator], *tokens], -value % settings.modulus
        on_the_left = int(rng.integers(operations))
        left, p = self._drawn(on_the_left, rng)
        right, q = self._drawn(operations - 1 - on_the_left, rng)
        return [self.sign[operator], *left, *right], self._value(operator, p, q)

    def _value(self, operator: Operator, p: Polynomial, q: Polynomial) -> Polynomial:
        modulus = self.settings.modulus
        if operator == "add":
            return (p + q) % modulus
        if operator == "multiply":
            return np.convolve(p, q)[: len(p)] % modulus
        value = np.zeros_like(p)  # Horner's scheme
        for coefficient in p[::-1]:
            value = np.convolve(value, q)[: len(p)] % modulus
            value[0] = (value[0] + coefficient) % modulus
        return value


class PolynomialArithmeticTask(Task):
    name: ClassVar[str] = "polynomial_arithmetic"
    summary: ClassVar[str] = "the value of an expression of polynomials over a finite field"
    paper: ClassVar[str] = (
        "Gloeckle et al. 2024, Better & faster large language models via multi-token prediction, 2404.19737"
    )
    settings: ClassVar[type[PolynomialArithmeticSettings]] = PolynomialArithmeticSettings

    def generator(self, settings: PolynomialArithmeticSettings, codec: Codec, corpus: Corpus) -> PolynomialArithmetic:
        del corpus
        return PolynomialArithmetic(settings, codec)


TASK = PolynomialArithmeticTask()
