"""Cells whose model comes from a checkpoint and is measured as it is, beside those that are trained."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tokenizers import Tokenizer, models

from archbench import checkpoint, pretrained, registry
from archbench.cell import Cell
from archbench.codec import ByteCodec, TokenizerCodec
from archbench.errors import SuiteError
from archbench.plan import make_plan
from archbench.record import read
from archbench.report import write_report
from archbench.run import Options, run
from archbench.suite import load_suite

SUITE = """
description: for tests
size: nano
corpus: made-up
training: {budget: {bytes: 9_000}, context: 32, batch: 8, precision: fp32}
seeds: [3, 4]
cells:
  - {architecture: transformer, label: trained}
  - {architecture: transformer, label: brought, pretrained: FOLDER}
metrics:
  likelihood: {max_bytes: 4096, max_document_bytes: 512}
  training: {}
"""


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as an import writes it: no training log."""
    architecture = registry.architecture("transformer")
    config = architecture.config(vocab_size=256, d_model=32, n_layers=2, n_heads=1)
    model = architecture.build(config, torch.Generator().manual_seed(0))
    origin = {"imported": {"folder": "x"}}
    place = tmp_path / "brought-1"
    checkpoint.save(place, "transformer", config, model.state_dict(), codec=ByteCodec(), origin=origin, history=None)
    return place


