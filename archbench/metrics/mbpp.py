"""MBPP: short Python problems with three asserts each, from a local file; completions are judged in the sandbox.

Protocols, each named in the record:

    mbpp@lm-eval-3shot    the wording of lm-evaluation-harness's task `mbpp`: shots from tasks 2, 3 and 4 with the CRLF
                          line ends of the file, stop at [DONE]; of a fenced answer the first block counts
    mbpp@meta-3shot       the same questions with LF line ends, to be sampled; Gloeckle et al. state neither prompt nor
                          shots, three shots are inferred from Code Llama, to which their authors overlap

Figures are comparable with published ones only at the same tasks, samples and temperature. Small models score nothing
here; bits per byte of the reference solutions still tell them apart.

Sources: Austin et al. 2021, 2108.07732, section 4.1 (the prompt); Gloeckle et al. 2024, 2404.19737, table 1; Rozière et
al. 2023, 2308.12950, table 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from archbench import coding
from archbench.data.problems import Problem, find_mbpp, read_problems
from archbench.errors import ConfigError
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.sampling import Sampling

SHOTS = (2, 3, 4)
DONE = "[DONE]"
FENCE = re.compile(r"```(?:python|py)?\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class MBPPSettings:
    """`path` of a file of MBPP's schema, empty for that of $ARCHBENCH_DATA; `first` to `last` are the task ids asked
    (11 to 510 is the test split), of which `limit` evenly spaced ones are taken (0: all)."""

    path: str = ""
    protocol: Literal["lm-eval-3shot", "meta-3shot"] = "lm-eval-3shot"
    first: int = 11
    last: int = 510
    limit: int = 0
    samples: int = 1
    temperature: float = 0.0
    new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("samples", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mbpp.{name}: {getattr(self, name)}; must be at least 1")
        if self.first > self.last or self.limit < 0:
            raise ConfigError(f"mbpp: tasks {self.first} to {self.last}, limit {self.limit}; asks for none")
        Sampling(temperature=self.temperature)


class MBPPMetric(Metric):
    name = "mbpp"
    version = 1
    settings = MBPPSettings
    quantities: ClassVar[Mapping[str, Quantity]] = coding.QUANTITIES

    def measure(self, subject: Subject, settings: MBPPSettings) -> Iterator[Measurement]:
        """Raises DataError when there is no file, or no such tasks in it."""
        problems = {p.task_id: p for p in read_problems(Path(settings.path) if settings.path else find_mbpp())}
        missing = [str(id) for id in SHOTS if id not in problems]
        if missing:
            raise ConfigError(f"mbpp: the shots {', '.join(missing)} are not in the file; give MBPP's own")
        chosen = [p for id, p in problems.items() if settings.first <= id <= settings.last]
        if not chosen:
            raise ConfigError(f"mbpp: no task from {settings.first} to {settings.last} in the file")
        if settings.limit:
            chosen = chosen[:: max(1, len(chosen) // settings.limit)][: settings.limit]
        named = protocol(settings.protocol, [problems[id] for id in SHOTS])
        how = coding.Writing(samples=settings.samples, temperature=settings.temperature, new_tokens=settings.new_tokens)
        yield from coding.measure(subject, chosen, named, how)


def protocol(name: str, shots: Sequence[Problem]) -> coding.Protocol:
    """The protocol of that name with these shots."""
    as_in_file = name == "lm-eval-3shot"

    def solution(problem: Problem) -> str:
        code = problem.code if as_in_file else problem.code.replace("\r\n", "\n")
        return f"{code}\n{DONE}"

    return coding.Protocol(
        name=f"mbpp@{name}",
        shots="".join(f"{prompt(shot)}{solution(shot)}\n\n" for shot in shots),
        prompt=prompt,
        solution=solution,
        program=fenced if as_in_file else str,
        stop=(DONE,),
    )


def prompt(problem: Problem) -> str:
    tests = "\n".join(problem.test_list)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def fenced(completion: str) -> str:
    """The first fenced block of a completion, or all of it."""
    found = FENCE.search(completion)
    return found.group(1) if found else completion


METRIC = MBPPMetric()
