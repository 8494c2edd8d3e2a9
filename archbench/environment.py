"""What machine and software a number came from, without importing torch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_TELLING = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU implementer", "CPU part")
"""Lines of /proc/cpuinfo, of x86 and Arm, that decide which kernels a library takes."""
_KERNEL_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
PACKAGES = ("archbench", "torch", "numpy", "tokenizers", "safetensors", "mamba-ssm", "causal-conv1d", "flash-attn")


def describe() -> dict[str, Any]:
    """Machine, versions and load right now, as plain data for a record."""
    return {**_fixed(), "load_average": _load_average()}


@cache
def _fixed() -> dict[str, Any]:
    import psutil

    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_model(),
        "cpu_class": cpu_class(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed_version(name))},
        "commit": commit(),
        "host": hashlib.sha256(platform.node().encode()).hexdigest()[:12],  # tells hosts apart without naming them
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_class() -> str | None:
    """Names processors on which the same program gives the same bits: libraries choose their kernels by instruction
    sets and cache sizes, and by a few variables. None where the system does not tell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*/size"))
        sizes = [cache.read_text().strip() for cache in caches]
    except OSError:
        return None
    told = [line.replace("\t", "") for line in lines if line.startswith(_TELLING)]
    chosen = [f"{name}={os.environ[name]}" for name in _KERNEL_VARIABLES if name in os.environ]
    return hashlib.sha256("\n".join([platform.machine(), *told, *sizes, *chosen]).encode()).hexdigest()[:12]


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the source this package runs from, with '+' when it has uncommitted changes; None outside
    a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--", "archbench", "suites") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _load_average() -> list[float]:
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except OSError:
        return []


def source_sha256(files: Iterable[Path]) -> str:
    """One hash over the contents of these files, in order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
