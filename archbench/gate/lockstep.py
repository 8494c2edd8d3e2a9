"""Two versions of the code alive at once, taking steps in turn: they share the machine's weather.

Whatever slows the machine down touches neighbouring steps alike, so the logarithm of their ratio is free of it. Which
version goes first alternates. A pair of processes is one restart: memory layout differs from start to start, and what
it does to a process's speed stays with that process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from archbench.errors import GateError

START_S, ANSWER_S = 120.0, 120.0
"""How long a process may take to import, and to answer."""
STEP_S = 0.01
"""A step is the work repeated until it takes this much CPU time: shorter ones are lost in what surrounds them."""
MOST_REPEATS = 1000
WARM_UP = 2
STEPPER = Path(__file__).with_name("stepper.py")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A work to be timed: see `stepper`. `name` is for people: `mamba/nano decode`."""

    name: str
    architecture: str
    config: dict[str, Any]
    work: str
    context: int
    batch: int
    new_tokens: int = 16

    def to_data(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        del data["name"]
        return data


class Took(NamedTuple):
    """Seconds of a step."""

    cpu: float
    wall: float


class Side(ABC):
    """One version, ready to take steps."""

    @abstractmethod
    def prepare(self, item: Item) -> list[str]:
        """Returns the options of the item's config that this version does not know."""

    @abstractmethod
    def step(self, item: Item, repeat: int) -> Took: ...

    @abstractmethod
    def forget(self, item: Item) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class Ratios(NamedTuple):
    """ln(current / baseline) of each pair of one restart."""

    cpu: list[float]
    wall: list[float]


def alternate(baseline: Side, current: Side, item: Item, n_pairs: int) -> Ratios:
    """Times `item`, prepared on both sides, in pairs of steps, after warming both up. Raises GateError when a side
    cannot do it."""
    sides = (baseline, current)
    took = [side.step(item, 1) for _ in range(WARM_UP) for side in sides]
    repeat = min(MOST_REPEATS, max(1, math.ceil(STEP_S / max(min(one.cpu for one in took), 1e-6))))
    cpu, wall = [], []
    for number in range(n_pairs):
        if number % 2:
            now, before = current.step(item, repeat), baseline.step(item, repeat)
        else:
            before, now = baseline.step(item, repeat), current.step(item, repeat)
        cpu.append(math.log(now.cpu / before.cpu))
        wall.append(math.log(now.wall / before.wall))
    return Ratios(cpu, wall)


class Version(Side):
    """A process that steps with the archbench of a folder.

    Raises:
        GateError: it does not start, takes too long, or imports archbench from elsewhere than it should.
    """

    def __init__(self, root: Path, name: str, threads: int = 1) -> None:
        self.root, self.name = root, name
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")])),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "MALLOC_ARENA_MAX": "1",
        }
        self.process = subprocess.Popen(
            # As text, not as a file: the file's folder would be searched for modules first.
            [sys.executable, "-c", STEPPER.read_text(encoding="utf-8")],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def meet(self) -> None:
        """Waits until it has imported everything, and checks where from."""
        hello = self._answer(START_S)
        own = self.root / "archbench"
        if (own / "__init__.py").is_file() and Path(hello["package"]).resolve() != own.resolve():
            raise GateError(
                f"{self.name}: archbench was imported from {hello['package']} and not from {own}; "
                "unset what puts it first on Python's path"
            )

    def prepare(self, item: Item) -> list[str]:
        return list(self._ask({"prepare": item.name, "item": item.to_data()})["dropped"])

    def step(self, item: Item, repeat: int) -> Took:
        answer = self._ask({"step": item.name, "repeat": repeat})
        return Took(max(answer["cpu"], 1e-9), max(answer["wall"], 1e-9))

    def forget(self, item: Item) -> None:
        self._ask({"forget": item.name})

    def close(self) -> None:
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise GateError(f"{self.name}: its process has ended") from None
        return self._answer(ANSWER_S)

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise GateError(f"{self.name}: no answer within {seconds:g} s") from None
        if not line:
            raise GateError(f"{self.name}: its process ended; does `import archbench` work in {self.root}?")
        answer = json.loads(line)
        if "error" in answer:
            raise GateError(f"{self.name}: {answer['error']}")
        return answer

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self.process.stdout:
                self._lines.put(line)
        self._lines.put("")


def start(roots: Sequence[Path], names: Sequence[str], threads: int = 1) -> list[Version]:
    """Processes for both versions, started together; all are closed again if one does not come up."""
    versions = [Version(root, name, threads) for root, name in zip(roots, names, strict=True)]
    try:
        for version in versions:
            version.meet()
    except BaseException:
        for version in versions:
            version.close()
        raise
    return versions
