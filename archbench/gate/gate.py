"""The whole gate: measure this version, hold it against the baseline and against another version's speed."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from archbench.environment import cpu_class
from archbench.errors import GateError, RecordError
from archbench.gate import series, timing
from archbench.gate.baseline import find_baseline, require, write_baseline
from archbench.gate.compare import compare
from archbench.gate.lockstep import start
from archbench.gate.noise import UNKNOWN, Noise, beside, load_noise
from archbench.gate.points import read_records
from archbench.gate.timing import Policy
from archbench.gate.verdict import Comparison, FailOn, Finding
from archbench.gate.worktree import commit_of, file_at, root_of, worktree
from archbench.record import Record, RecordFile, from_json
from archbench.suite import find

Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to hold against what.

    Attributes:
        base: a git ref; its version is timed against this one, and its baseline file tells what was acknowledged.
        baseline: the records that tiers 0 and 1 compare with; None finds the suite's.
        records: of this version, when they are there already; else the suite is run.
        changes, only: as in `archbench run`.
        save: where to leave this version's records.
    """

    suite: str = "smoke"
    tiers: Sequence[int] = (0, 1)
    base: str | None = None
    baseline: Path | None = None
    records: Path | None = None
    noise: Path | None = None
    changes: Sequence[str] = ()
    only: Sequence[str] = ()
    fail_on: FailOn = "change"
    policy: Policy = dataclasses.field(default_factory=Policy)
    threads: int = 1
    history: Path | None = None
    save: Path | None = None


def gate(request: Request, notify: Notify = lambda _text: None) -> Comparison:
    """Everything that the request asks for.

    Raises:
        GateError: a baseline, commit or checkout is not there, or nothing can be compared.
        SuiteError: there is no such suite.
    """
    if 2 in request.tiers and request.base is None:
        raise GateError("--tiers 2: time is compared with another commit; name it with --base REF")
    if 3 in request.tiers and request.history is None:
        raise GateError("--tiers 3: needs a folder of record files; name it with --history DIR")
    root = root_of(Path.cwd()) if request.base is not None else None
    commit = commit_of(root, request.base) if root is not None and request.base is not None else None
    if request.records is None:
        find(request.suite)  # a typo is a typo, and no missing baseline
    path = request.baseline or find_baseline(suite_name(request.suite))
    noise = _noise(request, path)
    findings: list[Finding] = []
    notes: list[str] = []
    acknowledged: Sequence[Finding] = ()
    if {0, 1} & set(request.tiers):
        baseline = read_records(require(path, request.suite), "--baseline")
        if request.only:
            baseline = [r for r in baseline if r.label in request.only or r.architecture in request.only]
        found = compare(
            baseline, current(request, notify), title="", fail_on=request.fail_on, tiers=request.tiers, noise=noise
        )
        findings += found.findings
        notes += found.notes
        if root is not None and commit is not None:
            acknowledged, said = _acknowledged(root, commit, path, request, noise)
            notes += said
    if 2 in request.tiers and root is not None and commit is not None:
        timed, said = _timed(root, commit, request, noise, notify)
        findings += timed
        notes += said
    if 3 in request.tiers and request.history is not None:
        findings += series.watch(request.history)
    findings.sort(key=lambda f: (not f.blocks(request.fail_on), f.verdict == "same", f.tier))
    against = f" against {request.base} ({commit[:12]})" if commit else ""
    return Comparison(
        title=f"archbench gate {suite_name(request.suite)}{against}",
        findings=findings,
        fail_on=request.fail_on,
        notes=notes,
        acknowledged=acknowledged,
    )


def accept(request: Request, notify: Notify = lambda _text: None) -> tuple[Path, int]:
    """Rewrites the baseline file from this version; returns it and the number of its records.

    Raises:
        GateError: something failed: a baseline with holes would let regressions through.
    """
    path = request.baseline or find_baseline(suite_name(request.suite))
    records = current(request, notify)
    failed = next((record for record in records if record.status == "failed"), None)
    if failed is not None:
        raise GateError(f"{path}: not written, for {failed.metric} failed on {failed.label}: {failed.reason}")
    return path, write_baseline(path, records)


