"""Whether two records were made where the same program gives the same bits."""

from __future__ import annotations

from archbench.record import Record


def torch_of(record: Record) -> str | None:
    return record.environment.get("packages", {}).get("torch")


def same_processor(a: Record, b: Record) -> bool:
    """Same class of processor, same torch, same number of threads; unknown is not the same."""
    classes = [(r.environment.get("cpu_class"), torch_of(r), r.environment.get("threads")) for r in (a, b)]
    return None not in classes[0] and classes[0] == classes[1]


def same_software(a: Record, b: Record) -> bool:
    """Same torch and same kernel levels: operators can be counted against each other."""
    return torch_of(a) is not None and torch_of(a) == torch_of(b) and a.backend == b.backend


def described(record: Record) -> str:
    """`AMD EPYC (class 1f0c...), torch 2.13.0, Python 3.11.7`."""
    here = record.environment
    processor = f"{here.get('cpu', 'unknown processor')} (class {here.get('cpu_class') or 'unknown'})"
    return f"{processor}, torch {torch_of(record) or 'unknown'}, Python {here.get('python', 'unknown')}"
