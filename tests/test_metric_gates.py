"""Gates are read off the model, a number a head; a model without them says so."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_subject import built

from archbench.metrics.gates import METRIC, NONE, GatesSettings

SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ffn": 16, "segment": 8}


def test_every_head_of_every_layer_is_reported() -> None:
    subject = built("infini_attention", **SIZES)
    with torch.no_grad():
        subject.model.blocks[1].attention.gate[0] = 2.0  # type: ignore[index, union-attr]
    found = list(METRIC.measure(subject, GatesSettings()))
    gates = {(m.at["layer"], m.at["head"]): m.value for m in found if m.quantity == "gate"}
    g = 1 / (1 + math.exp(-2))
    assert gates == {(1, 1): 0.5, (1, 2): 0.5, (2, 1): pytest.approx(g), (2, 2): 0.5}
    assert next(m.value for m in found if m.quantity == "spread") == pytest.approx(g - 0.5)


def test_the_only_layer_that_remembers_counts_as_the_first() -> None:
    found = list(METRIC.measure(built("memorizing_transformer", memory=32, **SIZES), GatesSettings()))
    assert [m.at for m in found if m.quantity == "gate"] == [{"layer": 1, "head": 1}, {"layer": 1, "head": 2}]


def test_a_model_without_gates_has_the_reason() -> None:
    found = list(METRIC.measure(built("transformer", d_model=16, n_layers=1, n_heads=2, d_ffn=16), GatesSettings()))
    assert {(m.quantity, m.value, m.reason) for m in found} == {("gate", None, NONE), ("spread", None, NONE)}
