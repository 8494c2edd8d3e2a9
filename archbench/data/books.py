"""Corpus `books`: nine long public-domain novels in English, 17.2 MB; and how to fetch them.

The text is not in the package. It is looked for in $ARCHBENCH_DATA/corpora/books, then in the cache folder that
`archbench data fetch` fills, and every file must have the sha256 that the manifest (books.yaml) gives: figures on
"books" are figures on these bytes or there are none.

The manifest's hashes are of prepared texts: the downloaded file with LF line ends, cut from the book's opening to its
length, with paragraphs inside it that name Project Gutenberg left out. What the download itself hashes to is not
recorded. That the cut gives the prepared bytes was confirmed by lengths for Crime and Punishment; for the other eight
it was not possible without a network, and how blank lines were joined where a paragraph was left out is unknown. So
`prepare` tries the few possible forms, and the sha256 decides: a book comes out exactly as recorded or is refused.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from archbench.data.cache import cache_dir, write_atomically
from archbench.data.document import Document
from archbench.errors import DataError

# A paragraph: alone, with one blank line after it, with all of them, or with those before it.
_PARAGRAPH = rb"(?:[^\n]+\n)+"
PARAGRAPH_FORMS = tuple(
    re.compile(form) for form in (_PARAGRAPH, _PARAGRAPH + rb"\n?", _PARAGRAPH + rb"\n*", rb"\n*" + _PARAGRAPH)
)


@dataclass(frozen=True, kw_only=True)
class Book:
    """One entry of the manifest. n_bytes and sha256 are of the prepared text; opening is how it begins."""

    id: int
    title: str
    author: str
    n_bytes: int
    sha256: str
    url: str
    opening: str

    @property
    def filename(self) -> str:
        return f"pg{self.id}.txt"


def manifest() -> list[Book]:
    """The nine books, in the order of their Gutenberg numbers."""
    listing = yaml.safe_load((files("archbench.data") / "books.yaml").read_text(encoding="utf-8"))
    return [
        Book(
            id=entry["id"],
            title=entry["title"],
            author=entry["author"],
            n_bytes=entry["bytes"],
            sha256=entry["sha256"],
            url=listing["source"].format_map(entry),
            opening=entry["opening"],
        )
        for entry in listing["books"]
    ]


def fetched_folder() -> Path:
    """Where `archbench data fetch` puts the books."""
    return cache_dir() / "books"


def read() -> list[Document]:
    """The nine books, verified. Raises DataError when one is missing or is not the text the manifest names."""
    folder = _folder()
    documents = []
    for book in manifest():
        path = folder / book.filename
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"books: {path}: {error.strerror}; run `archbench data fetch`") from error
        found = hashlib.sha256(text).hexdigest()
        if found != book.sha256:
            raise DataError(
                f"books: {path}: sha256 is {found[:12]}… ({len(text):,} bytes), expected {book.sha256[:12]}… "
                f"({book.n_bytes:,} bytes); delete it and run `archbench data fetch`"
            )
        documents.append(Document(book.filename, text))
    return documents


def _folder() -> Path:
    named = os.environ.get("ARCHBENCH_DATA")
    candidates = [Path(named) / "corpora" / "books"] if named else []
    candidates.append(fetched_folder())
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise DataError(
        f"books: not found in {' or '.join(map(str, candidates))}; run `archbench data fetch` (needs network), "
        "or set ARCHBENCH_DATA to a folder that holds corpora/books"
    )


def download(url: str) -> bytes:
    """The bytes behind a URL. Raises DataError when they cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content: bytes = response.read()
            return content
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be fetched ({error}); check the network and try again") from error


def fetch_books(
    destination: Path,
    progress: Callable[[str], None],
    *,
    download: Callable[[str], bytes] = download,
    books: list[Book] | None = None,
) -> list[Path]:
    """Download, prepare and verify the books that are not yet in `destination`; returns the path of each.

    progress: called with one line a book. download: URL to bytes. books: the manifest unless told otherwise.
    Raises DataError at the first book that cannot be had exactly; those before it stay.
    """
    paths = []
    for book in manifest() if books is None else books:
        path = destination / book.filename
        paths.append(path)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == book.sha256:
            progress(f"{book.title}: already there")
            continue
        text = prepare(book, download(book.url))
        write_atomically(path, lambda file, text=text: file.write(text))  # type: ignore[misc]
        progress(f"{book.title}: {len(text) / 1e6:.1f} MB")
    return paths


def prepare(book: Book, raw: bytes) -> bytes:
    """The prepared text within a downloaded file. Raises DataError when no form of it has the recorded sha256."""
    opening = book.opening.encode()
    raw = raw.replace(b"\r\n", b"\n")
    for form in _forms(raw):
        for match in re.finditer(re.escape(opening), form):
            text = form[match.start() : match.start() + book.n_bytes]
            if hashlib.sha256(text).hexdigest() == book.sha256:
                return text
    found = "the book's opening is in it" if opening in raw else "the book's opening is not in it"
    raise DataError(
        f"{book.url}: {book.title} ({len(raw):,} bytes) cannot be prepared to sha256 {book.sha256[:12]}… ({found}); "
        "refused: use dir:PATH with your own copy, under its own name"
    )


def _forms(raw: bytes) -> Iterator[bytes]:
    """The text as it came, then without the paragraphs that name Project Gutenberg, in each way to join the rest."""
    yield raw
    for paragraph in PARAGRAPH_FORMS:
        yield paragraph.sub(lambda match: b"" if b"gutenberg" in match[0].lower() else match[0], raw)
