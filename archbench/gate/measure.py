"""A suite measured for the gate: only the metrics that it looks at, in this process, in a folder that goes away."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from archbench import registry
from archbench.errors import GateError
from archbench.executors import Event
from archbench.gate.lockstep import Item
from archbench.gate.quantities import gated_metrics
from archbench.plan import Plan, make_plan
from archbench.record import Record, read
from archbench.run import Options, run
from archbench.suite import Suite, load_suite

MOST_NEW_TOKENS = 16


def gated_plan(name: str, changes: Sequence[str] = (), only: Sequence[str] = ()) -> Plan:
    """The plan of a suite's part that the gate looks at. Raises GateError when there is none."""
    suite = load_suite(name, changes)
    metrics = gated_metrics(list(suite.metrics))
    if not metrics:
        raise GateError(f"{suite.path}: measures nothing that the gate looks at; add the metrics cost and fingerprint")
    cells = [_kept(cell, metrics) for cell in suite.cells]
    kept = {metric: suite.metrics[metric] for metric in metrics}
    return make_plan(dataclasses.replace(suite, metrics=kept, cells=cells), only)


def measure(plan: Plan, threads: int = 1, watch: Callable[[Event], None] = lambda _event: None) -> list[Record]:
    """The records of a plan."""
    with tempfile.TemporaryDirectory(prefix="archbench-gate-") as folder:
        outcome = run(plan, Options(out=Path(folder), executor="inline", threads=threads), watch)
        return read(outcome.path)


def timed_items(name: str, changes: Sequence[str] = (), only: Sequence[str] = ()) -> list[Item]:
    """What tier 2 times: a training step, reading and writing, of the cells that the suite itself asks a timed metric
    of, one seed each. Prompts are as long as the longest that it times."""
    suite = load_suite(name, changes)
    plan = make_plan(suite, only)
    items: dict[str, Item] = {}
    for cell in plan.cells:
        timed = [metric for metric in cell.metrics if registry.metric(metric).timed]
        if not timed or cell.pretrained:
            continue
        training, prompt = cell.training, _longest(suite, timed, cell.training.context)
        works = [
            ("training", training.context, training.batch),
            ("prefill", prompt, 1),
            ("decode", prompt, 1),
        ]
        for work, context, batch in works:
            title = f"{cell.label}/{cell.size} {work}"
            items[title] = Item(
                name=title,
                architecture=cell.architecture,
                config=dataclasses.asdict(cell.config),
                work=work,
                context=context,
                batch=batch,
                new_tokens=MOST_NEW_TOKENS,
            )
    return list(items.values())


def _longest(suite: Suite, timed: Sequence[str], otherwise: int) -> int:
    given = [(suite.metrics.get(metric) or {}).get("contexts") or [otherwise] for metric in timed]
    return max(max(contexts) for contexts in given)


def _kept(cell: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    own = cell.get("metrics")
    return cell if own is None else {**cell, "metrics": [metric for metric in own if metric in metrics]}
