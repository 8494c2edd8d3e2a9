"""What people see in a terminal: progress while a run goes on, and tables of plans, outcomes and findings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from archbench.environment import usable_cores

if TYPE_CHECKING:
    from archbench.bench.target import Target
    from archbench.cell import Cell
    from archbench.claims.claim import Claims
    from archbench.claims.judge import Outcome as Judged
    from archbench.code_eval import Summary
    from archbench.contract import Finding
    from archbench.conversion import Converted
    from archbench.doctor import Fact
    from archbench.executors import Event
    from archbench.export import Exported
    from archbench.gate.noise import Noise
    from archbench.gate.verdict import Comparison
    from archbench.integrations.huggingface import ImportedModel
    from archbench.integrations.lm_eval import Evaluation
    from archbench.plan import Plan
    from archbench.record import Record
    from archbench.report import ReportFiles
    from archbench.report.choice import Decision
    from archbench.run import Options, Outcome
    from archbench.sandbox import Sandbox
    from archbench.tuning import Choices

console = Console(highlight=False, markup=False)  # messages hold square brackets of their own


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 1.23 M, 45.6 k."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    exponent = min(5, max(0, int(math.log10(abs(value)) // 3)))
    return f"{value / 1000**exponent:.3g} {'kMGTP'[exponent - 1] if exponent else ''}{unit}".strip()


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def print_plan(plan: Plan, threads: int, trials: Plan | None = None) -> None:
    """The cells with their estimates, then the jobs that do not exist with the reasons; `trials` of learning rates come
    before."""
    from archbench.estimate import estimate, training_memory

    console.print(f"{plan.suite.name}: {plan.suite.description}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("cell", "parameters", "steps", "training", "memory", "time"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    total, basis = 0.0, set()
    trained = plan.trained_cells
    for cells in _but_for_seeds(trained):
        cell = cells[0]
        cost = estimate(cell, threads)
        total += len(cells) * cost.seconds
        basis.add(cost.basis)
        table.add_row(
            f"{cell.label}\n{cell.size}, " + (f"{len(cells)} seeds" if len(cells) > 1 else f"seed {cell.seed}"),
            f"{quantity(cost.parameters)}\n{cell.residual:+.1%}",
            "" if cost.steps is None else f"{cost.steps:,}",
            quantity(cost.training_flops, "FLOP"),
            quantity(training_memory(cell), "B"),
            duration(cost.seconds),
        )
    if trained:
        console.print(table)
        console.print(
            f"{len(trained)} cells, {len(plan.jobs)} jobs. Training takes about {duration(total)} of one worker "
            f"({' and '.join(sorted(basis))}; measuring comes on top), {duration(total / usable_cores())} on "
            f"{usable_cores()} cores. Below the parameters: how far {plan.suite.match} lie from the size asked for. "
            "Training, memory and time are of one seed.",
            soft_wrap=True,
        )
    if trials is not None:
        tried = trials.trained_cells
        seconds = sum(len(group) * estimate(group[0], threads).seconds for group in _alike(tried))
        console.print(
            f"Before them {len(tried)} trials of learning rates: about {duration(seconds)} of one worker.",
            soft_wrap=True,
        )
    addresses = {cell.address for cell in trained}
    counted = list(dict.fromkeys(cell.name() for cell in plan.cells if cell.address not in addresses))
    if counted:
        console.print(f"{len(counted)} cells are not trained: {', '.join(counted)}", soft_wrap=True)
    _print_notices(plan)
    unsupported: dict[tuple[str, str], dict[str, None]] = {}
    for job in plan.jobs:
        if job.reason:
            unsupported.setdefault((job.metric, job.reason), {})[job.cell.label] = None
    for (metric, reason), labels in unsupported.items():
        console.print(f"unsupported: {metric} on {', '.join(labels)}: {reason}", soft_wrap=True)


def _but_for_seeds(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that differ in nothing but the seed, together."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.label, cell.size, cell.codec, cell.corpus), []).append(cell)
    return list(found.values())


def _alike(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that take as long: they differ in label, seed and learning rate at most."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        same = (cell.architecture, cell.config, cell.codec, dataclasses.replace(cell.training, learning_rate=1.0))
        found.setdefault(repr(same), []).append(cell)
    return list(found.values())


def _print_notices(plan: Plan) -> None:
    for notice in plan.notices:
        console.print(f"note: {notice}", soft_wrap=True)


def print_estimate(plan: Plan, options: Options) -> None:
    """What was left out, and one line on what is left to do, before it starts."""
    from archbench.checkpoint import is_complete
    from archbench.estimate import estimate

    _print_notices(plan)
    trained = plan.trained_cells
    if not trained:
        console.print(f"{plan.suite.name}: {len(plan.cells)} cells to measure; none is trained.")
        return
    left = [cell for cell in trained if not is_complete(options.out / "checkpoints" / cell.address)]
    if not left:
        console.print(f"{plan.suite.name}: all {len(trained)} cells are trained; measuring what is new.")
        return
    seconds = []
    for cells in _alike(left):
        seconds += [estimate(cells[0], options.threads).seconds] * len(cells)
    workers = min(options.workers or usable_cores(), len(left))
    longest = max(max(seconds), sum(seconds) / workers)
    console.print(
        f"{plan.suite.name}: {len(left)} of {len(trained)} cells to train on {workers} worker(s), about "
        f"{duration(longest)}; then measuring. Ctrl-C loses nothing: the same command goes on."
    )


def print_power(delta: float, seeds: Sequence[int], spread: Mapping[str, float]) -> None:
    """How many seeds a difference needs at each size, and what the suite's own seeds can resolve."""
    from archbench.seeds import CONFIDENCE, MOST, POWER, needed, resolvable

    table = Table(title=f"A difference of {delta:g} bits per byte", title_justify="left")
    for column in ("size", "spread of paired differences", "seeds needed", f"resolved by {len(seeds)} seed(s)"):
        table.add_column(column, justify="left" if column == "size" else "right")
    for size, sd in spread.items():
        n, least = needed(sd, delta), resolvable(sd, len(seeds))
        wanted = f"more than {MOST}" if n is None else str(n)
        table.add_row(size, f"{sd:.3g}", wanted, "nothing" if math.isinf(least) else f"{least:.3g}")
    console.print(table)
    console.print(
        f"Found with {POWER:.0%} power by a paired t-test at {CONFIDENCE:.0%} confidence. The spread is that of one "
        "seed's difference between two architectures, pooled over all pairs of a size.",
        soft_wrap=True,
    )


