"""Promises about speculation: what a drafting model writes is what its weights write without drafts."""

from __future__ import annotations

import torch

from archbench.contract.subject import Candidate, Finding, found, not_applicable, read, written
from archbench.model import Speculative
from archbench.sampling import GREEDY

N_TOKENS = 24


def speculation_is_declared(subject: Candidate) -> Finding:
    """A model that declares drafting is a Speculative, whose plain steps write one token; one that does not declare it
    is none, or its own steps write one token as well (drafting is switched off in its config)."""
    name, model, declared = "speculation_is_declared", subject.model(), subject.traits.speculates
    if not isinstance(model, Speculative):
        return found(name, not declared, f"declared {declared}, the model lacks the type")
    writer = model.plain() if declared else model
    state, most = read(writer, subject.prompt(2)), 0
    for _ in range(subject.probe_length):
        emission = writer.decode_step(state, GREEDY, None)
        state, most = emission.state, max(most, int(emission.counts.max()))
    how = "plain steps" if declared else "steps"
    return found(name, most == 1, f"declared {declared}, the model has the type; {how} wrote {most} tokens at most")


def speculation_equals_plain(subject: Candidate) -> Finding:
    """Greedy text is that of plain decoding, token for token. (That sampled text has the law of the likelihood, drafts
    or not, is `draws_follow_likelihood`.)"""
    name, model = "speculation_equals_plain", subject.model()
    if not isinstance(model, Speculative):
        return not_applicable(name, "does not speculate: there is no plain decoding to hold it against")
    n = min(N_TOKENS, subject.multiple(subject.prompt_length + N_TOKENS) - subject.prompt_length)
    texts = [written(m, read(m, subject.prompt(2)), n) for m in (model, model.plain())]
    same = int(torch.eq(*texts).cumprod(dim=1).sum())
    return found(name, same == texts[0].numel(), f"{same} of {texts[0].numel()} tokens before a row's first difference")
