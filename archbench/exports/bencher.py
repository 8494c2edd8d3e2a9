"""Bencher Metric Format, version 0, for `bencher run --adapter json --file FILE`.

    {"quick/transformer/micro[context=2048]": {"latency-time-per-token": {"value": ..., "lower_value": ..., ...}}}

All numbers go in, whichever way is better and also where neither is: Bencher asks for the direction of a measure when a
threshold is set. It has no place for units (they belong to the measure, on the server), for reasons, or for seeds.
Source: https://bencher.dev/docs/reference/bencher-metric-format
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from archbench.export import Exported, Format, Source
from archbench.series import Series, brackets

LONGEST_SLUG = 64
LONGEST_NAME = 1024


def slug(measure: str) -> str:
    """`latency.time_per_token` -> `latency-time-per-token`; what is longer than a slug may be ends in a hash."""
    text = re.sub(r"[^a-z0-9]+", "-", measure.lower()).strip("-")
    return text if len(text) <= LONGEST_SLUG else _cut(text, measure, LONGEST_SLUG)


def benchmark(series: Series) -> str:
    """A cell at a point; several measures share it."""
    name = f"{series.place}{brackets(series.at)}"
    return name if len(name) <= LONGEST_NAME else _cut(name, name, LONGEST_NAME)


def write(source: Source, out: Path) -> Exported:
    benchmarks: dict[str, dict[str, dict[str, float]]] = {}
    for series in source.series:
        metric = {"value": series.value}
        if series.low is not None and series.high is not None:
            metric |= {"lower_value": series.low, "upper_value": series.high}
        benchmarks.setdefault(benchmark(series), {})[slug(series.measure)] = metric
    out.write_text(json.dumps(benchmarks, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Exported(paths=(out,), count=len(source.series), what="metrics")


def _cut(text: str, whole: str, length: int) -> str:
    return f"{text[: length - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


FORMAT = Format(
    about="Bencher Metric Format v0: all numbers with their bounds, for bencher run --adapter json",
    target="bencher.json",
    is_folder=False,
    write=write,
)
