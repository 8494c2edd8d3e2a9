"""What a configuration costs, without weights: for sizes that papers printed and nobody trains here.

The model is built on the meta device, where tensors have shapes and no memory. Parameters and the state are weighed
there; FLOPs are counted by the model's formulas and, at the window's context, by tracing the meta model, operator by
operator. What cannot run here cannot be traced for real: the third count is taken of a stand-in, the smallest config
the architecture offers with the same choices, and must agree with the other two there.

    causal     training, prefill: 1/2 counts the pairs that causal attention needs, 1 the full square, so that every
               token is charged with the whole window
    attention  decode: "full" writes after the whole context, "average" is the mean over all contexts up to it
    count      "analytic", "meta", and "paper" where a paper counts by a rule of its own (`Architecture.paper_flops`)
    draws      candidates a step draws where it has no probabilities to sharpen; 1, at temperature 1, when not given
    part       of the state: "lasting" is what papers call memory, "all" has the buffers of the open segment besides

A decode step may write several tokens. It is charged to all of them, as if all were kept: the least a token can cost.

Source: as `cost`, of which this is the counterpart for cells that are not trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args

import torch

from archbench import registry, sizes
from archbench.errors import ConfigError, UnsupportedError
from archbench.flops import TOLERANCE, Count, ThreeCounts, Work, count_three_ways, trace, trace_training
from archbench.generation import aligned
from archbench.metric import Design, DesignMetric, Measurement, Quantity
from archbench.metrics.cost import parameter_counts
from archbench.model import Architecture, Emission, FlopFormulas, SequenceModel, parameters_of
from archbench.sampling import PLAIN
from archbench.state import State, tensors

Attention = Literal["full", "average"]

POINTS = 64
"""Contexts whose mean stands for all of them: decoding costs grow with the context by a few straight pieces."""

STAND_IN_CONTEXT = 256
STAND_IN_LIMIT = sizes.SIZES["small"]
"""Parameters beyond which a stand-in would take too long to run."""


@dataclass(frozen=True, kw_only=True)
class DesignCostSettings:
    """`contexts` are states' and decode steps', beside the training context; `traced` False leaves the stand-in out.
    The other fields are coordinates, see the module."""

    contexts: tuple[int, ...] = ()
    causal: tuple[float, ...] = (0.5, 1.0)
    attention: tuple[Attention, ...] = ("full", "average")
    draws: tuple[int, ...] = (20, 100, 200)
    traced: bool = True

    def __post_init__(self) -> None:
        if self.contexts and min(self.contexts) < 1:
            raise ConfigError(f"design_cost.contexts: {list(self.contexts)}; token counts must be at least 1")
        if not self.causal or not all(0 < weight <= 1 for weight in self.causal):
            raise ConfigError(f"design_cost.causal: {list(self.causal)}; needs weights in (0, 1]")
        for attention in self.attention:
            if attention not in get_args(Attention):
                raise ConfigError(f"design_cost.attention: {attention!r}; allowed: {', '.join(get_args(Attention))}")
        if self.draws and min(self.draws) < 2:
            raise ConfigError(f"design_cost.draws: {list(self.draws)}; must be at least 2 (1 is always counted)")


class DesignCostMetric(DesignMetric):
    name = "design_cost"
    version = 1
    settings = DesignCostSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "parameters": Quantity(
            unit="parameter", better="neither", meaning="learned numbers: all, outside look-up tables, or of one phase"
        ),
        "training_flops_per_token": Quantity(
            unit="FLOP/token", better="lower", meaning="forward and backward of a window, per token of it"
        ),
        "training_flops": Quantity(unit="FLOP", better="lower", meaning="the same times the tokens of the budget"),
        "prefill_flops_per_token": Quantity(unit="FLOP/token", better="lower", meaning="reading a prompt, per token"),
        "decode_flops_per_token": Quantity(
            unit="FLOP/token", better="lower", meaning="writing, per token that a step can write"
        ),
        "state_numbers": Quantity(unit="number", better="lower", meaning="numbers in the state of one row"),
        "state_bytes": Quantity(unit="B", better="lower", meaning="the same in bytes, all of the state, fp32 weights"),
        "flops_disagreement": Quantity(
            unit="fraction", better="lower", meaning="largest relative difference between the counts"
        ),
    }

    def measure(self, design: Design, settings: DesignCostSettings) -> Iterator[Measurement]:
        architecture = registry.architecture(design.architecture)
        model = sizes.on_meta(architecture, design.config)
        yield from _parameters(model)
        limit = design.traits.context_limit
        ways: dict[str, FlopFormulas] = {"analytic": model.flops()}
        if architecture.paper_flops is not None:
            ways["paper"] = architecture.paper_flops(design.config)
        for context in sorted({design.context, *settings.contexts}):
            if limit is not None and context > limit:
                reason = f"{context} tokens; this model's limit is {limit}"
                yield from _missing(set(self.quantities) - {"parameters"}, context, reason)
                continue
            training, written = context == design.context, design.traits.stride
            try:
                found = _Trace.of(model, design, context, settings.causal[0], training=training)
            except (NotImplementedError, RuntimeError) as error:
                reason = f"the meta device cannot run it: {str(error).splitlines()[0]}"
                yield from _missing({"state_numbers", "state_bytes", "flops_disagreement"}, context, reason)
            else:
                written = found.written
                yield from found.measurements()
            for way, formulas in ways.items():
                if training:
                    yield from _reading(way, formulas, design, settings)
                yield from _writing(way, formulas, written, settings, context)
        if settings.traced:
            yield from _three_counts(architecture, design, settings.causal[0])


def _parameters(model: SequenceModel) -> Iterator[Measurement]:
    total, non_embedding = parameter_counts(model)
    yield Measurement(quantity="parameters", value=total, at={"kind": "total"})
    yield Measurement(quantity="parameters", value=non_embedding, at={"kind": "non_embedding"})
    phases = model.phases()
    for phase in phases if len(phases) > 1 else ():
        learned = {id(parameter): parameter.numel() for parameter in parameters_of(phase)}
        at = {"kind": "phase", "phase": phase.name}
        yield Measurement(quantity="parameters", value=sum(learned.values()), at=at, protocol="trained in this phase")


def _reading(way: str, formulas: FlopFormulas, design: Design, settings: DesignCostSettings) -> Iterator[Measurement]:
    """Training and prefill by one rule, at the window's context."""
    context = design.context
    prompt = context - context % design.traits.stride
    for causal in settings.causal:
        at = {"count": way, "causal": causal, "context": context}
        protocol = f"one row, multiply-add 2, causal attention weighed {causal:g}"
        per_token = formulas.training(context, causal) / context
        yield Measurement(quantity="training_flops_per_token", value=per_token, at=at, protocol=protocol)
        if design.tokens is not None:
            of_budget = f"{protocol}; {design.tokens:.6g} tokens"
            yield Measurement(quantity="training_flops", value=per_token * design.tokens, at=at, protocol=of_budget)
        if prompt:
            reading = formulas.prefill(prompt, 0, causal) / prompt
            yield Measurement(quantity="prefill_flops_per_token", value=reading, at=at, protocol=protocol)


