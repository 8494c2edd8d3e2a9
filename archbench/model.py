"""The contract that every architecture meets: two verbs over an opaque state.

    state = model.initial_state(batch_size)
    state = model.prefill(tokens, state)                      # reads any number of tokens
    emission = model.decode_step(state, sampling, generator)  # writes one step: 1, the accepted, or K tokens

Likelihood is a separate type, mixed in only by models that have one, so that a perplexity cannot be computed for a
model without. Segments, patches, drafts, verification and rollback live inside the model: how many tokens a step
writes and how large the state is are measured from what comes out, never declared.

Two conventions hold for every codec and model:

- Token 0 is the boundary: it stands between documents and, unread, before the first token of a sequence. A fresh
  state is the state after a boundary, so the first token of a text is predicted like every other.
- Batches come first, and all rows of a call have the same number of tokens.

Letters: b batch, t time (tokens), d width, v vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.ops.cross_entropy import cross_entropy
from archbench.sampling import Sampling, draw
from archbench.state import State

BOUNDARY = 0


class Emission(NamedTuple):
    """What one decode step wrote.

    Row i wrote `tokens[i, :counts[i]]`; what lies beyond is padding. Every row writes at least one token.
    """

    tokens: Int[Tensor, "b k"]
    counts: Int[Tensor, " b"]
    state: State


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a caller must know before calling; every entry is tested against the model's behaviour.

    Attributes:
        likelihood: the model is a `Likelihood`.
        stride: a decode step writes a multiple of this many tokens, and prompts are read in such multiples.
        context_limit: most tokens a state can hold, None for no limit.
        constant_state: the state's size does not depend on how much was read.
        lookahead: how many tokens beyond a position the training loss looks at (1 for next-token prediction).
        answers: the training loss honours `Batch.weights`, so that a task's answers alone can be learned.
        repeats: the training loss honours `Batch.repeats`.
        reconstruction: the model is a `Reconstruction`.
        speculates: decode steps draft and verify, and the model is a `Speculative`.
    """

    likelihood: bool
    stride: int = 1
    context_limit: int | None = None
    constant_state: bool = False
    lookahead: int = 1
    answers: bool = False
    repeats: bool = False
    reconstruction: bool = False
    speculates: bool = False


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters trained with the same multiple of the learning rate and the same weight decay switch."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: bool = True


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        tokens: windows of context + lookahead tokens.
        progress: share of the phase's budget spent, in [0, 1).
        generator: the only source of randomness a loss may use.
        weights: how much predicting each token counts, None for all alike; where it is given, the mean is over what
            counts, and rows whose counted tokens are all the most likely ones are reported as the part "exact".
        repeats: how often each token is to be taken to stand in the text, None for once. A model whose memory is a sum
            over tokens can so be taught what a text of many times the window's length does to it.
    """

    tokens: Int[Tensor, "b t"]
    progress: float
    generator: Generator
    weights: Float[Tensor, "b t"] | None = None
    repeats: Float[Tensor, "b t"] | None = None


class Loss(NamedTuple):
    """The scalar to minimise, and named parts for the log. Parts are detached scalars in the unit they are named in."""

    value: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]] = {}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One training problem. The trainer runs the phases in order, giving each its `share` of the cell's budget.

    `groups` are the parameters this phase trains. A phase without groups learns by reading (counts, statistics): its
    loss is called on every batch and no gradient step follows.
    """

    name: str
    share: float
    groups: Sequence[ParameterGroup]
    loss: Callable[[Batch], Loss]


class SequenceModel(nn.Module, ABC):
    """A model of token sequences that can be trained, can read and can write."""

    vocab_size: int

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers())).device

    @abstractmethod
    def phases(self) -> list[Phase]:
        """The training problems, in order; shares sum to one."""

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """The state of `batch_size` rows that have read nothing."""

    @abstractmethod
    def prefill(self, tokens: Int[Tensor, "b t"], state: State) -> State:
        """Reads `tokens` (t >= 0; a multiple of the stride). Gives up `state`.

        Raises:
            ContextOverflow: the state would hold more than `context_limit` tokens.
        """

    @abstractmethod
    def decode_step(self, state: State, sampling: Sampling, generator: Generator | None) -> Emission:
        """Writes one step. Gives up `state`. What was written counts as read. `generator` may be None when greedy."""

    def decode_steps(self, state: State, n: int, sampling: Sampling, generator: Generator | None) -> Emission:
        """What one decode step wrote, or several of up to n in all, one behind the other, where doing them together is
        quicker. Gives up `state`. For whoever wants n tokens and does not look at them in between."""
        del n
        return self.decode_step(state, sampling, generator)

    @abstractmethod
    def flops(self) -> FlopFormulas:
        """Analytic FLOPs of training, prefill and decode."""

    def lasting(self, state: State) -> State:
        """What of `state` is kept for good, views allowed: all of it, except in models that read by segments, where the
        buffers of the open segment are left out. It is what papers count as a model's memory."""
        return state


