"""The process that worker processes are forked from.

Importing torch with all that a training asks of it takes seconds, reading a corpus half a second more. A nursery does
both once; its children begin where it stands. It computes nothing and starts no thread of its own, so a child finds
what a process of its own would find.

The parent asks over a socket, one JSON message each: a number with three descriptors, for a child's standard input,
output and errors, is answered with the child's process id; a number with a process id is answered with the exit code
as `subprocess` has it, or null while the child runs. Answers repeat the number, since an interrupt may have left an
answer unread. Where the socket ends the parent is gone, and so goes the nursery.

Run as `python -m archbench.executors.nursery DESCRIPTOR CORPUS...`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from archbench.errors import ArchbenchError

LONGEST = 1 << 12
"""Bytes of a message."""


class Nursery:
    """The parent's side. `corpora` are read beforehand; what goes wrong is written to `log`."""

    def __init__(self, corpora: Iterable[str], environment: Mapping[str, str], log: Path) -> None:
        self._log, self._numbers = log, itertools.count()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), *corpora]
        with theirs, log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                env=dict(environment),
            )

    def start(self, errors: int) -> Child:
        """A worker process that writes its errors to this descriptor.

        Raises:
            ArchbenchError: the nursery itself has ended.
        """
        input_read, input_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            pid = self.ask(descriptors=[input_read, output_write, errors])
        except BaseException:
            os.close(input_write)
            os.close(output_read)
            raise
        finally:
            os.close(input_read)
            os.close(output_write)
        assert pid is not None, "a new child has an id"
        return Child(self, pid, input_write, output_read)

    def ask(self, pid: int | None = None, descriptors: Iterable[int] = ()) -> int | None:
        """How the child of this id ended, or the id of a new one. Raises ArchbenchError when the nursery has ended."""
        number = next(self._numbers)
        try:
            socket.send_fds(self._socket, [json.dumps([number, pid]).encode()], list(descriptors))
            while message := self._socket.recv(LONGEST):
                answered, answer = json.loads(message)
                if answered == number:
                    return answer
        except OSError as error:
            raise ArchbenchError(f"the process that starts workers is gone ({error}); see {self._log}") from None
        raise ArchbenchError(f"the process that starts workers ended with code {self._process.wait()}; see {self._log}")

    def close(self) -> None:
        """Ends it; its children live on."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Child:
    """A worker, with as much of `subprocess.Popen`'s interface as supervising it takes."""

    def __init__(self, nursery: Nursery, pid: int, input_: int, output: int) -> None:
        self._nursery, self._pid = nursery, pid
        self.stdin = os.fdopen(input_, "w", encoding="utf-8")
        self.stdout = os.fdopen(output, encoding="utf-8")
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self._code is None:
            self._code = self._nursery.ask(self._pid)
        return self._code

    def wait(self, timeout: float = float("inf")) -> int:
        """Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"worker {self._pid}", timeout)
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._code is None:  # only `poll` lets the nursery reap it: until then the id is its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)


def serve(link: socket.socket) -> bool:
    """Forks workers and tells what became of them until the parent is gone. True in a forked child, whose standard
    files are those that came along."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, LONGEST, 3)
        if not message:
            return False
        number, pid = json.loads(message)
        if pid is not None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                link.close()
                for standard, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, standard)
            for descriptor in descriptors:
                os.close(descriptor)
            if answer == 0:
                return True
        link.sendall(json.dumps([number, answer]).encode())


def main(descriptor: str, *corpora: str) -> None:
    """The process's entry."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    import torch._dynamo  # noqa: F401  every optimizer imports it, which takes a second

    from archbench import registry, worker
    from archbench.plan import corpus_of

    wanted: list[tuple[Callable[[str], object], Iterable[str]]] = [
        (registry.architecture, registry.architectures()),
        (registry.metric, registry.metrics()),
        (corpus_of, corpora),
    ]
    for load, names in wanted:
        for name in names:
            with contextlib.suppress(Exception):  # whoever needs it says what is wrong with it
                load(name)
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all that it shares
    if serve(socket.socket(fileno=int(descriptor))):
        worker.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
