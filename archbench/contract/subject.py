"""Who is tested and what is found: the candidate, the findings, and how two states are compared.

A state is opaque, so two states are equal when the same things come after them: the log-probabilities of a probe text
where the model has a likelihood, and what the model writes, greedy and drawn from equal generators.

Letters: b batch, t time, v vocabulary, n tokens asked for.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench.model import Architecture, Batch, Emission, Likelihood, Phase, SequenceModel, Traits, parameters_of
from archbench.sampling import GREEDY, PLAIN, Sampling
from archbench.state import State, copy_state, select_rows, tensors

TOLERANCE = 1e-4
"""Largest |a - b| / (1 + |b|) between log-probabilities that equal computations of another order may show in fp32."""

Verdict: TypeAlias = Literal["holds", "broken", "does not apply"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one promise. `detail` holds the numbers, or the reason why the promise does not apply."""

    name: str
    verdict: Verdict
    detail: str


def found(name: str, holds: bool, detail: str) -> Finding:
    return Finding(name=name, verdict="holds" if holds else "broken", detail=detail)


def not_applicable(name: str, reason: str) -> Finding:
    return Finding(name=name, verdict="does not apply", detail=reason)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An architecture, one small config of it and a seed. Every model and text follows from these."""

    architecture: Architecture
    config: Any
    seed: int = 0

    @property
    def traits(self) -> Traits:
        return self.architecture.traits(self.config)

    def fresh(self, seed: int | None = None) -> SequenceModel:
        """A model with its first weights, in evaluation mode."""
        generator = Generator().manual_seed(self.seed if seed is None else seed)
        return self.architecture.build(self.config, generator).eval()

    def model(self) -> SequenceModel:
        """A model of its own, trained for a few steps: defects hide behind the flat predictions of first weights."""
        return copy.deepcopy(self._trained)

    @cached_property
    def _trained(self) -> SequenceModel:
        model = self.fresh()
        train(model, self.windows(8), steps_each_phase=8, learning_rate=1e-2)
        return model

    def multiple(self, n: int) -> int:
        """About n tokens: whole strides, at least one, within the context limit."""
        stride, limit = self.traits.stride, self.traits.context_limit
        n = math.ceil(n / stride) * stride
        return n if limit is None else max(stride, min(n, limit // stride * stride))

    @property
    def prompt_length(self) -> int:
        return self.multiple(self.multiple(36) // 2)

    @property
    def probe_length(self) -> int:
        """What is read or written after a prompt; the context limit leaves room for two probes."""
        stride = self.traits.stride
        return max(stride, (self.multiple(36) - self.prompt_length) // 2 // stride * stride)

    def prompt(self, batch_size: int, seed: int = 0) -> Int[Tensor, "b t"]:
        return self.text(batch_size, self.prompt_length, seed)

    def probe(self, batch_size: int) -> Int[Tensor, "b t"]:
        return self.text(batch_size, self.probe_length, seed=99)

    def text(self, batch_size: int, n: int, seed: int = 0) -> Int[Tensor, "b t"]:
        """Texts of rare and frequent tokens (1/rank) in some order: half of them follow from the one before."""
        vocab_size = self.config.vocab_size
        generator = Generator().manual_seed(1000 * self.seed + seed)
        weights = 1.0 / torch.arange(1, vocab_size + 1)
        rows = torch.multinomial(weights, batch_size * n, replacement=True, generator=generator).view(batch_size, n)
        follows = torch.rand(batch_size, n, generator=generator) < 0.5
        for i in range(1, n):
            rows[:, i] = torch.where(follows[:, i], (3 * rows[:, i - 1] + 1) % vocab_size, rows[:, i])
        return rows

    def windows(self, seed: int) -> Int[Tensor, "b t"]:
        """Training windows of about 32 tokens and the lookahead."""
        return self.text(4, self.multiple(32) + self.traits.lookahead, seed)


def train(model: SequenceModel, windows: Int[Tensor, "b t"], *, steps_each_phase: int, learning_rate: float) -> None:
    """A few steps of every phase in turn."""
    for phase in model.phases():
        train_phase(model, phase, windows, steps=steps_each_phase, learning_rate=learning_rate)


def train_phase(
    model: SequenceModel, phase: Phase, windows: Int[Tensor, "b t"], *, steps: int, learning_rate: float
) -> list[float]:
    """The losses of `steps` AdamW steps on the same windows, progress running from 0 to 1. A phase without parameters
    reads."""
    groups = [{"params": list(g.parameters), "lr": learning_rate * g.lr_scale} for g in phase.groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0) if groups else None
    losses = []
    model.train()
    for step in range(steps):
        with torch.enable_grad():
            loss = phase.loss(Batch(windows, step / steps, Generator().manual_seed(step))).value
            losses.append(loss.item())
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(list(parameters_of(phase)), 1.0)
                optimizer.step()
    model.zero_grad()
    model.eval()
    return losses


def read(model: SequenceModel, tokens: Int[Tensor, "b t"]) -> State:
    """The state after `tokens`."""
    return model.prefill(tokens, model.initial_state(tokens.shape[0]))


def likelihood(model: SequenceModel) -> Likelihood | None:
    """The model as a `Likelihood`, or None where it has none: absence is declared by type."""
    return model if isinstance(model, Likelihood) else None


def written(
    model: SequenceModel, state: State, n: int, sampling: Sampling = GREEDY, generator: Generator | None = None
) -> Int[Tensor, "b n"]:
    """The first n tokens of every row that the model writes from `state`, which is given up. A row that is done leaves
    the batch: it must not run into a context limit while others catch up."""
    texts: list[list[int]] = [[] for _ in range(rows_of(state))]
    rows = list(range(len(texts)))
    while rows:
        emission = model.decode_step(state, sampling, generator)
        state = emission.state
        for row, more in zip(rows, written_rows(emission), strict=True):
            texts[row].extend(more)
        going = [place for place, row in enumerate(rows) if len(texts[row]) < n]
        if going and len(going) < len(rows):
            state = select_rows(state, torch.tensor(going))
        rows = [rows[place] for place in going]
    return torch.tensor([text[:n] for text in texts])


def written_rows(emission: Emission) -> list[list[int]]:
    """What each row wrote, without the padding. Raises ValueError where a row wrote nothing: decoding would not end."""
    if not bool((emission.counts > 0).all()):
        raise ValueError(f"a step wrote {emission.counts.tolist()} tokens; every row must write at least one")
    pairs = zip(emission.tokens.tolist(), emission.counts.tolist(), strict=True)
    return [tokens[:count] for tokens, count in pairs]


def next_log_probs(model: Likelihood, state: State) -> Float[Tensor, "b v"]:
    """The distribution of the token that follows `state`, which is kept."""
    branch = copy_state(state)
    batch_size = rows_of(branch)
    log_probs, _ = model.score(torch.zeros(batch_size, 1, dtype=torch.long), branch)
    return log_probs[:, 0]


def rows_of(state: State) -> int:
    """Batch size of a state: the leading size of its tensors."""
    return tensors(state)[0].shape[0]


def difference(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"]) -> float:
    """Largest |a - b| / (1 + |b|); infinite where either is not a number or the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    ratio = torch.where(a == b, 0.0, (a - b).abs() / (1 + b.abs())).nan_to_num(nan=math.inf)
    return ratio.max().item() if ratio.numel() else 0.0


