"""The ladder of decode steps: which of a model's decoders reads a few new tokens, if any is quicker than its modules.

    reference   the model's own modules, one after the other
    lean        a torch loop without module calls; CPU
    native      one call of C; CPU, fp32 and bf16

Only the few tokens that a step or a verification reads are this operation, on a CPU and without gradients. Everything
else (training, prefill, evaluation of long texts, autocast, other devices, and any computation that is being traced)
goes through the modules.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from archbench.ops import backends
from archbench.ops.eager import counted
from archbench.ops.panels import Derived

EVERY = 32
"""Steps of one text after which parameters are looked at again."""

W = TypeVar("W")
D = TypeVar("D")


class Ladder(Generic[W, D]):
    """A model's decoders, one a level, made on first use from its weights and anew when these have changed. Keep it as
    a plain attribute of the model: copies of the model begin without.

    Args:
        kinds: makes the decoder of a level from the weights.
        longest: new tokens of a row, at most, that a level reads quicker than the modules.
    """

    def __init__(self, kinds: Mapping[str, Callable[[W], D]], longest: Mapping[str, int]) -> None:
        self._kinds, self._longest = kinds, longest
        self._most = max(longest.values())
        self._made: dict[str, Derived[Any]] = {level: Derived() for level in kinds}
        self._asked: tuple[object, ...] = ()
        self._level = ""
        self._unlooked = 0

    def serving(
        self, module: nn.Module, n_new: int, weights: Callable[[], W], hindrance: str = "", state: Any = None
    ) -> D | None:
        """The decoder for `n_new` further tokens of every row, None where the model's own modules are to read them.

        Args:
            weights: those of `module`, all on one device and of one type; asked for when a decoder is made.
            hindrance: why no decoder can serve this call, if none can.
            state: what is to be read behind, for decoders that know their own last state (`continues`). Looking at all
                parameters takes as long as a tenth of a small model's step, so within a text it is done at every
                EVERY-th step only: a state belongs to the weights that made it.

        Raises:
            BackendError: the level that ARCHBENCH_BACKEND asks for cannot run, or cannot serve this call.
        """
        if n_new > self._most or torch.is_grad_enabled() or counted():
            return None
        asked = (n_new, hindrance, os.environ.get(backends.VARIABLE), torch.is_autocast_enabled("cpu"))
        if asked == self._asked:  # as at the last step; device and type are those of the weights
            made = self._made[self._level]
            found = made.latest()
            if found is not None and self._unlooked < EVERY and state is not None and found.continues(state):
                self._unlooked += 1
                backends.note("decode", self._level)
                return found
            found = made.current()
            if found is not None:
                self._unlooked = 0
                backends.note("decode", self._level)
                return found
        weight = next(module.parameters())
        if weight.device.type != "cpu":
            return None
        if torch.is_autocast_enabled("cpu"):
            hindrance = "autocast is on"
        if weight.is_inference():
            hindrance = "weights made in inference mode do not tell when they change"
        level = backends.pick("decode", weight.device, weight.dtype, hindrance=hindrance)
        if level == "native" and level not in self._kinds:
            level = "lean"  # the highest there is, as for any operation without kernels
        elif level == "native" and not asked[2] and _for_many_threads(module):
            level = "lean"
        if hindrance:
            level = "reference"
        if n_new > self._longest.get(level, self._most):
            return None  # that many are no decode step at this level
        backends.note("decode", level)
        if level == "reference":
            return None
        self._asked, self._level, self._unlooked = asked, level, 0
        return self._made[level].of(module, lambda: self._kinds[level](weights()))


def unchanged(model: nn.Module, owner: type, *methods: str) -> bool:
    """Whether a subclass left these methods of `owner` as they are: a decoder knows the weights of its modules, not
    what somebody else makes of them."""
    return all(getattr(type(model), name) is getattr(owner, name) for name in methods)


def _for_many_threads(module: nn.Module) -> bool:
    """Whether torch's threads are likely to beat the one thread of native steps: those are bound by reading weights,
    and large weights come quicker to several cores. Where the border lies was estimated, not measured."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return torch.get_num_threads() > 4 and weights > 64 << 20
