"""TensorBoard event files, a folder a cell: `tensorboard --logdir results/quick/tensorboard`.

Curves go by training step. A number that was measured at several contexts makes a curve too, by context; any other is
a single point. Settings are in the HPARAMS tab. A page is begun anew: all of it is written again, so what an earlier
sitting left in its folder is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archbench.tracking import Number, Tracker, tracked

AXIS = "context"


class TensorBoard(Tracker):
    def __init__(self, folder: Path, suite: str) -> None:
        del suite
        self.folder = folder
        self.writers: dict[str, Any] = {}

    def begin(self, page: str, settings: Mapping[str, str | float | bool]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        place = self.folder / page
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        self.writers[page] = writer = EventFileWriter(str(place))
        writer.add_event(Event(wall_time=time.time(), summary=hparams_pb(dict(settings), trial_id=page)))

    def point(self, page: str, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writers[page].add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=entries)))

    def numbers(self, page: str, numbers: Sequence[Number]) -> None:
        def place(number: Number) -> int:
            context = number.at.get(AXIS)
            return context if type(context) is int else 0

        for number in sorted(numbers, key=place):
            self.point(page, place(number), {number.name(without=AXIS if place(number) else ""): number.value})
        self.writers[page].flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


FORMAT = tracked("tensorboard", TensorBoard, "TensorBoard event files; needs archbench[tensorboard]")
