"""The trainer: one loop for every architecture, over the phases a model declares.

It knows budgets, schedules, precision, clipping and interruption; it knows no architecture. A training killed at any
moment resumes from its last partial checkpoint and ends with the same weights, since windows, losses' randomness and
schedule depend on the step and the totals alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archbench import heap
from archbench.cell import Precision, Training
from archbench.checkpoint import PARTIAL, load_tensors, load_weights, save_tensors
from archbench.data.examples import Examples, Rows
from archbench.errors import ArchbenchError, CheckpointError, ConfigError, TrainingError
from archbench.history import History, Point
from archbench.model import Batch, Loss, Phase, SequenceModel, parameters_of
from archbench.ops import backends
from archbench.roofline import matmul_peak

POINTS = 200
"""Points of the log over a whole training."""

BF16_GAIN = 1.1
"""bf16 autocast must be this much faster than fp32 in the probe to be chosen."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands: `done` in [0, 1], `loss` of the last point, and how long the rest will take."""

    phase: str
    done: float
    loss: float
    tokens_per_s: float
    seconds_left: float


@dataclass(kw_only=True)
class Totals:
    """What has been spent since training began, over all its sessions."""

    step: int = 0
    tokens: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(kw_only=True)
class _Mean:
    """Mean loss and parts since the last point."""

    n: int = 0
    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Loss, beside: Mapping[str, float]) -> float:
        value = float(loss.value.detach())
        self.n += 1
        self.loss += value
        for name, part in {**{name: float(part) for name, part in loss.parts.items()}, **beside}.items():
            self.parts[name] = self.parts.get(name, 0.0) + part
        return value


class Stopped(ArchbenchError):
    """Training was asked to stop; what was reached is in the partial checkpoint."""


def train(
    model: SequenceModel,
    examples: Examples,
    training: Training,
    *,
    lookahead: int = 1,
    seed: int,
    folder: Path,
    notify: Callable[[Progress], None] = lambda _progress: None,
    save_every_s: float = 10.0,
    stop: Callable[[], bool] = lambda: False,
) -> History:
    """Trains `model` in place until its budget is spent and returns the log.

    `lookahead` is the model's trait: rows are that many tokens longer than the context. `folder` receives partial
    checkpoints, one each `save_every_s` seconds of training; a partial checkpoint found there is continued. Once `stop`
    says so, a last one is written and training ends.

    Raises:
        Stopped: `stop` said so.
        TrainingError: the loss or a gradient is not finite; the message names phase and step.
        CheckpointError: the partial checkpoint is damaged.
    """
    with heap.kept():
        return _Trainer(model, examples, training, lookahead, seed, folder, notify, save_every_s, stop).run()


