"""Trackers: what a run writes while it goes on and what is written of an old run are the same, and TensorBoard's own
reader finds it."""

import dataclasses
import os
import subprocess
import sys

import pytest
from export_records import cell, record, write_run

from archbench import cli, export
from archbench.errors import MissingExtra
from archbench.history import History, Point
from archbench.plan import make_plan
from archbench.record import read
from archbench.run import Options, run
from archbench.suite import load_suite
from archbench.tracking import Number, Tracker, following, replay, tracker_named, trackers

SUITE = """
description: for tests
training: {budget: {bytes: 10_000}, context: 32, batch: 8, learning_rate: 4e-3, precision: fp32}
cells:
  - {architecture: ngram, label: unigram, model: {order: 1}}
  - {architecture: ngram, label: bigram, model: {order: 2}}
metrics:
  training: {}
  likelihood: {max_bytes: 1024, max_document_bytes: 512}
"""
PAGE = "bigram/custom/seed0"


class Memory(Tracker):
    """Keeps what it is told."""

    def __init__(self, folder=None, suite=""):
        self.settings, self.points, self.values, self.closed = {}, {}, {}, 0

    def begin(self, page, settings):
        self.settings[page], self.points[page], self.values[page] = settings, [], {}

    def point(self, page, step, values):
        self.points[page].append((step, dict(values)))

    def numbers(self, page, numbers):
        for number in numbers:
            assert number.name() not in self.values[page], "written twice"
            self.values[page][number.name()] = number.value

    def close(self):
        self.closed += 1

    def curve(self, page, name):
        return [(step, values[name]) for step, values in self.points[page] if name in values]


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A small run with a tracker: its folder, its plan and what the tracker was told."""
    folder = tmp_path_factory.mktemp("lived")
    (folder / "tiny.yaml").write_text(SUITE)
    plan = make_plan(load_suite(str(folder / "tiny.yaml")))
    tracker = Memory()
    out = folder / "out"
    with following(tracker, plan, out, lambda event: None) as watch:
        run(plan, Options(out=out, executor="inline"), watch)
    return out, plan, tracker


def test_a_run_is_followed_and_its_folder_tells_the_same_afterwards(lived):
    out, _, live = lived
    old = Memory()
    count = replay(read(out), out / "checkpoints", old)
    assert live.closed == old.closed == 1
    assert set(live.settings) == {"unigram/custom/seed0", PAGE} == set(old.settings)
    assert live.values == old.values and live.settings == old.settings
    for page in live.points:
        assert live.curve(page, "curve/loss") == old.curve(page, "curve/loss")
    assert count == sum(len(points) for points in old.points.values()) + sum(map(len, old.values.values()))


def test_the_curve_is_the_history_and_progress_ends_at_the_whole_budget(lived):
    out, plan, live = lived
    (address,) = {found.address for found in plan.cells if found.label == "bigram"}
    path = out / "checkpoints" / address / "history.json"
    history = History.from_json(path.read_text(), path)
    page = PAGE
    assert live.curve(page, "curve/loss") == [(point.step, point.loss) for point in history.points]
    assert live.curve(page, "curve/bytes")[-1][1] == history.last.bytes
    progress = live.curve(page, "progress/loss")
    assert progress[-1][0] == 10_000 and [loss for _, loss in progress] == [point.loss for point in history.points]
    steps = [step for step, _ in progress]
    assert steps == sorted(steps)
    settings = live.settings[page]
    assert settings["training.learning_rate"] == 4e-3 and settings["training.budget.bytes"] == 10_000
    assert settings["architecture"] == "ngram" and "training.budget.tokens" not in settings
    assert live.values[page]["training/steps"] == history.last.step


def test_what_an_earlier_sitting_answered_is_written_too(lived):
    out, plan, live = lived
    again = Memory()
    with following(again, plan, out, lambda event: None) as watch:
        run(plan, Options(out=out, executor="inline"), watch)
    assert again.values == live.values
    page = PAGE
    assert again.curve(page, "curve/loss") == live.curve(page, "curve/loss")
    assert again.curve(page, "progress/loss") == []


def test_a_tracker_is_closed_when_a_run_is_interrupted(lived, tmp_path):
    _, plan, _ = lived
    tracker = Memory()
    with pytest.raises(KeyboardInterrupt), following(tracker, plan, tmp_path, lambda event: None):
        raise KeyboardInterrupt
    assert tracker.closed == 1 and not any(tracker.values.values())


def test_cells_of_one_name_have_pages_of_their_own():
    tracker = Memory()
    grid = [record("a", "m", "q", 1.0, cell=key) for key in ("aaa", "bbb")]
    replay([*grid, record("b", "m", "q", 2.0)], export.Path("nowhere"), tracker)
    assert set(tracker.settings) == {"a/micro/seed0-aaa", "a/micro/seed0-bbb", "b/micro/seed0"}


def test_what_has_no_value_is_not_written():
    tracker = Memory()
    replay(cell("mamba"), export.Path("nowhere"), tracker)
    assert not any(name.startswith("brier_lm") for name in tracker.values["mamba/micro/seed0"])
    assert "latency/time_per_token[batch=1,clock=wall,context=128]" in tracker.values["mamba/micro/seed0"]


# TensorBoard


@pytest.fixture
def accumulator():
    """TensorBoard's own reader of an event folder."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read_folder(folder):
        found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        found.Reload()
        return found

    return read_folder


