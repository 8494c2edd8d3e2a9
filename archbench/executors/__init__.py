"""Where tasks run: in this process, or in processes of their own. One file an executor.

An executor is a function `(tasks, handle, n_workers) -> None` that does every task once and calls `handle(index,
event)` with each event a task emits, in the caller's thread. Tasks and events are plain data (see `archbench.worker`),
so a task may run anywhere that sees the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Task = dict[str, Any]
Event = dict[str, Any]
Handle = Callable[[int, Event], None]
Executor = Callable[[Sequence[Task], Handle, int], None]
