"""Runs end to end: every job ends in a record, nothing is done twice, and a kill at any moment loses nothing."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from archbench.errors import ArchbenchError, MissingExtra
from archbench.executors.nursery import Nursery
from archbench.plan import make_plan
from archbench.record import load, newest, read
from archbench.run import Options, run
from archbench.suite import load_suite

SUITE = """
description: for tests
size: nano
training:
  budget: {bytes: 24_000}
  context: 32
  batch: 8
  learning_rate: 4e-3
  precision: fp32
cells:
  - architecture: transformer
  - {architecture: ngram, label: bigram, model: {order: 2}}
metrics:
  training: {}
  likelihood: {max_bytes: 4096, max_document_bytes: 1024}
"""
STABLE = ("bits_per_byte", "perplexity", "loss", "steps", "flops")


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(textwrap.dedent(SUITE))
    return path


def go(suite, out, settings=(), only=(), **options):
    events = []
    plan = make_plan(load_suite(str(suite), settings), only)
    outcome = run(plan, Options(out=out, **{"executor": "inline"} | options), events.append)
    return outcome, events


def numbers(path):
    return {
        (r.label, r.quantity, json.dumps(r.at, sort_keys=True)): (r.value, tuple(r.samples))
        for r in read(path)
        if r.quantity in STABLE
    }


def test_every_job_ends_in_records_with_provenance(suite, tmp_path):
    outcome, events = go(suite, tmp_path / "out")
    assert outcome.statuses == {"ok": 4}
    assert outcome.trained == 2
    assert {event["event"] for event in events} >= {"progress", "trained", "measured", "done"}
    for record in read(outcome.path):
        assert record.status == "ok"
        assert record.suite == "tiny"
        assert record.unit
        assert record.config["model"]["vocab_size"] == 256
        assert record.config["training"]["budget"]["bytes"] == 24_000
        assert len(record.data_sha256) == 64
        assert len(record.source_sha256) == 64
        assert record.environment["threads"] == 1
        assert record.environment["packages"]["torch"]
    frame = load(tmp_path / "out")
    assert set(frame["label"]) == {"transformer", "bigram"}
    assert frame["at.state"].notna().any()


def test_a_second_run_trains_and_measures_nothing(suite, tmp_path):
    first, _ = go(suite, tmp_path / "out")
    again, events = go(suite, tmp_path / "out")
    assert again.path == first.path
    assert again.carried == 4
    assert again.trained == 0
    assert events == []


def test_records_from_elsewhere_answer_nothing(suite, tmp_path):
    """As those that a fresh clone of a repository holds."""
    there, _ = go(suite, tmp_path / "there")
    (tmp_path / "here").mkdir()
    committed = tmp_path / "here" / there.path.name.replace("20", "19", 1)
    shutil.copy(there.path, committed)
    whole = committed.read_text()
    here, _ = go(suite, tmp_path / "here")
    assert (here.trained, here.carried, here.statuses) == (2, 0, {"ok": 4})
    assert here.path != committed and committed.read_text() == whole and newest(tmp_path / "here") == here.path
    again, _ = go(suite, tmp_path / "here")
    assert (again.path, again.carried) == (here.path, 4)


def test_a_new_metric_reuses_the_checkpoints(suite, tmp_path):
    first, _ = go(suite, tmp_path / "out")
    more, _ = go(suite, tmp_path / "out", ["metrics.brier_lm.positions=16"])
    assert more.path != first.path
    assert more.trained == 0
    assert more.statuses["ok"] == 6
    assert more.carried == 4
    assert {r.metric for r in read(more.path)} == {"training", "likelihood", "brier_lm"}
    assert newest(tmp_path / "out") == more.path


def test_processes_and_inline_give_the_same_records(suite, tmp_path):
    inline, _ = go(suite, tmp_path / "inline")
    processes, _ = go(suite, tmp_path / "processes", executor="processes")
    assert numbers(inline.path) == numbers(processes.path)


def test_a_failing_cell_leaves_its_reason_and_the_others_alone(suite, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import dataclasses\n"
        "from archbench.architectures import transformer\n"
        "class Broken(transformer.Transformer):\n"
        "    def next_token_loss(self, batch):\n"
        "        raise RuntimeError('it broke\\nin two lines')\n"
        "ARCHITECTURE = dataclasses.replace(transformer.ARCHITECTURE, build=Broken)\n"
    )
    outcome, _ = go(suite, tmp_path / "out", [f"cells.0.architecture={broken}"])
    assert outcome.statuses == {"failed": 2, "ok": 2}
    failures = [record for record in read(outcome.path) if record.status == "failed"]
    assert {record.label for record in failures} == {"broken"}
    assert all(record.reason == "RuntimeError at broken.py:5: it broke" for record in failures)


def test_a_worker_that_dies_is_a_failure_with_its_signal(suite, tmp_path):
    deadly = tmp_path / "deadly.py"
    deadly.write_text(
        "import dataclasses, os, signal\n"
        "from archbench.architectures import transformer\n"
        "class Deadly(transformer.Transformer):\n"
        "    def next_token_loss(self, batch):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "ARCHITECTURE = dataclasses.replace(transformer.ARCHITECTURE, build=Deadly)\n"
    )
    outcome, _ = go(suite, tmp_path / "out", [f"cells.0.architecture={deadly}"], executor="processes")
    assert outcome.statuses == {"failed": 2, "ok": 2}
    assert "SIGKILL" in next(record.reason for record in read(outcome.path) if record.status == "failed")


def test_a_mended_failure_replaces_the_failure(suite, tmp_path):
    flag = tmp_path / "mended"
    shaky = tmp_path / "shaky.py"
    shaky.write_text(
        "import dataclasses, pathlib\n"
        "from archbench.architectures import transformer\n"
        "class Shaky(transformer.Transformer):\n"
        "    def next_token_loss(self, batch):\n"
        f"        assert pathlib.Path({str(flag)!r}).exists(), 'not yet'\n"
        "        return super().next_token_loss(batch)\n"
        "ARCHITECTURE = dataclasses.replace(transformer.ARCHITECTURE, build=Shaky)\n"
    )
    failed, _ = go(suite, tmp_path / "out", [f"cells.0.architecture={shaky}"])
    assert failed.statuses["failed"] == 2
    flag.touch()
    mended, _ = go(suite, tmp_path / "out", [f"cells.0.architecture={shaky}"])
    assert mended.path == failed.path
    assert mended.statuses == {"ok": 4}
    assert all(record.status == "ok" for record in read(mended.path))


def test_a_record_cut_short_by_a_kill_is_measured_again(suite, tmp_path):
    outcome, _ = go(suite, tmp_path / "out")
    whole = numbers(outcome.path)
    text = outcome.path.read_text()
    lines = text.splitlines(keepends=True)
    last_job = json.loads(lines[-1])["job"]
    keep = [line for line in lines if json.loads(line)["job"] != last_job]
    outcome.path.write_text("".join(keep) + lines[-1][:40])
    again, _ = go(suite, tmp_path / "out")
    assert again.carried == 3
    assert numbers(again.path) == whole


def test_a_run_killed_at_any_moment_ends_with_the_same_records(suite, tmp_path):
    settings = ["training.budget.bytes=120_000"]
    command = [
        sys.executable, "-m", "archbench.cli", "run", str(suite), "--no-report",
        "--save-every", "0", "--set", settings[0],
    ]  # fmt: skip
    whole, _ = go(suite, tmp_path / "whole", settings)
    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    (cell,) = (
        cell for cell in make_plan(load_suite(str(suite), settings)).trained_cells if cell.label == "transformer"
    )
    checkpoint = out / "checkpoints" / cell.address

    def saved():
        """When the cell that takes longest was last saved under way; None before and after its training."""
        with contextlib.suppress(FileNotFoundError):
            return (checkpoint / "partial.safetensors").stat().st_mtime_ns

    # The first kill falls into its training, the second after that, resumed, has moved on.
    for _ in range(2):
        before = saved()
        process = subprocess.Popen([*command, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while saved() in (None, before) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--out", str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert numbers(newest(out)) == numbers(whole.path)
    assert json.loads((checkpoint / "history.json").read_text())["sessions"] == 3


def test_workers_end_with_their_parent(suite, tmp_path):
    """No orphan goes on writing into the run's folder after a kill -9."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "archbench.cli", "run", str(suite), "--no-report"]
    slow = ["--set", "training.budget.bytes=5e7", "--save-every", "0", "--out", str(out)]
    process = subprocess.Popen([*command, *slow], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/*/partial.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(1.0)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*/partial.safetensors")}
    time.sleep(1.0)
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_run_whose_nursery_dies_ends_with_one_line_and_goes_on_later(suite, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "archbench.cli", "run", str(suite), "--no-report", "--out", str(out)]
    command += ["--set", "training.budget.bytes=3e5", "--save-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/*/partial.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (nursery,) = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(nursery, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "the process that starts workers" in said and "Traceback" not in said
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_nursery_tells_how_its_children_ended_and_that_it_is_gone_itself(tmp_path):
    log = (tmp_path / "worker.log").open("w")
    nursery = Nursery({**os.environ, "OMP_NUM_THREADS": "1"})
    nursery.read([f"no such corpus, with a long name, number {number}" for number in range(200)])
    garbled, waiting, killed = children = [nursery.start(log.fileno()) for _ in range(3)]
    garbled.stdin.write("no task\n")
    garbled.stdin.close()
    assert garbled.wait(30) == 1 and "JSONDecodeError" in (tmp_path / "worker.log").read_text()
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.05)
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    waiting.stdin.close()
    assert waiting.wait(30) == 1
    nursery._process.kill()
    with pytest.raises(ArchbenchError, match="the process that starts workers ended with code -9: "):
        nursery.start(log.fileno())
    nursery.close()
    for file in (log, *(end for child in children for end in (child.stdin, child.stdout))):
        file.close()


def test_ray_without_the_extra_says_how_to_get_it(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'archbench\[ray\]'"):
        go(suite, tmp_path / "out", executor="ray")


@pytest.mark.slow
def test_ray_gives_the_same_records(suite, tmp_path):
    """In a process of its own, since Ray leaves warnings and threads behind."""
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    command = [sys.executable, "-m", "archbench.cli", "run", str(suite), "--no-report", "--executor", "ray"]
    done = subprocess.run([*command, "--out", str(tmp_path / "ray")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    inline, _ = go(suite, tmp_path / "inline")
    assert numbers(newest(tmp_path / "ray")) == numbers(inline.path)


def heed_interrupts():
    """A shell starts background jobs deaf to SIGINT, and children inherit that: these tests must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_saves_what_training_reached(suite, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "archbench.cli", "run", str(suite), "--no-report", "--only", "transformer"]
    long = ["--set", "training.budget.bytes=5e7", "--save-every", "3600", "--out", str(out)]
    process = subprocess.Popen(
        [*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("logs/*.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(6)  # the worker starts, then trains
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "archbench: interrupted; the same command goes on from here\n"
    assert list(out.glob("checkpoints/*/partial.safetensors"))
