"""Strict parsing of YAML text into frozen dataclasses: a typo is an error with a place, never a default.

YAML is read by the 1.2 rules where PyYAML's 1.1 rules surprise: `3e-4` is a number, `on`, `off`, `yes` and `no` are
text, and a key given twice is an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from archbench.errors import ConfigError, SuiteError, suggestion

T = TypeVar("T")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C one where PyYAML has it
    """The safe loader with YAML 1.2 numbers and booleans."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    "-+.0123456789",
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            mark = key_node.start_mark
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str, where: str) -> Any:
    """The data of a YAML document.

    Raises:
        SuiteError: it is not YAML; the message names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SuiteError(f"{where}{place}: not valid YAML: {problem}") from None


def parse(cls: type[T], data: Any, where: str) -> T:
    """An instance of the dataclass `cls` from a mapping, with types converted and unknown keys refused.

    Nested dataclasses are parsed likewise through `Mapping` fields by their owners; this function looks at one level.

    Raises:
        SuiteError: the message begins with `where` and the key, and says what was found and what is allowed.
    """
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise SuiteError(f"{where}: found {_shown(data)}; expected a mapping of keys to values")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise SuiteError(f"{_join(where, key)}: unknown key; {suggestion(str(key), fields)}")
    try:
        return _adapter(cls).validate_python(dict(data))  # type: ignore[arg-type]
    except ValidationError as error:
        raise SuiteError(_first_message(error, where)) from None


@cache
def _adapter(cls: Any) -> Any:
    """Made once: that takes longer than using it."""
    return TypeAdapter(cls)


def _first_message(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = where
    for part in first["loc"]:
        path = f"{path}[{part}]" if isinstance(part, int) else _join(path, part)
    if first["type"] == "missing":
        return f"{path}: required key is missing"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{path}: found {_shown(first['input'])}; {first['msg'].lower().removeprefix('input ')}"


def _join(where: str, key: Any) -> str:
    return f"{where}{'' if where.endswith(': ') else '.'}{key}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_bytes(text: str, where: str) -> float:
    """`2e6`, `8GB`, `512 MiB`: a number of bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:([kKMGT]?)(i?)B)?", text.strip())
    try:
        assert match is not None
        amount, power = float(match.group(1)), " kMGT".index((match.group(2) or " ").replace("K", "k"))
    except (AssertionError, ValueError):
        raise ConfigError(f"{where}: '{text}'; expected a number of bytes, such as 2e6, 8GB or 512MiB") from None
    return amount * (1024 if match.group(3) else 1000) ** power
