"""The speculation metric on models that write a known number of tokens a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_subject import built, subject_of
from torch import Generator, Tensor

from archbench.errors import ConfigError
from archbench.metric import Measurement, Subject
from archbench.metrics.speculation import METRIC, SpeculationSettings
from archbench.model import Emission, FlopFormulas, Phase, SequenceModel
from archbench.sampling import Sampling


class Writer(SequenceModel):
    """Writes the counts of `cycle` in turn, each row beginning one further on, a row per prompt; the tokens count up.

    Greedy it follows the cycle; sampling it always writes one token. The state is (step, last token) of each row.
    """

    vocab_size = 256

    def __init__(self, cycle: tuple[int, ...], period: int = 250) -> None:
        super().__init__()
        self.register_buffer("cycle", torch.tensor(cycle))
        self.period = period
        self.steps: list[int] = []

    def phases(self) -> list[Phase]:
        raise NotImplementedError

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.stack([torch.arange(batch_size), torch.zeros(batch_size, dtype=torch.long)], dim=1)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        return state

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        self.steps.append(len(state))
        width = int(self.cycle.max())
        counts = self.cycle[state[:, 0] % len(self.cycle)] if sampling.greedy else torch.ones(len(state)).long()
        tokens = 1 + (state[:, 1:] + torch.arange(width)) % self.period
        state = torch.stack([state[:, 0] + 1, state[:, 1] + counts], dim=1)
        return Emission(tokens, counts, state)


def measured(subject: Subject, **settings: Any) -> dict[tuple[str, str, int], Measurement]:
    options: dict[str, Any] = {"prompts": 4, "context": 8, "new_tokens": 24, "text_steps": 6, "batch": 2, **settings}
    found = METRIC.measure(subject, SpeculationSettings(**options))
    return {(m.quantity, str(m.at["sampling"]), int(m.at.get("position", 0))): m for m in found}


def test_counts_are_averaged_over_steps_not_over_tokens() -> None:
    found = measured(subject_of(Writer((1, 3))))
    greedy = found["tokens_per_step", "greedy", 0]
    assert greedy.value == 2.0
    assert list(greedy.samples) == [2.0] * 4
    assert (greedy.low, greedy.high) == (2.0, 2.0)
    assert found["acceptance", "greedy", 1].value == 1.0
    assert found["acceptance", "greedy", 2].value == 0.5
    assert found["acceptance", "greedy", 3].value == 0.5
    assert ("acceptance", "greedy", 4) not in found
    assert found["tokens_per_step", "temperature 1", 0].value == 1.0
    assert found["acceptance", "temperature 1", 2].value == 0.0


def test_the_sum_of_acceptances_is_the_tokens_per_step() -> None:
    found = measured(subject_of(Writer((1, 4, 2, 2, 1))), new_tokens=31)
    parts = [m.value for (quantity, label, _), m in found.items() if (quantity, label) == ("acceptance", "greedy")]
    assert sum(part for part in parts if part is not None) == pytest.approx(found["tokens_per_step", "greedy", 0].value)


def test_the_last_step_counts_whole_and_rows_that_are_done_leave() -> None:
    model = Writer((4, 1, 1, 1, 1, 1, 1))
    found = measured(subject_of(model), new_tokens=5, temperatures=(0.0,), prompts=2)
    # Row 0 needs the steps 4, 1; row 1 begins one further on and needs five steps of one token.
    assert found["tokens_per_step", "greedy", 0].value == pytest.approx(10 / 7)
    assert model.steps[:5] == [2, 2, 1, 1, 1]


def test_a_last_group_beyond_the_number_asked_for_is_not_cut() -> None:
    found = measured(subject_of(Writer((4,))), new_tokens=6)
    assert found["tokens_per_step", "greedy", 0].value == 4.0


def test_plain_decoding_writes_one_token_a_step() -> None:
    found = measured(built("transformer", d_model=8, n_layers=1, n_heads=1), new_tokens=10)
    for label in ("greedy", "temperature 1"):
        assert found["tokens_per_step", label, 0].value == 1.0
        assert found["acceptance", label, 1].value == 1.0
        assert ("acceptance", label, 2) not in found
    assert found["tokens_per_step_on_text", "greedy", 0].value == 1.0


def test_a_model_with_a_stride_writes_its_stride() -> None:
    found = measured(subject_of(Writer((3,)), stride=3), context=7)
    assert found["tokens_per_step", "greedy", 0].value == 3.0
    assert found["tokens_per_step_on_text", "greedy", 0].value == 3.0


def test_along_text_every_step_starts_from_the_text() -> None:
    """The writer's own steps are not read, so each row stays at its place of the cycle: 1, 3, 1, 3."""
    found = measured(subject_of(Writer((1, 3))), batch=4)
    steps = found["tokens_per_step_on_text", "greedy", 0]
    assert list(steps.samples) == [1.0, 3.0, 1.0, 3.0]
    assert steps.value == 2.0
    assert steps.low is not None and steps.low < 2.0 < (steps.high or 0)


@pytest.mark.parametrize(("period", "share"), [(250, 17 / 34), (1, 1 / 34), (5, 5 / 34)])
def test_loops_show_in_distinct_8grams(period: int, share: float) -> None:
    """Two prompts of 24 tokens hold 17 8-grams each, the same in both."""
    found = measured(subject_of(Writer((1,), period=period)), prompts=2)
    assert found["distinct_8grams", "greedy", 0].value == pytest.approx(share)


def test_texts_too_short_for_an_8gram_have_a_reason() -> None:
    found = measured(subject_of(Writer((1,))), new_tokens=7)
    assert found["distinct_8grams", "greedy", 0].value is None
    assert "speculation.new_tokens" in found["distinct_8grams", "greedy", 0].reason


def test_a_context_limit_is_a_reason_not_an_overflow() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=20)
    found = measured(subject)
    assert all(m.value is None and "context limit is 20" in m.reason for m in found.values())
    assert measured(subject, new_tokens=10)["tokens_per_step", "greedy", 0].value == 1.0


@pytest.mark.parametrize("bad", [{"prompts": 0}, {"temperatures": ()}, {"temperatures": (-1.0,)}, {"text_steps": 0}])
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SpeculationSettings(**bad)
