"""Plans: a suite resolved into cells and jobs, before anything runs.

Every (cell, metric) pair is one job: to be measured, or unsupported for a reason the metric gives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from archbench import checkpoint, pretrained, registry, sizes
from archbench.cell import Cell, Training, measuring_source, parse_training
from archbench.codec import Codec, codec_from
from archbench.data.corpus import Corpus, load_corpus
from archbench.errors import CheckpointError, ConfigError, SuiteError, suggestion
from archbench.metric import DesignMetric, Metric, TimedMetric
from archbench.parse import parse
from archbench.suite import CellEntry, Suite, entries
from archbench.tuning import Choices, parse_tuning

_AnyMetric = Metric | TimedMetric | DesignMetric


@dataclass(frozen=True, kw_only=True)
class Job:
    """One metric on one cell. `reason` is why it does not exist there; None when it is to be measured."""

    id: str
    cell: Cell
    metric: str
    settings: Any
    timed: bool
    trained: bool
    reason: str | None
    beside: Mapping[str, str] = field(default_factory=dict)
    """Addresses of the other cells that the metric needs, by label."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`notices` say which optional cells were left out, and why."""

    suite: Suite
    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]
    notices: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return _digest(sorted(job.id for job in self.jobs))[:8]

    @property
    def trained_cells(self) -> list[Cell]:
        """The cells that must be trained, each once; the others are pretrained, or need no weights."""
        open_ = [job for job in self.jobs if job.trained and job.reason is None]
        asked = {address for job in open_ for address in (job.cell.address, *job.beside.values())}
        found = {cell.address: cell for cell in self.cells if cell.address in asked and not cell.pretrained}
        return list(found.values())


def make_plan(suite: Suite, only: Sequence[str] = (), choices: Choices | None = None) -> Plan:
    """Resolves a suite. `only` keeps the cells of these labels or architectures; `choices` are the learning rates that
    the trials of a suite with `tuning` came to. Without them its cells have the rate that the suite gives.

    Raises:
        SuiteError: a name, key or value does not exist or is impossible; the message names file and place.
    """
    asked = _metric_settings(suite)
    left_out = {pretrained.label_of(entry): reason for entry in entries(suite) if (reason := pretrained.absent(entry))}
    if suite.tuning is not None:
        parse_tuning(suite)
    cells = [_tuned(cell, choices or {}) for cell in _only(_cells(suite, list(asked)), only, left_out)]
    timed_with = sorted(
        cell.address for cell in cells for name in cell.metrics if registry.metric(name).timed
    )  # timed metrics interleave their cells, so their samples belong to that company
    jobs = []
    for cell in cells:
        traits = registry.architecture(cell.architecture).traits(cell.config)
        for name in cell.metrics:
            metric, settings = registry.metric(name), asked[name]
            beside = _beside(suite, cells, cell, metric, settings)
            identity = [cell.address, measuring_source(cell), name, metric.version, dataclasses.asdict(settings)]
            identity += [beside] if beside else []
            needed = f"the other cells' {name} needs it" if cell.label in beside else None
            jobs.append(
                Job(
                    id=_digest([*identity, timed_with if metric.timed else None])[:16],
                    cell=cell,
                    metric=name,
                    settings=settings,
                    timed=metric.timed,
                    trained=metric.trained,
                    reason=cell.void or needed or metric.cannot(traits, settings),
                    beside=beside,
                )
            )
    notices = tuple(f"{label} is left out: {reason}" for label, reason in left_out.items())
    return Plan(suite=suite, cells=tuple(cells), jobs=tuple(jobs), notices=notices)


def _tuned(cell: Cell, choices: Choices) -> Cell:
    """The cell with the learning rate its trials came to."""
    choice = choices.get((cell.label, cell.size), choices.get((cell.label, None)))
    if choice is None:
        return cell
    training = dataclasses.replace(cell.training, learning_rate=choice.learning_rate)
    return dataclasses.replace(cell, training=training, tuning=choice.summary(), void=choice.void)


@cache
def corpus_of(spec: str) -> Corpus:
    """The corpus, read once a process."""
    return load_corpus(spec)