def print_choices(choices: Choices) -> None:
    """What the trials of learning rates came to, a line each; nothing where there were none."""
    for (label, size), choice in choices.items():
        curve = ", ".join(
            f"{rate:g}: {'failed' if value is None else f'{value:.3f}'}" for rate, value in choice.results.items()
        )
        place = f"{label}/{size}" if size else label
        taken = f"void: {choice.void}" if choice.void else f"{choice.learning_rate:g}"
        console.print(f"learning rate of {place}: {taken} ({choice.quantity} at {curve})", soft_wrap=True)


class Watch:
    """Progress bars of a run, one a cell, and notices as they come. Use as a context and call it with events."""

    def __init__(self, plan: Plan) -> None:
        self.names = {cell.address: cell.name() for cell in plan.cells}
        self.jobs = {job.id: f"{job.metric} on {job.cell.name()}" for job in plan.jobs}
        self.notices: set[str] = set()
        self.bars: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )

    def __enter__(self) -> Watch:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "progress":
            speed, left = quantity(event["tokens_per_s"], "token/s"), duration(event["seconds_left"])
            note = f"{event['phase']} {event['loss']:.3f} nat  {speed}  {left} left"
            self._show(event["cell"], self.names[event["cell"]], event["done"], note)
        elif kind == "trained":
            self._show(event["cell"], self.names[event["cell"]], 1.0, "trained")
        elif kind == "counting":
            self._show(event["log"], "counted, not trained", event["done"], "")
        elif kind == "timing":
            self._show(event["metric"], event["metric"], event["done"], "alone on the machine")
        elif kind == "notice":
            if event["text"] not in self.notices:
                self.notices.add(event["text"])
                self.progress.console.print(f"note: {event['text']}", soft_wrap=True)
        elif kind == "failed":
            self.progress.console.print(f"failed: {self.jobs.get(event['job'])}: {event['reason']}", soft_wrap=True)
        elif kind == "died":
            self.progress.console.print(f"failed: {event['reason']}", soft_wrap=True)

    def _show(self, key: str, name: str, done: float, note: str) -> None:
        if key not in self.bars:
            self.bars[key] = self.progress.add_task(name, total=1.0, note="")
        self.progress.update(self.bars[key], completed=done, note=note)


