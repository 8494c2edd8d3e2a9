"""The command line as a person uses it: help is quick, errors are one line and exit code 2, output says what is."""

import os
import resource
import subprocess
import sys

import pytest

from archbench import registry

RUN = [sys.executable, "-m", "archbench.cli"]


def archbench(*words, **more):
    return subprocess.run([*RUN, *map(str, words)], capture_output=True, text=True, timeout=120, **more)


def test_help_answers_at_once():
    archbench("--help")
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = archbench("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert done.returncode == 0
    for command in ("run", "plan", "list", "doctor", "check", "report", "generate", "import-hf", "data"):
        assert command in done.stdout
    # Half a second on an idle machine is the promise; processor time does not wait for other processes.
    assert min(times) < 0.5


def test_importing_archbench_loads_no_torch():
    code = "import sys, archbench, archbench.cli; print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_and_reporting_loads_no_torch():
    code = "import sys, archbench.record, archbench.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "quik"), "suite 'quik' is not known; did you mean 'quick'?"),
        (("run", "smoke", "--executor", "slurm"), "--executor slurm: not known"),
        (("run", "smoke", "--set", "training.contxt=3"), "training.contxt: unknown key; did you mean 'context'?"),
        (("run", "smoke", "--only", "mambo"), "--only mambo: no such cell"),
        (("plan", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("check", "transfomer"), "there is no architecture 'transfomer'; did you mean 'transformer'?"),
        (("check",), "name an architecture"),
        (("check", "mine.py"), "mine.py: no such file"),
        (("check", "transformer", "--set", "d_modle=64"), "--set.d_modle: unknown key; did you mean 'd_model'?"),
        (("check", "transformer", "--set", "d_model=65"), "n_heads: 2 does not divide d_model 65"),
        (("report", "nowhere"), "nowhere: no such file or folder"),
        (("generate", "nowhere", "--architecture", "mamba"), "nowhere: no such file or folder"),
        (("import-hf", "nowhere"), "nowhere"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, message, tmp_path):
    done = archbench(*words, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("archbench: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr + done.stdout


def test_lists_name_what_there_is():
    done = archbench("list", env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0
    for word in [
        *registry.architectures(),
        *registry.metrics(),
        "smoke",
        "quick",
        "stdlib",
        "pydocs",
        "books",
        "micro",
    ]:
        assert word in done.stdout


def test_plan_prints_costs_and_runs_nothing(tmp_path):
    done = archbench("plan", "smoke", cwd=tmp_path, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0
    for word in ("transformer", "nano, seed 0", "FLOP", "steps", "memory"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_prints_a_card():
    done = archbench("check", "transformer", env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stdout
    assert "holds" in done.stdout
    assert "broken" not in done.stdout
