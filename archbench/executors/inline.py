"""One task after another in this process: for debugging, and where processes cannot be started."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from archbench.executors import Handle, Task
from archbench.worker import work


def run(tasks: Sequence[Task], handle: Handle, n_workers: int) -> None:
    """Does the tasks in order; `n_workers` is ignored."""
    del n_workers
    for index, task in enumerate(tasks):
        work(task, partial(handle, index))