def _metric_settings(suite: Suite) -> dict[str, Any]:
    settings = {}
    for name, given in suite.metrics.items():
        where = f"{suite.path}: metrics.{name}"
        settings[name] = parse(_known(where, registry.metric, name).settings, given, where)
    return settings


def _beside(suite: Suite, cells: Sequence[Cell], cell: Cell, metric: _AnyMetric, settings: Any) -> dict[str, str]:
    """Addresses of the cells that a metric needs to measure `cell`, by label."""
    found = {}
    for label in metric.beside(settings) if isinstance(metric, TimedMetric) else ():
        same_seed = [other for other in cells if other.pretrained or other.seed == cell.seed]
        fitting = [other.address for other in same_seed if other.label == label]
        where = f"{suite.path}: metrics.{metric.name}: cell '{label}'"
        if not fitting:
            raise SuiteError(f"{where} is not in this run; {suggestion(label, {other.label for other in cells})}")
        if len(fitting) > 1:
            raise SuiteError(f"{where}: {len(fitting)} cells are called so; give them labels of their own")
        found[label] = fitting[0]
    return found


def _cells(suite: Suite, metrics: list[str]) -> list[Cell]:
    cells: list[Cell] = []
    for number, entry in enumerate(entries(suite)):
        where = f"{suite.path}: cells[{number}]"
        for metric in entry.metrics or ():
            if metric not in metrics:
                raise SuiteError(
                    f"{where}.metrics: '{metric}' is not measured by the suite; {suggestion(metric, metrics)}"
                )
        training = _training(suite, entry, where)
        corpus = corpus_of(entry.corpus or suite.corpus)
        if entry.pretrained is not None:
            if not pretrained.absent(entry):
                cells.append(_pretrained(suite, entry, training, corpus, metrics, where))
            continue
        codec = entry.codec or suite.codec
        found = codec_from(codec, corpus)
        if entry.start_from is None:
            config, size, residual = _config(suite, entry, found.vocab_size, training.context, where)
            start_sha256 = None
        else:
            config, start_sha256 = _start(entry, Path(entry.start_from), found, where)
            size, residual = "custom", 0.0
        _check_exercise(training, entry.architecture, config, found, corpus, where)
        for seed in suite.seeds:
            cells.append(
                Cell(
                    label=entry.label or registry.label(entry.architecture),
                    architecture=entry.architecture,
                    size=size,
                    config=config,
                    corpus=entry.corpus or suite.corpus,
                    corpus_sha256=corpus.sha256,
                    codec=codec,
                    seed=seed,
                    training=training,
                    metrics=tuple(metrics if entry.metrics is None else entry.metrics),
                    match=suite.match,
                    residual=residual,
                    start_from=entry.start_from,
                    start_sha256=start_sha256,
                )
            )
    return _distinct(cells, suite.path)


def _training(suite: Suite, entry: CellEntry, where: str) -> Training:
    data = {**suite.training, **entry.training}
    place = f"{where}.training" if entry.training else f"{suite.path}: training"
    training = parse_training(data, place)
    if not training.budget.amount:
        raise SuiteError(
            f"{place}.budget.{training.budget.unit}: 0; must be above 0; to measure a checkpoint as it is, name its "
            "folder by pretrained"
        )
    return training


def _check_exercise(
    training: Training, architecture: str, config: Any, codec: Codec, corpus: Corpus, where: str
) -> None:
    """Raises SuiteError when a cell cannot learn its task: before anything runs."""
    exercise = training.task
    if exercise is None:
        return
    traits = registry.architecture(architecture).traits(config)
    place = f"{where}.training.task"
    if not traits.answers:
        raise SuiteError(f"{place}: {architecture} cannot learn answers alone; leave the cell out of this suite")
    if not traits.repeats and any(stage.replay > 1 for stage in exercise.stages):
        raise SuiteError(
            f"{place}.stages: replay; {architecture}, so configured, has no memory that adds "
            "up, so nothing can be repeated in it; set replay to 1"
        )
    if exercise.context != training.context:
        raise SuiteError(
            f"{where}.training.context: {training.context}; the longest stage has {exercise.context}; make them equal"
        )
    try:
        exercise.lessons(codec, corpus, place)
    except ConfigError as error:
        raise SuiteError(str(error)) from None


