"""What a candidate may use, and what is said about it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps of one task. The slowest of MBPP's reference solutions takes 3 s of processor time.

    cpu_s: processor time, all threads together. wall_s: time on the clock, which also runs while the task sleeps or
    waits for a busy machine. memory_bytes: address space, the interpreter's own 30 MB included. report_bytes: the
    encoded values of all calls together. solution_bytes: source text.
    """

    cpu_s: int = 10
    wall_s: float = 30.0
    memory_bytes: int = 512 * MIB
    report_bytes: int = MIB
    solution_bytes: int = MIB


@dataclass(frozen=True)
class Verdict:
    """Whether a solution passes all tests of its problem.

    result: "passed", "failed: ...", "timed out", "out of memory", "output too long", "exited early ...", "killed by
    ..."; one line of printable ASCII. seconds: on the clock, of the candidate alone. rung: what confined it.
    """

    passed: bool
    result: str
    seconds: float
    rung: str
