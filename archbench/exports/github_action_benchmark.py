"""github-action-benchmark: two files, because there a direction belongs to a file and not to a number.

    smaller-is-better.json   tool: customSmallerIsBetter
    bigger-is-better.json    tool: customBiggerIsBetter

A file that would be empty is not written, since the action refuses one. Numbers that are neither better nor worse
(parameters, steps) have no place there. `range` is half the interval; its bounds, the seeds and the run are in `extra`.
Source: https://github.com/benchmark-action/github-action-benchmark, README and src/extract.ts
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from archbench.errors import ConfigError
from archbench.export import Exported, Format, Source
from archbench.record import Better
from archbench.series import Series

FILES: dict[Better, str] = {"lower": "smaller-is-better.json", "higher": "bigger-is-better.json"}


def entry(series: Series, run: str) -> dict[str, Any]:
    """One benchmark: name, unit and value, and as text its interval and where it is from."""
    extra = [f"seeds={','.join(map(str, series.seeds))}", f"run={run}", f"metric version={series.metric_version}"]
    found: dict[str, Any] = {"name": series.name, "unit": series.unit, "value": series.value}
    if series.low is not None and series.high is not None and series.confidence is not None:
        found["range"] = f"± {(series.high - series.low) / 2:.3g}"
        extra.insert(0, f"ci{100 * series.confidence:g}=[{series.low:.6g}, {series.high:.6g}]")
    if series.n:
        extra.insert(0, f"n={series.n} {'seeds' if series.over_seeds else 'samples'}")
    return {**found, "extra": "\n".join(extra)}


def write(source: Source, out: Path) -> Exported:
    paths, count = [], 0
    for better, name in FILES.items():
        path = out / name
        path.unlink(missing_ok=True)  # an earlier export's must not pass for this one's
        entries = [entry(series, source.run) for series in source.series if series.better == better]
        if entries:
            path.write_text(json.dumps(entries, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
            paths.append(path)
            count += len(entries)
    if not paths:
        raise ConfigError(
            f"{source.file}: no number of it is better lower or higher, and github-action-benchmark has no place for "
            "others; export to bencher, csv or parquet"
        )
    left = sum(series.better == "neither" for series in source.series)
    notices = (f"{left} numbers that are neither better nor worse (sizes, counts) have no place there",) if left else ()
    return Exported(paths=tuple(paths), count=count, what="benchmarks", notices=notices)


FORMAT = Format(
    about="github-action-benchmark: customSmallerIsBetter and customBiggerIsBetter, a file each",
    target="github-action-benchmark",
    is_folder=True,
    write=write,
)