class FlopFormulas(ABC):
    """FLOPs (a multiply-add is 2) of a model's three kinds of work, from formulas that stand beside the layers.

    Counted are matrix products, attention, convolutions and recurrences; normalisations, activations, softmax and
    embedding look-ups are free by convention. `causal` weighs the masked half of attention inside one call: 0.5
    counts only the pairs a causal model needs, 1.0 the full rectangle.
    """

    @abstractmethod
    def training(self, context: int, causal: float = 0.5) -> float:
        """Forward and backward of one window with `context` positions, all phases weighed by their share."""

    @abstractmethod
    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        """Reading n tokens after `context` tokens."""

    @abstractmethod
    def decode(self, context: int) -> float:
        """Writing one step after `context` tokens, at temperature 1."""

    def further_draw(self) -> float | None:
        """Drawing the step that is being written once more, which models pay for that have no probabilities and choose
        among candidates; None for those that have them."""
        return None


class Likelihood(ABC):
    """A model that gives every next token a probability."""

    @abstractmethod
    def score(self, tokens: Int[Tensor, "b t"], state: State) -> tuple[Float[Tensor, "b t v"], State]:
        """Reads `tokens`, returning for each the log-probabilities (nats, fp32, normalised) of the whole vocabulary
        just before it was read: entry [:, i] knows the state and tokens[:, :i] only. Gives up `state`; streams."""


