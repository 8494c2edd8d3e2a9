"""State-space duality, level `native`: binds csrc/ssd.c. fp32 on CPU.

On a CPU the recurrence itself is cheaper than the matrix products that stand for it elsewhere. What leaves the C code
as partial sums per (row, job) is added up here, in an order that does not depend on the number of threads. Memory
beyond inputs and outputs: the states at chunk starts when a backward pass will follow, and scratch of one chunk of one
block of channels per thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from archbench.ops import native
from archbench.ops.scan_native import Rows

CHUNK = 64
"""Tokens between kept states; the scratch of a chunk should stay in cache. 32 keeps twice as many states and measures
6 % slower, 128 alike."""


class SsdArguments(ctypes.Structure):
    """`struct ssd_args` of ssd.c, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("n_batch", "n_tokens", "n_heads", "width", "n_groups", "n_states", "chunk")
        ),
        *((name, Rows) for name in ("x", "step", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "h0")),
        *((name, ctypes.c_void_p) for name in ("y", "h_last", "starts")),
        ("gy", Rows),
        ("gh", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("gx", "gstep", "gA", "gD", "gh0", "gB", "gC")),
    )


@functools.cache
def _kernels(library: ctypes.CDLL) -> tuple[Callable[..., int], Callable[..., int], Callable[..., int]]:
    """(forward, backward, jobs per group)."""
    for kernel in (library.archbench_ssd_forward, library.archbench_ssd_backward):
        kernel.argtypes = (ctypes.POINTER(SsdArguments), ctypes.c_int64, ctypes.c_int64)
        kernel.restype = ctypes.c_int64
    library.archbench_ssd_jobs_per_group.argtypes = (ctypes.POINTER(SsdArguments),)
    library.archbench_ssd_jobs_per_group.restype = ctypes.c_int64
    return library.archbench_ssd_forward, library.archbench_ssd_backward, library.archbench_ssd_jobs_per_group


def starts_shape(b: int, t: int, h: int, p: int, n: int) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps for `backward`."""
    return (b, -(-t // CHUNK), h, n, p)


def forward(
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
    keep: bool,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"], Tensor]:
    """y, the last state, and the states at chunk starts (empty without `keep`)."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    run, _, per_group = _kernels(native.library())
    arguments, held = _inputs(x, step, A, B, C, D, h0)
    y, h_last = x.new_empty(b, t, h, p), x.new_empty(b, h, p, n)
    starts = x.new_empty(starts_shape(b, t, h, p, n) if keep else 0)
    arguments.y, arguments.h_last = y.data_ptr(), h_last.data_ptr()
    arguments.starts = starts.data_ptr() if keep else None
    native.spread(run, arguments, b * g * per_group(arguments))
    del held
    return y, h_last, starts


def backward(
    gy: Float[Tensor, "b t h p"] | None,
    gh: Float[Tensor, "b h p n"] | None,
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
    starts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, step, A, B, C, D, h0, in that order; None for an input that is None."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    _, run, per_group = _kernels(native.library())
    arguments, held = _inputs(x, step, A, B, C, D, h0)
    jobs = per_group(arguments)
    if gy is not None:
        arguments.gy = _rows(gy, held)
    if gh is not None:
        arguments.gh = _flat(gh, held)
    gx, gstep, gh0 = x.new_empty(b, t, h, p), x.new_empty(b, t, h), x.new_empty(b, h, p, n)
    gA, gD = x.new_empty(b, h), x.new_empty(b, h)
    gB, gC = x.new_empty(b, g, jobs, t, n), x.new_empty(b, g, jobs, t, n)
    outputs = {"gx": gx, "gstep": gstep, "gA": gA, "gD": gD, "gh0": gh0, "gB": gB, "gC": gC}
    for name, tensor in outputs.items():
        setattr(arguments, name, tensor.data_ptr())
    arguments.starts = starts.data_ptr()
    native.spread(run, arguments, b * g * jobs)
    del held
    return (
        gx,
        gstep,
        gA.sum(0),
        gB.sum(2).transpose(1, 2).contiguous(),
        gC.sum(2).transpose(1, 2).contiguous(),
        gD.sum(0) if D is not None else None,
        gh0 if h0 is not None else None,
    )


def _inputs(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None
) -> tuple[SsdArguments, list[Tensor]]:
    """The argument block, and the tensors that must outlive the call."""
    held: list[Tensor] = []
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    rows = (_rows(tensor, held) for tensor in (x, step, B, C))
    arguments = SsdArguments(b, t, h, p, g, n, CHUNK, *rows)
    arguments.A, arguments.D, arguments.h0 = _flat(A, held), _flat(D, held), _flat(h0, held)
    return arguments, held


def _rows(tensor: Tensor, held: list[Tensor]) -> Rows:
    """A (b, t, ...) tensor as it lies, copied only if a token's part of it is not contiguous."""
    if not tensor[:1, :1].is_contiguous():
        tensor = tensor.contiguous()
    held.append(tensor)
    return Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _flat(tensor: Tensor | None, held: list[Tensor]) -> int | None:
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    held.append(tensor)
    return tensor.data_ptr()
