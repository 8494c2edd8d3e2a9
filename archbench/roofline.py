"""What this machine can do at best, measured here and now: the two numbers that speeds are held against.

A share of a data sheet's peak says little about a process that was given one thread of a shared machine, so both peaks
are measured in the process, with the threads and in the precision of the work they are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ENOUGH_SECONDS = 0.5
"""No new repeat begins after this time, so that a precision the processor only emulates does not hold up a run."""


def matmul_peak(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """FLOP/s of the best of `repeats` square matrix products with the current number of threads.

    1024 x 1024 on a CPU; 8192 x 8192 on an accelerator, which a smaller product would not fill.
    """
    n = 1024 if torch.device(device).type == "cpu" else 8192
    left = torch.ones(n, n, dtype=dtype, device=device)
    right, out = torch.ones_like(left), torch.empty_like(left)
    return 2 * n**3 / _best_seconds(lambda: torch.mm(left, right, out=out), left.device, repeats)


def copy_bandwidth(device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """Bytes per second of the best of `repeats` copies of 128 MB (beyond the caches); read and written bytes count."""
    n_bytes = 2**27
    source = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _best_seconds(lambda: target.copy_(source), source.device, repeats)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Shortest wall time of `work`, which is also run once before, untimed."""
    best = float("inf")
    with torch.no_grad():
        work()
        synchronize(device)
        begin_all = time.perf_counter()
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            synchronize(device)
            end = time.perf_counter()
            best = min(best, end - begin)
            if end - begin_all > ENOUGH_SECONDS:
                break
    return best
