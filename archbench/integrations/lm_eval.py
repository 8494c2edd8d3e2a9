"""Evaluates a checkpoint with EleutherAI's lm-evaluation-harness (`lm_eval`), through its Python API.

What the model cannot answer is refused before anything runs: a model without likelihood answers no likelihood task, and
no task is run that would execute generated code outside a sandbox.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from archbench import checkpoint
from archbench.cell import Cell
from archbench.environment import describe
from archbench.errors import CheckpointError, MissingExtra, UnsupportedError
from archbench.integrations import lm_eval_tasks
from archbench.integrations.lm_eval_answers import Respondent, writing
from archbench.metrics.likelihood import NO_LIKELIHOOD

BOOTSTRAPS = 1000
"""Resamples behind a standard error that has no formula; lm-eval's own 100,000 take minutes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to evaluate.

    Attributes:
        limit: only the first documents of each task; for trying out.
        num_fewshot: shots for tasks that do not fix theirs, None for each task's own.
        context: tokens of a rolling window, None for the context of the training.
        state: the rule of rolling tasks: reset, sliding or carried.
        device: auto, cpu, cuda or cuda:N.
        seed: of what is drawn.
        command: what the user typed, for the record.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    context: int | None = None
    state: str = "reset"
    device: str = "auto"
    seed: int = 0
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one task over `n` documents. `stderr` is None where lm-eval gives none."""

    task: str
    shots: int | None
    n: int | None
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """lm-eval's results as they are, where they come from, and what the user should know."""

    results: dict[str, Any]
    provenance: dict[str, Any]
    notices: list[str]

    def scores(self) -> list[Score]:
        """Every number, in lm-eval's order, groups after their tasks."""
        found = []
        for task, values in self.results["results"].items():
            better = self.results.get("higher_is_better", {}).get(task, {})
            for key, value in values.items():
                metric, comma, kind = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                    continue
                error = values.get(f"{metric}_stderr,{kind}")
                found.append(
                    Score(
                        task=task,
                        shots=self.results["n-shot"].get(task),
                        n=self.results["n-samples"].get(task, {}).get("effective"),
                        metric=metric if kind == "none" else f"{metric} ({kind})",
                        value=float(value),
                        stderr=float(error) if isinstance(error, (int, float)) else None,
                        higher_is_better=better.get(metric),
                    )
                )
        return found

    def save(self, path: Path) -> None:
        """lm-eval's JSON with our provenance under "archbench"."""
        from lm_eval.utils import handle_non_serializable

        body = {**self.results, "archbench": self.provenance}
        checkpoint.write_text(path, json.dumps(body, indent=2, ensure_ascii=False, default=handle_non_serializable))


def evaluate(folder: Path, tasks: Sequence[str], options: Options) -> Evaluation:
    """Runs lm-eval's tasks on the model of a checkpoint folder; `lm_eval_tasks` says how they are named.

    Raises:
        MissingExtra: lm-eval is not installed.
        UnsupportedError: the model cannot answer a task, or a task would run generated code unprotected.
        ArchbenchError: the checkpoint, a task or a text cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtra("lm-eval: the package is not installed; pip install 'archbench[lm-eval]'")
    cell = _cell(folder)
    respondent = load(folder, options)
    asked = lm_eval_tasks.sort_out(tasks, cell, respondent.codec)
    if asked.local:
        lm_eval_tasks.stay_offline()
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would bootstrap in forks of a process that has threads
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from archbench.integrations.lm_eval_model import ArchbenchLM

    with redirect_stdout(sys.stderr):  # lm-eval prints as it goes
        loaded = lm_eval_tasks.load(asked)
        for task in _flat(loaded):
            refuse(task, respondent)
        results = simple_evaluate(
            model=ArchbenchLM(respondent),
            tasks=loaded,
            task_manager=TaskManager(include_defaults=False),  # nothing is left to be found
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    return Evaluation(
        results=results, provenance=_provenance(folder, cell, respondent, options), notices=_notices(respondent)
    )


def load(folder: Path, options: Options) -> Respondent:
    """The model of a checkpoint folder, ready to answer; `lm_eval_model.ArchbenchLM` makes lm-eval's model of it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or came without a codec.
        ConfigError: an option is impossible.
    """
    cell, device = _cell(folder), options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    traits = checkpoint.load_traits(folder)
    trained = cell.training.context if cell else traits.context_limit
    return Respondent(
        model=checkpoint.load_model(folder, device),
        traits=traits,
        codec=checkpoint.load_own_codec(folder),
        window=options.context or trained,
        rule=options.state,
        seed=options.seed,
    )


def refuse(task: Any, respondent: Respondent) -> None:
    """Raises what makes the model unable to answer a task of lm-eval, before anything runs.

    Raises:
        UnsupportedError: the task needs a likelihood and the model has none, or it runs code unprotected.
        ConfigError: its options for writing are not understood.
    """
    name, kind = task.task_name, task.OUTPUT_TYPE
    if getattr(task, "UNSAFE_CODE", False):  # lm-eval itself looks for it like this
        raise UnsupportedError(
            f"lm-eval: task {name} runs what the model writes outside of any sandbox; for mbpp use mbpp:PATH"
        )
    if kind == "generate_until":
        writing(task.config.generation_kwargs or {}, f"lm-eval: task {name}")
    elif not respondent.traits.likelihood:
        raise UnsupportedError(f"lm-eval: task {name} ({kind}): {NO_LIKELIHOOD}; tasks of generate_until can be run")
    elif kind == "loglikelihood_rolling":
        respondent.require_window()


def _flat(loaded: Sequence[Any]) -> list[Any]:
    from lm_eval.api.group import Group

    return [task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]


def _origin(folder: Path) -> Mapping[str, Any]:
    path = folder / checkpoint.ORIGIN
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); train or import the checkpoint again") from None


def _cell(folder: Path) -> Cell | None:
    """What the checkpoint was trained as; None for an imported or converted one."""
    origin = _origin(folder)
    return Cell.from_dict(origin["cell"], str(folder / checkpoint.ORIGIN)) if "cell" in origin else None


def _provenance(folder: Path, cell: Cell | None, respondent: Respondent, options: Options) -> dict[str, Any]:
    architecture, config = checkpoint.load_config(folder)
    return {
        "checkpoint": str(folder),
        "weights_sha256": checkpoint.weights_sha256(folder),
        "architecture": architecture,
        "config": dataclasses.asdict(config),
        "cell": cell.to_dict() if cell else None,
        "codec": respondent.codec.name,
        "window": respondent.window,
        "options": dataclasses.asdict(options),
        "command": options.command,
        "environment": describe(),
    }


def _notices(respondent: Respondent) -> list[str]:
    if not respondent.cut:
        return []
    return [
        f"{respondent.cut:,} contexts or prompts were longer than the model's context limit of "
        f"{respondent.traits.context_limit} tokens allows and lost their beginning"
    ]
