"""The sandbox as its users see it: solutions and problems in, verdicts out."""

from __future__ import annotations

import json
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from archbench.data.problems import Problem
from archbench.errors import SandboxError
from archbench.sandbox.ladder import Rung, choose
from archbench.sandbox.limits import Limits, Verdict
from archbench.sandbox.process import Answer, Zygote, ZygoteDied
from archbench.sandbox.questions import Questions, take_apart

AHEAD = 4
"""Tasks handed out before their verdicts are due, for each worker."""
ATTEMPTS = 2
"""How often a task is tried whose sandbox dies under it, as when the machine runs out of memory."""


def open_sandbox(rung: str | None = None, limits: Limits | None = None, *, accept_unsandboxed: bool = False) -> Sandbox:
    """A sandbox on the best rung that holds here, or on the one named: "strict", "kernel", or "none" if accepted too.

    Each rung tried has to withstand a battery of attempts to get out, once a process; that takes about a second.

    Raises:
        SandboxError: there is none; the message says what is missing and how to get it.
    """
    return Sandbox(choose(rung, accept_unsandboxed), limits or Limits())


class Sandbox:
    """Judges solutions, each in a process of its own. May be used from several threads. Close it, or use `with`."""

    def __init__(self, rung: Rung, limits: Limits) -> None:
        self.rung = rung.name
        self.limits = limits
        self._start = rung.start
        self._lock = threading.Lock()
        self._idle: list[Zygote] = []
        self._busy: set[Zygote] = set()
        self._closed = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process; `judge` in another thread then raises SandboxError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for zygote in self._busy:
                zygote.interrupt()  # the thread that uses it closes it
        for zygote in idle:
            zygote.close()

    def judge(self, solution: str, problem: Problem, challenge: bool = False) -> Verdict:
        """Whether a solution, a whole program text run as it is, passes the problem's tests (and its harder ones).

        Raises:
            DataError: the problem's tests cannot be judged apart from the solution (see `questions`).
            SandboxError: no process can be started.
        """
        return self._verdict(solution, take_apart(problem, challenge))

    def verdicts(self, items: Iterable[tuple[str, Problem]], workers: int) -> Generator[Verdict, None, None]:
        """The verdicts on (solution, problem) pairs, in their order, as they come; `workers` tasks at a time.

        Ctrl-C, an error, or not asking for the rest ends what is under way and closes the sandbox.
        """
        pending: deque[Future[Verdict]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for solution, problem in items:
                    pending.append(pool.submit(self._verdict, solution, take_apart(problem)))
                    if len(pending) > AHEAD * workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise

    def judge_all(
        self, items: Sequence[tuple[str, Problem]], workers: int, notify: Callable[[int], None] = lambda _: None
    ) -> list[Verdict]:
        """`verdicts` as a list; `notify` hears after each how many there are."""
        found: list[Verdict] = []
        for verdict in self.verdicts(items, workers):
            found.append(verdict)
            notify(len(found))
        return found

    def _verdict(self, solution: str, questions: Questions) -> Verdict:
        if len(solution) > self.limits.solution_bytes:
            return Verdict(False, "solution too long", 0.0, self.rung)
        for _ in range(ATTEMPTS):
            zygote = self._take()
            try:
                verdict = self._judge(zygote, solution, questions)
            except ZygoteDied:
                self._discard(zygote)
            except BaseException:
                self._discard(zygote)
                raise
            else:
                self._give_back(zygote)
                return verdict
        return Verdict(False, f"ended its sandbox {ATTEMPTS} times", 0.0, self.rung)

    def _judge(self, zygote: Zygote, solution: str, questions: Questions) -> Verdict:
        tests = questions.tests
        request = {
            "role": "solve",
            "solution": solution.replace("\r\n", "\n"),
            "setup": questions.candidate_setup.replace("\r\n", "\n"),
            "tests": [{"imports": test.imports, "asked": test.asked} for test in tests],
        }
        solved = zygote.ask(request)
        if early := self._early_end(solved):
            return Verdict(False, early, solved.seconds, self.rung)
        request = {
            "role": "judge",
            "report": solved.report.decode("ascii", "replace"),
            "setup": questions.judge_setup.replace("\r\n", "\n"),
            "tests": [{"imports": test.imports, "names": test.names, "statement": test.statement} for test in tests],
        }
        judged = zygote.ask(request)
        if early := self._early_end(judged):
            return Verdict(False, f"failed: its answers could not be judged: {early}", solved.seconds, self.rung)
        found = json.loads(judged.report)
        return Verdict(found["passed"], found["result"], solved.seconds, self.rung)

    def _early_end(self, answer: Answer) -> str | None:
        """Why a child left no report; None if it left one, which may still be a false one."""
        if answer.late or answer.code == -signal.SIGXCPU or answer.cpu_s >= self.limits.cpu_s:
            return "timed out"
        if answer.cut:
            return "output too long"
        if answer.report and answer.code in (0, -signal.SIGKILL):  # killed after its report: it would not leave
            return None
        if answer.code < 0:
            return f"killed by {signal.Signals(-answer.code).name}"
        return f"exited early (code {answer.code})"

    def _take(self) -> Zygote:
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            zygote = self._idle.pop() if self._idle else None
        zygote = zygote or self._start(self.limits)
        with self._lock:
            self._busy.add(zygote)
            closed = self._closed
        if closed:
            self._discard(zygote)
            raise SandboxError("the sandbox is closed")
        return zygote

    def _give_back(self, zygote: Zygote) -> None:
        with self._lock:
            self._busy.remove(zygote)
            closed = self._closed
            if not closed:
                self._idle.append(zygote)
        if closed:
            zygote.close()

    def _discard(self, zygote: Zygote) -> None:
        with self._lock:
            self._busy.remove(zygote)
        zygote.close()
