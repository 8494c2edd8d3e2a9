"""MBPP as a task of lm-eval: three shots, greedy, one solution a problem, judged in archbench's sandbox.

Asked are the problems of the test split (11 to 510), after problems 2, 3 and 4 with their solutions. The text is the
paper's in lm-eval's wording, so that numbers compare with its task `mbpp`; that one allows 256 new tokens, which is too
short for a model of bytes, and runs what was written unprotected.

Source: Austin et al. 2021, section 2.1 (splits) and section 4.1 (prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archbench.data.problems import Problem, read_problems
from archbench.environment import usable_cores
from archbench.errors import DataError
from archbench.sandbox import open_sandbox

SHOTS = (2, 3, 4)
TEST_SPLIT = range(11, 511)
DONE = "[DONE]"
NEW_TOKENS = 1024
"""Bytes enough for 99 % of the reference solutions."""

PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)


def task(where: str, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that are asked, and what a task's config needs beside its name and data.

    Raises:
        DataError: the file cannot be read, or lacks the test split or a shot; names `where`.
        SandboxError: nothing here could confine what the model writes.
    """
    open_sandbox().close()  # rather now than after all has been written
    problems = {problem.task_id: problem for problem in read_problems(path)}
    missing = [number for number in SHOTS if number not in problems]
    asked = [_row(problem) for number, problem in sorted(problems.items()) if number in TEST_SPLIT]
    if missing or not asked:
        lacks = f"problem {missing[0]}, which is shown as a shot" if missing else "the test split, problems 11 to 510"
        raise DataError(f"{where}: the file lacks {lacks}; give the whole of mbpp.jsonl")

    def judged(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[bool]]:
        """Whether each answer passes its problem's tests."""
        pairs = zip(answers, docs, strict=True)
        solutions = [(text, problems[doc["task_id"]]) for found, doc in pairs for text in found]
        with open_sandbox() as sandbox:
            verdicts = iter(sandbox.judge_all(solutions, usable_cores()))
        return [[next(verdicts).passed for _ in found] for found in answers]

    return asked, {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "solution",
        "target_delimiter": "",
        "num_fewshot": len(SHOTS),
        "fewshot_config": {"sampler": "first_n", "samples": [_row(problems[number]) for number in SHOTS]},
        "generation_kwargs": {"until": [DONE], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "filter_list": [
            {"name": "none", "filter": [{"function": "custom", "filter_fn": judged}, {"function": "take_first"}]}
        ],
        "process_results": _passed,
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
    }


def _passed(_doc: dict[str, Any], results: Sequence[bool]) -> dict[str, float]:
    return {"pass_at_1": float(results[0])}


def _row(problem: Problem) -> dict[str, Any]:
    return {
        "task_id": problem.task_id,
        "prompt": PROMPT.format(text=problem.text, tests="\n".join(problem.test_list)),
        "solution": f"{problem.code}\n{DONE}",
    }
