"""The timed side of a lock-step comparison: a process that does one step of a named work whenever it is asked.

This file runs by itself, in the folder of the version to be timed, and imports archbench from there: both versions are
timed by the same file, whatever they hold. It must not import from `archbench.gate`.

It reads one JSON request a line and answers each with one line:

    {"prepare": NAME, "item": {...}}     builds a model and its input        {"ready": NAME, "dropped": [...]}
    {"step": NAME, "repeat": N}          does the work N times               {"cpu": seconds, "wall": seconds}
    {"forget": NAME}                     lets the model go                   {"forgot": NAME}

or with {"error": REASON}. The first line, unasked, is {"package": FOLDER, "torch": VERSION}. An item has
`architecture`, `config` (plain data), `work` ("training", "prefill" or "decode"), `context`, `batch` and `new_tokens`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import archbench  # isort: skip (before torch, so that it is known at once whether it is there)
import torch


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stray prints must not mix with answers
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def answer(data: dict[str, Any]) -> None:
        out.write(json.dumps(data) + "\n")
        out.flush()

    answer({"package": str(Path(archbench.__file__).resolve().parent), "torch": torch.__version__})
    works: dict[str, Any] = {}
    gc.disable()  # a collection takes longer than many a step; there is one before each work
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(serve(request, works))
        except Exception as error:  # whatever a version raises is its answer
            first_line = (str(error).splitlines() or ["no message"])[0]
            answer({"error": f"{type(error).__name__}: {first_line}"})
    os._exit(0)  # nothing is left to save, and taking torch down takes seconds on a busy machine


def serve(request: dict[str, Any], works: dict[str, Any]) -> dict[str, Any]:
    if "prepare" in request:
        works[request["prepare"]], dropped = prepare(request["item"])
        gc.collect()
        return {"ready": request["prepare"], "dropped": dropped}
    if "forget" in request:
        del works[request["forget"]]
        return {"forgot": request["forget"]}
    return timed(works[request["step"]], request["repeat"])


def timed(work: Any, repeat: int) -> dict[str, Any]:
    """CPU time of all threads of this process, and wall time."""
    ready, go = work
    given = [ready() for _ in range(repeat)]
    wall, cpu = time.perf_counter(), time.process_time()
    for one in given:
        go(one)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def prepare(item: dict[str, Any]) -> tuple[Any, list[str]]:
    """(what makes one step's input, the step), and the keys of the config that this version does not know."""
    from archbench import registry
    from archbench.parse import parse

    architecture = registry.architecture(item["architecture"])
    known = {field.name for field in dataclasses.fields(architecture.config)}
    given = {name: value for name, value in item["config"].items() if name in known}
    config = parse(architecture.config, given, "config")
    model = architecture.build(config, torch.Generator().manual_seed(0))
    traits = architecture.traits(config)
    make = {"training": training, "prefill": prefill, "decode": decode}[item["work"]]
    return make(model, traits, item), sorted(item["config"].keys() - known)


def tokens_of(model: Any, rows: int, n: int) -> Any:
    return torch.randint(1, model.vocab_size, (rows, n), generator=torch.Generator().manual_seed(0))


def training(model: Any, traits: Any, item: dict[str, Any]) -> Any:
    """One step of every phase: loss, backward, clipping and AdamW."""
    from archbench.model import Batch, parameters_of

    rows = tokens_of(model, item["batch"], item["context"] + traits.lookahead)
    model.train()
    phases = [(phase, list(parameters_of(phase))) for phase in model.phases()]
    optimizers = [torch.optim.AdamW(own, lr=1e-5, fused=True) if own else None for _, own in phases]

    def go(_: Any) -> None:
        for (phase, own), optimizer in zip(phases, optimizers, strict=True):
            chosen = {id(parameter) for parameter in own}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
            loss = phase.loss(Batch(rows, 0.0, torch.Generator().manual_seed(0))).value
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(own, 1.0)
                optimizer.step()

    return (lambda: None), go


def prefill(model: Any, traits: Any, item: dict[str, Any]) -> Any:
    from archbench.generation import aligned

    prompt = aligned(tokens_of(model, item["batch"], item["context"]), traits.stride)
    model.eval()

    def ready() -> Any:
        with torch.inference_mode():
            return model.initial_state(item["batch"])

    def go(state: Any) -> None:
        with torch.inference_mode():
            model.prefill(prompt, state)

    return ready, go


def decode(model: Any, traits: Any, item: dict[str, Any]) -> Any:
    """Decode steps after a prompt until `new_tokens` could have been written one stride a step."""
    from archbench.generation import aligned
    from archbench.sampling import PLAIN
    from archbench.state import copy_state

    prompt = aligned(tokens_of(model, item["batch"], item["context"]), traits.stride)
    model.eval()
    with torch.inference_mode():
        read = model.prefill(prompt, model.initial_state(item["batch"]))
    steps = -(-item["new_tokens"] // traits.stride)

    def ready() -> Any:
        with torch.inference_mode():
            return copy_state(read)

    def go(state: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for _ in range(steps):
                state = model.decode_step(state, PLAIN, generator).state

    return ready, go


if __name__ == "__main__":
    main()