def print_outcome(outcome: Outcome) -> None:
    parts = [f"{count} {status}" for status, count in sorted(outcome.statuses.items())]
    carried = f" ({outcome.carried} from before)" if outcome.carried else ""
    console.print(f"jobs: {', '.join(parts)}{carried}; cells trained now: {outcome.trained}")
    console.print(f"records: {outcome.path}", soft_wrap=True)


def print_report(files: ReportFiles) -> None:
    console.print(f"report: {files.html}\n        {files.markdown}", soft_wrap=True)


def print_exported(exported: Exported) -> None:
    print_notes(exported.notices)
    console.print(f"{exported.count:,} {exported.what}: {', '.join(map(str, exported.paths))}", soft_wrap=True)


def print_card(name: str, findings: Sequence[Finding]) -> None:
    """An architecture's conformance card."""
    colours = {"holds": "green", "broken": "red", "does not apply": "dim"}
    table = Table(title=f"{name}: conformance", title_justify="left")
    table.add_column("promise")
    table.add_column("verdict")
    table.add_column("evidence", overflow="fold")
    for finding in findings:
        colour = colours[finding.verdict]
        table.add_row(finding.name, Text(finding.verdict, style=colour), finding.detail)
    console.print(table)


def print_findings(facts: Iterable[Fact]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(fact.name, fact.finding)
    console.print(table)


def print_import(imported: ImportedModel, folder: Path) -> None:
    n_parameters = sum(tensor.numel() for tensor in imported.state_dict.values())
    console.print(
        f"imported {imported.facts['model_type']} as {imported.architecture}, {quantity(n_parameters)} parameters, "
        f"into {folder}",
        soft_wrap=True,
    )


def print_conversion(converted: Converted, folder: Path) -> None:
    more = converted.n_parameters - converted.n_parameters_before
    console.print(
        f"converted {converted.source} to {converted.architecture}, {quantity(converted.n_parameters)} parameters "
        f"({more:+,}), into {folder}",
        soft_wrap=True,
    )


def print_evaluation(evaluation: Evaluation) -> None:
    """The numbers of lm-eval's tasks, then what to know about them."""
    table = Table(box=None, pad_edge=False)
    for column in ("task", "shots", "n", "metric", "better", "value", "stderr"):
        right = column in ("shots", "n", "value", "stderr")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    better = {True: "higher", False: "lower", None: ""}
    for score in evaluation.scores():
        table.add_row(
            score.task,
            "" if score.shots is None else str(score.shots),
            "" if score.n is None else f"{score.n:,}",
            score.metric,
            better[score.higher_is_better],
            f"{score.value:.6g}",
            "–" if score.stderr is None else f"± {score.stderr:.2g}",
        )
    console.print(table)
    for notice in evaluation.notices:
        console.print(f"note: {notice}", soft_wrap=True)


JUDGING_S = 0.03
"""What a completion of MBPP takes on one core: measured on the reference solutions, one of which takes 3 s."""


def print_judging_estimate(n_samples: int, n_before: int, sandbox: Sandbox, workers: int) -> None:
    """What is about to be judged, in which sandbox, and how long it may take."""
    left = n_samples - n_before
    before = f"{n_before:,} are judged already; " if n_before else ""
    console.print(
        f"{before}{left:,} completions to judge on {workers} worker(s), sandbox: {sandbox.rung}. About "
        f"{duration(left * JUDGING_S / workers)} if they are like MBPP's solutions, at most "
        f"{duration(left * sandbox.limits.wall_s / workers)} if none comes to an end. "
        "Ctrl-C loses nothing: the same command goes on.",
        soft_wrap=True,
    )


def counting(what: str, total: int) -> Progress:
    """A progress bar of things done one by one; use as a context, and advance its only task."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    progress.add_task(what, total=total)
    return progress


def print_judged(summary: Summary, path: Path) -> None:
    """pass@k with intervals, what came of the completions, and where it is written."""
    table = Table(box=None, pad_edge=False)
    for column in ("quantity", "value", "95 % interval over problems"):
        table.add_column(column)
    for estimate in summary.estimates:
        interval = estimate.interval
        bounds = "one problem has none" if interval is None else f"[{interval.low:.4f}, {interval.high:.4f}]"
        table.add_row(f"pass@{estimate.k}", f"{estimate.value:.4f}", bounds)
    console.print(table)
    said = ", ".join(f"{count:,} {kind}" for kind, count in summary.results.items())
    console.print(f"{summary.n_samples:,} completions of {summary.n_problems:,} problems: {said}", soft_wrap=True)
    console.print(f"sandbox: {', '.join(summary.sandboxes)}\nresults: {path}", soft_wrap=True)


def print_notes(notes: Iterable[object]) -> None:
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)


def print_lists(kinds: Sequence[str]) -> None:
    """What there is of each kind, with a line on each."""
    for kind in kinds:
        table = Table(title=kind, title_justify="left", show_header=kind == "sizes", box=None, pad_edge=False)
        rows = _LISTS[kind]()
        for heading in next(rows):
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def _architectures() -> Iterable[tuple[str, ...]]:
    from archbench import registry

    yield ("name", "source")
    for name in registry.architectures():
        yield (name, registry.architecture(name).paper)


def _metrics() -> Iterable[tuple[str, ...]]:
    from archbench import registry

    yield ("metric", "quantity", "meaning")
    for name in registry.metrics():
        for quantity_name, meaning in registry.metric(name).quantities.items():
            yield (name, f"{quantity_name} [{meaning.unit}]", meaning.meaning)


def _tasks() -> Iterable[tuple[str, ...]]:
    from archbench import registry

    yield ("name", "what", "source")
    for name in registry.tasks():
        found = registry.task(name)
        yield (name, found.summary, found.paper)


def _suites() -> Iterable[tuple[str, ...]]:
    from archbench.suite import available, load_suite

    yield ("name", "description")
    for name in available():
        yield (name, load_suite(name).description)


def _corpora() -> Iterable[tuple[str, ...]]:
    from archbench.data.sources import find_source, source_names

    yield ("name", "what")
    for name in source_names():
        source = find_source(name)
        yield (f"{name}:{source.argument}" if source.argument else name, source.summary)


def _sizes() -> Iterable[tuple[str, ...]]:
    from archbench import sizes

    yield ("size", "architecture", "config", "parameters", "residual")
    yield from sizes.table()


def _formats() -> Iterable[tuple[str, ...]]:
    from archbench import export

    yield ("format", "what")
    for name in export.names():
        yield (name, export.described(name).about)


_LISTS: dict[str, Any] = {
    "architectures": _architectures,
    "metrics": _metrics,
    "tasks": _tasks,
    "suites": _suites,
    "corpora": _corpora,
    "sizes": _sizes,
    "formats": _formats,
}


def print_decision(decision: Decision, conditions: Sequence[str] = ()) -> None:
    """The choice in a sentence, then every architecture: what it offers, or why it is left out."""
    from archbench.report import notation

    console.print(decision.sentence(), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("architecture", "bits per byte", "memory", "per token", "training text", ""):
        table.add_column(column, justify="left" if column in ("architecture", "") else "right", overflow="fold")

    def shown(value: float | None, unit: str) -> str:
        return "not known" if value is None else notation.plain(value, unit)

    for candidate in (*decision.ranked, *decision.others):
        bits = candidate.bits
        quality = "none" if bits.value is None else " ".join(notation.interval(bits.value, bits.low, bits.high))
        if candidate is decision.best:
            remark = "chosen"
        elif candidate in decision.tied:
            remark = "not told apart"
        else:
            remark = candidate.refused or ("" if bits.value is not None else bits.reason)
        table.add_row(
            candidate.row.name,
            quality.strip(),
            shown(candidate.memory, "B"),
            shown(candidate.seconds_per_token, "s"),
            shown(candidate.training_bytes, "B"),
            remark,
        )
    console.print(table)
    for sentence in conditions:
        console.print(sentence, style="dim", soft_wrap=True)


def _wide() -> Console:
    """Where wide tables go: in a file or a pipe nobody's window limits the width."""
    return console if console.is_terminal else Console(highlight=False, markup=False, width=160)


def print_targets(targets: Sequence[Target]) -> None:
    """Targets, what must be reached, and about how long measuring them takes."""
    table = Table()
    for column in ("target", "question", "must", "stretch", "time"):
        table.add_column(column, justify="left" if column in ("target", "question") else "right")
    for target in targets:
        sign = "≥" if target.better == "higher" else "≤"
        stretch = "" if target.stretch is None else f"{sign} {target.stretch:g} {target.unit}"
        must = f"{sign} {target.must:g} {target.unit}"
        table.add_row(target.id, target.question, must, stretch, duration(target.seconds))
    _wide().print(table)
    console.print(f"{len(targets)} targets, about {duration(sum(target.seconds for target in targets))}.")


class BenchWatch:
    """One progress bar over the turns of all targets. Use as a context and call it with each turn."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.seconds = {target.id: target.seconds for target in targets}
        total = sum(self.seconds.values())
        console.print(f"bench: {len(targets)} targets, about {duration(total)}. Ctrl-C loses nothing.")
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
        )
        self.bar = self.progress.add_task("", total=total)
        self.before = 0.0
        self.current = ""

    def __enter__(self) -> BenchWatch:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, target: Target, done: int, turns: int) -> None:
        if target.id != self.current:
            self.before += self.seconds.get(self.current, 0.0)
            self.current = target.id
        completed = self.before + target.seconds * done / turns
        self.progress.update(self.bar, description=target.id, completed=completed)


def print_bench(records: Sequence[Record]) -> None:
    """The table of a bench run: a row a target."""
    from archbench.bench.table import HEADINGS, rows, tally

    found = rows(records)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=heading in ("figure", "must", "stretch"), overflow="fold")
    for row in found:
        table.add_row(*row[: len(HEADINGS)])
    _wide().print(table)
    loads = [load for record in records if (load := record.environment.get("load_average"))]
    console.print(f"{tally(found)} Figures are medians of CPU time ratios, with 95 % intervals.")
    if loads:
        found_loads = [load[0] for load in loads]
        console.print(f"Load average at the time: {min(found_loads)} to {max(found_loads)}.")


def print_comparison(comparison: Comparison) -> None:
    """What the gate found: what needs eyes in a table, what is equal in a line, and the verdict last."""
    from archbench.gate.markdown import COLUMNS, remarkable, row, summary
    from archbench.gate.verdict import HEADLINES

    for title, findings in (("", remarkable(comparison)), ("acknowledged in the baseline", comparison.acknowledged)):
        if not findings:
            continue
        table = Table(title=title or None, title_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number < 4 else "right", overflow="fold")
        for finding in findings:
            cells = list(row(finding))
            cells[2] += f"\n{finding.note}" if finding.note else ""
            table.add_row(*cells)
        (console if console.is_terminal else Console(highlight=False, markup=False, width=160)).print(table)
    for note in comparison.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(summary(comparison), soft_wrap=True)
    code = comparison.exit_code
    console.print(f"{comparison.title}: {HEADLINES[code]} (exit code {code})", soft_wrap=True)
    if any(finding.verdict == "changed" and finding.blocks(comparison.fail_on) for finding in comparison.findings):
        console.print("If that was meant: `archbench gate --accept`, and commit the baseline with the change.")


def print_noise(noise: Noise, margin: float) -> None:
    """What differs when nothing has changed, and the smallest change that the gate can see."""
    from archbench.gate.noise import spoken

    table = Table(title=f"{noise.suite}: {noise.seeds} seeds on {noise.where}", title_justify="left")
    for column in ("quantity", "mean", "sd of seeds", "seen on another processor from", "that is"):
        table.add_column(column, justify="left" if column == "quantity" else "right", overflow="fold")
    for key, spread in sorted(noise.quality.items()):
        allowed = noise.margin(key, spread.mean)
        share = f"{allowed / abs(spread.mean):.2%}" if spread.mean else ""
        table.add_row(spoken(key), f"{spread.mean:.5g}", f"{spread.sd:.2g}", f"{allowed:.2g}", share)
    console.print(table)
    if noise.timing:
        table = Table(title="time, of this version against itself", title_justify="left")
        for column in ("work", "error", "slowdown told from none", f"slowdown told to exceed {margin:.0%}", ""):
            table.add_column(column, justify="left" if column in ("work", "") else "right")
        demoted = noise.demoted(margin, noise.cpu_class)
        for name, found in noise.timing.items():
            beyond = (1 + margin) * (1 + found.detectable) - 1
            remark = "too noisy: watched, blocks nothing" if name in demoted else ""
            table.add_row(name, f"{found.error:.2%}", f"{found.detectable:.1%}", f"{beyond:.1%}", remark)
        console.print(table)
    same = {True: "the same numbers", False: "OTHER NUMBERS: equality cannot be asked for here", None: "not tried"}
    console.print(f"The first seed again gave {same[noise.repeated_exactly]}.")


def print_claims(claims: Claims) -> None:
    """Every claim with its place, the smallest faithful scale, and the suites whose records decide."""
    table = Table(show_lines=True)
    for column, share in (("claim", 3), ("scale", 1), ("records from", 1)):
        table.add_column(column, overflow="fold", ratio=share)
    for claim in claims.claims:
        what = Text.assemble((claim.id, "bold"), f"  {claim.source}\n{claim.text}")
        table.add_row(what, claim.scale, ", ".join(claim.suites) or claim.how)
    console.print(table)
    console.print(f"{len(claims.claims)} claims.")


_VERDICT_STYLES = {"supported": "bold green", "contradicted": "bold red"}


def print_verdicts(outcomes: Sequence[Judged]) -> None:
    """Verdicts with their reasons and where the evidence lies; then how many there are of each."""
    table = Table(show_lines=True)
    for column, share in (("claim", 2), ("verdict, and why", 3)):
        table.add_column(column, overflow="fold", ratio=share)
    for found in outcomes:
        claim, evidence = found.claim, found.evidence
        what = Text.assemble((claim.id, "bold"), f"\n{claim.source}\n{claim.text}")
        why = Text.assemble((found.verdict, _VERDICT_STYLES.get(found.verdict, "bold")), f"\n{found.reason}")
        if found.run and evidence:
            more = f" and {len(evidence) - 1} more" if len(evidence) > 1 else ""
            why.append(f"\n{found.run.name}, line {evidence[0]['line']}{more}", style="dim")
        table.add_row(what, why)
    console.print(table)
    for run in dict.fromkeys(found.run for found in outcomes if found.run):
        console.print(f"{run.name}: {run.file}", soft_wrap=True)
    verdicts = [found.verdict for found in outcomes]
    console.print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)) + ".")
