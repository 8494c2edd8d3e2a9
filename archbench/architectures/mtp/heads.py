"""Heads 2..n in three forms, and what they remember between decode steps.

    replicated   logits_i = U_i N(z)                                     n unembeddings, nothing else
    layer        logits_i = U N(block_i(z))                              a block a head, norm and U shared
    sequential   h_i = block_i(M_i [N(h_{i-1}); N(E x_{+i-1})])          h_1 = z; logits_i = U N(h_i)

z is the trunk's output before the final norm N; x_{+i} the token i positions on. The first two see nothing of the
tokens between; a sequential head reads them, in training from the text and in drafting from the drafts before its own.

When the text up to token t is known, the trunk has read positions 0..t-1, and so has a `layer` head: its keys and
values are made for all of them, the rest of the block only where a draft is wanted. Sequential head i can have read
the positions up to t - i + 1 only, since it needs the token i - 1 positions on. Its cache is therefore shifted: entry s
belongs to position s - i + 2, read together with token s + 1. So every head reads as many entries as the trunk does,
with the same tokens; the first i - 2 entries are void; and rotary angles, which depend on differences alone, may be
those of the entries.

Sources: Gloeckle et al. 2024, section 2 and appendix B; DeepSeek-V3 (2412.19437), section 2.2, with the
order [h; E x] of the merged halves as printed there.

Letters: b batch, t positions, d width, v vocabulary, n vectors remembered.
"""

# ruff: noqa: ARG002 (one interface of three forms: each leaves some arguments aside)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from archbench.architectures.mtp.config import MTPConfig
from archbench.architectures.mtp.rows import Place, Rows, fill, fill_flops, place, read_block
from archbench.architectures.transformer import Block
from archbench.layers import Embedding, KVCache, Linear, RMSNorm, Stack, empty_cache, rotary_angles

Pick: TypeAlias = Callable[[Float[Tensor, "b v"]], Int[Tensor, " b"]]
"""Chooses a draft of each row from the logits of its head."""


