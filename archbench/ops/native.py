"""The native level's engine room: compile the C sources once, cache the library, load it with ctypes, share out jobs.

The sources in `csrc/` are compiled with the system's C compiler on first use, which takes some seconds, into
`$ARCHBENCH_CACHE/native` (default `~/.cache/archbench/native`). The file name is

    kernels-<hash of sources, flags, compiler, processor>-<hash of the file's own bytes>.so

so another compiler, processor or source never meets a stale library, and a damaged file is recognised by its name
before it is loaded (loading a truncated library kills the process) and is built anew. A compiler is identified by its
resolved path, size and modification time: a process that finds its library in the cache starts no compiler and writes
nothing.

Environment: `ARCHBENCH_CC` names the compiler (it may hold arguments, as in `ccache gcc`), `ARCHBENCH_CACHE` the cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch

from archbench.errors import BackendError

SOURCES = Path(__file__).parent / "csrc"
UNITS = ("scan.c", "ssd.c", "conv.c", "decode.c", "recurrent.c", "cross_entropy.c")  # each is one translation unit
INCLUDED = ("lanes.c", "panels.c", "inference.c")  # by units
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 300
NO_SUCH_TOKEN = 2
"""What a kernel returns that met a token outside the vocabulary; where it finds no memory, 1."""


def library() -> ctypes.CDLL:
    """The loaded kernels. Raises BackendError with the reason when they cannot be had."""
    found = _load(os.environ.get("ARCHBENCH_CC", "").strip(), os.environ.get("ARCHBENCH_CACHE", ""))
    if isinstance(found, str):
        raise BackendError(found)
    return found


def reason() -> str:
    """'ok', or why the native kernels cannot be had here. Compiles them if they are not in the cache."""
    found = _load(os.environ.get("ARCHBENCH_CC", "").strip(), os.environ.get("ARCHBENCH_CACHE", ""))
    return found if isinstance(found, str) else "ok"


@functools.cache
def _load(compiler: str, cache: str) -> ctypes.CDLL | str:
    """The library, or the reason there is none; asked once per process, compiler and cache."""
    root = Path(cache).expanduser() if cache else Path.home() / ".cache" / "archbench"
    try:
        return ctypes.CDLL(str(_cached_or_built(_command(compiler), root / "native")))
    except BackendError as error:
        return str(error)
    except OSError as error:
        return f"the native kernels cannot be stored or loaded: {error}; set ARCHBENCH_CACHE to a writable folder"


def _command(compiler: str) -> list[str]:
    """The compiler's command line, its program resolved to a full path."""
    for candidate in (compiler,) if compiler else COMPILERS:
        program, *arguments = shlex.split(candidate)
        path = shutil.which(program)
        if path:
            return [path, *arguments]
    tried = f"ARCHBENCH_CC={compiler}" if compiler else ", ".join(COMPILERS)
    raise BackendError(f"no C compiler found (tried {tried}); install gcc or clang, or set ARCHBENCH_CC")


def _flags() -> list[str]:
    """Options for this processor. No -ffast-math: the kernels count on the order of operations as written."""
    flags = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return [*flags, "-march=native", "-mprefer-vector-width=512"]
    return [*flags, "-mcpu=native"] if machine in ("aarch64", "arm64") else flags


def _processor() -> str:
    """What -march=native depends on: the machine and, where Linux lists them, the processor's features."""
    known = [platform.machine(), platform.processor()]
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        wanted = ("flags", "features", "model name", "cpu part")
        lines = (line for line in listing.read_text().splitlines() if line.lower().startswith(wanted))
        known.extend(sorted(set(lines)))
    return "\n".join(known)


def _key(command: list[str]) -> str:
    compiler = Path(command[0]).resolve()
    identity = compiler.stat()
    parts = [*command, str(compiler), str(identity.st_size), str(identity.st_mtime_ns), *_flags(), *UNITS, _processor()]
    parts.extend(source.read_text() for source in sorted(SOURCES.glob("*.c")))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _cached_or_built(command: list[str], folder: Path) -> Path:
    key = _key(command)
    for candidate in sorted(folder.glob(f"kernels-{key}-*.so")):
        if candidate.stem.rpartition("-")[2] == _digest(candidate):
            return candidate
        candidate.unlink(missing_ok=True)  # damaged
    return _build(command, key, folder)


def _build(command: list[str], key: str, folder: Path) -> Path:
    """Compile beside the final place and rename, so that no other process ever sees half a library."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as room:
        built = Path(room) / "kernels.so"
        line = [*command, *_flags(), "-o", str(built), *(str(SOURCES / unit) for unit in UNITS), "-lm"]
        try:
            outcome = subprocess.run(line, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise BackendError(f"{command[0]} took more than {COMPILE_TIMEOUT_S} s; set ARCHBENCH_CC") from None
        if outcome.returncode or not built.exists():
            said = next((text for text in outcome.stderr.splitlines() if "error" in text), outcome.stderr.strip())
            raise BackendError(f"{command[0]} cannot compile the native kernels: {said or 'no message'}")
        final = folder / f"kernels-{key}-{_digest(built)}.so"
        built.replace(final)
    return final


@functools.lru_cache(maxsize=1)
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001  (threads do not survive a fork)
    return ThreadPoolExecutor(n_threads, thread_name_prefix="archbench-native")


def spread(kernel: Callable[[ctypes.Structure, int, int], int], arguments: ctypes.Structure, n_jobs: int) -> None:
    """Run `kernel(arguments, first, last)` over jobs 0 .. n_jobs-1, split over torch.get_num_threads() threads.

    ctypes lets go of the interpreter lock during each call. Jobs are independent, so the split changes no result.

    Raises:
        MemoryError: a kernel found no memory for its scratch.
        IndexError: a token is not in the vocabulary.
    """
    n_threads = min(torch.get_num_threads(), n_jobs)
    if n_threads <= 1:
        outcomes = [kernel(arguments, 0, n_jobs)]
    else:
        pool = _pool(n_threads, os.getpid())
        bounds = [n_jobs * i // n_threads for i in range(n_threads + 1)]
        calls = [pool.submit(kernel, arguments, *pair) for pair in itertools.pairwise(bounds)]
        outcomes = [call.result() for call in calls]
    failures = [outcome for outcome in outcomes if outcome]
    if failures:
        fail(min(failures))


def fail(outcome: int, no_such_token: str = "a token lies outside the vocabulary") -> NoReturn:
    """Raises what this outcome of a kernel stands for: MemoryError, or IndexError with this message."""
    if outcome == NO_SUCH_TOKEN:
        raise IndexError(no_such_token)
    raise MemoryError("a native kernel found no memory for its scratch")
