"""What drafting is worth in time: the same weights write the same prompts with and without it, in alternating pairs.

    speedup S        plain seconds per token / speculative seconds per token
    break-even b     seconds of a speculative step / seconds of a plain step
    tokens tau       tokens that a row writes in a speculative step
    model            S = tau / b: drafting pays where a step writes more tokens than b

The two sides of the model are measured apart: S from whole continuations, b from single steps of both ways that take
turns, so that the model can be wrong (steps at other contexts, rows that drift apart, caches that the other way's steps
leave cold) and the report shows by how much. The plain way is the model's own weights without anything that only
drafting needs; an equally large model that never learned to draft is another architecture's row.

A pair is one sample: both ways continue the same fresh prompts one right after the other, who goes first alternates,
and the ratio is taken within the pair. All rows of a batch step together until they wrote `new_tokens` on average; what
a step writes beyond that counts.

The proof that drafting changes no greedy token stands beside the times: texts of both ways are compared token by token,
up to the first difference of a row. Where numbers are rounded, reading several tokens at once and one at a time may
order two nearly equal tokens differently; a difference between tokens that plain decoding holds equal to 1e-4 nats is
such a tie, any other is unexplained, and there must be none. Sampled text has no such proof: it is equal in law.

Source: Leviathan et al. 2023, 2211.17192, section 3.3 and theorem 3.8 (walltime improvement, with drafting and
verification in one measured cost); Gloeckle et al. 2024, table S2 (tokens per forward beside the speed-up).

A byte model that does not draft by itself can be given a drafter: another cell of the run, with subwords or bytes
(`archbench.drafting`; MambaByte's subword drafting, Wang et al. 2024, 2401.13660).

Letters: b batch, p prompts, t time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from archbench.clocks import CLOCKS
from archbench.drafting import Drafted
from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import Writer, generate
from archbench.levels import BEST, at_level, check_level
from archbench.metric import Companion, Measurement, Probe, Quantity, Sample, Subject, TimedMetric
from archbench.metrics.latency import Stopwatch, quiet
from archbench.model import AutoregressiveModel, Likelihood, Speculative, Traits
from archbench.prompts import Prompts, heldout_stream
from archbench.sampling import GREEDY, Sampling

NEAR_TIE = 1e-4
"""Nats between two tokens that fp32 rounding may order either way."""
EXACTNESS = ("identical_tokens", "compared_tokens", "unexplained_differences")


@dataclass(frozen=True, kw_only=True)
class SpeculationSpeedSettings:
    """Prompts of `context` tokens, `batches` rows at once, are continued by `new_tokens` at every one of the
    `temperatures` (0 is greedy). A sample also times `steps` single steps of each way. `prompts` greedy continuations
    of `new_tokens` are compared token by token for each batch. `drafter` is the label of the cell that drafts for
    models that do not draft themselves; such text is greedy and one row. `level` of the kernel ladder is "best" for the
    best there is."""

    context: int = 128
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 4)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    steps: int = 16
    prompts: int = 16
    repeats: int = 9
    drafter: str | None = None
    level: str = BEST

    def __post_init__(self) -> None:
        for name, least in (("context", 1), ("new_tokens", 1), ("steps", 2), ("prompts", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"speculation_speed.{name}: {getattr(self, name)}; must be at least {least}")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"speculation_speed.batches: {list(self.batches)}; needs numbers of at least 1")
        if not self.temperatures:
            raise ConfigError("speculation_speed.temperatures: []; needs one temperature at least (0 is greedy)")
        for temperature in self.temperatures:
            Sampling(temperature=temperature)
        check_level(self.level, "speculation_speed.level")
        if self.drafter is not None and (set(self.batches) != {1} or any(self.temperatures)):
            raise ConfigError(
                f"speculation_speed.drafter: '{self.drafter}' drafts for one greedy text; set batches to [1] and "
                "temperatures to [0]"
            )


class SpeculationSpeedMetric(TimedMetric):
    name = "speculation_speed"
    version = 1
    settings = SpeculationSpeedSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "speedup": Quantity(
            unit="ratio", better="higher", meaning="plain over speculative seconds per token, of the same weights"
        ),
        "predicted_speedup": Quantity(
            unit="ratio", better="neither", meaning="tokens per step over the break-even, as the cost model has it"
        ),
        "break_even": Quantity(
            unit="token/step", better="lower", meaning="seconds of a speculative step over those of a plain step"
        ),
        "tokens_per_step": Quantity(
            unit="token/step", better="higher", meaning="tokens that a row writes in a timed speculative step"
        ),
        "time_per_token": Quantity(
            unit="s/token", better="lower", meaning="time of decoding per token that a row wrote, either way"
        ),
        "identical_tokens": Quantity(
            unit="fraction", better="higher", meaning="share of compared greedy tokens that plain decoding writes too"
        ),
        "compared_tokens": Quantity(
            unit="token", better="neither", meaning="greedy tokens compared, up to the first difference of each row"
        ),
        "unexplained_differences": Quantity(
            unit="row", better="lower", meaning="rows whose first differing tokens are no near-tie of plain decoding"
        ),
    }

    def cannot(self, traits: Traits, settings: SpeculationSpeedSettings) -> str | None:
        if settings.drafter is not None:
            return "it drafts by itself" if traits.speculates else None
        if traits.speculates:
            return None
        tokens = "one token" if traits.stride == 1 else f"{traits.stride} tokens"
        return f"the model writes {tokens} a step by design: it does not draft"

    def beside(self, settings: SpeculationSpeedSettings) -> tuple[str, ...]:
        return () if settings.drafter is None else (settings.drafter,)

    def probes(self, subject: Subject, settings: SpeculationSpeedSettings) -> list[Probe | Measurement]:
        """One probe a batch and temperature, after the comparison of greedy texts; reasons where the model and its
        drafter do not fit. Raises UnsupportedError for a model that does not draft by itself and has no drafter, or
        when there is less held-out text than a prompt."""
        model: Writer = subject.model
        if settings.drafter is not None:
            try:
                model = drafted(subject, subject.beside[settings.drafter])
            except UnsupportedError as error:
                return [Measurement(quantity=name, value=None, reason=str(error)) for name in self.quantities]
        if not isinstance(model, Speculative):
            raise UnsupportedError("speculation_speed: the model does not draft (it is no Speculative)")
        prompts = Prompts(heldout_stream(subject.corpus, subject.codec, settings.context), subject.seed)
        pair = Pair(model, model.plain(), prompts, subject.seed, even=settings.drafter is None)
        found: list[Probe | Measurement] = []
        for batch in settings.batches:
            reason = _too_long(subject.traits.context_limit, pair, settings, batch)
            if not reason:
                found += _exactness(pair, settings, batch)
            for temperature in settings.temperatures:
                sampling = Sampling(temperature=temperature)
                at = {"context": settings.context, "batch": batch, "sampling": _label(sampling), **_at(settings)}
                if reason:
                    names = [name for name in self.quantities if name not in EXACTNESS or sampling.greedy]
                    found += [Measurement(quantity=name, value=None, at=at, reason=reason) for name in names]
                else:
                    sampler = _Sampler(pair, settings, batch, sampling)
                    found.append(Probe(at=at, sample=sampler, protocol=_how(settings)))
        return found


def drafted(subject: Subject, drafter: Companion) -> Drafted:
    """The subject's model with a drafter. Raises UnsupportedError where they do not fit."""
    if not isinstance(subject.model, AutoregressiveModel) or not isinstance(drafter.model, AutoregressiveModel):
        raise UnsupportedError(f"speculation_speed: {subject.label} and its drafter must both be next-token models")
    return Drafted(subject.model, drafter.model, drafter.codec)


