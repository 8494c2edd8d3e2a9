"""Promises about reading: in pieces or at once, what was written or what was given, never what is yet to come."""

from __future__ import annotations

import math

import torch

from archbench.contract.subject import (
    TOLERANCE,
    Candidate,
    Finding,
    apart,
    difference,
    found,
    likelihood,
    next_log_probs,
    not_applicable,
    read,
    written,
    written_rows,
)
from archbench.sampling import GREEDY
from archbench.state import copy_state


def chunked_prefill(subject: Candidate) -> Finding:
    """Reading a text in two pieces, cut anywhere, or stride by stride, equals reading it at once."""
    model, stride = subject.model(), subject.traits.stride
    text = subject.prompt(2)
    cuts = range(stride, text.shape[1], stride)
    worst, at = 0.0, "none"
    for cut in cuts:
        state = model.prefill(text[:, cut:], read(model, text[:, :cut]))
        gap = apart(subject, model, state, read(model, text))
        worst, at = (gap, f"cut {cut}") if gap > worst else (worst, at)
    state = model.initial_state(2)
    for start in range(0, text.shape[1], stride):
        state = model.prefill(text[:, start : start + stride], state)
    gap = apart(subject, model, state, read(model, text))
    worst, at = (gap, "stride by stride") if gap > worst else (worst, at)
    detail = f"largest difference {worst:.1e} ({at}) over {len(cuts)} cuts of {text.shape[1]} tokens, {_allowed()}"
    return found("chunked_prefill", worst <= TOLERANCE, detail)


def empty_prefill(subject: Candidate) -> Finding:
    """Reading nothing changes nothing, before the first token and later."""
    model = subject.model()
    text = subject.prompt(2)
    nothing = text[:, :0]
    begun = model.prefill(text, model.prefill(nothing, model.initial_state(2)))
    worst = apart(subject, model, begun, read(model, text))
    worst = max(worst, apart(subject, model, model.prefill(nothing, read(model, text)), read(model, text)))
    if (scorer := likelihood(model)) is not None:
        log_probs, state = scorer.score(nothing, read(model, text))
        if log_probs.shape != (2, 0, model.vocab_size):
            return found("empty_prefill", False, f"score of no tokens has shape {tuple(log_probs.shape)}")
        worst = max(worst, apart(subject, model, state, read(model, text)))
    return found("empty_prefill", worst == 0, f"largest difference {worst:.1e}, allowed 0")


def decode_equals_parallel(subject: Candidate) -> Finding:
    """Decoding step by step and one pass over the finished text agree: on every distribution, and on the state left."""
    model = subject.model()
    prompt = subject.prompt(2)
    n = subject.probe_length
    text = torch.cat([prompt, written(model, read(model, prompt), n)], dim=1)
    left = _state_after_writing(subject)
    worst = apart(subject, model, left, read(model, text)) if left is not None else 0.0
    scorer = likelihood(model)
    if scorer is None:
        detail = f"state after writing against after reading: difference {worst:.1e} over {n} tokens, {_allowed()}"
        return found("decode_equals_parallel", worst <= TOLERANCE, detail)
    whole, _ = scorer.score(text, model.initial_state(2))
    state, offsets, seen, short = read(model, prompt), [prompt.shape[1]] * 2, 0, 0.0
    while max(offsets) < text.shape[1]:
        for row, log_probs in enumerate(next_log_probs(scorer, state)):
            worst = max(worst, difference(log_probs, whole[row, offsets[row]]))
        emission = model.decode_step(state, GREEDY, None)
        state = emission.state
        for row, tokens in enumerate(written_rows(emission)):
            for token in tokens[: text.shape[1] - offsets[row]]:
                expected = whole[row, offsets[row]]
                short = max(short, (expected.max() - expected[token]).item())
                offsets[row], seen = offsets[row] + 1, seen + 1
    detail = (
        f"largest difference {worst:.1e} along {seen} greedy tokens, none further than {short:.1e} nats from the most "
        f"likely, {_allowed()}"
    )
    return found("decode_equals_parallel", worst <= TOLERANCE and short <= TOLERANCE, detail)


def causality(subject: Candidate) -> Finding:
    """Changing a token changes no prediction up to and including that token's own."""
    model = subject.model()
    scorer = likelihood(model)
    if scorer is None:
        return not_applicable("causality", "no likelihood, hence no parallel pass that shows single predictions")
    text = subject.prompt(2)
    base, _ = scorer.score(text, model.initial_state(2))
    earlier, later = 0.0, 0.0
    for j in range(text.shape[1]):
        changed = text.clone()
        changed[:, j] = (changed[:, j] + 1) % model.vocab_size
        other, _ = scorer.score(changed, model.initial_state(2))
        earlier = max(earlier, difference(other[:, : j + 1], base[:, : j + 1]))
        later = max(later, difference(other[:, j + 1 :], base[:, j + 1 :]))
    detail = f"largest change before and at the changed token {earlier:.1e}, allowed 0; after it {later:.1e}"
    return found("causality", earlier == 0, detail)


def _state_after_writing(subject: Candidate) -> object | None:
    """The state once both rows have written exactly the probe's length; None when steps do not end there together."""
    model, n = subject.model(), subject.probe_length
    state, counts = read(model, subject.prompt(2)), torch.zeros(2, dtype=torch.long)
    while counts.min() < n:
        emission = model.decode_step(state, GREEDY, None)
        state, counts = emission.state, counts + emission.counts
    return copy_state(state) if bool((counts == n).all()) else None


def _allowed() -> str:
    return f"allowed {TOLERANCE:.0e}"


assert math.isfinite(TOLERANCE)
