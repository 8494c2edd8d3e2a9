"""The training metric on a log written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_subject import subject_of
from torch import nn

from archbench.history import History, Point
from archbench.metric import Measurement
from archbench.metrics.training import METRIC, TrainingSettings
from archbench.model import SequenceModel


class Blank(SequenceModel):
    """Training is read from the log; the model is not asked."""

    vocab_size = 256

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter()

    phases = initial_state = prefill = decode_step = flops = lambda *_: pytest.fail("the model was asked")


def point(phase: str, step: int, loss: float) -> Point:
    return Point(
        phase=phase, step=step, tokens=100 * step, bytes=250.0 * step, flops=1e9 * step, seconds=0.5 * step,
        cpu_seconds=0.4 * step, loss=loss, learning_rate=1e-3,
    )  # fmt: skip


def measure(history: History) -> list[Measurement]:
    return list(METRIC.measure(subject_of(Blank(), history=history), TrainingSettings()))


def value(found: list[Measurement], quantity: str, **at: Any) -> float | None:
    (only,) = (m.value for m in found if m.quantity == quantity and at == dict(m.at))
    return only


TWO_PHASES = [
    point("autoencoder", 1, 3.0),
    point("autoencoder", 4, 2.0),
    point("energy", 6, 9.0),
    point("energy", 8, 7.0),
]


def test_totals_and_rates_by_hand() -> None:
    found = measure(History(points=TWO_PHASES, matmul_peak=1e10))
    assert {m.quantity for m in found} == set(METRIC.quantities)
    expected = {
        "steps": 8, "seconds": 4.0, "cpu_seconds": 3.2, "flops": 8e9, "tokens_per_second": 200.0,
        "bytes_per_second": 500.0, "flops_per_second": 2e9, "matmul_utilisation": 0.2,
    }  # fmt: skip
    for quantity, number in expected.items():
        assert value(found, quantity) == pytest.approx(number)


def test_every_phase_has_its_loss_curve() -> None:
    found = [m for m in measure(History(points=TWO_PHASES)) if m.quantity == "loss"]
    assert [(dict(m.at), m.value) for m in found] == [({"phase": "autoencoder"}, 2.0), ({"phase": "energy"}, 7.0)]
    assert found[1].samples == [9.0, 7.0]
    assert found[1].along == {"bytes": [1500.0, 2000.0], "flops": [6e9, 8e9], "seconds": [3.0, 4.0]}


def test_without_a_peak_there_is_no_utilisation() -> None:
    found = measure(History(points=TWO_PHASES))
    assert value(found, "matmul_utilisation") is None
    assert value(found, "flops_per_second") == pytest.approx(2e9)


def test_weights_from_elsewhere_have_a_reason_for_everything() -> None:
    found = measure(History())
    assert {m.quantity for m in found} == set(METRIC.quantities)
    assert all(m.value is None and "not trained here" in m.reason for m in found)
