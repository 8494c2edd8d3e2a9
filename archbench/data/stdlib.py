"""Corpus `stdlib`: the sources of Python's standard library. Code, on every machine, the same per Python version."""

from __future__ import annotations

import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from archbench.data.document import Document
from archbench.errors import DataError

# Tests hold bad encodings and syntax on purpose; site-packages is not the standard library.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Tables and generated data, not code that someone wrote.
SKIPPED_FILES = frozenset({"pydoc_data/topics.py"})
MAX_FILE_BYTES = 400_000


def read() -> list[Document]:
    """One document a source file, named by its path below the library folder.

    Raises DataError when this Python carries no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(name, text)
        for path in python_files(root)
        if (name := path.relative_to(root).as_posix()) not in SKIPPED_FILES
        and path.stat().st_size <= MAX_FILE_BYTES
        and (text := source_text(path)) is not None
    ]
    if not documents:
        raise DataError(f"stdlib: no .py files in {root}; use a Python with its sources, or another corpus")
    return documents


def python_files(root: Path) -> Iterator[Path]:
    """The .py files below `root` in a fixed order, without tests and installed packages."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]) and path.is_file():
            yield path


def source_text(path: Path) -> bytes | None:
    """A Python file as UTF-8, whatever encoding it declares (PEP 263); None when it is not the text it claims to be."""
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding).encode()
    except (SyntaxError, UnicodeDecodeError):
        return None
