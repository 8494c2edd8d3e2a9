"""Cells whose model is measured as it is: a checkpoint brought from elsewhere, never trained here.

Config, codec and weights are the checkpoint's own. Its weights appear under the cell's address like those of any other
cell, as a second name of the same file where the file system allows it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from archbench import checkpoint, registry
from archbench.cell import Budget, Cell, Training
from archbench.data.corpus import Corpus
from archbench.errors import CheckpointError, ConfigError
from archbench.history import History
from archbench.sizes import on_meta
from archbench.suite import CellEntry, Suite

HOW = "`archbench import-smollm` brings SmolLM2-135M, import-gguf and import-hf bring others"


def label_of(entry: CellEntry) -> str:
    """The entry's label, or its folder's name."""
    return entry.label or Path(entry.pretrained or "").resolve().name


def absent(entry: CellEntry) -> str:
    """Why a pretrained entry that may be left out must be; empty when it need not."""
    folder = Path(entry.pretrained) if entry.pretrained is not None and entry.optional else None
    return "" if folder is None or checkpoint.is_complete(folder) else _missing(folder)


def cell_of(suite: Suite, entry: CellEntry, training: Training, corpus: Corpus, metrics: Sequence[str]) -> Cell:
    """The cell that measures an entry's checkpoint; one whatever the seeds, for its weights are the same for all.

    Of `training`, only the windows that metrics go by remain.

    Raises:
        CheckpointError: there is none, it is damaged, or it came without a codec, so that it can read no text.
        ConfigError: it holds a model of another architecture.
    """
    assert entry.pretrained is not None, "only pretrained entries come here"
    folder = Path(entry.pretrained)
    if not checkpoint.is_complete(folder):
        raise CheckpointError(_missing(folder))
    name, config = checkpoint.load_config(folder)
    if name != entry.architecture:
        raise ConfigError(f"architecture: {entry.architecture}; {folder} holds a model of {name}")
    shell = on_meta(registry.architecture(name), config)
    return Cell(
        label=label_of(entry),
        architecture=name,
        size=size_name(sum(parameter.numel() for parameter in shell.parameters())),
        config=config,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        codec=checkpoint.load_own_codec(folder).name,
        seed=suite.seeds[0],
        training=Training(budget=Budget(bytes=0), context=training.context, batch=training.batch),
        metrics=tuple(metrics if entry.metrics is None else entry.metrics),
        match=suite.match,
        start_from=str(folder),
        start_sha256=identity(folder),
    )


def size_name(n_parameters: int) -> str:
    """Three digits at most: 912, 12.3K, 135M, 1.24B."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n_parameters >= unit:
            return f"{n_parameters / unit:.3g}{name}"
    return str(n_parameters)


def identity(folder: Path) -> str:
    """Hash of what decides the answers besides the config: weights and codec."""
    codec = checkpoint.load_own_codec(folder)
    return hashlib.sha256(f"{checkpoint.weights_sha256(folder)} {codec.fingerprint}".encode()).hexdigest()


def adopt(cell: Cell, folder: Path) -> None:
    """Makes `folder` the checkpoint of a pretrained cell.

    Raises:
        CheckpointError: the checkpoint it comes from is gone, damaged, or not the one that was planned with.
    """
    assert cell.start_from is not None, "a pretrained cell comes from somewhere"
    source = Path(cell.start_from)
    if not checkpoint.is_complete(source):
        raise CheckpointError(_missing(source))
    found = identity(source)
    if found != cell.start_sha256:
        raise CheckpointError(
            f"{source}: has changed since the run was planned ({found[:12]} instead of {(cell.start_sha256 or '')[:12]}"
            "); run the suite again"
        )
    checkpoint.save_around(
        folder,
        cell.architecture,
        cell.config,
        codec=checkpoint.load_own_codec(source),
        origin={"cell": cell.to_dict()},
        history=History(),
    )
    draft = folder / f".{checkpoint.WEIGHTS}.{os.getpid()}"
    weights = (source / checkpoint.WEIGHTS).resolve()
    try:
        os.link(weights, draft)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(weights, draft)
    draft.replace(folder / checkpoint.WEIGHTS)


def _missing(folder: Path) -> str:
    return f"{folder} holds no checkpoint; {HOW}"
