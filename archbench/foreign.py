"""What imports of other projects' checkpoints share: options and tensors are read strictly, by name.

A checkpoint is taken only when every option that changes its function is understood and every tensor is accounted for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from archbench.errors import CheckpointError, ConfigError

Options = Mapping[str, Any]
"""A parsed config.json, or a part of it."""

Sources = dict[str, dict[str, tuple[int, ...]]]
"""Per tensor of ours, the names and shapes of theirs that make it, stacked along the first axis."""


def integer(options: Options, key: str, default: int | None = None) -> int:
    """The whole number at `key`; `default` where the key is absent or null. Raises ConfigError naming the key."""
    value = options.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key}: missing; a whole number is needed")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r}; must be a whole number")
    return value


def number(options: Options, key: str, default: float) -> float:
    """The number at `key`, `default` where the key is absent or null. Raises ConfigError naming the key."""
    value = options.get(key)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r}; must be a number")
    return float(value)


def only(options: Options, **allowed: Collection[Any]) -> None:
    """Refuses options outside what is supported; absent keys pass, their default must be a supported value.

    Raises:
        ConfigError: names the key, what was found and what is allowed.
    """
    for key, values in allowed.items():
        if key in options and options[key] not in values:
            choices = " or ".join(repr(value) for value in values)
            raise ConfigError(f"{key}: {options[key]!r} is not supported; allowed: {choices}")


def boundary_token(options: Options, vocab_size: int) -> int:
    """The token that stands before a text: `bos_token_id`, or 0 where there is none."""
    token = integer(options, "bos_token_id", 0)
    if not 0 <= token < vocab_size:
        raise ConfigError(f"bos_token_id: {token}; must lie in [0, vocab_size {vocab_size})")
    return token


def rename(
    found: Mapping[str, Tensor],
    sources: Sources,
    *,
    copies: Mapping[str, str] | None = None,
    unused: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under our names; refuses one that does not hold exactly these.

    Args:
        copies: tensors that may be left out and must else equal the tensor they are mapped to (tied weights).
        unused: tensors that may be there and hold nothing that is needed.

    Raises:
        CheckpointError: names the first tensor that is missing, misshapen, left over or an unequal copy.
    """
    copies = copies or {}
    expected = {name: shape for pieces in sources.values() for name, shape in pieces.items()}
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"tensor {name}: missing; the config asks for one of shape {list(shape)}")
        if tuple(found[name].shape) != shape:
            raise CheckpointError(f"tensor {name}: shape {list(found[name].shape)}; the config asks for {list(shape)}")
    for name in found:
        if name not in expected and name not in copies and name not in unused:
            raise CheckpointError(f"tensor {name}: unknown; a model of this kind and config has no such tensor")
    for copy, original in copies.items():
        if copy in found and not torch.equal(found[copy], found[original]):
            raise CheckpointError(f"tensor {copy}: differs from {original}, but the config ties the two")
    return {own: torch.cat([found[name] for name in pieces]) for own, pieces in sources.items()}
