"""Conversions: a trained checkpoint becomes one of another architecture, and a suite's cell goes on from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench import checkpoint
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.cell import Cell
from archbench.codec import ByteCodec
from archbench.conversion import convert
from archbench.errors import ArchbenchError, CheckpointError, ConfigError, SuiteError
from archbench.model import SequenceModel
from archbench.plan import Plan, make_plan
from archbench.record import read
from archbench.run import Options, Outcome, run
from archbench.suite import load_suite

torch.set_num_threads(1)

SEGMENT = 6
CLOSED = {"segment": SEGMENT, "gate_init": -1e4}


def text(n: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (2, n), generator=Generator().manual_seed(seed))


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model.logits(model.hidden(tokens, model.initial_layers(tokens.shape[0]))[0])


@pytest.fixture(params=["plain", "grouped and tied"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Transformer's checkpoint."""
    options: dict[str, Any] = {"n_kv_heads": 2, "tie_embeddings": True} if request.param != "plain" else {}
    return saved(tmp_path / "trained", **options)


def saved(folder: Path, codec: bool = True, **options: Any) -> Path:
    config = TransformerConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=4, max_context=512, **options)
    model = Transformer(config, Generator().manual_seed(5))
    made_of = {"codec": ByteCodec() if codec else None, "origin": {}, "history": None}
    checkpoint.save(folder, "transformer", config, model.state_dict(), **made_of)
    return folder


@torch.no_grad()
def test_with_closed_gates_logits_are_the_transformers_inside_a_segment_and_local_beyond(trained: Path) -> None:
    convert(trained, "infini_attention", trained.with_name("infini"), CLOSED)
    convert(trained, "local", trained.with_name("local"), {"segment": SEGMENT})
    plain, infini, local = (checkpoint.load_model(trained.with_name(name)) for name in ("trained", "infini", "local"))
    tokens = text(4 * SEGMENT + 3)
    assert torch.equal(logits_of(infini, tokens), logits_of(local, tokens))
    for start in range(0, 4 * SEGMENT + 3, SEGMENT):
        segment = tokens[:, start : start + SEGMENT]
        # Equal up to the rounding of products whose shapes differ.
        inside = logits_of(infini, tokens)[:, start : start + SEGMENT]
        torch.testing.assert_close(inside, logits_of(plain, segment), rtol=0, atol=2e-5)


@torch.no_grad()
def test_gates_start_nearly_closed_and_learn(trained: Path) -> None:
    """The model keeps what it knows within a few percent, and a gradient reaches every gate."""
    convert(trained, "infini_attention", trained.with_name("infini"), {"segment": SEGMENT})
    convert(trained, "local", trained.with_name("local"), {"segment": SEGMENT})
    infini, local = (checkpoint.load_model(trained.with_name(name)) for name in ("infini", "local"))
    tokens = text(4 * SEGMENT)
    found, control = logits_of(infini, tokens), logits_of(local, tokens)
    assert 0 < (found - control).norm() / control.norm() < 0.05
    with torch.enable_grad():
        logits_of(infini, tokens)[:, -1].square().sum().backward()
    gates = [p.grad for name, p in infini.named_parameters() if name.endswith("gate")]
    assert len(gates) == 2
    assert all(gradient is not None and bool((gradient != 0).all()) for gradient in gates)


@torch.no_grad()
def test_a_converted_model_converts_again_and_keeps_its_gates(tmp_path: Path) -> None:
    convert(saved(tmp_path / "trained"), "local", tmp_path / "local", {"segment": SEGMENT})
    convert(tmp_path / "local", "infini_attention", tmp_path / "linear", {"gate_init": -0.5})
    convert(tmp_path / "linear", "infini_attention", tmp_path / "delta", {"update": "delta"})
    linear, delta = (checkpoint.load_model(tmp_path / name) for name in ("linear", "delta"))
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), delta.parameters(), strict=True))
    tokens = text(4 * SEGMENT)
    one, other = logits_of(linear, tokens), logits_of(delta, tokens)
    torch.testing.assert_close(one[:, : 2 * SEGMENT], other[:, : 2 * SEGMENT])  # linear on the first segment
    assert not torch.allclose(one[:, 2 * SEGMENT :], other[:, 2 * SEGMENT :])
    origin = json.loads((tmp_path / "delta" / checkpoint.ORIGIN).read_text())
    assert origin["converted"]["architecture"] == "infini_attention"
    assert origin["converted"]["sha256"] == checkpoint.weights_sha256(tmp_path / "linear")


