"""Sizes by name: "micro" means the same number of parameters for every architecture.

A named size is a target; each architecture offers candidate configs (`Architecture.candidates`) and the nearest one is
taken, counted on the meta device. So a table can compare architectures of one size and print how far each is from it.
Sizes that a paper published (`Architecture.published`) are taken as printed there, with the paper's own vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from archbench import registry
from archbench.errors import ConfigError, suggestion
from archbench.model import Architecture, SequenceModel
from archbench.state import state_bytes

Axis = Literal["parameters", "non_embedding", "training_flops", "state_bytes"]

SIZES: dict[str, float] = {"nano": 1e5, "micro": 4e5, "mini": 1e6, "small": 4e6, "medium": 1.6e7, "base": 1.25e8}
"""Parameters of each named size, embeddings included."""

FLOPS_PER_PARAMETER = 6.0
"""Training FLOPs a token that stand for one parameter along `training_flops`. Source: Kaplan et al. 2020, table 1."""

STATE_BYTES_PER_PARAMETER = 1.0
"""Bytes of state that stand for one parameter along `state_bytes`: a size's states then take a quarter of the memory of
its fp32 weights. A convention; from micro on, all but the n-grams can be solved for it at contexts up to 256."""

REACH = 0.25
"""A config further than this from its target is no config of that size."""

PATIENCE = 8
"""How many neighbours in a row may be no nearer before the search ends; candidates are ordered by their parameters,
which other axes and overrides follow only roughly."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A config of a size.

    Attributes:
        target, actual: amounts along `axis`: parameters, or training FLOPs per token.
        source: the paper, for a published size; else empty.
    """

    size: str
    config: Any
    axis: Axis
    target: float
    actual: float
    source: str = ""

    @property
    def residual(self) -> float:
        """Relative distance from the target; positive when too large."""
        return self.actual / self.target - 1


def solve(
    architecture: Architecture,
    vocab_size: int,
    size: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    axis: str = "parameters",
    context: int = 256,
) -> Solved:
    """The config of `architecture` nearest to a named size, or the published config of that name.

    Args:
        overrides: config fields held at these values; the others are solved around them. A published config has them
            replaced, and its residual then tells how far that moved it.
        axis: what is matched. "non_embedding" leaves out look-up tables; "training_flops" are analytic FLOPs per token
            of windows of `context` tokens, its target 6 FLOPs per parameter of the size; "state_bytes" are those of one
            row after `context` tokens, its target one byte per parameter of the size.

    Raises:
        ConfigError: an unknown size, axis or field, a value of the wrong type, or a size out of reach; one line that
            says what is allowed.
    """
    kind = architecture.config.__name__
    if axis not in get_args(Axis):
        raise ConfigError(f"match: '{axis}' is not known; {suggestion(axis, get_args(Axis))}")
    measured = _Meter(architecture, axis, context)  # type: ignore[arg-type]
    fixed = _checked(architecture.config, overrides or {})
    if size in architecture.published:
        printed = architecture.config(**architecture.published[size])
        config = dataclasses.replace(printed, **fixed)
        target, actual = measured(printed), measured(config)
        return Solved(
            size=size, config=config, axis=measured.axis, target=target, actual=actual, source=architecture.paper
        )
    if size not in SIZES:
        raise ConfigError(f"size: '{size}' is not known for {kind}; {suggestion(size, available(architecture))}")
    target = SIZES[size] * _PER_PARAMETER.get(axis, 1.0)
    config = _nearest(_offered(architecture, vocab_size, fixed), target, measured)
    actual = measured(config)
    if abs(actual / target - 1) > REACH:
        offered = f"{kind}, vocabulary {vocab_size}" + (", these overrides" if fixed else "")
        raise ConfigError(
            f"size: '{size}' ({axis} {target:.3g}) is out of reach ({offered}); the nearest "
            f"has {actual:.3g}; choose another size or give the config's fields instead"
        )
    return Solved(size=size, config=config, axis=measured.axis, target=target, actual=actual)


def available(architecture: Architecture) -> list[str]:
    """The names that `solve` knows for an architecture: the shared ones if it offers candidates, and its papers'."""
    shared = list(SIZES) if any(True for _ in architecture.candidates(256)) else []
    return [*shared, *architecture.published]


