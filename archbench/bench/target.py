"""A target: who is compared with whom, in what, and how good it must be."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from archbench.bench import families
from archbench.bench.table import reached
from archbench.bench.trial import Trial
from archbench.errors import ConfigError, suggestion


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure that is held against what it should be.

    Attributes:
        id: "family/what".
        question: one line for people.
        ours, peer: the two sides, in words. The figure is the peer's seconds over ours unless `unit` says otherwise.
        level: our rung of the kernel ladder ("lean", "native"), "" where it has none.
        unit: "x" for a ratio of times; else what the figure is.
        must, stretch: the figure to be reached, and the one to go for; None where there is only the first.
        better: which way is good.
        why_missed: what is known of the cause where the target was missed; shown only then.
        turns: samples to take.
        seconds: about how long it takes on two cores, for the estimate.
        prepare: makes ready what is measured. Raises MissingExtra or UnsupportedError where it cannot be done here;
            the message is the reason shown.
    """

    id: str
    question: str
    ours: str
    peer: str
    level: str = ""
    unit: str = "x"
    must: float
    stretch: float | None = None
    better: Literal["higher", "lower"] = "higher"
    why_missed: str = ""
    turns: int = 11
    seconds: float = 10.0
    prepare: Callable[[], Trial]

    def met(self, value: float) -> bool:
        return reached(value, self.must, self.better)


@cache
def targets() -> dict[str, Target]:
    """All targets by id, families in alphabetical order."""
    found: dict[str, Target] = {}
    for module in sorted(pkgutil.iter_modules(families.__path__), key=lambda module: module.name):
        for target in importlib.import_module(f"{families.__name__}.{module.name}").TARGETS:
            assert target.id not in found, f"two targets are called {target.id}"
            found[target.id] = target
    return found


def chosen(names: Sequence[str]) -> list[Target]:
    """The targets of these ids, or of the families of these names; all when none is named.

    Raises:
        ConfigError: no target or family has that name.
    """
    known = targets()
    if not names:
        return list(known.values())
    picked: dict[str, Target] = {}
    for name in names:
        matching = {key: target for key, target in known.items() if name in (key, key.partition("/")[0])}
        if not matching:
            families_ = {key.partition("/")[0] for key in known}
            raise ConfigError(f"bench: {name}: no such target or family; {suggestion(name, [*families_, *known])}")
        picked |= matching
    return list(picked.values())
