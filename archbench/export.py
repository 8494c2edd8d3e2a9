"""Exports: a run's records in the form that another tool reads. One file a format, in `archbench/exports`.

A format file exports `FORMAT`. Its name, with hyphens for underscores, is the format's name. Other packages add theirs
as entry points of the group `archbench.exports`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archbench import registry
from archbench.errors import ConfigError, MissingExtra, RecordError, suggestion
from archbench.record import Record, newest, read
from archbench.series import Series, series_of

if TYPE_CHECKING:
    from archbench.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported: a results file and its records, at least one of them ok. `folder` is the run's folder."""

    file: Path
    records: list[Record]

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def run(self) -> str:
        return self.file.stem

    @property
    def last(self) -> Record:
        """The record written last: a run's answers, those carried over too, hold for the source it was written by."""
        return max(self.records, key=lambda record: record.created)

    @property
    def environment(self) -> dict[str, Any]:
        return self.last.environment

    @property
    def commit(self) -> tuple[str | None, bool]:
        """The commit of that source, None outside a checkout, and whether it had changes that are not committed."""
        commit = self.environment.get("commit")
        return (commit.rstrip("+"), commit.endswith("+")) if commit else (None, False)

    @cached_property
    def series(self) -> list[Series]:
        return series_of(self.records)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: `count` things called `what`. `notices` say what the format has no place for."""

    paths: tuple[Path, ...]
    count: int
    what: str
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Format:
    """A form that another tool reads.

    `about` is a line for people; `target` the file or folder written when no place is given; `is_folder` says which;
    `needs` the package that must be installed, by the extra of the format's name.
    `write` raises ConfigError when the run holds nothing the format has a place for. A format with `track` can also be
    written to while a run is under way (`archbench.tracking`).
    """

    about: str
    target: str
    is_folder: bool
    write: Callable[[Source, Path], Exported]
    needs: str = ""
    track: Callable[[Path, str], Tracker] | None = None


def names() -> list[str]:
    """The names of all formats there are, as people write them."""
    return [name.replace("_", "-") for name in registry.export_formats()]


def described(name: str) -> Format:
    """The format of a name that exists, whether what it needs is installed or not."""
    return registry.export_format(name.replace("-", "_"))


def named(name: str, option: str = "--to") -> Format:
    """The format of that name.

    Raises:
        ConfigError: there is none; the message begins with `option`.
        MissingExtra: the package it needs is not installed.
    """
    plain = name.replace("_", "-")
    if plain not in names():
        raise ConfigError(f"{option} {name}: there is no such format; {suggestion(plain, names())}")
    form = described(plain)
    if form.needs and find_spec(form.needs) is None:
        raise MissingExtra(f"{option} {name}: needs the package {form.needs}: pip install 'archbench[{plain}]'")
    return form


def source(path: str | Path) -> Source:
    """The run at `path`: a results file, or the newest of a run's folder.

    Raises:
        RecordError: nothing is there, a line is damaged, or no record holds a number.
    """
    file = newest(Path(path))
    records = read(file)
    if not any(record.status == "ok" for record in records):
        reason = next(record.reason for record in records)
        raise RecordError(
            f"{file}: none of its {len(records)} records is ok, so there is nothing to export; the first says: {reason}"
        )
    return Source(file=file, records=records)


def export(path: str | Path, to: str, out: Path | None = None) -> Exported:
    """Writes the run at `path` as the format `to`, into `out`, or RUN/exports where that is None.

    Raises:
        ConfigError: there is no such format, `out` is of the wrong kind, or the run holds nothing the format can hold.
        RecordError: see `source`.
        MissingExtra: the format needs a package that is not installed.
    """
    form = named(to)
    found = source(path)
    return form.write(found, _place(form, found, out))


def _place(form: Format, found: Source, out: Path | None) -> Path:
    place = found.folder / "exports" / form.target if out is None else out
    if form.is_folder:
        if place.exists() and not place.is_dir():
            raise ConfigError(f"--out {place}: is a file; this format is a folder, so give a folder or a new name")
        place.mkdir(parents=True, exist_ok=True)
        return place
    if place.is_dir():
        place = place / form.target
    place.parent.mkdir(parents=True, exist_ok=True)
    return place