def test_a_checkpoint_without_codec_converts_without(tmp_path: Path) -> None:
    convert(saved(tmp_path / "trained", codec=False), "infini_attention", tmp_path / "infini")
    assert not (tmp_path / "infini" / checkpoint.CODEC).exists()
    checkpoint.load_model(tmp_path / "infini")


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("mamba", {}, "--to mamba: cannot be made from transformer; it can from: none"),
        ("infini_atention", {}, "did you mean 'infini_attention'?"),
        ("infini_attention", {"segmnt": 3}, "--set.segmnt: unknown key; did you mean 'segment'?"),
        ("infini_attention", {"segment": 0}, "infini_attention.segment: 0; must be at least 1"),
        ("infini_attention", {"d_model": 32}, "the model's is"),
        ("local", {"update": "delta"}, "--set.update: unknown key"),
    ],
)
def test_what_cannot_be_converted_is_one_line(to: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "trained")
    with pytest.raises(ArchbenchError) as caught:
        convert(folder, to, tmp_path / "out", changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_written_over_itself_nor_read_half(tmp_path: Path) -> None:
    folder = saved(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="choose another folder by --out"):
        convert(folder, "local", tmp_path / "." / "trained")
    (folder / checkpoint.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        convert(folder, "local", tmp_path / "out")


def test_the_command_converts_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    saved(tmp_path / "trained")
    command = [sys.executable, "-m", "archbench.cli", "convert", "trained", "--to"]
    environment = {**os.environ, "COLUMNS": "200"}

    def go(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = go("infini_attention", "--set", "segment=32", "--set", "update=delta")
    assert done.returncode == 0, done.stderr
    assert "converted transformer to infini_attention" in done.stdout
    assert "(+8)" in done.stdout  # two layers of four gates
    name, config = checkpoint.load_config(tmp_path / "results" / "converted" / "trained-infini_attention")
    assert (name, config.segment, config.update, config.gate_init) == ("infini_attention", 32, "delta", -4.0)
    failed = go("mamba")
    assert failed.returncode == 2
    assert failed.stderr.startswith("archbench: --to mamba: cannot be made from transformer")
    assert failed.stderr.count("\n") == 1


SUITE = """
size: nano
training:
  budget: {bytes: 6_000}
  context: 48
  batch: 4
  learning_rate: 1e-3
  precision: fp32
seeds: [0]
cells:
  - {architecture: infini_attention, start_from: FOLDER}
metrics:
  training: {}
"""


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    def make(folder: Path, *settings: str, suite: str = SUITE) -> Plan:
        path = tmp_path / "mine.yaml"
        path.write_text(textwrap.dedent(suite).replace("FOLDER", str(folder)))
        return make_plan(load_suite(str(path), settings))

    return make


def test_a_cell_goes_on_from_a_checkpoint(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    """Its weights, not first ones: with nothing to learn they end as they were."""
    source = saved(tmp_path / "trained")
    convert(source, "infini_attention", tmp_path / "infini", {"segment": 16})
    plan = plan_of(tmp_path / "infini", "training.learning_rate=1e-12", "training.weight_decay=0")
    (cell,) = plan.cells
    assert (cell.config.segment, cell.config.d_model, cell.size) == (16, 16, "custom")
    outcome = go(plan, tmp_path / "out")
    assert set(outcome.statuses) == {"ok"}
    before = checkpoint.load_model(tmp_path / "infini")
    after = checkpoint.load_model(tmp_path / "out" / "checkpoints" / cell.address)
    assert names_of(before) == names_of(after)
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    config = read(outcome.path)[0].config
    assert config["start_from"] == str(tmp_path / "infini")
    assert config["start_sha256"] == checkpoint.weights_sha256(tmp_path / "infini")


def go(plan: Plan, out: Path) -> Outcome:
    return run(plan, Options(out=out, executor="inline"), lambda _event: None)


def names_of(model: SequenceModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_training_goes_on_and_opens_the_gates(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    convert(saved(tmp_path / "trained"), "infini_attention", tmp_path / "infini", {"segment": 16})
    plan = plan_of(tmp_path / "infini")
    assert set(go(plan, tmp_path / "out").statuses) == {"ok"}
    before = checkpoint.load_model(tmp_path / "infini")
    after = checkpoint.load_model(tmp_path / "out" / "checkpoints" / plan.cells[0].address)
    moved = {
        name: (one - other).abs().max().item()
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
    }
    assert min(moved.values()) > 0
    assert min(step for name, step in moved.items() if name.endswith("gate")) > 0.05


def test_the_start_is_part_of_what_a_cell_is(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    source = saved(tmp_path / "trained")
    for name, gate in (("a", -6.0), ("b", -6.0), ("c", -3.0)):
        convert(source, "infini_attention", tmp_path / name, {"gate_init": gate, "segment": 16})
    plans = {name: plan_of(tmp_path / name, "cells.0.model.gate_init=-6.0") for name in "abc"}
    keys = {name: plan.cells[0].key for name, plan in plans.items()}
    assert keys["a"] == keys["b"] != keys["c"]  # the weights, not the folder
    cell = plans["a"].cells[0]
    assert Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell


def test_cells_from_first_weights_keep_the_keys_they_had(plan_of: Callable[..., Plan]) -> None:
    suite = SUITE.replace("{architecture: infini_attention, start_from: FOLDER}", "architecture: transformer")
    (cell,) = plan_of(Path(), suite=suite).cells
    data = cell.to_dict()
    assert data.pop("start_from") is None
    assert data.pop("start_sha256") is None
    assert Cell.from_dict(data) == cell  # as written before cells could start from weights
    assert Cell.from_dict(data).key == cell.key


def test_weights_that_changed_after_planning_are_refused(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    source = saved(tmp_path / "trained")
    convert(source, "infini_attention", tmp_path / "infini", {"segment": 16})
    plan = plan_of(tmp_path / "infini")
    convert(source, "infini_attention", tmp_path / "infini", {"segment": 16, "gate_init": 1.0})
    outcome = go(plan, tmp_path / "out")
    assert set(outcome.statuses) == {"failed"}
    assert "has changed since the run was planned" in read(outcome.path)[0].reason


@pytest.mark.parametrize(
    ("folder", "setting", "message"),
    [
        ("nowhere", "", "cells[0].start_from: {}/nowhere/model.json: no such file"),
        ("trained", "", "holds a model of transformer; convert it first: `archbench convert {}/trained --to"),
        ("infini", "cells.0.size=micro", "cells[0].size: 'micro'; the checkpoint of start_from decides it"),
        ("infini", "codec=bpe-320", "was trained with codec bytes, the cell has bpe-320"),
        ("infini", "cells.0.model.segmnt=3", "cells[0].model.segmnt: unknown key; did you mean 'segment'?"),
    ],
)
def test_an_impossible_start_is_one_line_with_its_place(
    folder: str, setting: str, message: str, tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    convert(saved(tmp_path / "trained"), "infini_attention", tmp_path / "infini")
    with pytest.raises((SuiteError, ConfigError)) as caught:
        plan_of(tmp_path / folder, *([setting] if setting else []))
    assert message.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_shape_than_the_checkpoints_fails_by_name(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    convert(saved(tmp_path / "trained"), "infini_attention", tmp_path / "infini", {"segment": 16})
    outcome = go(plan_of(tmp_path / "infini", "cells.0.model.d_ffn=8"), tmp_path / "out")
    assert set(outcome.statuses) == {"failed"}
    assert "ffn.gate_up.weight is" in read(outcome.path)[0].reason
