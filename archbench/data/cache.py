"""Where slow things are kept between runs, and how they are written so that a damaged file is rebuilt, not believed.

The folder is the environment variable ARCHBENCH_CACHE, else ~/.cache/archbench. Deleting it loses nothing but time.
Files are JSON or .npy, never pickle: reading a cache runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from archbench.errors import DataError

# Above this an array stays on disk and is paged in as it is read.
MEMORY_MAP_BYTES = 32 * 2**20


def cache_dir() -> Path:
    """The cache folder (it may not exist yet)."""
    named = os.environ.get("ARCHBENCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "archbench"


def cache_key(*parts: str) -> str:
    """sha256 (hex) over the parts, each with its length, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside `path` and rename it there: a reader sees the whole file or none.

    Raises DataError when the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot write here ({error.strerror}); name a writable folder in ARCHBENCH_CACHE"
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        Path(temporary).replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); is the disk full?") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Keep a JSON value: first line its sha256, second line the value."""
    body = json.dumps(value).encode()
    header = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()
    write_atomically(path, lambda file: file.write(header + b"\n" + body + b"\n"))


def read_json(path: Path) -> Any | None:
    """The value kept by `write_json`, or None when there is none or it is damaged (the caller rebuilds it)."""
    try:
        header, _, body = path.read_bytes().partition(b"\n")
        body = body.rstrip(b"\n")
        if json.loads(header) == {"sha256": hashlib.sha256(body).hexdigest()}:
            return json.loads(body)
    except (OSError, ValueError):
        pass
    return None


def write_array(path: Path, array: np.ndarray) -> None:
    """Keep an array as .npy."""
    write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def read_array(path: Path) -> np.ndarray | None:
    """The array kept by `write_array`, memory-mapped when large; None when there is none or it is damaged."""
    try:
        large = path.stat().st_size > MEMORY_MAP_BYTES
        return np.load(path, mmap_mode="r" if large else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