class Path(NamedTuple):
    """The parts of the next-token path that heads share. `top` is head 1 where it is a block of its own."""

    embedding: Embedding
    top: Block | None
    norm: RMSNorm
    unembedding: Linear

    def logits(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        return self.unembedding(self.norm(x))


class Memory(NamedTuple):
    """What heads 2..n remember of a text: their caches, and the vectors at the last position they draft from."""

    caches: tuple[KVCache, ...]
    last: Float[Tensor, "b n d"]


class ExtraHeads(nn.Module, ABC):
    """Heads 2..n. `n_drafting` of them are used in decoding; the others only train."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config = config
        self.n_drafting = config.block - 1

    @abstractmethod
    def streams(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Sequence[Int[Tensor, "b t"]], n: int
    ) -> list[Float[Tensor, "b t d"]]:
        """What each of the first n heads makes its logits from, head 1 first. `following[i]` are the tokens i + 1
        positions on; as many as heads 2..n read."""

    @abstractmethod
    def logits(self, path: Path, head: int, stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Logits of a head (1..n) from its stream."""

    @abstractmethod
    def own(self, head: int) -> Iterable[nn.Parameter]:
        """The parameters that `logits` of a head (2..n) uses besides the path's."""

    def initial(self, batch_size: int, weight: Tensor) -> Memory:
        """The memory of heads that have read nothing; device and type are those of `weight`."""
        config = self.config
        make = partial(empty_cache, batch_size, config.kv_heads, config.head_dim)
        caches = tuple(make(device=weight.device, dtype=weight.dtype) for _ in range(self.n_caches))
        return Memory(caches, weight.new_zeros(batch_size, self.n_remembered, config.d_model))

    @property
    @abstractmethod
    def n_caches(self) -> int: ...

    @property
    def n_remembered(self) -> int:
        return min(1, self.n_drafting)

    @abstractmethod
    def read(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Int[Tensor, "b t"], memory: Memory, where: Place
    ) -> tuple[tuple[KVCache, ...], Float[Tensor, "b t n d"]]:
        """Reads t new positions, each with the token after it. Gives up `memory`. Returns the caches and, for each
        position, what `Memory.last` is if the text ends there."""

    @abstractmethod
    def draft(self, path: Path, memory: Memory, rows: Rows, n: int, pick: Pick) -> Int[Tensor, "b n"]:
        """Guesses at the n tokens after the next one. Entries of the caches beyond `rows` may be overwritten."""

    @abstractmethod
    def training_flops(self, head: int, context: int, causal: float) -> float:
        """Forward FLOPs of a head (2..n) over a window, its logits left out."""

    @abstractmethod
    def read_flops(self, n: int, context: int, causal: float) -> float:
        """FLOPs of `read` over n positions after `context` ones."""

    @abstractmethod
    def draft_flops(self, n: int, context: int) -> float:
        """FLOPs of `draft` without the logits."""


class Replicated(ExtraHeads):
    """An unembedding a head."""

    n_caches = 0

    def __init__(self, config: MTPConfig, generator: Generator | None) -> None:
        super().__init__(config)
        std = 0.3 * config.d_model**-0.5
        self.heads: Stack[Linear] = Stack(
            Linear(config.d_model, config.vocab_size, std=std, generator=generator) for _ in range(config.n_future - 1)
        )

    def streams(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Sequence[Int[Tensor, "b t"]], n: int
    ) -> list[Float[Tensor, "b t d"]]:
        return [path.norm(trunk)] * n

    def logits(self, path: Path, head: int, stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        unembedding = path.unembedding if head == 1 else list(self.heads)[head - 2]
        return unembedding(stream)

    def own(self, head: int) -> Iterable[nn.Parameter]:
        return list(self.heads)[head - 2].parameters()

    def read(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Int[Tensor, "b t"], memory: Memory, where: Place
    ) -> tuple[tuple[KVCache, ...], Float[Tensor, "b t n d"]]:
        return (), trunk[:, :, None]

    def draft(self, path: Path, memory: Memory, rows: Rows, n: int, pick: Pick) -> Int[Tensor, "b n"]:
        stream = path.norm(memory.last[:, 0])
        return torch.stack([pick(head(stream)) for head in islice(self.heads, n)], dim=1)

    def training_flops(self, head: int, context: int, causal: float) -> float:
        return 0.0

    def read_flops(self, n: int, context: int, causal: float) -> float:
        return 0.0

    def draft_flops(self, n: int, context: int) -> float:
        return 0.0


class Layers(ExtraHeads):
    """A block a head, all on the trunk."""

    def __init__(self, config: MTPConfig, generator: Generator | None) -> None:
        super().__init__(config)
        self.heads: Stack[Block] = Stack(Block(config, generator) for _ in range(config.n_future - 1))

    @property
    def n_caches(self) -> int:
        return self.n_drafting

    def streams(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Sequence[Int[Tensor, "b t"]], n: int
    ) -> list[Float[Tensor, "b t d"]]:
        return [trunk] * n

    def logits(self, path: Path, head: int, stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        block = path.top if head == 1 else list(self.heads)[head - 2]
        assert block is not None
        return path.logits(_whole(self.config, block, stream))

    def own(self, head: int) -> Iterable[nn.Parameter]:
        return list(self.heads)[head - 2].parameters()

    def read(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Int[Tensor, "b t"], memory: Memory, where: Place
    ) -> tuple[tuple[KVCache, ...], Float[Tensor, "b t n d"]]:
        pairs = zip(self.heads, memory.caches, strict=False)
        return tuple(fill(head, trunk, cache, where) for head, cache in pairs), trunk[:, :, None]

    def draft(self, path: Path, memory: Memory, rows: Rows, n: int, pick: Pick) -> Int[Tensor, "b n"]:
        # The last position once more, now with its query: its keys and values are written over by the same ones.
        where = place(self.config, rows.plus(-1), len(memory.last), 1, memory.last.device)
        tokens = []
        for head, cache in zip(islice(self.heads, n), memory.caches, strict=False):
            x, _ = read_block(head, memory.last, cache, where)
            tokens.append(pick(path.logits(x[:, 0])))
        return torch.stack(tokens, dim=1)

    def training_flops(self, head: int, context: int, causal: float) -> float:
        return list(self.heads)[head - 2].flops(context, 0, causal)

    def read_flops(self, n: int, context: int, causal: float) -> float:
        return float(sum(fill_flops(head, n) for head in islice(self.heads, self.n_drafting)))

    def draft_flops(self, n: int, context: int) -> float:
        return sum(head.flops(1, context - 1, 1.0) for head in islice(self.heads, n))


class Module(nn.Module):
    """One link of the chain: the vector below and the token ahead become one, and a block reads it."""

    def __init__(self, config: MTPConfig, generator: Generator | None) -> None:
        super().__init__()
        self.norm_hidden = RMSNorm(config.d_model, config.norm_eps)
        self.norm_token = RMSNorm(config.d_model, config.norm_eps)
        self.merge = Linear(2 * config.d_model, config.d_model, generator=generator)
        self.block = Block(config, generator)

    def merged(self, hidden: Float[Tensor, "b t d"], token: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.merge(torch.cat([self.norm_hidden(hidden), self.norm_token(token)], dim=-1))

    def flops(self, n: int, context: int, causal: float) -> float:
        return self.merge.flops(n) + self.block.flops(n, context, causal)


class Sequential(ExtraHeads):
    """A chain of blocks, each also reading the token before the one it predicts."""

    def __init__(self, config: MTPConfig, generator: Generator | None) -> None:
        super().__init__(config)
        self.heads: Stack[Module] = Stack(Module(config, generator) for _ in range(config.n_future - 1))

    @property
    def n_caches(self) -> int:
        return self.n_drafting

    @property
    def n_remembered(self) -> int:
        return self.n_drafting

    def streams(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Sequence[Int[Tensor, "b t"]], n: int
    ) -> list[Float[Tensor, "b t d"]]:
        streams = [trunk]
        for head, tokens in zip(islice(self.heads, n - 1), following, strict=False):
            streams.append(_whole(self.config, head.block, head.merged(streams[-1], path.embedding(tokens))))
        return streams

    def logits(self, path: Path, head: int, stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        return path.logits(stream)

    def own(self, head: int) -> Iterable[nn.Parameter]:
        return ()

    def read(
        self, path: Path, trunk: Float[Tensor, "b t d"], following: Int[Tensor, "b t"], memory: Memory, where: Place
    ) -> tuple[tuple[KVCache, ...], Float[Tensor, "b t n d"]]:
        b, t, _ = trunk.shape
        tokens, below = path.embedding(following), trunk
        caches, outputs = [], []
        for i, (head, cache) in enumerate(zip(self.heads, memory.caches, strict=False)):
            shifted = where if i == 0 else place(self.config, where.rows, b, t, trunk.device, first=i)
            out, cache = read_block(head.block, head.merged(below, tokens), cache, shifted)
            caches.append(cache)
            outputs.append(out)
            below = torch.cat([memory.last[:, i : i + 1], out[:, :-1]], dim=1)
        return tuple(caches), torch.stack(outputs, dim=2)

    def draft(self, path: Path, memory: Memory, rows: Rows, n: int, pick: Pick) -> Int[Tensor, "b n"]:
        last, device = memory.last, memory.last.device
        tokens = pick(path.logits(last[:, 0]))[:, None]
        below = last[:, :1]  # of the head before: its last entry, and those that rest on drafts
        for i in range(1, n):
            where = place(self.config, rows, len(last), i, device, first=i)
            head = list(self.heads)[i]
            x, _ = read_block(head.block, head.merged(below, path.embedding(tokens)), memory.caches[i], where)
            tokens = torch.cat([tokens, pick(path.logits(x[:, -1]))[:, None]], dim=1)
            below = torch.cat([last[:, i : i + 1], x], dim=1)
        return tokens

    def training_flops(self, head: int, context: int, causal: float) -> float:
        return list(self.heads)[head - 2].flops(context, 0, causal)

    def read_flops(self, n: int, context: int, causal: float) -> float:
        return sum(head.flops(n, context, causal) for head in islice(self.heads, self.n_drafting))

    def draft_flops(self, n: int, context: int) -> float:
        return sum(head.flops(i, context, 0.5) for i, head in enumerate(islice(self.heads, n)) if i)


def _whole(config: MTPConfig, block: Block, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    """The block over whole windows, from nothing."""
    angles = rotary_angles(0, x.shape[1], config.head_dim, config.rope_theta, x.device)
    cache = empty_cache(x.shape[0], config.kv_heads, config.head_dim, device=x.device, dtype=x.dtype)
    return block(x, angles, cache)[0]


KINDS: dict[str, Callable[[MTPConfig, Generator | None], ExtraHeads]] = {
    "replicated": Replicated,
    "layer": Layers,
    "sequential": Sequential,
}