class Sequel(NamedTuple):
    """What comes after a state: the greedy text, and the log-probabilities of the probe or, without them, a draw."""

    greedy: Int[Tensor, "b n"]
    drawn: Int[Tensor, "b n"] | None
    log_probs: Float[Tensor, "b n v"] | None


def sequel(subject: Candidate, model: SequenceModel, state: State) -> Sequel:
    """What comes after `state`, which is given up."""
    n = subject.probe_length
    if (scorer := likelihood(model)) is None:
        drawn = written(model, copy_state(state), n, PLAIN, Generator().manual_seed(7))
        return Sequel(written(model, state, n), drawn, None)
    log_probs, _ = scorer.score(subject.probe(rows_of(state)), copy_state(state))
    return Sequel(written(model, state, n), None, log_probs)


def gap(a: Sequel, b: Sequel) -> float:
    """The largest `difference` of the probe's log-probabilities, or infinity where other tokens are written."""
    if not torch.equal(a.greedy, b.greedy):
        return math.inf
    if a.log_probs is not None and b.log_probs is not None:
        return difference(a.log_probs, b.log_probs)
    assert a.drawn is not None and b.drawn is not None
    return 0.0 if torch.equal(a.drawn, b.drawn) else math.inf


def apart(subject: Candidate, model: SequenceModel, a: State, b: State) -> float:
    """How far two states of equal batch size are apart; both are given up."""
    return gap(sequel(subject, model, a), sequel(subject, model, b))
