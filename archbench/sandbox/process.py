"""A zygote as its parent sees it: started by some command line, asked one thing at a time, ended.

Whatever happens inside, `ask` comes back: the zygote ends its child at the limits, and a zygote that does not answer
is ended itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from archbench.errors import SandboxError
from archbench.sandbox.limits import Limits

PACKAGE = "archbench.sandbox.inside"
INSIDE = ("values", "roles", "seccomp", "confine", "zygote")
"""Files of the package that runs inside, each after those it imports."""

# Reads the files' text and runs it: the sandboxed interpreter sees no folder that holds them.
BOOTSTRAP = """
import json, os, sys, types
def read(count):
    data = b""
    while len(data) < count:
        data += os.read(0, count - len(data)) or sys.exit(1)
    return data
sys.path[:] = [entry for entry in sys.path if entry]
hello = json.loads(read(int.from_bytes(read(8), "big")))
package = sys.modules[hello["package"]] = types.ModuleType(hello["package"])
for name, source in hello["modules"].items():
    module = sys.modules[f"{package.__name__}.{name}"] = types.ModuleType(f"{package.__name__}.{name}")
    setattr(package, name, module)
    exec(compile(source, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
module.serve(hello["settings"])
"""

START_S = 30.0
ANSWER_GRACE_S = 15.0
"""How much longer than the task's own limit a zygote may take."""
EXIT_S = 2.0


@dataclass(frozen=True)
class Answer:
    """What came of one request. code: exit code of the child, negative for a signal. cut: the report was too long.
    late: time ran out."""

    report: bytes
    code: int
    cut: bool
    late: bool
    seconds: float
    cpu_s: float


class ZygoteDied(Exception):
    """The zygote ended or fell silent while a task was under way."""


def interpreter() -> Path:
    """The Python that runs inside: the one below any virtual environment, whose own packages are not wanted there."""
    return Path(sys._base_executable).resolve()  # type: ignore[attr-defined]


def environment() -> dict[str, str]:
    """All that a zygote gets of the environment. Candidates see none of it.

    The hash seed makes sets iterate alike in every run. One memory arena for all threads, because each further one
    takes 64 MB of address space, which is what is limited. Some interpreters find their own library by the last one.
    """
    lent = {"LD_LIBRARY_PATH": value} if (value := os.environ.get("LD_LIBRARY_PATH")) else {}
    return {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", **lent}


class Zygote:
    """A running zygote. Not for use by two threads at once."""

    def __init__(self, wrap: Callable[[list[str]], list[str]], settings: dict[str, Any], limits: Limits) -> None:
        """wrap: makes the interpreter's command line into the one that starts it confined. settings: of
        `zygote.serve`, without the limits.

        Raises:
            SandboxError: it does not start, or not as asked; the message says why.
        """
        self.limits = limits
        self.folder = tempfile.mkdtemp(prefix="archbench-sandbox-")
        command = wrap([str(interpreter()), "-s", "-S", "-B", "-c", BOOTSTRAP])
        with Path(os.devnull).open("r+b") as null, tempfile.TemporaryFile() as errors:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    bufsize=0,
                    cwd=self.folder,
                    env=environment(),
                    pass_fds=(null.fileno(),),
                    start_new_session=True,  # Ctrl-C is for the parent; and one signal ends all
                )
            except OSError as error:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise SandboxError(f"{command[0]} does not start ({error.strerror})") from error
            try:
                self._greet({**settings, **asdict(limits), "null": null.fileno()}, errors)
            except BaseException:
                self.close()
                raise

    def _greet(self, settings: dict[str, Any], errors: Any) -> None:
        modules = {name: (files(PACKAGE) / f"{name}.py").read_text(encoding="utf-8") for name in INSIDE}
        try:
            self._send({"package": PACKAGE, "modules": modules, "settings": settings})
            greeting = json.loads(self._receive(time.monotonic() + START_S))
        except ZygoteDied:
            self.process.kill()
            self.process.wait()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise SandboxError(f"it does not start ({lines[-1] if lines else 'no message'})") from None
        if "error" in greeting:
            raise SandboxError(greeting["error"])
        if greeting["version"] != sys.version or greeting["prefix"] != sys.base_prefix:
            raise SandboxError(f"another Python runs inside: {greeting['version']!r} of {greeting['prefix']}")
        self.landlock_abi: int = greeting["landlock_abi"]

    def ask(self, request: dict[str, Any]) -> Answer:
        """Has a fresh child play a role (see `roles`). Raises ZygoteDied; the zygote is of no more use then."""
        deadline = time.monotonic() + self.limits.wall_s + ANSWER_GRACE_S
        self._send(request)
        header = json.loads(self._receive(deadline))
        return Answer(report=self._read(header.pop("n_bytes"), deadline), **header)

    def interrupt(self) -> None:
        """Ends what the zygote runs, from any thread; `ask` in its own then raises ZygoteDied."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        """Ends the zygote and what it runs. Closing its input asks it to; then it is killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        text = json.dumps(message).encode()
        view = memoryview(len(text).to_bytes(8, "big") + text)
        try:
            while view:
                view = view[self.process.stdin.write(view) :]
        except (OSError, ValueError):  # a broken pipe, or closed by another thread
            raise ZygoteDied from None

    def _receive(self, deadline: float) -> bytes:
        return self._read(int.from_bytes(self._read(8, deadline), "big"), deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        assert self.process.stdout is not None
        data = bytearray()
        poller = select.poll()
        poller.register(self.process.stdout, select.POLLIN)
        while len(data) < count:
            try:
                ready = poller.poll(max(0.0, 1000 * (deadline - time.monotonic())))
                piece = self.process.stdout.read(count - len(data)) if ready else b""
            except (OSError, ValueError):
                piece = b""
            if not piece:
                raise ZygoteDied
            data += piece
        return bytes(data)
