"""Counting FLOPs by watching a computation run: no operator is passed over in silence.

Every operator that torch dispatches is counted by a formula, free by convention, or refused (see `operators`). A
refused one makes the count incomplete, and the count says which.

`causal` is the convention for attention: it weighs the square of the new positions among themselves, 0.5 for the half
that causal attention needs, 1.0 for the full rectangle. A mask is taken to be causal over that square. Attention is
recognised where it is called, before torch splits it up in ways that differ between devices, dropout and versions; its
backward pass counts as twice the forward one, since recomputing scores is a kernel's affair and not the model's.

Optimizer steps are not counted: a few FLOPs per parameter and step, whatever the architecture. Kernels called behind
the dispatcher's back (C extensions, numpy) cannot be seen: wrap them in a `torch.library` operator and give it a
formula with `torch.utils.flop_counter.register_flop_formula`. Because such a kernel would go unnoticed, FLOPs are
counted in three ways that must agree: by the model's formulas, traced, and traced on the meta device.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from archbench.errors import UnsupportedError
from archbench.generation import aligned
from archbench.model import Architecture, Batch, SequenceModel, parameters_of
from archbench.operators import attention_flops, flops_of, is_counted, is_free, name_of
from archbench.sampling import PLAIN

ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Count:
    """What one computation did. `formula` maps operators to FLOPs, the others operators to calls."""

    formula: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    free: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Raises UnsupportedError when an operator was refused: half a count is no count."""
        if self.refused:
            names = ", ".join(f"{name} ({calls} calls)" for name, calls in sorted(self.refused.items()))
            raise UnsupportedError(
                f"flops: no formula for {names}; register one with torch.utils.flop_counter.register_flop_formula"
            )
        return sum(self.formula.values())

    @property
    def coverage(self) -> str:
        """One line: how many calls fell into which list."""
        parts = (("counted", self.calls), ("free", self.free), ("refused", self.refused))
        return ", ".join(f"{sum(calls.values())} calls {name} ({len(calls)} operators)" for name, calls in parts)

    def plus(self, other: Count, weight: float = 1.0) -> Count:
        """Both together; the FLOPs of `other` are multiplied by `weight`, its calls are not."""
        flops = Counter(self.formula)
        for name, value in other.formula.items():
            flops[name] += weight * value  # type: ignore[assignment]
        return Count(
            flops,
            Counter(self.calls) + Counter(other.calls),
            Counter(self.free) + Counter(other.free),
            Counter(self.refused) + Counter(other.refused),
        )


def trace(function: Callable[[], object], causal: float = 0.5) -> Count:
    """Runs `function`, forward and backward passes alike, and counts what it dispatches, on any device."""
    tracer = _Tracer(causal)
    with _AttentionCalls(tracer), tracer:
        function()
    return Count(dict(tracer.formula), dict(tracer.calls), dict(tracer.free), dict(tracer.refused))


class _Tracer(TorchDispatchMode):
    """Sorts operators as they are dispatched; blind while attention, counted where it was called, runs inside."""

    def __init__(self, causal: float) -> None:
        super().__init__()
        self.causal = causal
        self.formula: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.free: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.blind = 0

    def add(self, name: str, flops: float) -> None:
        self.formula[name] += flops  # type: ignore[assignment]
        self.calls[name] += 1

    @contextmanager
    def unseen(self) -> Iterator[None]:
        self.blind += 1
        try:
            yield
        finally:
            self.blind -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if self.blind:
            return func(*args, **kwargs)
        name = name_of(func)
        if is_counted(func):
            out = func(*args, **kwargs)
            self.add(name, flops_of(func, args, kwargs, out, self.causal))
            return out
        if is_free(func):
            self.free[name] += 1
            return func(*args, **kwargs)
        with self:  # under inference mode composite operators arrive whole
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            self.refused[name] += 1
            out = func(*args, **kwargs)
        return out


