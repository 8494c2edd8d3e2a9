"""Tasks on a Ray cluster, or on this machine when there is none. Needs the extra `ray`.

The cluster is the one RAY_ADDRESS names. Its nodes must see the run's folder under the same path and have archbench
installed: results and checkpoints travel through files, only events through Ray. A task whose node is lost is tried
again elsewhere and goes on from its last partial checkpoint. Each task takes as many CPUs as it has threads, and one
GPU where its device is CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from archbench.errors import MissingExtra
from archbench.executors import Event, Handle, Task

RETRIES = 3
"""How often a task is tried again after its node or worker process was lost."""

POLL_S = 0.2


def run(tasks: Sequence[Task], handle: Handle, n_workers: int) -> None:
    """Runs every task as a Ray task, at most `n_workers` at a time on a machine of its own (a cluster decides for
    itself). A task that cannot be finished yields a "died" event with the reason.

    Raises:
        MissingExtra: Ray is not installed.
    """
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    mine = not ray.is_initialized()
    if mine:
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_workers, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **local)
    try:
        _run(ray, tasks, handle)
    finally:
        if mine:
            ray.shutdown()


def _run(ray: Any, tasks: Sequence[Task], handle: Handle) -> None:
    from ray.util.queue import Empty, Queue

    events = Queue()
    running = {}
    for index, task in enumerate(tasks):
        resources: dict[str, Any] = {"num_cpus": task["threads"], "max_retries": RETRIES}
        if task["device"].startswith("cuda"):
            resources["num_gpus"] = 1
        remote = ray.remote(**resources)(_work)
        running[remote.remote(index, task, events)] = index

    def drain() -> None:
        while True:
            try:
                handle(*events.get_nowait())
            except Empty:
                return

    while running:
        finished, _ = ray.wait(list(running), timeout=POLL_S)
        drain()
        for reference in finished:
            index = running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:  # Ray wraps whatever ended the task
                first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
                handle(index, {"event": "died", "reason": f"Ray gave up on the task: {first_line}"})
    drain()


def _work(index: int, task: Task, events: Any) -> None:
    """The task, on some node."""
    from archbench.worker import work

    def emit(event: Event) -> None:
        events.put((index, event))

    work(task, emit)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtra("--executor ray: Ray is not installed; pip install 'archbench[ray]'") from None
    return ray
