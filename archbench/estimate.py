"""What a plan will cost, said before anything runs: FLOPs exactly, memory and time as estimates with their basis."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from archbench import registry
from archbench.cell import Cell
from archbench.codec import codec_from
from archbench.data.windows import tokenize
from archbench.model import Batch, SequenceModel, parameters_of
from archbench.plan import corpus_of
from archbench.roofline import matmul_peak
from archbench.sizes import on_meta
from archbench.train import steps_of

PROBE_FLOPS = 1e11
"""A training step of at most this many FLOPs is timed; a larger one is judged by the matmul peak."""

ASSUMED_UTILISATION = 0.25
"""Share of the matmul peak that a step too large to time is assumed to reach."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of training one cell: `seconds` are of one worker, measuring excluded; `basis` says how the time was
    found."""

    parameters: int
    steps: int | None
    training_flops: float
    seconds: float
    basis: str


def estimate(cell: Cell, threads: int = 1) -> Estimate:
    """Costs of training `cell` with `threads` threads on this machine's CPU."""
    torch.set_num_threads(threads)
    architecture, training = registry.architecture(cell.architecture), cell.training
    shell = on_meta(architecture, cell.config)
    flops_per_step = shell.flops().training(training.context) * training.batch
    stream = tokenize(corpus_of(cell.corpus).train, codec_from(cell.codec, corpus_of(cell.corpus)), cell.seed)
    steps = steps_of(training, flops_per_step, stream.bytes_per_token)
    parameters = sum(parameter.numel() for parameter in shell.parameters())
    if flops_per_step <= PROBE_FLOPS:
        model = architecture.build(cell.config, torch.Generator().manual_seed(cell.seed))
        per_step = _step_seconds(model, torch.randint(1, cell.config.vocab_size, _batch(cell)))
        basis = "timed steps"
    else:
        per_step = flops_per_step / (ASSUMED_UTILISATION * matmul_peak(torch.float32))
        basis = f"{ASSUMED_UTILISATION:.0%} of the matmul peak"
    if steps is None:
        seconds, steps, basis = training.budget.amount, round(training.budget.amount / per_step), "the budget"
    else:
        seconds = steps * per_step
    return Estimate(
        parameters=parameters,
        steps=steps,
        training_flops=flops_per_step * steps,
        seconds=seconds,
        basis=basis,
    )


def training_memory(cell: Cell) -> int:
    """Bytes of weights, gradients, optimizer and the activations saved for the backward pass."""
    shell = on_meta(registry.architecture(cell.architecture), cell.config)
    parameters = sum(parameter.numel() for parameter in shell.parameters())
    saved = _saved_bytes(shell, torch.zeros(_batch(cell), dtype=torch.long, device="meta"))
    return 16 * parameters + saved  # fp32 weight, gradient and two moments


def _batch(cell: Cell) -> tuple[int, int]:
    lookahead = registry.architecture(cell.architecture).traits(cell.config).lookahead
    return cell.training.batch, cell.training.context + lookahead


def _saved_bytes(model: SequenceModel, tokens: torch.Tensor) -> int:
    """Bytes that the largest phase's loss keeps for its backward pass."""
    most = 0
    for phase in model.phases():
        if not phase.groups:
            continue
        total = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            phase.loss(Batch(tokens, 0.0, torch.Generator()))
        most = max(most, total)
    return most


def _step_seconds(model: SequenceModel, tokens: torch.Tensor, repeats: int = 3) -> float:
    """Seconds of a step, the phases weighed by their shares; the first of each warms up."""
    total = 0.0
    for phase in model.phases():
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            loss = phase.loss(Batch(tokens, 0.0, torch.Generator().manual_seed(0)))
            if phase.groups:
                torch.autograd.grad(loss.value, list(parameters_of(phase)), allow_unused=True)
            times.append(time.perf_counter() - begin)
        total += phase.share * statistics.median(times[1:])
    return total
