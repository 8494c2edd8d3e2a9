"""The noise file: how much numbers differ when nothing has changed, measured once and kept beside the baseline.

Seeds bound what rounding can do to a trained model: on another processor a training takes another course, and ends no
further away than with another seed. Times of a version held against itself say which cells can be timed at all here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archbench.errors import RecordError
from archbench.gate.baseline import find_baseline
from archbench.gate.points import gated
from archbench.gate.quantities import rule_of
from archbench.record import Record

SEED_SDS = 3.0
SMALLEST_SHARE = 0.005
"""The margin of quality is the larger of this many standard deviations over seeds and this share of the baseline."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A quantity over `n` seeds."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True, kw_only=True)
class TimingNoise:
    """Of a version against itself: the standard error of the log-ratio after one gate's worth of restarts, and the
    smallest slowdown (a share) that is told from none four times of five."""

    error: float
    detectable: float


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What `archbench noise` measured. `quality` is keyed by `Point.key`, `timing` by cell and work; `timing` is of the
    machine it was measured on, whose class of processor is `cpu_class`."""

    suite: str
    seeds: int
    where: str = ""
    cpu_class: str | None = None
    command: str = ""
    repeated_exactly: bool | None = None
    quality: Mapping[str, Spread] = field(default_factory=dict)
    timing: Mapping[str, TimingNoise] = field(default_factory=dict)

    def margin(self, key: str, baseline: float) -> float:
        """What a quantity may be worse by, in its unit."""
        spread = self.quality.get(key)
        return max(SMALLEST_SHARE * abs(baseline), SEED_SDS * spread.sd if spread else 0.0)

    def demoted(self, margin: float, cpu_class: str | None) -> list[str]:
        """The timed cells whose noise hides a slowdown of `margin` (a share): they are watched and block nothing. What
        another class of processor is too noisy for says nothing about this one."""
        if cpu_class is None or cpu_class != self.cpu_class:
            return []
        return [name for name, noise in self.timing.items() if noise.detectable > margin]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def spoken(key: str) -> str:
    """A key of `Noise.quality` for people: `mamba/nano/bytes likelihood.bits_per_byte [context 64, state reset]`."""
    row, quantity, at = key.split(" ", 2)
    place = ", ".join(f"{name} {value}" for name, value in json.loads(at).items())
    return f"{row} {quantity} [{place}]" if place else f"{row} {quantity}"


UNKNOWN = Noise(suite="", seeds=0)
"""Where no noise was measured: margins are the share of the baseline alone."""


def load_noise(path: Path) -> Noise:
    """Raises RecordError when the file is none that `archbench noise` wrote."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        quality = {key: Spread(**spread) for key, spread in data.pop("quality").items()}
        timing = {key: TimingNoise(**noise) for key, noise in data.pop("timing").items()}
        return Noise(**data, quality=quality, timing=timing)
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; `archbench noise SUITE` writes it") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path}: not a noise file ({error}); `archbench noise SUITE` writes one") from None


def beside(baseline: Path) -> Path:
    """Where the noise of a baseline file lies: `smoke.noise.json` beside `smoke.jsonl`."""
    return baseline.with_name(f"{baseline.stem}.noise.json")


def spreads(records: Iterable[Record]) -> dict[str, Spread]:
    """The spread over seeds of every gated quantity of quality."""
    values: dict[str, list[float]] = {}
    for point, record in gated(records).items():
        rule = rule_of(record)
        if rule is not None and rule.tier == 1 and record.value is not None:
            values.setdefault(point.key, []).append(record.value)
    return {key: _spread(found) for key, found in values.items() if len(found) > 1}


def _spread(values: list[float]) -> Spread:
    mean = math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Spread(mean=mean, sd=sd, n=len(values))


def noise_for(records: Sequence[Record], path: Path, given: Path | None) -> Noise:
    """The noise file that was named; else the one beside a baseline file or, for its suite, among the baselines."""
    if given is not None:
        return load_noise(given)
    for place in (beside(path), beside(find_baseline(records[0].suite))):
        if place.is_file():
            return load_noise(place)
    return UNKNOWN
