"""What training took and how it went, read from the training log alone.

Time is the trainer's: choosing data, forward, backward and optimizer, without evaluation or compilation. FLOPs are the
analytic ones of the steps taken. `matmul_utilisation` holds the FLOP/s against the best matrix product measured in the
same process, threads and precision, just before training began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from archbench.history import History, Point
from archbench.metric import Measurement, Metric, Quantity, Subject

NO_LOG = "there is no training log: the weights were not trained here"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Nothing to set."""


class TrainingMetric(Metric):
    name = "training"
    version = 1
    settings = TrainingSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "seconds": Quantity(unit="s", better="lower", meaning="wall time of training"),
        "cpu_seconds": Quantity(unit="s", better="lower", meaning="CPU time of training, all threads"),
        "tokens_per_second": Quantity(unit="token/s", better="higher", meaning="tokens trained on per second"),
        "bytes_per_second": Quantity(unit="B/s", better="higher", meaning="raw text trained on per second"),
        "flops": Quantity(unit="FLOP", better="neither", meaning="FLOPs spent on training, by the formulas"),
        "flops_per_second": Quantity(unit="FLOP/s", better="higher", meaning="those FLOPs per second"),
        "matmul_utilisation": Quantity(
            unit="fraction", better="higher", meaning="FLOP/s as a share of the best matrix product's"
        ),
        "loss": Quantity(unit="nat/token", better="lower", meaning="training loss of a phase, at its end"),
        "steps": Quantity(unit="step", better="neither", meaning="training steps taken"),
    }

    def measure(self, subject: Subject, settings: TrainingSettings) -> Iterator[Measurement]:
        del settings
        history, last = subject.history, subject.history.last
        if last is None:
            for quantity in self.quantities:
                yield Measurement(quantity=quantity, value=None, reason=NO_LOG)
            return
        protocol = f"{history.precision}, {history.threads} threads, {history.device}, {history.sessions} sessions"
        yield Measurement(quantity="steps", value=last.step, protocol=protocol)
        for quantity in ("seconds", "cpu_seconds", "flops"):
            yield Measurement(quantity=quantity, value=getattr(last, quantity), protocol=protocol)
        for quantity, total in (
            ("tokens_per_second", last.tokens),
            ("bytes_per_second", last.bytes),
            ("flops_per_second", last.flops),
        ):
            yield _rate(quantity, total, last.seconds, protocol)
        yield _utilisation(history, last, protocol)
        for phase in dict.fromkeys(point.phase for point in history.points):
            yield _loss_curve([point for point in history.points if point.phase == phase], protocol)


def _rate(quantity: str, total: float, seconds: float, protocol: str) -> Measurement:
    if seconds <= 0:
        return Measurement(quantity=quantity, value=None, reason="training took no measurable time")
    return Measurement(quantity=quantity, value=total / seconds, protocol=protocol)


def _utilisation(history: History, last: Point, protocol: str) -> Measurement:
    if history.matmul_peak <= 0 or last.seconds <= 0:
        reason = "the log holds no matrix product peak to compare with"
        return Measurement(quantity="matmul_utilisation", value=None, reason=reason)
    value = last.flops / last.seconds / history.matmul_peak
    against = f"against {history.matmul_peak / 1e9:.1f} GFLOP/s of a matrix product; {protocol}"
    return Measurement(quantity="matmul_utilisation", value=value, protocol=against)


def _loss_curve(points: list[Point], protocol: str) -> Measurement:
    return Measurement(
        quantity="loss",
        value=points[-1].loss,
        samples=[point.loss for point in points],
        along={
            "bytes": [point.bytes for point in points],
            "flops": [point.flops for point in points],
            "seconds": [point.seconds for point in points],
        },
        at={"phase": points[-1].phase},
        protocol=f"mean over the steps since the previous point; {protocol}",
    )


METRIC = TrainingMetric()
