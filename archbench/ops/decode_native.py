"""Whole-model decode steps of attention models, level `native`: binds csrc/decode.c. fp32 or bf16 weights on CPU.

A `NativeDecoder` holds a model's matrices packed in panels and everything else the C code asks for; a call adds new
tokens to caches that belong to the caller. One thread: a step is bound by reading the weights once. Results for a
position do not depend, to the last bit, on how many positions or rows a call reads.

Letters: b rows, t new tokens, d width, v vocabulary, k tokens of a block with k - 1 drafts.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from archbench.layers import KVCache, filled
from archbench.ops import native
from archbench.ops.decode_weights import AngleTable, BlockWeights, DecoderWeights, LastCaches, Read, Written
from archbench.ops.panels import Packed, Panels


class _Block(ctypes.Structure):
    """`struct block` of decode.c."""

    _fields_ = (
        *((name, Panels) for name in ("qkv", "kv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm_attention", "norm_ffn")),
    )


class _Arguments(ctypes.Structure):
    """`struct decode_args` of decode.c, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ffn", "n_vocab")
        ),
        ("eps", ctypes.c_double),
        ("embedding", ctypes.c_void_p),
        ("half_embedding", ctypes.c_int64),
        ("blocks", ctypes.POINTER(_Block)),
        ("norm", ctypes.c_void_p),
        ("unembedding", Panels),
        ("drafts", Panels),
        ("heads", ctypes.POINTER(_Block)),
        *((name, ctypes.c_int64) for name in ("n_heads_kept", "n_trunk")),
        ("n_rows", ctypes.c_int64),
        ("n_new", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("behind", "cos", "sin")),
        ("first_angle", ctypes.c_int64),
        ("caches", ctypes.POINTER(ctypes.c_void_p)),
        ("capacity", ctypes.c_int64),
        ("half_caches", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("stream", "trunk", "logits", "best")),
        ("n_drafts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("last", "draft_logits")),
        *((name, ctypes.c_void_p) for name in ("block_tokens", "counts", "pending", "next_last")),
    )


@functools.cache
def _kernels(library: ctypes.CDLL) -> tuple[Callable[..., int], ...]:
    """(read, draft, speculate, write)."""
    names = ("read", "draft", "speculate", "write")
    found = tuple(getattr(library, f"archbench_decode_{name}") for name in names)
    for kernel in found:
        kernel.argtypes = (ctypes.c_void_p,)
        kernel.restype = ctypes.c_int64
    return found


