"""The decision: at this context, in this memory, at this speed, after so much training text, which architecture?

Of the rows that meet every need, the one with the lowest bits per byte is chosen; those that its records cannot tell
from it are named with it. What was measured at other contexts is interpolated, straight in logarithms; beyond the
contexts measured nothing is known, and a row that has no value there is left out with that reason. A model without
likelihood has no bits per byte: it is listed with its BrierLM, not ranked.

    memory = 4 bytes a parameter + the state of one row after the context
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from archbench.errors import ConfigError
from archbench.report import notation, table
from archbench.report.budget import training_bytes
from archbench.report.evidence import Evidence, Finding, separated
from archbench.report.levels import best
from archbench.report.pairs import difference
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell
from archbench.report.verdict import conditions

BYTES_PER_PARAMETER = 4
STATE = "reset"


@dataclass(frozen=True, kw_only=True)
class Need:
    """What is asked for: tokens of context, bytes of memory, seconds per token of one row (wall clock), bytes of
    training text; None where it does not matter."""

    context: int
    memory: float | None = None
    seconds_per_token: float | None = None
    training_bytes: float | None = None

    def __post_init__(self) -> None:
        for name in ("context", "memory", "seconds_per_token", "training_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"choose: {name.replace('_', ' ')} {value:g}; must be above 0")

    def words(self) -> str:
        parts = [f"{notation.tokens(self.context)} tokens of context"]
        parts += [f"{notation.plain(self.memory, 'B')} of memory"] if self.memory else []
        if self.seconds_per_token:
            parts.append(f"{notation.plain(self.seconds_per_token, 's')} per token")
        parts += [f"{notation.plain(self.training_bytes, 'B')} of training text"] if self.training_bytes else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row with what it offers at the context asked for; None where that is not known. `refused` says which need it
    does not meet, empty if it meets all."""

    row: Row
    bits: Finding
    memory: float | None
    seconds_per_token: float | None
    training_bytes: float | None
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`best` is None where no row meets the need; `tied` cannot be told from it; `ranked` are all that meet the need,
    best first; `others` do not, or have no bits per byte."""

    need: Need
    best: Candidate | None
    tied: tuple[Candidate, ...]
    ranked: tuple[Candidate, ...]
    others: tuple[Candidate, ...] = field(default=())

    def sentence(self) -> str:
        if self.best is None:
            return f"With {self.need.words()}: no architecture of this run meets that."
        shown, bounds = notation.interval(_value(self.best), self.best.bits.low, self.best.bits.high)
        told = f"With {self.need.words()}: choose {self.best.row.name} ({f'{shown} {bounds}'.strip()} bits per byte)"
        if self.tied:
            told += f"; {notation.listed([c.row.name for c in self.tied])} cannot be told from it by quality"
        return told + "."


def decide(evidence: Evidence, need: Need) -> Decision:
    """The architecture to choose among all rows of the run, whatever their size."""
    found = [_candidate(evidence, row, need) for row in evidence.architectures]
    ranked = sorted([c for c in found if not c.refused and c.bits.value is not None], key=_value)
    others = tuple(c for c in found if c not in ranked)
    if not ranked:
        return Decision(need=need, best=None, tied=(), ranked=(), others=others)
    best, rest = ranked[0], ranked[1:]
    tied = tuple(c for c in rest if not _apart(evidence, best, c, len(rest)))
    return Decision(need=need, best=best, tied=tied, ranked=tuple(ranked), others=others)


def matched_along(evidence: Evidence) -> tuple[str, ...]:
    """Along which axes the rows that are chosen from are equal, a sentence a size."""
    sizes, corpora = ({arena[i] for arena in evidence.arenas} for i in (0, 1))
    told = ["Rows of all sizes stand in one list: their sizes differ on purpose."] if len(sizes) > 1 else []
    for (size, corpus), rows in evidence.arenas.items():
        told += conditions(evidence, rows, f"{size}, {corpus}" if len(corpora) > 1 else size)
    return tuple(told)


def contexts(evidence: Evidence) -> list[int]:
    """The contexts at which states or times were measured, ascending."""
    found = set()
    for row in evidence.architectures:
        for metric, quantity in (("cost", "state_bytes"), ("latency", "time_per_token")):
            found |= {f.coordinates["context"] for f in evidence.series(row, metric, quantity) if f.value is not None}
    return sorted(int(context) for context in found)


def at_context(points: dict[float, float], context: float) -> float | None:
    """The value at `context`, straight in logarithms between measured points; None outside them."""
    if not points or not min(points) <= context <= max(points):
        return None
    left = max(x for x in points if x <= context)
    right = min(x for x in points if x >= context)
    if left == right or min(points[left], points[right]) <= 0:
        return points[left]
    t = math.log(context / left) / math.log(right / left)
    return math.exp((1 - t) * math.log(points[left]) + t * math.log(points[right]))


def _candidate(evidence: Evidence, row: Row, need: Need) -> Candidate:
    parameters = evidence.find(row, "cost", "parameters", kind="total").value
    state = at_context(_points(evidence, row, "cost", "state_bytes"), need.context)
    memory = None if parameters is None or state is None else BYTES_PER_PARAMETER * parameters + state
    times = _times(evidence, row)
    spent = training_bytes(evidence, row).value
    candidate = Candidate(
        row=row,
        bits=evidence.find(row, "likelihood", "bits_per_byte", state=STATE),
        memory=memory,
        seconds_per_token=at_context(times, need.context),
        training_bytes=spent,
    )
    return Candidate(**{**vars(candidate), "refused": _refusal(candidate, need)})


def _times(evidence: Evidence, row: Row) -> dict[float, float]:
    """Seconds per token of one row by context, at the best level the architecture has: what whoever chooses it gets."""
    return _points(evidence, row, "latency", "time_per_token", clock="wall", batch=1, **best(evidence))


def _points(evidence: Evidence, row: Row, metric: str, quantity: str, **at: object) -> dict[float, float]:
    found = evidence.series(row, metric, quantity, **at)
    return {f.coordinates["context"]: f.value for f in found if f.value is not None and "context" in f.coordinates}


def _refusal(candidate: Candidate, need: Need) -> str:
    limits = (
        ("memory", candidate.memory, need.memory, "B"),
        ("time per token", candidate.seconds_per_token, need.seconds_per_token, "s"),
        ("training text", candidate.training_bytes, need.training_bytes, "B"),
    )
    for name, value, limit, unit in limits:
        if limit is None:
            continue
        if value is None:
            return f"{name} at {notation.tokens(need.context)} tokens was not measured"
        if value > limit * (1 + 1e-9):
            return f"{name} {notation.plain(value, unit)} is above {notation.plain(limit, unit)}"
    return ""


def _value(candidate: Candidate) -> float:
    assert candidate.bits.value is not None
    return candidate.bits.value


def _apart(evidence: Evidence, best: Candidate, other: Candidate, comparisons: int) -> bool:
    if best.row.corpus == other.row.corpus:
        pair = difference(evidence, best.row, other.row, STATE, comparisons=comparisons)
        if pair is not None:
            return pair.high < 0
    return separated(best.bits, other.bits)


def presets(evidence: Evidence) -> list[Need]:
    """The needs that a report answers by itself: the shortest and the longest context measured, each without limits,
    with a tenth of the largest memory, and with half of the largest time."""
    known = contexts(evidence)
    needs = []
    for context in dict.fromkeys((known[0], known[-1])) if known else ():
        free = Need(context=context)
        found = [_candidate(evidence, row, free) for row in evidence.architectures]
        needs.append(free)
        memories = [c.memory for c in found if c.memory is not None]
        times = [c.seconds_per_token for c in found if c.seconds_per_token is not None]
        if len(memories) > 1:
            needs.append(Need(context=context, memory=_round((min(memories) * max(memories)) ** 0.5)))
        if len(times) > 1:
            needs.append(Need(context=context, seconds_per_token=_round((min(times) * max(times)) ** 0.5)))
    return needs


def _round(value: float) -> float:
    """To two digits."""
    return float(f"{value:.1e}")


def decision_table(evidence: Evidence) -> Table | None:
    """What to choose under the preset needs; None where fewer than two architectures can be ranked."""
    decisions = [decide(evidence, need) for need in presets(evidence)]
    if not any(len(decision.ranked) > 1 for decision in decisions):
        return None
    return Table(
        key="decision",
        title="What to choose",
        columns=(
            Column(name="need", numeric=False),
            Column(name="choose", numeric=False),
            Column(name="bits per byte"),
            Column(name="not told apart", numeric=False),
            Column(name="does not meet it", numeric=False),
        ),
        lines=tuple(_line(decision) for decision in decisions),
        notes=(
            "Memory is 4 bytes a parameter and the state of one row; times are of one row on the machine named above. "
            "`archbench choose RUN --context C --memory M --ms-per-token T` answers any other need.",
            *matched_along(evidence),
        ),
    )


def _line(decision: Decision) -> tuple[TableCell, ...]:
    best = decision.best
    left = [c.row.name for c in decision.others if c.refused]
    bits = table.absent("no architecture meets it") if best is None else table.number(best.bits)
    return (
        table.text(decision.need.words()),
        table.text("none" if best is None else best.row.name),
        bits,
        table.text(", ".join(c.row.name for c in decision.tied) or "none"),
        table.text(", ".join(left) or "none"),
    )


def panel_data(evidence: Evidence) -> dict[str, object] | None:
    """What the page's panel decides by, as plain data: the same points, and which row is apart from which. None where
    fewer than two architectures can be ranked."""
    known = contexts(evidence)
    if not known:
        return None
    found = [_candidate(evidence, row, Need(context=known[0])) for row in evidence.architectures]
    ranked = [c for c in found if c.bits.value is not None]
    if len(ranked) < 2:
        return None
    return {
        "contexts": known,
        "rows": [
            {
                "name": c.row.name,
                "bits": c.bits.value,
                "low": c.bits.low,
                "high": c.bits.high,
                "parameters": evidence.find(c.row, "cost", "parameters", kind="total").value,
                "state": sorted(_points(evidence, c.row, "cost", "state_bytes").items()),
                "time": sorted(_times(evidence, c.row).items()),
                "trained": c.training_bytes,
                "apart": [o.row.name for o in ranked if o is not c and _apart(evidence, c, o, len(ranked) - 1)],
            }
            for c in ranked
        ],
        "unranked": [{"name": c.row.name, "reason": c.bits.reason} for c in found if c.bits.value is None],
    }
