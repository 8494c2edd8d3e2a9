"""The ladder of backends and the compiled library: what is picked, what is refused, what is cached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import archbench
from archbench.errors import BackendError
from archbench.ops import backends, native
from archbench.ops.scan import selective_scan

torch.set_num_threads(1)

CPU, META = torch.device("cpu"), torch.device("meta")
COMPILER = next((path for path in map(shutil.which, native.COMPILERS) if path), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

CHILD = """
import torch
from archbench.ops import backends, scan
x = torch.ones(1, 3, 5)
print(backends.available("selective_scan")["native"])
print(scan.selective_scan(x, x, -torch.ones(5, 2), x[..., :2], x[..., :2], backend="native")[0].sum().item())
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("ARCHBENCH_CC", str(tmp_path / "absent"))
    return str(tmp_path / "absent")


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A compiler that writes a line each time it is started, and an empty cache. Returns (log, cache folder)."""
    log, script = tmp_path / "log", tmp_path / "counting-cc"
    script.write_text(f'#!/bin/sh\necho started >> "{log}"\nexec "{COMPILER}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("ARCHBENCH_CC", str(script))
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path / "cache"))
    return log, tmp_path / "cache" / "native"


def child():
    """What a new process says about the native level and computes with it."""
    root = str(Path(archbench.__path__[0]).parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return outcome.stdout.split()


def small(dtype=torch.float32, device=CPU):
    x = torch.ones(1, 3, 5, dtype=dtype, device=device)
    return x, x, -torch.ones(5, 2, dtype=dtype, device=device), x[..., :2], x[..., :2]


# ---- the cache ----


@needs_compiler
def test_12_27_a_second_process_starts_no_compiler_and_a_corrupt_file_is_rebuilt(counted, monkeypatch):
    log, folder = counted
    assert native.reason() == "ok"
    (library,) = folder.iterdir()
    assert log.read_text().count("started") == 1
    before = (library.stat().st_mtime_ns, folder.stat().st_mtime_ns)

    first = child()
    assert first[0] == "ok"
    assert log.read_text().count("started") == 1
    assert (library.stat().st_mtime_ns, folder.stat().st_mtime_ns) == before  # nothing was written

    broken = folder.parent / "broken"
    broken.write_bytes(library.read_bytes()[:5000])
    broken.replace(library)
    monkeypatch.setenv("ARCHBENCH_CACHE", f"{folder.parent}/.")  # the same folder, not yet asked in this process
    assert native.reason() == "ok"
    assert log.read_text().count("started") == 2
    assert [file.suffix for file in folder.iterdir()] == [".so"]
    assert selective_scan(*small(), backend="native")[0].sum().item() == float(first[1])


@needs_compiler
def test_another_compiler_command_is_another_library(counted, monkeypatch):
    _, folder = counted
    assert native.reason() == "ok"
    monkeypatch.setenv("ARCHBENCH_CC", f"{os.environ['ARCHBENCH_CC']} -DANOTHER=1")
    assert native.reason() == "ok"
    assert len(list(folder.iterdir())) == 2


def test_a_compiler_that_fails_gives_its_message_and_leaves_nothing(tmp_path, monkeypatch):
    script = tmp_path / "bad-cc"
    script.write_text('#!/bin/sh\necho "scan.c:1: error: this processor is too old" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("ARCHBENCH_CC", str(script))
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path / "cache"))
    assert "this processor is too old" in native.reason()
    assert list((tmp_path / "cache" / "native").iterdir()) == []
    with pytest.raises(BackendError, match="too old"):
        native.library()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path / "file"))
    assert "ARCHBENCH_CACHE" in native.reason()


def test_every_source_ships_with_the_package():
    assert {file.name for file in native.SOURCES.iterdir()} == {*native.INCLUDED, *native.UNITS}


# ---- the ladder ----


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv"])
def test_12_21_every_level_is_there_or_says_why(op):
    found = backends.available(op)
    assert list(found) == list(backends.LEVELS)
    assert found["reference"] == found["lean"] == "ok"
    assert all(reason for reason in found.values())
    if not torch.cuda.is_available():
        assert found["cuda"] == "no CUDA device"


def test_12_27_without_a_compiler_lean_runs_and_says_so_once(no_compiler):
    assert "no C compiler" in backends.available("selective_scan")["native"]
    with pytest.warns(backends.BackendWarning, match="no C compiler") as told:
        y, _ = selective_scan(*small())
    assert len(told) == 1
    backends.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = selective_scan(*small())
        assert backends.pick("causal_conv", CPU, torch.float32) == "lean"
    assert backends.in_use() == {"selective_scan": "lean"}
    assert torch.equal(y, again)
    torch.testing.assert_close(y, selective_scan(*small(), backend="reference")[0])


def test_12_21_a_level_asked_for_is_used_or_refused(no_compiler):
    with pytest.raises(BackendError, match="no C compiler"):
        selective_scan(*small(), backend="native")
    with pytest.raises(BackendError, match="cuda tensors, got cpu"):
        selective_scan(*small(), backend="cuda")


def test_fp64_is_refused_by_native_and_lean_by_choice():
    with pytest.raises(BackendError, match="float64"):
        selective_scan(*small(torch.float64), backend="native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.pick("selective_scan", CPU, torch.float64) == "lean"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_native_on_cpu(dtype):
    assert backends.pick("selective_scan", CPU, dtype) == "native"


def test_the_environment_chooses_and_an_argument_overrides_it(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert backends.pick("selective_scan", CPU, torch.float32) == "reference"
    assert backends.pick("selective_scan", CPU, torch.float32, "lean") == "lean"
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    with pytest.raises(BackendError, match="ARCHBENCH_BACKEND=cuda"):
        selective_scan(*small())
    monkeypatch.setenv(backends.VARIABLE, "natve")
    with pytest.raises(BackendError, match="did you mean 'native'"):
        selective_scan(*small())


def test_unknown_names_are_refused():
    with pytest.raises(BackendError, match="did you mean 'lean'"):
        backends.pick("selective_scan", CPU, torch.float32, "leen")
    with pytest.raises(BackendError, match="selective_scan"):
        backends.available("selective_scna")


def test_what_ran_is_remembered():
    backends.forget()
    assert backends.in_use() == {}
    selective_scan(*small(), backend="lean")
    selective_scan(*small(device=META))
    assert backends.in_use() == {"selective_scan": "lean"}
    selective_scan(*small(), backend="reference")
    assert backends.in_use() == {"selective_scan": "reference+lean"}
    backends.forget()
