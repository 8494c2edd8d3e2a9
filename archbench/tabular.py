"""Records as one wide table: a row a record, a column a field, and a column `at.NAME` for each coordinate.

Nothing is taken together and nothing left out: records that are unsupported or failed have no value and their reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from archbench.record import Record

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = ("value", "low", "high", "confidence")
WHOLE_NUMBERS = ("seed", "metric_version", "schema")
LISTS = ("samples",)
MAPPINGS = ("along", "settings", "backend", "config", "environment")
"""As JSON text, since their keys differ from metric to metric."""


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """The table, every column of one declared type, so that it means the same wherever it is read."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for field in dataclasses.fields(Record):
        values = [getattr(record, field.name) for record in records]
        if field.name == "at":
            columns |= _coordinates([record.at for record in records])
        elif field.name in MAPPINGS:
            columns[field.name] = pd.array([json.dumps(value, sort_keys=True) for value in values], dtype="string")
        elif field.name in NUMBERS:
            columns[field.name] = pd.array(values, dtype="Float64")
        elif field.name in WHOLE_NUMBERS:
            columns[field.name] = pd.array(values, dtype="Int64")
        elif field.name in LISTS:
            columns[field.name] = pd.Series(values, dtype="object")
        else:
            columns[field.name] = pd.array(values, dtype="string")
    return pd.DataFrame(columns)


def _coordinates(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import pandas as pd

    names = sorted({name for point in points for name in point})
    found = {}
    for name in names:
        values = [point.get(name) for point in points]
        dtype: Any = _dtype(value for value in values if value is not None)
        if dtype == "string":
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        found[f"at.{name}"] = pd.array(values, dtype=dtype)
    return found


def _dtype(values: Iterable[Any]) -> str:
    """The narrowest type that holds these coordinates; text where they are of several kinds."""
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        return "Int64"
    return "Float64" if kinds and kinds <= {int, float} else "string"
