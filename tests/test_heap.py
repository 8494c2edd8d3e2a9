"""Memory that stays with the process while it trains."""

import ctypes
import gc
import resource
import sys

import pytest
import torch

from archbench.heap import kept


def faults_of(n: int) -> int:
    """Fresh pages mapped while a block of 8 MB is asked for, filled and freed n times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(2 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_blocks_are_used_again_without_fresh_pages() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")
    with kept():
        faults_of(3)
        inside = faults_of(50)
    pages = 50 * (8 << 20) // resource.getpagesize()
    assert inside < pages / 20


def test_what_exists_is_left_out_of_collection_until_it_ends() -> None:
    held = [[] for _ in range(100)]
    with kept():
        assert gc.get_freeze_count() > len(held)
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1  # what was made inside still is
    assert gc.get_freeze_count() == 0


def test_an_exception_inside_ends_it_too() -> None:
    with pytest.raises(KeyError), kept():
        raise KeyError
    assert gc.get_freeze_count() == 0
