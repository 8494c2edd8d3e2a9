"""Promises about probabilities and what is drawn from them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench.contract.subject import (
    TOLERANCE,
    Candidate,
    Finding,
    difference,
    found,
    likelihood,
    next_log_probs,
    not_applicable,
    read,
    written,
)
from archbench.model import SequenceModel
from archbench.sampling import GREEDY, PLAIN, Sampling
from archbench.state import State, copy_state, tile_state

N_DRAWS = 4096
DRAWS_AT_ONCE = 256
SMALLEST_P = 1e-4
"""With a fixed seed a healthy model fails once in 10^4 seeds."""


def normalised(subject: Candidate) -> Finding:
    """The probabilities of the next token are finite, fp32 and sum to one at every position."""
    model = subject.model()
    scorer = likelihood(model)
    if scorer is None:
        return not_applicable("normalised", "no likelihood")
    text = subject.prompt(2)
    log_probs, state = scorer.score(text, model.initial_state(2))
    log_probs = torch.cat([log_probs, next_log_probs(scorer, state)[:, None]], dim=1)
    if log_probs.dtype != torch.float32 or log_probs.shape[2] != model.vocab_size:
        return found("normalised", False, f"log-probabilities are {log_probs.dtype} over {log_probs.shape[2]} tokens")
    mass = log_probs.exp().sum(dim=-1)
    worst = difference(mass, torch.ones_like(mass))
    detail = f"largest |sum - 1| {worst:.1e} over {mass.numel()} distributions, allowed {TOLERANCE:.0e}"
    return found("normalised", worst <= TOLERANCE, detail)


def draws_follow_likelihood(subject: Candidate) -> Finding:
    """Tokens drawn at temperature 1, and pairs of tokens, are distributed as the likelihood says (chi-square)."""
    model = subject.model()
    scorer = likelihood(model)
    if scorer is None:
        return not_applicable("draws_follow_likelihood", "no likelihood")
    state = read(model, subject.prompt(1))
    first = next_log_probs(scorer, copy_state(state))[0]
    # Pairs: cells for the eight most likely first tokens and any second, one more cell for all the rest.
    likely = first.topk(min(8, model.vocab_size)).indices
    probe = torch.stack([likely, torch.zeros_like(likely)], dim=1)
    second = scorer.score(probe, tile_state(state, len(likely)))[0][:, 1]
    expected = (first[likely, None] + second).exp().flatten()
    expected = torch.cat([expected, (1 - expected.sum()).clamp(min=0)[None]])

    pairs = _drawn_pairs(model, state)
    matches = pairs[:, :1] == likely
    cells = torch.where(
        matches.any(dim=1), matches.int().argmax(dim=1) * model.vocab_size + pairs[:, 1], len(expected) - 1
    )
    p_first = chi_square_p(pairs[:, 0].bincount(minlength=model.vocab_size), first.exp())
    p_pairs = chi_square_p(cells.bincount(minlength=len(expected)), expected)
    detail = (
        f"p = {p_first:.2g} for tokens, {p_pairs:.2g} for pairs, {N_DRAWS} draws, smallest allowed {SMALLEST_P:.0e}"
    )
    return found("draws_follow_likelihood", min(p_first, p_pairs) > SMALLEST_P, detail)


def greedy_is_certain(subject: Candidate) -> Finding:
    """Temperature 0 needs no generator, repeats itself, and takes the lowest id among equally likely tokens."""
    model = subject.model()
    n = subject.probe_length
    prompt = subject.prompt(2)
    texts = [written(model, read(model, prompt), n) for _ in range(2)]
    texts.append(written(model, read(model, prompt), n, GREEDY, Generator().manual_seed(1)))
    if not all(torch.equal(text, texts[0]) for text in texts):
        return found("greedy_is_certain", False, "greedy texts differ between two runs or with a generator")
    if likelihood(model) is None:
        return found(
            "greedy_is_certain", True, f"3 runs of {n} tokens are equal; ties cannot be made without likelihood"
        )
    top_1 = written(model, read(model, prompt), n, Sampling(top_k=1), Generator().manual_seed(1))
    if not torch.equal(top_1, texts[0]):
        return found("greedy_is_certain", False, "top_k=1 writes another text than greedy")
    tie = _tied_token(subject)
    if tie is None:
        return found("greedy_is_certain", True, f"3 runs of {n} tokens are equal; no ties without parameters")
    return found("greedy_is_certain", tie == 0, f"3 runs of {n} tokens are equal; of all tokens tied, {tie} is taken")


def chi_square_p(counts: Int[Tensor, " n"], probabilities: Float[Tensor, " n"]) -> float:
    """Probability of a fit as bad as this, cells expected fewer than five times being joined (Cochran's rule).

    Zero when something impossible was counted.
    """
    if bool(counts[probabilities == 0].any()):
        return 0.0
    wide = probabilities.double()
    expected = wide / wide.sum() * counts.sum()
    order = expected.argsort(descending=True)
    counts, expected = counts[order].double(), expected[order]
    n_large = int((expected >= 5).sum())
    counts = torch.cat([counts[:n_large], counts[n_large:].sum()[None]])
    expected = torch.cat([expected[:n_large], expected[n_large:].sum()[None]])
    if expected[-1] < 5 and n_large:
        counts = torch.cat([counts[:-2], counts[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return 1.0 if freedom == 0 else torch.special.gammaincc(freedom, statistic / 2).item()


def _drawn_pairs(model: SequenceModel, state: State) -> Int[Tensor, "n 2"]:
    """The first two tokens of many independent continuations; `state` is kept."""
    generator = Generator().manual_seed(11)
    branches = (tile_state(state, DRAWS_AT_ONCE) for _ in range(N_DRAWS // DRAWS_AT_ONCE))
    return torch.cat([written(model, branch, 2, PLAIN, generator) for branch in branches])


def _tied_token(subject: Candidate) -> int | None:
    """What greedy takes when all parameters are zero and the model predicts nothing; None if it still does."""
    model = subject.fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scorer = likelihood(model)
    if scorer is None:
        return None
    log_probs = next_log_probs(scorer, model.initial_state(1))[0]
    if not bool((log_probs == log_probs[0]).all()):
        return None
    return int(written(model, model.initial_state(1), 1))
