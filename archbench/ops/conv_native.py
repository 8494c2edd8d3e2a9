"""Causal depthwise convolution followed by silu, level `native`: binds csrc/conv.c. Computed in fp32 on CPU; x and y
may be bf16."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from archbench.ops import native


class ConvArguments(ctypes.Structure):
    """`struct conv_args` of conv.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_batch", "n_tokens", "n_channels", "width", "half")),
        ("x", ctypes.c_void_p),
        ("x_batch", ctypes.c_int64),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "window", "y", "gy")),
        ("gy_batch", ctypes.c_int64),
        ("gy_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("gx", "gwindow", "gweight", "gbias")),
    )


@functools.cache
def _kernels(library: ctypes.CDLL) -> tuple[Callable[..., int], Callable[..., int], int]:
    """(forward, backward, channels per group)."""
    for kernel in (library.archbench_conv_forward, library.archbench_conv_backward):
        kernel.argtypes = (ctypes.POINTER(ConvArguments), ctypes.c_int64, ctypes.c_int64)
        kernel.restype = ctypes.c_int64
    library.archbench_conv_group.restype = ctypes.c_int64
    return library.archbench_conv_forward, library.archbench_conv_backward, library.archbench_conv_group()


def forward(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> Float[Tensor, "b t d"]:
    """silu(conv(x))."""
    run, _, group = _kernels(native.library())
    arguments, held = _inputs(x, weight, bias, window)
    y = x.new_empty(x.shape)
    arguments.y = y.data_ptr()
    native.spread(run, arguments, x.shape[0] * -(-x.shape[2] // group))
    del held
    return y


def backward(
    gy: Float[Tensor, "b t d"],
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, window (None without one)."""
    b, _, d = x.shape
    width = weight.shape[1]
    _, run, group = _kernels(native.library())
    arguments, held = _inputs(x, weight, bias, window)
    gy = _rows(gy)
    gx, gwindow = x.new_empty(x.shape), weight.new_empty(b, width - 1, d)
    gweight, gbias = weight.new_empty(b, width, d), weight.new_empty(b, d)
    arguments.gy, arguments.gy_batch, arguments.gy_row = gy.data_ptr(), gy.stride(0), gy.stride(1)
    arguments.gx, arguments.gwindow = gx.data_ptr(), gwindow.data_ptr()
    arguments.gweight, arguments.gbias = gweight.data_ptr(), gbias.data_ptr()
    native.spread(run, arguments, b * -(-d // group))
    del held
    return gx, gweight.sum(0).t().contiguous(), gbias.sum(0), None if window is None else gwindow


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None
) -> tuple[ConvArguments, tuple[Tensor | None, ...]]:
    """The argument block, and the tensors that must outlive the call."""
    x, bias, taps = _rows(x), bias.contiguous(), weight.t().contiguous()
    window = None if window is None else window.contiguous()
    half = x.dtype is torch.bfloat16
    arguments = ConvArguments(*x.shape, weight.shape[1], half, x.data_ptr(), x.stride(0), x.stride(1))
    arguments.weight, arguments.bias = taps.data_ptr(), bias.data_ptr()
    arguments.window = None if window is None else window.data_ptr()
    return arguments, (x, bias, taps, window)
