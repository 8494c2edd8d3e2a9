"""MBPP: programming problems with a reference solution and tests, one JSON object a line.

The data is not in the package; it is looked for in $ARCHBENCH_DATA/mbpp/mbpp.jsonl. Any file of the same schema serves.
Source: Austin et al. 2021, Program Synthesis with Large Language Models (arXiv 2108.07732).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archbench.errors import DataError

MBPP_SOURCE = "https://github.com/google-research/google-research/blob/master/mbpp/mbpp.jsonl (CC BY 4.0)"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem. Source texts are as in the file: nearly all of MBPP's `code` has CRLF line ends, and is run with LF.

    code: the reference solution. test_list: assert statements. test_setup_code: runs between the solution and the
    tests, in this order, because it may use the solution's classes. challenge_test_list: harder tests; mostly empty.
    """

    task_id: int
    text: str
    code: str
    test_list: tuple[str, ...]
    test_setup_code: str = ""
    challenge_test_list: tuple[str, ...] = ()


def find_mbpp() -> Path:
    """The MBPP file. Raises DataError, which says how to get it, when it is not there."""
    named = os.environ.get("ARCHBENCH_DATA")
    if named and (path := Path(named) / "mbpp" / "mbpp.jsonl").is_file():
        return path
    found = f"not found in {Path(named) / 'mbpp'}" if named else "ARCHBENCH_DATA is not set"
    raise DataError(f"mbpp: {found}; download {MBPP_SOURCE} to mbpp/mbpp.jsonl below the folder ARCHBENCH_DATA names")


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file, in its order.

    Raises:
        DataError: the file cannot be read, or a line is not a problem, or a task_id comes twice.
    """
    problems: dict[int, Problem] = {}
    for where, line in read_lines(path):
        values = {
            "task_id": _field(where, line, "task_id", int),
            "text": _field(where, line, "text", str),
            "code": _field(where, line, "code", str),
            "test_list": _texts(where, line, "test_list"),
            "test_setup_code": _field(where, line, "test_setup_code", str) if "test_setup_code" in line else "",
            "challenge_test_list": _texts(where, line, "challenge_test_list") if "challenge_test_list" in line else (),
        }
        problem = Problem(**values)
        if problem.task_id in problems:
            raise DataError(f"{where}: task_id {problem.task_id} comes a second time; each must be there once")
        problems[problem.task_id] = problem
    if not problems:
        raise DataError(
            f'{path}: empty; expected lines like {{"task_id": 1, "text": ..., "code": ..., "test_list": ...}}'
        )
    return list(problems.values())


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place ("FILE: line N"). Blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a file of JSON lines") from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON in UTF-8 ({str(error).partition(chr(10))[0]})") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: found {type(value).__name__}; expected a JSON object")
        yield where, value


def _field(where: str, line: dict[str, Any], name: str, kind: type) -> Any:
    if name not in line:
        raise DataError(f"{where}: no '{name}'; its keys are: {', '.join(line) or '(none)'}")
    if type(line[name]) is not kind:  # True is an int to isinstance
        raise DataError(f"{where}: '{name}' holds {type(line[name]).__name__}; expected {kind.__name__}")
    return line[name]


def _texts(where: str, line: dict[str, Any], name: str) -> tuple[str, ...]:
    texts = _field(where, line, name, list)
    for text in texts:
        if type(text) is not str:
            raise DataError(f"{where}: '{name}' holds {type(text).__name__}; expected a list of str")
    return tuple(texts)
