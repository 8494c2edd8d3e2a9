"""Tables as data, before anyone decides how they look. A cell always says something: a number, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from archbench.report import notation
from archbench.report.evidence import Finding

SAME_REASON = "same reason"


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """`text` is what is read, `detail` its interval or remark, `more` a second remark, which leads to `href` if that is
    set; `sort` orders it in a sortable table.

    `reason` is set where a number is missing, in full, with `status` saying of what kind. `flagged` marks a value that
    breaks a rule.
    """

    text: str
    detail: str = ""
    more: str = ""
    sort: float | str | None = None
    reason: str = ""
    status: str = "ok"
    flagged: bool = False
    href: str = ""

    def __post_init__(self) -> None:
        assert self.text.strip(), "a table cell must say something"


@dataclass(frozen=True, kw_only=True)
class Column:
    """`hint` stands small under the name: the unit, or at which point of the grid."""

    name: str
    hint: str = ""
    numeric: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """The first cell of a line is its heading. `rule_after` draws a line below that many lines (references follow). A
    `folded` table is opened by those who want it. In a `transposed` one the architectures are the columns.

    A reason that stands in the cell to the left as well is not written out again.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    lines: tuple[tuple[TableCell, ...], ...]
    notes: tuple[str, ...] = ()
    rule_after: int | None = None
    folded: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        assert all(len(line) == len(self.columns) for line in self.lines), f"table {self.key} is ragged"
        object.__setattr__(self, "lines", tuple(_said_once(line) for line in self.lines))


def _said_once(line: Sequence[TableCell]) -> tuple[TableCell, ...]:
    repeated = [bool(cell.reason) and cell.reason == before.reason for before, cell in pairwise(line)]
    return tuple(
        replace(cell, text=SAME_REASON) if again else cell for cell, again in zip(line, [False, *repeated], strict=True)
    )


def text(value: str, detail: str = "", flagged: bool = False) -> TableCell:
    return TableCell(text=value, detail=detail, sort=value, flagged=flagged)


def count(value: int) -> TableCell:
    return TableCell(text=str(value), sort=float(value))


def absent(reason: str, status: str = "absent") -> TableCell:
    """A number that is not there."""
    return TableCell(text=notation.shorten(reason), reason=reason, status=status)


def number(finding: Finding, flagged: bool = False) -> TableCell:
    """A finding, with its interval as the detail."""
    if finding.value is None:
        return absent(finding.reason, finding.status)
    shown, bounds = notation.interval(finding.value, finding.low, finding.high, finding.unit)
    return TableCell(text=shown, detail=bounds, sort=finding.value, flagged=flagged)


def shared_note(findings: Sequence[Finding], name: str) -> str:
    """The value of coordinate `name` if all findings share it, else ""."""
    values = {finding.coordinates.get(name) for finding in findings if finding.value is not None}
    values.discard(None)
    return str(values.pop()) if len(values) == 1 else ""