class NativeDecoder:
    """A model's weights packed, ready for steps."""

    ragged = True
    """rows may stand at different places"""
    most_at_once: int
    """tokens of a row that `write` writes: what takes a tenth of a second, in which nothing can interrupt it"""

    def __init__(self, weights: DecoderWeights) -> None:
        self._kernels = _kernels(native.library())
        self._held: list[object] = []
        self._table = None if weights.angles is None else AngleTable(weights.angles, _halves)
        self._angles: tuple[Tensor, Tensor] | None = None
        blocks = (_Block * len(weights.blocks))(*(self._block(block) for block in weights.blocks))
        n_vocab, d_model = weights.embedding.shape
        embedding = self._keep(weights.embedding.detach().contiguous())
        arguments = self._arguments = _Arguments(
            n_layers=len(weights.blocks),
            d_model=d_model,
            n_heads=weights.n_heads,
            n_kv_heads=weights.n_kv_heads,
            head_dim=weights.head_dim,
            d_ffn=weights.blocks[0].down.shape[1],
            n_vocab=n_vocab,
            eps=weights.eps,
            embedding=embedding.data_ptr(),
            half_embedding=embedding.dtype == torch.bfloat16,
            blocks=blocks,
            norm=self._gain(weights.norm),
            unembedding=self._packed(weights.unembedding),
        )
        if weights.heads:
            queries = weights.n_heads * weights.head_dim
            heads = (_Block * len(weights.heads))(*(self._block(head) for head in weights.heads))
            for head, its in zip(heads, weights.heads, strict=True):
                head.kv = self._packed(its.qkv[queries:])
            arguments.heads, arguments.n_heads_kept, arguments.n_trunk = heads, len(heads), weights.n_trunk
        if weights.drafts:
            arguments.drafts = self._packed(torch.cat([head.detach() for head in weights.drafts]))
        n_bytes = sum(packed.n_bytes for packed in self._held if isinstance(packed, Packed))
        self.most_at_once = min(256, 1 + 2_000_000_000 // n_bytes)
        self._pointers = (ctypes.c_void_p * (2 * (len(weights.blocks) + len(weights.heads))))()
        arguments.caches = self._pointers
        self._last = LastCaches()
        self._stream = torch.empty(0)
        self._address = ctypes.addressof(arguments)
        self._busy = threading.Lock()
        self._shape = (n_vocab, d_model)

    def read(
        self,
        tokens: Int[Tensor, "b t"],
        caches: Sequence[KVCache],
        length: int,
        *,
        embedded: Float[Tensor, "b t d"] | None = None,
        behind: Int[Tensor, " b"] | None = None,
        logits: bool = True,
    ) -> Read:
        """Reads tokens, or what stands for them, `embedded`, behind `length` positions; row b goes on `behind[b]`
        positions before. Gives up `caches`.

        Raises:
            IndexError: a token is not in the vocabulary.
        """
        tokens, (b, t) = tokens.contiguous(), tokens.shape
        n_vocab, d_model = self._shape
        stream = torch.empty(b, t, d_model)
        trunk = self._trunk_like(stream)
        if embedded is not None:
            stream.copy_(embedded)
        found = torch.empty(b, t, n_vocab) if logits else None
        with self._busy:
            caches = self._placed(tokens, t, caches, length, behind)
            arguments = self._arguments
            if embedded is not None:
                arguments.tokens = None
            arguments.stream, arguments.trunk = stream.data_ptr(), trunk.data_ptr()
            arguments.logits = None if found is None else found.data_ptr()
            arguments.best, arguments.n_drafts = None, 0
            self._run(0)
        return Read(trunk, found, filled(caches, length + t))

    def write(
        self, pending: Int[Tensor, " b"], caches: Sequence[KVCache], length: int, n: int
    ) -> tuple[Int[Tensor, "b n"], tuple[KVCache, ...]]:
        """Reads the pending token of each row, then the most likely next one, and so on; returns the n tokens written.
        Gives up `caches`."""
        pending = pending.contiguous()
        written = torch.empty(pending.shape[0], n, dtype=torch.long)
        with self._busy:
            caches = self._placed(pending, n, caches, length, None)
            arguments = self._arguments
            if self._stream.shape[0] != arguments.n_rows:
                self._stream = torch.empty(arguments.n_rows, self._shape[1])
            assert not arguments.n_heads_kept, "a model with blocks for heads drafts"
            arguments.stream, arguments.best = self._stream.data_ptr(), written.data_ptr()
            arguments.logits, arguments.n_drafts = None, 0
            self._run(3)
        return written, filled(caches, length + n)

    def draft(
        self,
        last: Float[Tensor, "b d"],
        n: int,
        caches: Sequence[KVCache],
        length: int,
        behind: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b n v"]:
        """Logits of the first n draft heads, from the stream at each row's last position, which is read already."""
        last = last.float().contiguous()
        found = torch.empty(last.shape[0], n, self._shape[0])
        with self._busy:
            self._placed(None, 0, caches, length, behind)
            arguments = self._arguments
            arguments.n_new, arguments.n_drafts = 1, n
            arguments.last, arguments.draft_logits = last.data_ptr(), found.data_ptr()
            self._run(1)
            arguments.draft_logits = None
        return found

    def speculate(
        self,
        pending: Int[Tensor, " b"],
        last: Float[Tensor, "b d"],
        k: int,
        caches: Sequence[KVCache],
        length: int,
        behind: Int[Tensor, " b"] | None,
    ) -> Written:
        """A greedy step: drafts k - 1 tokens, reads them behind the pending ones, keeps those that hold. Gives up
        `caches`."""
        b, d_model = pending.shape[0], self._shape[1]
        pending, last = pending.contiguous(), last.float().contiguous()
        written, drafted = torch.empty(b, k, dtype=torch.long), torch.empty(b, k, dtype=torch.long)
        counts, following = torch.empty_like(pending), torch.empty_like(pending)
        stream, ends = torch.empty(b, k, d_model), torch.empty(b, d_model)
        trunk = self._trunk_like(stream)
        with self._busy:
            caches = self._placed(pending, k, caches, length, behind)
            arguments = self._arguments
            arguments.stream, arguments.trunk = stream.data_ptr(), trunk.data_ptr()
            arguments.last, arguments.next_last = last.data_ptr(), ends.data_ptr()
            arguments.best, arguments.logits, arguments.n_drafts = written.data_ptr(), None, k - 1
            arguments.block_tokens = drafted.data_ptr()
            arguments.counts, arguments.pending = counts.data_ptr(), following.data_ptr()
            self._run(2)
        return Written(written, counts, following, ends, filled(caches, length + k))

    def _placed(
        self,
        tokens: Tensor | None,
        n_new: int,
        caches: Sequence[KVCache],
        length: int,
        behind: Int[Tensor, " b"] | None,
    ) -> Sequence[KVCache]:
        """Sets the arguments of a call that reads n_new tokens of every row; the caches, with room for them."""
        arguments, end = self._arguments, length + n_new
        if end > self._last.capacity or not self._last.are(caches):
            caches = [cache.with_room(end) for cache in caches]
            self._learn(caches)
        arguments.n_new, arguments.length = n_new, length
        arguments.tokens = None if tokens is None else tokens.data_ptr()
        arguments.behind = None if behind is None else behind.data_ptr()
        table = self._table
        if table is not None:
            low = length if behind is None else length - int(behind.max())
            low -= 1 if arguments.n_heads_kept else 0  # where heads draft
            arguments.first_angle, angles = table.covering(low, end)
            if angles is not self._angles:
                self._angles = cos, sin = angles
                arguments.cos, arguments.sin = cos.data_ptr(), sin.data_ptr()
        return caches

    def _trunk_like(self, stream: Tensor) -> Tensor:
        """Where what the trunk makes goes: into the stream itself, unless blocks follow the trunk."""
        return torch.empty_like(stream) if self._arguments.n_heads_kept else stream

    def continues(self, caches: Sequence[KVCache]) -> bool:
        """Whether these are the caches of the last call: the arguments hold their addresses."""
        return self._last.are(caches)

    def _learn(self, caches: Sequence[KVCache]) -> None:
        keys, arguments = caches[0].keys, self._arguments
        for i, cache in enumerate(caches):
            assert cache.keys.shape == keys.shape == cache.values.shape, "layers' caches differ"
            self._pointers[2 * i], self._pointers[2 * i + 1] = cache.keys.data_ptr(), cache.values.data_ptr()
        self._last.become(caches)
        arguments.n_rows = keys.shape[0]
        arguments.capacity, arguments.half_caches = keys.shape[2], keys.dtype == torch.bfloat16

    def _run(self, kernel: int) -> None:
        outcome = self._kernels[kernel](self._address)
        if outcome:
            native.fail(outcome, f"decode: a token lies outside the vocabulary of {self._shape[0]}")

    def _block(self, block: BlockWeights) -> _Block:
        matrices = {name: self._packed(getattr(block, name)) for name in ("qkv", "out", "gate_up", "down")}
        return _Block(**matrices, norm_attention=self._gain(block.norm_attention), norm_ffn=self._gain(block.norm_ffn))

    def _packed(self, weight: Tensor) -> Panels:
        packed = Packed(weight)
        self._held.append(packed)
        return packed.panels

    def _gain(self, gain: Tensor) -> int:
        return self._keep(gain.detach().float().contiguous()).data_ptr()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor)
        return tensor


def _halves(cos: Float[Tensor, "n e"], sin: Float[Tensor, "n e"]) -> tuple[Tensor, Tensor]:
    """Each angle once."""
    return cos.chunk(2, dim=1)[0].contiguous(), sin.chunk(2, dim=1)[0].contiguous()
