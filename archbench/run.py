"""Runs: a plan carried out, every job ending in records.

Layout of a run's folder (results/<suite> unless said otherwise):

    <start time>-<plan id>.jsonl   the records, one line a quantity; the newest file is the current run
    checkpoints/<address>/         trained cells, shared by all runs of the folder
    logs/                          what workers printed; `begun` names the results files that were begun in this folder
    tuning/                        the trials of a suite that tunes its learning rates, a run of their own

What an earlier run of the folder has answered is carried over, not measured again. Failed jobs are tried again. Results
files that came from elsewhere, as those that a repository holds, answer nothing: their numbers are another machine's.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from archbench import registry
from archbench.checkpoint import is_complete
from archbench.environment import describe, usable_cores
from archbench.errors import ConfigError, suggestion
from archbench.executors import Event, Executor, Task
from archbench.plan import Job, Plan, make_plan
from archbench.record import Record, RecordFile, read
from archbench.suite import Suite
from archbench.tuning import Choices, choose, trials

EXECUTORS = ("inline", "processes", "ray")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a plan is carried out; none of it changes what a cell is.

    `workers` 0 means one a core. `threads` is what each worker computes with; timed metrics use it as well.
    """

    out: Path
    executor: str = "processes"
    workers: int = 0
    threads: int = 1
    device: str = "auto"
    save_every_s: float = 10.0
    command: str = ""


@dataclass
class Outcome:
    """What a run came to: its results file and the number of jobs by status, and how many were carried over."""

    path: Path
    statuses: dict[str, int] = field(default_factory=dict)
    carried: int = 0
    trained: int = 0


def run(plan: Plan, options: Options, watch: Callable[[Event], None] = lambda _event: None) -> Outcome:
    """Carries out `plan`, calling `watch` with events as they come (see `archbench.worker`).

    Raises:
        ConfigError: the executor is not known.
        RecordError: an earlier results file of the folder is damaged.
    """
    return _Run(plan, options, watch).go()


def search(
    suite: Suite, only: Sequence[str], options: Options, carry_out: Callable[[Plan, Options], Outcome]
) -> Choices:
    """The learning rates of a suite with `tuning`, by its trials, which are run in the folder `tuning` of the run; what
    is done there is skipped. Nothing for a suite without.

    Raises:
        SuiteError: the suite or the names in `only` are wrong; before any trial runs.
    """
    if suite.tuning is None:
        return {}
    make_plan(suite, only)
    tried = trials(suite, only)
    if not tried.cells:
        return {}
    plan = make_plan(tried)
    found = read(carry_out(plan, dataclasses.replace(options, out=options.out / "tuning")).path)
    # By what was trained, not by its label: cells that differ in budget alone share their trials, and a suite may call
    # them otherwise than when they were run.
    trained = {(cell.label, cell.key) for cell in plan.cells}
    own = [dataclasses.replace(record, label=label) for label, key in trained for record in found if record.cell == key]
    return choose(suite, own, only)


