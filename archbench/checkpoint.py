"""Checkpoints: a folder a cell, named by its address; tensors as safetensors, everything else as JSON.

    <out>/checkpoints/<address>/
        cell.json            what was asked for
        codec.json           the tokens' meaning
        history.json         the training log
        model.safetensors    trained weights; its presence means that training is complete
        partial.safetensors  weights, optimizer and position of a training under way

Every file is written under another name and renamed, so that a kill at any moment leaves the old or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from archbench import registry
from archbench.cell import Cell
from archbench.codec import Codec, load_codec
from archbench.errors import CheckpointError
from archbench.history import History
from archbench.model import SequenceModel

WEIGHTS, PARTIAL, CELL, CODEC, HISTORY = (
    "model.safetensors", "partial.safetensors", "cell.json", "codec.json", "history.json",
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors and a few facts as one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    alone = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(_unshared(alone), draft, metadata={"archbench": json.dumps(dict(facts))})
    draft.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file written by `save_tensors`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; train the cell with `archbench run`")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("archbench", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({str(error).splitlines()[0]}); delete {path.parent} and run the suite again"
        ) from None


def load_weights(model: SequenceModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Fills `model` with exactly these tensors. Tied tensors are stored once.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape, by name.
    """
    own = model.state_dict()
    stored_as = {name: name for name in own}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in own.items():
        if tensor.numel():
            stored_as[name] = first.setdefault((tensor.data_ptr(), tensor.shape), name)
    missing = sorted(set(stored_as.values()) - set(tensors))
    extra = sorted(set(tensors) - set(own))
    if missing or extra:
        found = f"lacks tensor {missing[0]}" if missing else f"holds unknown tensor {extra[0]}"
        raise CheckpointError(f"{where}: {found}; it belongs to another configuration or version")
    with torch.no_grad():
        for name, tensor in own.items():
            stored = tensors[stored_as[name]]
            if stored.shape != tensor.shape:
                raise CheckpointError(
                    f"{where}: tensor {name} is {list(stored.shape)}, the model's is {list(tensor.shape)}; "
                    "it belongs to another configuration"
                )
            tensor.copy_(stored)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each memory once, under its first name: safetensors refuses tensors that share memory."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor
    return kept


def is_complete(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def save_complete(folder: Path, model: SequenceModel, cell: Cell, codec: Codec, history: History) -> None:
    """Writes a trained cell; the weights last, since their presence means complete."""
    write_text(folder / CELL, json.dumps(cell.to_dict(), indent=1))
    codec.save(folder / CODEC)
    write_text(folder / HISTORY, history.to_json())
    save_tensors(folder / WEIGHTS, model.state_dict(), {"key": cell.key})
    (folder / PARTIAL).unlink(missing_ok=True)


def load_complete(folder: Path, device: torch.device | str = "cpu") -> tuple[SequenceModel, Cell, Codec, History]:
    """A trained cell: its model in eval mode, and what belongs to it.

    Raises:
        CheckpointError: a part is missing or damaged.
    """
    cell = load_cell(folder)
    history = History.from_json(_read(folder / HISTORY), folder / HISTORY)
    codec = load_codec(folder / CODEC)
    model = registry.architecture(cell.architecture).build(cell.config, torch.Generator().manual_seed(cell.seed))
    tensors, _ = load_tensors(folder / WEIGHTS)
    load_weights(model, tensors, folder / WEIGHTS)
    return model.to(device).eval(), cell, codec, history


def load_cell(folder: Path) -> Cell:
    """What was asked for in this checkpoint folder. Raises CheckpointError when that cannot be read."""
    try:
        return Cell.from_dict(json.loads(_read(folder / CELL)), str(folder / CELL))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CELL}: not a cell ({error}); delete {folder} and run again") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; train the cell with `archbench run`") from None
