"""Promises about training: whole phases, every parameter reached, and something is learned."""

from __future__ import annotations

import math
from collections import Counter

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench.contract.subject import TOLERANCE, Candidate, Finding, difference, found, not_applicable, train_phase
from archbench.model import Batch, Loss, parameters_of

LEARNING_STEPS = 30
LEAST_EFFECT = 1e-6
"""Relative change of the loss that counts as one; an untrained model's loss says little about its memory."""


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


def answers_count_alone(subject: Candidate) -> Finding:
    """Where a loss takes weights: weights of one change nothing, a token that counts for nothing may be any, one that
    counts may not; and the share of rows answered exactly is told."""
    name = "answers_count_alone"
    if not subject.traits.answers:
        return not_applicable(name, "its loss takes no weights")
    window = subject.windows(5)
    changed = window.clone()
    changed[:, -1] = (changed[:, -1] + 1) % subject.config.vocab_size
    ones, but_the_last = torch.ones(window.shape), torch.ones(window.shape)
    but_the_last[:, -1] = 0
    worst, matters = 0.0, False
    for phase in range(len(subject.fresh().phases())):
        plain, weighed, of_changed = (
            _loss(subject, phase, tokens, weights)
            for tokens, weights in ((window, None), (window, ones), (changed, ones))
        )
        spared, spared_changed = (_loss(subject, phase, tokens, but_the_last) for tokens in (window, changed))
        worst = max(worst, difference(weighed.value, plain.value), difference(spared.value, spared_changed.value))
        matters |= weighed.value.item() != of_changed.value.item()
        exact = weighed.parts.get("exact")
        if exact is None or not 0 <= exact.item() <= 1:
            return found(name, False, f'the loss\'s part "exact" is {exact}; it must be a share of rows')
    detail = (
        f"largest difference {worst:.1e}, allowed {TOLERANCE:.0e}; a token that counts "
        f"{'matters' if matters else 'does not matter'}"
    )
    return found(name, worst <= TOLERANCE and matters, detail)


def repeats_count(subject: Candidate) -> Finding:
    """Where a loss takes repeats: repeats of one change nothing, others do, and the loss stays finite."""
    name = "repeats_count"
    if not subject.traits.repeats:
        return not_applicable(name, "its loss takes no repeats")
    tokens = subject.text(2, subject.multiple(256) + subject.traits.lookahead)
    ones, often = torch.ones(tokens.shape), torch.ones(tokens.shape)
    often[:, : tokens.shape[1] // 2] = 1000.0
    worst, least = 0.0, math.inf
    for phase in range(len(subject.fresh().phases())):
        once, again, repeated = (_loss(subject, phase, tokens, ones, r).value for r in (None, ones, often))
        if not bool(torch.isfinite(repeated)):
            return found(name, False, f"said 1000 times, half a text gives loss {repeated.item()}")
        worst, least = max(worst, difference(again, once)), min(least, difference(repeated, once))
    detail = f"said once: largest difference {worst:.1e}, allowed {TOLERANCE:.0e}; half said 1000 times: {least:.1e}"
    return found(name, worst <= TOLERANCE and least > LEAST_EFFECT, detail)


def _loss(
    subject: Candidate,
    phase: int,
    tokens: Int[Tensor, "b t"],
    weights: Float[Tensor, "b t"] | None,
    repeats: Float[Tensor, "b t"] | None = None,
) -> Loss:
    batch = Batch(tokens, 0.5, Generator().manual_seed(0), weights, repeats)
    return subject.model().phases()[phase].loss(batch)