@pytest.fixture
def suite(tmp_path, folder):
    """Writes the suite with changes: pairs of text to replace."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text {number} of forty: " + "the state is what it keeps. " * 30)

    def make(*changes):
        text = SUITE.replace("made-up", f"dir:{texts}")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "tiny.yaml"
        path.write_text(text.replace("FOLDER", str(folder)))
        return path

    return make


def plan_of(path, settings=(), only=()):
    return make_plan(load_suite(str(path), settings), only)


def brought(path, settings=()):
    (cell,) = plan_of(path, settings, ["brought"]).cells
    return cell


def test_it_is_measured_beside_trained_cells_and_never_trained(suite, folder, tmp_path):
    plan = plan_of(suite())
    assert [(cell.label, cell.seed, cell.pretrained) for cell in plan.cells] == [
        ("trained", 3, False), ("trained", 4, False), ("brought", 3, True),
    ]  # fmt: skip
    assert [cell.label for cell in plan.trained_cells] == ["trained", "trained"]
    outcome = run(plan, Options(out=tmp_path / "out", executor="inline"))
    assert outcome.statuses == {"ok": 5, "unsupported": 1}
    assert outcome.trained == 2
    found = [record for record in read(outcome.path) if record.label == "brought"]
    (bits,) = [record for record in found if record.quantity == "bits_per_byte" and record.at["state"] == "reset"]
    assert bits.at["context"] == 32
    assert bits.value == pytest.approx(8, abs=0.5), "an untrained model of bytes"
    assert {record.status for record in found if record.metric == "training"} == {"unsupported"}
    assert "not trained here" in next(record.reason for record in found if record.metric == "training")
    assert bits.config["training"]["budget"]["bytes"] == 0
    assert (bits.size, bits.codec, bits.config["start_from"]) == ("41.6K", "bytes", str(folder))
    adopted = tmp_path / "out" / "checkpoints" / bits.checkpoint
    assert os.path.samefile(adopted / checkpoint.WEIGHTS, folder / checkpoint.WEIGHTS), "a second name, no copy"
    assert json.loads((adopted / checkpoint.ORIGIN).read_text())["cell"]["label"] == "brought"
    assert run(plan, Options(out=tmp_path / "out", executor="inline")).carried == 6


def test_the_report_is_written(suite, tmp_path):
    outcome = run(plan_of(suite(("[3, 4]", "[3]"))), Options(out=tmp_path / "out", executor="inline"))
    text = write_report(outcome.path, tmp_path / "report").markdown.read_text()
    assert "| brought" in text
    alone = run(plan_of(suite(), only=["brought"]), Options(out=tmp_path / "alone", executor="inline"))
    assert "brought" in write_report(alone.path, tmp_path / "report2").markdown.read_text()


def test_where_files_have_one_name_only_they_are_copied(suite, folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    cell = brought(suite())
    pretrained.adopt(cell, tmp_path / "here")
    ours, theirs = (place / checkpoint.WEIGHTS for place in (tmp_path / "here", folder))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not os.path.samefile(ours, theirs)
    assert checkpoint.load_model(tmp_path / "here").config == cell.config


def test_it_is_known_by_weights_and_codec_and_windows(suite, folder):
    cell = brought(suite())
    assert Cell.from_dict(cell.to_dict()) == cell
    assert brought(suite(), ["training.learning_rate=1e-4", "training.budget.bytes=1e6"]).key == cell.key
    assert brought(suite(), ["training.context=64"]).key != cell.key
    model = checkpoint.load_model(folder)
    with torch.no_grad():
        model.norm.weight += 0.1
    checkpoint.save(folder, "transformer", model.config, model.state_dict(), codec=ByteCodec(), origin={}, history=None)
    changed = brought(suite())
    assert changed.key != cell.key
    identities = set()
    for word in ("a", "b"):
        TokenizerCodec(Tokenizer(models.WordLevel({word: 0, "c": 1}, unk_token="c")).to_str()).save(
            folder / "codec.json"
        )
        identities.add(pretrained.identity(folder))
    assert len(identities) == 2
    with pytest.raises(checkpoint.CheckpointError, match="has changed since the run was planned"):
        pretrained.adopt(cell, folder.parent / "late")


def test_the_folders_name_is_the_label_and_a_suites_grid_is_not_its(suite):
    path = suite(("label: brought, ", ""), ("cells:", "grid: {size: [nano, micro]}\ncells:"))
    assert [(cell.label, cell.size) for cell in plan_of(path).cells if cell.pretrained] == [("brought-1", "41.6K")]


def test_an_optional_one_is_left_out_with_a_notice(suite, tmp_path):
    gone = ("FOLDER", str(tmp_path / "gone"))
    optional = (gone[1] + "}", gone[1] + ", optional: true}")
    plan = plan_of(suite(gone, optional))
    assert {cell.label for cell in plan.cells} == {"trained"}
    assert plan.notices == (f"brought is left out: {tmp_path / 'gone'} holds no checkpoint; {pretrained.HOW}",)
    assert "archbench import-smollm" in plan.notices[0]
    with pytest.raises(SuiteError, match=r"--only brought: .* holds no checkpoint"):
        plan_of(suite(gone, optional), only=["brought"])
    assert plan_of(suite(("FOLDER}", "FOLDER, optional: true}"))).notices == ()
    with pytest.raises(SuiteError) as caught:
        plan_of(suite(gone))
    assert "cells[1].pretrained: " in str(caught.value)
    assert "archbench import-smollm" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("label: brought", "label: brought, size: micro")], "cells[1]: size: 'micro'; the pretrained checkpoint"),
        ([("label: brought", "label: brought, codec: bytes")], "cells[1]: codec: 'bytes'; the pretrained checkpoint"),
        ([("label: brought", "model: {d_model: 8}")], "cells[1]: model: {'d_model': 8}; the pretrained checkpoint"),
        ([("label: brought", "training: {clip: 2}")], "cells[1]: training.clip: nothing is trained"),
        ([("label: trained", "optional: true")], "cells[0]: optional: true; only a cell that is pretrained"),
        ([("transformer, label: brought", "mamba")], "cells[1].architecture: mamba; "),
        ([("9_000", "0")], "training.budget.bytes: 0; must be above 0; to measure a checkpoint as it is"),
    ],
)
def test_what_makes_no_sense_is_one_line_with_its_place(suite, changes, message):
    with pytest.raises(SuiteError) as caught:
        plan_of(suite(*changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_codec_cannot_read_text(suite, folder):
    (folder / checkpoint.CODEC).unlink()
    with pytest.raises(SuiteError, match=r"cells\[1\]\.pretrained: .*holds no codec.json"):
        plan_of(suite())


@pytest.mark.parametrize(
    ("n", "name"), [(912, "912"), (12_345, "12.3K"), (134_515_008, "135M"), (1_236_000_000, "1.24B"), (7 * 10**9, "7B")]
)
def test_sizes_are_named_by_their_parameters(n, name):
    assert pretrained.size_name(n) == name
