"""mbpp-mini: its problems are right, tell near misses apart, and are divided by template."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from archbench.cli import app
from archbench.data import mbpp_mini
from archbench.data.corpus import load_corpus
from archbench.data.mbpp_mini_templates import SLOTS, Template, templates
from archbench.data.problem_sources import write_problems
from archbench.data.problems import Problem, read_problems

TEMPLATES = {template.name: template for template in templates()}


def passes(program: str, problem: Problem) -> bool:
    space: dict[str, object] = {}
    exec(program, space)
    try:
        for test in problem.test_list:
            exec(test, space)
    except (AssertionError, IndexError, ValueError):
        return False
    return True


def template_of(problem: Problem) -> Template:
    """By the function's name."""
    (function,) = ast.parse(problem.code).body
    assert isinstance(function, ast.FunctionDef)
    return TEMPLATES[function.name]


@pytest.mark.parametrize("family", SLOTS)
def test_every_template_s_reference_passes_its_tests(family: str) -> None:
    """The expected values come from the operations, the reference from their code: neither is made from the other."""
    for number, template in enumerate(template for template in TEMPLATES.values() if template.family == family):
        for seed in range(2):
            problem = template.problem(1, np.random.default_rng([number, seed]))
            assert len(set(problem.test_list)) == 3
            assert passes(problem.code, problem), problem


def test_the_problems_of_both_sides_pass_too() -> None:
    for problem in (*mbpp_mini.problems("test"), *mbpp_mini.problems("train")[::40]):
        assert passes(problem.code, problem), problem


def test_the_tests_tell_near_misses_apart() -> None:
    """Solutions with one operation exchanged fail, but for a few that hardly any input tells apart."""
    told = survived = 0
    for problem in mbpp_mini.problems("test")[::3]:
        template = template_of(problem)
        for other in template.neighbours:
            near = other.problem(1, np.random.default_rng(0)).code
            told += 1
            survived += passes(near.replace(f"def {other.name}", f"def {template.name}"), problem)
    assert told > 500
    assert survived / told < 0.03


def test_names_are_the_templates_own() -> None:
    assert len(TEMPLATES) == len(list(templates())) > 400


def test_no_test_template_is_trained_on_and_every_operation_is() -> None:
    train = {template_of(problem) for problem in mbpp_mini.problems("train")}
    test = [template_of(problem) for problem in mbpp_mini.problems("test")]
    assert len(set(test)) == len(test) > 80  # one problem each: they are independent
    assert not train & set(test)
    assert train | set(test) == set(TEMPLATES.values())
    for family, slots in SLOTS.items():
        for place, operations in enumerate(slots):
            seen = {template.operations[place] for template in train if template.family == family}
            assert seen == set(operations)
    assert {template.family for template in test} == set(SLOTS)


def test_no_test_prompt_or_solution_is_in_the_training_text() -> None:
    trained = b"".join(document.text for document in mbpp_mini.read()).decode()
    for problem in mbpp_mini.problems("test"):
        assert problem.code not in trained
        assert problem.text not in trained
        assert mbpp_mini.prompt(problem) not in trained


def test_the_same_problems_every_time() -> None:
    assert mbpp_mini.problems.__wrapped__("test") == mbpp_mini.problems("test")
    ids = [problem.task_id for split in ("train", "test") for problem in mbpp_mini.problems(split)]
    assert len(set(ids)) == len(ids) and min(ids) > 974


def test_a_written_file_is_in_mbpp_s_schema(tmp_path: Path) -> None:
    write_problems(tmp_path / "mini.jsonl", mbpp_mini.problems("test"))
    assert tuple(read_problems(tmp_path / "mini.jsonl")) == mbpp_mini.problems("test")


def test_the_command_writes_either_side(tmp_path: Path) -> None:
    for options, split in (([], "test"), (["--split", "train"], "train")):
        path = tmp_path / f"{split}.jsonl"
        done = CliRunner().invoke(app, ["data", "write-mbpp-mini", "--out", str(path), *options])
        assert done.exit_code == 0 and f"{len(mbpp_mini.problems(split))} problems" in done.output
        assert tuple(read_problems(path)) == mbpp_mini.problems(split)


def test_the_corpus_is_the_training_side() -> None:
    corpus = load_corpus("mbpp-mini")
    assert len(corpus.train) + len(corpus.heldout) == mbpp_mini.TRAIN_PROBLEMS - corpus.n_duplicates
    assert corpus.n_duplicates < 0.01 * mbpp_mini.TRAIN_PROBLEMS
    text = corpus.train[0].text.decode()
    assert text.startswith('"""\nWrite a function that ') and text.endswith(f"\n{mbpp_mini.DONE}\n")
