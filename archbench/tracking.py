"""Trackers: curves and numbers of a run, written to TensorBoard, MLflow or W&B while it is under way or afterwards.

A tracker shows a *page* a cell. Three things are written on it, the same ones live and from an old run's folder:

    settings    the cell's config, flattened                                   once
    curve/*     loss, its parts, learning rate, bytes, FLOPs, seconds          by training step, from its history
    METRIC/*    every number that was measured                                 once

While a cell trains, progress/loss grows by ten-thousandths of its budget; its history, which has every step, is only
written when it is trained.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archbench import export
from archbench.errors import ConfigError, RecordError
from archbench.history import History
from archbench.record import Record, newest, read
from archbench.report.rows import flatten
from archbench.series import brackets

if TYPE_CHECKING:
    from archbench.executors import Event
    from archbench.plan import Plan

SHARES = 10_000
"""Steps of a budget that progress is told in."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A quantity that was measured, at its coordinates."""

    metric: str
    quantity: str
    at: Mapping[str, Any]
    value: float

    def name(self, without: str = "") -> str:
        """`latency/time_per_token[batch=1,context=2048]`, less one coordinate if asked."""
        at = {name: value for name, value in self.at.items() if name != without}
        return f"{self.metric}/{self.quantity}{brackets(at)}"


class Tracker(ABC):
    """Where pages go. A page must have begun before anything is written on it; `close` ends all of them.

    A tracker is made with a folder that it may write into and the name of the suite.
    """

    @abstractmethod
    def begin(self, page: str, settings: Mapping[str, str | float | bool]) -> None:
        """Begins the page of a cell."""

    @abstractmethod
    def point(self, page: str, step: int, values: Mapping[str, float]) -> None:
        """A point of each of these curves; the part of a name before the slash says which curves share their steps."""

    @abstractmethod
    def numbers(self, page: str, numbers: Sequence[Number]) -> None:
        """Numbers that belong to no step."""

    @abstractmethod
    def close(self) -> None:
        """Writes all there is to write."""


@dataclass(frozen=True)
class _Page:
    """What names a page: a cell, as records and plans know it."""

    cell: str
    label: str
    size: str
    seed: int


def _titles(pages: Sequence[_Page]) -> dict[_Page, str]:
    """`transformer/micro/seed0`, and the cell's own key where several are called so (a grid)."""
    alike: dict[str, list[_Page]] = defaultdict(list)
    for page in dict.fromkeys(pages):
        alike["/".join(part for part in (page.label, page.size, f"seed{page.seed}") if part)].append(page)
    return {
        page: title if len(group) == 1 else f"{title}-{page.cell}" for title, group in alike.items() for page in group
    }


def replay(records: Sequence[Record], checkpoints: Path, tracker: Tracker) -> int:
    """Writes an old run: its records, and the histories of its cells that are under `checkpoints`. Returns the number
    of numbers and points written; closes the tracker."""
    titles = _titles([_page(record) for record in records])
    count = 0
    try:
        for page, title in titles.items():
            own = [record for record in records if _page(record) == page]
            tracker.begin(title, _settings(own[0]))
            for address in dict.fromkeys(record.checkpoint for record in own):
                count += _curve(tracker, title, checkpoints / address)
            numbers = _numbers(own)
            tracker.numbers(title, numbers)
            count += len(numbers)
    finally:
        tracker.close()
    return count


def tracked(name: str, open_tracker: Callable[[Path, str], Tracker], about: str) -> export.Format:
    """The format of a tracker: an old run is replayed into it."""

    def write(source: export.Source, out: Path) -> export.Exported:
        count = replay(source.records, source.folder / "checkpoints", open_tracker(out, source.last.suite))
        return export.Exported(paths=(out,), count=count, what="points and numbers")

    return export.Format(about=about, target=name, is_folder=True, write=write, needs=name, track=open_tracker)


def trackers() -> list[str]:
    """The names of the formats that can be written to while a run is under way."""
    return [name for name in export.names() if export.described(name).track is not None]


def tracker_named(name: str) -> Callable[[Path, str], Tracker]:
    """Gives what opens the tracker of that name: for the run in a folder, with the name of its suite. What it keeps in
    files goes to FOLDER/NAME.

    Raises:
        ConfigError: there is no such format, or it is not a tracker.
        MissingExtra: its package is not installed.
    """
    form = export.named(name, "--track")
    open_tracker = form.track
    if open_tracker is None:
        raise ConfigError(f"--track {name}: is written after a run, not during it; allowed: {', '.join(trackers())}")

    def open_for(out: Path, suite: str) -> Tracker:
        folder = out / form.target
        folder.mkdir(parents=True, exist_ok=True)
        return open_tracker(folder, suite)

    return open_for