class Run(NamedTuple):
    """One continuation of a batch: seconds by clock, steps, and tokens that a row wrote on average."""

    seconds: Mapping[str, float]
    steps: int
    tokens: float


@dataclass
class Pair:
    """Two ways of writing with the same weights, and the prompts that both continue. `even` says that every
    speculative step costs the same, so that a median of steps is fair to them; else it is the mean."""

    speculative: Writer
    plain: Writer
    prompts: Prompts
    seed: int
    even: bool = True
    _generators: dict[int, Generator] = field(default_factory=dict)

    def take(self, batch: int, n: int) -> Int[Tensor, "b t"]:
        return self.prompts.take(batch, n).to(self.speculative.device)

    def generator(self, way: Writer) -> Generator:
        """The way's own source of randomness, which goes on from sample to sample."""
        return self._generators.setdefault(id(way), torch.Generator(way.device).manual_seed(self.seed))

    def continued(self, way: Writer, tokens: Int[Tensor, "b t"], n_new: int, sampling: Sampling) -> Run:
        """Times decode steps after the prompts until the rows wrote n_new tokens on average."""
        generator, rows = self.generator(way), len(tokens)
        with torch.inference_mode():
            state = way.prefill(tokens, way.initial_state(rows))
            steps = written = 0
            watch = Stopwatch(way.device)
            with watch:
                while written < rows * n_new:
                    _, counts, state = way.decode_step(state, sampling, generator)
                    written += int(counts.sum())
                    steps += 1
        return Run(watch.seconds, steps, written / rows)

    def break_even(
        self, tokens: Int[Tensor, "b t"], n_steps: int, sampling: Sampling, speculative_first: bool
    ) -> dict[str, float]:
        """Seconds of a speculative step over the median of a plain one's, by clock. The steps take turns, each way
        going on from its own; the first of each warms up."""
        typical = statistics.median if self.even else statistics.mean
        ways = (self.speculative, self.plain) if speculative_first else (self.plain, self.speculative)
        taken: dict[int, list[Mapping[str, float]]] = {id(way): [] for way in ways}
        with torch.inference_mode():
            states = {id(way): way.prefill(tokens, way.initial_state(len(tokens))) for way in ways}
            for _ in range(n_steps):
                for way in ways:
                    watch = Stopwatch(way.device)
                    with watch:
                        _, counts, states[id(way)] = way.decode_step(states[id(way)], sampling, self.generator(way))
                        counts.tolist()
                    taken[id(way)].append(watch.seconds)
        return {
            clock: typical([seconds[clock] for seconds in taken[id(self.speculative)][1:]])
            / statistics.median(seconds[clock] for seconds in taken[id(self.plain)][1:])
            for clock in CLOCKS
        }


