"""Reading long texts: time that is linear and memory that is flat where the architecture promises it.

Models are small (131 thousand parameters) and untrained: neither time nor memory depends on what was learned. Texts are
read in pieces of 4096 tokens, each drawn when it is its turn, so that the text itself takes no memory. Where peaks of
memory are compared, pieces have 1024: the short text is then four of them, and what the second needs beyond the first
(a state to go on from) is no growth.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Generator

import archbench
from archbench import registry
from archbench.bench.target import Target
from archbench.bench.trial import Reading, Trial
from archbench.metrics.memory import peak_bytes
from archbench.model import SequenceModel

PIECE, SMALL_PIECE, SHORT, MIDDLE, LONG = 4096, 1024, 2**12, 2**13, 2**20
LENGTHS = (2**12, 2**14, 2**16, 2**18, 2**20)
SHAPES: dict[str, dict[str, object]] = {
    "mamba": {"d_model": 64, "n_layers": 3},
    "infini_attention": {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ffn": 168, "segment": 128},
    "transformer_xl": {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ffn": 168, "segment": 128},
    "transformer": {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ffn": 168},
}


def model_of(name: str) -> SequenceModel:
    found = registry.architecture(name)
    config = found.config(vocab_size=256, **SHAPES[name])
    return found.build(config, Generator().manual_seed(0)).eval()


def read(model: SequenceModel, n: int, piece: int = PIECE) -> float:
    """CPU seconds of reading n random tokens from a fresh state, drawing them not counted."""
    draws, spent = Generator().manual_seed(1), 0.0
    with torch.inference_mode():
        state = model.initial_state(1)
        for _ in range(n // piece):
            tokens = torch.randint(1, 256, (1, piece), generator=draws)
            begin = time.process_time()
            state = model.prefill(tokens, state)
            spent += time.process_time() - begin
    return spent


def slope(name: str) -> float:
    """Slope of log time against log length, by least squares; the shortest of three readings of the short texts."""
    model = model_of(name)
    read(model, SHORT)
    times = {n: min(read(model, n) for _ in range(3 if n <= 2**16 else 1)) for n in LENGTHS}
    xs, ys = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def peak_rss(name: str, n: int) -> int:
    """Peak resident bytes of a process that does nothing but read n tokens."""
    root = str(Path(archbench.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, name, str(n)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return int(told.split()[-1])


def _slope(name: str) -> Trial:
    return Reading(take=partial(slope, name), notes={"lengths": ", ".join(f"{n:,}" for n in LENGTHS)})


def _rss(name: str, long: int) -> Trial:
    """Peak memory of a long text over that of a short one."""
    return Reading(
        take=lambda: peak_rss(name, long) / peak_rss(name, SHORT), notes={"lengths": f"{SHORT:,} and {long:,}"}
    )


def _attention_growth() -> Trial:
    """Exponent with which full attention's peak memory grows with length; importing torch is not part of it."""
    model = model_of("transformer")

    def peak(n: int) -> int:
        return peak_bytes(lambda: partial(read, model, n), torch.device("cpu"))

    return Reading(take=lambda: math.log(peak(4 * MIDDLE) / peak(MIDDLE)) / math.log(4), notes={"from": f"{MIDDLE:,}"})


TARGETS = [
    *(
        Target(
            id=f"prefill/slope-{name}",
            question=f"How does the time that {name} reads grow with length, 4K to 1M tokens?",
            ours=name,
            peer="linear is 1",
            unit="slope",
            must=1.05,
            better="lower",
            turns=1,
            seconds=60,
            prepare=partial(_slope, name),
        )
        for name in ("mamba", "infini_attention", "transformer_xl")
    ),
    *(
        Target(
            id=f"prefill/memory-{name}",
            question=f"How does the peak memory of {name} at 1M tokens compare with that at 4K?",
            ours=name,
            peer="flat is 1",
            unit="of 4K's",
            must=1.05,
            better="lower",
            turns=1,
            seconds=50,
            prepare=partial(_rss, name, LONG),
        )
        for name in ("mamba", "infini_attention", "transformer_xl")
    ),
    Target(
        id="prefill/attention-memory",
        question="How does full attention's memory grow with length, 8K to 32K tokens read in pieces?",
        ours="transformer",
        peer="linear is 1, quadratic 2",
        unit="exponent",
        must=1.1,
        better="lower",
        turns=1,
        seconds=60,
        prepare=_attention_growth,
    ),
]

if __name__ == "__main__":
    import resource

    torch.set_num_threads(1)
    read(model_of(sys.argv[1]), int(sys.argv[2]), SMALL_PIECE)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
