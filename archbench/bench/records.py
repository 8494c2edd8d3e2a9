"""Targets as records, so that a bench run is kept, compared and exported like any other.

One record is the figure by each clock ("cpu" decides), and one each the seconds per unit of work of both sides.
"""

from __future__ import annotations

import hashlib
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import archbench
from archbench.bench.target import Target
from archbench.bench.trial import Trial
from archbench.environment import describe, source_sha256
from archbench.ops import backends
from archbench.record import Record
from archbench.stats import CONFIDENCE, median_interval

SUITE, METRIC, VERSION = "bench", "bench", 1


def source() -> str:
    """Hash of what a figure can depend on: all of the package's code, C sources included."""
    root = Path(archbench.__file__).parent
    return source_sha256(sorted([*root.rglob("*.py"), *root.rglob("*.c")]))


def job_id(target: Target, source_hash: str) -> str:
    return hashlib.sha256(f"bench {target.id} {source_hash}".encode()).hexdigest()[:16]


def outcome(target: Target, trial: Trial, run: str, source_hash: str, command: str) -> list[Record]:
    """The records of a trial that has taken its turns."""
    records = []
    for clock, samples in trial.samples.items():
        explained = trial.explain(statistics.median(samples)) if trial.explain else {}
        notes = {**trial.notes, **explained}
        records.append(_record(target, run, source_hash, command, "figure", target.unit, samples, clock, notes))
    for side, by_clock in trial.times().items():
        for clock, samples in by_clock.items():
            records.append(_record(target, run, source_hash, command, side, "s", samples, clock, {}))
    return records


def missing(target: Target, run: str, source_hash: str, command: str, reason: str, failed: bool = False) -> Record:
    """The record of a target that could not be measured."""
    return Record(
        **_common(target, run, source_hash, command),
        quantity="figure",
        unit=target.unit,
        better=target.better,
        status="failed" if failed else "unsupported",
        reason=reason,
    )


def _record(
    target: Target,
    run: str,
    source_hash: str,
    command: str,
    quantity: str,
    unit: str,
    samples: list[float],
    clock: str,
    notes: Any,
) -> Record:
    interval = median_interval(samples)
    return Record(
        **_common(target, run, source_hash, command),
        quantity=quantity,
        unit=unit,
        better=target.better if quantity == "figure" else "lower",
        status="ok",
        value=statistics.median(samples),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=CONFIDENCE if interval else None,
        samples=samples,
        at={"clock": clock},
        protocol="; ".join(f"{name} {text}" for name, text in notes.items()),
        backend=backends.in_use(),
        environment=describe(),
    )


def _common(target: Target, run: str, source_hash: str, command: str) -> dict[str, Any]:
    described = {"question", "ours", "peer", "level", "must", "stretch", "turns", "why_missed"}
    return {
        "suite": SUITE,
        "run": run,
        "job": job_id(target, source_hash),
        "cell": target.id,
        "checkpoint": "",
        "label": target.id,
        "architecture": "",
        "size": "",
        "codec": "",
        "corpus": "",
        "seed": 0,
        "metric": METRIC,
        "metric_version": VERSION,
        "settings": {name: getattr(target, name) for name in sorted(described)},
        "source_sha256": source_hash,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
