"""What a model costs by count, not by clock: parameters, FLOPs per token, bytes of state.

FLOPs are counted in three ways, by the model's formulas, by tracing the trained model, and by tracing one on the meta
device; where they differ by more than 2 % the protocol says so. Everything is for one row. A multiply-add is 2;
optimizer steps, norms, softmax, activations and look-ups are not counted, and `causal` (the weight of the masked square
of attention) stands beside each figure. Models that learn by reading have no backward pass: their training costs what
reading does.

The state is weighed alive: all memory that its tensors keep from being freed, after reading a prompt.

Source: Hoffmann et al. 2022, appendix F, for the counting of forward and backward passes (embeddings excepted: free).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from archbench import registry
from archbench.errors import ConfigError
from archbench.flops import TOLERANCE, ThreeCounts, Work, count_three_ways
from archbench.generation import aligned
from archbench.metric import Measurement, Metric, Quantity, Subject
from archbench.model import SequenceModel
from archbench.prompts import Prompts, heldout_stream
from archbench.state import state_bytes

WAYS = ("analytic", "traced", "meta")


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """`contexts` in tokens; `causal` 0.5 counts half of causal attention, 1.0 all; decoding is averaged over
    `decode_steps` steps, since a step may write several tokens."""

    contexts: tuple[int, ...] = (128, 512, 2048)
    causal: float = 0.5
    decode_steps: int = 4

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"cost.contexts: {list(self.contexts)}; needs token counts of at least 1")
        if not 0 < self.causal <= 1:
            raise ConfigError(f"cost.causal: {self.causal}; must lie in (0, 1]")
        if self.decode_steps < 1:
            raise ConfigError(f"cost.decode_steps: {self.decode_steps}; must be at least 1")


class CostMetric(Metric):
    name = "cost"
    version = 1
    settings = CostSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "parameters": Quantity(unit="parameter", better="neither", meaning="learned numbers, a shared tensor once"),
        "training_flops_per_token": Quantity(
            unit="FLOP/token", better="lower", meaning="forward and backward of a window, per token of it"
        ),
        "training_flops_per_byte": Quantity(
            unit="FLOP/B", better="lower", meaning="the same per byte of raw text, which compares across codecs"
        ),
        "prefill_flops_per_token": Quantity(unit="FLOP/token", better="lower", meaning="reading a prompt, per token"),
        "decode_flops_per_token": Quantity(unit="FLOP/token", better="lower", meaning="writing, per token written"),
        "flops_disagreement": Quantity(
            unit="fraction", better="lower", meaning="largest relative difference between the three counts"
        ),
        "state_bytes": Quantity(unit="B", better="lower", meaning="memory held by the state of one row after a prompt"),
    }

    def measure(self, subject: Subject, settings: CostSettings) -> Iterator[Measurement]:
        """Raises UnsupportedError when there is less held-out text than the longest context."""
        total, non_embedding = parameter_counts(subject.model)
        yield Measurement(quantity="parameters", value=total, at={"kind": "total"})
        yield Measurement(quantity="parameters", value=non_embedding, at={"kind": "non_embedding"})
        longest = max(settings.contexts) + subject.traits.lookahead
        prompts = Prompts(heldout_stream(subject.corpus, subject.codec, longest), subject.seed)
        for context in settings.contexts:
            yield from _flops(subject, settings, context, prompts)
            yield _state(subject, context, prompts)


def parameter_counts(model: SequenceModel) -> tuple[int, int]:
    """All learned numbers, and those outside embedding tables (a table that also serves as unembedding is one).

    In a model that learns by reading, the buffers are what it learned.
    """
    tables = {
        id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    if any(not phase.groups for phase in model.phases()):
        total += sum(buffer.numel() for buffer in model.buffers())
    return total, total - sum(tables.values())


def _flops(subject: Subject, settings: CostSettings, context: int, prompts: Prompts) -> Iterator[Measurement]:
    where = {"context": context, "causal": settings.causal}
    possible: list[Work] = []
    for work in ("training", "prefill", "decode"):
        reason = _beyond_limit(subject, context + (settings.decode_steps if work == "decode" else 0))
        if reason is None:
            possible.append(work)
        else:
            yield from _missing(work, where, reason)
    if not possible:
        return
    counts = count_three_ways(
        registry.architecture(subject.architecture),
        subject.config,
        context,
        settings.causal,
        works=possible,
        tokens=prompts.take(1, context + subject.traits.lookahead)[0],
        model=subject.model,
        steps=settings.decode_steps,
    )
    for count in counts.values():
        yield from _per_token(count, where, _protocol(count, settings), prompts.stream.bytes_per_token)


def _per_token(
    count: ThreeCounts, where: Mapping[str, object], protocol: str, bytes_per_token: float
) -> Iterator[Measurement]:
    quantity = f"{count.work}_flops_per_token"
    for way, flops in count.by_way.items():
        at = {"count": way, **where}
        if flops is None:
            yield Measurement(quantity=quantity, value=None, at=at, reason=count.missing[way])
        else:
            yield Measurement(quantity=quantity, value=flops / count.n_tokens, at=at, protocol=protocol)
    at = {"work": count.work, "context": where["context"]}
    if count.traced is None and count.meta is None:
        yield Measurement(quantity="flops_disagreement", value=None, at=at, reason=count.missing["traced"])
    else:
        flag = "" if count.agree else f"FLAGGED: the counts differ by more than {TOLERANCE:.0%}; "
        yield Measurement(quantity="flops_disagreement", value=count.disagreement, at=at, protocol=flag + protocol)
    if count.work == "training":
        yield Measurement(
            quantity="training_flops_per_byte",
            value=count.analytic / count.n_tokens / bytes_per_token,
            at={"context": where["context"]},
            protocol=f"analytic; {bytes_per_token:.3f} bytes of held-out text a token; {protocol}",
        )


def _missing(work: Work, where: Mapping[str, object], reason: str) -> Iterator[Measurement]:
    for way in WAYS:
        yield Measurement(quantity=f"{work}_flops_per_token", value=None, at={"count": way, **where}, reason=reason)
    at = {"work": work, "context": where["context"]}
    yield Measurement(quantity="flops_disagreement", value=None, at=at, reason=reason)
    if work == "training":
        at = {"context": where["context"]}
        yield Measurement(quantity="training_flops_per_byte", value=None, at=at, reason=reason)


def _state(subject: Subject, context: int, prompts: Prompts) -> Measurement:
    at, model = {"context": context}, subject.model
    reason = _beyond_limit(subject, context)
    if reason is not None:
        return Measurement(quantity="state_bytes", value=None, at=at, reason=reason)
    tokens = aligned(prompts.take(1, context), subject.traits.stride).to(model.device)
    with torch.no_grad():
        size = state_bytes(model.prefill(tokens, model.initial_state(1)))
    return Measurement(quantity="state_bytes", value=size, at=at, protocol="one row, live state, after a prompt")


def _beyond_limit(subject: Subject, n_tokens: int) -> str | None:
    limit = subject.traits.context_limit
    if limit is None or n_tokens <= limit:
        return None
    return f"needs {n_tokens} tokens of context; this model's limit is {limit}"


def _protocol(count: ThreeCounts, settings: CostSettings) -> str:
    steps = f"; mean of {settings.decode_steps} steps, {count.n_tokens:g} tokens" if count.work == "decode" else ""
    return f"one row, multiply-add 2, causal attention weighed {settings.causal:g}{steps}; {count.coverage}"


METRIC = CostMetric()