class _AttentionCalls(TorchFunctionMode):
    """Counts calls of torch's attention by their arguments."""

    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.tracer.blind:
            return func(*args, **kwargs)
        options = {**dict(zip(self.names, args, strict=False)), **kwargs}
        q, k, v, mask = (options.pop(name, None) for name in self.names[:4])
        square = options.get("is_causal", False)
        causal = self.tracer.causal
        flops = attention_flops(q, k, v, square=square, masked=mask is not None, causal=causal)
        self.tracer.add(ATTENTION, flops)
        return _Attention.apply(self.tracer, flops, options, q, k, v, mask)


class _Attention(torch.autograd.Function):
    """torch's attention as one node of the autograd graph, so that its backward pass is counted as one."""

    @staticmethod
    def forward(ctx: Any, tracer: _Tracer, flops: float, options: dict[str, Any], *inputs: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        with tracer.unseen():
            if not any(needs):
                return F.scaled_dot_product_attention(*inputs, **options)  # type: ignore[arg-type]
            with torch.enable_grad():
                leaves = [
                    x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)
                ]
                out = F.scaled_dot_product_attention(*leaves, **options)  # type: ignore[arg-type]
        ctx.tracer, ctx.flops, ctx.leaves, ctx.out = tracer, flops, leaves, out
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        q, k, v, _ = needs
        wanted = [leaf for leaf, needed in zip(ctx.leaves, needs, strict=True) if needed]
        with ctx.tracer.unseen():
            found = iter(torch.autograd.grad(ctx.out, wanted, grad, retain_graph=True))
        # Forward is two products; backward one for each of dV, dP (needed by dQ and dK), dQ and dK.
        ctx.tracer.add(f"{ATTENTION}_backward", ctx.flops / 2 * (q + k + v + any((q, k, needs[3]))))
        return None, None, None, *(next(found) if needed else None for needed in needs)


Work = Literal["training", "prefill", "decode"]
WORKS: Sequence[Work] = ("training", "prefill", "decode")
TOLERANCE = 0.02
"""Counts that differ by more than this share of the largest are flagged."""


@dataclass(frozen=True, kw_only=True)
class ThreeCounts:
    """FLOPs of one work by the formulas, by tracing the model, and by tracing it on the meta device.

    `n_tokens` is how many tokens one row read or wrote in it. `missing` says why a count is None. `coverage` tells of
    the operators met.
    """

    work: Work
    n_tokens: float
    analytic: float
    traced: float | None
    meta: float | None
    missing: Mapping[str, str]
    coverage: str

    @property
    def by_way(self) -> dict[str, float | None]:
        return {"analytic": self.analytic, "traced": self.traced, "meta": self.meta}

    @property
    def disagreement(self) -> float:
        """Largest difference between two of the counts there are, as a share of the largest; 0 to 1."""
        counts = [count for count in self.by_way.values() if count is not None]
        return (max(counts) - min(counts)) / max(counts) if max(counts) else 0.0

    @property
    def agree(self) -> bool:
        return self.disagreement <= TOLERANCE


def count_three_ways(
    architecture: Architecture,
    config: Any,
    context: int,
    causal: float = 0.5,
    *,
    works: Sequence[Work] = WORKS,
    tokens: Int[Tensor, " t"] | None = None,
    model: SequenceModel | None = None,
    run: bool = True,
    steps: int = 1,
) -> dict[Work, ThreeCounts]:
    """FLOPs of one row: training on a window of `context` tokens, reading as many, and `steps` decode steps after them.

    `tokens` are context + lookahead tokens of text, random when left out; text matters only to models whose decode
    steps depend on it. `model` is the trained model, of which a copy is traced, since a model that learns by reading
    would learn from being counted. Without it a fresh one is built; with `run` False none, as for sizes too large to
    run here.
    """
    traits = architecture.traits(config)
    if tokens is None:
        draws = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, config.vocab_size, (context + traits.lookahead,), generator=draws)
    with torch.device("meta"):
        shadow = architecture.build(config, None)
    live = None
    if run:
        live = copy.deepcopy(model) if model is not None else architecture.build(config, Generator().manual_seed(0))
    prompt = aligned(tokens[None, :context], traits.stride)
    inputs = {"training": tokens[None], "prefill": prompt, "decode": prompt}
    return {work: _three_counts(work, shadow, live, inputs[work], context, causal, steps) for work in works}