@dataclass
class _Sampler:
    """A probe's work: one pair a call, the ways swapping places from call to call."""

    pair: Pair
    settings: SpeculationSpeedSettings
    batch: int
    sampling: Sampling
    calls: int = 0

    def __call__(self) -> list[Sample]:
        with at_level(self.settings.level):
            return self._taken()

    def _taken(self) -> list[Sample]:
        pair, settings, sampling = self.pair, self.settings, self.sampling
        tokens = pair.take(self.batch, settings.context)
        speculative_first = self.calls % 2 == 0
        self.calls += 1
        runs: dict[str, Run] = {}
        with quiet():
            for name in ("speculative", "plain") if speculative_first else ("plain", "speculative"):
                way = pair.speculative if name == "speculative" else pair.plain
                runs[name] = pair.continued(way, tokens, settings.new_tokens, sampling)
            costs = pair.break_even(tokens, settings.steps, sampling, speculative_first)
        tau = runs["speculative"].tokens / runs["speculative"].steps
        samples = [Sample("tokens_per_step", tau)]
        for clock in CLOCKS:
            at = {"clock": clock}
            each = {name: run.seconds[clock] / run.tokens for name, run in runs.items()}
            samples.append(Sample("speedup", each["plain"] / each["speculative"], at))
            samples.append(Sample("break_even", costs[clock], at))
            samples.append(Sample("predicted_speedup", tau / costs[clock], at))
            samples += [Sample("time_per_token", each[name], {**at, "decoding": name}) for name in sorted(each)]
        return samples


class Comparison(NamedTuple):
    """Greedy texts of both ways. `identical` are tokens before a row's first difference, `differing` rows that have
    one, and `unexplained` those of them that are no near-tie."""

    identical: int
    differing: int
    unexplained: int


