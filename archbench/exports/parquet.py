"""One Parquet file: every record a row, samples as lists of numbers, mappings as JSON.

pandas.read_parquet(FILE)
"""

from __future__ import annotations

from pathlib import Path

from archbench.export import Exported, Format, Source
from archbench.tabular import frame


def write(source: Source, out: Path) -> Exported:
    table = frame(source.records)
    table.to_parquet(out, engine="pyarrow", index=False)
    return Exported(paths=(out,), count=len(table), what="rows")


FORMAT = Format(
    about="Parquet: every record a row, for pandas and DuckDB; needs archbench[parquet]",
    target="records.parquet",
    is_folder=False,
    write=write,
    needs="pyarrow",
)