def _writing(
    way: str, formulas: FlopFormulas, written: int, settings: DesignCostSettings, context: int
) -> Iterator[Measurement]:
    """Decode steps by one rule."""
    draw = formulas.further_draw()
    for attention in settings.attention:
        step = formulas.decode(context) if attention == "full" else _mean_decode(formulas, context)
        for draws in (1,) if draw is None else (1, *settings.draws):
            yield Measurement(
                quantity="decode_flops_per_token",
                value=(step + (draws - 1) * (draw or 0.0)) / written,
                at={"count": way, "attention": attention, "context": context, "draws": draws},
                protocol=f"one row, multiply-add 2, {_a_step(written)}",
            )


def _mean_decode(formulas: FlopFormulas, context: int) -> float:
    return sum(formulas.decode(round(context * (i + 0.5) / POINTS)) for i in range(POINTS)) / POINTS


def _a_step(written: int) -> str:
    return f"a step of {written} token{'s' if written > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class _Trace:
    """One pass of a meta model over one row: what it did by kind of work, the state it was left with, and how many
    tokens a decode step writes. Training is left out unless wanted."""

    context: int
    causal: float
    counts: Mapping[Work, tuple[Count, float, float]]
    """Of each work: what was traced, what the formula says, and the tokens read or written."""
    lasting: int
    held: tuple[int, int]
    written: int

    @classmethod
    def of(cls, model: SequenceModel, design: Design, context: int, causal: float, *, training: bool) -> _Trace:
        formulas, generator = model.flops(), torch.Generator()
        tokens = torch.zeros(1, context + design.traits.lookahead, dtype=torch.long, device="meta")
        counts: dict[Work, tuple[Count, float, float]] = {}
        if training:
            counts["training"] = (
                trace_training(model, tokens, causal, generator), formulas.training(context, causal), float(context)
            )  # fmt: skip
        model.eval()
        prompt = aligned(tokens[:, :context], design.traits.stride)
        n = prompt.shape[1]
        with torch.no_grad():
            state = model.initial_state(1)

            def read() -> None:
                nonlocal state
                state = model.prefill(prompt, state)

            counts["prefill"] = trace(read, causal), formulas.prefill(n, 0, causal), float(n)
            lasting, held = sum(tensor.numel() for tensor in tensors(model.lasting(state))), _held(state)
            steps: list[Emission] = []
            count = trace(lambda: steps.append(model.decode_step(state, PLAIN, generator)), causal)
        written = steps[0].tokens.shape[1]
        counts["decode"] = count, formulas.decode(n), float(written)
        return cls(context=context, causal=causal, counts=counts, lasting=lasting, held=held, written=written)

    def measurements(self) -> Iterator[Measurement]:
        for work, (count, analytic, n_tokens) in self.counts.items():
            yield from self._counted(work, count, analytic, n_tokens)
        protocol = "one row, after a prompt"
        for part, value in (("lasting", self.lasting), ("all", self.held[0])):
            at = {"part": part, "context": self.context}
            yield Measurement(quantity="state_numbers", value=value, at=at, protocol=protocol)
        at = {"part": "all", "context": self.context}
        yield Measurement(quantity="state_bytes", value=self.held[1], at=at, protocol=protocol)

    def _counted(self, work: Work, count: Count, analytic: float, n_tokens: float) -> Iterator[Measurement]:
        """What was traced, and how far the formula is from it."""
        convention = {"attention": "full", "draws": 1} if work == "decode" else {"causal": self.causal}
        at = {"count": "meta", **convention, "context": self.context}
        place = {"work": work, "scale": "published", "context": self.context}
        quantity = f"{work}_flops_per_token"
        reason = ""
        try:
            traced = count.flops
        except UnsupportedError as error:
            traced, reason = 0.0, str(error)
        if not traced:  # a zero would claim that the work costs nothing
            reason = reason or f"all it does is free by convention: {count.coverage}"
            yield Measurement(quantity=quantity, value=None, at=at, reason=reason)
            yield Measurement(quantity="flops_disagreement", value=None, at=place, reason=reason)
            return
        yield Measurement(quantity=quantity, value=traced / n_tokens, at=at, protocol=count.coverage)
        apart = abs(traced - analytic) / max(traced, analytic)
        protocol = f"analytic against meta; {count.coverage}"
        yield Measurement(quantity="flops_disagreement", value=apart, at=place, protocol=_flagged(apart) + protocol)