class _Trainer:
    def __init__(
        self,
        model: SequenceModel,
        examples: Examples,
        training: Training,
        lookahead: int,
        seed: int,
        folder: Path,
        notify: Callable[[Progress], None],
        save_every_s: float,
        stop: Callable[[], bool],
    ) -> None:
        self.model, self.examples, self.training = model, examples, training
        self.lookahead, self.seed = lookahead, seed
        self.folder, self.notify, self.save_every_s, self.stop = folder, notify, save_every_s, stop
        self.mean = _Mean()
        self.phases = model.phases()
        _check_phases(self.phases)
        self.flops_per_row = {examples.context: model.flops().training(examples.context)}
        self.totals = Totals()
        self.phase_index = 0
        self.history = History(threads=torch.get_num_threads(), device=model.device.type)
        self.saved_at = 0.0

    def run(self) -> History:
        self.model.train()
        backends.forget()
        resumed = self._resume()
        if resumed is None:
            self._choose_precision()
        for index in range(self.phase_index, len(self.phases)):
            self.phase_index = index
            phase = self.phases[index]
            optimizer = optimizer_of(phase, self.training)
            if resumed is not None:
                _restore_optimizer(optimizer, self._names(), resumed)
                resumed = None
            self._run_phase(phase, optimizer)
        self.model.eval()
        self.history.backend = backends.in_use()
        return self.history

    def _run_phase(self, phase: Phase, optimizer: torch.optim.Optimizer | None) -> None:
        begin = sum(p.share for p in self.phases[: self.phase_index])
        trained = list(parameters_of(phase))
        trained_ids = {id(p) for p in trained}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained_ids)
        clock = _Clock(self.totals)
        next_point = self._point_after(self._spent())
        while (spent := self._spent()) < begin + phase.share - 1e-12:
            progress = (spent - begin) / phase.share
            share = schedule(progress, self.training.warmup, self.training.final, self.training.decay)
            rate = self.training.learning_rate * share
            beside = self.examples.parts()
            loss = self._step(phase, optimizer, trained, progress, rate)
            value = self.mean.add(loss, beside)
            if not math.isfinite(value):
                raise TrainingError(
                    f"phase {phase.name}, step {self.totals.step}: the loss is {value}; lower training.learning_rate"
                )
            clock.tick()
            spent = self._spent()
            ended = spent >= begin + phase.share - 1e-12
            if spent >= next_point or ended:
                next_point = self._point_after(spent)
                self._log(phase, rate, spent)
            stopped = self.stop()
            if spent < 1 and (stopped or ended or self.totals.seconds - self.saved_at >= self.save_every_s):
                self._save(optimizer)
            clock.tick()
            if stopped:
                raise Stopped(f"stopped after step {self.totals.step}; the same command goes on from here")

    def _step(
        self,
        phase: Phase,
        optimizer: torch.optim.Optimizer | None,
        trained: Sequence[nn.Parameter],
        progress: float,
        rate: float,
    ) -> Loss:
        step, device = self.totals.step, self.model.device
        rows, context = self.examples.rows_at(step, self.lookahead), self.examples.context
        generator = torch.Generator(device).manual_seed((self.seed << 32) + step)
        with autocast(self.history.precision, device):
            loss = phase.loss(_batch(rows, progress, generator))
        if optimizer is not None:
            norm = gradients_of(loss, optimizer, trained, self.training.clip)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"phase {phase.name}, step {step}: the gradient is not finite; lower training.learning_rate"
                )
            descend(optimizer, rate)
        self.totals.step += 1
        self.totals.tokens += len(rows.tokens) * context
        self.totals.bytes += self.examples.bytes_at(step)
        self.totals.flops += len(rows.tokens) * self._flops_of_row(context)
        self.examples.told(loss.parts)
        return loss

    def _flops_of_row(self, context: int) -> float:
        if context not in self.flops_per_row:
            self.flops_per_row[context] = self.model.flops().training(context)
        return self.flops_per_row[context]

    def _spent(self) -> float:
        budget = self.training.budget
        return getattr(self.totals, budget.unit) / budget.amount

    def _point_after(self, spent: float) -> float:
        return (math.floor(spent * POINTS + 1e-9) + 1) / POINTS

    def _log(self, phase: Phase, rate: float, spent: float) -> None:
        mean, self.mean = self.mean, _Mean()
        parts = {name: total / mean.n for name, total in mean.parts.items()}
        point = Point(phase=phase.name, loss=mean.loss / mean.n, learning_rate=rate, parts=parts, **asdict(self.totals))
        self.history.points.append(point)
        seconds = self.totals.seconds
        self.notify(
            Progress(
                phase=phase.name,
                done=min(spent, 1.0),
                loss=point.loss,
                tokens_per_s=self.totals.tokens / seconds if seconds else 0.0,
                seconds_left=seconds / spent * max(0.0, 1 - spent),
            )
        )

    def _choose_precision(self) -> None:
        precision, reason = choose_precision(
            self.training.precision, self.model, self.phases[0], self.examples.rows_at(0, self.lookahead)
        )
        self.history.precision, self.history.precision_reason = precision, reason
        dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
        self.history.matmul_peak = matmul_peak(dtype)

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.saved_at = self.totals.seconds
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        names = self._names()
        for parameter, state in optimizer.state.items() if optimizer is not None else ():
            for key, value in state.items():
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value
        facts = {"totals": asdict(self.totals), "phase": self.phase_index, "mean": asdict(self.mean)}
        facts["history"], facts["examples"] = self.history.to_json(), self.examples.position()
        save_tensors(self.folder / PARTIAL, tensors, facts)

    def _resume(self) -> dict[str, Tensor] | None:
        """Takes up the partial checkpoint, if there is one, and returns its optimizer's tensors."""
        path = self.folder / PARTIAL
        if not path.is_file():
            return None
        tensors, facts = load_tensors(path)
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        load_weights(self.model, weights, path)
        try:
            self.totals = Totals(**facts["totals"])
            self.phase_index = facts["phase"]
            self.mean = _Mean(**facts["mean"])
            self.examples.go_to(facts["examples"])
            self.history = History.from_json(facts["history"], path)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: no training position in it ({error}); delete it and run again") from None
        self.history.sessions += 1
        self.saved_at = self.totals.seconds
        if self._spent() >= sum(p.share for p in self.phases[: self.phase_index + 1]) - 1e-12:
            self.phase_index += 1
            return None
        return {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}


