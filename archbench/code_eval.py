"""Judging completions from a file, whoever wrote them: JSON lines in, the same lines with verdicts out.

    {"task_id": 11, "completion": "def remove_Occ(s, ch): ..."}
        -> the same fields, and "passed", "result", "sandbox", "seconds", "problem_sha256"

A completion is a whole program and is run as it is: nothing is put before it, and no Markdown fence is taken off. The
results file grows line by line in the samples' order; when it is there already, its lines are held against the samples
and their problems, and judging goes on after them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archbench.data.problems import Problem, read_lines
from archbench.errors import DataError
from archbench.sandbox import Sandbox, Verdict
from archbench.sandbox.questions import take_apart
from archbench.stats import Interval, bootstrap_mean, pass_at_k

KS = (1, 10, 100)
ADDED = ("passed", "result", "sandbox", "seconds", "problem_sha256")
"""Fields of a result beyond its sample's."""

Sample = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """pass@k over problems, with its interval over problems (None for a single one)."""

    k: int
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Summary:
    """What a results file says. results: how often each kind of result came, most first. sandboxes: all that were
    used, "unsandboxed" among them where nothing confined the completions."""

    n_problems: int
    n_samples: int
    n_passed: int
    estimates: tuple[Estimate, ...]
    results: Mapping[str, int]
    sandboxes: tuple[str, ...]


def read_samples(path: Path, problems: Mapping[int, Problem]) -> list[Sample]:
    """The lines of a samples file, each with `task_id` (of one of the problems) and `completion`, in its order.

    Raises:
        DataError: the file cannot be read, a line lacks one of the two or holds something else there, or the tests of
            a problem asked for cannot be judged. Names the line.
    """
    samples = []
    for where, sample in read_lines(path):
        for name, kind in (("task_id", int), ("completion", str)):
            if type(sample.get(name)) is not kind:
                found = type(sample[name]).__name__ if name in sample else "nothing"
                raise DataError(f"{where}: '{name}' holds {found}; expected {kind.__name__}")
        if sample["task_id"] not in problems:
            raise DataError(f"{where}: there is no problem of task_id {sample['task_id']}; {_range(problems)}")
        if taken := [name for name in ADDED if name in sample]:
            raise DataError(f"{where}: has '{taken[0]}', which results are given; rename it (is this a results file?)")
        take_apart(problems[sample["task_id"]])
        samples.append(sample)
    if not samples:
        raise DataError(f'{path}: empty; expected lines like {{"task_id": 11, "completion": "def f(x): ..."}}')
    return samples


def judged_before(path: Path, samples: Sequence[Sample], problems: Mapping[int, Problem]) -> list[Result]:
    """The results that a file holds already, none if it is not there. A last line that was cut off is taken away.

    Raises:
        DataError: its lines are not results of the first samples, judged by the same problems.
    """
    if not path.exists():
        return []
    _drop_torn_line(path)
    results = []
    for index, (where, result) in enumerate(read_lines(path)):
        if index == len(samples):
            raise DataError(f"{where}: there are only {len(samples)} samples; name another --out, or delete this one")
        sample = samples[index]
        if {name: value for name, value in result.items() if name not in ADDED} != sample:
            raise DataError(f"{where}: not a result of sample {index + 1}; name another --out, or delete this one")
        if result.get("problem_sha256") != _sha256(problems[sample["task_id"]]):
            raise DataError(
                f"{where}: judged by another version of its problem; name another --out, or delete this one"
            )
        results.append(result)
    return results


def judge_samples(
    problems: Mapping[int, Problem], samples: Sequence[Sample], sandbox: Sandbox, workers: int
) -> Iterator[Result]:
    """The result of each sample, in order, as they come. Stopping early closes the sandbox."""
    items = ((sample["completion"], problems[sample["task_id"]]) for sample in samples)
    with closing(sandbox.verdicts(items, workers)) as verdicts:
        for sample, verdict in zip(samples, verdicts, strict=True):
            yield {**sample, **_added(verdict, problems[sample["task_id"]])}


def write_results(path: Path, results: Iterable[Result], notify: Callable[[int], None] = lambda _: None) -> None:
    """Adds results to a file, each as soon as it is there; `notify` hears after each how many it has written.

    Raises DataError when the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for n_done, result in enumerate(results, start=1):
                file.write(json.dumps(result) + "\n")
                file.flush()
                notify(n_done)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error


def summary(results: Sequence[Result]) -> Summary:
    """pass@k for each k of 1, 10 and 100 that every problem has samples enough for, over the problems with samples."""
    counts = Counter(result["task_id"] for result in results)
    correct = Counter(result["task_id"] for result in results if result["passed"])
    fewest = min(counts.values())
    estimates = []
    for k in (k for k in KS if k <= fewest):
        shares = [pass_at_k(n, correct[task], k) for task, n in counts.items()]
        estimates.append(Estimate(k, sum(shares) / len(shares), bootstrap_mean(shares, list(counts))))
    kinds = Counter(result["result"].partition(":")[0].partition(" (")[0] for result in results)
    return Summary(
        n_problems=len(counts),
        n_samples=len(results),
        n_passed=correct.total(),
        estimates=tuple(estimates),
        results=dict(kinds.most_common()),
        sandboxes=tuple(sorted({result["sandbox"] for result in results})),
    )


def _added(verdict: Verdict, problem: Problem) -> Result:
    return {
        "passed": verdict.passed,
        "result": verdict.result,
        "sandbox": verdict.rung,
        "seconds": round(verdict.seconds, 4),
        "problem_sha256": _sha256(problem),
    }


def _sha256(problem: Problem) -> str:
    """Of all that decides a verdict: the reference solution says which names are the candidate's."""
    text = json.dumps(dataclasses.asdict(problem), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _drop_torn_line(path: Path) -> None:
    try:
        with path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.ftruncate(file.fileno(), whole)
    except OSError as error:
        raise DataError(f"{path}: cannot be read and written ({error.strerror})") from error


def _range(problems: Mapping[int, Problem]) -> str:
    return f"there are {len(problems)}, from {min(problems)} to {max(problems)}"
