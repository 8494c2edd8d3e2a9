"""Promises about batches and branches: rows know nothing of each other; states can be copied, tiled, selected."""

from __future__ import annotations

import torch
from torch import Generator

from archbench.contract.subject import (
    TOLERANCE,
    Candidate,
    Finding,
    apart,
    difference,
    found,
    gap,
    likelihood,
    read,
    sequel,
    written,
)
from archbench.sampling import PLAIN
from archbench.state import copy_state, select_rows, tile_state


def rows_are_independent(subject: Candidate) -> Finding:
    """What the other rows of a batch hold changes nothing in a row."""
    model, n = subject.model(), subject.probe_length
    text = subject.prompt(3)
    changed = torch.cat([text[:1], subject.prompt(3, seed=5)[1:]])
    greedy = [written(model, read(model, rows), n)[0] for rows in (text, changed)]
    if not torch.equal(*greedy):
        return found("rows_are_independent", False, f"row 0 writes {greedy[1].tolist()}, not {greedy[0].tolist()}")
    scorer = likelihood(model)
    if scorer is None:
        return found("rows_are_independent", True, f"row 0 writes the same {n} tokens beside other rows")
    left, right = (scorer.score(rows, model.initial_state(3))[0][0] for rows in (text, changed))
    worst = difference(left, right)
    return found("rows_are_independent", worst == 0, f"row 0 differs by {worst:.1e} beside other rows, allowed 0")


def batch_equals_single(subject: Candidate) -> Finding:
    """A batch of two is two batches of one."""
    model, n = subject.model(), subject.probe_length
    text = subject.prompt(2)
    alone = [text[:1], text[1:]]
    pair = written(model, read(model, text), n)
    single = torch.cat([written(model, read(model, row), n) for row in alone])
    both = read(model, text)
    gaps = [apart(subject, model, select_rows(both, torch.tensor([i])), read(model, alone[i])) for i in range(2)]
    if (scorer := likelihood(model)) is not None:
        whole = scorer.score(text, model.initial_state(2))[0]
        gaps.append(difference(whole, torch.cat([scorer.score(row, model.initial_state(1))[0] for row in alone])))
    same = torch.equal(pair, single)
    detail = (
        f"largest difference {max(gaps):.1e}, greedy texts {'equal' if same else 'differ'}, allowed {TOLERANCE:.0e}"
    )
    return found("batch_equals_single", max(gaps) <= TOLERANCE and same, detail)


def states_branch(subject: Candidate) -> Finding:
    """Copied, tiled and selected states continue like the original, and what becomes of a copy leaves it untouched."""
    model, n = subject.model(), subject.probe_length
    text = subject.prompt(2)
    texts = {"original": text, "tiled": text.repeat_interleave(2, dim=0), "selected": text.flip(0)}
    expected = {name: sequel(subject, model, read(model, rows)) for name, rows in texts.items()}
    state = read(model, text)
    copy = copy_state(state)
    branches = {"original": state, "tiled": tile_state(state, 2), "selected": select_rows(state, torch.tensor([1, 0]))}
    # The copy is spoiled first: continued with other tokens than the original ever sees.
    written(model, copy_state(copy), n, PLAIN, Generator().manual_seed(3))
    model.prefill(subject.probe(2), copy)
    gaps = {name: gap(sequel(subject, model, branch), expected[name]) for name, branch in branches.items()}
    name, worst = max(gaps.items(), key=lambda item: item[1])
    detail = f"largest difference {worst:.1e} ({name}), allowed {TOLERANCE:.0e}"
    return found("states_branch", worst <= TOLERANCE, detail)
