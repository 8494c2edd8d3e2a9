"""The work of a run, as functions of plain data: train a cell and measure it, time several cells together, or measure
cells that nobody trains.

Run as `python -m archbench.worker` it reads one JSON task from its standard input and writes events as JSON lines to
its standard output; when its input closes, its parent is gone, and it ends at once. The same functions serve the
in-process executor and remote ones.

Events: {"event": "progress" | "trained" | "counting" | "measured" | "failed" | "notice" | "done", ...}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from archbench import checkpoint, pretrained, registry
from archbench.cell import Cell
from archbench.codec import Codec, codec_from
from archbench.curriculum import Curriculum
from archbench.data.corpus import Corpus
from archbench.data.examples import Examples
from archbench.data.windows import Windows, tokenize
from archbench.environment import describe
from archbench.errors import ArchbenchError, CheckpointError
from archbench.metric import Companion, Design, Measurement, Subject
from archbench.model import SequenceModel
from archbench.ops import backends
from archbench.parse import parse
from archbench.plan import corpus_of
from archbench.timing import interleave
from archbench.train import Progress, Stopped, train

Emit = Callable[[dict[str, Any]], None]

_stop = threading.Event()
"""Set by SIGTERM: a training saves what it reached and ends."""


def work(task: dict[str, Any], emit: Emit) -> None:
    """Does one task. What goes wrong inside a cell or metric becomes a "failed" event, never an exception."""
    torch.set_num_threads(task["threads"])
    if task["kind"] == "cell":
        _train_and_measure(task, emit)
    elif task["kind"] == "designs":
        _measure_designs(task, emit)
    else:
        _time_together(task, emit)
    emit({"event": "done"})


def _train_and_measure(task: dict[str, Any], emit: Emit) -> None:
    cell = Cell.from_dict(task["cell"])
    folder = Path(task["checkpoints"]) / task["address"]  # as planned, even if the source has changed since
    jobs = task["jobs"]
    try:
        _train(cell, folder, task, emit)
        subject = _subject(cell, folder, task["device"])
    except Stopped:
        return
    except Exception as error:
        for job in jobs:
            emit({"event": "failed", "job": job["id"], "reason": _reason(error)})
        return
    for job in jobs:
        try:
            metric = registry.metric(job["metric"])
            settings = parse(metric.settings, job["settings"], f"metrics.{job['metric']}")
            backends.forget()
            found = list(metric.measure(subject, settings))  # type: ignore[union-attr, arg-type]
        except Exception as error:
            emit({"event": "failed", "job": job["id"], "reason": _reason(error)})
        else:
            emit(_measured(job["id"], found, backends.in_use() or subject.history.backend))


def _train(cell: Cell, folder: Path, task: dict[str, Any], emit: Emit) -> None:
    if checkpoint.is_complete(folder):
        return
    architecture = registry.architecture(cell.architecture)
    corpus = corpus_of(cell.corpus)
    if corpus.sha256 != cell.corpus_sha256:
        raise CheckpointError(
            f"corpus {cell.corpus}: has changed since the run was planned ({corpus.sha256[:12]} instead of "
            f"{cell.corpus_sha256[:12]}); run the suite again"
        )
    if cell.pretrained:
        pretrained.adopt(cell, folder)
        return
    codec = codec_from(cell.codec, corpus)
    examples = _examples(cell, codec, corpus)
    model = architecture.build(cell.config, torch.Generator().manual_seed(cell.seed))
    _start(model, cell)
    model.to(_device(task["device"]))

    def notify(progress: Progress) -> None:
        emit({"event": "progress", "cell": task["address"], **dataclasses.asdict(progress)})

    history = train(
        model,
        examples,
        cell.training,
        lookahead=architecture.traits(cell.config).lookahead,
        seed=cell.seed,
        folder=folder,
        notify=notify,
        save_every_s=task["save_every_s"],
        stop=_stop.is_set,
    )
    checkpoint.save(
        folder,
        cell.architecture,
        cell.config,
        model.state_dict(),
        codec=codec,
        origin={"cell": cell.to_dict()},
        history=history,
    )
    emit({"event": "trained", "cell": task["address"]})


def _examples(cell: Cell, codec: Codec, corpus: Corpus) -> Examples:
    """What the cell is trained on: windows of its corpus, or its task."""
    training = cell.training
    if training.task is None:
        return Windows(tokenize(corpus.train, codec, seed=cell.seed), training.context, training.batch, cell.seed)
    return Curriculum(
        training.task.lessons(codec, corpus),
        tokens_per_step=training.batch * training.context,
        advance=training.task.advance,
        seed=cell.seed,
        token_bytes=codec.token_bytes(),
    )


def _start(model: SequenceModel, cell: Cell) -> None:
    """First weights are those of the checkpoint that the cell starts from, if it does."""
    if cell.start_from is None:
        return
    folder = Path(cell.start_from)
    found = checkpoint.weights_sha256(folder)
    if found != cell.start_sha256:
        raise CheckpointError(
            f"{folder}: has changed since the run was planned ({found[:12]} instead of {(cell.start_sha256 or '')[:12]}"
            "); run the suite again"
        )
    tensors, _ = checkpoint.load_tensors(folder / checkpoint.WEIGHTS)
    checkpoint.load_weights(model, tensors, folder / checkpoint.WEIGHTS)


def _measure_designs(task: dict[str, Any], emit: Emit) -> None:
    for number, job in enumerate(task["jobs"], start=1):
        try:
            cell = Cell.from_dict(job["cell"])
            metric = registry.metric(job["metric"])
            settings = parse(metric.settings, job["settings"], f"metrics.{job['metric']}")
            found = list(metric.measure(_design(cell), settings))  # type: ignore[union-attr, arg-type]
        except Exception as error:
            emit({"event": "failed", "job": job["id"], "reason": _reason(error)})
        else:
            emit(_measured(job["id"], found, {}))
        emit({"event": "counting", "log": task["log"], "done": number / len(task["jobs"])})


def _design(cell: Cell) -> Design:
    return Design(
        label=cell.label,
        architecture=cell.architecture,
        config=cell.config,
        traits=registry.architecture(cell.architecture).traits(cell.config),
        context=cell.training.context,
        batch=cell.training.batch,
        tokens=cell.training.budget.tokens,
    )


def _time_together(task: dict[str, Any], emit: Emit) -> None:
    for group in task["groups"]:
        metric = registry.metric(group["metric"])
        settings = parse(metric.settings, group["settings"], f"metrics.{group['metric']}")
        subjects = {}
        for job in group["jobs"]:
            cell = Cell.from_dict(job["cell"])
            try:
                subject = _subject(cell, Path(task["checkpoints"]) / job["address"], task["device"])
                folders = {label: Path(task["checkpoints"]) / address for label, address in job["beside"].items()}
                beside = {label: _companion(folder, task["device"]) for label, folder in folders.items()}
                subjects[job["id"]] = dataclasses.replace(subject, beside=beside)
            except Exception as error:
                emit({"event": "failed", "job": job["id"], "reason": _reason(error)})

        def notify(done: float, name: str = group["metric"]) -> None:
            emit({"event": "timing", "metric": name, "done": done})

        for job_id, outcome in interleave(metric, subjects, settings, notify).items():  # type: ignore[arg-type]
            if isinstance(outcome, Exception):
                emit({"event": "failed", "job": job_id, "reason": _reason(outcome)})
            else:
                emit(_measured(job_id, outcome, subjects[job_id].history.backend))


def _subject(cell: Cell, folder: Path, device: str) -> Subject:
    return Subject(
        label=cell.label,
        architecture=cell.architecture,
        config=cell.config,
        model=checkpoint.load_model(folder, _device(device)),
        traits=registry.architecture(cell.architecture).traits(cell.config),
        codec=checkpoint.load_own_codec(folder),
        corpus=corpus_of(cell.corpus),
        history=checkpoint.load_history(folder),
        context=cell.training.context,
        batch=cell.training.batch,
        seed=cell.seed,
        folder=folder,
        exercise=cell.training.task,
    )


def _companion(folder: Path, device: str) -> Companion:
    return Companion(checkpoint.load_model(folder, _device(device)), checkpoint.load_own_codec(folder))


def _device(wish: str) -> torch.device:
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wish)


def _measured(job_id: str, found: list[Measurement], backend: dict[str, str]) -> dict[str, Any]:
    return {
        "event": "measured",
        "job": job_id,
        "measurements": [_plain(measurement) for measurement in found],
        "backend": backend,
        "environment": {**describe(), "threads": torch.get_num_threads()},
    }


def _plain(measurement: Measurement) -> dict[str, Any]:
    """As JSON can hold it; a value that is not finite becomes a reason."""
    data = dataclasses.asdict(measurement)
    for name in ("value", "low", "high"):
        if data[name] is not None:
            data[name] = float(data[name])
    if data["value"] is not None and not math.isfinite(data["value"]):
        data["reason"] = f"not finite: {data['value']}"
        data["value"] = data["low"] = data["high"] = None
    data["samples"] = [float(sample) for sample in data["samples"] if math.isfinite(sample)]
    data["along"] = {name: [float(x) for x in positions] for name, positions in data["along"].items()}
    return data


def _reason(error: Exception) -> str:
    """One line for people; a traceback goes to the log, unless the error is one of ours and says all."""
    if isinstance(error, ArchbenchError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" at {Path(place.filename).name}:{place.lineno}" if place else ""
    first_line = (str(error).splitlines() or ["no message"])[0]
    return f"{type(error).__name__}{where}: {first_line}"


def main() -> None:
    """The process's entry: task in, events out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stray prints must not mix with events
    lock = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(event, allow_nan=False) + "\n")
            out.flush()

    to_log = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, backends.BackendWarning):
            emit({"event": "notice", "text": str(message)})
        else:
            to_log(message, category, *place)

    warnings.showwarning = show  # type: ignore[assignment]
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(task, emit)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
