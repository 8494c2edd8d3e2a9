"""Selective scan, level `native`: binds csrc/scan.c. Computed in fp32 on CPU; x, dt, z and y may all be bf16.

What leaves the C code as partial sums per (row, group of channels) is added up here, in an order that does not depend
on the number of threads. Memory beyond inputs and outputs: the states at chunk starts (1 / CHUNK of all states) when
a backward pass will follow, and scratch of one chunk of one group of channels per thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from archbench.ops import native

CHUNK = 64
"""Tokens between kept states. 32 keeps twice as many and measures 3 % slower, 16 a tenth."""


class Rows(ctypes.Structure):
    """`struct rows`: strides count elements."""

    _fields_ = (("p", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64))


class ScanArguments(ctypes.Structure):
    """`struct scan_args` of scan.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_batch", "n_tokens", "n_channels", "n_states", "chunk", "half")),
        *((name, Rows) for name in ("x", "dt", "z", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "h0")),
        *((name, ctypes.c_void_p) for name in ("y", "h_last", "starts")),
        ("gy", Rows),
        ("gh", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("gx", "gdt", "gz", "gA", "gh0", "gB", "gC", "gD", "gbias")),
    )


@functools.cache
def _kernels(library: ctypes.CDLL) -> tuple[Callable[..., int], Callable[..., int], Callable[[int], int]]:
    """(forward, backward, into how many groups so many channels are divided)."""
    for kernel in (library.archbench_scan_forward, library.archbench_scan_backward):
        kernel.argtypes = (ctypes.POINTER(ScanArguments), ctypes.c_int64, ctypes.c_int64)
        kernel.restype = ctypes.c_int64
    groups = library.archbench_scan_groups
    groups.argtypes, groups.restype = (ctypes.c_int64,), ctypes.c_int64
    return library.archbench_scan_forward, library.archbench_scan_backward, groups


def arithmetic(n_tokens: int, n_states: int) -> tuple[Callable[[], float], int]:
    """What a forward scan cannot do without, on registers alone, for measuring: a call that computes n_tokens tokens of
    so many channels, and that number. States are counted in eights, rounded up."""
    library = native.library()
    library.archbench_lanes.restype = ctypes.c_int64
    library.archbench_scan_arithmetic.argtypes = (ctypes.c_int64, ctypes.c_int64)
    library.archbench_scan_arithmetic.restype = ctypes.c_float
    return lambda: library.archbench_scan_arithmetic(n_tokens, -(-n_states // 8)), library.archbench_lanes()


def starts_shape(b: int, t: int, d: int, n: int) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps for `backward`."""
    return (b, -(-t // CHUNK), n, d)


def forward(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h0: Float[Tensor, "b d n"] | None,
    keep: bool,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"], Tensor]:
    """y, the last state, and the states at chunk starts (empty without `keep`)."""
    b, t, d, n = *x.shape, A.shape[1]
    run, _, groups = _kernels(native.library())
    arguments, held = _inputs(x, dt, A, B, C, D, z, dt_bias, h0)
    y, h_last = x.new_empty(b, t, d), A.new_empty(b, d, n)
    starts = A.new_empty(starts_shape(b, t, d, n) if keep else 0)
    arguments.y, arguments.h_last = y.data_ptr(), h_last.data_ptr()
    arguments.starts = starts.data_ptr() if keep else None
    native.spread(run, arguments, b * groups(d))
    del held
    return y, h_last, starts


def backward(
    gy: Float[Tensor, "b t d"] | None,
    gh: Float[Tensor, "b d n"] | None,
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h0: Float[Tensor, "b d n"] | None,
    starts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, h0, in that order; None for an input that is None."""
    b, t, d, n = *x.shape, A.shape[1]
    _, run, groups = _kernels(native.library())
    n_groups = groups(d)
    arguments, held = _inputs(x, dt, A, B, C, D, z, dt_bias, h0)
    if gy is not None:
        arguments.gy = _rows(gy, held)
    if gh is not None:
        arguments.gh = _flat(gh, held)
    gx, gdt = x.new_empty(b, t, d), x.new_empty(b, t, d)
    gz = x.new_empty(b, t, d) if z is not None else None
    gA, gh0 = A.new_empty(b, d, n), A.new_empty(b, d, n)
    gB, gC = A.new_empty(b, n_groups, t, n), A.new_empty(b, n_groups, t, n)
    gD, gbias = A.new_empty(b, d), A.new_empty(b, d)
    outputs = {"gx": gx, "gdt": gdt, "gA": gA, "gh0": gh0, "gB": gB, "gC": gC, "gD": gD, "gbias": gbias}
    for name, tensor in outputs.items():
        setattr(arguments, name, tensor.data_ptr())
    arguments.gz = gz.data_ptr() if gz is not None else None
    arguments.starts = starts.data_ptr()
    native.spread(run, arguments, b * n_groups)
    del held
    return (
        gx,
        gdt,
        gA.sum(0),
        *(each.sum(1) if n_groups > 1 else each[:, 0] for each in (gB, gC)),
        gD.sum(0) if D is not None else None,
        gz,
        gbias.sum(0) if dt_bias is not None else None,
        gh0 if h0 is not None else None,
    )


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
) -> tuple[ScanArguments, list[Tensor]]:
    """The argument block, and the tensors that must outlive the call."""
    held: list[Tensor] = []
    b, t, d = x.shape
    half = x.dtype is torch.bfloat16
    arguments = ScanArguments(b, t, d, A.shape[1], CHUNK, half, *(_rows(rows, held) for rows in (x, dt, z, B, C)))
    arguments.A, arguments.h0 = _flat(A, held), _flat(h0, held)
    arguments.D, arguments.dt_bias = _flat(D, held), _flat(dt_bias, held)
    return arguments, held


def _rows(tensor: Tensor | None, held: list[Tensor]) -> Rows:
    """A (b, t, _) tensor as it lies, copied only if its last dimension is not contiguous."""
    if tensor is None:
        return Rows()
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    held.append(tensor)
    return Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _flat(tensor: Tensor | None, held: list[Tensor]) -> int | None:
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    held.append(tensor)
    return tensor.data_ptr()
