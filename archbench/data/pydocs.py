"""Corpus `pydocs`: technical English on every machine, from the docstrings of Python and of archbench's dependencies.

One document a source file, holding its docstrings of more than 200 characters, each text once in the whole corpus; and
one document for each of pydoc's help topics. Parsing some thousand files costs tens of CPU seconds, so the result is
cached by the versions of Python and of the packages; other versions are another corpus with another hash.
"""

from __future__ import annotations

import ast
import importlib
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from archbench.data.cache import cache_dir, cache_key, read_json, write_json
from archbench.data.document import Document
from archbench.data.stdlib import python_files, source_text
from archbench.errors import DataError

# archbench's core dependencies: import name and distribution name. Found on disk, never imported.
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "typer": "typer",
    "rich": "rich",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "psutil": "psutil",
    "jaxtyping": "jaxtyping",
}
MIN_CHARACTERS = 200
FORMAT = "1"  # raise when the extraction changes, so that old caches are not read


def read() -> list[Document]:
    """The documents, from the cache when it holds these versions. Raises DataError when a package is missing."""
    path = cache_dir() / "pydocs" / f"{_versions_key()}.jsonl"
    kept = read_json(path)
    if kept is not None:
        return [Document(name, text.encode()) for name, text in kept]
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    roots += [(name, _package_folder(name)) for name in PACKAGES]
    documents = [*extract(roots), *_topics()]
    write_json(path, [(document.name, document.text.decode()) for document in documents])
    return documents


def extract(roots: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """One document for each Python file below the named roots that has long docstrings not met before."""
    seen: set[str] = set()
    for label, root in roots:
        for path in python_files(root):
            fresh = []
            for text in docstrings(path):
                if len(text) > MIN_CHARACTERS and text not in seen:
                    seen.add(text)
                    fresh.append(text)
            if fresh:
                name = f"{label}/{path.relative_to(root).as_posix()}"
                yield Document(name, ("\n\n".join(fresh) + "\n").encode())


def docstrings(path: Path) -> list[str]:
    """The cleaned docstrings of a file's module, classes and functions; none when Python cannot parse the file."""
    source = source_text(path)
    if source is None:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for other Pythons
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    # A docstring may hold escaped lone surrogates, which UTF-8 cannot.
    return [text for text in found if text and not any("\ud800" <= character <= "\udfff" for character in text)]


def _topics() -> list[Document]:
    """pydoc's help texts (`help('LISTS')`)."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [
        Document(f"topics/{name}", text.encode()) for name, text in sorted(topics.items()) if len(text) > MIN_CHARACTERS
    ]


def _package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"pydocs: package '{name}' is not installed; reinstall archbench with its dependencies")
    return Path(next(iter(spec.submodule_search_locations)))


def _versions_key() -> str:
    versions = [f"python {platform.python_version()}"]
    for distribution in sorted(PACKAGES.values()):
        try:
            versions.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError as error:
            raise DataError(
                f"pydocs: '{distribution}' is not installed; reinstall archbench with its dependencies"
            ) from error
    return cache_key(FORMAT, *versions)