def _config(suite: Suite, entry: CellEntry, vocab_size: int, context: int, where: str) -> tuple[Any, str, float]:
    """The architecture's config, the name of its size and how far it is from that size."""
    architecture = _known(where, registry.architecture, entry.architecture)
    sized = next(iter(architecture.candidates(vocab_size)), None) is not None
    size = (entry.size or suite.size) if sized or entry.size in architecture.published else "custom"
    if size == "custom":
        return parse(architecture.config, {"vocab_size": vocab_size, **entry.model}, f"{where}.model"), size, 0.0
    parse_keys = {name: value for name, value in entry.model.items() if name != "vocab_size"}
    try:
        solved = sizes.solve(architecture, vocab_size, size, parse_keys, axis=suite.match, context=context)
    except ConfigError as error:
        raise SuiteError(f"{where}: {error}") from None
    if solved.config.vocab_size < vocab_size:
        raise SuiteError(
            f"{where}: size '{size}' has a vocabulary of {solved.config.vocab_size}, the codec one of {vocab_size}; "
            "choose a smaller codec or another size"
        )
    return solved.config, size, solved.residual


def _start(entry: CellEntry, folder: Path, codec: Codec, where: str) -> tuple[Any, str]:
    """The config of the checkpoint that an entry starts from, with the entry's changes, and its weights' hash."""
    place = f"{where}.start_from"
    architecture = _known(where, registry.architecture, entry.architecture)
    if entry.size is not None:
        raise SuiteError(f"{where}.size: '{entry.size}'; the checkpoint of start_from decides it, leave it out")
    try:
        name, config = checkpoint.load_config(folder)
        sha256 = checkpoint.weights_sha256(folder)
        own = checkpoint.load_own_codec(folder) if (folder / checkpoint.CODEC).is_file() else None
    except CheckpointError as error:
        raise SuiteError(f"{place}: {error}") from None
    if name != entry.architecture:
        raise SuiteError(
            f"{place}: {folder} holds a model of {name}; convert it first: "
            f"`archbench convert {folder} --to {entry.architecture}`"
        )
    if own is not None and own.fingerprint != codec.fingerprint:
        raise SuiteError(f"{place}: {folder} was trained with codec {own.name}, the cell has {codec.name}")
    return parse(architecture.config, {**dataclasses.asdict(config), **entry.model}, f"{where}.model"), sha256


def _pretrained(
    suite: Suite, entry: CellEntry, training: Training, corpus: Corpus, metrics: list[str], where: str
) -> Cell:
    try:
        return pretrained.cell_of(suite, entry, training, corpus, metrics)
    except CheckpointError as error:
        raise SuiteError(f"{where}.pretrained: {error}") from None
    except ConfigError as error:
        raise SuiteError(f"{where}.{error}") from None


def _only(cells: list[Cell], only: Sequence[str], left_out: Mapping[str, str]) -> list[Cell]:
    names = {name for cell in cells for name in (cell.label, cell.architecture)}
    for name in only:
        if name in left_out:
            raise SuiteError(f"--only {name}: {left_out[name]}")
        if name not in names:
            raise SuiteError(f"--only {name}: no such cell in this suite; {suggestion(name, names)}")
    return [cell for cell in cells if not only or cell.label in only or cell.architecture in only]


def _distinct(cells: list[Cell], path: str) -> list[Cell]:
    """The cells without repetitions, as when a grid over sizes meets an architecture that has none.

    Raises:
        SuiteError: two cells differ and cannot be told apart by name.
    """
    seen: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        twin = seen.setdefault((cell.name(), cell.codec), cell)
        if twin.key != cell.key:
            raise SuiteError(f"{path}: two different cells are called '{cell.name()}'; give them labels of their own")
    return list(seen.values())


def _known(where: str, look_up: Any, name: str) -> Any:
    try:
        return look_up(name)
    except ConfigError as error:
        raise SuiteError(f"{where}: {error}") from None


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in the identity of a job: settings must be plain data")