def current(request: Request, notify: Notify) -> list[Record]:
    """This version's records, given or measured now."""
    if request.records is not None:
        records = read_records(request.records, "--records")
    else:
        from archbench.gate.measure import gated_plan, measure

        plan = gated_plan(request.suite, request.changes, request.only)
        notify(f"measuring {len(plan.cells)} cells of {plan.suite.name}")
        records = measure(plan, request.threads)
    if request.save is not None:
        request.save.unlink(missing_ok=True)
        RecordFile(request.save).append(records)
    return records


def parse_tiers(text: str | None, base: str | None, history: Path | None) -> tuple[int, ...]:
    """`0,1`; left out, the ledger and quality, time where a base is given, history where there is one.

    Raises:
        GateError: something else was given.
    """
    if text is None:
        return (0, 1) + ((2,) if base is not None else ()) + ((3,) if history is not None else ())
    found = [word.strip() for word in text.split(",")]
    if not set(found) <= set("0123"):
        raise GateError(f"--tiers {text}: allowed are 0 (ledger), 1 (quality), 2 (time) and 3 (history), as in 0,1")
    return tuple(sorted({int(word) for word in found}))


def parse_budget(text: str) -> float:
    """Seconds of `6m`, `90s` or `90`. Raises GateError when it is none of them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    if found is None:
        raise GateError(f"--budget {text}: not a time; write 90s or 6m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2] or "s"]


def _timed(root: Path, commit: str, request: Request, noise: Noise, notify: Notify) -> tuple[list[Finding], list[str]]:
    from archbench.gate.measure import timed_items

    items = timed_items(request.suite, request.changes, request.only)
    if not items:
        raise GateError(f"{request.suite}: asks no cell for a timed metric, so nothing can be timed; leave tier 2 out")
    demoted = noise.demoted(request.policy.margin, cpu_class())
    with worktree(root, commit) as folder, _weather() as weather:
        begin = partial(start, (folder, root), (f"base {commit[:12]}", "this version"), request.threads)
        findings = timing.hold(items, begin, request.policy, demoted, notify=notify)
    notes = [
        f"time: CPU seconds of lock-step pairs decide, at a margin of {request.policy.margin:.0%}; {weather[0]}",
    ]
    if demoted:
        notes.append(f"too noisy here to block: {', '.join(demoted)}")
    return findings, notes


@contextmanager
def _weather() -> Iterator[list[str]]:
    """One line on how busy the machine was meanwhile."""
    said: list[str] = [""]
    before = _load()
    yield said
    said[0] = f"load {before} before and {_load()} after, on {os.cpu_count()} cores"


def _load() -> str:
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except OSError:
        return "unknown"


def _noise(request: Request, baseline: Path) -> Noise:
    """The noise file that was named, or the one beside the baseline if there is one."""
    if request.noise is not None:
        return load_noise(request.noise)
    return load_noise(beside(baseline)) if beside(baseline).is_file() else UNKNOWN


def _acknowledged(
    root: Path, commit: str, path: Path, request: Request, noise: Noise
) -> tuple[list[Finding], list[str]]:
    """What changed between the base's baseline file and this one's, or a note on why that cannot be told."""
    try:
        relative = path.resolve().relative_to(root.resolve())
    except ValueError:
        return [], [f"{path} lies outside the checkout: what it was made to accept is not known"]
    text = file_at(root, commit, relative)
    if text is None:
        return [], [f"the baseline is new since {commit[:12]}"]
    if text == path.read_text(encoding="utf-8"):
        return [], []
    lines = [line for line in text.splitlines() if line.strip()]
    now = read_records(path, "--baseline")
    try:
        before = [from_json(line, f"{commit[:12]}:{relative}:{number}") for number, line in enumerate(lines, start=1)]
        found = compare(before, now, title="", fail_on="nothing", tiers=request.tiers, noise=noise)
    except (GateError, RecordError) as error:
        return [], [f"the baseline has changed since {commit[:12]}, and the two cannot be compared: {error}"]
    return [finding for finding in found.findings if finding.verdict != "same"], []


def suite_name(suite: str) -> str:
    """The name of a suite given by name or path: its baseline is called after it."""
    return Path(suite).stem if suite.endswith((".yaml", ".yml")) else suite
