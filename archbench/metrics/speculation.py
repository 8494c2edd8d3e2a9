"""How many tokens a decode step writes: the gain of drafting, before any clock is asked.

    tokens per step     tokens written / decode steps, over continuations of held-out prompts
    acceptance at i     share of steps that wrote at least i tokens (1 at i = 1)

Read off what the steps write (`Emission.counts`), so that it means the same for every model: 1 for plain next-token
decoding, K for a model that writes K tokens at once, something between for one that drafts and verifies. A step's worth
in time is tokens per step times the cost of a plain step over that of this one; see the latency metric.

Greedy text of a weak model runs in loops, where every draft is right, so a worse model may write more tokens a step.
Two quantities tell: the share of distinct 8-grams of what was written, and tokens per step along held-out text, where
each step starts after true text instead of the model's own.

The step that writes a text's last tokens counts whole, also what it writes beyond the number asked for: cut off, it
would count as refused. All rows of a batch step together; a row that is done leaves it.

Source: Gloeckle et al. 2024, section 3.2 and table S2 (tokens per forward); Stern et al. 2018 (mean accepted block).

Letters: p prompts, s steps, k tokens of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from archbench import stats
from archbench.errors import ConfigError
from archbench.generation import aligned
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.prompts import Prompts, heldout_stream
from archbench.sampling import GREEDY, Sampling
from archbench.state import copy_state, select_rows

NGRAM = 8


@dataclass(frozen=True, kw_only=True)
class SpeculationSettings:
    """`prompts` pieces of held-out text of `context` tokens, `batch` at once, each continued by `new_tokens` at every
    one of the `temperatures` (0 is greedy); along held-out text, each prompt gives `text_steps` steps."""

    prompts: int = 16
    context: int = 128
    new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)
    text_steps: int = 32
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("prompts", "context", "new_tokens", "text_steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"speculation.{name}: {getattr(self, name)}; must be at least 1")
        if not self.temperatures:
            raise ConfigError("speculation.temperatures: []; needs one temperature at least (0 is greedy)")
        for temperature in self.temperatures:
            Sampling(temperature=temperature)


@dataclass(kw_only=True)
class Steps:
    """What the decode steps of each prompt wrote: `counts[p]` holds the number of tokens of each of its steps, `texts`
    the tokens; `width` is the most that a step could have written."""

    counts: list[list[int]]
    texts: list[list[int]]
    width: int = 1


class SpeculationMetric(Metric):
    name = "speculation"
    version = 1
    settings = SpeculationSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "tokens_per_step": Quantity(
            unit="token/step", better="higher", meaning="tokens that a decode step writes, going on from its own text"
        ),
        "acceptance": Quantity(
            unit="fraction", better="higher", meaning="share of decode steps that wrote at least so many tokens"
        ),
        "tokens_per_step_on_text": Quantity(
            unit="token/step", better="higher", meaning="tokens that a greedy step writes after held-out text"
        ),
        "distinct_8grams": Quantity(
            unit="fraction", better="neither", meaning="share of different 8-grams in greedy text; low where it loops"
        ),
    }

    def measure(self, subject: Subject, settings: SpeculationSettings) -> Iterator[Measurement]:
        """Raises UnsupportedError when there is less held-out text than a prompt and its steps."""
        stride, limit = subject.traits.stride, subject.traits.context_limit
        context = settings.context + -settings.context % stride
        ahead = max(settings.new_tokens, settings.text_steps * stride)
        reason = ""
        if limit is not None and context + ahead + stride > limit:
            reason = (
                f"prompt and continuation need {context + ahead + stride} tokens; this model's context limit is {limit}"
            )
        prompts = Prompts(heldout_stream(subject.corpus, subject.codec, settings.context + ahead), subject.seed)
        rows = prompts.take(settings.prompts, settings.context + settings.text_steps * stride)
        heads = aligned(rows[:, : settings.context], stride)
        for temperature in settings.temperatures:
            label = "greedy" if temperature == 0 else f"temperature {temperature:g}"
            if reason:
                yield Measurement(quantity="tokens_per_step", value=None, at={"sampling": label}, reason=reason)
                yield Measurement(quantity="acceptance", value=None, at={"sampling": label}, reason=reason)
                continue
            steps = continued(subject, heads, settings, Sampling(temperature=temperature))
            yield from _acceptance(steps, label, settings)
            if temperature == 0:
                yield _distinct(steps.texts, settings)
        yield _on_text(subject, heads, rows[:, settings.context :], settings, reason)


@torch.no_grad()
def continued(
    subject: Subject, prompts: Int[Tensor, "p t"], settings: SpeculationSettings, sampling: Sampling
) -> Steps:
    """The steps of writing `new_tokens` after each prompt."""
    model = subject.model
    generator = torch.Generator(model.device).manual_seed(subject.seed)
    found = Steps(counts=[[] for _ in prompts], texts=[[] for _ in prompts])
    for begin in range(0, len(prompts), settings.batch):
        batch = prompts[begin : begin + settings.batch].to(model.device)
        state = model.prefill(batch, model.initial_state(len(batch)))
        rows = list(range(begin, begin + len(batch)))
        while rows:
            tokens, counts, state = model.decode_step(state, sampling, generator)
            found.width = max(found.width, tokens.shape[1])
            for row, written, count in zip(rows, tokens.tolist(), counts.tolist(), strict=True):
                found.counts[row].append(count)
                found.texts[row] += written[:count]
            going = [i for i, row in enumerate(rows) if len(found.texts[row]) < settings.new_tokens]
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                state = select_rows(state, torch.tensor(going, dtype=torch.long, device=model.device))
    return found


@torch.no_grad()
def along_text(
    subject: Subject, prompts: Int[Tensor, "p t"], text: Int[Tensor, "p s"], settings: SpeculationSettings
) -> list[list[int]]:
    """Tokens written by one greedy step after each prompt, and after each further stride of its own text."""
    model, found = subject.model, []
    for begin in range(0, len(prompts), settings.batch):
        batch, rest = (rows[begin : begin + settings.batch].to(model.device) for rows in (prompts, text))
        state = model.prefill(batch, model.initial_state(len(batch)))
        columns = []
        for piece in rest.split(subject.traits.stride, dim=1):
            columns.append(model.decode_step(copy_state(state), GREEDY, None).counts)
            state = model.prefill(piece, state)
        found += torch.stack(columns, dim=1).tolist()
    return found


def _acceptance(steps: Steps, label: str, settings: SpeculationSettings) -> Iterator[Measurement]:
    protocol = f"{_prompts(settings)}, {settings.new_tokens} new tokens; interval by bootstrap over prompts"
    yield _ratio("tokens_per_step", steps.counts, {"sampling": label}, protocol, least=None)
    for position in range(1, steps.width + 1):
        yield _ratio("acceptance", steps.counts, {"position": position, "sampling": label}, protocol, least=position)


def _ratio(
    quantity: str, counts: Sequence[Sequence[int]], at: Mapping[str, Any], protocol: str, least: int | None
) -> Measurement:
    """Mean over steps of the tokens written or, with `least`, of whether as many were written."""
    gains = [[count if least is None else int(count >= least) for count in row] for row in counts]
    sums, n_steps = np.array([sum(row) for row in gains]), np.array([len(row) for row in counts])
    interval = stats.bootstrap_ratio(sums, n_steps)
    return Measurement(
        quantity=quantity,
        value=float(sums.sum() / n_steps.sum()),
        samples=(sums / n_steps).tolist(),
        low=interval and interval.low,
        high=interval and interval.high,
        confidence=interval and interval.confidence,
        at=at,
        protocol=f"{int(n_steps.sum())} steps; {protocol}",
    )


def _on_text(
    subject: Subject,
    prompts: Int[Tensor, "p t"],
    text: Int[Tensor, "p s"],
    settings: SpeculationSettings,
    reason: str,
) -> Measurement:
    if reason:
        return Measurement(quantity="tokens_per_step_on_text", value=None, at={"sampling": "greedy"}, reason=reason)
    counts = along_text(subject, prompts, text, settings)
    protocol = (
        f"{_prompts(settings)}, a step at each of {settings.text_steps} places; interval by bootstrap over prompts"
    )
    return _ratio("tokens_per_step_on_text", counts, {"sampling": "greedy"}, protocol, least=None)


def _distinct(texts: Sequence[Sequence[int]], settings: SpeculationSettings) -> Measurement:
    at = {"sampling": "greedy"}
    grams = [tuple(text[i : i + NGRAM]) for text in texts for i in range(len(text) - NGRAM + 1)]
    if not grams:
        reason = f"texts of {settings.new_tokens} tokens hold no {NGRAM}-gram; set speculation.new_tokens to 8 or more"
        return Measurement(quantity="distinct_8grams", value=None, at=at, reason=reason)
    value = len(set(grams)) / len(grams)
    return Measurement(
        quantity="distinct_8grams", value=value, at=at, protocol=f"all texts together; {_prompts(settings)}"
    )


def _prompts(settings: SpeculationSettings) -> str:
    return f"{settings.prompts} held-out prompts of {settings.context} tokens, {settings.batch} rows at once"


METRIC = SpeculationMetric()
