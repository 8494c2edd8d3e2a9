"""Cross-entropy of rows of logits, and its gradient made along with it.

    L = sum_n s_n (log sum_i exp(x_ni) - x_n,target)        dL/dx_ni = s_n (softmax(x_n)_i - [i = target_n])

with shares s_n that make L a mean over what counts. Level `native` reads a row once more to make loss and gradient
together, in the type of the logits; autograd holds two tensors of their size in fp32 on the way. Under a FLOP counter,
a compiler, a profiler or a function transform, and without a gradient, torch's own loss is used.

Letters: n rows (any leading dimensions), v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from archbench.ops import backends, cross_entropy_native
from archbench.ops.eager import watched

NONE = -100
"""The target of a row that says nothing, as in torch."""


def cross_entropy(
    logits: Float[Tensor, "*n v"], targets: Int[Tensor, "*n"], weights: Float[Tensor, "*n"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the targets that are not NONE, or the mean weighted by `weights`, in nats, computed in fp32 (fp64 for
    such logits). At level `native` its gradient has none itself.

    Raises:
        IndexError: a target is no token and not NONE.
    """
    if torch.is_grad_enabled() and logits.requires_grad and _level(logits) == "native":
        return _WithGradient.apply(logits, targets, weights)
    return _by_torch(logits, targets, weights)


def loss_and_gradient(
    logits: Float[Tensor, "*n v"],
    targets: Int[Tensor, "*n"],
    weights: Float[Tensor, "*n"] | None = None,
    *,
    times: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, "*n v"]]:
    """`cross_entropy`, and the gradient of `times` it in the type of the logits; the logits are only read."""
    logits = logits.detach()
    level = _level(logits)
    if level == "reference":
        leaf = logits.requires_grad_()
        with torch.enable_grad():
            loss = _by_torch(leaf, targets, weights)
            (gradient,) = torch.autograd.grad(times * loss, leaf)
        return loss.detach(), gradient
    rows, places, shares = logits.flatten(0, -2), targets.flatten(), _shares(logits, targets, weights)
    if level == "native":
        each, gradient = cross_entropy_native.with_gradient(rows, places, shares * times)
        return torch.dot(each, shares), gradient.view(logits.shape)
    chances = _wide(rows).softmax(dim=-1)
    places = places.clamp(min=0)[:, None]
    # The likeliest token has a chance of 1/v or more, so that its logarithm tells the denominator's.
    denominators = _wide(rows.amax(dim=-1)) - chances.amax(dim=-1).log()
    loss = ((denominators - _wide(rows.gather(1, places)[:, 0])) * shares).sum()
    shares = (shares * times)[:, None]
    gradient = chances.mul_(shares).scatter_add_(1, places, -shares)
    return loss, gradient.view(logits.shape).to(logits.dtype)


def _level(logits: Tensor) -> str:
    """Where somebody watches, what torch does by itself is shown, and nothing noted: it is a look, not a run."""
    if logits.is_meta or watched():
        return "lean"
    level = backends.pick("cross_entropy", logits.device, logits.dtype)
    backends.note("cross_entropy", level)
    return level


def _wide(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    return logits if logits.dtype == torch.float64 else logits.float()


def _shares(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Float[Tensor, " n"]:
    counted = targets.flatten().ne(NONE).to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return counted / counted.sum()
    return counted * weights.flatten() / weights.sum().clamp(min=1e-9)


def _by_torch(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Float[Tensor, ""]:
    rows = _wide(logits).flatten(0, -2)
    if weights is None:
        return F.cross_entropy(rows, targets.flatten(), ignore_index=NONE)
    each = F.cross_entropy(rows, targets.flatten(), ignore_index=NONE, reduction="none")
    return (each * weights.flatten()).sum() / weights.sum().clamp(min=1e-9)


class _WithGradient(torch.autograd.Function):
    """Inputs: logits, targets, weights."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        loss, gradient = loss_and_gradient(logits, targets, weights)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient if grad.item() == 1.0 else gradient * grad.to(gradient.dtype), None, None
