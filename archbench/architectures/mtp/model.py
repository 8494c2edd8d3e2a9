"""The model: one trunk, n heads, and decode steps that draft, verify and keep.

The state knows a text up to its pending token, which the layers have not seen. A decode step

    drafts   k - 1 tokens after the next one, by heads 2..k at the last position read
    reads    pending and drafts as one block of k tokens, through trunk and head 1
    writes   the tokens that hold (see `verify`), 1 to k in each row
    rolls    the caches back to what was kept, by setting lengths; the last token written is pending now

With k = 1 (`decoding: next_token`) no extra head is evaluated and no cache of theirs exists: that is the Transformer of
trunk and head 1, bit for bit.

Letters: b batch, t time, d width, v vocabulary, k tokens of a block, n heads.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.architectures.mtp.config import MTPConfig
from archbench.architectures.mtp.flops import MTPFlops
from archbench.architectures.mtp.heads import KINDS, Layers, Memory, Path, Replicated
from archbench.architectures.mtp.loss import Head, weighted_sum
from archbench.architectures.mtp.rows import Place, Rows, place, read_block
from archbench.architectures.mtp.verify import Speculation
from archbench.architectures.transformer import Block, decoder_weights
from archbench.errors import ContextOverflow
from archbench.layers import Embedding, KVCache, Linear, RMSNorm, Stack, empty_cache, rotary_angles
from archbench.model import (
    AutoregressiveModel,
    Batch,
    Emission,
    FlopFormulas,
    Likelihood,
    Loss,
    ParameterGroup,
    Phase,
    SequenceModel,
    Speculative,
    decay_groups,
    exact_rows,
)
from archbench.ops.decode import Decoder, decoders
from archbench.ops.decode_weights import DecoderWeights
from archbench.sampling import Sampling


class MTPState(NamedTuple):
    """`pending` is the last token of each row, `layers` the caches of the next-token path, `memory` what heads 2..n
    remember; `rows` tells how far each row has read."""

    pending: Int[Tensor, " b"]
    layers: tuple[KVCache, ...]
    memory: Memory
    rows: Rows


class _Read(NamedTuple):
    """One pass over new tokens: vectors for the next-token logits, the trunk's output, caches, and where it was."""

    hidden: Float[Tensor, "b t d"]
    trunk: Float[Tensor, "b t d"]
    layers: tuple[KVCache, ...]
    where: Place


