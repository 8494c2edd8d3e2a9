"""Cross-entropy and its gradient, level `native`: binds csrc/cross_entropy.c. Computed in fp32 on CPU; logits and
gradient may be bf16."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from archbench.ops import native


class CrossEntropyArguments(ctypes.Structure):
    """`struct cross_entropy_args` of cross_entropy.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_vocab", "half")),
        ("logits", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("targets", "share", "loss", "gradient")),
    )


@functools.cache
def _kernel(library: ctypes.CDLL) -> Callable[..., int]:
    kernel = library.archbench_cross_entropy
    kernel.argtypes = (ctypes.POINTER(CrossEntropyArguments), ctypes.c_int64, ctypes.c_int64)
    kernel.restype = ctypes.c_int64
    return kernel


def with_gradient(
    logits: Float[Tensor, "n v"], targets: Int[Tensor, " n"], share: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"]]:
    """(each row's loss, the gradient in the type of the logits)."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets, share = targets.contiguous(), share.contiguous()
    each, gradient = share.new_empty(n), logits.new_empty(n, v)
    arguments = CrossEntropyArguments(v, logits.dtype is torch.bfloat16, logits.data_ptr(), logits.stride(0))
    arguments.targets, arguments.share = targets.data_ptr(), share.data_ptr()
    arguments.loss, arguments.gradient = each.data_ptr(), gradient.data_ptr()
    native.spread(_kernel(native.library()), arguments, n)
    return each, gradient
