"""Corpora from the user's own files: `dir:PATH`, `jsonl:PATH`, `parquet:PATH`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from archbench.data.document import Document
from archbench.errors import DataError, MissingExtra

_SUFFIXES = (
    ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg "
    ".py .pyi .c .h .cc .cpp .hpp .cu .java .kt .scala .js .ts .jsx .tsx .go .rs .rb .php .swift .r .jl .sql .sh "
    ".pl .lua .hs .ml .el .css .po"
)
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
FIELD = "text"


def read_tree(argument: str) -> list[Document]:
    """Every text file below a folder, by suffix and without hidden ones; or one file, whatever its suffix.

    Names are paths below the folder, so that the corpus hash does not depend on where it lies.
    """
    root = _existing(f"dir:{argument}", argument)
    if root.is_file():
        return [Document(root.name, _bytes(f"dir:{argument}", root))]
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in TEXT_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    if not paths:
        raise DataError(f"dir:{argument}: no text files below this folder; looked for .txt, .md, .py and similar")
    return [Document(path.relative_to(root).as_posix(), _bytes(f"dir:{argument}", path)) for path in paths]


def read_jsonl(argument: str) -> list[Document]:
    """One document a line: a JSON object with its text under the key "text". Errors name the line."""
    where = f"jsonl:{argument}"
    path = _existing(where, argument)
    documents = []
    for number, line in enumerate(_bytes(where, path).split(b"\n"), start=1):
        if line.strip():
            documents.append(Document(f"{path.name}:{number}", _json_text(f"{where}: line {number}", line)))
    if not documents:
        raise DataError(f'{where}: empty; expected lines like {{"text": "..."}}')
    return documents


def read_parquet(argument: str) -> list[Document]:
    """One document a row of the column "text"; needs pyarrow. Rows without a text are empty documents."""
    where = f"parquet:{argument}"
    if find_spec("pyarrow") is None:
        raise MissingExtra(f"{where}: reading Parquet needs pyarrow: pip install 'archbench[parquet]'")
    import pyarrow
    from pyarrow import parquet

    path = _existing(where, argument)
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if FIELD not in columns:
                raise DataError(f"{where}: no column '{FIELD}'; its columns are: {', '.join(columns)}")
            texts = [text for batch in file.iter_batches(columns=[FIELD]) for text in batch.column(0).to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{where}: not a readable Parquet file ({_first_line(error)})") from error
    return [Document(f"{path.name}:{row}", _utf8(f"{where}: row {row}", text or "")) for row, text in enumerate(texts)]


def _json_text(where: str, line: bytes) -> bytes:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON in UTF-8 ({_first_line(error)})") from error
    if not isinstance(value, dict) or not isinstance(value.get(FIELD), str):
        found = f"keys {', '.join(value) or '(none)'}" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{where}: found {found}; expected an object with a string under '{FIELD}'")
    return _utf8(where, value[FIELD])


def _utf8(where: str, text: object) -> bytes:
    if not isinstance(text, str):
        raise DataError(f"{where}: '{FIELD}' holds {type(text).__name__}; expected a string")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: '{FIELD}' holds a lone surrogate, which UTF-8 cannot; repair that text") from error


def _existing(where: str, argument: str) -> Path:
    path = Path(argument).expanduser()
    if not path.exists():
        raise DataError(f"{where}: no such file or folder (looked in {Path.cwd()})")
    return path


def _bytes(where: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: {path}: cannot be read ({error.strerror})") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
