"""Memory that stays with the process while it trains.

A training step frees and asks for the same blocks over and over. Left to itself, glibc hands large ones back to the
kernel and gets them again as fresh pages, each to be cleared and mapped anew: thousands a step, 3 to 12 % of its time
at the sizes of a laptop. Inside `kept` they stay on the heap; elsewhere than with glibc they do as they did.

Python's collector walks all that was ever imported whenever it looks at its oldest objects, another tenth of a small
model's step. Inside, it looks only at what was made there.

Values do not change. Source: mallopt(3), Python's documentation of `gc.freeze`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator, Mapping

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
"""Options of mallopt(3)."""
KEPT = {TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 16 << 20, MMAP_MAX: 0}
"""Nothing is handed back, nothing lies outside the heap, and that grows by so much at once."""
AFTER = {TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65_536}
"""What glibc comes to by itself once blocks of 32 MB were freed. Having been told anything, it no longer adapts."""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside, freed memory stays with the process, and what exists is left out of garbage collection. Do not nest."""
    gc.collect()
    gc.freeze()
    try:
        _set(KEPT)
        yield
    finally:
        _set(AFTER)
        gc.unfreeze()


def _set(options: Mapping[int, int]) -> None:
    try:
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)
        if options is AFTER:
            libc.malloc_trim(0)
    except (AttributeError, TypeError, OSError):
        return  # another C library
