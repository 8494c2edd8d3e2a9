"""At which level of the kernel ladder (see `ops/backends`) something is measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from archbench.ops.backends import VARIABLE


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
    """Inside, every operation runs at this level or is refused; "auto" takes the best there is."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
