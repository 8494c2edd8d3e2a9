"""What the records let one say, in plain words, and what they do not.

A lower bits per byte is claimed only where the paired difference excludes zero (or, where the records do not pair, the
intervals do not overlap), and only within rows of one size and corpus that agree on at least one declared budget. Fewer
than three seeds, or a declared budget that differs by more than five per cent, make the whole comparison exploratory.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone

from archbench.errors import RecordError
from archbench.record import Record
from archbench.report import notation
from archbench.report.budget import AxisMatch, budget, declared_and_matched
from archbench.report.evidence import Evidence, Finding, known, separated
from archbench.report.pairs import Difference, difference
from archbench.report.quality import STATES, deviation
from archbench.report.rows import Row
from archbench.seeds import pooled, resolvable, spreads

MIN_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Headline:
    """`exploratory` lists the reasons for that label; empty when it does not apply."""

    title: str
    subtitle: tuple[tuple[str, str], ...]
    paragraphs: tuple[str, ...]
    exploratory: tuple[str, ...]
    remarks: tuple[str, ...]


def headline(evidence: Evidence, remarks: list[str]) -> Headline:
    arenas = evidence.arenas
    paragraphs, reasons = [], []
    for (size, corpus), rows in arenas.items():
        place = _place(size, corpus, len(arenas) > 1)
        match = budget(evidence, rows)
        paragraphs.append(_quality(evidence, rows, match, place))
        reasons += [f"{place}{reason}" for reason in _mismatches(match)]
    seeds = min((len(row.seeds) for row in evidence.architectures), default=0)
    if seeds < MIN_SEEDS:
        counted = {0: "no trained architecture", 1: "one seed"}.get(seeds, f"{seeds} seeds")
        reasons.insert(0, f"{counted}, where {MIN_SEEDS} are needed to see the luck of training")
    for row in evidence.architectures:
        if start := evidence.start_of(row):
            reasons.append(f"{row.name} went on from the trained weights of {start}, whose training no budget counts")
    if not paragraphs:
        paragraphs.append("No architecture with trained parameters is in these records.")
    head = evidence.records[0]
    return Headline(
        title=head.suite or "archbench run",
        subtitle=subtitle(evidence.records),
        paragraphs=tuple(paragraphs),
        exploratory=tuple(reasons),
        remarks=tuple(remarks),
    )


def counted_headline(evidence: Evidence, paragraphs: tuple[str, ...]) -> Headline:
    """Of a run that trained nothing: what it says is exact, and nothing is ranked."""
    title = evidence.records[0].suite or "archbench run"
    return Headline(title=title, subtitle=subtitle(evidence.records), paragraphs=paragraphs, exploratory=(), remarks=())


def _place(size: str, corpus: str, several: bool) -> str:
    return f"At size {size} on {corpus}: " if several else ""


def subtitle(records: list[Record]) -> tuple[tuple[str, str], ...]:
    """Suite, date, machine and command of a run."""
    head = records[-1]
    created = sorted(record.created for record in records if record.created)
    environment = head.environment
    memory = environment.get("memory_bytes")
    machine = [
        str(environment.get("cpu") or environment.get("machine") or "machine not recorded"),
        f"{environment['cores']} cores" if environment.get("cores") else "",
        f"{float(memory) / 2**30:.0f} GiB" if memory else "",
        str(environment.get("system") or ""),
    ]
    return (
        ("suite", head.suite or "not recorded"),
        ("date", _date(created[-1]) if created else "not recorded"),
        ("machine", ", ".join(part for part in machine if part)),
        ("command", head.command or "not recorded"),
    )


def _date(created: str) -> str:
    """`2026-11-21 10:15 UTC` from an ISO time."""
    try:
        return datetime.fromisoformat(created).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


def _quality(evidence: Evidence, rows: list[Row], match: list[AxisMatch], place: str) -> str:
    state = _headline_state(evidence, rows)
    found = [(row, evidence.find(row, "likelihood", "bits_per_byte", state=state)) for row in rows]
    have = sorted([pair for pair in found if pair[1].value is not None], key=lambda pair: known(pair[1]))
    sentences = []
    for row, finding in have:
        sentences.append(f"{row.name} {_bits(finding)}")
    lack = [
        f"{row.name} has no bits per byte: {notation.shorten(finding.reason, 70)}"
        for row, finding in found
        if finding.value is None and evidence.planned(row, "likelihood")
    ]
    text = f"{place}bits per byte of held-out text, {_state_words(state)}: {', '.join(sentences)}" if have else place
    text = f"{text[:1].upper()}{text[1:]}".rstrip()
    parts = [text + "."] if have else ([text] if text else [])
    if len(have) > 1:
        parts.append(_ranking(evidence, have, match, state))
        parts += _resolution(evidence, [row for row, _ in have], state)
        parts += _trials(evidence, [row for row, _ in have])
        parts += _other_states(evidence, [row for row, _ in have], state, match)
    elif have:
        parts.append("There is no second architecture with this number to hold it against.")
    parts += _floors(evidence, have, state)
    parts.append(_seeds(rows))
    parts += [f"{sentence}." for sentence in lack]
    return " ".join(parts)


def _headline_state(evidence: Evidence, rows: list[Row]) -> str:
    """The first state that most rows have; `reset` comes first, as it gives all of them the same context."""

    def support(state: str) -> int:
        return sum(evidence.find(r, "likelihood", "bits_per_byte", state=state).value is not None for r in rows)

    return max(STATES, key=support)


def _state_words(state: str) -> str:
    return {
        "reset": "with the state reset at every window",
        "sliding": "in sliding windows",
        "carried": "with the state carried through each document",
    }[state]


def _bits(finding: Finding) -> str:
    value, bounds = notation.interval(known(finding), finding.low, finding.high, finding.unit)
    return f"{value} {bounds}" if bounds else f"{value} (no interval)"


def conditions(evidence: Evidence, rows: list[Row], size: str) -> tuple[str, ...]:
    """Under which conditions rows of one size stand beside each other: the axes that were matched and how well, what
    their seeds can resolve, how learning rates were found."""
    have = [row for row in rows if evidence.find(row, "likelihood", "bits_per_byte", state=STATES[0]).value is not None]
    if len(have) < 2:
        return ()
    told = equality(evidence, have, f"At size {size} ")
    return (" ".join([told, *_resolution(evidence, have, STATES[0]), *_trials(evidence, have)]),)


def rankings(evidence: Evidence, rows: list[Row], size: str) -> tuple[str, ...]:
    """Which row of a size has the fewest bits per byte, by how much, and what stands behind that, in one note."""
    found = [(row, evidence.find(row, "likelihood", "bits_per_byte", state=STATES[0])) for row in rows]
    have = sorted([pair for pair in found if pair[1].value is not None], key=lambda pair: known(pair[1]))
    if len(have) < 2 or len({row.corpus for row, _ in have}) > 1:
        return conditions(evidence, rows, size)
    told = _ranking(evidence, have, budget(evidence, rows), STATES[0])
    ranked = [row for row, _ in have]
    return (" ".join([f"{size}: {told}", *_resolution(evidence, ranked, STATES[0]), *_trials(evidence, ranked)]),)


def equality(evidence: Evidence, rows: list[Row], place: str) -> str:
    """`At size micro equal in training bytes (exactly).`, or that these rows are equal in nothing that was declared."""
    matched = declared_and_matched(budget(evidence, rows), rows)
    return f"{place}equal in {_equal(matched) if matched else 'no declared budget: a ranking is exploratory'}."


def _ranking(evidence: Evidence, have: list[tuple[Row, Finding]], match: list[AxisMatch], state: str) -> str:
    (best, lowest), rest = have[0], have[1:]
    ranked = {row for row, _ in have}
    matched = declared_and_matched(match, ranked)
    if not matched:
        return "No declared budget is matched within 5 %, so nothing is ranked."
    equal = _equal(matched)
    pairs = {row: difference(evidence, best, row, state, comparisons=len(rest)) for row, _ in rest}
    apart = [row for row, finding in rest if _apart(pairs[row], lowest, finding)]
    close = [row.name for row, _ in rest if row not in apart]
    if any(not finding.has_interval for _, finding in have):
        return f"At equal {equal}, some values have no interval, so no difference can be claimed."
    if not close:
        return f"At equal {equal}, {best.name} has the lowest: {_lead(pairs, lowest, rest)}."
    names = [row.name for row in apart]
    also = f"; {notation.listed(names)} lie{'s' if len(names) == 1 else ''} above {best.name}" if names else ""
    if names and (nearest := pairs[apart[0]]) is not None:
        shown, bounds = notation.interval(-nearest.value, -nearest.high, -nearest.low, lowest.unit)
        also += f", {'the nearest of them ' if len(names) > 1 else ''}by {shown} {bounds} bits per byte"
    paired = [pair for name, pair in zip([row.name for row, _ in rest], pairs.values(), strict=True) if name in close]
    reason = (
        f"the differences between {best.name} and {notation.listed(close)} on the same {paired[0].over} do not "
        "exclude zero"
        if paired and paired[0] is not None
        else f"the intervals of {notation.listed([best.name, *close])} overlap"
    )
    return f"At equal {equal}, {reason}, so this run does not tell them apart{also}."


def _apart(pair: Difference | None, lowest: Finding, finding: Finding) -> bool:
    """Whether a row lies above the best one: by its paired difference, or where there is none by its interval."""
    return separated(lowest, finding) if pair is None else pair.high < 0


def _lead(pairs: dict[Row, Difference | None], lowest: Finding, rest: list[tuple[Row, Finding]]) -> str:
    """By how much the best row is below the others."""
    nearest, finding = rest[0]
    gap = known(finding) - known(lowest)
    relative = notation.percent(gap / known(finding))
    pair = pairs[nearest]
    if pair is None:
        others = f"that of {nearest.name}" if len(rest) == 1 else "any other"
        return (
            f"its interval does not overlap with {others}; the gap to {nearest.name} is {notation.plain(gap)} bits per "
            f"byte ({relative})"
        )
    shown, bounds = notation.interval(-pair.value, -pair.high, -pair.low, finding.unit)
    below = f"on the same {pair.over} it is {shown} {bounds} bits per byte ({relative}) below {nearest.name}"
    return below if len(rest) == 1 else f"{below}, and further below the others"


def _equal(matched: list[AxisMatch]) -> str:
    """`parameters (within 0.9 %) and training bytes (exactly)`."""
    return notation.listed([f"{axis.axis} ({_residual(axis)})" for axis in matched])


def _residual(axis: AxisMatch) -> str:
    shown = notation.percent(abs(axis.mismatch or 0.0))
    return "exactly" if shown == notation.percent(0.0) else f"within {shown}"


def _other_states(evidence: Evidence, rows: list[Row], state: str, match: list[AxisMatch]) -> list[str]:
    """A sentence for each other state under which another architecture is ahead beyond its interval."""
    if not declared_and_matched(match, rows):
        return []
    sentences = []
    first = min(rows, key=lambda row: known(evidence.find(row, "likelihood", "bits_per_byte", state=state)))
    for other in STATES:
        pairs = [(row, evidence.find(row, "likelihood", "bits_per_byte", state=other)) for row in rows]
        if other == state or any(finding.value is None for _, finding in pairs):
            continue
        (best, lowest), *rest = sorted(pairs, key=lambda pair: known(pair[1]))
        if best != first and all(separated(lowest, finding) for _, finding in rest):
            sentences.append(
                f"{_state_words(other).capitalize()}, {best.name} has the lowest instead: {_bits(lowest)}."
            )
    return sentences


def _resolution(evidence: Evidence, rows: list[Row], state: str) -> list[str]:
    """The smallest difference that the seeds could have found, so that a tie says how close it is."""
    records = [r for row in rows for r in evidence.records_of(row, "likelihood", "bits_per_byte", state=state)]
    n = min(len(row.seeds) for row in rows)
    if n < 2:
        return []
    try:
        least = resolvable(pooled(spreads(records, state=state)), n)
    except RecordError:
        return []
    return [f"{n} seeds resolve differences from {notation.plain(least)} bits per byte on (80 % power)."]


def _trials(evidence: Evidence, rows: list[Row]) -> list[str]:
    """How the learning rates were found, and of whom."""
    searched = {row: evidence.config(row).get("tuning") for row in rows}
    found = [tuning for tuning in searched.values() if tuning]
    if not found:
        return ["Learning rates were given by the suite, not searched for in this run."]
    counts = sorted({tuning["trials"] for tuning in found})
    tried = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    others = [row.name for row, tuning in searched.items() if not tuning]
    exempt = f"; that of {notation.listed(others)} was given" if others else ""
    return [f"Learning rates are the best of {tried} equal trials each{exempt}."]


def _floors(evidence: Evidence, have: list[tuple[Row, Finding]], state: str) -> list[str]:
    """Whether each architecture is below the best reference; one that is not has learned little."""
    floors = [
        (row, evidence.find(row, "likelihood", "bits_per_byte", state=state))
        for row in evidence.references
        if have and row.corpus == have[0][0].corpus
    ]
    floors = [(row, finding) for row, finding in floors if finding.value is not None]
    if not floors:
        return []
    best, floor = min(floors, key=lambda pair: known(pair[1]))
    above = [row.name for row, finding in have if not (separated(finding, floor) and known(finding) < known(floor))]
    if above:
        return [
            f"Not clearly below the {best.name} reference ({_bits(floor)}): {notation.listed(above)}; "
            "such a model has learned little."
        ]
    return [
        f"The {best.name} reference stands at {_bits(floor)}; {'both' if len(have) == 2 else 'all'} are below it."
        if len(have) > 1
        else f"The {best.name} reference stands at {_bits(floor)}, above it."
    ]


def _seeds(rows: list[Row]) -> str:
    counts = sorted({len(row.seeds) for row in rows})
    if counts == [1]:
        return "One training each: the intervals do not cover the luck of training."
    if len(counts) == 1:
        return f"{counts[0]} seeds each: values are means, intervals are over seeds."
    return f"{counts[0]} to {counts[-1]} seeds: where there are several, values are means and intervals are over seeds."


def _mismatches(match: list[AxisMatch]) -> list[str]:
    reasons = []
    for axis in match:
        if not axis.declared or len(axis.contenders) < 2:
            continue
        if all(entry.matched or entry.started for entry in axis.contenders):
            continue  # matched, or not for a reason that is told once for all axes
        if axis.mismatch is None:
            missing = [entry.row.name for entry in axis.contenders if entry.deviation is None]
            whose = notation.listed(missing) if len(missing) < len(axis.contenders) else "any of them"
            reasons.append(f"{axis.axis} not known for {whose}")
        else:
            worst = max(axis.contenders, key=lambda entry: abs(entry.deviation or 0.0))
            reasons.append(
                f"{axis.axis} of {worst.row.name} differ by {deviation(axis.mismatch)} "
                f"from {axis.contenders[0].row.name}"
            )
    return reasons
