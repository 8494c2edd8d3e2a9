"""A target in a process of its own, as whoever uses one of its sides would run it.

What ran before in a process decides how its allocator behaves: whether a step's memory stays, or comes from the kernel
again as fresh pages. In one process for all targets a training step was seen to take 1.8 times as long after other
targets as before them, and with all freed memory kept a peer's backward pass a fifth of what it takes its users.

Run as `python -m archbench.bench.alone ID RUN SOURCE COMMAND`, it writes JSON lines: a number after each turn, then the
records.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from archbench.bench import bench, records
from archbench.bench.target import Target, targets
from archbench.record import Record, from_json


def measure(
    target: Target, run: str, source_hash: str, command: str, notify: bench.Turned = lambda _done: None
) -> list[Record]:
    """The target's records; `notify` is called with the turns done. A process that dies is a failure with its code."""
    words = [sys.executable, "-m", __name__, target.id, run, source_hash, command]
    found: list[Record] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    found.append(from_json(line, target.id))
                else:
                    notify(int(line))
        except BaseException:
            process.kill()
            raise
    if not found:
        reason = f"its process ended with code {process.returncode}"
        return [records.missing(target, run, source_hash, command, reason, failed=True)]
    return found


def main(target_id: str, run: str, source_hash: str, command: str) -> None:
    """The process's entry."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stray prints must not mix with records

    def tell(line: object) -> None:
        print(line, file=out, flush=True)

    for record in bench.measure(targets()[target_id], run, source_hash, command, tell):
        tell(record.to_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