class _Clock:
    """Adds the wall and CPU time since its last tick to the totals."""

    def __init__(self, totals: Totals) -> None:
        self.totals = totals
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def tick(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.totals.seconds += wall - self.wall
        self.totals.cpu_seconds += cpu - self.cpu
        self.wall, self.cpu = wall, cpu


def schedule(progress: float, warmup: float, final: float, decay: float = 1.0) -> float:
    """Multiple of the peak learning rate at `progress` in [0, 1]: linear up over `warmup`, then one, and over the last
    `decay` (1: from the warm-up on) a cosine to `final`.

    Source: Loshchilov & Hutter 2017, eq. 5, without restarts.
    """
    if progress < warmup:
        return max(progress, 1e-3 * warmup) / warmup
    begin = max(warmup, 1 - decay)
    if progress < begin:
        return 1.0
    fraction = (progress - begin) / (1 - begin)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))


def _batch(rows: Rows, progress: float, generator: torch.Generator) -> Batch:
    """Rows on the generator's device, as the loss takes them."""
    tokens, weights, repeats = (None if part is None else part.to(generator.device) for part in rows)
    assert tokens is not None
    return Batch(tokens, progress, generator, weights, repeats)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast for "bf16-mixed", nothing for "fp32"."""
    if precision == "bf16-mixed":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def choose_precision(wish: Precision, model: SequenceModel, phase: Phase, rows: Rows) -> tuple[str, str]:
    """The precision to train in, and why. "auto" times forward and backward in both, in alternating pairs."""
    if wish != "auto":
        return wish, "set in the suite"
    if not phase.groups:
        return "fp32", "nothing to train by gradient"
    device = model.device
    if device.type != "cpu":
        supported = torch.cuda.is_bf16_supported()
        return ("bf16-mixed", "the device supports it") if supported else ("fp32", "the device has no bf16")
    times: dict[str, list[float]] = {"fp32": [], "bf16-mixed": []}
    for pair in range(4):  # the first pair warms up
        for precision in times:
            begin = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
            with autocast(precision, device):
                loss = phase.loss(_batch(rows, 0.0, torch.Generator().manual_seed(pair)))
            loss.value.backward()
            end = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
            times[precision].append(end - begin)
    model.zero_grad(set_to_none=True)
    gain = min(times["fp32"][1:]) / min(times["bf16-mixed"][1:])
    chosen = "bf16-mixed" if gain >= BF16_GAIN else "fp32"
    return chosen, f"probe: bf16 steps run at {gain:.2f} x the speed of fp32"


def gradients_of(
    loss: Loss, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], clip: float
) -> Float[Tensor, ""]:
    """Backward pass, gradients clipped to the joint norm `clip`; returns the norm before that."""
    optimizer.zero_grad(set_to_none=True)
    loss.value.backward()
    return nn.utils.clip_grad_norm_(trained, clip)


def descend(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step at the learning rate given, times each group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    optimizer.step()


def optimizer_of(phase: Phase, training: Training) -> torch.optim.Optimizer | None:
    """Fused AdamW over the phase's groups; None for a phase that learns by reading."""
    if not phase.groups:
        return None
    groups = [
        {
            "params": list(group.parameters),
            "weight_decay": training.weight_decay if group.weight_decay else 0.0,
            "lr_scale": group.lr_scale,
        }
        for group in phase.groups
    ]
    return torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(training.beta1, training.beta2), eps=1e-8, fused=True
    )


def _restore_optimizer(
    optimizer: torch.optim.Optimizer | None, names: dict[int, str], tensors: dict[str, Tensor]
) -> None:
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            suffix = f".{names[id(parameter)]}"
            state = {
                name.removeprefix("optimizer.").removesuffix(suffix): tensor
                for name, tensor in tensors.items()
                if name.endswith(suffix) and name.count(".") == suffix.count(".") + 1
            }
            if state:
                optimizer.state[parameter] = state


def _check_phases(phases: Sequence[Phase]) -> None:
    if not phases or abs(sum(phase.share for phase in phases) - 1) > 1e-6:
        raise ConfigError(f"phases: shares {[phase.share for phase in phases]}; they must sum to 1")


def steps_of(training: Training, flops_per_step: float, bytes_per_token: float) -> int | None:
    """How many steps the budget buys; None when it is given in seconds."""
    tokens = training.batch * training.context
    per_step = {"tokens": tokens, "bytes": tokens * bytes_per_token, "flops": flops_per_step}
    unit = training.budget.unit
    return math.ceil(training.budget.amount / per_step[unit]) if unit in per_step else None
