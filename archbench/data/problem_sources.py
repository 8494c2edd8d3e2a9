"""Where problems of MBPP's schema come from, by what a user writes, and a file to write them to.

- nothing: the file below the folder that $ARCHBENCH_DATA names
- PATH: a file of JSON lines
- hf:NAME: a data set of the Hugging Face hub, all its splits together (needs network, or its cache)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from archbench.data.problems import Problem, find_mbpp, read_problems
from archbench.errors import DataError, MissingExtra, SuiteError
from archbench.parse import parse

HUB = "hf:"


def load_problems(source: str) -> list[Problem]:
    """The problems of a source, in its order.

    Raises:
        DataError: there is no such source, or a row of it is not a problem.
        MissingExtra: it is on the hub, and the package `datasets` is not here.
    """
    if source.startswith(HUB):
        return _from_hub(source)
    return read_problems(Path(source).expanduser() if source else find_mbpp())


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Raises DataError when the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for problem in problems:
                file.write(json.dumps(asdict(problem)) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists") from error


def _from_hub(source: str) -> list[Problem]:
    if find_spec("datasets") is None:
        raise MissingExtra(f"{source}: the hub needs the package datasets: pip install 'archbench[hub]'")
    import datasets

    try:
        splits = datasets.load_dataset(source.removeprefix(HUB))
    except (OSError, ValueError) as error:  # offline and unknown names are OSErrors there, a wrong config ValueError
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{source}: cannot be loaded ({type(error).__name__}: {reason}); "
            "check the name and the network, or give the path of a local mbpp.jsonl"
        ) from error
    rows = ((f"{name}:{number}", row) for name, split in splits.items() for number, row in enumerate(split))
    return problems_of(source, rows)


def problems_of(source: str, rows: Iterable[tuple[str, dict[str, object]]]) -> list[Problem]:
    """The problems that rows hold, ordered by task id; each row comes with its place in the source.

    Raises:
        DataError: a row is not a problem, or a task_id comes twice.
    """
    problems: dict[int, Problem] = {}
    for place, row in rows:
        try:
            problem = parse(Problem, row, f"{source}: {place}")
        except SuiteError as error:
            raise DataError(f"{error}; expected MBPP's fields, as of google-research-datasets/mbpp") from None
        if problem.task_id in problems:
            raise DataError(f"{source}: {place}: task_id {problem.task_id} comes a second time")
        problems[problem.task_id] = problem
    return [problems[number] for number in sorted(problems)]
