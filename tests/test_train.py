"""The trainer: budgets, phases, precision, determinism, resumption, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.cell import Budget, Training
from archbench.checkpoint import PARTIAL
from archbench.data.windows import TokenStream, Windows
from archbench.errors import CheckpointError, TrainingError
from archbench.model import Loss, ParameterGroup, Phase
from archbench.train import schedule, train

CONFIG = TransformerConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=1, d_ffn=16)


def windows(context=16, batch=4):
    period = np.tile(np.arange(1, 31, dtype=np.uint8), 200)
    return Windows(TokenStream(period, len(period), np.r_[0, np.ones(31, dtype=np.int64)]), context, batch, seed=0)


def model(seed=0):
    return Transformer(CONFIG, torch.Generator().manual_seed(seed))


def training(**changes):
    return Training(
        **{"budget": Budget(tokens=64 * 60), "context": 16, "batch": 4, "precision": "fp32", "learning_rate": 1e-2}
        | changes
    )


def weights(trained):
    return torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])


def test_training_learns_and_spends_its_budget(tmp_path):
    trained = model()
    history = train(trained, windows(), training(), seed=0, folder=tmp_path)
    assert history.last.tokens == 64 * 60
    assert history.last.bytes == 64 * 60
    assert history.last.step == 60
    assert history.last.flops == pytest.approx(60 * 4 * trained.flops().training(16))
    assert history.points[0].loss == pytest.approx(math.log(32), rel=0.1)
    assert history.last.loss < 1.0
    assert not trained.training


@pytest.mark.parametrize("unit", ["bytes", "tokens", "flops", "seconds"])
def test_every_budget_ends_training(tmp_path, unit):
    amount = {"bytes": 640, "tokens": 640, "flops": 40 * model().flops().training(16), "seconds": 0.2}[unit]
    history = train(model(), windows(), training(budget=Budget(**{unit: amount})), seed=0, folder=tmp_path)
    if unit == "seconds":  # the last point may fall a step before the end
        assert 0.9 * amount <= history.last.seconds < 2 * amount
    else:
        assert getattr(history.last, unit) == pytest.approx(amount)
        assert history.last.step == 10


def test_equal_seeds_give_equal_weights(tmp_path):
    first, second, other = model(), model(), model()
    train(first, windows(), training(), seed=0, folder=tmp_path / "a")
    train(second, windows(), training(), seed=0, folder=tmp_path / "b")
    train(other, Windows(windows().stream, 16, 4, seed=1), training(), seed=1, folder=tmp_path / "c")
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_quick_kernels_train_as_the_equations_do(tmp_path, monkeypatch):
    """The attention and the steps of the trainer, against attention written out: equal losses within rounding."""
    losses = []
    for level in ("reference", "lean"):
        monkeypatch.setenv("ARCHBENCH_BACKEND", level)
        history = train(model(), windows(), training(), seed=0, folder=tmp_path / level)
        assert history.backend["attention"] == level
        losses.append([point.loss for point in history.points])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("stop_after", [1, 17, 59])
def test_an_interrupted_training_ends_with_the_same_weights_and_log(tmp_path, stop_after):
    class Killed(Exception):
        pass

    whole = model()
    expected = train(whole, windows(), training(), seed=0, folder=tmp_path / "whole")
    seen = 0

    def kill(_progress):
        nonlocal seen
        seen += 1
        if seen == stop_after + 1:
            raise Killed

    half = model()
    with pytest.raises(Killed):
        train(half, windows(), training(), seed=0, folder=tmp_path / "half", notify=kill, save_every_s=0)
    resumed = model(seed=99)  # its own weights must not matter
    found = train(resumed, windows(), training(), seed=0, folder=tmp_path / "half", save_every_s=0)
    assert found.sessions == 2
    assert torch.equal(weights(resumed), weights(whole))
    assert [(p.step, p.loss, p.tokens) for p in found.points] == [(p.step, p.loss, p.tokens) for p in expected.points]


class TwoPhases(Transformer):
    """Trains its embedding first, then the rest; notes what it was given."""

    def phases(self):
        self.seen = []
        embedding = [self.embedding.weight]
        rest = [p for p in self.parameters() if p is not embedding[0]]

        def loss(batch):
            self.seen.append((batch.progress, self.embedding.weight.requires_grad))
            return Loss(self.next_token_loss(batch).value, {"half": torch.tensor(0.5)})

        return [
            Phase(name="a", share=0.25, groups=[ParameterGroup(name="e", parameters=embedding)], loss=loss),
            Phase(name="b", share=0.75, groups=[ParameterGroup(name="r", parameters=rest, lr_scale=0.5)], loss=loss),
        ]


def test_phases_share_the_budget_and_freeze_what_is_not_theirs(tmp_path):
    trained = TwoPhases(CONFIG, torch.Generator().manual_seed(0))
    before = trained.embedding.weight.detach().clone()
    history = train(trained, windows(), training(), seed=0, folder=tmp_path)
    assert [p.phase for p in history.points] == ["a"] * 15 + ["b"] * 45
    assert [grad for _, grad in trained.seen] == [True] * 15 + [False] * 45
    assert trained.seen[0][0] == 0
    assert trained.seen[15][0] == 0
    assert all(0 <= progress < 1 for progress, _ in trained.seen)
    assert not torch.equal(before, trained.embedding.weight)
    assert history.last.parts == {"half": 0.5}


def test_a_phase_interrupted_at_its_border_goes_on_with_the_next(tmp_path):
    class Killed(Exception):
        pass

    expected = TwoPhases(CONFIG, torch.Generator().manual_seed(0))
    train(expected, windows(), training(), seed=0, folder=tmp_path / "whole")

    def kill(progress):
        if progress.phase == "b":
            raise Killed

    with pytest.raises(Killed):
        train(
            TwoPhases(CONFIG, torch.Generator().manual_seed(0)),
            windows(),
            training(),
            seed=0,
            folder=tmp_path / "half",
            notify=kill,
            save_every_s=0,
        )
    resumed = TwoPhases(CONFIG, torch.Generator().manual_seed(5))
    train(resumed, windows(), training(), seed=0, folder=tmp_path / "half", save_every_s=0)
    assert torch.equal(weights(resumed), weights(expected))


def test_weight_decay_and_rates_follow_the_groups(tmp_path):
    class Still(Transformer):
        def next_token_loss(self, batch):
            return Loss(0.0 * super().next_token_loss(batch).value)

    still = Still(CONFIG, torch.Generator().manual_seed(0))
    matrix, gain = still.blocks[0].attention.qkv.weight.detach().clone(), still.norm.weight.detach().clone()
    train(still, windows(), training(weight_decay=1.0, learning_rate=0.01), seed=0, folder=tmp_path)
    shrunk = (still.blocks[0].attention.qkv.weight.detach() / matrix).median()
    rates = [0.01 * schedule(step / 60, 0.05, 0.03) for step in range(60)]
    assert float(shrunk) == pytest.approx(float(np.prod([1 - rate for rate in rates])), rel=1e-4)
    assert torch.equal(still.norm.weight, gain)


def test_a_loss_that_is_not_finite_stops_with_the_place(tmp_path):
    class Exploding(Transformer):
        def next_token_loss(self, batch):
            return Loss(super().next_token_loss(batch).value * (float("nan") if batch.progress > 0.5 else 1.0))

    with pytest.raises(TrainingError, match=r"phase next_token, step 3[01]: the (loss|gradient) is"):
        train(Exploding(CONFIG, torch.Generator().manual_seed(0)), windows(), training(), seed=0, folder=tmp_path)


def test_a_damaged_partial_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / PARTIAL).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"partial\.safetensors: damaged"):
        train(model(), windows(), training(), seed=0, folder=tmp_path)


def test_auto_precision_says_why(tmp_path):
    history = train(model(), windows(), training(precision="auto"), seed=0, folder=tmp_path)
    assert history.precision in ("fp32", "bf16-mixed")
    assert "probe: bf16 steps run at" in history.precision_reason
    assert history.matmul_peak > 1e8


def test_bf16_stays_near_fp32(tmp_path):
    wide, narrow = model(), model()
    exact = train(wide, windows(), training(), seed=0, folder=tmp_path / "a").points
    rounded = train(narrow, windows(), training(precision="bf16-mixed"), seed=0, folder=tmp_path / "b").points
    assert abs(exact[10].loss - rounded[10].loss) < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in narrow.parameters())


def test_schedule_warms_up_and_decays():
    assert schedule(0.0, 0.1, 0.03) > 0
    assert schedule(0.05, 0.1, 0.03) == pytest.approx(0.5)
    assert schedule(0.1, 0.1, 0.03) == 1
    assert schedule(1.0, 0.1, 0.03) == pytest.approx(0.03)
    assert schedule(0.0, 0.0, 0.03) == 1


def test_one_batch_can_be_learned_by_heart(tmp_path):
    """B10: 200 steps on one batch reach less than 0.1 nats."""

    class Same(Windows):
        def batch_at(self, step, lookahead=1):
            return super().batch_at(0, lookahead)

    random = np.random.default_rng(0).integers(1, 32, 5000).astype(np.uint8)
    stream = TokenStream(random, 5000, np.r_[0, np.ones(31, dtype=np.int64)])
    config = TransformerConfig(vocab_size=32, d_model=64, n_layers=2, n_heads=1)
    learner = Transformer(config, torch.Generator().manual_seed(0))
    budget = training(budget=Budget(tokens=200 * 64), weight_decay=0.0, learning_rate=5e-3)
    history = train(learner, Same(stream, 16, 4, seed=0), budget, seed=0, folder=tmp_path)
    assert history.last.loss < 0.1
    assert nn.utils.parameters_to_vector(learner.parameters()).isfinite().all()
