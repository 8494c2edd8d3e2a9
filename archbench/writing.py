"""Text from a trained cell: finds the checkpoint and streams what the model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from archbench.checkpoint import MODEL, load_model, load_own_codec, load_traits
from archbench.drafting import Drafted
from archbench.errors import CheckpointError, UnsupportedError, suggestion
from archbench.generation import Writer, aligned, stream
from archbench.model import AutoregressiveModel
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


def find_drafter(run: Path, name: str) -> Path:
    """The checkpoint folder of a drafter: `name` itself, or the cell of that label in the run that `run` is part of.

    Raises:
        CheckpointError: there is none, or several.
    """
    if (Path(name) / MODEL).is_file():
        return Path(name)
    return find_checkpoint(run.parent.parent if (run / MODEL).is_file() else run, name, None, None)


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """A drafter's checkpoint, and how far down the verifier's ranking its bytes are accepted (1 changes nothing)."""

    folder: Path
    rank: int = 1


def write(
    folder: Path,
    prompt: str,
    n_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: Sequence[str],
    drafting: Drafting | None = None,
) -> Iterator[str]:
    """Pieces of text as they are written, at most `n_tokens` tokens, ending before any of `stop`.

    Raises:
        CheckpointError: there is no readable checkpoint in `folder`, or in the drafter's.
        UnsupportedError: this pair of models cannot draft, or `sampling` is not greedy with a drafter.
    """
    codec, stride = load_own_codec(folder), load_traits(folder).stride
    model: Writer
    if drafting is None:
        model = load_model(folder)
    else:
        verifier, drafter = _next_token_model(folder), _next_token_model(drafting.folder)
        model = Drafted(verifier, drafter, load_own_codec(drafting.folder), rank=drafting.rank)
    ids = torch.from_numpy(codec.encode(prompt.encode()).astype("int64"))[None]
    generator = torch.Generator().manual_seed(seed)
    yield from stream(model, aligned(ids, stride), n_tokens, sampling, generator, codec.decode, stop)


def _next_token_model(folder: Path) -> AutoregressiveModel:
    model = load_model(folder)
    if not isinstance(model, AutoregressiveModel):
        raise UnsupportedError(f"{folder}: not a next-token model; drafting needs two of them")
    return model
