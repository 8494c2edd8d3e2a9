"""What a model answers to many prompts: completions drawn from it, and how likely it finds a given one.

What prompts begin with in common, the shots of a few-shot prompt above all, is read once; a prompt is read once for all
its completions; prompts of one length are read together. What is drawn at a temperature depends on the seed and the
question's number alone, not on what else is asked.

Letters: t time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor

from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import aligned, write_until
from archbench.metric import Subject
from archbench.model import BOUNDARY, AutoregressiveModel, Likelihood
from archbench.sampling import Sampling
from archbench.state import State, copy_state, select_rows, tile_state

ROWS = 32
"""Prompts read and completions written at once."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """`number` tells it from others and seeds its draws; `reference` is a completion whose likelihood is wanted."""

    number: int
    prompt: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How completions are drawn: `samples` at each temperature, but one where it is 0, which is greedy; each ends
    before a string of `stop` or a boundary, or after `new_tokens` tokens."""

    samples: int
    temperatures: tuple[float, ...]
    new_tokens: int
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("samples", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; must be at least 1")
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            found = ", ".join(f"{temperature:g}" for temperature in self.temperatures) or "none"
            raise ConfigError(f"temperatures: {found}; give one or more, each once")
        for temperature in self.temperatures:
            Sampling(temperature=temperature)

    def samples_at(self, temperature: float) -> int:
        return self.samples if temperature else 1


class Answer(NamedTuple):
    """`completions` by temperature; empty texts where the prompt leaves no room for any. `nats` are those of the
    reference after the prompt, None where there is no likelihood or no room for it."""

    completions: dict[float, list[str]]
    nats: float | None
    fits: bool


class Answers(NamedTuple):
    """One answer to each question. `refused` says why there are no completions at a temperature."""

    each: list[Answer]
    refused: dict[float, str]


class Group(NamedTuple):
    """Questions, by their places, whose prompts have equally many tokens, and the state after these, a row each; None
    where they leave no room for a step."""

    places: list[int]
    n_read: int
    state: State | None


@torch.inference_mode()
def answer(subject: Subject, questions: Sequence[Question], how: Writing) -> Answers:
    """An answer to each question, in their order."""
    found: dict[int, Answer] = {}
    refused: dict[float, str] = {}
    for group in _read(subject, questions):
        asked = [questions[place] for place in group.places]
        completions: list[dict[float, list[str]]] = [{} for _ in asked]
        for temperature in how.temperatures:
            if temperature in refused:
                continue
            try:
                texts = _complete(subject, group, asked, temperature, how)
            except UnsupportedError as error:
                refused[temperature] = str(error)
                continue
            for by_temperature, written in zip(completions, texts, strict=True):
                by_temperature[temperature] = written
        nats = _nats(subject, group, asked)
        for row, place in enumerate(group.places):
            found[place] = Answer(completions[row], nats[row], group.state is not None)
    return Answers([found[place] for place in range(len(questions))], refused)


def _complete(
    subject: Subject, group: Group, asked: Sequence[Question], temperature: float, how: Writing
) -> list[list[str]]:
    """Completions of each of the group's prompts. Greedy ones are written together (by a model that searches for the
    likeliest step by drawing, with draws of the group's); others take theirs from a generator of their question's."""
    if group.state is None:
        return [[""] * how.samples_at(temperature) for _ in asked]
    limit, stride = subject.traits.context_limit, subject.traits.stride
    # Whole steps are written, and what is too much is cut off.
    room = how.new_tokens if limit is None else min(how.new_tokens, (limit - group.n_read) // stride * stride)
    model = subject.model
    boundary = model.boundary if isinstance(model, AutoregressiveModel) else BOUNDARY  # imported models have their own

    def write(state: State, n_rows: int, generator: Generator) -> list[str]:
        sampling = Sampling(temperature=temperature)
        decode, ends = subject.codec.decode, (boundary,)
        return write_until(model, state, n_rows, room, sampling, generator, decode, how.stop, ends)

    if not temperature:
        generator = _generator(subject, asked[0].number)
        return [[text] for text in write(copy_state(group.state), len(asked), generator)]
    texts: list[list[str]] = []
    for row, question in enumerate(asked):
        generator = _generator(subject, question.number, temperature)
        state = _row(group.state, row, model.device)
        counts = [min(ROWS, how.samples - begin) for begin in range(0, how.samples, ROWS)]
        texts.append([text for n_rows in counts for text in write(tile_state(state, n_rows), n_rows, generator)])
    return texts


def _generator(subject: Subject, number: int, temperature: float = 0.0) -> Generator:
    seed = np.random.default_rng([subject.seed, number, round(1e6 * temperature)]).integers(2**63)
    return torch.Generator(subject.model.device).manual_seed(int(seed))


def _read(subject: Subject, questions: Sequence[Question]) -> Iterator[Group]:
    """All questions in groups. Prompts with as many boundaries in front have the same text at the same places, and
    share what they begin with."""
    model, limit, stride = subject.model, subject.traits.context_limit, subject.traits.stride
    alike: dict[int, dict[int, list[int]]] = {}
    prompts = []
    for place, question in enumerate(questions):
        ids = _ids(subject, question.prompt)
        prompts.append(aligned(ids, stride))
        alike.setdefault(-ids.shape[1] % stride, {}).setdefault(prompts[-1].shape[1], []).append(place)
    for by_length in alike.values():
        fitting = {n for n in by_length if limit is None or n + stride <= limit}
        for n_read in sorted(by_length.keys() - fitting):
            yield Group(by_length[n_read], n_read, None)
        if not fitting:
            continue
        n = _common([prompts[place][0].tolist() for n in fitting for place in by_length[n]]) // stride * stride
        shared = model.prefill(prompts[by_length[min(fitting)][0]][:, :n], model.initial_state(1))
        for n_read in sorted(fitting):
            for begin in range(0, len(by_length[n_read]), ROWS):
                places = by_length[n_read][begin : begin + ROWS]
                rest = torch.cat([prompts[place][:, n:] for place in places])
                yield Group(places, n_read, model.prefill(rest, tile_state(shared, len(places))))


def _row(state: State, row: int, device: torch.device) -> State:
    return select_rows(state, torch.tensor([row], device=device))


def _ids(subject: Subject, text: str) -> Int[Tensor, "1 t"]:
    return torch.from_numpy(subject.codec.encode(text.encode()).astype(np.int64))[None].to(subject.model.device)


def _common(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with: what the first and the last in order share, all between them share."""
    first, last = min(rows), max(rows)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _nats(subject: Subject, group: Group, asked: Sequence[Question]) -> list[float | None]:
    """Of each question's reference after its prompt; None without a likelihood, or without room for it."""
    found: list[float | None] = [None] * len(asked)
    limit = subject.traits.context_limit
    for row, question in enumerate(asked):
        ids = _ids(subject, question.reference)
        if group.state is None or (limit is not None and group.n_read + ids.shape[1] > limit):
            continue
        if isinstance(subject.model, Likelihood):
            log_probs, _ = subject.model.score(ids, _row(group.state, row, subject.model.device))
            found[row] = -float(log_probs.gather(2, ids[..., None]).double().sum())
    return found
