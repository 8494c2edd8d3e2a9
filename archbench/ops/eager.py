"""Operators of ours called past torch's dispatcher.

Going through it costs an operator that is written in Python tens of microseconds, as much as a small scan takes. What
needs the dispatcher are those who watch: dispatch modes (FLOP counters, fake tensors), compilers, profilers, function
transforms, the meta device and kinds of tensors that are not torch's own. All others get the same computation and the
same gradient without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def counted() -> bool:
    """Whether every operator must pass the dispatcher: a FLOP counter or a compiler looks at them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # compilers cannot ask the second


def watched() -> bool:
    """Whether someone looks at the operators that run: those, a profiler, or a function transform."""
    return counted() or torch.autograd._profiler_enabled() or torch._C._functorch.peek_interpreter_stack() is not None


def eager(operator: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, or the operator registered for it where that can be told apart. It has no gradient."""

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if watched() or unusual(inputs) else compute(*inputs)

    return call


def eager_with_gradient(
    operator: Callable[..., Any],
    compute: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """The same for an operator with a gradient; `save` and `differentiate` are what it is registered with. The gradient
    itself has none: differentiating it raises RuntimeError, as the operator's does."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # with a `setup_context` every call would read the signature anew
            output = compute(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            return differentiate(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if watched() or unusual(inputs) else Direct.apply(*inputs)

    Direct.__name__ = compute.__module__.rpartition(".")[2]

    return call


def unusual(inputs: tuple[Any, ...]) -> bool:
    """Whether there is a tensor on the meta device, or of another kind than torch's own."""
    return any(
        isinstance(value, Tensor) and (value.is_meta or type(value) not in (Tensor, Parameter)) for value in inputs
    )