def parameters(model: nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def non_embedding_parameters(model: nn.Module) -> int:
    """Parameters outside look-up tables. An unembedding counts unless it is tied to a table."""
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return parameters(model) - sum(table.numel() for table in tables.values())


def on_meta(architecture: Architecture, config: Any) -> SequenceModel:
    """The model without memory for its weights: for counting."""
    with torch.device("meta"):
        return architecture.build(config, None)


def table(vocab_size: int = 256) -> list[tuple[str, str, str, str, str]]:
    """Every size of every architecture, as text: size, architecture, config, parameters, residual. The shared sizes are
    for codecs of `vocab_size` tokens. Where an architecture does not come in a size, the reason stands for the config.
    """
    rows = []
    for name in registry.architectures():
        architecture = registry.architecture(name)
        for size in available(architecture):
            try:
                solved = solve(architecture, vocab_size, size)
            except ConfigError as error:
                rows.append((size, name, str(error), "", ""))
            else:
                amounts = f"{solved.actual:,.0f}", f"{solved.residual:+.1%}"
                rows.append((size, name, summary(solved.config), *amounts))
    order = {size: position for position, size in enumerate(SIZES)}
    return sorted(rows, key=lambda row: order.get(row[0], len(order)))


def summary(config: Any) -> str:
    """The fields of a config that differ from their defaults, as "d_model=96 n_layers=3"; the vocabulary is left out
    (it belongs to the codec)."""
    values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    del values["vocab_size"]
    return " ".join(f"{name}={value}" for name, (value, default) in values.items() if value != default)


_PER_PARAMETER = {"training_flops": FLOPS_PER_PARAMETER, "state_bytes": STATE_BYTES_PER_PARAMETER}


class _Meter:
    """Counts configs along an axis, each once."""

    def __init__(self, architecture: Architecture, axis: Axis, context: int) -> None:
        self.architecture, self.axis, self.context = architecture, axis, context
        self.seen: dict[Any, float] = {}

    def __call__(self, config: Any) -> float:
        if config not in self.seen:
            model = on_meta(self.architecture, config)
            if self.axis == "parameters":
                self.seen[config] = float(parameters(model))
            elif self.axis == "non_embedding":
                self.seen[config] = float(non_embedding_parameters(model))
            elif self.axis == "state_bytes":
                tokens = torch.zeros(1, self.context, dtype=torch.long, device="meta")
                with torch.no_grad():
                    self.seen[config] = float(state_bytes(model.prefill(tokens, model.initial_state(1))))
            else:
                self.seen[config] = model.flops().training(self.context) / self.context
        return self.seen[config]


def _checked(config: type[Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides with their types converted as in a suite file."""
    hints = get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config) if field.name != "vocab_size"]
    checked = {}
    for key, value in overrides.items():
        if key == "vocab_size":
            raise ConfigError("model.vocab_size: comes from the codec; choose another codec instead")
        if key not in names:
            raise ConfigError(f"model.{key}: unknown key; {suggestion(key, names)}")
        try:
            checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].lower().removeprefix("input ")
            raise ConfigError(f"model.{key}: found {value!r}; {wanted}") from None
    return checked


def _offered(architecture: Architecture, vocab_size: int, fixed: Mapping[str, Any]) -> Sequence[Any]:
    """The candidates with the overrides applied, without those that this makes impossible or equal."""
    offered: dict[Any, None] = {}
    refusal: ConfigError | None = None
    for candidate in architecture.candidates(vocab_size):
        try:
            offered[dataclasses.replace(candidate, **fixed) if fixed else candidate] = None
        except ConfigError as error:
            refusal = error
    if refusal is not None and not offered:
        raise refusal
    if not offered:
        kind = architecture.config.__name__
        names = [field.name for field in dataclasses.fields(architecture.config) if field.name != "vocab_size"]
        printed = f"published sizes: {', '.join(architecture.published)}; " if architecture.published else ""
        raise ConfigError(
            f"size: {kind} does not come in the shared sizes; {printed}or give its fields: {', '.join(names)}"
        )
    return list(offered)


def _nearest(candidates: Sequence[Any], target: float, measured: _Meter) -> Any:
    """The candidate nearest to `target`: bisection, then a walk both ways while it still helps."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if measured(candidates[middle]) < target:
            low = middle + 1
        else:
            high = middle
    best = min(candidates[max(0, low - 1) : low + 1], key=lambda config: abs(measured(config) - target))
    for walk in (candidates[low + 1 :], candidates[: max(0, low - 1)][::-1]):
        idle = 0
        for config in walk:
            nearer = abs(measured(config) - target) < abs(measured(best) - target)
            best, idle = (config, 0) if nearer else (best, idle + 1)
            if idle == PATIENCE:
                break
    return best
