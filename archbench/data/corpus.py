"""A corpus: documents divided once and for all into training and held-out text, and the hash that names them.

The split goes by document, never by line: neighbouring lines of one file would leak. Which side a document falls on
follows from the sha256 of its text, so no order of files and no seed can move it, and copies of one text cannot end on
both sides (copies are dropped first). The hash covers names, texts and the split rule; results carry it, and results
with different hashes were not measured on the same data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from archbench.data.document import Document, utf8_prefix
from archbench.data.sources import find_source
from archbench.errors import DataError

HELDOUT_SHARE = 0.05
TAIL = "#tail"
TAIL_MIN_BYTES = 1_000_000  # below this 5 % is too little text to measure anything on


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Cleaned and split text.

    name: the spec it was loaded by. train, heldout: sorted by name. sha256: over names, texts and split rule.
    n_duplicates, n_with_nul, n_empty: documents that were dropped, by reason. NUL is dropped because token 0 is the
    boundary between documents in every codec, the byte codec included.
    """

    name: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    sha256: str
    n_duplicates: int = 0
    n_with_nul: int = 0
    n_empty: int = 0

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of both sides."""
        return self.n_train_bytes + self.n_heldout_bytes

    @property
    def n_train_bytes(self) -> int:
        return sum(len(document.text) for document in self.train)

    @property
    def n_heldout_bytes(self) -> int:
        return sum(len(document.text) for document in self.heldout)

    def provenance(self) -> dict[str, str | int]:
        """What a result says about its data."""
        return {
            "corpus": self.name,
            "sha256": self.sha256,
            "n_bytes": self.n_bytes,
            "n_heldout_bytes": self.n_heldout_bytes,
            "n_train_documents": len(self.train),
            "n_heldout_documents": len(self.heldout),
            "n_duplicates": self.n_duplicates,
            "n_with_nul": self.n_with_nul,
            "n_empty": self.n_empty,
        }


def load_corpus(spec: str, heldout_share: float = HELDOUT_SHARE) -> Corpus:
    """Read, clean and split the corpus that `spec` names: `SOURCE[:ARGUMENT][#tail]`, for instance `dir:notes`.

    `#tail` holds out the last part of a single long document; without it a corpus needs two documents.
    Raises DataError when the source, its argument or the text is unusable, MissingExtra when a package is.
    """
    address = spec.removesuffix(TAIL)
    name, colon, argument = address.partition(":")
    source = find_source(name)
    if colon and not source.argument:
        raise DataError(f"{spec}: '{name}' takes no argument; write '{name}'")
    if source.argument and not argument:
        raise DataError(f"{spec}: '{name}' needs an argument; write '{name}:{source.argument}'")
    return build_corpus(spec, source.read(argument), heldout_share, tail=spec.endswith(TAIL))


def build_corpus(
    name: str, documents: Iterable[Document], heldout_share: float = HELDOUT_SHARE, *, tail: bool = False
) -> Corpus:
    """Clean documents from anywhere, split them and hash the result.

    heldout_share: of the bytes, between 0 and 1, both excluded.
    Raises DataError for text that is not UTF-8, for no text, and when one side would be empty.
    """
    if not 0 < heldout_share < 1:
        raise DataError(f"{name}: held-out share is {heldout_share}; allowed: above 0 and below 1")
    kept: dict[str, Document] = {}
    n_duplicates = n_with_nul = n_empty = 0
    for document in sorted(documents, key=lambda document: (document.name, document.sha256)):
        _require_utf8(name, document)
        if not document.text:
            n_empty += 1
        elif b"\0" in document.text:
            n_with_nul += 1
        elif document.sha256 in kept:
            n_duplicates += 1
        else:
            kept[document.sha256] = document
    clean = list(kept.values())
    if not clean:
        raise DataError(f"{name}: no text here ({n_empty} empty and {n_with_nul} binary documents); name text files")
    train, heldout = _split_tail(name, clean, heldout_share) if tail else _split(name, clean, heldout_share)
    rule = f"{'tail' if tail else 'document'} {heldout_share!r}"
    return Corpus(
        name=name,
        train=tuple(train),
        heldout=tuple(heldout),
        sha256=_digest(train, heldout, rule),
        n_duplicates=n_duplicates,
        n_with_nul=n_with_nul,
        n_empty=n_empty,
    )


def _require_utf8(name: str, document: Document) -> None:
    try:
        document.text.decode()
    except UnicodeDecodeError as error:
        kind = "binary" if b"\0" in document.text else f"not UTF-8 (byte {error.start})"
        raise DataError(f"{name}: {document.name}: {kind}; convert it to UTF-8 text or leave it out") from error


def _split(name: str, documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Hold out, in the order of the hashes, every document that still fits into the share.

    When none fits (a few long books) the shortest is held out, which oversteps the share by the least.
    """
    if len(documents) < 2:
        found = documents[0]
        n_bytes = len(found.text)
        if n_bytes > TAIL_MIN_BYTES:
            way = f"add documents, or write '{name}{TAIL}' to hold out the last {share:.0%} of this one"
        else:
            way = f"add documents ('{TAIL}' splits a single one only above {TAIL_MIN_BYTES:,} bytes)"
        raise DataError(f"{name}: one document ({found.name}, {n_bytes:,} bytes) cannot be split by document; {way}")
    room = share * sum(len(document.text) for document in documents)
    chosen = set()
    for document in sorted(documents, key=lambda document: document.sha256):
        if len(document.text) <= room:
            chosen.add(document.sha256)
            room -= len(document.text)
    if len(chosen) in (0, len(documents)):
        chosen = {min(documents, key=lambda document: (len(document.text), document.sha256)).sha256}
    train = [document for document in documents if document.sha256 not in chosen]
    heldout = [document for document in documents if document.sha256 in chosen]
    return train, heldout


def _split_tail(name: str, documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Hold out the end of a single long document, from the start of a line when there is one nearby."""
    if len(documents) > 1:
        raise DataError(f"{name}: '{TAIL}' is for a single document and here are {len(documents)}; leave it out")
    document = documents[0]
    if len(document.text) <= TAIL_MIN_BYTES:
        raise DataError(
            f"{name}: {document.name} has {len(document.text):,} bytes; "
            f"'{TAIL}' needs more than {TAIL_MIN_BYTES:,}; use a longer text or several documents"
        )
    head = utf8_prefix(document.text, round(len(document.text) * (1 - share)))
    line_start = head.rfind(b"\n", len(head) - 10_000) + 1
    cut = line_start or len(head)
    train = Document(f"{document.name} (head)", document.text[:cut])
    heldout = Document(f"{document.name} (tail)", document.text[cut:])
    return [train], [heldout]


def _digest(train: list[Document], heldout: list[Document], rule: str) -> str:
    digest = hashlib.sha256(f"split {rule}\n".encode())
    for side, documents in (("train", train), ("heldout", heldout)):
        for document in documents:
            digest.update(f"{side} {document.sha256} {document.name!r}\n".encode())
    return digest.hexdigest()
