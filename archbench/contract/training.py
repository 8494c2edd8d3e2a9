"""Promises about training: whole phases, every parameter reached, and something is learned."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Generator

from archbench.contract.subject import Candidate, Finding, found, not_applicable, train_phase
from archbench.model import Batch, parameters_of

LEARNING_STEPS = 30


def phases_are_whole(subject: Candidate) -> Finding:
    """Shares sum to one; every parameter is trained by some phase, and by one group at most in each."""
    model = subject.fresh()
    phases = model.phases()
    total = sum(phase.share for phase in phases)
    if not math.isclose(total, 1.0, abs_tol=1e-6) or min(phase.share for phase in phases) <= 0:
        return found("phases_are_whole", False, f"shares {[phase.share for phase in phases]} do not sum to one")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for phase in phases:
        times = Counter(map(id, parameters_of(phase)))
        doubled = [names.get(key, "a foreign parameter") for key, n in times.items() if n > 1 or key not in names]
        if doubled:
            return found(
                "phases_are_whole", False, f"phase {phase.name}: {doubled[0]} is in several groups or not ours"
            )
    trained = {id(parameter) for phase in phases for parameter in parameters_of(phase)}
    left = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in trained
    ]
    detail = f"{len(trained)} parameters in {len(phases)} phases, shares sum to {total:g}"
    return found("phases_are_whole", not left, f"{left[0]} belongs to no group of any phase" if left else detail)


def gradients_arrive(subject: Candidate) -> Finding:
    """After a phase's losses every parameter of its groups has a finite gradient; the losses are finite."""
    model = subject.model().train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reached = zero = 0
    for phase in model.phases():
        if not phase.groups:
            continue
        model.zero_grad()
        for step, progress in enumerate((0.0, 0.9)):
            with torch.enable_grad():
                loss = phase.loss(Batch(subject.windows(step), progress, Generator().manual_seed(step)))
            if not all(bool(torch.isfinite(part)) for part in (loss.value, *loss.parts.values())):
                return found("gradients_arrive", False, f"phase {phase.name}: loss {loss.value.item()} is not finite")
            if any(part.requires_grad for part in loss.parts.values()):
                return found("gradients_arrive", False, f"phase {phase.name}: a part of the loss is not detached")
            loss.value.backward()
        for parameter in parameters_of(phase):
            gradient = parameter.grad
            if gradient is None or not bool(gradient.isfinite().all()):
                what = "no gradient" if gradient is None else "a gradient that is not finite"
                return found("gradients_arrive", False, f"phase {phase.name}: {names[id(parameter)]} has {what}")
            reached, zero = reached + 1, zero + (not gradient.any())
    if not reached:
        return not_applicable("gradients_arrive", "it learns by reading: no phase has parameters")
    return found("gradients_arrive", True, f"{reached} gradients are finite, {zero} of them all zero")


def training_learns(subject: Candidate) -> Finding:
    """Each phase lowers its loss on a repeating pattern, by 30 steps or by reading it."""
    n = subject.multiple(32) + subject.traits.lookahead
    pattern = torch.arange(n).remainder(min(5, subject.config.vocab_size)).repeat(4, 1)
    if subject.traits.stride > 1:  # whole vectors must repeat, too
        pattern = pattern[:, : subject.traits.stride].repeat(1, -(-n // subject.traits.stride))[:, :n]
    model, batch = subject.fresh(), Batch(pattern, 0.0, Generator())
    changes, learned = [], True
    for phase in model.phases():
        before = phase.loss(batch._replace(generator=Generator().manual_seed(0))).value.item()
        train_phase(model, phase, pattern, steps=LEARNING_STEPS, learning_rate=3e-3)
        after = phase.loss(batch._replace(generator=Generator().manual_seed(0))).value.item()
        changes.append(f"{phase.name} {before:.4f} to {after:.4f}")
        learned &= math.isfinite(after) and after < before
    return found("training_learns", learned, f"{'; '.join(changes)} in {LEARNING_STEPS} steps")
