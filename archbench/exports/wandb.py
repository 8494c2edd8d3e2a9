"""Weights & Biases: a run a cell, grouped by suite, in the project WANDB_PROJECT or `archbench`.

Offline unless WANDB_MODE says otherwise: nothing leaves the machine until `wandb sync FOLDER/wandb/offline-run-*`.
Curves and progress have steps of their own, so each has its own axis; numbers are in the run's summary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archbench.tracking import Number, Tracker, tracked


class Wandb(Tracker):
    def __init__(self, folder: Path, suite: str) -> None:
        self.folder, self.suite = folder, suite
        self.runs: dict[str, Any] = {}

    def begin(self, page: str, settings: Mapping[str, str | float | bool]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self.runs[page] = run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "archbench",
            group=self.suite,
            name=page,
            config=dict(settings),
            dir=str(self.folder),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )
        for axis in ("progress", "curve"):
            run.define_metric(f"{axis}/step", hidden=True)
            run.define_metric(f"{axis}/*", step_metric=f"{axis}/step")

    def point(self, page: str, step: int, values: Mapping[str, float]) -> None:
        axis = next(iter(values)).split("/")[0]
        self.runs[page].log({**values, f"{axis}/step": step})

    def numbers(self, page: str, numbers: Sequence[Number]) -> None:
        self.runs[page].summary.update({number.name(): number.value for number in numbers})

    def close(self) -> None:
        for run in self.runs.values():
            run.finish()


FORMAT = tracked("wandb", Wandb, "Weights & Biases, offline unless WANDB_MODE says else; needs archbench[wandb]")