def _flagged(disagreement: float) -> str:
    return f"FLAGGED: the counts differ by more than {TOLERANCE:.0%}; " if disagreement > TOLERANCE else ""


def _missing(quantities: set[str], context: int, reason: str) -> Iterator[Measurement]:
    for quantity in sorted(quantities):
        yield Measurement(quantity=quantity, value=None, at={"context": context}, reason=reason)


def _held(state: State) -> tuple[int, int]:
    """Numbers and bytes in the memory that a state keeps from being freed, unused capacity included. (Storages on the
    meta device all lie at address 0; the identity of the storage itself tells them apart.)"""
    storages = {t.untyped_storage()._cdata: (t.untyped_storage().nbytes(), t.element_size()) for t in tensors(state)}
    return sum(size // each for size, each in storages.values()), sum(size for size, _ in storages.values())


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A small config with the choices of a large one; `without` names those that no small one can have."""

    config: Any
    without: tuple[str, ...] = ()


def stand_in(architecture: Architecture, config: Any) -> StandIn | None:
    """The smallest config offered for bytes, with the choices of `config`: its fields that are no matter of size, that
    is, in which the configs offered do not differ. Of the configs up to `STAND_IN_LIMIT` parameters the first that
    allows all of them; else the smallest, with those that it allows. None where nothing is offered."""
    offered = list(architecture.candidates(256))
    if not offered:
        return None
    names = [field.name for field in dataclasses.fields(config) if field.name != "vocab_size"]
    choices = {name: getattr(config, name) for name in names if len({getattr(c, name) for c in offered}) == 1}
    for candidate in offered:
        small = _with(candidate, choices)
        if small is not None:
            if sizes.parameters(sizes.on_meta(architecture, small)) <= STAND_IN_LIMIT:
                return StandIn(config=small)
            break
    smallest, without = offered[0], []
    for name, value in choices.items():
        changed = _with(smallest, {name: value})
        if changed is None:
            without.append(name)
        else:
            smallest = changed
    return StandIn(config=smallest, without=tuple(without))


def _with(config: Any, choices: Mapping[str, Any]) -> Any | None:
    try:
        return dataclasses.replace(config, **choices)
    except ConfigError:
        return None


def _three_counts(architecture: Architecture, design: Design, causal: float) -> Iterator[Measurement]:
    """How far all three counts are from each other at a size that runs here."""
    small = stand_in(architecture, design.config)
    if small is None:
        at = {"scale": "stand-in", "context": STAND_IN_CONTEXT}
        reason = "the architecture offers no configs by size, hence none small enough to run"
        yield Measurement(quantity="flops_disagreement", value=None, at=at, reason=reason)
        return
    counts = _counted_three_ways(design.architecture, small.config, causal)
    lost = f", without {', '.join(small.without)}" if small.without else ""
    for work, count in counts.items():
        at = {"work": work, "scale": "stand-in", "context": STAND_IN_CONTEXT}
        if count.missing:
            reason = "; ".join(f"{way}: {why}" for way, why in count.missing.items())
            yield Measurement(quantity="flops_disagreement", value=None, at=at, reason=reason)
            continue
        protocol = f"analytic, traced and meta at {sizes.summary(small.config)}{lost}; {count.coverage}"
        flag = _flagged(count.disagreement)
        yield Measurement(quantity="flops_disagreement", value=count.disagreement, at=at, protocol=flag + protocol)


@cache
def _counted_three_ways(architecture: str, config: Any, causal: float) -> dict[Work, ThreeCounts]:
    """Once a process: the sizes of a paper have the same stand-in."""
    return count_three_ways(registry.architecture(architecture), config, STAND_IN_CONTEXT, causal)


METRIC = DesignCostMetric()
