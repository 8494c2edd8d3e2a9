"""How fast a model reads and writes, prefill and decode apart, by wall clock and by CPU time.

    time to first token = prefill of the prompt from a fresh state + the first decode step
    time per token      = decode steps after it / tokens that a row wrote in them
    prefill rate        = tokens of all rows' prompts / prefill

Every sample reads a fresh piece of held-out text. The clocks enclose the model's own calls alone: making tensors of the
prompt, choosing it and collecting garbage happen outside. CPU time is that of all threads of the process; it is
steadier on a shared machine, and beside the wall time it shows how busy the cores were. Every step's counts are read,
as anyone who shows tokens must, so an accelerator is waited for at every step.

Architectures have kernels of different levels (see `ops/backends`), so a level is part of where a time was taken.
"best" is the best that each has on this machine, what its user gets; at "lean", hand-tuned torch, which all have, times
can be held against each other. The record's backend says what ran.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch

from archbench.clocks import CLOCKS, TICK, collector_paused
from archbench.errors import BackendError, ConfigError, UnsupportedError
from archbench.generation import aligned
from archbench.levels import BEST, at_level, check_level
from archbench.metric import Measurement, Probe, Quantity, Sample, Subject, TimedMetric
from archbench.prompts import HeldoutStream, Prompts, heldout_stream
from archbench.roofline import synchronize
from archbench.sampling import Sampling

Place: TypeAlias = dict[str, Any]
"""Context, batch and level."""


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """`contexts` in tokens, `batches` in rows; `new_tokens` are written after the first one; `temperature` 0 is
    greedy; `levels` of the kernel ladder, "best" for the best there is."""

    contexts: tuple[int, ...] = (128, 512, 2048)
    batches: tuple[int, ...] = (1, 4)
    new_tokens: int = 16
    temperature: float = 1.0
    repeats: int = 7
    levels: tuple[str, ...] = (BEST,)

    def __post_init__(self) -> None:
        for name in ("contexts", "batches"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ConfigError(f"latency.{name}: {list(values)}; needs numbers of at least 1")
        for name in ("new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"latency.{name}: {getattr(self, name)}; must be at least 1")
        Sampling(temperature=self.temperature)
        for level in self.levels:
            check_level(level, "latency.levels")
        if not self.levels:
            raise ConfigError("latency.levels: []; name at least one")


class LatencyMetric(TimedMetric):
    name = "latency"
    version = 2
    settings = LatencySettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "time_to_first_token": Quantity(unit="s", better="lower", meaning="reading a prompt and the first decode step"),
        "time_per_token": Quantity(
            unit="s/token", better="lower", meaning="time of decoding per token that a row wrote"
        ),
        "prefill_rate": Quantity(unit="token/s", better="higher", meaning="prompt tokens of all rows read per second"),
    }

    def probes(self, subject: Subject, settings: LatencySettings) -> list[Probe | Measurement]:
        """One probe a context, batch and level; a reason where prompt and continuation do not fit the model or the
        text, or the model has no such level."""
        stream = heldout_stream(subject.corpus, subject.codec, max(settings.contexts))
        found: list[Probe | Measurement] = []
        refused = {level: reason for level in settings.levels if (reason := _refusal(subject, settings, level))}
        for at in _grid(settings):
            try:
                if at["level"] in refused:
                    raise UnsupportedError(refused[at["level"]])
                found.append(_probe(subject, settings, at, stream))
            except UnsupportedError as error:
                found += [
                    Measurement(quantity=quantity, value=None, at={**at, "clock": clock}, reason=str(error))
                    for quantity in self.quantities
                    for clock in CLOCKS
                ]
        return found


def _grid(settings: LatencySettings) -> Iterator[Place]:
    for context in settings.contexts:
        for batch in settings.batches:
            yield from ({"context": context, "batch": batch, "level": level} for level in settings.levels)


def _probe(subject: Subject, settings: LatencySettings, at: Place, stream: HeldoutStream) -> Probe:
    context = at["context"]
    limit, stride = subject.traits.context_limit, subject.traits.stride
    steps = 1 + -(-settings.new_tokens // stride)
    needed = context + -context % stride + steps * stride
    if limit is not None and needed > limit:
        raise UnsupportedError(f"prompt and continuation need {needed} tokens; this model's context limit is {limit}")
    stream.require(context)
    how = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    return Probe(
        at=at,
        sample=partial(_sample, subject, settings, at, Prompts(stream, subject.seed)),
        protocol=f"fresh held-out prompt a sample; {settings.new_tokens} tokens after the first, {how}; "
        f"{torch.get_num_threads()} threads",
    )


def _refusal(subject: Subject, settings: LatencySettings, level: str) -> str:
    """Why the model cannot be read and written at this level; "" where it can."""
    if level == BEST:
        return ""
    model, device = subject.model, subject.model.device
    tokens = aligned(torch.zeros(1, 1, dtype=torch.long), subject.traits.stride).to(device)
    try:
        with at_level(level), torch.inference_mode():
            state = model.prefill(tokens, model.initial_state(1))
            model.decode_step(state, Sampling(temperature=settings.temperature), torch.Generator(device).manual_seed(0))
    except BackendError as error:
        return str(error)
    return ""


def _sample(subject: Subject, settings: LatencySettings, at: Place, prompts: Prompts) -> list[Sample]:
    batch = at["batch"]
    model, device = subject.model, subject.model.device
    sampling = Sampling(temperature=settings.temperature)
    generator = torch.Generator(device).manual_seed(subject.seed)
    tokens = aligned(prompts.take(batch, at["context"]), subject.traits.stride).to(device)
    prefill, first, rest = (Stopwatch(device) for _ in range(3))
    with at_level(at["level"]), torch.inference_mode():
        state = model.initial_state(batch)
        with quiet():
            with prefill:
                state = model.prefill(tokens, state)
            with first:
                _, counts, state = model.decode_step(state, sampling, generator)
                counts.tolist()
            written = torch.zeros_like(counts)
            with rest:
                while int(written.min()) < settings.new_tokens:
                    _, counts, state = model.decode_step(state, sampling, generator)
                    written += counts
    per_row = float(written.float().mean())
    samples = []
    for clock in CLOCKS:
        by = {"clock": clock}
        samples.append(Sample("time_to_first_token", prefill.seconds[clock] + first.seconds[clock], by))
        samples.append(Sample("time_per_token", rest.seconds[clock] / per_row, by))
        samples.append(Sample("prefill_rate", tokens.numel() / prefill.seconds[clock], by))
    return samples


@dataclass
class Stopwatch:
    """Times a block by all clocks, in seconds, waiting for the device at both ends."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> None:
        synchronize(self.device)
        self.begin = {name: clock() for name, clock in CLOCKS.items()}

    def __exit__(self, *exception: object) -> None:
        synchronize(self.device)
        self.seconds = {name: max(clock() - self.begin[name], TICK) for name, clock in CLOCKS.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside; collects before."""
    gc.collect()
    with collector_paused():
        yield


METRIC = LatencyMetric()
