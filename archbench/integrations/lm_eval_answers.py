"""What a model answers to the three kinds of requests of lm-eval, in terms of text. Needs no lm-eval.

- log-likelihood of a continuation after a context, and whether greedy decoding would write it;
- log-likelihood of a whole text ("rolling"), under one of the rules of `metrics/likelihood.py` and by its very code;
- text that goes on from a prompt until a stop string.

A text begins after the boundary: its first token is predicted like every other. lm-eval's own models do the same, but
begin their second window after the last token of the first, where the rules here begin each after a boundary.

Letters: b batch, t time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from archbench.codec import Codec
from archbench.data.windows import HeldoutDocument
from archbench.errors import ConfigError, DataError, UnsupportedError, suggestion
from archbench.generation import aligned, stream
from archbench.metrics.likelihood import MAX_LOG_PROBS, NO_LIKELIHOOD, STATES, LikelihoodSettings, document_nats
from archbench.model import BOUNDARY, AutoregressiveModel, Likelihood, SequenceModel, Traits
from archbench.sampling import GREEDY, Sampling
from archbench.state import State, tile_state

DEFAULT_NEW_TOKENS = 256
"""What lm-eval takes when a task does not say how many."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names tasks use for the number of new tokens; of several the first counts, as in lm-eval."""

WRITING = ("until", "do_sample", "temperature", "top_p", "top_k", *LIMITS)


class Writing(NamedTuple):
    """How a continuation is written: at most `n_new` tokens, ending before any of `stop`."""

    sampling: Sampling
    n_new: int
    stop: tuple[str, ...]


class Answer(NamedTuple):
    """log_likelihood: of the continuation, in nats. greedy: each of its tokens is the most likely one."""

    log_likelihood: float
    greedy: bool


class Pair(NamedTuple):
    context: Int[Tensor, " c"]
    continuation: Int[Tensor, " t"]


