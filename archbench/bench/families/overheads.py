"""What archbench itself costs around the models: the command line's start, and a report on many records."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import archbench
from archbench import record
from archbench.bench.target import Target
from archbench.bench.trial import Reading, Trial
from archbench.data.mbpp_mini import problems
from archbench.environment import usable_cores
from archbench.errors import UnsupportedError
from archbench.sandbox import open_sandbox

N_RECORDS = 10_000


def _seconds_of(command: list[str]) -> float:
    """Wall seconds of a command that must succeed. It sees this package, wherever the tests run from."""
    root = str(Path(archbench.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path})
    return time.perf_counter() - begin


def _help() -> Trial:
    return Reading(take=partial(_seconds_of, [sys.executable, "-m", "archbench.cli", "--help"]))


def _report() -> Trial:
    """The report of a run of 10,000 records: those of the committed quick run under ever new seeds."""
    source = Path(archbench.__file__).parents[1] / "results" / "quick"
    if not source.is_dir():
        raise UnsupportedError(f"{source}: the committed run is not here; bench from a checkout of the repository")
    folder = tempfile.TemporaryDirectory(prefix="archbench-bench-")
    many = Path(folder.name) / "many.jsonl"
    enlarge(record.read(source), N_RECORDS, many)
    command = [sys.executable, "-m", "archbench.cli", "report", str(many), "--out", str(Path(folder.name) / "report")]
    return Reading(take=_keeping(folder, command), notes={"records": f"{N_RECORDS:,}"})


def _keeping(folder: tempfile.TemporaryDirectory[str], command: list[str]) -> Callable[[], float]:
    def take() -> float:
        assert Path(folder.name).is_dir()
        return _seconds_of(command)

    return take


SUITE = """
description: Two cells, and nothing to do but train them
corpus: stdlib
codec: bytes
size: micro
training: {budget: {bytes: 3_000_000}, context: 256, batch: 4, learning_rate: 4e-3}
cells: [{architecture: transformer}, {architecture: mamba}]
metrics: {training: {}}
"""


def _suite() -> Trial:
    """Share of a run's wall time in which no model was trained: processes, text, checkpoints, records, the report."""
    folder = tempfile.TemporaryDirectory(prefix="archbench-bench-")
    suite = Path(folder.name) / "two_cells.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    notes: dict[str, str] = {}

    def take() -> float:
        with tempfile.TemporaryDirectory(dir=folder.name) as out:
            command = [sys.executable, "-m", "archbench.cli", "run", str(suite), "--out", out, "--workers", "1"]
            wall = _seconds_of(command)
            trained = sum(
                found.value or 0.0 for found in record.read(record.newest(Path(out))) if found.quantity == "seconds"
            )
        notes["seconds"] = f"{wall:.0f}, of which training {trained:.0f}"
        return (wall - trained) / wall

    return Reading(take=take, notes=notes)


def _judging() -> Trial:
    """Programs judged a second: reference solutions of mbpp-mini, each in a sandboxed process of its own."""
    asked = problems("test")
    sandbox = open_sandbox()

    def take() -> float:
        begin = time.perf_counter()
        passed = sum(verdict.passed for verdict in sandbox.verdicts([(p.code, p) for p in asked], usable_cores()))
        assert passed == len(asked), "every reference solution is right"
        return len(asked) / (time.perf_counter() - begin)

    return Reading(take=take, notes={"sandbox": sandbox.rung, "workers": str(usable_cores())})


def enlarge(records: list[record.Record], n: int, path: Path) -> None:
    """Writes n records: `records` again and again, each time with the next seed."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(n):
            copy, original = divmod(number, len(records))
            found = records[original]
            cell, job = f"{found.cell}{copy}", f"{found.job}{copy}"
            file.write(dataclasses.replace(found, seed=found.seed + copy, cell=cell, job=job).to_json() + "\n")


TARGETS = [
    Target(
        id="overheads/help",
        question="How long does `archbench --help` take?",
        ours="archbench --help",
        peer="a person's patience",
        unit="s",
        must=0.5,
        better="lower",
        turns=7,
        seconds=5,
        prepare=_help,
    ),
    Target(
        id="overheads/code-eval",
        question="How many programs a second are judged in the sandbox?",
        ours="archbench code-eval",
        peer="a thousand in a minute",
        unit="tasks/s",
        must=15,
        turns=6,
        seconds=30,
        prepare=_judging,
    ),
    Target(
        id="overheads/suite",
        question="Which share of a suite's time is not spent on its models?",
        ours="archbench run",
        peer="training two small cells",
        unit="of the time",
        must=0.05,
        better="lower",
        turns=1,
        seconds=150,
        why_missed="starting, planning and reporting take some seconds however long training lasts",
        prepare=_suite,
    ),
    Target(
        id="overheads/report",
        question="How long does a report on 10,000 records take?",
        ours="archbench report",
        peer="a person's patience",
        unit="s",
        must=10,
        better="lower",
        turns=6,
        seconds=40,
        prepare=_report,
    ),
]
