"""How much memory work needs beyond what was held before it: training steps, prefill, decode steps.

On a CPU this is resident memory as the kernel sees it: freed memory is handed back first, the kernel's high-water mark
is set back to the present level, the work runs, and the mark is read again. Holes that earlier work left in the heap
are taken meanwhile: blocks placed in them at random would keep more of it in use the longer the work goes on, though
nothing is kept. Everything counts that the work allocates:
activations, gradients, optimizer moments, the state, scratch of libraries. The work has run once before, so that what
is loaded or allocated only the first time does not. On an accelerator the allocator's own high-water mark is read.

Models, inputs, and for decoding the state read into, are there before and do not count. The kernel counts in pages and
lazily: what is below about a megabyte is noise and may read as 0.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import aligned
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import Batch, Phase, SequenceModel, parameters_of
from archbench.sampling import PLAIN

MMAP_THRESHOLD, LARGE = -3, 128 * 1024
"""An option of glibc's mallopt(3), and its first value: blocks of that size come from the kernel and go back to it,
unless a hole of the heap holds them. Left alone, glibc raises it up to 32 MB as blocks are freed."""
PLUG, MOST_PLUGS = 64 * 1024, 2**14
"""Size in bytes of what fills the holes, and how many there may be."""
CLEAR_HIGH_WATER_MARK = "5"
"""What proc(5) wants written to /proc/self/clear_refs."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """`contexts` in tokens and `batch` in rows, for prefill and decode; the training step has the cell's own."""

    contexts: tuple[int, ...] = (128, 512, 2048)
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"memory.contexts: {list(self.contexts)}; needs token counts of at least 1")
        if self.batch < 1:
            raise ConfigError(f"memory.batch: {self.batch}; must be at least 1")


class MemoryMetric(Metric):
    name = "memory"
    version = 2
    settings = MemorySettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "peak_rss": Quantity(unit="B", better="lower", meaning="peak resident memory above the level before the work"),
        "peak_device": Quantity(unit="B", better="lower", meaning="peak accelerator memory above the level before"),
    }

    def measure(self, subject: Subject, settings: MemorySettings) -> Iterator[Measurement]:
        yield _measured(subject, "training_step", subject.context, subject.batch, _training_step)
        for context in settings.contexts:
            yield _measured(subject, "prefill", context, settings.batch, _prefill)
            yield _measured(subject, "decode", context, settings.batch, _decode)


Preparation = Callable[[Subject, int, int], Callable[[], Callable[[], object]]]
"""(subject, context, batch) -> what makes ready one run of the work -> the work."""


def _measured(subject: Subject, work: str, context: int, batch: int, prepare: Preparation) -> Measurement:
    at = {"work": work, "context": context, "batch": batch}
    device = subject.model.device
    quantity = "peak_rss" if device.type == "cpu" else "peak_device"
    limit, needed = subject.traits.context_limit, context + (subject.traits.stride if work == "decode" else 0)
    if limit is not None and needed > limit:
        reason = f"needs {needed} tokens of context; this model's limit is {limit}"
        return Measurement(quantity=quantity, value=None, at=at, reason=reason)
    try:
        value = peak_bytes(prepare(subject, context, batch), device)
    except UnsupportedError as error:
        return Measurement(quantity=quantity, value=None, at=at, reason=str(error))
    return Measurement(quantity=quantity, value=value, at=at, protocol="peak above the level before, second run")


def peak_bytes(ready: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Peak memory above the level before, in bytes, of the second of two runs of the work that `ready` makes.

    Raises:
        UnsupportedError: this system does not tell.
    """
    ready()()
    work = ready()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise UnsupportedError(f"no way is known to read the peak memory of a device of type '{device.type}'")
    _give_back_freed()
    with _holes_taken():
        _clear_high_water_mark()
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)


def _give_back_freed() -> None:
    """Hands freed memory back to the system, so that reusing it shows; large blocks from now on at once. Raises
    UnsupportedError without glibc."""
    gc.collect()
    try:
        glibc = ctypes.CDLL(None)
        glibc.mallopt(MMAP_THRESHOLD, LARGE)
        glibc.malloc_trim(0)
    except (AttributeError, TypeError, OSError):
        raise UnsupportedError("peak memory needs Linux with glibc: freed memory cannot be handed back here") from None


@contextmanager
def _holes_taken() -> Iterator[None]:
    """Takes blocks, and touches none, until the heap has to grow for one: no large hole is left then."""
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    end = libc.sbrk(0)
    plugs: list[int] = []
    while libc.sbrk(0) == end and len(plugs) < MOST_PLUGS:
        plugs.append(libc.malloc(PLUG))
    try:
        yield
    finally:
        for plug in plugs:
            libc.free(plug)


def _clear_high_water_mark() -> None:
    try:
        Path("/proc/self/clear_refs").write_text(CLEAR_HIGH_WATER_MARK)
    except OSError as error:
        raise UnsupportedError(
            f"peak memory needs /proc/self/clear_refs, which cannot be written here ({error.strerror}); "
            "run on Linux outside a restricted container"
        ) from None


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes (the kernel gives kB of 1024)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise UnsupportedError(f"peak memory needs the line {name} of /proc/self/status, which is not there")


def _tokens(subject: Subject, context: int, batch: int) -> torch.Tensor:
    """Random ids: what is read does not change how much memory it takes."""
    generator = torch.Generator().manual_seed(subject.seed)
    return torch.randint(1, subject.model.vocab_size, (batch, context), generator=generator).to(subject.model.device)


def _prompt(subject: Subject, context: int, batch: int) -> torch.Tensor:
    return aligned(_tokens(subject, context, batch), subject.traits.stride)


def _prefill(subject: Subject, context: int, batch: int) -> Callable[[], Callable[[], object]]:
    model, prompt = subject.model, _prompt(subject, context, batch)

    @torch.inference_mode()
    def work() -> object:
        return model.prefill(prompt, model.initial_state(batch))

    return lambda: work


def _decode(subject: Subject, context: int, batch: int) -> Callable[[], Callable[[], object]]:
    model, prompt = subject.model, _prompt(subject, context, batch)
    generator = torch.Generator(model.device).manual_seed(subject.seed)

    def ready() -> Callable[[], object]:
        with torch.inference_mode():
            state = model.prefill(prompt, model.initial_state(batch))

        @torch.inference_mode()
        def work() -> object:
            return model.decode_step(state, PLAIN, generator)

        return work

    return ready


def _training_step(subject: Subject, context: int, batch: int) -> Callable[[], Callable[[], object]]:
    """One step of every phase, on a copy of the model."""
    tokens = _tokens(subject, context + subject.traits.lookahead, batch)

    def ready() -> Callable[[], object]:
        model = copy.deepcopy(subject.model).train()
        generator = torch.Generator(model.device).manual_seed(subject.seed)

        def work() -> None:
            for phase in model.phases():
                _step(model, phase, Batch(tokens, 0.0, generator))

        return work

    return ready


def _step(model: SequenceModel, phase: Phase, batch: Batch) -> None:
    """Forward, backward and fused AdamW; gradients and moments go at the end, as they do between phases."""
    trained: list[Any] = list(parameters_of(phase))
    ids = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    loss = phase.loss(batch)
    if phase.groups:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


METRIC = MemoryMetric()
