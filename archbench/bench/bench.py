"""Runs targets one after another and keeps what they gave; what this source has answered already is not run again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from archbench.bench import records
from archbench.bench.target import Target
from archbench.errors import ArchbenchError
from archbench.ops import backends
from archbench.record import Record, RecordFile

Notify = Callable[[Target, int, int], None]
"""Called with the target and how many of its turns are done."""

Turned = Callable[[int], None]
"""Called with how many turns of a target are done."""
Measure = Callable[[Target, str, str, str, Turned], list[Record]]
"""Measures a target: (target, run, source, command, notify)."""


def measure(
    target: Target, run: str, source_hash: str, command: str, notify: Turned = lambda _done: None
) -> list[Record]:
    """One target on one thread, as records; a reason where it cannot be measured here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backends.forget()
    try:
        trial = target.prepare()
        with trial.within():
            for done in range(1, target.turns + 1):
                trial.turn()
                notify(done)
        return records.outcome(target, trial, run, source_hash, command)
    except ArchbenchError as error:
        return [records.missing(target, run, source_hash, command, str(error))]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return [records.missing(target, run, source_hash, command, reason, failed=True)]
    finally:
        torch.set_num_threads(threads)
        gc.collect()


def run(
    targets: Sequence[Target], out: Path, command: str, notify: Notify, *, again: bool = False, how: Measure = measure
) -> Path:
    """Measures `targets`, adding to the newest results file of `out` if this very source wrote it, else to a new one.

    Answered targets are skipped unless `again`. Every target is on disk before the next begins. `how` may give each a
    process of its own (`archbench.bench.alone`).
    """
    source_hash = records.source()
    path = results_file(out, source_hash)
    file = RecordFile(path)
    answered = set() if again else {record.job for record in file if record.status != "failed"}
    for target in targets:
        if records.job_id(target, source_hash) not in answered:
            notify(target, 0, target.turns)

            def turned(done: int, target: Target = target) -> None:
                notify(target, done, target.turns)

            file.append(how(target, path.stem, source_hash, command, turned))
    return path


def results_file(out: Path, source_hash: str) -> Path:
    """The newest results file that this source wrote in `out`, or a new one's name."""
    own = sorted(out.glob(f"*-{source_hash[:12]}.jsonl"))
    start = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return own[-1] if own else out / f"{start}-{source_hash[:12]}.jsonl"
