"""mbpp-mini: the generated problems of `data.mbpp_mini`, for models trained on their training templates.

It stands beside MBPP and never for it: all a model shows here is that it combines operations it has seen in other
combinations. A model that was not trained on the corpus `mbpp-mini` has never seen the form of the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from archbench import coding
from archbench.data import mbpp_mini
from archbench.errors import ConfigError
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class MiniSettings:
    """The first `problems` of the test problems, each answered `samples` times at `temperature` (0 is greedy)."""

    problems: int = 100
    samples: int = 10
    temperature: float = 0.4
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for name, most in (("problems", mbpp_mini.TEST_PROBLEMS), ("samples", 1000), ("new_tokens", 4096)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"mbpp_mini.{name}: {getattr(self, name)}; must lie between 1 and {most}")
        Sampling(temperature=self.temperature)


class MiniMetric(Metric):
    name = "mbpp_mini"
    version = 1
    settings = MiniSettings
    quantities: ClassVar[Mapping[str, Quantity]] = coding.QUANTITIES

    def measure(self, subject: Subject, settings: MiniSettings) -> Iterator[Measurement]:
        how = coding.Writing(samples=settings.samples, temperature=settings.temperature, new_tokens=settings.new_tokens)
        yield from coding.measure(subject, mbpp_mini.problems("test")[: settings.problems], PROTOCOL, how)


PROTOCOL = coding.Protocol(
    name="mbpp-mini@0shot",
    shots="",
    prompt=mbpp_mini.prompt,
    solution=mbpp_mini.solution,
    program=str,
    stop=(mbpp_mini.DONE,),
)

METRIC = MiniMetric()
