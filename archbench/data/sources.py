"""The registry of corpus sources: a name, what argument it takes, and the function that reads its documents.

Third parties add theirs under the entry-point group `archbench.corpora`: the entry point's name is the corpus name,
its object a `Source`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points

from archbench.data import books, files, hub, mbpp_mini, pydocs, stdlib
from archbench.data.document import Document
from archbench.errors import DataError, suggestion

GROUP = "archbench.corpora"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from.

    read: called with the argument ("" when there is none); raises DataError when it cannot read.
    argument: the form of what follows the colon, for messages; empty when nothing may follow.
    summary: one line for listings.
    """

    read: Callable[[str], Iterable[Document]]
    argument: str
    summary: str


BUILT_IN = {
    "stdlib": Source(
        read=lambda _: stdlib.read(), argument="", summary="Python's own sources (code; on every machine)"
    ),
    "pydocs": Source(
        read=lambda _: pydocs.read(), argument="", summary="docstrings of Python and of archbench's dependencies"
    ),
    "books": Source(
        read=lambda _: books.read(), argument="", summary="nine public-domain novels (`archbench data fetch`)"
    ),
    "mbpp-mini": Source(
        read=lambda _: mbpp_mini.read(), argument="", summary="generated programming problems with solutions"
    ),
    "dir": Source(read=files.read_tree, argument="PATH", summary="the text files below a folder, or one file"),
    "jsonl": Source(read=files.read_jsonl, argument="PATH", summary="one JSON object a line, its key 'text'"),
    "parquet": Source(read=files.read_parquet, argument="PATH", summary="a Parquet file's column 'text'"),
    "hf": Source(read=hub.read, argument=hub.FORM, summary="a Hugging Face data set (needs network)"),
}


def source_names() -> list[str]:
    """Every name that `find_source` knows, built-in ones first."""
    return [*BUILT_IN, *sorted(point.name for point in entry_points(group=GROUP))]


def find_source(name: str) -> Source:
    """The source of that name. Raises DataError when there is none, two, or a plug-in that is not a Source."""
    points = entry_points(group=GROUP, name=name)
    if name in BUILT_IN and not points:
        return BUILT_IN[name]
    if len(points) > 1 or (name in BUILT_IN and points):
        origins = ", ".join(sorted(point.value for point in points))
        raise DataError(f"corpus '{name}' is defined more than once ({origins}); uninstall or rename one")
    if not points:
        raise DataError(f"corpus '{name}' is not known; {suggestion(name, source_names())}")
    point = next(iter(points))
    source = point.load()
    if not isinstance(source, Source):
        raise DataError(f"entry point {GROUP}: {name} = {point.value} is not an archbench Source; fix that package")
    return source
