"""Plain data as JSON, exactly: what a candidate's call gave crosses to the judge in this form and no other.

    None, True         themselves             float              ["float", hexadecimal]
    str                itself                 complex            ["complex", hexadecimal, hexadecimal]
    int                ["int", hexadecimal]   bytes, bytearray   [name, hexadecimal]
                                              list, tuple, set, frozenset, dict    [name, items]

An instance of a subclass counts as the plain data that it holds (a Counter is a dict, a namedtuple a tuple), whatever
methods it brings: an `__eq__` of the candidate's own never reaches the judge. Nothing else crosses: no functions,
generators or objects.
"""

from __future__ import annotations

import json
from typing import Any

MAX_ITEMS = 200_000
"""Values within values that one answer may hold; a list of itself, and doubling by sharing, end here."""

SEQUENCES = (list, tuple, set, frozenset)
BYTES = (bytes, bytearray)


class NotPlain(Exception):
    """A value is not plain data; the message says what it is."""


class TooLong(Exception):
    """A value holds too many values."""


def encode(value: Any) -> str:
    """The JSON of a value (ASCII).

    Raises:
        NotPlain: the value is, or holds, something else than plain data, or nests too deep.
        TooLong: it holds more than MAX_ITEMS values.
    """
    left = [MAX_ITEMS]
    try:
        return json.dumps(_encoded(value, left))
    except RecursionError:
        raise NotPlain("nested too deep") from None


def decode(text: str) -> Any:
    """The value of a JSON that `encode` made. Raises ValueError for any other."""
    try:
        return _decoded(json.loads(text))
    except (TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise ValueError(f"not an encoded value: {error}") from None


def _encoded(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise TooLong
    if value is None or value is True or value is False:
        return value
    # The base classes' own methods: those of a subclass may be the candidate's.
    if isinstance(value, int):
        return ["int", hex(int.__index__(value))]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(complex.real.__get__(value)), float.hex(complex.imag.__get__(value))]
    if isinstance(value, str):
        return str.__str__(value)
    for string in BYTES:
        if isinstance(value, string):
            return [string.__name__, bytes(memoryview(value)).hex()]
    for container in SEQUENCES:
        if isinstance(value, container):
            return [container.__name__, [_encoded(item, left) for item in _items(container, value)]]
    if isinstance(value, dict):
        return ["dict", [[_encoded(key, left), _encoded(item, left)] for key, item in dict.items(value)]]
    name = type(value).__name__
    raise NotPlain(f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}")


def _items(container: Any, value: Any) -> Any:
    return container.__iter__(value)


def _decoded(data: Any) -> Any:
    if data is None or isinstance(data, (bool, str)):
        return data
    if not isinstance(data, list) or not data:
        raise ValueError("not an encoded value")
    kind, *content = data
    if kind == "int":
        (digits,) = content
        return int(digits, 16)
    if kind == "float":
        return float.fromhex(*content)
    if kind == "complex":
        real, imaginary = map(float.fromhex, content)
        return complex(real, imaginary)
    for known in BYTES:
        if kind == known.__name__:
            return known(bytes.fromhex(*content))
    if len(content) == 1 and isinstance(content[0], list):
        for container in SEQUENCES:
            if kind == container.__name__:
                return container(_decoded(item) for item in content[0])
        if kind == "dict":
            return {_decoded(key): _decoded(item) for key, item in content[0]}
    raise ValueError(f"not an encoded value: {kind!r:.40}")
