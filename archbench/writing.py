"""Text from a trained cell: finds the checkpoint and streams what the model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from archbench.checkpoint import MODEL, load_model, load_own_codec, load_traits
from archbench.errors import CheckpointError, suggestion
from archbench.generation import aligned, stream
from archbench.record import newest, read
from archbench.sampling import Sampling


def find_checkpoint(run: Path, name: str | None, size: str | None, seed: int | None) -> Path:
    """The checkpoint folder of the one cell of a run that fits; `run` may be a checkpoint folder itself.

    Raises:
        CheckpointError: none fits, or several do; the message lists them.
    """
    if (run / MODEL).is_file():
        return run
    file = newest(run)
    cells = {
        (record.label, record.size, record.seed): record
        for record in read(file)
        if name in (None, record.label, record.architecture)
        and size in (None, record.size)
        and seed in (None, record.seed)
    }
    shown = ", ".join(f"{label} (size {s}, seed {n})" for label, s, n in sorted(cells))
    if not cells:
        labels = {record.label for record in read(file)}
        raise CheckpointError(f"{run}: no cell '{name}' of that size and seed; {suggestion(name or '', labels)}")
    if len({key[0] for key in cells}) > 1 or (len(cells) > 1 and (size is None or seed is None)):
        raise CheckpointError(f"{run}: several cells fit: {shown}; narrow it down by --architecture, --size and --seed")
    return file.parent / "checkpoints" / next(iter(cells.values())).checkpoint


def write(
    folder: Path, prompt: str, n_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str]
) -> Iterator[str]:
    """Pieces of text as they are written, at most `n_tokens` tokens, ending before any of `stop`.

    Raises:
        CheckpointError: there is no readable checkpoint in `folder`.
    """
    model, codec, stride = load_model(folder), load_own_codec(folder), load_traits(folder).stride
    ids = torch.from_numpy(codec.encode(prompt.encode()).astype("int64"))[None]
    generator = torch.Generator().manual_seed(seed)
    yield from stream(model, aligned(ids, stride), n_tokens, sampling, generator, codec.decode, stop)
