"""The memory metric on a model that allocates a known amount."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_subject import built, subject_of
from torch import Generator, Tensor, nn

from archbench.errors import ConfigError
from archbench.metric import Measurement, Subject
from archbench.metrics import memory
from archbench.metrics.memory import METRIC, MemorySettings
from archbench.model import Batch, Emission, FlopFormulas, Loss, ParameterGroup, Phase, SequenceModel
from archbench.sampling import Sampling

MB = 1_000_000


class Hoarder(SequenceModel):
    """Needs 200 MB at once to read, of which 80 MB stay in the state; 50 MB to write; has a parameter of 40 MB."""

    vocab_size = 256

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(40 * MB // 4))

    def phases(self) -> list[Phase]:
        group = ParameterGroup(name="all", parameters=[self.weight])
        return [Phase(name="train", share=1.0, groups=[group], loss=self.loss)]

    def loss(self, batch: Batch) -> Loss:
        return Loss(self.weight.sum() * float(batch.tokens.shape[1]))

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        scratch = torch.ones(120 * MB // 4)
        return torch.ones(len(tokens), 80 * MB // 4).mul_(scratch[0])

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        scratch = torch.ones(50 * MB // 4)
        rows = len(state)
        tokens = torch.ones(rows, 1, dtype=torch.long) * int(scratch[0])
        return Emission(tokens, torch.ones(rows, dtype=torch.long), state)


def measure(subject: Subject, **settings: Any) -> dict[tuple[str, int], Measurement]:
    found = list(METRIC.measure(subject, MemorySettings(**settings)))
    assert {measurement.quantity for measurement in found} == {"peak_rss"}
    return {(m.at["work"], m.at["context"]): m for m in found}


@pytest.fixture(scope="module")
def hoarded() -> dict[tuple[str, int], Measurement]:
    found = measure(subject_of(Hoarder()), contexts=(8,))
    if found["prefill", 8].value is None:
        pytest.skip(found["prefill", 8].reason)
    return found


def test_what_a_prefill_allocates_is_found(hoarded: dict[tuple[str, int], Measurement]) -> None:
    assert hoarded["prefill", 8].value == pytest.approx(200 * MB, rel=0.1)


def test_the_state_read_into_does_not_count_for_decoding(hoarded: dict[tuple[str, int], Measurement]) -> None:
    assert hoarded["decode", 8].value == pytest.approx(50 * MB, rel=0.1)


def test_a_training_step_holds_gradient_and_two_moments(hoarded: dict[tuple[str, int], Measurement]) -> None:
    step = hoarded["training_step", 16]
    assert step.value == pytest.approx(3 * 40 * MB, rel=0.1)
    assert dict(step.at) == {"work": "training_step", "context": 16, "batch": 2}


def test_real_models_are_measured_and_left_alone() -> None:
    subject = built("transformer", d_model=16, n_layers=1, n_heads=2)
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    found = measure(subject, contexts=(8, 16), batch=2)
    assert set(found) == {("training_step", 16), *((w, c) for w in ("prefill", "decode") for c in (8, 16))}
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_a_model_that_learns_by_reading_has_a_training_step_too() -> None:
    subject = built("ngram")
    found = measure(subject, contexts=(8,))
    assert ("training_step", 16) in found
    assert all(float(buffer.sum()) == 0 for buffer in subject.model.buffers())


def test_contexts_beyond_the_limit_have_a_reason() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=16)
    found = measure(subject, contexts=(16, 17))
    assert "limit is 16" in found["prefill", 17].reason
    assert "limit is 16" in found["decode", 16].reason
    assert "limit is 16" not in found["prefill", 16].reason


def test_a_system_that_does_not_tell_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def denied(path: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(memory.Path, "write_text", denied)
    found = measure(built("ngram"), contexts=(8,))
    assert all(m.value is None and "Permission denied" in m.reason for m in found.values())


@pytest.mark.parametrize("bad", ({"contexts": ()}, {"contexts": (0,)}, {"batch": 0}))
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MemorySettings(**bad)
