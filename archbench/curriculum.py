"""Training on a task: rows drawn afresh at every step, in stages from short to long.

A stage ends when the running mean of the share of rows answered exactly passes a threshold; a stage's rows are as many
as make the same number of tokens a step. What is mastered is not forgotten at once, but neither is it rehearsed: the
last stage goes on until the budget is spent.

Replay: with `replay` R, every block of tokens that are all idle stands exp(U(0, ln R)) times in the text, each block
drawn by itself. A memory that is a sum over tokens thereby meets, in a short window, the sums of a text R times as
long.

Letters: b rows, t tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archbench.codec import BOUNDARY_ID
from archbench.data.examples import Examples, Rows
from archbench.errors import CheckpointError
from archbench.task import Generator

MEMORY = 0.95
"""Of the running mean of exact answers, a step."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One stage: texts of `context` tokens; idle blocks of `block` tokens stand in them up to `replay` times."""

    generator: Generator
    context: int
    replay: float = 1.0
    block: int = 128


class Curriculum(Examples):
    """Lessons one after the other. `tokens_per_step` divided by a lesson's context is its number of rows."""

    def __init__(
        self, lessons: Sequence[Lesson], *, tokens_per_step: int, advance: float, seed: int, token_bytes: np.ndarray
    ) -> None:
        self.lessons, self.tokens_per_step, self.advance, self.seed = lessons, tokens_per_step, advance, seed
        self.token_bytes = token_bytes
        self.stage, self.exact = 0, 0.0
        self.last: tuple[int, float] = (-1, 0.0)

    @property
    def context(self) -> int:  # type: ignore[override]
        return self.lessons[self.stage].context

    @property
    def n_rows(self) -> int:
        return max(1, self.tokens_per_step // self.context)

    def rows_at(self, step: int, lookahead: int) -> Rows:
        """The boundary, a text, and boundaries for the rest of the lookahead: as if the model read the text anew."""
        lesson, rng = self.lessons[self.stage], np.random.default_rng([self.seed, step, self.stage])
        width = lesson.context + lookahead
        tokens = np.full((self.n_rows, width), BOUNDARY_ID, dtype=np.int64)
        weights = np.zeros((self.n_rows, width), dtype=np.float32)
        repeats = np.ones((self.n_rows, width), dtype=np.float32)
        text = slice(1, 1 + lesson.context)
        for row in range(self.n_rows):
            example = lesson.generator.draw(lesson.context, "train", rng)
            tokens[row, text], weights[row, text] = example.tokens, example.answer
            if lesson.replay > 1:
                idle = np.zeros(width, dtype=bool)
                idle[text] = example.idle
                repeats[row] = _repeats(idle, lesson.replay, lesson.block, rng)
        self.last = (step, float(self.token_bytes[tokens[:, text]].sum()))
        return Rows(
            torch.from_numpy(tokens),
            torch.from_numpy(weights),
            torch.from_numpy(repeats) if lesson.replay > 1 else None,
        )

    def bytes_at(self, step: int) -> float:
        if self.last[0] != step:
            self.rows_at(step, 1)
        return self.last[1]

    def told(self, parts: Mapping[str, Tensor]) -> None:
        self.exact = MEMORY * self.exact + (1 - MEMORY) * float(parts["exact"])
        if self.exact > self.advance and self.stage + 1 < len(self.lessons):
            self.stage, self.exact = self.stage + 1, 0.0

    def parts(self) -> dict[str, float]:
        return {"stage": float(self.stage + 1)}

    def position(self) -> dict[str, Any]:
        return {"stage": self.stage, "exact": self.exact}

    def go_to(self, position: Mapping[str, Any]) -> None:
        if not 0 <= position["stage"] < len(self.lessons):
            raise CheckpointError(f"a partial checkpoint of stage {position['stage']}; there are {len(self.lessons)}")
        self.stage, self.exact = position["stage"], position["exact"]


def _repeats(idle: np.ndarray, most: float, block: int, rng: np.random.Generator) -> np.ndarray:
    """How often each token stands: blocks are counted as a model's segments are, from the boundary on."""
    found = np.ones(len(idle), dtype=np.float32)
    for begin in range(0, len(idle) - block + 1, block):
        if idle[begin : begin + block].all():
            found[begin : begin + block] = math.exp(rng.uniform(0, math.log(most)))
    return found
