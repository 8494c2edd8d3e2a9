"""Promises about the declared traits: each is held against what the model does, and the state is weighed."""

from __future__ import annotations

import torch
from torch import Generator

from archbench.contract.subject import Candidate, Finding, found, likelihood, not_applicable, read
from archbench.errors import ContextOverflow
from archbench.model import Batch, Phase, Reconstruction
from archbench.sampling import GREEDY
from archbench.state import state_bytes

UNLIMITED = 256
"""Tokens that a model without a context limit must hold here."""

TESTABLE_LIMIT = 4096


def likelihood_is_declared(subject: Candidate) -> Finding:
    """The model is a Likelihood exactly when its traits say so."""
    has = likelihood(subject.fresh()) is not None
    detail = f"declared {subject.traits.likelihood}, the model {'has' if has else 'lacks'} the type"
    return found("likelihood_is_declared", has == subject.traits.likelihood, detail)


def reconstruction_is_declared(subject: Candidate) -> Finding:
    """The model is a Reconstruction exactly when its traits say so; a stride of tokens then has one Gaussian code, and
    a code has logits for a stride of tokens."""
    model, declared = subject.model(), subject.traits.reconstruction
    if not isinstance(model, Reconstruction):
        return found("reconstruction_is_declared", not declared, f"declared {declared}, the model lacks the type")
    text = subject.prompt(2)
    mean, sigma = model.posterior(text)
    logits = model.reconstruct(mean)
    codes, expected = (2, text.shape[1] // subject.traits.stride), (*text.shape, model.vocab_size)
    detail = (
        f"declared {declared}, the model has the type; {text.shape[1]} tokens give codes {tuple(mean.shape)}, these "
        f"give logits {tuple(logits.shape)}; smallest sigma {sigma.min().item():.1e}"
    )
    shapes = mean.shape == sigma.shape and mean.shape[:2] == codes and logits.shape == expected
    holds = declared and shapes and bool((sigma > 0).all())
    return found("reconstruction_is_declared", holds, detail)


def steps_write_strides(subject: Candidate) -> Finding:
    """Every step writes whole strides of known tokens in every row, at least one."""
    model, stride = subject.model(), subject.traits.stride
    state, counts = read(model, subject.prompt(2)), []
    for _ in range(max(1, subject.probe_length // stride // 2)):
        tokens, written, state = model.decode_step(state, GREEDY, None)
        counts += written.tolist()
        for row, count in zip(tokens, written, strict=True):
            if not 1 <= count <= tokens.shape[1] or count % stride:
                return found("steps_write_strides", False, f"a step wrote {count} tokens, the stride is {stride}")
            if not bool(((row[:count] >= 0) & (row[:count] < model.vocab_size)).all()):
                return found(
                    "steps_write_strides", False, f"a step wrote {row[:count].tolist()}, outside the vocabulary"
                )
    return found("steps_write_strides", True, f"{min(counts)} to {max(counts)} tokens a step, the stride is {stride}")


def context_limit(subject: Candidate) -> Finding:
    """A state holds as many tokens as declared and refuses more with ContextOverflow, read or written."""
    model, stride, limit = subject.model(), subject.traits.stride, subject.traits.context_limit
    if limit is None:
        n = -(-UNLIMITED // stride) * stride
        model.decode_step(read(model, subject.text(1, n)), GREEDY, None)
        return found("context_limit", True, f"none declared; {n} tokens and a step after them are held")
    if limit > TESTABLE_LIMIT:
        return not_applicable(
            "context_limit", f"{limit} tokens take too long here; choose a config with a smaller limit"
        )
    full = limit // stride * stride
    model.decode_step(read(model, subject.text(1, full - stride)), GREEDY, None)
    try:
        model.prefill(subject.text(1, stride), read(model, subject.text(1, full)))
    except ContextOverflow:
        pass
    else:
        return found("context_limit", False, f"{full + stride} tokens were read, declared are {limit}")
    try:
        model.decode_step(read(model, subject.text(1, full)), GREEDY, None)
    except ContextOverflow:
        return found("context_limit", True, f"{full} tokens are held, more are refused")
    return found("context_limit", False, f"a step was written after {full} tokens, declared are {limit}")


def state_size_is_declared(subject: Candidate) -> Finding:
    """A state declared constant keeps its size, another does not."""
    model = subject.model()
    sizes = {n: state_bytes(read(model, subject.text(1, n))) for n in sorted(map(subject.multiple, (1, 8, 64, 200)))}
    constant = len(set(sizes.values())) == 1
    listing = ", ".join(f"{size} bytes after {n}" for n, size in sizes.items())
    return found("state_size_is_declared", constant == subject.traits.constant_state, f"{listing} tokens")


def state_grows_linearly(subject: Candidate) -> Finding:
    """Reading four times as much makes a state at most four times as large."""
    model, stride = subject.model(), subject.traits.stride
    short = max(stride, subject.multiple(256) // 4 // stride * stride)
    long = subject.multiple(4 * short)
    few, many = (state_bytes(read(model, subject.text(1, n))) for n in (short, long))
    # What a state holds whatever was read may be weighed once more, against rounding to whole blocks.
    allowed = 4 * few + state_bytes(read(model, subject.text(1, stride)))
    detail = f"{few} bytes after {short} tokens, {many} after {long}, allowed {allowed}"
    return found("state_grows_linearly", 0 < many <= allowed, detail)


def lookahead_suffices(subject: Candidate) -> Finding:
    """A window of one stride and the lookahead has a loss, and its last token matters to it."""
    stride, lookahead = subject.traits.stride, subject.traits.lookahead
    window = subject.text(2, stride + lookahead)
    changed = window.clone()
    changed[:, -1] = (changed[:, -1] + 1) % subject.config.vocab_size
    matters = False
    for index, phase in enumerate(subject.fresh().phases()):
        for progress in (0.0, 0.5, 0.99):
            loss, other = (_loss(subject.model().phases()[index], tokens, progress) for tokens in (window, changed))
            if not torch.isfinite(loss):
                detail = (
                    f"phase {phase.name}: loss {loss.item()} on {stride} + {lookahead} tokens; more lookahead is needed"
                )
                return found("lookahead_suffices", False, detail)
            matters |= loss.item() != other.item()
    detail = (
        f"losses of {stride} + {lookahead} tokens are finite; the last token {'matters' if matters else 'is ignored'}"
    )
    return found("lookahead_suffices", matters, detail)


def _loss(phase: Phase, window: torch.Tensor, progress: float) -> torch.Tensor:
    return phase.loss(Batch(window, progress, Generator().manual_seed(0))).value