@dataclass
class Respondent:
    """A model with its codec, asked in texts.

    Attributes:
        window: tokens of a window of the rolling rules `reset` and `sliding`, and the pieces `carried` is read in;
            None when not known, which only rolling requests mind.
        rule: one of `reset`, `sliding`, `carried`.
        seed: of what is drawn; continuation i of a call is drawn with seed + i, whatever came before it.
        cut: how many contexts and prompts lost their beginning to the model's context limit so far.
    """

    model: SequenceModel
    traits: Traits
    codec: Codec
    window: int | None = None
    rule: str = "reset"
    seed: int = 0
    batch: int = 16
    cut: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.rule not in STATES:
            raise ConfigError(f"--state {self.rule}: not known; {suggestion(self.rule, STATES)}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"--context {self.window}: must be at least 1 token, or left out")

    def log_likelihoods(
        self, requests: Sequence[tuple[str, str]], notify: Callable[[int], object] = lambda _: None
    ) -> list[Answer]:
        """Of each (context, continuation). A context is read once, whatever the number of its continuations.

        A context that does not fit under the model's context limit together with its continuation loses its beginning.
        `notify` is called with the number of requests answered since the last call.

        Raises:
            UnsupportedError: the model has no likelihood, or a continuation alone exceeds the context limit; before
                anything is read.
        """
        self._require_likelihood()
        pairs = [self._fit(split(self.codec, context, continuation)) for context, continuation in requests]
        shared: dict[bytes, list[int]] = {}
        for index, pair in enumerate(pairs):
            shared.setdefault(pair.context.numpy().tobytes(), []).append(index)
        answers: dict[int, Answer] = {}
        for indices in shared.values():
            with torch.no_grad():
                state = self._read(pairs[indices[0]].context)
            for begin in range(0, len(indices), self.batch):
                group = indices[begin : begin + self.batch]
                found = score(self.model, [pairs[index].continuation for index in group], tile_state(state, len(group)))
                answers.update(zip(group, found, strict=True))
                notify(len(group))
        return [answers[index] for index in range(len(requests))]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each text, in nats.

        Raises:
            UnsupportedError: the model has no likelihood, or the rule reads more at once than its context limit.
            ConfigError: no window is known.
        """
        self._require_likelihood()
        window = self.require_window()
        ids = [token_ids(self.codec, text) for text in texts]
        documents = [HeldoutDocument(str(n), tokens, 0) for n, tokens in enumerate(ids) if len(tokens)]
        answers = [0.0] * len(texts)
        if documents:
            self._require_room(max(len(document.tokens) for document in documents), window)
            settings = LikelihoodSettings(batch=self.batch)
            nats = document_nats(self.model, self.traits, documents, self.rule, window, settings)
            for document, found in zip(documents, nats.tolist(), strict=True):
                answers[int(document.name)] = -found
        return answers

    def write(self, prompt: str, how: Writing, index: int = 0) -> str:
        """The text that goes on from `prompt`, without the stop string. A written boundary ends it too.

        Raises:
            UnsupportedError: the new tokens alone exceed the context limit, or the model cannot sample as asked.
        """
        stride = self.traits.stride
        n_written = -(-how.n_new // stride) * stride  # whole steps are written, and what is too much is cut off
        tokens = self._cut(token_ids(self.codec, prompt), n_written, f"max_gen_toks {how.n_new}")
        device = self.model.device
        generator = torch.Generator(device).manual_seed(self.seed + index)
        pieces = stream(
            self.model,
            aligned(tokens[None].to(device), stride),
            how.n_new,
            how.sampling,
            generator,
            self.codec.decode,
            how.stop,
            stop_tokens=(self._boundary(),),
        )
        return "".join(pieces)

    def require_window(self) -> int:
        """The window of rolling requests. Raises ConfigError when none is known."""
        if self.window is None:
            raise ConfigError("--context: missing; this checkpoint does not say how long its windows are")
        return self.window

    def _require_likelihood(self) -> None:
        if not self.traits.likelihood:
            raise UnsupportedError(f"lm-eval: {NO_LIKELIHOOD}")

    def _boundary(self) -> int:
        """The token that ends a text: imported models bring their own."""
        return self.model.boundary if isinstance(self.model, AutoregressiveModel) else BOUNDARY

    def _read(self, context: Int[Tensor, " c"]) -> State:
        tokens = aligned(context[None].to(self.model.device), self.traits.stride)
        return self.model.prefill(tokens, self.model.initial_state(1))

    def _fit(self, pair: Pair) -> Pair:
        n = len(pair.continuation)
        return Pair(self._cut(pair.context, n, f"a continuation of {n} tokens"), pair.continuation)

    def _cut(self, context: Int[Tensor, " c"], n: int, what: str) -> Int[Tensor, " _"]:
        """The end of the context, so much of it that n more tokens fit in."""
        limit, stride = self.traits.context_limit, self.traits.stride
        if limit is None:
            return context
        if n > limit:
            raise UnsupportedError(f"lm-eval: {what} does not fit into the model's context limit of {limit} tokens")
        room = (limit - n) // stride * stride  # boundaries fill the prompt up to whole strides
        if len(context) <= room:
            return context
        self.cut += 1
        return context[len(context) - room :]

    def _require_room(self, longest: int, window: int) -> None:
        reads = longest if self.rule == "carried" else min(longest, window)
        limit = self.traits.context_limit
        if limit is not None and reads > limit:
            raise UnsupportedError(
                f"lm-eval: {reads} tokens must be read in one go with --state {self.rule}, and the model's context "
                f"limit is {limit} tokens; use --state reset or sliding with --context {limit} or less"
            )


def token_ids(codec: Codec, text: str) -> Int[Tensor, " t"]:
    """Raises DataError for text that the codec cannot hold."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"lm-eval: a text holds a lone surrogate ({error.reason}); repair that text") from None
    return torch.from_numpy(codec.encode(encoded).astype("int64"))


def split(codec: Codec, context: str, continuation: str) -> Pair:
    """The tokens of context + continuation, parted where they first differ from those of the context alone.

    With bytes that is between the two texts. With byte pairs a token may straddle the place ("a " + "b" becomes "a",
    " b"): it belongs to the continuation then, as in lm-eval, which takes the whole's tokens from the context's number
    on. Where the two differ, lm-eval may skip tokens or, because it first moves spaces that end the context, score some
    that are the context's; here each of the continuation's bytes is scored and no whole token of the context.
    """
    alone, whole = token_ids(codec, context), token_ids(codec, context + continuation)
    common = min(len(alone), len(whole))
    differing = (alone[:common] != whole[:common]).nonzero()
    place = int(differing[0]) if len(differing) else common
    return Pair(whole[:place], whole[place:])


@torch.no_grad()
def score(model: SequenceModel, continuations: Sequence[Int[Tensor, " _"]], state: State) -> list[Answer]:
    """One continuation a row of `state`, which is given up. An empty one has likelihood 1."""
    rows = pad_sequence(list(continuations), batch_first=True, padding_value=BOUNDARY)  # what follows changes nothing
    log_probs, greedy = _token_scores(model, rows, state)
    return [
        Answer(float(logs[: len(row)].sum()), bool(best[: len(row)].all()))
        for row, logs, best in zip(continuations, log_probs, greedy, strict=True)
    ]


def _token_scores(
    model: SequenceModel, tokens: Int[Tensor, "b t"], state: State
) -> tuple[Float64[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """ln p of every token and whether it is the most likely one, on the CPU."""
    assert isinstance(model, Likelihood), NO_LIKELIHOOD
    log_probs, greedy = torch.zeros(tokens.shape, dtype=torch.float64), torch.ones(tokens.shape, dtype=torch.bool)
    step = max(1, MAX_LOG_PROBS // (len(tokens) * model.vocab_size))
    for begin in range(0, tokens.shape[1], step):
        piece = tokens[:, begin : begin + step].to(model.device)
        scores, state = model.score(piece, state)
        log_probs[:, begin : begin + step] = scores.gather(-1, piece[..., None]).squeeze(-1).double().cpu()
        greedy[:, begin : begin + step] = (scores.argmax(dim=-1) == piece).cpu()
    return log_probs, greedy


def writing(options: Mapping[str, Any], where: str) -> Writing:
    """A task's `generation_kwargs` as lm-eval means them: nothing is drawn unless `do_sample` or a temperature says so.

    Raises:
        ConfigError: an option that is not understood, or an impossible value; names `where`.
    """
    for key in options:
        if key not in WRITING:
            raise ConfigError(f"{where}: generation_kwargs.{key}: not supported; {suggestion(key, WRITING)}")
    try:
        temperature = None if options.get("temperature") is None else float(options["temperature"])
        top_p = 1.0 if options.get("top_p") is None else float(options["top_p"])
        top_k = int(options.get("top_k") or 0)
        n_new = next((int(options[key]) for key in LIMITS if options.get(key) is not None), DEFAULT_NEW_TOKENS)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: generation_kwargs: {error}") from None
    if n_new < 1:
        raise ConfigError(f"{where}: generation_kwargs: {n_new} new tokens; must be at least 1")
    draws = bool(temperature) if options.get("do_sample") is None else bool(options["do_sample"])
    sampling = GREEDY
    if draws and temperature != 0:
        try:  # top_k 0 and top_p 1 leave out nothing, as in transformers
            sampling = Sampling(
                temperature=1.0 if temperature is None else temperature,
                top_k=top_k or None,
                top_p=None if top_p == 1 else top_p,
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: generation_kwargs: {error}") from None
    return Writing(sampling, n_new, _stops(options.get("until"), where))


def _stops(until: Any, where: str) -> tuple[str, ...]:
    """The stop strings: one, or a list of them; empty ones stop nothing, as in lm-eval."""
    found: Iterable[Any] = [until] if isinstance(until, str) else until or ()
    stops = list(found)
    wrong = [stop for stop in stops if not isinstance(stop, str)]
    if wrong:
        raise ConfigError(f"{where}: generation_kwargs.until: {wrong[0]!r}; expected strings")
    return tuple(stop for stop in stops if stop)