def history(folder):
    """A checkpoint's folder with a log of ten points."""
    folder.mkdir(parents=True)
    common = {"phase": "train", "learning_rate": 1e-3, "parts": {"head1": 0.5}, "seconds": 1.0, "cpu_seconds": 1.0}
    points = [
        Point(step=10 * i, tokens=640 * i, bytes=640.0 * i, flops=1e9 * i, loss=5 - i / 4, **common)
        for i in range(1, 11)
    ]
    (folder / "history.json").write_text(History(points=points).to_json())


def test_tensorboard_reads_back_an_old_run(accumulator, tmp_path):
    folder = write_run(tmp_path / "quick", cell("mamba"))
    history(folder / "checkpoints" / "w-mambamicro0")
    exported = export.export(folder, "tensorboard")
    assert exported.paths == (folder / "exports" / "tensorboard",)
    for _ in range(2):  # a second export replaces the first
        found = accumulator(folder / "exports/tensorboard/mamba/micro/seed0")
        loss = found.Scalars("curve/loss")
        assert [(event.step, event.value) for event in loss] == [(10 * i, 5 - i / 4) for i in range(1, 11)]
        assert [event.value for event in found.Scalars("curve/head1")] == [0.5] * 10
        (bits,) = found.Scalars("likelihood/bits_per_byte[state=reset]")
        assert (bits.step, bits.value) == (0, 2.0)
        latency = found.Scalars("latency/time_per_token[batch=1,clock=wall]")  # a curve by context
        medians = [r.value for r in cell("mamba") if r.quantity == "time_per_token"]
        assert [event.step for event in latency] == [128, 2048]
        assert [event.value for event in latency] == pytest.approx(medians, rel=1e-6)
        assert "hparams" in found.PluginAssets("hparams") or found.summary_metadata["_hparams_/session_start_info"]
        export.export(folder, "tensorboard")


def test_tensorboard_follows_a_run(accumulator, lived, tmp_path):
    _, plan, live = lived
    folder = tmp_path / "out"
    with following(tracker_named("tensorboard")(folder, "tiny"), plan, folder, lambda event: None) as watch:
        run(plan, Options(out=folder, executor="inline"), watch)
    found = accumulator(folder / "tensorboard" / PAGE)
    curve = [(event.step, event.value) for event in found.Scalars("curve/loss")]
    assert curve == [(step, pytest.approx(value)) for step, value in live.curve(PAGE, "curve/loss")]
    assert found.Scalars("progress/loss")[-1].step == 10_000
    (steps,) = found.Scalars("training/steps")
    assert steps.value == curve[-1][0]


# MLflow and W&B


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb", "parquet"])
def test_a_missing_package_is_one_line_that_installs_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    folder = write_run(tmp_path / "quick", cell("mamba"))
    package = {"parquet": "pyarrow"}.get(name, name)
    with pytest.raises(MissingExtra, match=rf"^--to {name}: needs the package {package}: .*'archbench\[{name}\]'$"):
        export.export(folder, name)
    if name in trackers():
        with pytest.raises(MissingExtra, match=f"^--track {name}: needs the package"):
            tracker_named(name)


def test_mlflow_reads_back_an_old_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = write_run(tmp_path / "quick", cell("mamba"))
    history(folder / "checkpoints" / "w-mambamicro0")
    export.export(folder, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/exports/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("archbench quick")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "mamba/micro/seed0" and found.info.status == "FINISHED"
    assert found.data.metrics["likelihood/bits_per_byte/state reset"] == 2.0
    assert found.data.params["training.learning_rate"] == "0.004"
    curve = client.get_metric_history(found.info.run_id, "curve/loss")
    assert [(point.step, point.value) for point in curve] == [(10 * i, 5 - i / 4) for i in range(1, 11)]


def test_wandb_keeps_an_old_run_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = write_run(tmp_path / "quick", cell("mamba"))
    history(folder / "checkpoints" / "w-mambamicro0")
    # A process of its own: W&B's service writes the last of a run when the process ends.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    words = ["-m", "archbench.cli", "export", str(folder), "--to", "wandb"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (kept,) = (folder / "exports/wandb/wandb").glob("offline-run-*")
    (log,) = kept.glob("*.wandb")
    text = log.read_bytes()
    for name in ("curve/loss", "likelihood/bits_per_byte[state=reset]", "training.learning_rate"):
        assert name.encode() in text, name


# The command


def test_trackers_are_the_formats_that_can_be_written_live():
    assert trackers() == ["mlflow", "tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "--track tensorbord: there is no such format; did you mean 'tensorboard'?"),
        ("csv", "--track csv: is written after a run, not during it; allowed: mlflow, tensorboard, wandb"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(name, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(SUITE)
    words = ["run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--track", name]
    monkeypatch.setattr(sys, "argv", ["archbench", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err == f"archbench: {message}\n"
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_numbers_are_named_by_metric_and_coordinates():
    number = Number(metric="latency", quantity="time_per_token", at={"context": 8, "batch": 1}, value=1.0)
    assert number.name() == "latency/time_per_token[batch=1,context=8]"
    assert number.name(without="context") == "latency/time_per_token[batch=1]"
    assert dataclasses.replace(number, at={}).name() == "latency/time_per_token"
