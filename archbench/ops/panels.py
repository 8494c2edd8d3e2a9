"""Matrices laid out for decode kernels (csrc/panels.c), and what was made of a module's weights kept up to date.

A panel is 32 output columns, inputs one after the other; a product of a few rows reads each panel once. Packing is a
copy in fp32 or bf16: weights are packed on first use and again when they have changed.

Letters: o outputs, i inputs, p panels, l lanes of a vector.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from operator import attrgetter, getitem, is_
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from archbench.ops import native

PANEL = 32
T = TypeVar("T")


class Panels(ctypes.Structure):
    """`struct panels` of panels.c. It does not keep its memory alive: see `Packed`."""

    _fields_ = (
        ("p", ctypes.c_void_p),
        ("n_out", ctypes.c_int64),
        ("n_in", ctypes.c_int64),
        ("half", ctypes.c_int64),
    )


class Packed:
    """A packed matrix: `panels` for the C code, `memory` behind it."""

    def __init__(self, weight: Float[Tensor, "o i"]) -> None:
        """bf16 weights stay bf16; all others are stored in fp32."""
        n_out, n_in = weight.shape
        half = weight.dtype == torch.bfloat16
        with torch.inference_mode(False), torch.no_grad():
            wide = F.pad(weight.detach().to(torch.bfloat16 if half else torch.float32), (0, 0, 0, -n_out % PANEL))
            if half:
                # Neighbouring vectors of columns share 32-bit words: (p, i, pair, l, which of the pair).
                lanes = _lanes(native.library())
                split = wide.view(-1, PANEL // (2 * lanes), 2, lanes, n_in)
                self.memory = split.permute(0, 4, 1, 3, 2).contiguous()
            else:
                self.memory = wide.view(-1, PANEL, n_in).transpose(1, 2).contiguous()
        self.panels = Panels(self.memory.data_ptr(), n_out, n_in, half)

    @property
    def n_bytes(self) -> int:
        return self.memory.numel() * self.memory.element_size()


@functools.cache
def _lanes(library: ctypes.CDLL) -> int:
    library.archbench_lanes.restype = ctypes.c_int64
    return library.archbench_lanes()


class Derived(Generic[T]):
    """Something made of a module's parameters (packed weights), made on first use and anew after they changed.

    A parameter has changed when it is another object, lies elsewhere in memory, or was written to in place. Torch
    counts writes, but not those of fused optimizers, so a step of any optimizer counts as a change of everything. A
    copy of the module, by `deepcopy` or pickle, begins without. Keep it as a plain attribute of the module: it is in no
    state dict.
    """

    def __init__(self) -> None:
        self._made: T | None = None
        self._homes: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._held: list[Tensor] = []
        self._writes: list[int] = []
        self._addresses: list[int] = []
        self._steps = 0

    def of(self, module: nn.Module, make: Callable[[], T]) -> T:
        """What `make` gave when the parameters of `module` were as they are now."""
        found = self.current()
        if found is None:
            self._made = None  # its memory goes before the new one comes
            homes = [(part._parameters, name) for part in module.modules() for name in part._parameters]
            held = [(home, name) for home, name in homes if home[name] is not None]
            self._homes, self._names = [home for home, _ in held], [name for _, name in held]
            self._held = list(map(getitem, self._homes, self._names))
            self._writes, self._addresses = list(map(_writes, self._held)), list(map(Tensor.data_ptr, self._held))
            self._steps = _optimizer_steps().n
            found = self._made = make()
        return found

    def latest(self) -> T | None:
        """What was made last, if no optimizer took a step since."""
        return self._made if self._steps == _optimizer_steps().n else None

    def current(self) -> T | None:
        """What was made last, if no parameter has changed since."""
        if (
            self.latest() is None
            or not all(map(is_, map(getitem, self._homes, self._names), self._held))
            or list(map(_writes, self._held)) != self._writes
            or list(map(Tensor.data_ptr, self._held)) != self._addresses
        ):
            return None
        return self._made

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[T]], tuple[()]]:
        return Derived, ()


class _OptimizerSteps:
    """How many steps any optimizer took in this process since someone asked for the first time."""

    def __init__(self) -> None:
        self.n = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n += 1


_optimizer_steps = functools.cache(_OptimizerSteps)
_writes = attrgetter("_version")
