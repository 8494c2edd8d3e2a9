"""The curriculum: stages advance with success, rows are as they should be, and an interrupted one ends alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.cell import Budget, Training
from archbench.codec import BOUNDARY_ID, ByteCodec
from archbench.curriculum import MEMORY, Curriculum, Lesson
from archbench.data.corpus import Corpus
from archbench.errors import CheckpointError, ConfigError, SuiteError
from archbench.exercise import Exercise, Stage, parse_exercise
from archbench.task import Example, Generator, Split
from archbench.train import Progress, train

torch.set_num_threads(1)

NO_TEXT = Corpus(name="none", train=(), heldout=(), sha256="")
ANSWER = 7


class Easy(Generator):
    """Any tokens but the last, which is always 7; the first half is idle."""

    shortest, chance = 2, 0.0

    def draw(self, length: int, split: Split, rng: np.random.Generator) -> Example:
        tokens = rng.integers(10, 30, length)
        tokens[-1] = ANSWER
        place = np.arange(length)
        return Example(tokens=tokens, answer=place == length - 1, idle=place < length // 2)


def curriculum(*lessons: Lesson, advance: float = 0.9, seed: int = 0) -> Curriculum:
    given = lessons or (lesson(8), lesson(16), lesson(32))
    return Curriculum(
        given, tokens_per_step=64, advance=advance, seed=seed, token_bytes=np.r_[0, np.ones(31, dtype=np.int64)]
    )


def lesson(context: int, **more: Any) -> Lesson:
    return Lesson(generator=Easy(), context=context, **more)


def told(examples: Curriculum, exact: float, times: int = 1) -> None:
    for _ in range(times):
        examples.told({"exact": torch.tensor(exact)})


def test_a_stage_ends_when_the_running_mean_passes() -> None:
    examples = curriculum(advance=0.5)
    steps = 0
    while examples.stage == 0:
        told(examples, 1.0)
        steps += 1
    assert 1 - MEMORY**steps > 0.5 >= 1 - MEMORY ** (steps - 1)
    assert (examples.context, examples.n_rows, examples.exact) == (16, 4, 0.0)
    told(examples, 0.4, 500)  # not enough, however long
    assert examples.stage == 1
    told(examples, 1.0, 500)
    assert (examples.stage, examples.context, examples.n_rows) == (2, 32, 2)  # the last goes on


def test_rows_are_a_boundary_a_text_and_boundaries() -> None:
    examples = curriculum(lesson(8))
    tokens, weights, repeats = examples.rows_at(0, lookahead=3)
    assert tokens.shape == (8, 11) and weights is not None and repeats is None
    assert (tokens[:, 0] == BOUNDARY_ID).all() and (tokens[:, 9:] == BOUNDARY_ID).all()
    assert (tokens[:, 8] == ANSWER).all() and (tokens[:, 1:8] >= 10).all()
    assert (weights.nonzero()[:, 1] == 8).all() and weights.sum() == 8
    assert examples.bytes_at(0) == 64


def test_rows_depend_on_seed_step_and_stage_alone() -> None:
    one, again, other = curriculum(), curriculum(), curriculum(seed=1)
    assert torch.equal(one.rows_at(3, 1).tokens, again.rows_at(3, 1).tokens)
    assert not torch.equal(one.rows_at(3, 1).tokens, one.rows_at(4, 1).tokens)
    assert not torch.equal(one.rows_at(3, 1).tokens, other.rows_at(3, 1).tokens)
    assert one.bytes_at(9) == 64  # rows of a step not asked for before


def test_replay_repeats_whole_idle_blocks_counted_from_the_boundary() -> None:
    """With blocks of 8, a text of 64 behind its boundary has idle tokens 1 to 32: blocks 1 to 3 are all idle."""
    examples = curriculum(lesson(64, replay=1000.0, block=8))
    factors = []
    for step in range(300):
        _, _, repeats = examples.rows_at(step, lookahead=1)
        assert repeats is not None and repeats.shape == (1, 65)
        blocks = repeats[0, :64].view(8, 8)
        assert (blocks == blocks[:, :1]).all()
        assert (blocks[0] == 1).all() and (blocks[4:] == 1).all() and repeats[0, 64] == 1
        factors += blocks[1:4, 0].tolist()
    logs = np.log(factors) / np.log(1000)
    assert logs.min() >= 0 and logs.max() <= 1
    assert logs.mean() == pytest.approx(0.5, abs=0.05)
    assert np.quantile(logs, 0.1) == pytest.approx(0.1, abs=0.04)


def test_stages_of_one_curriculum_may_replay_or_not() -> None:
    examples = curriculum(lesson(16), lesson(16, replay=10.0, block=4))
    assert examples.rows_at(0, 1).repeats is None
    told(examples, 1.0, 100)
    assert examples.rows_at(0, 1).repeats is not None


def test_a_position_of_another_curriculum_is_refused() -> None:
    with pytest.raises(CheckpointError, match="of stage 5; there are 3"):
        curriculum().go_to({"stage": 5, "exact": 0.0})


CONFIG = TransformerConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=1, d_ffn=16)
TRAINING = Training(budget=Budget(tokens=64 * 90), context=32, batch=2, precision="fp32", learning_rate=1e-2)


def learn(
    folder: Path, seed: int = 0, notify: Callable[[Progress], None] = lambda _p: None, save_every_s: float = 99.0
) -> tuple[Transformer, Any]:
    model = Transformer(CONFIG, torch.Generator().manual_seed(seed))
    examples = curriculum(lesson(8), lesson(16, replay=1.0), lesson(32), advance=0.8)
    return model, train(model, examples, TRAINING, seed=0, folder=folder, notify=notify, save_every_s=save_every_s)


def test_training_goes_through_the_stages_and_says_so(tmp_path: Path) -> None:
    model, history = learn(tmp_path)
    stages = [point.parts["stage"] for point in history.points]
    assert stages == sorted(stages) and set(stages) == {1.0, 2.0, 3.0}
    assert history.last.parts["exact"] == 1.0
    assert history.last.tokens == 64 * 90  # every stage reads as many a step
    flops = {context: model.flops().training(context) for context in (8, 16, 32)}
    by_stage = {1.0: 8 * flops[8], 2.0: 4 * flops[16], 3.0: 2 * flops[32]}
    assert history.last.flops == pytest.approx(sum(by_stage[stage] for stage in stages), rel=0.02)


@pytest.mark.parametrize("stop_in", [1, 2, 3])
def test_an_interrupted_curriculum_ends_with_the_same_weights(tmp_path: Path, stop_in: int) -> None:
    class Killed(Exception):
        pass

    whole, expected = learn(tmp_path / "whole")
    changes = [i for i, p in enumerate(expected.points) if p.parts["stage"] == stop_in]
    seen = 0

    def kill(_progress: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == changes[0] + 3:
            raise Killed

    with pytest.raises(Killed):
        learn(tmp_path / "half", notify=kill, save_every_s=0)
    resumed, found = learn(tmp_path / "half", seed=99)
    assert found.sessions == 2
    assert [(p.step, p.loss, p.parts) for p in found.points] == [(p.step, p.loss, p.parts) for p in expected.points]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


# As a suite writes it down.


def test_an_exercise_becomes_lessons_with_settings_replaced_one_by_one() -> None:
    exercise = parse_exercise(
        {
            "name": "passkey",
            "settings": {"digits": 3, "far": 0.2},
            "stages": [{"context": 128, "settings": {"intro": False}}, {"context": 512, "replay": 3e4}],
        },
        "here",
    )
    first, second = exercise.lessons(ByteCodec(), NO_TEXT)
    assert (first.context, first.replay, second.context, second.replay, second.block) == (128, 1.0, 512, 3e4, 128)
    assert (first.generator.settings.digits, first.generator.settings.intro) == (3, False)  # type: ignore[attr-defined]
    assert (second.generator.settings.far, second.generator.settings.intro) == (0.2, True)  # type: ignore[attr-defined]
    assert exercise.context == 512


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "passkey"}, r"here\.stages: found None; expected a list"),
        ({"name": "passkey", "stages": []}, "stages: found none"),
        ({"name": "passkey", "stages": [{"context": 128, "replays": 3}]}, r"here\.stages\[0\]\.replays: unknown key"),
        ({"name": "passkey", "stages": [{"context": 128, "replay": 0.5}]}, r"stages\.replay: 0\.5"),
        ({"name": "passkey", "stages": [{"context": 128}], "advance": 1.0}, "advance: 1.0"),
        ([], "expected a mapping"),
    ],
)
def test_what_is_no_exercise_is_refused_with_the_place(data: Any, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        parse_exercise(data, "here")


def test_a_stage_too_short_for_its_texts_is_refused() -> None:
    exercise = Exercise(name="passkey", stages=(Stage(context=100),))
    with pytest.raises(ConfigError, match=r"stages\[0\]\.context: 100; texts of task passkey have at least \d+"):
        exercise.lessons(ByteCodec(), NO_TEXT)
