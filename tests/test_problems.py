"""MBPP's files: read as they are, or refused in one line with the place."""

import json

import pytest

from archbench.data.problems import Problem, find_mbpp, read_problems
from archbench.errors import DataError

LINE = {
    "task_id": 7,
    "text": "Add.",
    "code": "def add(a, b):\r\n  return a + b",
    "test_list": ["assert add(1, 2) == 3"],
}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_problem_is_read_as_it_stands(tmp_path):
    more = {"test_setup_code": "x = 1", "challenge_test_list": ["assert add(0, 0) == 0"], "source": "elsewhere"}
    path = write(tmp_path / "p.jsonl", LINE, "", {**LINE, **more, "task_id": 9})
    first, second = read_problems(path)
    assert first == Problem(task_id=7, text="Add.", code=LINE["code"], test_list=("assert add(1, 2) == 3",))
    assert "\r\n" in first.code
    assert second.test_setup_code == "x = 1"
    assert second.challenge_test_list == ("assert add(0, 0) == 0",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON in UTF-8 ("),
        ("[" * 100_000, "line 2: not JSON in UTF-8 ("),
        ("[1]", "line 2: found list; expected a JSON object"),
        ({"text": "x"}, "line 2: no 'task_id'; its keys are: text"),
        ({**LINE, "task_id": "7"}, "line 2: 'task_id' holds str; expected int"),
        ({**LINE, "task_id": True}, "line 2: 'task_id' holds bool; expected int"),
        ({**LINE, "task_id": 8, "code": None}, "line 2: 'code' holds NoneType; expected str"),
        ({**LINE, "task_id": 8, "test_list": "assert"}, "line 2: 'test_list' holds str; expected list"),
        ({**LINE, "task_id": 8, "test_list": [1]}, "line 2: 'test_list' holds int; expected a list of str"),
        ({**LINE, "task_id": 8, "challenge_test_list": {}}, "line 2: 'challenge_test_list' holds dict; expected list"),
        (LINE, "line 2: task_id 7 comes a second time; each must be there once"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", LINE, line)
    with pytest.raises(DataError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_no_problems_and_no_file_are_named(tmp_path):
    with pytest.raises(DataError, match=r"empty; expected lines like \{\"task_id\""):
        read_problems(write(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(tmp_path / "none.jsonl")


def test_mbpp_is_found_where_the_data_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHBENCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"not found in .*; download https://github.com/google-research/"):
        find_mbpp()
    (tmp_path / "mbpp").mkdir()
    path = write(tmp_path / "mbpp" / "mbpp.jsonl", LINE)
    assert find_mbpp() == path
    monkeypatch.delenv("ARCHBENCH_DATA")
    with pytest.raises(DataError, match="ARCHBENCH_DATA is not set; download"):
        find_mbpp()


def test_mbpp_itself_is_whole(archbench_data):
    problems = read_problems(archbench_data / "mbpp" / "mbpp.jsonl")
    assert [problem.task_id for problem in problems] == list(range(1, 975))
    assert all(len(problem.test_list) == 3 for problem in problems)
    assert [problem.task_id for problem in problems if problem.test_setup_code] == [367, 927]
    assert sum(bool(problem.challenge_test_list) for problem in problems) == 11
    assert sum("\r\n" in problem.code for problem in problems) == 972
