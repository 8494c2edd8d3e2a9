"""The baseline file: the records that a version is held against, cut down to what the gate needs and kept in git.

Rewriting it is how a change is acknowledged: the numbers that changed stand in the commit that changed them. So nothing
is kept in it that varies by itself (times, dates, the machine's load).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from archbench.errors import GateError
from archbench.gate.points import gated
from archbench.gate.quantities import rule_of
from archbench.record import Record

_PACKAGE = Path(__file__).resolve().parents[1]
_EMPTY: tuple[Any, ...] = ("", None, [], {})
_REQUIRED = {
    field.name
    for field in dataclasses.fields(Record)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
}
_ENVIRONMENT = ("cpu", "cpu_class", "python", "threads")


def find_baseline(suite: str) -> Path:
    """`baselines/SUITE.jsonl` below this folder, else the one that came with archbench. It may not be there."""
    here = Path("baselines") / f"{suite}.jsonl"
    if here.is_file():
        return here
    for folder in (_PACKAGE / "baselines", _PACKAGE.parent / "baselines"):
        if (folder / here.name).is_file():
            return folder / here.name
    return here


def require(path: Path, suite: str) -> Path:
    """Raises GateError when there is no such file."""
    if not path.is_file():
        raise GateError(
            f"{path}: no such baseline; `archbench gate --suite {suite} --accept` measures this version and writes it"
        )
    return path


def write_baseline(path: Path, records: Iterable[Record]) -> int:
    """Writes the gated records, sorted, and returns how many. Raises GateError when there are none."""
    kept = sorted(gated(records).items(), key=lambda entry: entry[0])
    if not kept:
        raise GateError(f"{path}: not written, for no quantity that the gate looks at was measured")
    lines = [json.dumps(_slim(record), separators=(",", ":"), ensure_ascii=False) for _, record in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _slim(record: Record) -> dict[str, Any]:
    """The fields of a record that the gate reads, without those that have their default."""
    rule = rule_of(record)
    assert rule is not None
    environment = {name: record.environment.get(name) for name in _ENVIRONMENT}
    environment["packages"] = {"torch": record.environment.get("packages", {}).get("torch")}
    slim = dataclasses.replace(
        record,
        run="baseline",
        job="",
        cell="",
        checkpoint="",
        source_sha256="",
        low=None,
        high=None,
        confidence=None,
        samples=[] if rule.kind == "value" else [float(f"{sample:.7g}") for sample in record.samples],
        along={},
        protocol=record.protocol if record.metric == "fingerprint" else "",
        config={},
        environment=environment,
        command="",
        created="",
    )
    data = dataclasses.asdict(slim)
    return {name: value for name, value in data.items() if name in _REQUIRED or value not in _EMPTY}
