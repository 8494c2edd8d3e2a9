"""The latency metric on a model that takes known times, and what its clocks may not see."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import pytest
import torch
from tiny_subject import built, subject_of
from torch import Generator, Tensor

from archbench.errors import ConfigError
from archbench.metric import Measurement, Probe, Subject
from archbench.metrics.latency import METRIC, LatencySettings
from archbench.model import Emission, FlopFormulas, Phase, SequenceModel
from archbench.ops import backends
from archbench.sampling import Sampling
from archbench.timing import interleave

PREFILL_S, STEP_S, PER_STEP = 0.06, 0.02, 2


class Sleeper(SequenceModel):
    """Sleeps at every verb and writes two tokens a step; remembers what it read."""

    vocab_size = 256

    def __init__(self, busy: bool = False) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(1))
        self.prompts: list[Tensor] = []
        self.collecting: list[bool] = []
        self.wait = _spin if busy else time.sleep

    def phases(self) -> list[Phase]:
        raise NotImplementedError

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Tensor:
        time.sleep(0.05)  # not part of reading
        return torch.zeros(batch_size, 1)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        self.prompts.append(tokens)
        self.collecting.append(gc.isenabled())
        self.wait(PREFILL_S)
        return state

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        self.collecting.append(gc.isenabled())
        self.wait(STEP_S)
        rows = len(state)
        return Emission(torch.ones(rows, PER_STEP, dtype=torch.long), torch.full((rows,), PER_STEP), state)


def _spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def probe_of(subject: Subject, **settings: Any) -> Probe:
    (probe,) = METRIC.probes(subject, LatencySettings(**{"contexts": (8,), "batches": (3,), **settings}))
    assert isinstance(probe, Probe)
    return probe


def best_of(probe: Probe, clock: str, n: int = 3) -> dict[str, float]:
    """The sample least disturbed by the machine, quantity by quantity."""
    runs = [{s.quantity: s.value for s in probe.sample() if s.at["clock"] == clock} for _ in range(n)]
    return {
        quantity: (max if quantity == "prefill_rate" else min)(run[quantity] for run in runs) for quantity in runs[0]
    }


def test_wall_times_of_a_model_that_sleeps() -> None:
    probe = probe_of(subject_of(Sleeper()), new_tokens=6)
    wall = best_of(probe, "wall")
    assert probe.at == {"context": 8, "batch": 3, "level": "best"}
    assert wall["time_to_first_token"] == pytest.approx(PREFILL_S + STEP_S, rel=0.3)
    assert wall["time_per_token"] == pytest.approx(STEP_S / PER_STEP, rel=0.3)
    assert wall["prefill_rate"] == pytest.approx(3 * 8 / PREFILL_S, rel=0.3)


def test_sleeping_costs_no_cpu_time_and_working_does() -> None:
    asleep = best_of(probe_of(subject_of(Sleeper()), new_tokens=6), "cpu")
    assert asleep["time_to_first_token"] < 0.3 * PREFILL_S
    busy = best_of(probe_of(subject_of(Sleeper(busy=True)), new_tokens=6), "cpu")
    assert busy["time_to_first_token"] == pytest.approx(PREFILL_S + STEP_S, rel=0.3)
    assert busy["time_per_token"] == pytest.approx(STEP_S / PER_STEP, rel=0.3)


def test_both_clocks_give_every_quantity() -> None:
    samples = probe_of(built("transformer", d_model=8, n_layers=1, n_heads=1), new_tokens=2).sample()
    found = {(sample.quantity, sample.at["clock"]) for sample in samples}
    assert found == {(quantity, clock) for quantity in METRIC.quantities for clock in ("wall", "cpu")}
    assert all(sample.value > 0 for sample in samples)


def test_prompts_are_fresh_and_the_same_for_every_subject() -> None:
    first, second = Sleeper(), Sleeper()
    for model in (first, second):
        probe = probe_of(subject_of(model), new_tokens=1)
        for _ in range(3):
            probe.sample()
    for before, after in zip(first.prompts, first.prompts[1:], strict=False):
        rows = {tuple(row) for row in before.tolist()}
        assert not rows & {tuple(row) for row in after.tolist()}
    assert all(torch.equal(a, b) for a, b in zip(first.prompts, second.prompts, strict=True))
    assert first.prompts[0].shape == (3, 8)


def test_garbage_is_not_collected_while_the_clock_runs() -> None:
    model = Sleeper()
    probe_of(subject_of(model), new_tokens=1).sample()
    assert not any(model.collecting)
    assert gc.isenabled()


def test_levels_take_turns_and_each_record_says_what_ran() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1)
    settings = LatencySettings(contexts=(8,), batches=(1,), new_tokens=4, repeats=1, levels=("reference", "lean"))
    found = interleave(METRIC, {"a": subject}, settings)["a"]
    assert not isinstance(found, Exception)
    ran = {(m.at["level"], m.backend["decode"]) for m in found if m.quantity == "time_per_token"}
    assert ran == {("reference", "reference"), ("lean", "lean")}
    assert backends.VARIABLE not in os.environ


def test_a_level_that_a_model_lacks_is_a_reason() -> None:
    subject = built("mtp", d_model=8, n_layers=3, n_heads=1, n_future=2, head_type="sequential")
    settings = LatencySettings(contexts=(8,), batches=(1,), levels=("native", "best"))
    found = METRIC.probes(subject, settings)
    refused = [m for m in found if isinstance(m, Measurement)]
    assert refused and all("heads of type sequential" in m.reason and m.at["level"] == "native" for m in refused)
    assert [probe.at["level"] for probe in found if isinstance(probe, Probe)] == ["best"]


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="naive: no such level"):
        LatencySettings(levels=("naive",))
    with pytest.raises(ConfigError, match="name at least one"):
        LatencySettings(levels=())


def test_the_grid_and_the_context_limit() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=20)
    found = METRIC.probes(subject, LatencySettings(contexts=(8, 16), batches=(1, 2), new_tokens=4))
    assert [dict(p.at) for p in found if isinstance(p, Probe)] == [
        {"context": 8, "batch": 1, "level": "best"},
        {"context": 8, "batch": 2, "level": "best"},
    ]
    missing = [m for m in found if isinstance(m, Measurement)]
    assert len(missing) == 2 * 3 * 2
    assert all(m.value is None and "context limit is 20" in m.reason for m in missing)
    for probe in found:
        if isinstance(probe, Probe):
            probe.sample()


def test_prompts_beyond_the_heldout_text_have_a_reason() -> None:
    found = METRIC.probes(subject_of(Sleeper(), text=b"a few words"), LatencySettings(contexts=(100,), batches=(1,)))
    assert all(isinstance(m, Measurement) and "held-out text has 12 tokens" in m.reason for m in found)


def test_prompts_are_padded_to_whole_strides() -> None:
    model = Sleeper()
    probe_of(subject_of(model, stride=3), contexts=(7,), new_tokens=1).sample()
    assert model.prompts[0].shape == (3, 9)


@pytest.mark.parametrize("bad", ({"contexts": ()}, {"batches": (0,)}, {"new_tokens": 0}, {"temperature": -1.0}))
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LatencySettings(**bad)