class _Run:
    def __init__(self, plan: Plan, options: Options, watch: Callable[[Event], None]) -> None:
        self.plan, self.options, self.watch = plan, options, watch
        self.jobs = {job.id: job for job in plan.jobs}
        self.checkpoints = options.out / "checkpoints"
        path, earlier = _results_file(options.out, plan)
        self.file = RecordFile(path)
        self.outcome = Outcome(path)
        answered = _answered(earlier, self.jobs)
        here = {record.job for record in self.file if record.status != "failed"}
        self._count(answered, carried=True)
        carried = [record for job_id, records in answered.items() if job_id not in here for record in records]
        self.file.append(dataclasses.replace(record, run=path.stem, suite=plan.suite.name) for record in carried)
        self.open = {job.id: job for job in plan.jobs if job.id not in answered}

    def go(self) -> Outcome:
        for job in list(self.open.values()):
            if job.reason is not None:
                self._answer(job, [self._record(job, status="unsupported", reason=job.reason)])
        cells = [cell for cell in self.plan.cells if self._pending(cell.address, timed=False) or self._untrained(cell)]
        tasks = [self._cell_task(cell.address) for cell in {cell.address: cell for cell in cells}.values()]
        workers = self.options.workers or usable_cores()
        self._execute([*self._design_tasks(workers), *tasks], workers)
        timing = self._timing_task()
        if timing is not None:
            self._execute([timing], 1)
        for job in list(self.open.values()):
            self._answer(job, [self._record(job, status="failed", reason="its worker ended without an answer")])
        return self.outcome

    def _execute(self, tasks: Sequence[Task], workers: int) -> None:
        if not tasks:
            return
        executor = executor_named(self.options.executor)

        def handle(index: int, event: Event) -> None:
            self._handle(tasks[index], event)

        executor(tasks, handle, workers)

    def _handle(self, task: Task, event: Event) -> None:
        kind = event["event"]
        if kind == "measured":
            self._measured(event)
        elif kind == "failed":
            job = self.open.get(event["job"])
            if job is not None:
                self._answer(job, [self._record(job, status="failed", reason=event["reason"])])
        elif kind == "died":
            for job_id in task["job_ids"]:
                if job_id in self.open:
                    job = self.open[job_id]
                    self._answer(job, [self._record(job, status="failed", reason=event["reason"])])
        elif kind == "trained":
            self.outcome.trained += 1
        self.watch(event)

    def _measured(self, event: Event) -> None:
        job = self.open.get(event["job"])
        if job is None:
            return
        records = []
        for found in event["measurements"]:
            reason = found.pop("reason")
            status = "ok" if found["value"] is not None else "unsupported"
            records.append(
                self._record(
                    job,
                    status=status,
                    reason="" if status == "ok" else reason or "no reason was given",
                    backend=found.pop("backend") or event["backend"],
                    environment=event["environment"],
                    **found,
                )
            )
        self._answer(job, records or [self._record(job, status="failed", reason="the metric measured nothing")])

    def _answer(self, job: Job, records: Sequence[Record]) -> None:
        self.file.append(records)
        self._count({job.id: records})
        del self.open[job.id]

    def _count(self, answered: Mapping[str, Sequence[Record]], carried: bool = False) -> None:
        for records in answered.values():
            statuses = {record.status for record in records}
            status = next(s for s in ("failed", "ok", "unsupported") if s in statuses)
            self.outcome.statuses[status] = self.outcome.statuses.get(status, 0) + 1
            self.outcome.carried += carried

    def _record(self, job: Job, *, status: Any, reason: str, quantity: str = "*", **found: Any) -> Record:
        cell, metric = job.cell, registry.metric(job.metric)
        meaning = metric.quantities.get(quantity)
        assert meaning is not None or quantity == "*", f"{job.metric} does not declare the quantity {quantity}"
        return Record(
            suite=self.plan.suite.name,
            run=self.file.path.stem,
            job=job.id,
            cell=cell.key,
            checkpoint=cell.address,
            label=cell.label,
            architecture=cell.architecture,
            size=cell.size,
            codec=cell.codec,
            corpus=cell.corpus,
            seed=cell.seed,
            metric=job.metric,
            metric_version=metric.version,
            quantity=quantity,
            unit=meaning.unit if meaning else "",
            better=meaning.better if meaning else "neither",
            status=status,
            reason=reason,
            settings=dataclasses.asdict(job.settings),
            config={
                "model": dataclasses.asdict(cell.config),
                "training": dataclasses.asdict(cell.training),
                "match": cell.match,
                "residual": cell.residual,
                **({"start_from": cell.start_from, "start_sha256": cell.start_sha256} if cell.start_from else {}),
                **({"tuning": cell.tuning} if cell.tuning else {}),
            },
            data_sha256=cell.corpus_sha256,
            source_sha256=cell.training_source,
            environment=found.pop("environment", None) or describe(),
            command=self.options.command,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **found,
        )

    def _pending(self, address: str, *, timed: bool) -> list[Job]:
        return [job for job in self.open.values() if job.trained and job.cell.address == address and job.timed == timed]

    def _untrained(self, cell: Any) -> bool:
        needed = any(cell.address in job.beside.values() for job in self.open.values())
        asked = needed or bool(self._pending(cell.address, timed=True))
        return asked and not is_complete(self.checkpoints / cell.address)

    def _cell_task(self, address: str) -> Task:
        jobs = self._pending(address, timed=False)
        cell = next(cell for cell in self.plan.cells if cell.address == address)
        return {
            **self._common(address),
            "kind": "cell",
            "cell": cell.to_dict(),
            "address": address,
            "jobs": [_job_data(job) for job in jobs],
            "job_ids": [job.id for job in jobs],
        }

    def _design_tasks(self, workers: int) -> list[Task]:
        """What needs no weights, dealt out evenly: a process a cell would take longer to start than to answer."""
        jobs = [job for job in self.open.values() if not job.trained]
        most = -(-len(jobs) // workers)
        hands = [jobs[first : first + most] for first in range(0, len(jobs), max(1, most))]
        return [
            {
                **self._common(f"designs-{number}"),
                "kind": "designs",
                "jobs": [{**_job_data(job), "cell": job.cell.to_dict()} for job in hand],
                "job_ids": [job.id for job in hand],
            }
            for number, hand in enumerate(hands, start=1)
        ]

    def _timing_task(self) -> Task | None:
        """All timed jobs whose cells were trained; the others get the reason."""
        groups: dict[str, list[Job]] = {}
        for job in [job for job in self.open.values() if job.timed]:
            if is_complete(self.checkpoints / job.cell.address):
                groups.setdefault(job.metric, []).append(job)
            else:
                self._answer(job, [self._record(job, status="failed", reason="the cell was not trained")])
        if not groups:
            return None
        return {
            **self._common("timing"),
            "kind": "timing",
            "groups": [
                {
                    "metric": name,
                    "settings": dataclasses.asdict(jobs[0].settings),
                    "jobs": [
                        {
                            **_job_data(job),
                            "cell": job.cell.to_dict(),
                            "address": job.cell.address,
                            "beside": dict(job.beside),
                        }
                        for job in jobs
                    ],
                }
                for name, jobs in groups.items()
            ],
            "job_ids": [job.id for jobs in groups.values() for job in jobs],
        }

    def _common(self, name: str) -> Task:
        return {
            "corpora": sorted({cell.corpus for cell in self.plan.cells}),
            "checkpoints": str(self.checkpoints),
            "log": str(self.options.out / "logs" / f"{name}.log"),
            "threads": self.options.threads,
            "device": self.options.device,
            "save_every_s": self.options.save_every_s,
        }


def executor_named(name: str) -> Executor:
    """The executor of that name. Raises ConfigError when there is none."""
    if name not in EXECUTORS:
        raise ConfigError(f"--executor {name}: not known; {suggestion(name, EXECUTORS)}")
    return importlib.import_module(f"archbench.executors.{name}").run


def _job_data(job: Job) -> dict[str, Any]:
    return {"id": job.id, "metric": job.metric, "settings": dataclasses.asdict(job.settings)}


def _results_file(out: Path, plan: Plan) -> tuple[Path, list[Path]]:
    """The plan's results file, new or begun earlier, and all that were begun in the folder, oldest first."""
    ledger = out / "logs" / "begun"
    names = ledger.read_text(encoding="utf-8").split() if ledger.exists() else []
    files = sorted(path for path in (out / name for name in names) if path.exists())
    own = [path for path in files if path.stem.endswith(f"-{plan.id}")]
    if own:
        return own[-1], files
    start = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    path = out / f"{start}-{plan.id}.jsonl"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("a", encoding="utf-8") as begun:
        begun.write(f"{path.name}\n")
    return path, files


def _answered(files: Iterable[Path], jobs: dict[str, Job]) -> dict[str, list[Record]]:
    """The newest complete answers to these jobs found in results files."""
    answers: dict[str, list[Record]] = {}
    for path in files:
        records = read(path) if path.stat().st_size else []
        found: dict[str, list[Record]] = {}
        for record in records:
            if record.job in jobs:
                found.setdefault(record.job, []).append(record)
        answers.update({job: records for job, records in found.items() if records[-1].status != "failed"})
    return answers
