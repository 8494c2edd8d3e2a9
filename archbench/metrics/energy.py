"""Joules per token of reading, writing and a training step, where the machine lets its energy counters be read.

    energy per token = energy drawn while the work is repeated for `seconds` / tokens read or written by all rows
    power            = the same energy / the time it took; of `idle`, while this process sleeps for as long

Energy is gross: the counters see the whole processor or GPU, its idle draw and whatever else runs there. Nothing is
subtracted; the idle power measured in turn with the work stands beside it, for those who want the difference.

Counters move in steps of a millisecond (processors) to tenths of a second (GPUs), so they are read only at both ends of
the repeats. Decoding goes on from a copy of the state after the prompt; the copy counts, once in `new_tokens` tokens. A
training step is forward and backward of one batch in fp32, the optimizer left out; phases get repeats by their share of
the budget, and the tokens are those of the windows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from archbench.errors import ConfigError
from archbench.generation import aligned
from archbench.metric import Measurement, Probe, Quantity, Sample, Subject, TimedMetric
from archbench.model import Batch, parameters_of
from archbench.power import POWERCAP, Meter, meters
from archbench.prompts import HeldoutStream, Prompts, heldout_stream
from archbench.roofline import synchronize
from archbench.sampling import PLAIN
from archbench.state import copy_state

WORKS = ("prefill", "decode", "training_step", "idle")
Work = Callable[[], int]
"""Does the work once; returns the tokens it was done for."""


@dataclass(frozen=True, kw_only=True)
class EnergySettings:
    """`contexts` in tokens, `batches` in rows; `works` are what is measured; `seconds` is how long a sample repeats its
    work; `new_tokens` are written in one repeat of decoding; `powercap` is where Linux shows the counters."""

    contexts: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1,)
    works: tuple[str, ...] = WORKS
    new_tokens: int = 64
    seconds: float = 0.5
    powercap: str = str(POWERCAP)
    repeats: int = 7

    def __post_init__(self) -> None:
        for name in ("contexts", "batches"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ConfigError(f"energy.{name}: {list(values)}; needs numbers of at least 1")
        unknown = [work for work in self.works if work not in WORKS]
        if unknown or not self.works:
            raise ConfigError(f"energy.works: {unknown or 'empty'}; allowed: {', '.join(WORKS)}")
        for name in ("new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"energy.{name}: {getattr(self, name)}; must be at least 1")
        if not self.seconds > 0:
            raise ConfigError(f"energy.seconds: {self.seconds}; must be above 0")


class EnergyMetric(TimedMetric):
    name = "energy"
    version = 1
    settings = EnergySettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "energy_per_token": Quantity(
            unit="J/token", better="lower", meaning="energy drawn by the whole device per token of the work, gross"
        ),
        "power": Quantity(unit="W", better="lower", meaning="energy drawn by the whole device per second of the work"),
    }

    def probes(self, subject: Subject, settings: EnergySettings) -> list[Probe | Measurement]:
        """One probe a work, context and batch, reading all counters there are; a reason for each that should be."""
        found: list[Probe | Measurement] = []
        sources, missing = meters(subject.model.device, Path(settings.powercap))
        for source, reason in missing.items():
            at: dict[str, Any] = {"source": source}
            found += [Measurement(quantity=name, value=None, at=at, reason=reason) for name in self.quantities]
        if not sources:
            return found
        longest = max(settings.contexts) + subject.traits.lookahead
        prompts = Prompts(heldout_stream(subject.corpus, subject.codec, longest), subject.seed)
        if "idle" in settings.works:
            rest = _Idle(settings.seconds)
            found.append(_probe({"work": "idle"}, lambda: rest, sources, settings))
        for work, prepare in PREPARATIONS.items():
            for context, batch in product(settings.contexts, settings.batches) if work in settings.works else ():
                at = {"work": work, "context": context, "batch": batch}
                reason = _impossible(subject, settings, work, context, prompts.stream)
                if reason:
                    places = [{**at, "source": meter.source} for meter in sources]
                    found += [
                        Measurement(quantity=name, value=None, at=place, reason=reason)
                        for name in self.quantities
                        for place in places
                    ]
                else:
                    ready = partial(prepare, subject, settings, context, batch, prompts)
                    found.append(_probe(at, ready, sources, settings))
        return found


def _impossible(subject: Subject, settings: EnergySettings, work: str, context: int, stream: HeldoutStream) -> str:
    """Why this work does not exist here; empty when it does."""
    traits = subject.traits
    needed = context + -context % traits.stride
    if work == "decode":
        needed += (1 + -(-settings.new_tokens // traits.stride)) * traits.stride
    if work == "training_step" and all(not phase.groups for phase in subject.model.phases()):
        return "it learns by reading: no phase has a backward pass"
    if traits.context_limit is not None and needed > traits.context_limit:
        return f"needs {needed} tokens of context; this model's limit is {traits.context_limit}"
    if len(stream.tokens) <= context + traits.lookahead:
        return f"the held-out text has {len(stream.tokens)} tokens; prompts of {context} need more"
    return ""


def _probe(
    at: Mapping[str, object], ready: Callable[[], Work], sources: list[Meter], settings: EnergySettings
) -> Probe:
    covers = "; ".join(f"{meter.source}: {meter.covers}" for meter in sources)
    return Probe(
        at=at,
        sample=partial(_sample, ready, sources, settings.seconds),
        protocol=f"gross, idle power not subtracted; {covers}; work repeated for {settings.seconds:g} s a sample; "
        f"{torch.get_num_threads()} threads",
    )


def _sample(ready: Callable[[], Work], sources: list[Meter], seconds: float) -> list[Sample]:
    work, tokens = ready(), 0
    before, begin = [meter.read() for meter in sources], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        tokens += work()
    after, passed = [meter.read() for meter in sources], time.perf_counter() - begin
    samples = []
    for meter, first, last in zip(sources, before, after, strict=True):
        joules, at = meter.joules(first, last), {"source": meter.source}
        samples.append(Sample("power", joules / passed, at))
        if tokens:
            samples.append(Sample("energy_per_token", joules / tokens, at))
    return samples


@dataclass(frozen=True)
class _Idle:
    seconds: float

    def __call__(self) -> int:
        time.sleep(self.seconds)
        return 0


def _prefill(subject: Subject, settings: EnergySettings, context: int, batch: int, prompts: Prompts) -> Work:
    del settings
    model, prompt = subject.model, _prompt(subject, context, batch, prompts)

    @torch.inference_mode()
    def work() -> int:
        model.prefill(prompt, model.initial_state(batch))
        synchronize(model.device)
        return prompt.numel()

    return work


def _decode(subject: Subject, settings: EnergySettings, context: int, batch: int, prompts: Prompts) -> Work:
    model, generator = subject.model, torch.Generator(subject.model.device).manual_seed(subject.seed)
    with torch.inference_mode():
        prompt = _prompt(subject, context, batch, prompts)
        after_prompt = model.prefill(prompt, model.initial_state(batch))

    @torch.inference_mode()
    def work() -> int:
        state, written = copy_state(after_prompt), torch.zeros(batch, dtype=torch.long, device=model.device)
        while int(written.min()) < settings.new_tokens:
            _, counts, state = model.decode_step(state, PLAIN, generator)
            written += counts
        return int(written.sum())

    return work


def _training_step(subject: Subject, settings: EnergySettings, context: int, batch: int, prompts: Prompts) -> Work:
    """On a copy of the model. Each repeat is a step of the phase that is furthest behind its share."""
    del settings
    model = copy.deepcopy(subject.model).train()
    phases = [phase for phase in model.phases() if phase.groups]
    windows = prompts.take(batch, context + subject.traits.lookahead).to(model.device)
    generator = torch.Generator(model.device).manual_seed(subject.seed)
    done = [0.0] * len(phases)

    def work() -> int:
        index = min(range(len(phases)), key=lambda i: done[i] / phases[i].share)
        loss = phases[index].loss(Batch(windows, 0.0, generator))
        torch.autograd.grad(loss.value, list(parameters_of(phases[index])), allow_unused=True)
        synchronize(model.device)
        done[index] += 1
        return batch * context

    return work


def _prompt(subject: Subject, context: int, batch: int, prompts: Prompts) -> Int[Tensor, "b t"]:
    return aligned(prompts.take(batch, context), subject.traits.stride).to(subject.model.device)


PREPARATIONS: Mapping[str, Callable[[Subject, EnergySettings, int, int, Prompts], Work]] = {
    "prefill": _prefill,
    "decode": _decode,
    "training_step": _training_step,
}
METRIC = EnergyMetric()
