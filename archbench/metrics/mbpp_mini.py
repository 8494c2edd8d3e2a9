"""mbpp-mini: the generated problems of `data.mbpp_mini`, for models trained on their training templates.

It stands beside MBPP and never for it: all a model shows here is that it combines operations it has seen in other
combinations. A model that was not trained on the corpus `mbpp-mini` has never seen the form of the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from archbench import coding
from archbench.completions import Writing
from archbench.data import mbpp_mini
from archbench.errors import ConfigError
from archbench.metric import Measurement, Metric, Quantity, Subject


@dataclass(frozen=True, kw_only=True)
class MiniSettings:
    """The first `problems` test problems (0: all), each completed `samples` times at each temperature, and once where
    that is 0, which is greedy."""

    problems: int = 0
    samples: int = 10
    temperatures: tuple[float, ...] = (0.0, 0.5)
    new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.problems < 0:
            raise ConfigError(f"mbpp_mini.problems: {self.problems}; must be at least 1, or 0 for all")
        self.writing()

    def writing(self) -> Writing:
        return Writing(
            samples=self.samples,
            temperatures=self.temperatures,
            new_tokens=self.new_tokens,
            stop=(mbpp_mini.DONE,),
        )


class MiniMetric(Metric):
    name = "mbpp_mini"
    version = 1
    settings = MiniSettings
    quantities: ClassVar[Mapping[str, Quantity]] = coding.QUANTITIES

    def measure(self, subject: Subject, settings: MiniSettings) -> Iterator[Measurement]:
        problems = mbpp_mini.problems("test")
        yield from coding.measure(subject, problems[: settings.problems or None], PROTOCOL, settings.writing())


PROTOCOL = coding.Protocol(
    name="mbpp-mini@0shot",
    shots="",
    prompt=mbpp_mini.prompt,
    solution=lambda problem: problem.code,
    cpu_s=2,
)

METRIC = MiniMetric()
