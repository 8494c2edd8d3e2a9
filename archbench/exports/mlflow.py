"""MLflow: an experiment a suite, a run a cell, in the store that MLFLOW_TRACKING_URI names, else in a file of its own
(`mlflow ui --backend-store-uri sqlite:///results/quick/mlflow/mlflow.db`).

MLflow allows neither brackets nor equals signs in names: `latency/time_per_token/batch 1/context 2048`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from archbench.series import coordinate
from archbench.tracking import Number, Tracker, tracked

STORE = "MLFLOW_TRACKING_URI"
MOST_METRICS, MOST_PARAMS = 1000, 100
"""That MLflow takes at once."""


def name_of(number: Number) -> str:
    parts = [number.metric, number.quantity]
    parts += [f"{name} {coordinate(number.at[name])}" for name in sorted(number.at)]
    return allowed("/".join(parts))


def allowed(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


class Mlflow(Tracker):
    def __init__(self, folder: Path, suite: str) -> None:
        from mlflow import MlflowClient

        store = os.environ.get(STORE) or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self.client = MlflowClient(tracking_uri=store)
        name = f"archbench {suite}"
        found = self.client.get_experiment_by_name(name)
        self.experiment = (
            found.experiment_id
            if found
            else self.client.create_experiment(
                name, artifact_location=None if os.environ.get(STORE) else (folder / "artifacts").resolve().as_uri()
            )
        )
        self.runs: dict[str, str] = {}

    def begin(self, page: str, settings: Mapping[str, str | float | bool]) -> None:
        from mlflow.entities import Param

        self.runs[page] = run = self.client.create_run(self.experiment, run_name=page).info.run_id
        params = [Param(allowed(name), str(value)) for name, value in settings.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(run, params=params[first : first + MOST_PARAMS])

    def point(self, page: str, step: int, values: Mapping[str, float]) -> None:
        self._log(page, {allowed(name): value for name, value in values.items()}, step)

    def numbers(self, page: str, numbers: Sequence[Number]) -> None:
        self._log(page, {name_of(number): number.value for number in numbers}, 0)

    def _log(self, page: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.runs[page], metrics=metrics[first : first + MOST_METRICS])

    def close(self) -> None:
        for run in self.runs.values():
            self.client.set_terminated(run)


FORMAT = tracked("mlflow", Mlflow, "MLflow: an experiment a suite, a run a cell; needs archbench[mlflow]")
