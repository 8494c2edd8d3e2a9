"""Turns a trained checkpoint into one of another architecture, to be trained further.

Which architectures become which, and how, stands in the target's own file (`Architecture.conversions`). The result is a
checkpoint like any other: a suite's cell goes on from it by `start_from: FOLDER`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Generator

from archbench import checkpoint, registry
from archbench.errors import CheckpointError, ConfigError
from archbench.parse import parse


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was made of what: names of architectures, the new config, and the numbers of parameters."""

    source: str
    architecture: str
    config: Any
    n_parameters_before: int
    n_parameters: int


def convert(folder: Path, to: str, out: Path, changes: Mapping[str, Any] | None = None) -> Converted:
    """Writes the checkpoint in `folder` as one of the architecture `to` into `out`, with the same codec.

    `changes` are fields of the new config that differ from what the conversion makes of the old one.

    Raises:
        ConfigError: `to` cannot be made from that architecture, or not with these changes.
        CheckpointError: a part of the checkpoint is missing or damaged, or `out` is the same folder.
    """
    source, old_config = checkpoint.load_config(folder)
    target = registry.architecture(to)
    if source not in target.conversions:
        known = ", ".join(sorted(target.conversions)) or "none"
        raise ConfigError(f"--to {to}: cannot be made from {source}; it can from: {known}")
    if out.resolve() == folder.resolve():
        raise CheckpointError(f"{out}: holds the checkpoint to convert; choose another folder by --out")
    conversion = target.conversions[source]
    config = parse(target.config, {**conversion.config(old_config), **(changes or {})}, "--set")
    tensors, _ = checkpoint.load_tensors(folder / checkpoint.WEIGHTS)
    model = target.build(config, Generator().manual_seed(0))
    checkpoint.load_weights(model, conversion.weights(config, tensors), folder / checkpoint.WEIGHTS)
    codec = checkpoint.load_own_codec(folder) if (folder / checkpoint.CODEC).is_file() else None
    origin = {
        "converted": {
            "architecture": source,
            "checkpoint": folder.resolve().name,
            "sha256": checkpoint.weights_sha256(folder),
            "changes": dict(changes or {}),
        }
    }
    checkpoint.save(out, to, config, model.state_dict(), codec=codec, origin=origin, history=None)
    return Converted(
        source=source,
        architecture=to,
        config=config,
        n_parameters_before=sum(tensor.numel() for tensor in tensors.values()),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