class MTP(SequenceModel, Likelihood, Speculative):
    """State: key-value caches of the next-token path and of the heads that draft; it grows with every token read.

    Tensors of the next-token path have the Transformer's names, the other heads' begin with `extra_heads`.
    """

    prefill_chunk = AutoregressiveModel.prefill_chunk

    def __init__(self, config: MTPConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        # As the Transformer draws them, and in its order: the same seed gives the same next-token path.
        self.embedding = Embedding(config.vocab_size, config.d_model, std=0.6, generator=generator)
        self.blocks: Stack[Block] = Stack(Block(config, generator) for _ in range(config.n_path_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = Linear(
            config.d_model, config.vocab_size, std=0.3 * config.d_model**-0.5, generator=generator
        )
        self.extra_heads = KINDS[config.heads](config, generator)
        self.decoders = decoders()

    @property
    def path(self) -> Path:
        """The parts of the next-token path that the other heads share."""
        blocks = list(self.blocks)
        top = blocks[-1] if self.config.n_trunk_layers < len(blocks) else None
        return Path(self.embedding, top, self.norm, self.unembedding)

    def phases(self) -> list[Phase]:
        config = self.config
        if config.training == "joint":
            return [Phase(name="joint", share=1.0, groups=self._groups(self), loss=self.joint_loss)]
        path = nn.ModuleList([self.embedding, self.blocks, self.norm, self.unembedding])
        share = config.trunk_share
        return [
            Phase(name="next_token", share=share, groups=self._groups(path), loss=self.next_token_loss),
            Phase(name="heads", share=1 - share, groups=self._groups(self.extra_heads), loss=self.heads_loss),
        ]

    def _groups(self, part: nn.Module) -> list[ParameterGroup]:
        # Weight decay leaves further unembeddings alone. Source: the convention of the baseline's specification.
        replicated = self.extra_heads.parameters() if self.config.heads == "replicated" else ()
        return decay_groups(part, replicated)

    def joint_loss(self, batch: Batch) -> Loss:
        """Weighted sum over the active heads of their mean cross-entropies, in nats; a part for each head."""
        return self._loss(batch, 1, self.config.active_heads(batch.progress))

    def next_token_loss(self, batch: Batch) -> Loss:
        """Head 1's cross-entropy alone, in nats."""
        return self._loss(batch, 1, 1)

    def heads_loss(self, batch: Batch) -> Loss:
        """Weighted sum of the losses of heads 2..n, with the trunk as it is."""
        return self._loss(batch, 2, self.config.n_future)

    def _loss(self, batch: Batch, first: int, last: int) -> Loss:
        """Loss of heads first..last. Every head sees the same inputs and as many targets."""
        n = self.config.n_future
        tokens = batch.tokens
        t = tokens.shape[1] - n
        following = [tokens[:, i : i + t] for i in range(1, n + 1)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and first == 1):
            trunk = self._trunk(tokens[:, :t])
        path, weights = self.path, self.config.loss_weights()
        streams = self.extra_heads.streams(path, trunk, following, last)
        distinct = list({id(stream): stream for stream in streams}.values())
        index = {id(stream): i for i, stream in enumerate(distinct)}
        heads = [
            Head(
                stream=index[id(streams[i - 1])],
                logits=partial(self.extra_heads.logits, path, i),
                targets=following[i - 1],
                weight=weights[i - 1],
                counts=None if batch.weights is None else batch.weights[:, i : i + t],
            )
            for i in range(first, last + 1)
        ]
        naive = self.config.backward == "naive"
        value, losses = weighted_sum(heads, distinct, self._loss_parameters(first, last), naive=naive)
        parts = {f"head_{i}": loss for i, loss in enumerate(losses, start=first)}
        if batch.weights is not None:
            with torch.no_grad():
                logits = self.extra_heads.logits(path, 1, streams[0])
            parts["exact"] = exact_rows(logits, following[0], batch.weights[:, 1 : 1 + t])
        return Loss(value, parts)

    def _loss_parameters(self, first: int, last: int) -> list[nn.Parameter]:
        """The parameters between streams and logits of these heads."""
        top = self.path.top
        found = [*self.norm.parameters(), *self.unembedding.parameters(), *(top.parameters() if top else ())]
        for head in range(max(2, first), last + 1):
            found += self.extra_heads.own(head)
        return found

    def _trunk(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The trunk's output over whole windows, before the final norm."""
        config, x = self.config, self.embedding(tokens)
        angles = rotary_angles(0, tokens.shape[1], config.head_dim, config.rope_theta, x.device)
        for block, cache in zip(self.blocks, self._empty(len(x))[: config.n_trunk_layers], strict=False):
            x, _ = block(x, angles, cache)
        return x

    def all_logits(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b s n v"]:
        """Logits of every head at all positions but the last n - 1: [:, i, j] of the token at i + 1 + j. For looking
        at; training never holds them together."""
        n = self.config.n_future
        t = tokens.shape[1] - n + 1
        following = [tokens[:, i : i + t] for i in range(1, n)]
        streams = self.extra_heads.streams(self.path, self._trunk(tokens[:, :t]), following, n)
        logits = [self.extra_heads.logits(self.path, i, stream) for i, stream in enumerate(streams, start=1)]
        return torch.stack(logits, dim=2)

    def _empty(self, batch_size: int) -> tuple[KVCache, ...]:
        weight = self.embedding.weight
        make = partial(empty_cache, batch_size, self.config.kv_heads, self.config.head_dim)
        return tuple(make(device=weight.device, dtype=weight.dtype) for _ in self.blocks)

    def initial_state(self, batch_size: int) -> MTPState:
        weight = self.embedding.weight
        pending = torch.full((batch_size,), self.config.boundary, dtype=torch.long, device=weight.device)
        memory = self.extra_heads.initial(batch_size, weight)
        return MTPState(pending, self._empty(batch_size), memory, Rows(0, None))

    def prefill(self, tokens: Int[Tensor, "b t"], state: MTPState) -> MTPState:
        for chunk in tokens.split(self.prefill_chunk, dim=1) if tokens.shape[1] else ():
            _, state = self._read_text(chunk, state, logits=False)
        return state

    def score(self, tokens: Int[Tensor, "b t"], state: MTPState) -> tuple[Float[Tensor, "b t v"], MTPState]:
        if not tokens.shape[1]:
            return torch.zeros(*tokens.shape, self.vocab_size, device=tokens.device), state
        logits, state = self._read_text(tokens, state, logits=True)
        assert logits is not None
        return logits.float().log_softmax(dim=-1), state

    def decode_step(self, state: MTPState, sampling: Sampling, generator: Generator | None) -> Emission:
        rows = state.rows.settled()
        k = self._block_after(rows)
        decoder = self._decoder(k, rows, state)
        speculation = Speculation(sampling, generator, self.config.draft_policy)
        if decoder is not None:
            return self._quick_step(decoder, state, rows, k, speculation)
        inputs = state.pending[:, None]
        if k > 1:
            drafts = self.extra_heads.draft(self.path, state.memory, rows, k - 1, speculation.pick)
            inputs = torch.cat([inputs, drafts], dim=1)
        read = self._pass(inputs, rows, state.layers)
        logits = self.unembedding(read.hidden.flatten(0, 1)).view(len(inputs), k, -1)
        tokens, counts = speculation.verify(logits, inputs[:, 1:])
        row = torch.arange(len(counts), device=counts.device)
        caches, ends = self._read_heads(read, tokens, state.memory)
        memory = Memory(caches, ends[row, counts - 1])
        pending = tokens[row, counts - 1]
        return Emission(tokens, counts, MTPState(pending, read.layers, memory, rows.plus_each(counts, k)))

    def _quick_step(self, decoder: Decoder, state: MTPState, rows: Rows, k: int, speculation: Speculation) -> Emission:
        """A step whose products a decoder computes."""
        self._check_room(rows.length + k)
        caches, last = (*state.layers, *state.memory.caches), state.memory.last
        if speculation.sampling.greedy and k > 1:
            block = decoder.speculate(state.pending, last[:, 0], k, caches, rows.length, rows.behind)
            tokens, counts, pending, ends, caches = block
            last = ends[:, None].to(last.dtype)
        elif speculation.sampling.greedy and self.config.block == 1 and rows.behind is None:
            tokens, caches = decoder.write(state.pending, caches, rows.length, 1)
            pending = tokens.view(-1)
            counts = torch.ones_like(pending)
        else:
            inputs = state.pending[:, None]
            if k > 1:
                guesses = decoder.draft(last[:, 0], k - 1, caches, rows.length, rows.behind).unbind(dim=1)
                inputs = torch.cat([inputs, *(speculation.pick(guess)[:, None] for guess in guesses)], dim=1)
            stream, logits, caches = decoder.read(inputs, caches, rows.length, behind=rows.behind)
            assert logits is not None
            tokens, counts = speculation.verify(logits, inputs[:, 1:])
            row = torch.arange(len(counts))
            pending = tokens[row, counts - 1]
            if self.config.block > 1:
                last = stream[row, counts - 1][:, None].to(last.dtype)
        layers, memory = self._parted(caches, last)
        return Emission(tokens, counts, MTPState(pending, layers, memory, rows.plus_each(counts, k)))

    def _parted(self, caches: tuple[KVCache, ...], last: Tensor) -> tuple[tuple[KVCache, ...], Memory]:
        """The caches of the next-token path, and what the heads remember."""
        n = len(self.blocks)
        return caches[:n], Memory(caches[n:], last)

    def plain(self) -> MTP:
        """The Transformer of trunk and head 1: `decoding: next_token` on the same weights."""
        with torch.device("meta"):
            plain = MTP(replace(self.config, decoding="next_token"))
        plain.load_state_dict(self.state_dict(), assign=True)
        return plain.train(self.training)

    def _block_after(self, rows: Rows) -> int:
        """Tokens of the next block: fewer where the context limit is near, one where nothing was read to draft from."""
        limit = self.config.max_context
        room = self.config.block if limit is None else limit - rows.length
        return 1 if rows.length == 0 else max(1, min(self.config.block, room))

    def _read_text(
        self, tokens: Int[Tensor, "b t"], state: MTPState, *, logits: bool
    ) -> tuple[Float[Tensor, "b t v"] | None, MTPState]:
        """Reads given tokens; logits of each where wanted. Gives up `state`."""
        rows, t = state.rows.settled(), tokens.shape[1]
        inputs = torch.cat([state.pending[:, None], tokens[:, :-1]], dim=1)
        decoder = self._decoder(t, rows, state)
        if decoder is not None:
            self._check_room(rows.length + t)
            caches = (*state.layers, *state.memory.caches)
            stream, found, caches = decoder.read(inputs, caches, rows.length, behind=rows.behind, logits=logits)
            last = state.memory.last
            if self.config.block > 1:
                last = stream[:, -1:].to(last.dtype).clone()
            layers, memory = self._parted(caches, last)
        else:
            read = self._pass(inputs, rows, state.layers)
            found = self.unembedding(read.hidden) if logits else None
            caches, ends = self._read_heads(read, tokens, state.memory)
            memory, layers = Memory(caches, ends[:, -1].clone()), read.layers
        return found, MTPState(tokens[:, -1].clone(), layers, memory, rows.plus(t))

    def _decoder(self, n: int, rows: Rows, state: MTPState) -> Decoder | None:
        """What reads n new tokens of every row quicker than the modules do, if anything."""
        hindrance = ""
        if self.config.heads == "sequential" and self.config.block > 1:
            hindrance = "heads of type sequential draft through their modules"
        caches = (*state.layers, *state.memory.caches)
        decoder = self.decoders.serving(self, n, self._weights, hindrance, caches)
        return None if decoder is None or (rows.behind is not None and not decoder.ragged) else decoder

    def _weights(self) -> DecoderWeights:
        config, heads = self.config, self.extra_heads
        make = partial(decoder_weights, config, self.embedding, self.blocks, self.norm, self.unembedding)
        if config.block == 1:
            return make()
        if isinstance(heads, Replicated):
            return make(drafts=heads.heads)
        assert isinstance(heads, Layers)
        return make(heads=list(heads.heads)[: config.block - 1], n_trunk=config.n_trunk_layers)

    def _check_room(self, end: int) -> None:
        limit = self.config.max_context
        if limit is not None and end > limit:
            raise ContextOverflow(
                f"mtp.max_context: {end} tokens do not fit into {limit}; raise max_context or feed fewer"
            )

    def _pass(self, tokens: Int[Tensor, "b t"], rows: Rows, layers: tuple[KVCache, ...]) -> _Read:
        """Trunk and head 1 over new tokens of every row. Gives up `layers`."""
        config, (b, t) = self.config, tokens.shape
        self._check_room(rows.length + t)
        where = place(config, rows, b, t, tokens.device)
        x = self.embedding(tokens)
        trunk, caches = x, []
        for i, (block, cache) in enumerate(zip(self.blocks, layers, strict=True), start=1):
            x, cache = read_block(block, x, cache, where)
            trunk = x if i == config.n_trunk_layers else trunk
            caches.append(cache)
        return _Read(self.norm(x), trunk, tuple(caches), where)

    def _read_heads(
        self, read: _Read, following: Int[Tensor, "b t"], memory: Memory
    ) -> tuple[tuple[KVCache, ...], Float[Tensor, "b t n d"]]:
        """What heads 2..n make of a pass, now that the token after each position is known. Gives up `memory`."""
        if self.config.block == 1:
            b, t = following.shape
            return memory.caches, memory.last[:, None].expand(b, t, *memory.last.shape[1:])
        return self.extra_heads.read(self.path, read.trunk, following, memory, read.where)

    def lasting(self, state: MTPState) -> tuple[Any, ...]:
        caches = (*state.layers, *state.memory.caches)
        return (*(cache.valid() for cache in caches), state.memory.last)

    def flops(self) -> FlopFormulas:
        return MTPFlops(self.config, list(self.blocks), self.unembedding, self.extra_heads)