def _three_counts(
    work: Work,
    shadow: SequenceModel,
    live: SequenceModel | None,
    rows: Int[Tensor, "1 t"],
    context: int,
    causal: float,
    steps: int,
) -> ThreeCounts:
    missing, flops, runs = {}, {}, []
    for way, model in (("traced", live), ("meta", shadow)):
        if model is None:
            missing[way] = "not run: counted by formulas and on the meta device only"
            continue
        try:
            found = _run(work, model, rows, causal, steps)
            runs.append(found)
            if found.count.flops == 0:  # a zero would claim that the work costs nothing
                missing[way] = f"all it does is free by convention: {found.count.coverage}"
            else:
                flops[way] = found.count.flops
        except UnsupportedError as error:
            missing[way] = str(error)
        except (NotImplementedError, RuntimeError) as error:
            if model is live:
                raise
            missing[way] = f"the meta device cannot run it: {str(error).splitlines()[0]}"
    written = runs[0].written if runs else [1.0] * steps
    formulas = shadow.flops()
    if work == "training":
        n_tokens, analytic = float(context), formulas.training(context, causal)
    elif work == "prefill":
        n_tokens, analytic = float(rows.shape[1]), formulas.prefill(rows.shape[1], 0, causal)
    else:
        n_tokens = sum(written)
        analytic = sum(formulas.decode(rows.shape[1] + round(sum(written[:step]))) for step in range(steps))
    return ThreeCounts(
        work=work,
        n_tokens=n_tokens,
        analytic=float(analytic),
        traced=flops.get("traced"),
        meta=flops.get("meta"),
        missing=missing,
        coverage=runs[0].count.coverage if runs else "nothing was traced",
    )


@dataclass(frozen=True)
class _Run:
    """The count of one work, and the tokens a row wrote in each decode step."""

    count: Count
    written: list[float] = field(default_factory=list)


def _run(work: Work, model: SequenceModel, rows: Int[Tensor, "1 t"], causal: float, steps: int) -> _Run:
    rows = rows.to(model.device)
    # The meta device has no generators; the CPU's serve, as nothing is drawn there.
    generator = torch.Generator("cpu" if rows.is_meta else rows.device).manual_seed(0)
    if work == "training":
        return _Run(trace_training(model, rows, causal, generator))
    model.eval()
    with torch.no_grad():
        if work == "prefill":
            return _Run(trace(lambda: model.prefill(rows, model.initial_state(1)), causal))
        return _trace_decode(model, rows, steps, causal, generator)


def trace_training(model: SequenceModel, rows: Int[Tensor, "1 t"], causal: float, generator: Generator) -> Count:
    """Forward and backward of one window of context + lookahead tokens, phases weighed by their shares; those without
    gradient only read."""
    model.train()
    total = Count()
    for phase in model.phases():
        trained = {id(parameter) for parameter in parameters_of(phase)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

        def one_window(phase=phase) -> None:
            loss = phase.loss(Batch(rows, 0.0, generator))
            if phase.groups:
                loss.value.backward()

        total = total.plus(trace(one_window, causal), phase.share)
        model.zero_grad(set_to_none=True)
    return total


def _trace_decode(
    model: SequenceModel, prompt: Int[Tensor, "1 t"], steps: int, causal: float, generator: Generator
) -> _Run:
    state = model.prefill(prompt, model.initial_state(1))
    total, written = Count(), []

    def step() -> None:
        nonlocal state
        emission = model.decode_step(state, PLAIN, generator)
        state = emission.state
        # On the meta device counts have no values; the width of the step is the most they can be.
        written.append(float(emission.tokens.shape[1] if emission.counts.is_meta else emission.counts[0]))

    for _ in range(steps):
        total = total.plus(trace(step, causal))
    return _Run(total, written)