@contextmanager
def following(
    tracker: Tracker, plan: Plan, out: Path, watch: Callable[[Event], None]
) -> Iterator[Callable[[Event], None]]:
    """Gives a watcher of a run's events that passes them on to `watch` and to the tracker. At its end, however the run
    ended, what earlier runs of the folder had answered is written as well, and the tracker is closed."""
    live = _Live(tracker, plan, out)

    def both(event: Event) -> None:
        watch(event)
        live.handle(event)

    try:
        yield both
    finally:
        live.finish()


class _Live:
    def __init__(self, tracker: Tracker, plan: Plan, out: Path) -> None:
        self.tracker, self.out = tracker, out
        pages = [_Page(cell.key, cell.label, cell.size, cell.seed) for cell in plan.cells]
        self.titles = _titles(pages)
        self.of_address: dict[str, list[str]] = defaultdict(list)
        self.of_job: dict[str, tuple[str, str]] = {}
        for cell, page in zip(plan.cells, pages, strict=True):
            title = self.titles[page]
            if title not in self.of_address[cell.address]:
                self.of_address[cell.address].append(title)
                tracker.begin(title, _cell_settings(cell))
        for job in plan.jobs:
            page = _Page(job.cell.key, job.cell.label, job.cell.size, job.cell.seed)
            self.of_job[job.id] = (self.titles[page], job.metric)
        self.drawn: set[str] = set()
        self.measured: set[str] = set()

    def handle(self, event: Event) -> None:
        kind = event["event"]
        if kind == "progress":
            values = {"progress/loss": event["loss"], "progress/tokens_per_s": event["tokens_per_s"]}
            for title in self.of_address[event["cell"]]:
                self.tracker.point(title, round(event["done"] * SHARES), values)
        elif kind == "trained":
            self._draw(event["cell"])
        elif kind == "measured" and event["job"] in self.of_job:
            title, metric = self.of_job[event["job"]]
            self.measured.add(event["job"])
            found = [
                Number(metric=metric, quantity=m["quantity"], at=m["at"], value=m["value"])
                for m in event["measurements"]
                if m["value"] is not None
            ]
            self.tracker.numbers(title, found)

    def finish(self) -> None:
        try:
            for address in self.of_address:
                self._draw(address)
            for job, records in self._answered().items():
                if job in self.of_job and job not in self.measured:
                    self.tracker.numbers(self.of_job[job][0], _numbers(records))
        finally:
            self.tracker.close()

    def _draw(self, address: str) -> None:
        if address not in self.drawn:
            self.drawn.add(address)
            for title in self.of_address[address]:
                _curve(self.tracker, title, self.out / "checkpoints" / address)

    def _answered(self) -> dict[str, list[Record]]:
        """The records of the folder's newest run by job; nothing where the run ended before it had any."""
        found: dict[str, list[Record]] = defaultdict(list)
        try:
            for record in read(newest(self.out)):
                found[record.job].append(record)
        except RecordError:
            return {}
        return found


def _page(record: Record) -> _Page:
    return _Page(record.cell, record.label, record.size, record.seed)


def _numbers(records: Sequence[Record]) -> list[Number]:
    return [
        Number(metric=record.metric, quantity=record.quantity, at=record.at, value=record.value)
        for record in records
        if record.value is not None
    ]


def _settings(record: Record) -> dict[str, str | float | bool]:
    about = {"architecture": record.architecture, "codec": record.codec, "corpus": record.corpus, "seed": record.seed}
    return _plain({**about, "size": record.size, **record.config})


def _cell_settings(cell: Any) -> dict[str, str | float | bool]:
    about = {"architecture": cell.architecture, "codec": cell.codec, "corpus": cell.corpus, "seed": cell.seed}
    config = {"model": dataclasses.asdict(cell.config), "training": dataclasses.asdict(cell.training)}
    return _plain({**about, "size": cell.size, **config, "match": cell.match, "residual": cell.residual})


def _plain(settings: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """Flat, without what is unset, anything but text, numbers and truth as text."""
    return {
        name: value if isinstance(value, (str, int, float, bool)) else str(value)
        for name, value in flatten(settings)
        if value is not None
    }


def _curve(tracker: Tracker, title: str, folder: Path) -> int:
    """Writes a trained cell's history; nothing for a cell that is not trained yet, or was trained elsewhere."""
    path = folder / "history.json"
    if not path.is_file():
        return 0
    history = History.from_json(path.read_text(encoding="utf-8"), path)
    for point in history.points:
        values = {
            "curve/loss": point.loss,
            "curve/learning_rate": point.learning_rate,
            "curve/bytes": point.bytes,
            "curve/flops": point.flops,
            "curve/seconds": point.seconds,
            **{f"curve/{name}": part for name, part in point.parts.items()},
        }
        tracker.point(title, point.step, values)
    return len(history.points)
