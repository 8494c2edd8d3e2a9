"""The process that worker processes are forked from.

Importing torch with all that a training asks of it takes seconds, reading a corpus half a second more. A nursery does
both once; its children begin where it stands. It computes nothing and starts no thread of its own, so a child finds
what a process of its own would find.

The parent asks over a socket, one JSON message each, a number and what is asked: null, with three descriptors for a
child's standard input, output and errors, is answered with the child's process id; a process id with the exit code as
`subprocess` has it, or null while the child runs; corpora are read, without an answer. Answers repeat the number, since
an interrupt may have left an answer unread. Where the socket ends the parent is gone, and so goes the nursery.

Run as `python -m archbench.executors.nursery DESCRIPTOR`.
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
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from archbench.errors import ArchbenchError

LONGEST = 1 << 12
"""Bytes of a message."""


class Nursery:
    """The parent's side. Children get this environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment, self._numbers, self._read = dict(environment), itertools.count(), set[str]()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  for as long as this
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                env=self.environment,
            )

    def read(self, corpora: Iterable[str]) -> None:
        """Children that are started from now on have read these corpora. Raises ArchbenchError when it has ended."""
        for corpus in sorted(set(corpora) - self._read):
            self._read.add(corpus)
            self._send([corpus])

    def start(self, errors: int) -> Child:
        """A worker process that writes its errors to this descriptor.

        Raises:
            ArchbenchError: the nursery itself has ended.
        """
        input_read, input_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            pid = self._answer(self._send(None, [input_read, output_write, errors]))
        except BaseException:
            os.close(input_write)
            os.close(output_read)
            raise
        finally:
            os.close(input_read)
            os.close(output_write)
        assert pid is not None, "a new child has an id"
        return Child(self, pid, input_write, output_read)

    def ended(self, pid: int) -> int | None:
        """How the child of this id ended; None while it runs. Raises ArchbenchError when the nursery has ended."""
        return self._answer(self._send(pid))

    def close(self) -> None:
        """Ends it; its children live on."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _send(self, asked: int | Sequence[str] | None, descriptors: Sequence[int] = ()) -> int:
        number = next(self._numbers)
        try:
            socket.send_fds(self._socket, [json.dumps([number, asked]).encode()], list(descriptors))
        except OSError as error:
            raise self._gone(error) from None
        return number

    def _answer(self, number: int) -> int | None:
        try:
            while message := self._socket.recv(LONGEST):
                answered, answer = json.loads(message)
                if answered == number:
                    return answer
        except OSError as error:
            raise self._gone(error) from None
        raise self._gone()

    def _gone(self, error: OSError | None = None) -> ArchbenchError:
        """What to raise where it does not answer; a nursery that only cannot be reached is ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._process.kill()
        code = self._process.wait()
        said: object = error or "no message"
        if not self._errors.closed:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            said = lines[-1] if lines else said
        return ArchbenchError(f"the process that starts workers ended with code {code}: {said}")


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
            self._code = self._nursery.ended(self._pid)
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


def serve(link: socket.socket, read: Callable[[Sequence[str]], None]) -> bool:
    """Reads corpora, forks workers and tells what became of them until the parent is gone. True in a forked child,
    whose standard files are those that came along."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, LONGEST, 3)
        if not message:
            return False
        number, asked = json.loads(message)
        if isinstance(asked, list):
            read(asked)
            continue
        if asked is not None:
            ended, status = os.waitpid(asked, os.WNOHANG)
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


def load(one: Callable[[str], object], names: Iterable[str]) -> None:
    """Loads each of these for all children. Whoever needs one that cannot be loaded says what is wrong with it."""
    for name in names:
        with contextlib.suppress(Exception):
            one(name)
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all that it shares


def main(descriptor: str) -> None:
    """The process's entry."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    import torch._dynamo  # noqa: F401  every optimizer imports it, which takes a second

    from archbench import registry, worker
    from archbench.plan import corpus_of

    load(registry.architecture, registry.architectures())
    load(registry.metric, registry.metrics())
    if serve(socket.socket(fileno=int(descriptor)), partial(load, corpus_of)):
        worker.main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # to take down all that it shares would copy it first: a second


if __name__ == "__main__":
    main(sys.argv[1])
