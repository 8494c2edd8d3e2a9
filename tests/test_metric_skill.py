"""The skill metric on models whose answers are known: one that copies up to a certain length, and one of ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_subject import built, subject_of
from torch import Tensor

from archbench.errors import ConfigError, UnsupportedError
from archbench.exercise import Exercise, Stage
from archbench.history import History, Point
from archbench.metric import Measurement, Subject
from archbench.metrics.skill import METRIC, SkillSettings
from archbench.model import Likelihood, SequenceModel, Traits
from archbench.stats import wilson_interval

RECALL = Exercise(name="multi_query_recall", settings={"pairs": 4, "keys": 8, "values": 8, "fillers": 4}, stages=(
    Stage(context=16, settings={"pairs": 2}), Stage(context=24),
))  # fmt: skip
COPYING = Exercise(name="selective_copying", settings={"items": 3, "values": 5}, stages=(Stage(context=12),))


class Reader(SequenceModel, Likelihood):
    """Knows all it has read, of which its state holds the last `memory` tokens, and answers by `rule`."""

    vocab_size = 256
    device = torch.device("cpu")

    def __init__(self, memory: int) -> None:
        super().__init__()
        self.memory = memory
        self.longest_score = 0

    phases = decode_step = flops = lambda *_: pytest.fail("not asked for")

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 0, dtype=torch.long)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        return torch.cat([state, tokens], dim=1)[:, -self.memory :].clone()

    def score(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.longest_score = max(self.longest_score, tokens.shape[1])
        log_probs = torch.full((*tokens.shape, 256), -100.0)
        for row in range(len(tokens)):
            read = state[row].tolist()
            for place, token in enumerate(tokens[row].tolist()):
                log_probs[row, place, self.rule(read[-self.memory :])] = 0.0
                read.append(token)
        return log_probs, self.prefill(tokens, state)

    def rule(self, read: list[int]) -> int:
        raise NotImplementedError


class Recaller(Reader):
    """Says what followed the last token the first time."""

    def rule(self, read: list[int]) -> int:
        return read[read.index(read[-1]) + 1] if read.count(read[-1]) > 1 else 0


class Copier(Reader):
    """Copies items (ids 1 to 5), as many after the marker (7) as it was asked for, until `stop`."""

    stop = 3

    def rule(self, read: list[int]) -> int:
        if 7 not in read:
            return 0
        said = len(read) - read.index(7) - 1
        items = [token for token in read[: read.index(7)] if token <= 5]
        return items[said] if said < min(len(items), self.stop) else 0


def subject(model: SequenceModel, exercise: Exercise | None, history: History | None = None, **traits: Any) -> Subject:
    return dataclasses.replace(subject_of(model, history=history, **traits), exercise=exercise)


def measured(subject: Subject, **settings: Any) -> dict[tuple[str, int], Measurement]:
    found = METRIC.measure(subject, SkillSettings(**{"examples": 24, "batch": 7, **settings}))
    return {(m.quantity, int(m.at.get("length", 0))): m for m in found}


def test_a_perfect_model_is_perfect_at_every_length() -> None:
    found = measured(subject(Recaller(memory=10_000), RECALL))
    for length in (24, 48, 96, 192):
        accuracy, exact = found["accuracy", length], found["exact_match", length]
        assert (accuracy.value, exact.value) == (1.0, 1.0)
        assert (accuracy.low, accuracy.high) == (wilson_interval(24, 24).low, 1.0)
        assert dict(accuracy.at) == {"task": "multi_query_recall", "length": length}
        assert found["chance", length].value == pytest.approx(1 / 8)


def test_a_model_that_remembers_so_many_tokens_fails_beyond_them() -> None:
    found = measured(subject(Recaller(memory=30), RECALL), multiples=(1, 2, 8), examples=80)
    assert found["accuracy", 24].value == 1.0
    assert 0.2 < (found["accuracy", 48].value or 0) < 1.0
    assert (found["accuracy", 192].value or 0) < (found["accuracy", 48].value or 0)
    assert (found["exact_match", 192].value or 0) < 0.25  # texts whose queries all come soon


def test_tokens_and_texts_are_counted_apart() -> None:
    """Two of three items right: two thirds of the tokens, and no text."""
    model = Copier(memory=1000)
    model.stop = 2
    found = measured(subject(model, COPYING), lengths=(12, 20))
    for length in (12, 20):
        accuracy, exact = found["accuracy", length], found["exact_match", length]
        assert accuracy.value == pytest.approx(2 / 3)
        assert list(accuracy.samples) == pytest.approx([2 / 3] * 24)
        assert (accuracy.low, accuracy.high) == wilson_interval(16, 24)[:2]
        assert exact.value == 0.0 and list(exact.samples) == [0.0] * 24
        assert found["chance", length].value == pytest.approx(1 / 5)
    assert measured(subject(Copier(memory=1000), COPYING))["exact_match", 12].value == 1.0


def test_only_what_comes_after_the_first_answer_is_scored() -> None:
    model = Copier(memory=1000)
    measured(subject(model, COPYING), lengths=(90,))
    assert model.longest_score == 3


def test_the_state_is_weighed_after_a_whole_text() -> None:
    found = measured(subject(Copier(memory=15), COPYING), lengths=(12, 14, 40))
    assert [found["state_bytes", length].value for length in (12, 14, 40)] == [12 * 8, 14 * 8, 15 * 8]


def test_the_questions_are_those_of_the_last_stage_and_the_same_for_all() -> None:
    asked: list[list[int]] = []

    class Spy(Recaller):
        def score(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            asked[-1] += torch.cat([state, tokens], dim=1).flatten().tolist()
            return super().score(tokens, state)

    for _ in range(2):
        asked.append([])
        found = measured(subject(Spy(memory=1000), RECALL), multiples=(1,))
    assert asked[0] == asked[1]
    assert len(set(asked[0])) > 12
    assert "stage" not in found["accuracy", 24].protocol
    asked.append([])
    measured(dataclasses.replace(subject(Spy(memory=1000), RECALL), seed=1), multiples=(1,))
    assert asked[2] != asked[0]


def test_the_protocol_says_length_stage_and_number() -> None:
    point = Point(
        phase="next_token", step=9, tokens=9, bytes=9.0, flops=9.0, seconds=1.0, cpu_seconds=1.0, loss=0.1,
        learning_rate=1e-3, parts={"stage": 2.0, "exact": 0.9},
    )  # fmt: skip
    found = measured(subject(Recaller(memory=99), RECALL, history=History(points=[point])), multiples=(1,))
    assert found["accuracy", 24].protocol == (
        "24 test texts of 24 tokens; trained on texts of up to 24, stage 2 of 2 reached"
    )


def test_a_cell_that_was_trained_on_no_task_has_a_reason() -> None:
    found = list(METRIC.measure(subject(Recaller(memory=9), None), SkillSettings()))
    assert {m.quantity for m in found} == set(METRIC.quantities)
    assert all(m.value is None and "not on a task" in m.reason for m in found)


def test_texts_that_cannot_be_asked_have_a_reason() -> None:
    found = measured(subject(Copier(memory=99), COPYING, context_limit=20), lengths=(6, 12, 21))
    assert "at least 7 tokens" in found["accuracy", 6].reason
    assert found["accuracy", 12].value == 1.0
    assert "limit is 20" in found["exact_match", 21].reason
    assert all(found[quantity, 21].value is None for quantity in METRIC.quantities)


def test_models_without_likelihood_cannot() -> None:
    assert METRIC.cannot(Traits(likelihood=True), SkillSettings()) is None
    assert "no likelihood" in (METRIC.cannot(Traits(likelihood=False), SkillSettings()) or "")

    class Mute(SequenceModel):
        phases = initial_state = prefill = decode_step = flops = lambda *_: pytest.fail("asked")

    with pytest.raises(UnsupportedError, match="no likelihood"):
        list(METRIC.measure(subject(Mute(), COPYING), SkillSettings()))


@pytest.mark.parametrize("architecture", ["transformer", "mamba"])
def test_an_untrained_model_of_ours_is_no_better_than_chance(architecture: str) -> None:
    cell = built(architecture, d_model=16, n_layers=1)
    found = measured(dataclasses.replace(cell, exercise=COPYING), multiples=(1, 2))
    for length in (12, 24):
        assert (found["accuracy", length].value or 0.0) < 0.5
        assert (found["state_bytes", length].value or 0.0) > 0


def test_passkeys_are_asked_like_any_other_task() -> None:
    exercise = Exercise(name="passkey", settings={"digits": 2, "intro": False}, stages=(Stage(context=200),))
    cell = built("transformer", d_model=8, n_layers=1, n_heads=1)
    found = measured(dataclasses.replace(cell, exercise=exercise), multiples=(1,), examples=4)
    assert found["accuracy", 200].value is not None
    assert found["chance", 200].value == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    "bad", [{"multiples": ()}, {"multiples": (0,)}, {"lengths": ()}, {"examples": 0}, {"batch": 0}]
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"skill.{next(iter(bad))}"):
        SkillSettings(**bad)
