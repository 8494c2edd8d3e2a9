"""A made-up run for the tests of exports: three seeds of one cell, one of another, a failure and things unsupported."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from archbench.record import Record, RecordFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNITS: dict[str, tuple[str, Any]] = {
    "time_per_token": ("s/token", "lower"),
    "prefill_rate": ("token/s", "higher"),
    "bits_per_byte": ("bit/byte", "lower"),
    "accuracy": ("fraction", "higher"),
    "brier_lm": ("points", "higher"),
    "parameters": ("parameter", "neither"),
    "peak_rss": ("B", "lower"),
}


def record(label: str, metric: str, quantity: str, value: float | None, **more: Any) -> Record:
    unit, better = UNITS.get(quantity, ("", "neither"))
    seed, size = more.pop("seed", 0), more.pop("size", "micro")
    given: dict[str, Any] = {
        "suite": "quick", "run": "20261121T101500Z-0a1b2c3d", "job": f"{label}-{size}-{seed}-{metric}",
        "cell": f"{label}{size}{seed}", "checkpoint": f"w-{label}{size}{seed}", "label": label, "architecture": label,
        "size": size, "codec": "bytes", "corpus": "stdlib", "seed": seed, "metric": metric, "metric_version": 1,
        "quantity": quantity, "unit": unit, "better": better, "status": "ok" if value is not None else "unsupported",
        "value": value, "reason": "" if value is not None else "there is none",
        "config": {"model": {"d_model": 96}, "training": {"learning_rate": 4e-3}},
        "environment": {
            "machine": "x86_64", "system": "Linux 6.18", "cpu": "a CPU", "cores": 2, "memory_bytes": 2**34,
            "python": "3.11.7", "packages": {"torch": "2.13.0"}, "commit": COMMIT, "host": "5bce98f73f3e",
        },
        "created": f"2026-11-21T10:15:{seed:02d}+00:00",
    }  # fmt: skip
    return Record(**{**given, **more})


def cell(label: str, seed: int = 0, slower: float = 1.0, **more: Any) -> list[Record]:
    """All records of a cell; `slower` multiplies its time per token."""
    noise = random.Random(f"{label}{seed}")
    found = []
    for context in (128, 2048):
        at = {"context": context, "batch": 1, "clock": "wall"}
        times = sorted(slower * 1e-6 * context * noise.uniform(0.98, 1.02) for _ in range(9))
        rates = [1.5 / time for time in times]
        interval = {"confidence": 0.95, "seed": seed, "at": at, **more}
        found += [
            record(
                label, "latency", "time_per_token", times[4], low=times[1], high=times[7], samples=times, **interval
            ),
            record(label, "latency", "prefill_rate", rates[4], low=rates[7], high=rates[1], samples=rates, **interval),
        ]
    bits = 2 + 0.01 * seed
    state = {"at": {"state": "reset"}, "seed": seed, **more}
    return [
        *found,
        record(label, "likelihood", "bits_per_byte", bits, low=bits - 0.1, high=bits + 0.2, confidence=0.95, **state),
        record(label, "skill", "accuracy", 0.75, seed=seed, **more),
        record(label, "brier_lm", "brier_lm", None, seed=seed, **more),
        record(label, "cost", "parameters", 4e5, at={"kind": "total"}, seed=seed, **more),
    ]


def run_of(**more: Any) -> list[Record]:
    mamba = record("mamba", "memory", "peak_rss", None, status="failed", reason="killed", **more)
    own = record("transformer", "memory", "peak_rss", 2e8, **more)
    transformer = [found for seed in (0, 1, 2) for found in cell("transformer", seed, **more)]
    return [*transformer, own, *cell("mamba", **more), mamba]


def write_run(folder: Path, records: list[Record], name: str = "20261121T101500Z-0a1b2c3d") -> Path:
    RecordFile(folder / f"{name}.jsonl").append(records)
    return folder
