"""Reads checkpoint folders in the Hugging Face layout: config.json beside safetensors files.

Which architecture reads which `model_type`, and how, stands in the architectures' own files (`Architecture.hf`). Only
safetensors are read: unpickling a .bin file runs code that comes with it. Nothing is fetched.

    imported = read_checkpoint(Path("folder"))
    model = build(imported)                      # fp32, eval mode
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from archbench import registry
from archbench.checkpoint import load_weights, save
from archbench.codec import ByteCodec, Codec, TokenizerCodec
from archbench.errors import CheckpointError, ConfigError, suggestion
from archbench.model import HFImport, SequenceModel

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

CONVERT = (
    "import glob, torch, safetensors.torch as s; "
    "s.save_file({k: v.contiguous().clone() for f in sorted(glob.glob('pytorch_model*.bin')) "
    "for k, v in torch.load(f, weights_only=True).items()}, 'model.safetensors')"
)
"""Python that turns the .bin files of the current folder into one model.safetensors, without running pickled code."""


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A checkpoint read into our terms.

    Attributes:
        architecture: the name of the architecture that reads it.
        config: that architecture's config.
        state_dict: its weights in fp32 under our names, tied tensors once.
        facts: where it came from: folder, model_type, files, bytes, sha256 of the weight files, stored dtypes.
    """

    architecture: str
    config: Any
    state_dict: dict[str, Tensor]
    facts: dict[str, Any]


def read_checkpoint(folder: Path) -> ImportedModel:
    """Reads a checkpoint folder.

    Raises:
        ConfigError: config.json asks for something that no architecture here computes; names the key.
        CheckpointError: a file is missing or damaged, or a tensor is missing, left over or misshapen; names it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; fetch one with `hf download NAME --local-dir {folder}`")
    options = _json(folder / CONFIG)
    name, reader = _reader(options, folder / CONFIG)
    try:
        config = reader.config(options)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    files = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_tensors(file))
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    try:
        weights = reader.weights(config, {key: tensor.float() for key, tensor in tensors.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    facts = {
        "folder": folder.name,
        "model_type": options.get("model_type"),
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": _sha256(files),
        "dtypes": dtypes,
    }
    return ImportedModel(architecture=name, config=config, state_dict=weights, facts=facts)


def build(imported: ImportedModel) -> SequenceModel:
    """The model with exactly the imported weights, in fp32 and eval mode."""
    model = registry.architecture(imported.architecture).build(imported.config, Generator().manual_seed(0))
    load_weights(model, imported.state_dict, Path(imported.facts["folder"]))
    return model.eval()


def import_checkpoint(folder: Path, out: Path) -> ImportedModel:
    """Reads a checkpoint folder, checks that its model can be built, and writes it as one of our checkpoints.

    Its tokenizer.json comes along as the codec; without one a vocabulary of 256 is taken for bytes, and any other
    model is imported without a codec: it can be measured on token ids, but not write text.

    Raises:
        ConfigError, CheckpointError: as `read_checkpoint`.
        DataError: tokenizer.json cannot be read.
    """
    imported = read_checkpoint(folder)
    model = build(imported)
    codec: Codec | None = None
    if (folder / TOKENIZER).is_file():
        codec = TokenizerCodec((folder / TOKENIZER).read_text(encoding="utf-8"))
    elif imported.config.vocab_size == ByteCodec().vocab_size:
        codec = ByteCodec()
    save(
        out,
        imported.architecture,
        imported.config,
        model.state_dict(),
        codec=codec,
        origin={"imported": imported.facts},
        history=None,
    )
    return imported


def model_types() -> dict[str, tuple[str, HFImport]]:
    """Every `model_type` that some architecture reads, with that architecture's name.

    Raises:
        ConfigError: two architectures claim the same one.
    """
    found: dict[str, tuple[str, HFImport]] = {}
    for name in registry.architectures():
        for model_type, reader in registry.architecture(name).hf.items():
            if model_type in found:
                raise ConfigError(f"model_type '{model_type}': claimed by both {found[model_type][0]} and {name}")
            found[model_type] = (name, reader)
    return found


def _reader(options: Mapping[str, Any], where: Path) -> tuple[str, HFImport]:
    """Who reads this config. A config that names no model_type (releases older than the convention) goes to whoever
    understands it."""
    known = model_types()
    if options.get("quantization_config") is not None:
        raise ConfigError(f"{where}: quantization_config: allowed: none; import the unquantised checkpoint")
    if "model_type" in options:
        model_type = options["model_type"]
        if model_type not in known:
            raise ConfigError(
                f"{where}: model_type: '{model_type}' is read by no architecture; {suggestion(str(model_type), known)}"
            )
        return known[model_type]
    refusals, accepted = [], []
    for model_type, entry in known.items():
        try:
            entry[1].config(options)
            accepted.append(entry)
        except ConfigError as error:
            refusals.append(f"as {model_type}: {error}")
    if len(accepted) != 1:
        found = "; ".join(refusals) if not accepted else "read by " + " and ".join(name for name, _ in accepted)
        raise ConfigError(f"{where}: names no model_type and cannot be told by its other keys ({found})")
    return accepted[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder holds {CONFIG} beside its weights") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch the folder again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found a {type(data).__name__}; expected a mapping; fetch the folder again")
    return data


def _files(folder: Path) -> list[Path]:
    """The weight files: one, or the shards that the index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        weight_map = _json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: no weight_map; fetch the folder again")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{folder / INDEX}: shard '{shard}' lies outside the folder; it is not read")
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard}: missing, though {INDEX} names it; fetch the folder again")
        return [folder / shard for shard in shards]
    pickled = sorted(folder.glob("*.bin"))
    if pickled:
        raise CheckpointError(
            f"{pickled[0]}: pickled weights are not read, safetensors are; convert them inside {folder} with: "
            f'python -c "{CONVERT}"'
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there; fetch the folder again")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged ({str(error).splitlines()[0]}); fetch it again") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise CheckpointError(f"{file}: tensor {name}: dtype {tensor.dtype}; allowed: {allowed}")
    return tensors


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
