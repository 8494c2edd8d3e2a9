"""A document: one piece of text that is never divided between training and held-out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """`name` is unique within its source and holds no machine path; `text` is UTF-8."""

    name: str
    text: bytes

    @cached_property
    def sha256(self) -> str:
        """Of the text alone, so that two copies under two names are seen to be one."""
        return hashlib.sha256(self.text).hexdigest()


def utf8_prefix(text: bytes, limit: int) -> bytes:
    """The longest prefix of at most `limit` bytes that does not cut a UTF-8 character in two."""
    if len(text) <= limit:
        return text
    end = limit
    while end > 0 and text[end] & 0b1100_0000 == 0b1000_0000:  # a continuation byte: the character began earlier
        end -= 1
    return text[:end]
