"""A cell: (architecture, its config, data, budget, seed) — what fixes the trained weights.

Cells are plain data and travel as JSON between processes and machines. A cell's `key` names what was asked for and is
stable across versions of the code; its `address` also depends on the source that trains it, so that weights trained by
other code are never taken for its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from archbench import registry
from archbench.environment import source_sha256
from archbench.errors import ConfigError
from archbench.exercise import Exercise, parse_exercise
from archbench.parse import parse

Precision = Literal["auto", "fp32", "bf16-mixed"]

_PACKAGE = Path(__file__).resolve().parent
_TRAINED_BY = (
    "model.py", "state.py", "layers.py", "segments.py", "recurrent.py", "sampling.py", "codec.py", "train.py",
    "ops/**/*.py", "ops/**/*.c", "data/*.py",
)  # fmt: skip
_TAUGHT_BY = ("task.py", "curriculum.py", "tasks/*.py")
_MEASURED_BY = (
    "clocks.py", "stats.py", "power.py", "task.py", "tasks/*.py", "flops.py", "operators.py", "roofline.py",
    "generation.py", "drafting.py", "prompts.py", "haystack.py", "examination.py", "projection.py", "coding.py",
    "completions.py", "data/mbpp*.py", "data/problem*.py", "sandbox/**/*.py", "levels.py", "timing.py", "metric.py",
    "metrics/*.py", "history.py",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much training a cell gets: exactly one of these. `bytes` counts raw text bytes predicted, repeats included;
    `flops` are analytic training FLOPs; `seconds` are wall-clock seconds of training. 0 is for pretrained cells."""

    bytes: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in dataclasses.asdict(self).items() if value is not None]
        if len(given) != 1:
            found = ", ".join(given) or "nothing"
            raise ConfigError(f"training.budget: found {found}; give exactly one of bytes, tokens, flops, seconds")
        if not self.amount >= 0:
            raise ConfigError(f"training.budget.{self.unit}: {self.amount}; must be above 0")

    @property
    def unit(self) -> str:
        return next(name for name, value in dataclasses.asdict(self).items() if value is not None)

    @property
    def amount(self) -> float:
        return getattr(self, self.unit)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a cell is trained.

    Attributes:
        context, batch: a training window's tokens and the rows of a step.
        learning_rate: the peak; reached after the share `warmup` of the budget, and held until the last share `decay`
            of it, in which a cosine leads to `final` of the peak; 1 means from the end of the warm-up on.
        task: what is learned instead of the corpus's text. Then `context` is the longest stage's, and shorter stages
            have more rows.
        precision: "auto" takes bf16 autocast where a probe shows it is faster on this machine, and says so.
    """

    budget: Budget
    context: int = 256
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.05
    final: float = 0.03
    decay: float = 1.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: Precision = "auto"
    task: Exercise | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("context", 1, 2**24),
            ("batch", 1, 2**20),
            ("learning_rate", 1e-12, 10),
            ("warmup", 0, 0.9),
            ("final", 0, 1),
            ("decay", 1e-6, 1),
            ("weight_decay", 0, 10),
            ("beta1", 0, 0.999999),
            ("beta2", 0, 0.999999),
            ("clip", 1e-6, 1e6),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"training.{name}: {getattr(self, name)}; must lie between {low} and {high}")


def parse_training(data: Mapping[str, Any], where: str) -> Training:
    """Raises SuiteError with the place for an unknown key or an impossible value, however deep."""
    settled = {**data, "budget": parse(Budget, data.get("budget"), f"{where}.budget")}
    if data.get("task") is not None:
        settled["task"] = parse_exercise(data["task"], f"{where}.task")
    return parse(Training, settled, where)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained. `config` is the architecture's own config; `size` says where it came from; `residual` is its
    relative distance from the size asked for along `match`; `metrics` names what is measured on it. `start_from` is the
    checkpoint folder that training goes on from, None for first weights; the weights' hash identifies it. With a budget
    of 0 that checkpoint is measured as it is: the cell is `pretrained`, and the hash covers the codec too. `tuning`
    says how its learning rate was found, None where it was given; `void` why it must not be trained, mostly "".
    """

    label: str
    architecture: str
    size: str
    config: Any
    corpus: str
    corpus_sha256: str
    codec: str
    seed: int
    training: Training
    metrics: tuple[str, ...]
    match: str = "parameters"
    residual: float = 0.0
    start_from: str | None = None
    start_sha256: str | None = None
    tuning: dict[str, Any] | None = None
    void: str = ""

    @property
    def pretrained(self) -> bool:
        return self.training.budget.amount == 0

    @property
    def key(self) -> str:
        data = self.to_dict()
        for presentation in ("label", "size", "metrics", "match", "residual", "start_from", "tuning", "void"):
            del data[presentation]
        if self.start_sha256 is None:  # as before cells could start from weights
            del data["start_sha256"]
        for later, absent in (("task", None), ("decay", 1.0)):  # as before training had these
            if data["training"][later] == absent:
                del data["training"][later]
        return _digest(data)[:12]

    @property
    def address(self) -> str:
        return _digest([self.key, self.training_source])[:12]

    @property
    def training_source(self) -> str:
        """Hash of the files that decide what the trained weights are."""
        return _training_source(self.architecture, self.training.task is not None)

    def name(self) -> str:
        """Tells this cell from the others of its suite, for people."""
        return f"{self.label}/{self.size}/seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "cell") -> Cell:
        """Raises SuiteError or ConfigError when the data does not describe a cell this installation knows."""
        config = parse(registry.architecture(data["architecture"]).config, data["config"], f"{where}.config")
        settled = {"config": config, "training": parse_training(data["training"], f"{where}.training")}
        return cls(**{**data, **settled, "metrics": tuple(data["metrics"])})


@cache
def _training_source(architecture: str, taught: bool) -> str:
    """Read once a process: what a run planned is what it looks for."""
    shared = _TRAINED_BY + (_TAUGHT_BY if taught else ())
    return source_sha256([*_files(shared), *registry.source_files(architecture)])


def measuring_source(cell: Cell) -> str:
    """Hash of the files that decide what a metric reads off a trained cell."""
    return _digest([cell.training_source, source_sha256(_files(_MEASURED_BY))])


def _files(patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in _PACKAGE.glob(pattern)})


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
