"""Whole-model decode steps of Mamba and Mamba-2, level `native`: binds csrc/recurrent.c. fp32 or bf16 weights on CPU.

A `NativeStepper` holds a model's matrices packed in panels and everything else the C code asks for; a call writes the
states, which belong to the caller, in place. One thread: a step is bound by reading the weights once. Results do not
depend, to the last bit, on how many tokens or rows a call reads.

Letters: b rows, t new tokens, d width, v vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from archbench.ops import native
from archbench.ops.panels import Packed, Panels
from archbench.ops.recurrent_weights import LastStates, MixerWeights, RecurrentWeights, States


class _Mixer(ctypes.Structure):
    """`struct mixer` of recurrent.c."""

    _fields_ = (
        *((name, Panels) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *(
            (name, ctypes.c_void_p)
            for name in ("norm", "conv", "conv_bias", "step_bias", "decay", "skip", "inner_norm")
        ),
    )


class _Arguments(ctypes.Structure):
    """`struct recurrent_args` of recurrent.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_layers", "d_model", "d_inner", "n_states", "width", "n_vocab")),
        *((name, ctypes.c_int64) for name in ("rank", "n_heads", "n_groups")),
        *((name, ctypes.c_double) for name in ("eps", "step_floor", "step_ceiling")),
        ("embedding", ctypes.c_void_p),
        ("half_embedding", ctypes.c_int64),
        ("mixers", ctypes.POINTER(_Mixer)),
        ("norm", ctypes.c_void_p),
        ("unembedding", Panels),
        ("n_rows", ctypes.c_int64),
        ("n_new", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("states", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("hidden", "logits", "best")),
    )


@functools.cache
def _kernels(library: ctypes.CDLL) -> tuple[Callable[..., int], Callable[..., int]]:
    """(read, write)."""
    for kernel in (library.archbench_recurrent_read, library.archbench_recurrent_write):
        kernel.argtypes = (ctypes.c_void_p,)
        kernel.restype = ctypes.c_int64
    return library.archbench_recurrent_read, library.archbench_recurrent_write


