"""pytest-benchmark's JSON, as `--benchmark-json` writes it, for `pytest-benchmark compare` and all that reads it.

It holds times only, so a benchmark is a series measured in seconds (a rate by its inverse), and its data are the raw
samples of all seeds, or the value where there is but one. The number as archbench gives it, with its interval, is in
`extra_info`, and beside it what else is known of the cell at that point: bits per byte, state bytes, FLOPs, ...
Source: the file that pytest-benchmark 5 writes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archbench.errors import ConfigError
from archbench.export import Exported, Format, Source
from archbench.series import Series, as_smaller, brackets, coordinate

VERSION = "5.0.0"
"""Of the layout."""


def stats(data: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's statistics of these rounds, at least one."""
    ordered = sorted(data)
    n, mean = len(ordered), statistics.mean(ordered)
    stddev = statistics.stdev(ordered) if n > 1 else 0.0
    q1, q3 = _quartiles(ordered)
    iqr = q3 - q1
    inside = [x for x in ordered if q1 - 1.5 * iqr <= x <= q3 + 1.5 * iqr]
    stddev_outliers = sum(not mean - stddev <= x <= mean + stddev for x in ordered)
    total = sum(ordered)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": n,
        "median": statistics.median(ordered),
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": n - len(inside),
        "stddev_outliers": stddev_outliers,
        "outliers": f"{stddev_outliers};{n - len(inside)}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": n / total if total else 0,
        "total": total,
        "data": list(data),
        "iterations": 1,
    }


def _quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """The medians of the lower and the upper half; in odd numbers each half weighs the middle by a part (method 3 of
    the Wikipedia's "Quartile"), as pytest-benchmark does."""
    n = len(ordered)
    if n == 1:
        return ordered[0], ordered[0]
    if n % 2 == 0:
        return statistics.median(ordered[: n // 2]), statistics.median(ordered[n // 2 :])
    k = n // 4
    if n % 4 == 1:
        lower, upper = (k - 1, 0.25), (3 * k, 0.75)
    else:
        lower, upper = (k, 0.75), (3 * k + 1, 0.25)
    (i, a), (j, b) = lower, upper
    return a * ordered[i] + (1 - a) * ordered[i + 1], b * ordered[j] + (1 - b) * ordered[j + 1]


def benchmark(series: Series, others: Sequence[Series]) -> dict[str, Any]:
    """A time as a benchmark; `others` are the numbers of the same cell that are not times."""
    cell = series.place.removeprefix(f"{series.suite}/")
    return {
        "group": f"{series.measure}{brackets(series.at)}",
        "name": f"{cell}/{series.measure}{brackets(series.at)}",
        "fullname": series.name,
        "params": {"cell": cell, **{name: coordinate(value) for name, value in sorted(series.at.items())}},
        "param": "-".join([cell, *(coordinate(series.at[name]) for name in sorted(series.at))]),
        "extra_info": {
            "unit": series.unit,
            "value": series.value,
            "low": series.low,
            "high": series.high,
            "confidence": series.confidence,
            "seeds": list(series.seeds),
            "metric_version": series.metric_version,
            "quantities": {
                f"{other.measure}{brackets(other.at)}": {"value": other.value, "unit": other.unit}
                for other in others
                if all(other.at.get(name, value) == value for name, value in series.at.items())
            },
        },
        "options": {
            "disable_gc": False,
            "timer": coordinate(series.at.get("clock", "wall")),
            "min_rounds": 1,
            "max_time": 0.0,
            "min_time": 0.0,
            "precision": None,
            "confidence": None,
            "warmup": False,
        },
        "stats": stats(series.samples or [series.value]),
    }


def write(source: Source, out: Path) -> Exported:
    benchmarks = []
    for place in dict.fromkeys(series.place for series in source.series):
        own = [series for series in source.series if series.place == place]
        times = [time for series in own if (time := as_smaller(series)) is not None and time.is_time]
        others = [series for series in own if not series.is_time]
        benchmarks += [benchmark(time, others) for time in times]
    if not benchmarks:
        raise ConfigError(
            f"{source.file}: holds no times, and pytest-benchmark has no place for anything else; "
            "export to bencher, csv or parquet"
        )
    document = {
        "machine_info": _machine(source.environment),
        "commit_info": _commit(source),
        "benchmarks": benchmarks,
        "datetime": source.last.created,
        "version": VERSION,
    }
    out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Exported(paths=(out,), count=len(benchmarks), what="benchmarks")


def _machine(environment: dict[str, Any]) -> dict[str, Any]:
    system, _, release = environment.get("system", "").partition(" ")
    return {
        "node": environment.get("host", ""),
        "processor": environment.get("cpu", ""),
        "machine": environment.get("machine", ""),
        "python_compiler": "",
        "python_implementation": "",
        "python_implementation_version": environment.get("python", ""),
        "python_version": environment.get("python", ""),
        "python_build": ["", ""],
        "release": release,
        "system": system,
        "cpu": {"brand_raw": environment.get("cpu", ""), "count": environment.get("cores")},
    }


def _commit(source: Source) -> dict[str, Any]:
    commit, dirty = source.commit
    return {
        "id": commit or "unknown",
        "time": None,
        "author_time": None,
        "dirty": dirty,
        "project": "archbench",
        "branch": "(unknown)",
    }


FORMAT = Format(
    about="pytest-benchmark JSON: the times, for pytest-benchmark compare",
    target="pytest-benchmark.json",
    is_folder=False,
    write=write,
)
