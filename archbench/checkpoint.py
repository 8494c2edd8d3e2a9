"""Checkpoints: a folder a model; tensors as safetensors, everything else as JSON.

    <out>/checkpoints/<address>/
        model.json           architecture and config
        codec.json           the tokens' meaning
        origin.json          where the weights come from: the cell that was trained, or the files that were imported
        history.json         the training log; absent when imported
        model.safetensors    the weights; their presence means that the checkpoint is complete
        partial.safetensors  weights, optimizer and position of a training under way

Every file is written under another name and renamed, so that a kill at any moment leaves the old or the new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from archbench.codec import Codec, load_codec
from archbench.errors import CheckpointError
from archbench.history import History
from archbench.model import SequenceModel, Traits
from archbench.parse import parse

MODEL, CODEC, ORIGIN, HISTORY = "model.json", "codec.json", "origin.json", "history.json"
WEIGHTS, PARTIAL = "model.safetensors", "partial.safetensors"


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


def save(
    folder: Path,
    architecture: str,
    config: Any,
    weights: Mapping[str, Tensor],
    *,
    codec: Codec | None,
    origin: Mapping[str, Any],
    history: History | None,
) -> None:
    """Writes a complete checkpoint; the weights last, since their presence means complete."""
    save_around(folder, architecture, config, codec=codec, origin=origin, history=history)
    save_tensors(folder / WEIGHTS, weights, {})
    (folder / PARTIAL).unlink(missing_ok=True)


def save_around(
    folder: Path,
    architecture: str,
    config: Any,
    *,
    codec: Codec | None,
    origin: Mapping[str, Any],
    history: History | None,
) -> None:
    """Writes all of a checkpoint but its weights, which must follow."""
    described = {"architecture": architecture, "config": dataclasses.asdict(config)}
    write_text(folder / MODEL, json.dumps(described, indent=1))
    write_text(folder / ORIGIN, json.dumps(dict(origin), indent=1))
    if codec is not None:
        codec.save(folder / CODEC)
    if history is not None:
        write_text(folder / HISTORY, history.to_json())


def load_model(folder: Path, device: torch.device | str = "cpu") -> SequenceModel:
    """The model of a complete checkpoint, in eval mode.

    Raises:
        CheckpointError: a part is missing or damaged.
    """
    name, config = load_config(folder)
    model = registry.architecture(name).build(config, torch.Generator().manual_seed(0))
    tensors, _ = load_tensors(folder / WEIGHTS)
    load_weights(model, tensors, folder / WEIGHTS)
    return model.to(device).eval()


def load_traits(folder: Path) -> Traits:
    """What the model of a checkpoint promises, without building it."""
    name, config = load_config(folder)
    return registry.architecture(name).traits(config)


def load_config(folder: Path) -> tuple[str, Any]:
    """The architecture's name and the config of a checkpoint. Raises CheckpointError when they cannot be read."""
    described = _described(folder)
    name = described["architecture"]
    return name, parse(registry.architecture(name).config, described["config"], f"{folder / MODEL}: config")


def weights_sha256(folder: Path) -> str:
    """Hash of the file of weights. Raises CheckpointError when the checkpoint is not complete."""
    if not is_complete(folder):
        raise CheckpointError(f"{folder / WEIGHTS}: no such checkpoint; train the cell with `archbench run`")
    digest = hashlib.sha256()
    with (folder / WEIGHTS).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_history(folder: Path) -> History:
    """The training log of a checkpoint. Raises CheckpointError when there is none."""
    return History.from_json(_read(folder / HISTORY), folder / HISTORY)


def load_own_codec(folder: Path) -> Codec:
    """The codec of a checkpoint. Raises CheckpointError when it came without one."""
    if not (folder / CODEC).is_file():
        raise CheckpointError(f"{folder}: holds no {CODEC}, so its tokens cannot be turned into text")
    return load_codec(folder / CODEC)


def _described(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads(_read(folder / MODEL))
        return {"architecture": str(described["architecture"]), "config": dict(described["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MODEL}: damaged ({error}); delete {folder} and run again") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; train the cell with `archbench run`") from None
