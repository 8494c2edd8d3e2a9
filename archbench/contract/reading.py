"""Promises about reading: in pieces or at once, what was written or what was given, never what is yet to come."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from archbench.contract.subject import (
    TOLERANCE,
    Candidate,
    Finding,
    apart,
    difference,
    found,
    gap,
    likelihood,
    next_log_probs,
    not_applicable,
    read,
    sequel,
    written_rows,
)
from archbench.model import SequenceModel
from archbench.sampling import GREEDY
from archbench.state import State


def chunked_prefill(subject: Candidate) -> Finding:
    """Reading a text in two pieces, cut anywhere, or stride by stride, equals reading it at once."""
    model, stride = subject.model(), subject.traits.stride
    text = subject.prompt(2)
    expected = sequel(subject, model, read(model, text))
    gaps = {"stride by stride": gap(sequel(subject, model, _read_in_strides(model, text, stride)), expected)}
    for cut in range(stride, text.shape[1], stride):
        state = model.prefill(text[:, cut:], read(model, text[:, :cut]))
        gaps[f"cut {cut}"] = gap(sequel(subject, model, state), expected)
    at, worst = max(gaps.items(), key=lambda item: item[1])
    detail = (
        f"largest difference {worst:.1e} ({at}) over {len(gaps)} ways of cutting {text.shape[1]} tokens, {_allowed()}"
    )
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
    """Decoding step by step agrees with one pass over the finished text: on the distributions and the state left."""
    model, scorer = subject.model(), likelihood(subject.model())
    prompt = subject.prompt(1)
    state, text = read(model, prompt), prompt
    seen: list[Tensor] = []  # the distribution before each step, and its place in the text
    places: list[int] = []
    while text.shape[1] < prompt.shape[1] + subject.probe_length:
        if scorer is not None:
            seen.append(next_log_probs(scorer, state))
            places.append(text.shape[1])
        emission = model.decode_step(state, GREEDY, None)
        state = emission.state
        text = torch.cat([text, torch.tensor(written_rows(emission))], dim=1)
    n = text.shape[1] - prompt.shape[1]
    if scorer is None:
        worst = apart(subject, model, state, read(model, text))
        detail = f"after {n} tokens the state differs by {worst:.1e} from reading them, {_allowed()}"
        return found("decode_equals_parallel", worst <= TOLERANCE, detail)
    whole = scorer.score(text, model.initial_state(1))[0][0]
    worst = difference(torch.cat(seen), whole[places])
    left = apart(subject, model, state, read(model, text))
    chosen = whole[prompt.shape[1] :].gather(-1, text[0, prompt.shape[1] :, None])[:, 0]
    short = difference(chosen, whole[prompt.shape[1] :].amax(dim=-1))
    detail = (
        f"distributions along {n} greedy tokens differ by {worst:.1e}, the state left by {left:.1e}; tokens are within "
        f"{short:.1e} of the most likely; {_allowed()}"
    )
    return found("decode_equals_parallel", max(worst, left, short) <= TOLERANCE, detail)


def score_streams(subject: Candidate) -> Finding:
    """Scoring a text in two pieces gives the predictions of scoring it at once, and leaves the state of reading it."""
    model, stride = subject.model(), subject.traits.stride
    scorer = likelihood(model)
    if scorer is None:
        return not_applicable("score_streams", "no likelihood")
    text = subject.prompt(2)
    whole, state = scorer.score(text, model.initial_state(2))
    left = apart(subject, model, state, read(model, text))
    worst = 0.0
    for cut in range(stride, text.shape[1], stride):
        first, state = scorer.score(text[:, :cut], model.initial_state(2))
        second, _ = scorer.score(text[:, cut:], state)
        worst = max(worst, difference(torch.cat([first, second], dim=1), whole))
    detail = f"predictions differ by {worst:.1e} over all cuts, the state left by {left:.1e}, {_allowed()}"
    return found("score_streams", max(worst, left) <= TOLERANCE, detail)


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


def _read_in_strides(model: SequenceModel, text: Int[Tensor, "b t"], stride: int) -> State:
    state = model.initial_state(text.shape[0])
    for piece in text.split(stride, dim=1):
        state = model.prefill(piece, state)
    return state


def _allowed() -> str:
    return f"allowed {TOLERANCE:.0e}"
