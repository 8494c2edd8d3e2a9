"""A fork server inside the sandbox: Python is started and confined once, each task gets a fresh child.

    parent  --request-->  zygote: forks  -->  child: reads the request, loses its rights, runs one role, reports
            <--answer---  zygote: collects the report, ends the child

The zygote runs no code of a candidate and never reads a request: the child does, so that nothing of one task stays in
memory that the children of later tasks inherit.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from archbench.sandbox.inside import confine, seccomp
from archbench.sandbox.inside.roles import OUT_OF_MEMORY, ROLES

Message = dict[str, Any]

PRELOADED = (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools json "
    "math operator random re statistics string time typing"
)
"""What solutions import most: loaded once, here."""

ABOVE = 100  # the zygote's own descriptors lie from here on
MAX_DESCRIPTORS = 1 << 16
READ_BYTES = 1 << 16
REQUEST_READ = b"+"
"""What a child reports first: that the request is out of the pipe. Without it the zygote cannot go on."""
MAX_THREADS = 256
"""Threads a child may start, all told."""
LOOK_EVERY_S = 0.5
EXIT_GRACE_S = 0.2
"""How long a child that closed its report may take to be gone."""


def serve(settings: Message) -> None:
    """Answers requests until the parent hangs up. Never returns.

    settings: `null`, a descriptor of /dev/null; `landlock_abi`, the least version to accept, 0 for no Landlock;
        `seccomp`; and the limits: `cpu_s`, `wall_s`, `memory_bytes`, `report_bytes`.
    First sends {"ready": true, ...}, or {"error": why}.
    """
    requests, answers = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, ABOVE) for descriptor in (0, 1))
    for descriptor in (0, 1, 2):
        os.dup2(settings["null"], descriptor)
    os.closerange(3, ABOVE)
    try:
        _send(answers, _prepare(settings))
    except OSError as error:
        _send(answers, {"error": f"{error.strerror or error}"})
        os._exit(1)
    poller = select.poll()
    poller.register(requests, select.POLLIN)
    while poller.poll()[0][1] & select.POLLIN:
        _serve_one(requests, answers, settings)
    os._exit(0)


def _prepare(settings: Message) -> Message:
    for name in PRELOADED.split():
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.startswith("archbench")]:
        del sys.modules[name]
    abi = confine.landlock_abi() if settings["landlock_abi"] else 0
    if abi < settings["landlock_abi"]:
        found = f"has version {abi}" if abi else "has none"
        raise OSError(f"needs Landlock of version {settings['landlock_abi']} or later; this kernel {found}")
    if abi:
        confine.drop_capabilities()
        confine.restrict_files(confine.standard_library())
    if settings["seccomp"] and (reason := seccomp.reason()):
        raise OSError(reason)
    gc.freeze()  # the children's collectors would else touch, and so copy, every page
    return {"ready": True, "landlock_abi": abi, "version": sys.version, "prefix": sys.base_prefix}


def _serve_one(requests: int, answers: int, settings: Message) -> None:
    channel, childs_end = socket.socketpair()
    zygote, begin = os.getpid(), time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _work(requests, childs_end, settings, zygote)
        finally:
            os._exit(70)
    signal.signal(signal.SIGTERM, lambda *_: _leave(child))
    childs_end.close()
    with contextlib.suppress(OSError):
        os.setpgid(child, child)
    report, cut, late = _collect(channel, requests, child, begin + settings["wall_s"], settings["report_bytes"])
    code, used = _end(child)
    channel.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    header = {
        "code": code,  # negative: the signal that ended it
        "cut": cut,
        "late": late,
        "seconds": time.monotonic() - begin,
        "cpu_s": used.ru_utime + used.ru_stime,
        "n_bytes": len(report),
    }
    _send(answers, header)
    _write(answers, report)


def _work(requests: int, channel: socket.socket, settings: Message, zygote: int) -> None:
    """The child's whole life. Ends in os._exit, so that nothing a candidate left behind runs."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    confine.die_with_parent(zygote)
    request = json.loads(_read(requests, int.from_bytes(_read(requests, 8), "big")))
    listener = [seccomp.listen_to_clone()] if settings["seccomp"] else []
    socket.send_fds(channel, [REQUEST_READ], listener)
    report = os.dup2(channel.fileno(), 3)
    os.closerange(4, MAX_DESCRIPTORS)
    os.environ.clear()
    sys.modules["random"].seed(0)  # the same draws in every run; a fork would seed it anew
    confine.limit_resources(settings["cpu_s"], settings["memory_bytes"])
    if settings["seccomp"]:
        seccomp.install()
    try:
        text = ROLES[request.pop("role")](request)
    except MemoryError:
        text = OUT_OF_MEMORY
    _write(report, text)
    os._exit(0)


def _collect(channel: socket.socket, requests: int, child: int, deadline: float, most: int) -> tuple[bytes, bool, bool]:
    """The child's report, until it closes its end; whether it was too long; whether time ran out.

    Meanwhile answers the kernel's questions about the child's threads.
    """
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    poller.register(requests, 0)  # tells of the parent's end only
    begun, threads, report = False, 0, b""
    with contextlib.ExitStack() as held:
        while (left := deadline - time.monotonic()) > 0:
            events = poller.poll(1000 * min(left, LOOK_EVERY_S))
            if not events and _has_exited(child):  # and something that it started keeps the channel open
                return report, False, False
            for descriptor, event in events:
                if descriptor == requests and event & (select.POLLHUP | select.POLLERR):
                    _leave(child)
                elif descriptor == channel.fileno() and not begun:
                    mark, listeners, _, _ = socket.recv_fds(channel, len(REQUEST_READ), 1)
                    if mark != REQUEST_READ:
                        _leave(child)
                    for listener in listeners:
                        held.callback(os.close, listener)
                        poller.register(listener, select.POLLIN)
                    begun = True
                elif descriptor == channel.fileno():
                    piece = channel.recv(READ_BYTES)
                    report += piece
                    if not piece:
                        return report, False, False
                    if len(report) > most:
                        return report[:most], True, False
                elif event & select.POLLIN:
                    threads += 1
                    with contextlib.suppress(OSError):
                        seccomp.answer_clone(descriptor, threads <= MAX_THREADS)
                else:
                    poller.unregister(descriptor)
        if not begun:
            _leave(child)
        return report, False, True


def _end(child: int) -> tuple[int, Any]:
    """Ends the child and all in its process group; its exit code (negative: a signal) and what it used."""
    deadline = time.monotonic() + EXIT_GRACE_S
    while not _has_exited(child) and time.monotonic() < deadline:
        time.sleep(0.0002)
    _kill(child)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used


def _has_exited(child: int) -> bool:
    """Leaves it a zombie, so that its id stays its own until `_end`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _leave(child: int) -> None:
    """The parent is gone, or wants an end."""
    _kill(child)
    os._exit(0)


def _kill(child: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(child, signal.SIGKILL)


def _send(descriptor: int, message: Message) -> None:
    text = json.dumps(message).encode()
    _write(descriptor, len(text).to_bytes(8, "big") + text)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(descriptor, min(READ_BYTES, count - len(data)))
        if not piece:
            os._exit(0)
        data += piece
    return data
