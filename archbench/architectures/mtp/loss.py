"""The loss of several heads with the memory of one head's logits.

    L_n = sum_i w_i mean_t CE(logits_i[t], x_{t+i})

Written as a sum, autograd holds the logits of all heads (n V a position) until its backward pass. Head by head, each
loss is differentiated at once, with respect to the stream that the head reads and the parameters it uses, and its
logits are freed before the next head's are made; the gradients wait in one autograd node, whose backward pass hands
them out, once (a second one raises RuntimeError). No two streams or parameters may have one tensor for a gradient, as
of x + p: it would be added to twice. Peak memory: O(V + d) a position instead of O(n V + d). The work is the same.

Source: Gloeckle et al. 2024, section 2 and figure 2.

Letters: b batch, t positions, d width, v vocabulary, n heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from archbench.ops.cross_entropy import cross_entropy, loss_and_gradient
from archbench.ops.precision import without_autocast


class Head(NamedTuple):
    """A head's part of the loss: which stream it reads, how that becomes logits, what it must say (-100: nothing), its
    weight, and how much each target counts (None: all alike)."""

    stream: int
    logits: Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t v"]]
    targets: Int[Tensor, "b t"]
    weight: float
    counts: Float[Tensor, "b t"] | None = None

    def loss(self, stream: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats, not yet times `weight`."""
        return cross_entropy(self.logits(stream), self.targets, self.counts)


def weighted_sum(
    heads: Sequence[Head], streams: Sequence[Float[Tensor, "b t d"]], parameters: Sequence[nn.Parameter], *, naive: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """The loss, and that of each head (detached, unweighted). `parameters` are all that the heads' `logits` use."""
    if naive or len(heads) == 1 or not torch.is_grad_enabled():
        losses = torch.stack([head.loss(streams[head.stream]) for head in heads])
        weights = losses.new_tensor([head.weight for head in heads])
        return weights @ losses, losses.detach()
    return _HeadByHead.apply(heads, len(streams), *streams, *parameters)


class _HeadByHead(torch.autograd.Function):
    """Inputs: heads, number of streams, streams, parameters. Outputs: the weighted sum and, without gradient, the
    heads' losses."""

    @staticmethod
    def forward(ctx: Any, heads: Sequence[Head], n_streams: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[2:]
        leaves = [
            x.detach().requires_grad_(need) for x, need in zip(inputs[:n_streams], needed[:n_streams], strict=True)
        ]
        sources = [*leaves, *inputs[n_streams:]]
        wanted = [i for i, need in enumerate(needed) if need]
        gradients: list[Tensor | None] = [None] * len(inputs)
        losses = []
        for head in heads:
            with torch.enable_grad():
                logits = head.logits(leaves[head.stream])
            with without_autocast(logits):  # autocast is for forward passes; a backward pass repeats their types
                loss, of_logits = loss_and_gradient(logits, head.targets, head.counts, times=head.weight)
                found = torch.autograd.grad(logits, [sources[i] for i in wanted], of_logits, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                before = gradients[i]
                if gradient is not None:
                    gradients[i] = gradient if before is None else before.add_(gradient)
            losses.append(loss)
            del logits, of_logits, found
        ctx.gradients = gradients
        each = torch.stack(losses)
        ctx.mark_non_differentiable(each)
        return each.new_tensor([head.weight for head in heads]) @ each, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _of_losses: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # held here as well, each would be copied to become a `.grad`
        if gradients is None:
            raise RuntimeError("the loss of several heads hands its gradients out once; it was differentiated before")
        if not (grad.is_cpu and grad.item() == 1.0):  # what `backward()` of a loss begins with; no device need be asked
            gradients = [gradient if gradient is None else gradient.mul_(grad) for gradient in gradients]
        return None, None, *gradients
