"""MBPP: short Python problems with three asserts each; completions are judged in the sandbox.

Protocols, each named in the record:

    mbpp@lm-eval-3shot    the prompt of lm-evaluation-harness's task `mbpp` (version 1.0), byte for byte: problems 2, 3
                          and 4 with their solutions, whose lines end in CRLF as in the file; a completion ends before
                          [DONE] and is judged as it is
    mbpp@meta-3shot       the same with LF line ends, to be sampled. Gloeckle et al. state neither prompt nor shots;
                          three shots are inferred from Code Llama, whose authors overlap with theirs

Figures compare with published ones only at equal problems, completions, temperature and length: lm-eval writes one
greedy completion of at most 256 tokens, which for a model of bytes is little (a fifth of the reference solutions is
longer). Models trained for minutes pass nothing here; bits per byte of the solutions still tell them apart.

Sources: Austin et al. 2021, 2108.07732, section 4.1 (the prompt); Gloeckle et al. 2024, 2404.19737, table 1; Rozière et
al. 2023, 2308.12950, table 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from archbench import coding
from archbench.completions import Writing
from archbench.data.problem_sources import load_problems
from archbench.data.problems import Problem
from archbench.errors import ConfigError, DataError
from archbench.metric import Measurement, Metric, Quantity, Subject

SHOTS = (2, 3, 4)
DONE = "[DONE]"
CPU_S = 10
"""The slowest reference solution takes 3 s."""


@dataclass(frozen=True, kw_only=True)
class MBPPSettings:
    """What is asked of which problems.

    Attributes:
        path: a file of MBPP's schema, `hf:google-research-datasets/mbpp`, or empty for that below $ARCHBENCH_DATA.
        first, last: task ids; 11 to 510 are the test split.
        limit: of these, how many evenly spaced ones; 0 for all.
        samples, temperatures, new_tokens: completions of each problem at each temperature, one where that is 0
            (greedy), and their length.
    """

    path: str = ""
    protocol: Literal["lm-eval-3shot", "meta-3shot"] = "lm-eval-3shot"
    first: int = 11
    last: int = 510
    limit: int = 0
    samples: int = 1
    temperatures: tuple[float, ...] = (0.0,)
    new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.first > self.last or self.limit < 0:
            raise ConfigError(f"mbpp: tasks {self.first} to {self.last}, limit {self.limit}; asks for none")
        self.writing()

    def writing(self) -> Writing:
        return Writing(samples=self.samples, temperatures=self.temperatures, new_tokens=self.new_tokens, stop=(DONE,))


class MBPPMetric(Metric):
    name = "mbpp"
    version = 1
    settings = MBPPSettings
    quantities: ClassVar[Mapping[str, Quantity]] = coding.QUANTITIES

    def measure(self, subject: Subject, settings: MBPPSettings) -> Iterator[Measurement]:
        """Without a path and without the file nothing is measured, and the reason says how to get it.

        Raises:
            DataError: the file named cannot be read as problems.
            ConfigError: it lacks the shots or the problems asked for.
        """
        try:
            problems = {problem.task_id: problem for problem in load_problems(settings.path)}
        except DataError as error:
            if settings.path:
                raise
            at = {"protocol": f"mbpp@{settings.protocol}"}
            for quantity in self.quantities:
                yield Measurement(quantity=quantity, value=None, at=at, reason=str(error))
            return
        missing = [str(number) for number in SHOTS if number not in problems]
        if missing:
            raise ConfigError(f"mbpp: the shots, problems {', '.join(missing)}, are not in the file; give MBPP's own")
        chosen = [p for number, p in sorted(problems.items()) if settings.first <= number <= settings.last]
        if not chosen:
            raise ConfigError(f"mbpp: no problem from {settings.first} to {settings.last} is in the file")
        if 0 < settings.limit < len(chosen):
            chosen = [chosen[place * len(chosen) // settings.limit] for place in range(settings.limit)]
        named = protocol(settings.protocol, [problems[number] for number in SHOTS])
        yield from coding.measure(subject, chosen, named, settings.writing())


def protocol(name: str, shots: Sequence[Problem]) -> coding.Protocol:
    """The protocol of that name with these shots."""

    def solution(problem: Problem) -> str:
        return problem.code if name == "lm-eval-3shot" else problem.code.replace("\r\n", "\n")

    return coding.Protocol(
        name=f"mbpp@{name}",
        shots="".join(f"{prompt(shot)}{solution(shot)}\n{DONE}\n\n" for shot in shots),
        prompt=prompt,
        solution=solution,
        cpu_s=CPU_S,
    )


def prompt(problem: Problem) -> str:
    tests = "\n".join(problem.test_list)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


METRIC = MBPPMetric()
