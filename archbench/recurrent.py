"""Models whose every block is one recurrent mixer with a convolution in front: what Mamba and Mamba-2 share.

`RecurrentModel` is the backbone, pre-norm blocks u' = u + mixer(N(u)) between an embedding and an unembedding, around
any `RecurrentMixer`; it decodes through the recurrent ladder (`ops/recurrent`) where that is quicker than the modules.

Letters: b batch, t time, d width, w convolution width, v vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.layers import Embedding, Linear, RMSNorm, Stack
from archbench.model import AutoregressiveModel, AutoregressiveState, Emission
from archbench.ops.decode_ladder import unchanged
from archbench.ops.recurrent import Stepper, steppers
from archbench.ops.recurrent_weights import MixerWeights, RecurrentWeights, States
from archbench.sampling import Sampling


class LayerState(NamedTuple):
    """The last w - 1 inputs of the convolution and the recurrent state, both fp32."""

    window: Float[Tensor, "b w _"]
    ssm: Float[Tensor, "b ..."]


class RecurrentMixer(nn.Module, ABC):
    """What a block does with the normed stream. A = -exp(A_log) are the decays."""

    A_log: nn.Parameter

    @abstractmethod
    def initial_state(self, batch_size: int) -> LayerState:
        """The state before anything was read."""

    @abstractmethod
    def forward(self, u: Float[Tensor, "b t d"], state: LayerState) -> tuple[Float[Tensor, "b t d"], LayerState]:
        """Any number of tokens, from any state. Gives up `state`."""

    @abstractmethod
    def flops(self, n: int) -> int:
        """FLOPs of n tokens."""

    @abstractmethod
    def weights(self, norm: Float[Tensor, " d"]) -> MixerWeights:
        """What a decode step needs of a block with this norm in front."""


class RecurrentBlock(nn.Module):
    def __init__(self, config: Any, mixer: RecurrentMixer) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer

    def forward(self, u: Float[Tensor, "b t d"], state: LayerState) -> tuple[Float[Tensor, "b t d"], LayerState]:
        mixed, state = self.mixer(self.norm(u), state)
        return u + mixed, state


class RecurrentModel(AutoregressiveModel):
    """State: a convolution window and a recurrent state a layer; constant however much was read."""

    def __init__(
        self,
        config: Any,
        mixer: Callable[[Any, Generator | None], RecurrentMixer],
        generator: Generator | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.boundary = config.boundary
        self.embedding = Embedding(config.vocab_size, config.d_model, std=0.02, generator=generator)
        self.blocks: Stack[RecurrentBlock] = Stack(
            RecurrentBlock(config, mixer(config, generator)) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = Linear(config.d_model, config.vocab_size, std=0.02, generator=generator)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight
        self.steppers = steppers()
        self._told = all(_as_told(type(block.mixer)) for block in self.blocks)

    @abstractmethod
    def recurrent_weights(self, mixers: list[MixerWeights]) -> RecurrentWeights:
        """What decode steps need of the model, given that of its blocks."""

    def initial_layers(self, batch_size: int) -> tuple[LayerState, ...]:
        return tuple(block.mixer.initial_state(batch_size) for block in self.blocks)

    def hidden(
        self, tokens: Int[Tensor, "b t"], layers: tuple[LayerState, ...]
    ) -> tuple[Float[Tensor, "b t d"], tuple[LayerState, ...]]:
        stepper = self._stepper(tokens.shape[1], layers)
        if stepper is not None:
            hidden, after = stepper.hidden(tokens, layers)
            return hidden, _layer_states(after, layers)
        u = self.embedding(tokens)
        states = []
        for block, state in zip(self.blocks, layers, strict=True):
            u, state = block(u, state)
            states.append(state)
        return self.norm(u), tuple(states)

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        return F.linear(hidden, self.unembedding.weight)

    def predict(
        self, tokens: Int[Tensor, "b t"], layers: tuple[LayerState, ...]
    ) -> tuple[Float[Tensor, "b t v"], tuple[LayerState, ...]]:
        stepper = self._stepper(tokens.shape[1], layers)
        if stepper is None:
            return super().predict(tokens, layers)
        logits, after = stepper.predict(tokens, layers)
        return logits, _layer_states(after, layers)

    def write(
        self,
        pending: Int[Tensor, " b"],
        layers: tuple[LayerState, ...],
        sampling: Sampling,
        generator: Generator | None,
    ) -> tuple[Int[Tensor, " b"], tuple[LayerState, ...]]:
        stepper = self._stepper(1, layers) if sampling.greedy else None
        if stepper is None:
            return super().write(pending, layers, sampling, generator)
        tokens, after = stepper.write(pending, layers, 1)
        return tokens.view(-1), _layer_states(after, layers)

    def decode_steps(
        self, state: AutoregressiveState, n: int, sampling: Sampling, generator: Generator | None
    ) -> Emission:
        stepper = self._stepper(1, state.layers) if sampling.greedy else None
        if stepper is None:
            return super().decode_steps(state, n, sampling, generator)
        n = min(n, stepper.most_at_once)
        tokens, after = stepper.write(state.pending, state.layers, n)
        pending = tokens[:, -1].clone()
        layers = _layer_states(after, state.layers)
        return Emission(tokens, torch.full_like(pending, n), AutoregressiveState(pending, layers))

    def _stepper(self, n: int, layers: tuple[LayerState, ...]) -> Stepper | None:
        """What reads n new tokens of every row quicker than the modules do, if anything."""
        if n == 0 or not self._told or not unchanged(self, RecurrentModel, "hidden", "logits"):
            return None
        stepper = self.steppers.serving(self, n, self._weights, state=layers)
        several = n > 1 and len(layers[0].window) > 1
        return None if stepper is None or (several and not stepper.rows_together) else stepper

    def _weights(self) -> RecurrentWeights:
        return self.recurrent_weights([block.mixer.weights(block.norm.weight) for block in self.blocks])

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        del context, causal  # a recurrence reads the past from its state
        return float(sum(block.mixer.flops(n) for block in self.blocks))

    def logits_flops(self) -> float:
        return float(self.unembedding.flops(1))


def _as_told(kind: type) -> bool:
    """Whether what a kind of mixer computes and the weights it tells of are of one class: a subclass that computes
    otherwise is asked itself."""
    places = [next(owner for owner in kind.__mro__ if name in vars(owner)) for name in ("forward", "weights")]
    return places[0] is places[1]


def _layer_states(after: States, before: tuple[LayerState, ...]) -> tuple[LayerState, ...]:
    """What a stepper returns as states: those it was given, where it wrote in place."""
    return before if after is before else tuple([LayerState(window, ssm) for window, ssm in after])
