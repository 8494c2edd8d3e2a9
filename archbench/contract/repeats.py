"""Promises about repetition: the same seed gives the same model, and a saved model is the same model."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Generator, Tensor

from archbench.contract.subject import Candidate, Finding, found, gap, read, sequel, train, train_phase, written
from archbench.sampling import PLAIN


def save_and_load(subject: Candidate) -> Finding:
    """Saved as safetensors and loaded into a model of another seed, it writes and predicts the same, bit for bit."""
    model, other = subject.model(), subject.fresh(subject.seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        try:
            save_model(model, str(path))
            load_model(other, str(path))
        except RuntimeError as error:  # tensors that overlap in part, or names that do not match
            return found("save_and_load", False, str(error).splitlines()[0])
    prompt = subject.prompt(2)
    worst = gap(*(sequel(subject, m, read(m, prompt)) for m in (model, other)))
    n_tensors = len(model.state_dict())
    return found("save_and_load", worst == 0, f"{n_tensors} tensors; largest difference {worst:.1e}, allowed 0")


def same_seed_same_result(subject: Candidate) -> Finding:
    """Equal seeds give equal weights, losses and texts, bit for bit, whatever the global random states hold; another
    seed gives other first weights."""
    with _global_states_restored():
        runs = [_history(subject, global_seed) for global_seed in (1, 2)]
    for name, value in runs[0].items():
        if not torch.equal(value, runs[1][name]):
            return found("same_seed_same_result", False, f"two runs with one seed differ in {name}")
    one, two = subject.fresh(), subject.fresh(subject.seed + 1)
    parameters = dict(one.named_parameters())
    if parameters and all(torch.equal(parameters[name], other) for name, other in two.named_parameters()):
        return found("same_seed_same_result", False, "another seed gives the same first weights")
    return found("same_seed_same_result", True, f"{len(parameters)} parameters, losses and texts are bit-equal")


def no_global_randomness(subject: Candidate) -> Finding:
    """Training, reading and writing leave the global random states of torch and numpy alone. (Building may draw from
    them, as torch's own layers do, so long as the model does not depend on it: see `same_seed_same_result`.)"""
    stages = {}
    model = subject.fresh()
    before = _global_states()
    train(model, subject.windows(4), steps_each_phase=2, learning_rate=1e-3)
    stages["training"] = _global_states()
    written(model, read(model, subject.prompt(2)), subject.probe_length, PLAIN, Generator().manual_seed(6))
    stages["writing"] = _global_states()
    for stage, states in stages.items():
        for library, state in states.items():
            if state != before[library]:
                return found("no_global_randomness", False, f"{stage} draws from the global random state of {library}")
    return found("no_global_randomness", True, f"untouched by {', '.join(stages)}")


def _history(subject: Candidate, global_seed: int) -> dict[str, Tensor]:
    """First weights, losses, trained weights and a drawn text, by name, with the global generators seeded otherwise."""
    torch.manual_seed(global_seed)
    np.random.seed(global_seed)
    random.seed(global_seed)
    model = subject.fresh()
    history = {f"first {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for phase in model.phases():
        losses = train_phase(model, phase, subject.windows(3), steps=3, learning_rate=1e-2)
        history[f"losses of phase {phase.name}"] = torch.tensor(losses, dtype=torch.float64)
    history |= {f"trained {name}": tensor for name, tensor in model.state_dict().items()}
    state = read(model, subject.prompt(2))
    history["a drawn text"] = written(model, state, subject.probe_length, PLAIN, Generator().manual_seed(5))
    return history


@contextmanager
def _global_states_restored() -> Iterator[None]:
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def _global_states() -> dict[str, bytes]:
    # Python's own is left out, since type checkers draw from it; its use shows as two runs that differ.
    numpy_state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr((numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"])).encode(),
    }