class NativeStepper:
    """Packed weights of one model, ready for steps."""

    most_at_once: int
    """Tokens of a row that one call writes at most: it ends within seconds, and hears Ctrl-C only then."""
    rows_together = True
    """Several tokens of several rows."""

    def __init__(self, weights: RecurrentWeights) -> None:
        self._read, self._write = _kernels(native.library())
        self._held: list[object] = []
        first = weights.mixers[0]
        embedding = self._keep(weights.embedding.detach().contiguous())
        self._shape = embedding.shape
        self._arguments = _Arguments(
            n_layers=len(weights.mixers),
            d_model=embedding.shape[1],
            d_inner=weights.d_inner,
            n_states=weights.n_states,
            width=first.conv.shape[1],
            n_vocab=embedding.shape[0],
            rank=0 if first.dt_proj is None else first.dt_proj.shape[1],
            n_heads=weights.n_heads,
            n_groups=weights.n_groups,
            eps=weights.eps,
            step_floor=weights.step_floor,
            step_ceiling=weights.step_ceiling,
            embedding=embedding.data_ptr(),
            half_embedding=embedding.dtype == torch.bfloat16,
            mixers=(_Mixer * len(weights.mixers))(*map(self._mixer, weights.mixers)),
            norm=self._floats(weights.norm),
            unembedding=self._packed(weights.unembedding),
        )
        self._pointers = (ctypes.c_void_p * (2 * len(weights.mixers)))()
        self._arguments.states = self._pointers
        self._address = ctypes.addressof(self._arguments)
        self._busy = threading.Lock()
        self._last = LastStates()
        n_bytes = sum(packed.n_bytes for packed in self._held if isinstance(packed, Packed))
        self.most_at_once = min(256, 1 + 2_000_000_000 // n_bytes)

    def write(self, pending: Int[Tensor, " b"], states: States, n: int) -> tuple[Int[Tensor, "b n"], States]:
        """Reads the pending token of each row, then the most likely next one, and so on; returns the n tokens written.
        Gives up the states."""
        b = pending.shape[0]
        best = torch.empty(b, n, dtype=torch.long)
        return best, self._call(self._write, pending.contiguous(), b, n, states, best=best)

    def predict(self, tokens: Int[Tensor, "b t"], states: States) -> tuple[Float[Tensor, "b t v"], States]:
        """Reads tokens and returns the logits of what follows each. Gives up the states."""
        b, t = tokens.shape
        found = torch.empty(b, t, self._shape[0])
        return found, self._call(self._read, tokens.contiguous(), b, t, states, logits=found)

    def hidden(self, tokens: Int[Tensor, "b t"], states: States) -> tuple[Float[Tensor, "b t d"], States]:
        """Reads tokens and returns what the last norm makes of each. Gives up the states."""
        b, t = tokens.shape
        found = torch.empty(b, t, self._shape[1])
        return found, self._call(self._read, tokens.contiguous(), b, t, states, hidden=found)

    def continues(self, states: States) -> bool:
        """Whether these are the states of the last call: the arguments hold their addresses."""
        return self._last.are(states)

    def _call(
        self,
        kernel: Callable[..., int],
        tokens: Tensor,
        b: int,
        t: int,
        states: States,
        *,
        hidden: Tensor | None = None,
        logits: Tensor | None = None,
        best: Tensor | None = None,
    ) -> States:
        """Raises IndexError when a token is not in the vocabulary, before any state has changed."""
        with self._busy:
            arguments = self._arguments
            if b != arguments.n_rows or not self._last.are(states):
                states = self._placed(states, b)
            arguments.n_rows, arguments.n_new, arguments.tokens = b, t, tokens.data_ptr()
            arguments.hidden = None if hidden is None else hidden.data_ptr()
            arguments.logits = None if logits is None else logits.data_ptr()
            arguments.best = None if best is None else best.data_ptr()
            outcome = kernel(self._address)
        if outcome:
            native.fail(outcome, f"decode: a token lies outside the vocabulary of {self._shape[0]}")
        return states

    def _placed(self, states: States, b: int) -> States:
        """States that the C code may write to, their places told to it: those given, if it may."""
        if not all(map(_ready, chain.from_iterable(states))):
            states = tuple((_own(window), _own(state)) for window, state in states)
        for place, tensor in enumerate(chain.from_iterable(states)):
            assert len(tensor) == b, "tokens and states are of the same rows"
            self._pointers[place] = tensor.data_ptr()
        self._last.become(states)
        return states

    def _mixer(self, mixer: MixerWeights) -> _Mixer:
        made = _Mixer(
            in_proj=self._packed(mixer.in_proj),
            out_proj=self._packed(mixer.out_proj),
            norm=self._floats(mixer.norm),
            conv=self._floats(mixer.conv.t()),
            conv_bias=self._floats(mixer.conv_bias),
            step_bias=self._floats(mixer.step_bias),
            decay=self._floats(mixer.A.float() / math.log(2)),
            skip=self._floats(mixer.skip),
        )
        if mixer.x_proj is not None and mixer.dt_proj is not None:
            made.x_proj, made.dt_proj = self._packed(mixer.x_proj), self._packed(mixer.dt_proj)
        if mixer.inner_norm is not None:
            made.inner_norm = self._floats(mixer.inner_norm)
        return made

    def _packed(self, weight: Tensor) -> Panels:
        packed = Packed(weight)
        self._held.append(packed)
        return packed.panels

    def _floats(self, tensor: Tensor) -> int:
        return self._keep(tensor.detach().float().contiguous()).data_ptr()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor)
        return tensor


def _ready(state: Tensor) -> bool:
    """Whether the C code may write to a state. One that a gradient hangs on is needed as it is."""
    return state.dtype is torch.float32 and state.is_contiguous() and not state.requires_grad


def _own(state: Tensor) -> Tensor:
    return state if _ready(state) else state.detach().to(torch.float32, copy=True).contiguous()
