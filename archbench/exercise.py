"""An exercise: training on a task, as a suite writes it down. Plain data until it is given a codec and a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from archbench import registry
from archbench.codec import Codec
from archbench.curriculum import Lesson
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError, SuiteError
from archbench.parse import parse


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a curriculum: texts of `context` tokens, `settings` replacing the task's one by one, and idle blocks
    of text standing up to `replay` times (see `archbench.curriculum`)."""

    context: int
    settings: dict[str, Any] = field(default_factory=dict)
    replay: float = 1.0
    block: int = 128

    def __post_init__(self) -> None:
        for name in ("context", "replay", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.task.stages.{name}: {getattr(self, name)}; must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """Training on a task instead of the corpus: its name, its settings, and stages from short to long. The next stage
    begins when the running share of exact answers passes `advance`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...]
    advance: float = 0.9

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("training.task.stages: found none; a task needs at least one, such as [{context: 256}]")
        if not 0 < self.advance < 1:
            raise ConfigError(f"training.task.advance: {self.advance}; must lie between 0 and 1")

    @property
    def context(self) -> int:
        """Of the longest stage."""
        return max(stage.context for stage in self.stages)

    def lessons(self, codec: Codec, corpus: Corpus, where: str = "training.task") -> list[Lesson]:
        """The stages with what draws their texts.

        Raises:
            ConfigError, SuiteError: the task is not known, or does not allow these settings, contexts or this codec.
        """
        task = registry.task(self.name)
        found = []
        for number, stage in enumerate(self.stages):
            settings = parse(task.settings, {**self.settings, **stage.settings}, f"{where}.settings")
            generator = task.generator(settings, codec, corpus)
            if stage.context < generator.shortest:
                raise ConfigError(
                    f"{where}.stages[{number}].context: {stage.context}; texts of task {self.name} have at least "
                    f"{generator.shortest} tokens"
                )
            found.append(Lesson(generator=generator, context=stage.context, replay=stage.replay, block=stage.block))
        return found


def parse_exercise(data: Any, where: str) -> Exercise:
    """Raises SuiteError with the place for an unknown key or an impossible value."""
    if not isinstance(data, Mapping):
        raise SuiteError(f"{where}: found {data!r}; expected a mapping with name and stages")
    stages = data.get("stages")
    if not isinstance(stages, (list, tuple)):
        raise SuiteError(f"{where}.stages: found {stages!r}; expected a list such as [{{context: 256}}]")
    parsed = tuple(parse(Stage, stage, f"{where}.stages[{number}]") for number, stage in enumerate(stages))
    return parse(Exercise, {**data, "stages": parsed}, where)