class Reconstruction(ABC):
    """A model that writes through a latent code: a chunk of `stride` tokens becomes one Gaussian vector and comes
    back. Letters: c chunks, l latent width."""

    @abstractmethod
    def posterior(self, tokens: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b c l"], Float[Tensor, "b c l"]]:
        """Mean and standard deviation of the code of each chunk; t is a multiple of the stride."""

    @abstractmethod
    def reconstruct(self, latent: Float[Tensor, "b c l"]) -> Float[Tensor, "b t v"]:
        """Logits of the tokens that the codes stand for."""


class Speculative(ABC):
    """A model whose decode steps draft tokens and keep those that hold: it writes what `plain` writes, greedy the same
    tokens, sampled tokens of the same law."""

    @abstractmethod
    def plain(self) -> SequenceModel:
        """The same weights, shared and not copied, writing one token a step without drafting anything. Its states are
        its own: they hold nothing that only drafting needs."""


class AutoregressiveState(NamedTuple):
    """`pending` is the last token of each row: part of the text, not yet seen by the layers."""

    pending: Int[Tensor, " b"]
    layers: State


class AutoregressiveModel(SequenceModel, Likelihood):
    """A next-token model given by `initial_layers`, `hidden` and `logits`; the verbs follow from these.

    The newest token waits in the state as `pending` until the next call reads it together with what follows. So one
    pass over [pending, tokens but the last] yields exactly the predictions of `tokens`, and a decode step is one pass
    over one token.
    """

    boundary = BOUNDARY
    """The token that stands before the first one; imported models bring their own."""

    prefill_chunk = 4096
    """Longest stretch read in one pass, so that memory does not grow with the prompt beyond the state itself."""

    @abstractmethod
    def initial_layers(self, batch_size: int) -> State:
        """The layers' state before anything was read."""

    @abstractmethod
    def hidden(self, tokens: Int[Tensor, "b t"], layers: State) -> tuple[Float[Tensor, "b t d"], State]:
        """The last hidden vectors after reading `tokens`, t >= 1. Gives up `layers`."""

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Unnormalised log-probabilities of the token that follows each position."""

    def predict(self, tokens: Int[Tensor, "b t"], layers: State) -> tuple[Float[Tensor, "b t v"], State]:
        """Reads tokens, t >= 1, and returns the logits of the token that follows each. Gives up `layers`. A model with
        a quicker way for few tokens has it here."""
        hidden, layers = self.hidden(tokens, layers)
        return self.logits(hidden), layers

    def write(
        self, pending: Int[Tensor, " b"], layers: State, sampling: Sampling, generator: Generator | None
    ) -> tuple[Int[Tensor, " b"], State]:
        """Reads the pending token of each row and draws the next one. Gives up `layers`."""
        logits, layers = self.predict(pending[:, None], layers)
        return draw(logits[:, -1], sampling, generator), layers

    def initial_state(self, batch_size: int) -> AutoregressiveState:
        pending = torch.full((batch_size,), self.boundary, dtype=torch.long, device=self.device)
        return AutoregressiveState(pending, self.initial_layers(batch_size))

    def prefill(self, tokens: Int[Tensor, "b t"], state: AutoregressiveState) -> AutoregressiveState:
        for chunk in tokens.split(self.prefill_chunk, dim=1) if tokens.shape[1] else ():
            inputs = torch.cat([state.pending[:, None], chunk[:, :-1]], dim=1)
            _, layers = self.hidden(inputs, state.layers)
            state = AutoregressiveState(chunk[:, -1].clone(), layers)
        return state

    def score(
        self, tokens: Int[Tensor, "b t"], state: AutoregressiveState
    ) -> tuple[Float[Tensor, "b t v"], AutoregressiveState]:
        if not tokens.shape[1]:
            return torch.zeros(*tokens.shape, self.vocab_size, device=tokens.device), state
        inputs = torch.cat([state.pending[:, None], tokens[:, :-1]], dim=1)
        logits, layers = self.predict(inputs, state.layers)
        return logits.float().log_softmax(dim=-1), AutoregressiveState(tokens[:, -1].clone(), layers)

    def decode_step(self, state: AutoregressiveState, sampling: Sampling, generator: Generator | None) -> Emission:
        token, layers = self.write(state.pending, state.layers, sampling, generator)
        return Emission(token.view(-1, 1), torch.ones_like(token), AutoregressiveState(token, layers))

    def lasting(self, state: AutoregressiveState) -> State:
        return state.layers

    def phases(self) -> list[Phase]:
        groups = decay_groups(self, self.undecayed())
        return [Phase(name="next_token", share=1.0, groups=groups, loss=self.next_token_loss)]

    def undecayed(self) -> Iterable[nn.Parameter]:
        """Parameters that weight decay must leave alone whatever their shape (say, the A_log of an SSM)."""
        return ()

    def next_token_loss(self, batch: Batch) -> Loss:
        """Mean cross-entropy in nats of predicting each token of the window from those before it."""
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        if batch.weights is None:
            hidden, _ = self.hidden(inputs, self.initial_layers(inputs.shape[0]))
            return Loss(cross_entropy(self.logits(hidden), targets))
        weights = batch.weights[:, 1:]
        n = weights.shape[1] - first_counted(weights)
        repeats = None if batch.repeats is None else batch.repeats[:, :-1]
        hidden = self.window_hidden(inputs, n, repeats)
        return answer_loss(self.logits(hidden), targets[:, -n:], weights[:, -n:])

    def window_hidden(
        self, tokens: Int[Tensor, "b t"], n: int, repeats: Float[Tensor, "b t"] | None
    ) -> Float[Tensor, "b n d"]:
        """The last n hidden vectors of whole training windows, read from a fresh state. A model that can leave out
        work for the others, or that honours `repeats`, has a way of its own."""
        assert repeats is None, "traits.repeats is False"
        hidden, _ = self.hidden(tokens, self.initial_layers(tokens.shape[0]))
        return hidden[:, -n:]

    @abstractmethod
    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        """FLOPs of `hidden` over n tokens of one row after `context` tokens."""

    @abstractmethod
    def logits_flops(self) -> float:
        """FLOPs of `logits` for one position."""

    def flops(self) -> FlopFormulas:
        return _AutoregressiveFlops(self)


class _AutoregressiveFlops(FlopFormulas):
    def __init__(self, model: AutoregressiveModel) -> None:
        self.model = model

    def training(self, context: int, causal: float = 0.5) -> float:
        # The backward pass multiplies every matrix twice: once for its input's gradient, once for its own. A model
        # that learns by reading has none.
        passes = 3 if any(phase.groups for phase in self.model.phases()) else 1
        return passes * (self.model.hidden_flops(context, 0, causal) + context * self.model.logits_flops())

    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        return self.model.hidden_flops(n, context, causal)

    def decode(self, context: int) -> float:
        return self.model.hidden_flops(1, context, 1.0) + self.model.logits_flops()


def first_counted(weights: Float[Tensor, "b t"]) -> int:
    """The first place that counts in any row; the last place if none does."""
    counted = weights.ne(0).any(dim=0)
    return int(counted.int().argmax()) if bool(counted.any()) else weights.shape[1] - 1


def answer_loss(logits: Float[Tensor, "b t v"], targets: Int[Tensor, "b t"], weights: Float[Tensor, "b t"]) -> Loss:
    """Weighted mean cross-entropy in nats, and as the part "exact" the share of rows whose counted targets are all the
    most likely tokens: what greedy writing would get right, by induction over the answer's tokens."""
    return Loss(cross_entropy(logits, targets, weights), {"exact": exact_rows(logits.detach(), targets, weights)})


def exact_rows(
    logits: Float[Tensor, "b t v"], targets: Int[Tensor, "b t"], weights: Float[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Share of rows whose counted targets are all the most likely tokens."""
    right = (logits.argmax(dim=-1) == targets) | (weights == 0)
    return right.all(dim=1).float().mean()


def decay_groups(module: nn.Module, undecayed: Iterable[nn.Parameter] = ()) -> list[ParameterGroup]:
    """The usual two groups: matrices decay; vectors, embeddings and `undecayed` parameters do not."""
    spared = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)} | {id(p) for p in undecayed}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in module.parameters():
        (kept if parameter.ndim < 2 or id(parameter) in spared else decayed).append(parameter)
    groups = [
        ParameterGroup(name="matrices", parameters=decayed),
        ParameterGroup(name="vectors", parameters=kept, weight_decay=False),
    ]
    return [group for group in groups if group.parameters]


@dataclass(frozen=True, kw_only=True)
class HFImport:
    """How Hugging Face checkpoints of one `model_type` become ours.

    Attributes:
        config: makes our config from the parsed config.json. Raises ConfigError naming what is not supported.
        weights: renames (and fuses or splits) the checkpoint's tensors into our state dict. Raises
            CheckpointError for missing, extra or misshapen tensors, by name.
    """

    config: Callable[[Mapping[str, Any]], Any]
    weights: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a trained model of another architecture becomes one of ours, to be trained further.

    Attributes:
        config: keyword arguments of our config, from the source's config.
        weights: our state dict, from our config and the source's state dict.
    """

    config: Callable[[Any], Mapping[str, Any]]
    weights: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What an architecture's file exports as `ARCHITECTURE`.

    Attributes:
        config: a frozen keyword-only dataclass whose first field is `vocab_size`; it refuses impossible values.
        build: makes the model from a config, drawing initial weights from the generator given (on the meta device:
            none is needed).
        traits: what the model of a config promises.
        paper: the source, as "authors year, title, arXiv number".
        candidates: configs from small to large for a vocabulary; a size is solved by picking the nearest.
        published: named configurations of the papers, as the keyword arguments of `config`.
        hf: imports of Hugging Face checkpoints, by their `model_type`.
        conversions: conversions of trained models, by the name of their architecture.
        paper_flops: the rule by which the paper's own cost table counts, made from a config, where that is not the
            rule of the model's `flops`; it weighs the masked half of attention as it is told to.
    """

    config: type[Any]
    build: Callable[[Any, Generator | None], SequenceModel]
    traits: Callable[[Any], Traits]
    paper: str
    candidates: Callable[[int], Iterable[Any]] = field(default=lambda _vocab_size: ())
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hf: Mapping[str, HFImport] = field(default_factory=dict)
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    paper_flops: Callable[[Any], FlopFormulas] | None = None


def parameters_of(phase: Phase) -> Iterator[nn.Parameter]:
    """All parameters that a phase trains."""
    for group in phase.groups:
        yield from group.parameters
