"""One process a task, at most `n_workers` at a time. A process that dies takes only its own task with it.

On Linux, where a process that has imported torch may be forked, several tasks' come from a nursery; elsewhere, and for
a single task, each starts from nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from archbench.environment import usable_cores
from archbench.errors import ArchbenchError
from archbench.executors import Event, Handle, Task
from archbench.executors.nursery import Child, Nursery

GRACE_S = 5.0
"""How long an interrupted training may take to save what it reached."""


def run(tasks: Sequence[Task], handle: Handle, n_workers: int) -> None:
    """Runs every task in a process of its own; on an exception here (Ctrl-C too) all processes are ended.

    A process that ends without its "done" event yields a "died" event with the reason and the end of its log.

    Raises:
        ArchbenchError: the nursery has ended, and with it what would tell how workers end.
    """
    waiting = list(enumerate(tasks))[::-1]
    running: dict[int, _Process] = {}
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    with _nursery(tasks) as nursery:
        try:
            while waiting or running:
                while waiting and len(running) < n_workers:
                    index, task = waiting.pop()
                    running[index] = _Process(index, task, events, nursery)
                index, event = events.get()
                if event["event"] == "ended":
                    reason = running.pop(index).reason_of_death()
                    if reason:
                        handle(index, {"event": "died", "reason": reason})
                else:
                    handle(index, event)
        finally:
            for process in running.values():
                process.ask_to_end()
            for process in running.values():
                with contextlib.suppress(ArchbenchError):  # without a nursery nothing tells that it has ended
                    process.end()


_early: list[Nursery] = []


@contextlib.contextmanager
def started_early(threads: int) -> Iterator[None]:
    """Starts a nursery at once, for the runs inside whose workers have so many threads: it gets ready while they are
    planned. Nothing where there is no nursery, or no second core for it."""
    if sys.platform != "linux" or usable_cores() == 1:
        yield
        return
    nursery = Nursery(_environment(threads))
    _early.append(nursery)
    try:
        yield
    finally:
        _early.remove(nursery)
        nursery.close()


@contextlib.contextmanager
def _nursery(tasks: Sequence[Task]) -> Iterator[Nursery | None]:
    """One for tasks that have corpora and threads in common."""
    if len(tasks) < 2 or sys.platform != "linux":
        yield None
        return
    environment = _environment(tasks[0]["threads"])
    fitting = [nursery for nursery in _early if nursery.environment == environment]
    nursery = fitting[0] if fitting else Nursery(environment)
    try:
        nursery.read(tasks[0]["corpora"])
        yield nursery
    finally:
        if not fitting:
            nursery.close()


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _popen(task: Task, log: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "archbench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env=_environment(task["threads"]),
    )


class _Process:
    """A worker process and the thread that reads its events."""

    def __init__(self, index: int, task: Task, events: queue.Queue[tuple[int, Event]], nursery: Nursery | None) -> None:
        self.log = Path(task["log"])
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            self.process: subprocess.Popen[str] | Child = (
                nursery.start(log.fileno()) if nursery is not None else _popen(task, log)
            )
        self.done = False
        threading.Thread(target=self._read, args=(index, task, events), daemon=True).start()

    def _read(self, index: int, task: Task, events: queue.Queue[tuple[int, Event]]) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            # Its input stays open: the worker ends itself when it closes, that is, when this process is gone.
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                event = json.loads(line)
                self.done = self.done or event["event"] == "done"
                events.put((index, event))
        except (OSError, ValueError):
            pass  # the process is gone or garbled; reason_of_death says how
        events.put((index, {"event": "ended"}))

    def reason_of_death(self) -> str | None:
        """Why the process ended before it was done; None if it was done."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        code = self.process.wait()
        if self.done:
            return None
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"the process was ended by {name}{hint}; see {self.log}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the process ended with code {code}: {lines[-1] if lines else 'no message'}; see {self.log}"

    def ask_to_end(self) -> None:
        """A training saves what it reached; what else runs is cut short by `end`."""
        self.process.terminate()

    def end(self) -> None:
        try:
            self.process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
