"""The two clocks that times are taken by, and nothing collected meanwhile."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
TICK = max(time.get_clock_info(clock).resolution for clock in ("perf_counter", "process_time"))
"""Seconds; nothing is measured to take less."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside; on again afterwards if it was on before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
