"""Cross-entropy of rows of logits, and its gradient made along with it.

    L = sum_n s_n (log sum_i exp(x_ni) - x_n,target)        dL/dx_ni = s_n (softmax(x_n)_i - [i = target_n])

with shares s_n that make L a mean over what counts. Level `native` reads a row once more to make loss and gradient
together, in the type of the logits; autograd holds two tensors of their size in fp32 on the way. It serves fp32 and
bf16 on CPU; all else is torch's own loss, as it is under a FLOP counter, a compiler, a profiler or a function
transform, and where no gradient is asked for.

Letters: n rows (any leading dimensions), v vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from archbench.ops import backends, cross_entropy_native
from archbench.ops.eager import unusual, watched

NONE = -100
"""The target of a row that says nothing, as in torch."""


def cross_entropy(
    logits: Float[Tensor, "*n v"], targets: Int[Tensor, "*n"], weights: Float[Tensor, "*n"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the targets that are not NONE, or the mean weighted by `weights`, in nats, computed in fp32 (fp64 for
    such logits). At level `native` its gradient has none itself, and there is no forward-mode derivative.

    Raises:
        IndexError: a target is no token and not NONE.
        ValueError: targets or weights are not one a row.
    """
    _check(logits, targets, weights)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    weighed = weights is not None and weights.requires_grad  # which have no gradient at level native
    if with_gradient and not weighed and _level(logits, targets, weights) == "native":
        return _WithGradient.apply(logits, targets, weights)
    return _by_torch(logits, targets, weights)


def loss_and_gradient(
    logits: Float[Tensor, "*n v"],
    targets: Int[Tensor, "*n"],
    weights: Float[Tensor, "*n"] | None = None,
    *,
    times: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, "*n v"]]:
    """`cross_entropy`, and the gradient of `times` it in the type of the logits, which are only read. Raises as that
    does."""
    _check(logits, targets, weights)
    logits, weights = logits.detach(), None if weights is None else weights.detach()
    level = _level(logits, targets, weights)
    if level == "reference":
        leaf = logits.requires_grad_()
        with torch.enable_grad():
            loss = _by_torch(leaf, targets, weights)
            (gradient,) = torch.autograd.grad(times * loss, leaf)
        return loss.detach(), gradient
    return _both(level, logits, targets, weights, times)


def _both(
    level: str, logits: Tensor, targets: Tensor, weights: Tensor | None, times: float
) -> tuple[Float[Tensor, ""], Tensor]:
    """`loss_and_gradient` at level lean or native."""
    rows, places, counted = _rows(logits), targets.reshape(-1).long(), _counted(logits, targets, weights)
    shares = counted.parts * (times / counted.total.clamp(min=1e-9))
    if level == "native":
        each, gradient = cross_entropy_native.with_gradient(rows, places, shares)
    else:
        chances = _wide(rows).log_softmax(dim=-1)
        each = F.nll_loss(chances, places, ignore_index=NONE, reduction="none")
        gradient = chances.exp_().mul_(shares[:, None])
        gradient.scatter_add_(1, places.clamp(min=0)[:, None], -shares[:, None])
    loss = torch.dot(each, counted.parts) / counted.total
    return loss, gradient.view(logits.shape).to(logits.dtype)


def _level(logits: Tensor, targets: Tensor, weights: Tensor | None) -> str:
    """Where somebody watches, what torch does by itself is shown, and nothing noted: it is a look, not a run."""
    if watched() or unusual((logits, targets, weights)):
        return "lean"
    if logits.is_cpu and logits.dtype in (torch.float32, torch.bfloat16):
        level = backends.pick("cross_entropy", logits.device, logits.dtype)
    else:  # no reason to refuse a training that asks for native kernels elsewhere
        level = "reference" if backends.only_reference() else "lean"
    backends.note("cross_entropy", level)
    return level


def _rows(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "n v"]:
    return logits.reshape(-1, logits.shape[-1])


def _wide(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(logits: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    """Raises ValueError."""
    n, device = logits.shape[:-1], logits.device
    for name, given in (("targets", targets), ("weights", weights)):
        if given is not None and (given.shape != n or given.device != device):
            found = f"{tuple(given.shape)} on {given.device}"
            raise ValueError(f"cross_entropy: {name} should be {tuple(n)} on {device}, one a row, but are {found}")


class _Counted(NamedTuple):
    """How much each row counts, and what they come to."""

    parts: Float[Tensor, " n"]
    total: Float[Tensor, ""]


def _counted(logits: Tensor, targets: Tensor, weights: Tensor | None) -> _Counted:
    counted = targets.reshape(-1).ne(NONE).to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return _Counted(counted, counted.sum())
    weights = weights.reshape(-1).to(counted.dtype)
    return _Counted(counted * weights, weights.sum().clamp(min=1e-9))


def _by_torch(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Float[Tensor, ""]:
    rows, places = _rows(_wide(logits)), targets.reshape(-1)
    if weights is None:
        return F.cross_entropy(rows, places, ignore_index=NONE)
    each = F.cross_entropy(rows, places, ignore_index=NONE, reduction="none")
    return (each * weights.reshape(-1)).sum() / weights.sum().clamp(min=1e-9)


class _WithGradient(torch.autograd.Function):
    """Inputs: logits, targets, weights."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        loss, gradient = _both("native", logits, targets, weights, 1.0)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        batched = watched() or torch._C._functorch.is_legacy_batchedtensor(grad)  # and has no one number
        factor = grad if batched else grad.item()
        return gradient if factor is not grad and factor == 1.0 else gradient * factor, None, None
