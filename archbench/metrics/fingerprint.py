"""What a model does before it has learned anything: which operators it calls, and what its first step computes.

None of it varies from run to run. The operators and the bytes they touch are the same wherever the versions of torch
and the kernels are; the first loss and the norms of its gradients are the same up to rounding on every machine. So a
change in them is a change in the code, and is seen without training: a gradient of twice its size hardly moves a model
trained by Adam, and stands out here.

Everything is measured on a model with first weights, drawn by the cell's seed, and on held-out text: one step of every
phase of training on a batch of the cell's shape, reading a prompt of one row, and a few decode steps after it. Each is
done once before, by another model, so that what is made only once in a process is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archbench import registry
from archbench.errors import ConfigError
from archbench.generation import aligned
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import Batch, Phase, SequenceModel, parameters_of
from archbench.operators import name_of
from archbench.prompts import Prompts, heldout_stream
from archbench.sampling import PLAIN


@dataclass(frozen=True, kw_only=True)
class FingerprintSettings:
    """`decode_steps` after a prompt of the training context."""

    decode_steps: int = 4

    def __post_init__(self) -> None:
        if self.decode_steps < 1:
            raise ConfigError(f"fingerprint.decode_steps: {self.decode_steps}; must be at least 1")


class FingerprintMetric(Metric):
    name = "fingerprint"
    version = 1
    settings = FingerprintSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "operator_calls": Quantity(unit="call", better="neither", meaning="operators dispatched; by name in the notes"),
        "operator_bytes": Quantity(unit="B", better="neither", meaning="bytes of the tensors they read and wrote"),
        "activation_bytes": Quantity(
            unit="B", better="neither", meaning="tensors kept for the backward pass of a step, parameters left out"
        ),
        "first_loss": Quantity(unit="nat/token", better="neither", meaning="loss of first weights on the first batch"),
        "gradient_norm": Quantity(
            unit="nat/token", better="neither", meaning="norm of its gradient; the samples are each parameter's"
        ),
    }

    def measure(self, subject: Subject, settings: FingerprintSettings) -> Iterator[Measurement]:
        """Raises UnsupportedError when there is less held-out text than a training window."""
        width = subject.context + subject.traits.lookahead
        rows = Prompts(heldout_stream(subject.corpus, subject.codec, width), subject.seed).take(subject.batch, width)
        rows = rows.to(subject.model.device)
        warm = _fresh(subject)
        for phase in warm.phases():
            _Step(warm, phase, subject.seed).take(rows)
        yield from _training(_fresh(subject), rows, subject)
        limit = subject.traits.context_limit
        most = subject.context + settings.decode_steps * subject.traits.stride
        if limit is not None and most > limit:
            reason = f"needs {most} tokens of context; this model's limit is {limit}"
            for work in ("prefill", "decode"):
                for quantity in ("operator_calls", "operator_bytes"):
                    at = {"work": work, "context": subject.context}
                    yield Measurement(quantity=quantity, value=None, at=at, reason=reason)
            return
        prompt = aligned(rows[:1, : subject.context], subject.traits.stride)
        _writing(_fresh(subject), prompt, settings.decode_steps, subject.seed)
        for work, watched in _writing(_fresh(subject), prompt, settings.decode_steps, subject.seed).items():
            yield from _watched(watched, {"work": work, "context": subject.context})


def _fresh(subject: Subject) -> SequenceModel:
    """The cell's model with first weights."""
    architecture = registry.architecture(subject.architecture)
    model = architecture.build(subject.config, torch.Generator().manual_seed(subject.seed))
    return model.to(subject.model.device)


def _training(model: SequenceModel, rows: Int[Tensor, "b t"], subject: Subject) -> Iterator[Measurement]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    total = Watched()
    for phase in model.phases():
        step = _Step(model, phase, subject.seed)
        total.add(watch(partial(step.take, rows)))
        at = {"phase": phase.name}
        yield Measurement(quantity="first_loss", value=step.loss, at=at)
        if not phase.groups:
            continue
        yield Measurement(quantity="activation_bytes", value=step.kept, at=at)
        norms = {names[id(p)]: 0.0 if p.grad is None else float(p.grad.double().norm()) for p in parameters_of(phase)}
        yield Measurement(
            quantity="gradient_norm",
            value=sum(norm**2 for norm in norms.values()) ** 0.5,
            samples=list(norms.values()),
            at=at,
            protocol=f"of {', '.join(norms)}",
        )
        model.zero_grad(set_to_none=True)
    yield from _watched(total, {"work": "training", "context": subject.context})


class _Step:
    """One forward and backward pass of a phase. `loss` is its value, `kept` the bytes of what was saved for the
    backward pass, as often as it was saved: memory itself may be freed and taken again within a loss."""

    def __init__(self, model: SequenceModel, phase: Phase, seed: int) -> None:
        self.model, self.phase, self.seed = model, phase, seed
        self.loss, self.kept = 0.0, 0

    def take(self, rows: Int[Tensor, "b t"]) -> None:
        self.model.train()
        trained = {id(parameter) for parameter in parameters_of(self.phase)}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        self.kept = 0

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                self.kept += tensor.numel() * tensor.element_size()
            return tensor

        generator = torch.Generator(rows.device).manual_seed(self.seed)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.phase.loss(Batch(rows, 0.0, generator)).value
        if self.phase.groups:
            loss.backward()
        self.loss = float(loss.detach())


@torch.no_grad()
def _writing(model: SequenceModel, prompt: Int[Tensor, "1 t"], steps: int, seed: int) -> dict[str, Watched]:
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    state: Any = model.initial_state(1)

    def read() -> None:
        nonlocal state
        state = model.prefill(prompt, state)

    def write() -> None:
        nonlocal state
        for _ in range(steps):
            state = model.decode_step(state, PLAIN, generator).state

    return {"prefill": watch(read), "decode": watch(write)}


@dataclass
class Watched:
    """Calls by operator, and the bytes of what operators that do not merely make views read and wrote."""

    calls: Counter[str] = field(default_factory=Counter)
    n_bytes: int = 0

    def add(self, other: Watched) -> None:
        self.calls.update(other.calls)
        self.n_bytes += other.n_bytes


def watch(function: Callable[[], object]) -> Watched:
    """Runs `function` and notes what it dispatches."""
    watcher = _Watcher()
    with watcher:
        function()
    return watcher.seen


class _Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Watched()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.seen.calls[name_of(func).removeprefix("aten::")] += 1
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.seen.n_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def _watched(watched: Watched, at: Mapping[str, Any]) -> Iterator[Measurement]:
    by_name = ", ".join(f"{name} {calls}" for name, calls in sorted(watched.calls.items()))
    yield Measurement(quantity="operator_calls", value=watched.calls.total(), at=at, protocol=by_name)
    yield Measurement(quantity="operator_bytes", value=watched.n_bytes, at=at, protocol="views not counted")


METRIC = FingerprintMetric()