def compare(
    speculative: Writer, plain: Writer, prompts: Int[Tensor, "p t"], n_new: int, batch: int
) -> list[Comparison]:
    """One comparison a prompt; `batch` prompts are continued at once."""
    found = []
    for tokens in prompts.split(batch):
        texts = [generate(way, tokens, n_new, GREEDY) for way in (speculative, plain)]
        same = torch.eq(*texts).long().cumprod(dim=1).sum(dim=1).tolist()
        for row, n in enumerate(same):
            if n == n_new:
                found.append(Comparison(n, 0, 0))
                continue
            before = torch.cat([tokens[row], texts[1][row, :n]])
            tie = _near_tie(plain, before, int(texts[0][row, n]), int(texts[1][row, n]))
            found.append(Comparison(n, 1, int(not tie)))
    return found


@torch.no_grad()
def _near_tie(plain: Writer, before: Int[Tensor, " t"], a: int, b: int) -> bool:
    """Whether plain decoding holds two next tokens equal within NEAR_TIE; unknown without likelihood, hence False."""
    if not isinstance(plain, Likelihood):
        return False
    tokens = torch.cat([before, before.new_tensor([a])])[None]
    log_probs, _ = plain.score(tokens, plain.initial_state(1))
    return bool((log_probs[0, -1, a] - log_probs[0, -1, b]).abs() < NEAR_TIE)


def _exactness(pair: Pair, settings: SpeculationSpeedSettings, batch: int) -> Iterator[Measurement]:
    tokens = pair.take(settings.prompts, settings.context)
    with at_level(settings.level):
        rows = compare(pair.speculative, pair.plain, tokens, settings.new_tokens, batch)
    identical, differing = sum(row.identical for row in rows), sum(row.differing for row in rows)
    at = {"context": settings.context, "batch": batch, "sampling": "greedy", **_at(settings)}
    protocol = (
        f"{settings.prompts} held-out prompts of {settings.context} tokens, {settings.new_tokens} greedy tokens each; "
        f"what follows a row's first difference is not compared; near-tie: {NEAR_TIE:g} nats"
    )
    for quantity, value in (
        ("identical_tokens", identical / (identical + differing)),
        ("compared_tokens", identical + differing),
        ("unexplained_differences", sum(row.unexplained for row in rows)),
    ):
        yield Measurement(quantity=quantity, value=value, at=at, protocol=protocol)


@torch.no_grad()
def _too_long(limit: int | None, pair: Pair, settings: SpeculationSpeedSettings, batch: int) -> str:
    """Why prompt and continuations do not fit; empty when they do. A row may run ahead of the others' average."""
    if limit is None:
        return ""
    tokens = pair.take(1, min(settings.context, limit // 2))
    step = pair.speculative.decode_step(
        pair.speculative.prefill(tokens, pair.speculative.initial_state(1)), GREEDY, None
    )
    widest = step.tokens.shape[1]
    ahead = max(widest * settings.steps, min(batch, widest) * settings.new_tokens + widest)
    needed = settings.context + ahead
    if needed <= limit:
        return ""
    return f"prompt and continuation need up to {needed} tokens; this model's context limit is {limit}"


def _label(sampling: Sampling) -> str:
    return "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}"


def _at(settings: SpeculationSpeedSettings) -> dict[str, str]:
    """The level as a coordinate, where one was asked for."""
    return {} if settings.level == BEST else {"level": settings.level}


def _how(settings: SpeculationSpeedSettings) -> str:
    drafts = "" if settings.drafter is None else f"drafts by the cell '{settings.drafter}'; "
    return (
        f"{drafts}pairs of continuations by {settings.new_tokens} tokens a row, who goes first alternates; "
        f"break-even: {'medians' if settings.drafter is None else 'mean (speculative) and median (plain)'} of "
        f"{settings.steps - 1} single steps of each way, taking turns; "
        f"{torch.get_num_threads()} threads"
    )


METRIC = SpeculationSpeedMetric()
