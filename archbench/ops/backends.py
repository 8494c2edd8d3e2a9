"""The ladder of kernel levels: which are there, which one an operation gets, and which ones were used.

    reference   the equations, token by token; the oracle, never chosen by "auto"
    lean        hand-tuned torch, on every device and for every float type
    native      C built on first use (see `native`); CPU, fp32 and half types
    cuda        mamba-ssm and causal-conv1d (see `scan_cuda`); probed by running them

"auto" takes the best level that serves the device and type: `cuda` on a CUDA device, `native` on a CPU, else `lean`.
For fp64 `lean` is the proper level; where it stands in for a missing `native` or `cuda`, that is announced once. A
level asked for by argument or by ARCHBENCH_BACKEND is used or refused where it cannot run; an operation or model that
was never given that level runs at `lean`. What ran, `in_use` tells.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch

from archbench.errors import BackendError, suggestion
from archbench.ops import attention_cuda, native, scan_cuda, ssd_cuda

LEVELS = ("reference", "lean", "native", "cuda")
VARIABLE = "ARCHBENCH_BACKEND"


class BackendWarning(UserWarning):
    """A slower level runs because a faster one is not available."""


def _always() -> str:
    return "ok"


_PROBES: dict[str, dict[str, Callable[[], str]]] = {
    "selective_scan": {
        "reference": _always,
        "lean": _always,
        "native": native.reason,
        "cuda": scan_cuda.scan_reason,
    },
    "causal_conv": {
        "reference": _always,
        "lean": _always,
        "native": native.reason,
        "cuda": scan_cuda.conv_reason,
    },
    "ssd": {
        "reference": _always,
        "lean": _always,
        "native": native.reason,
        "cuda": ssd_cuda.reason,
    },
    "attention": {
        "reference": _always,
        "lean": _always,
        "cuda": attention_cuda.flash_reason,
    },
    "cross_entropy": {
        "reference": _always,
        "lean": _always,
        "native": native.reason,
    },
    "decode": {
        "reference": _always,
        "lean": _always,
        "native": native.reason,
    },
}
OPERATIONS = tuple(_PROBES)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNEL_DEVICE = {"native": "cpu", "cuda": "cuda"}

_used: dict[str, set[str]] = {}
_announced: set[str] = set()


def available(op: str) -> dict[str, str]:
    """Every level of `op`: "ok", or why it cannot run here. May compile the native kernels.

    Raises:
        BackendError: there is no such operation.
    """
    return {level: probe() for level, probe in _probes(op).items()}


def pick(op: str, device: torch.device, dtype: torch.dtype, requested: str = "auto", *, hindrance: str = "") -> str:
    """The level that `op` runs at for inputs of this device and type.

    Args:
        requested: a level, or "auto", which defers to ARCHBENCH_BACKEND and, where that is unset or "auto", takes the
            best level there is. On the meta device nothing runs, and any level is allowed.
        hindrance: why no kernel can serve this call, if none can: "auto" then takes `lean`.

    Raises:
        BackendError: the level asked for does not exist, is not available, or does not serve this device or type.
    """
    asked_by = "backend="
    if requested == "auto":
        asked_by, requested = f"{VARIABLE}=", os.environ.get(VARIABLE, "") or "auto"
        if requested in LEVELS and requested not in _probes(op):
            requested = "lean"
    if requested != "auto":
        return _granted(op, device, dtype, requested, asked_by, hindrance)
    best = "cuda" if device.type == "cuda" else "native"
    if hindrance or best not in _probes(op) or device.type != _KERNEL_DEVICE[best] or dtype not in _served_types(op):
        return "lean"
    found = _probes(op)[best]()
    if found == "ok":
        return best
    _announce(f"{op} runs at level 'lean', which is slower: '{best}' is not available: {found}")
    return "lean"


def only_reference() -> bool:
    """Whether the environment asks for the equations as they stand, also of what has no levels of its own."""
    return os.environ.get(VARIABLE) == "reference"


def note(op: str, level: str) -> None:
    """Remember that `op` ran at `level`."""
    _used.setdefault(op, set()).add(level)


def in_use() -> dict[str, str]:
    """The level each operation ran at since the last `forget`; several are joined, as in "lean+native"."""
    return {op: "+".join(level for level in LEVELS if level in levels) for op, levels in sorted(_used.items())}


def forget() -> None:
    """Start `in_use` afresh, as between two measurements in one process."""
    _used.clear()


def _granted(op: str, device: torch.device, dtype: torch.dtype, level: str, asked_by: str, hindrance: str) -> str:
    probes = _probes(op)
    where = f"{op}: {asked_by}{level}"
    if level not in probes:
        raise BackendError(f"{where}: no such level; {suggestion(level, [*probes, 'auto'])}")
    if device.type == "meta":
        return level
    served = _KERNEL_DEVICE.get(level, device.type)
    if device.type != served:
        raise BackendError(f"{where}: this level runs on {served} tensors, got {device.type}; use lean or auto")
    if level in _KERNEL_DEVICE and dtype not in _served_types(op):
        served_types = ", ".join(str(served).removeprefix("torch.") for served in _served_types(op))
        raise BackendError(f"{where}: this level takes {served_types}, got {dtype}; use lean or auto")
    if level in _KERNEL_DEVICE and hindrance:
        raise BackendError(f"{where}: {hindrance}; use lean or auto")
    found = probes[level]()
    if found != "ok":
        raise BackendError(f"{where}: not available here: {found}")
    return level


def _served_types(op: str) -> tuple[torch.dtype, ...]:
    """The types that the kernels of `op` take; flash-attn computes in half types only."""
    of_attention, without_fp16 = (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)
    return {"attention": of_attention, "cross_entropy": without_fp16, "decode": without_fp16}.get(op, _KERNEL_DTYPES)


def _probes(op: str) -> dict[str, Callable[[], str]]:
    if op not in _PROBES:
        raise BackendError(f"{op}: no such operation; {suggestion(op, _PROBES)}")
    return _PROBES[op]


def _announce(message: str) -> None:
    """Warn once per process and reason: the part after the operation's name."""
    reason = message.partition(" ")[2]
    if reason not in _announced:
        _announced.add(reason)
        warnings.warn(f"archbench: {message}", BackendWarning, stacklevel=4)
