"""Judging a file of completions: results in order, resumable, summed up as pass@k with intervals."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from archbench import code_eval
from archbench.data.problems import read_problems
from archbench.errors import DataError
from archbench.sandbox import ladder, open_sandbox
from archbench.stats import pass_at_k

RIGHT, WRONG, ENDLESS = "def f(x): return x + 1", "def f(x): return x", "while True: pass"


@pytest.fixture(scope="session")
def rung():
    """The best sandbox here, or a skip with the reasons why there is none."""
    reasons = {name: ladder.why_not(name) for name in ladder.CONFINED}
    for name, reason in reasons.items():
        if reason is None:
            return name
    pytest.skip(f"no sandbox here: {reasons}")


@pytest.fixture
def folder(tmp_path):
    """Two problems; four samples of the first (two right), four of the second (none right)."""
    problems = [{"task_id": n, "text": "", "code": RIGHT, "test_list": [f"assert f({n}) == {n + 1}"]} for n in (1, 2)]
    completions = [(1, RIGHT), (1, WRONG), (2, "def f(x"), (2, WRONG), (1, RIGHT), (2, "exit()"), (1, "f ="), (2, "")]
    samples = [{"task_id": task, "completion": text, "draw": n} for n, (task, text) in enumerate(completions)]
    write(tmp_path / "problems.jsonl", problems)
    write(tmp_path / "samples.jsonl", samples)
    return tmp_path


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(folder):
    problems = {problem.task_id: problem for problem in read_problems(folder / "problems.jsonl")}
    return problems, code_eval.read_samples(folder / "samples.jsonl", problems)


def judge(folder, rung, skip=0):
    problems, samples = read(folder)
    with open_sandbox(rung) as sandbox:
        results = code_eval.judge_samples(problems, samples[skip:], sandbox, workers=2)
        code_eval.write_results(folder / "out.jsonl", results)
    return lines(folder / "out.jsonl")


# pass@k


@pytest.mark.parametrize("n", range(1, 9))
def test_M18_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n):  # noqa: N802
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_M18_pass_at_1_is_the_share_that_passes_and_more_draws_never_hurt():  # noqa: N802
    for n, correct in ((5, 2), (200, 7), (1000, 999)):
        assert pass_at_k(n, correct, 1) == pytest.approx(correct / n)
        shares = [pass_at_k(n, correct, k) for k in range(1, n + 1)]
        assert shares == sorted(shares) and shares[-1] == 1.0
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(2000, 1, 100) == pytest.approx(0.05)  # C(2000, 100) is far beyond a float


def test_pass_at_k_is_unbiased():
    """Its mean over sets of 6 samples is the chance that one of 3 fresh ones passes; 1 - (1 - c/n)^3 is too low."""
    draw, p, n, k = random.Random(0), 0.3, 6, 3
    counts = [sum(draw.random() < p for _ in range(n)) for _ in range(20_000)]
    truth = 1 - (1 - p) ** k
    assert sum(pass_at_k(n, c, k) for c in counts) / len(counts) == pytest.approx(truth, abs=0.01)
    assert sum(1 - (1 - c / n) ** k for c in counts) / len(counts) < truth - 0.02


# Files


def test_results_keep_their_samples_fields_and_order(folder, rung):
    results = judge(folder, rung)
    _, samples = read(folder)
    assert [{name: result[name] for name in ("task_id", "completion", "draw")} for result in results] == samples
    assert [result["passed"] for result in results] == [True, False, False, False, True, False, False, False]
    assert {result["sandbox"] for result in results} == {rung}
    assert results[1]["result"] == "failed: test 1: got 1"
    assert results[2]["result"].startswith("failed: SyntaxError")
    assert results[7]["result"] == "failed: test 1: NameError: name 'f' is not defined"


def test_summary_gives_pass_at_k_over_problems(folder, rung):
    found = code_eval.summary(judge(folder, rung))
    assert (found.n_problems, found.n_samples, found.n_passed) == (2, 8, 2)
    (only,) = found.estimates  # 4 samples a problem allow k = 1 alone
    assert (only.k, only.value) == (1, 0.25)
    assert (only.interval.low, only.interval.high) == (0.0, 0.5)
    assert found.results == {"failed": 6, "passed": 2}
    assert found.sandboxes == (rung,)


def test_summary_asks_for_k_that_the_fewest_samples_allow():
    results = [
        {"task_id": task, "passed": draw == 0, "result": "passed", "sandbox": "strict"}
        for task, n in ((1, 10), (2, 12)) for draw in range(n)
    ]  # fmt: skip
    ten = code_eval.summary(results).estimates[1]
    assert [estimate.k for estimate in code_eval.summary(results).estimates] == [1, 10]
    assert ten.value == pytest.approx((1 + pass_at_k(12, 1, 10)) / 2)
    assert code_eval.summary(results[:10]).estimates[0].interval is None


def test_judging_goes_on_after_what_is_judged(folder, rung):
    whole = judge(folder, rung)
    out = folder / "out.jsonl"
    text = out.read_text().splitlines(keepends=True)
    out.write_text("".join(text[:3]) + text[3][:20])  # killed while it wrote
    problems, samples = read(folder)
    before = code_eval.judged_before(out, samples, problems)
    assert before == whole[:3]
    again = judge(folder, rung, skip=len(before))
    assert [{**result, "seconds": 0} for result in again] == [{**result, "seconds": 0} for result in whole]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": "other"}, "line 2: not a result of sample 2; name another --out, or delete this one"),
        ({"draw": None}, "line 2: not a result of sample 2"),
        ({"problem_sha256": "0"}, "line 2: judged by another version of its problem"),
    ],
)
def test_results_of_something_else_are_not_gone_on_with(folder, change, message):
    problems, samples = read(folder)
    sha256 = {task: code_eval._sha256(problem) for task, problem in problems.items()}
    results = [{**sample, "passed": True, "problem_sha256": sha256[sample["task_id"]]} for sample in samples]
    write(folder / "out.jsonl", [results[0], {**results[1], **change}])
    with pytest.raises(DataError) as caught:
        code_eval.judged_before(folder / "out.jsonl", samples, problems)
    assert message in str(caught.value)
    write(folder / "out.jsonl", [*results, results[0]])
    with pytest.raises(DataError, match="line 9: there are only 8 samples"):
        code_eval.judged_before(folder / "out.jsonl", samples, problems)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"completion": "x"}, "line 1: 'task_id' holds nothing; expected int"),
        ({"task_id": 1.0, "completion": "x"}, "line 1: 'task_id' holds float; expected int"),
        ({"task_id": 1}, "line 1: 'completion' holds nothing; expected str"),
        ({"task_id": 1, "completion": ["x"]}, "line 1: 'completion' holds list; expected str"),
        ({"task_id": 3, "completion": "x"}, "line 1: there is no problem of task_id 3; there are 2, from 1 to 2"),
        ({"task_id": 1, "completion": "x", "passed": True}, "line 1: has 'passed', which results are given"),
    ],
)
def test_bad_samples_are_named(folder, line, message):
    problems, _ = read(folder)
    write(folder / "samples.jsonl", [line])
    with pytest.raises(DataError) as caught:
        code_eval.read_samples(folder / "samples.jsonl", problems)
    assert message in str(caught.value)


def test_problems_that_cannot_be_judged_are_refused_before_anything_runs(folder):
    write(
        folder / "problems.jsonl", [{"task_id": n, "text": "", "code": "x = 1", "test_list": ["f()"]} for n in (1, 2)]
    )
    with pytest.raises(DataError, match="task 1: test_list: test 1: found 'Expr'"):
        read(folder)


# The command


def command(folder, *more, **options):
    words = ["--problems", "problems.jsonl", "--samples", "samples.jsonl", "--out", "out.jsonl", *more]
    return [sys.executable, "-m", "archbench.cli", "code-eval", *words], {
        "cwd": folder, "env": {**os.environ, "COLUMNS": "160"}, "text": True, **options
    }  # fmt: skip


def run(folder, *more):
    words, options = command(folder, *more)
    return subprocess.run(words, capture_output=True, timeout=120, **options)


def test_the_command_judges_and_says_what_came_of_it(folder, rung):
    done = run(folder, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert f"8 completions to judge on 2 worker(s), sandbox: {rung}." in done.stdout
    assert "8 completions of 2 problems: 6 failed, 2 passed" in done.stdout
    assert "0.2500" in done.stdout
    assert len(lines(folder / "out.jsonl")) == 8
    begin = (folder / "out.jsonl").read_bytes()
    again = run(folder)
    assert again.returncode == 0
    assert "to judge" not in again.stdout and "pass@1" in again.stdout
    assert (folder / "out.jsonl").read_bytes() == begin


def test_the_command_runs_nothing_unconfined_unless_told_twice(folder):
    refused = run(folder, "--sandbox", "none")
    assert refused.returncode == 2
    assert refused.stderr.startswith("archbench: --sandbox none: runs untrusted code with your rights")
    assert refused.stderr.count("\n") == 1
    assert not (folder / "out.jsonl").exists()
    accepted = run(folder, "--sandbox", "none", "--i-know-this-runs-untrusted-code")
    assert accepted.returncode == 0, accepted.stderr
    assert {result["sandbox"] for result in lines(folder / "out.jsonl")} == {"unsandboxed"}
    assert "sandbox: unsandboxed" in accepted.stdout


def test_the_command_names_what_is_wrong_in_one_line(folder):
    (folder / "samples.jsonl").write_text('{"task_id": 1}\n')
    done = run(folder)
    assert done.returncode == 2
    assert done.stderr == "archbench: samples.jsonl: line 1: 'completion' holds nothing; expected str\n"


def test_an_interrupted_command_keeps_what_is_judged(folder, rung):
    samples = [{"task_id": 1, "completion": RIGHT}] * 3 + [
        {"task_id": 1, "completion": "import time; time.sleep(99)"}
    ] * 3
    write(folder / "samples.jsonl", samples)
    words, options = command(folder, "--workers", "1")
    heed_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells start background jobs deaf to it
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts, **options
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        (folder / "out.jsonl").exists() and len(lines(folder / "out.jsonl")) == 3
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "archbench: interrupted; the same command goes on from here\n"
    assert [result["passed"] for result in lines(folder / "out.jsonl")] == [True] * 3
