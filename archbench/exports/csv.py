"""One CSV file: every record a row, lists and mappings as JSON. Numbers are written so that they read back exactly.

pandas.read_csv(FILE, float_precision="round_trip")
"""

from __future__ import annotations

import json
from pathlib import Path

from archbench.export import Exported, Format, Source
from archbench.tabular import LISTS, frame


def write(source: Source, out: Path) -> Exported:
    table = frame(source.records)
    for name in LISTS:
        table[name] = [json.dumps(value) for value in table[name]]
    table.to_csv(out, index=False)
    return Exported(paths=(out,), count=len(table), what="rows")


FORMAT = Format(
    about="CSV: every record a row, for pandas and spreadsheets", target="records.csv", is_folder=False, write=write
)
