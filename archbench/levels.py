"""At which level of the kernel ladder (see `ops/backends`) something is measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from archbench.errors import ConfigError, suggestion
from archbench.ops.backends import LEVELS, VARIABLE

BEST = "best"
"""In a suite: whatever is found without asking, which is the best there is unless the environment says otherwise."""


def check_level(level: str, where: str) -> None:
    """Raises ConfigError, which names the place, for a level that there is not."""
    if level not in (BEST, *LEVELS):
        raise ConfigError(f"{where}: {level}: no such level; {suggestion(level, (BEST, *LEVELS))}")


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
    """Inside, every operation runs at this level or is refused; "auto" takes the best there is, and BEST changes
    nothing."""
    if level == BEST:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
