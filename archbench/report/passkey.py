"""Passkey retrieval in words and tables: how far each row finds a hidden number, in what texts, and at what cost.

Rows trained on the task and rows that never saw it stand apart. What was not run says why, with its projected cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archbench.report import notation, table
from archbench.report.evidence import Evidence
from archbench.report.passkey_grids import LOW, METRIC, Grid, Tally, grids, variants
from archbench.report.table import Column, Table, TableCell


def passkey_tables(evidence: Evidence) -> list[Table]:
    """How far, in what other texts, at what cost; none where no cell was asked."""
    found = grids(evidence)
    if not found:
        return []
    first = found[0].variant
    plain, others = [g for g in found if g.variant == first], [g for g in found if g.variant != first]
    tables = [_reach(evidence, plain)]
    tables += [_other_texts(evidence, plain, others)] if others else []
    return [*tables, _costs(evidence, plain)]


def passkey_remarks(evidence: Evidence) -> list[str]:
    """One sentence for each row that finds the number at all lengths up to some, one for those that do not."""
    remarks, failed = [], []
    found = grids(evidence)
    plain = [grid for grid in found if grid.variant == found[0].variant]
    for grid in plain:
        if not grid.solved_to:
            failed.append(grid.name + _unfinished(evidence, grid))
            continue
        tally = grid.over_depths(grid.solved_to)
        low, high = tally.bounds
        remarks.append(
            f"Passkey, {grid.name}: solved at every depth up to {notation.tokens(grid.solved_to)} tokens "
            f"({tally.right}/{tally.n} there, interval [{low:.2f}, {high:.2f}]); {_recipe(evidence, grid)}."
        )
    if failed:
        shortest = notation.tokens(plain[0].lengths[0])
        remarks.append(f"Passkey, not solved at every depth even at {shortest} tokens: {notation.listed(failed)}.")
    return remarks


def _reach(evidence: Evidence, plain: list[Grid]) -> Table:
    lengths = sorted({length for grid in plain for length in grid.lengths})
    lines = [
        (
            table.text(grid.row.name),
            _taught(evidence, grid),
            _effective(evidence, grid),
            *(_share(grid.over_depths(length)) for length in lengths),
        )
        for grid in plain
    ]
    return Table(
        key="passkey",
        title="Passkey: answers with every digit right, all depths together",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="learned", numeric=False),
            Column(name="effective length", hint="tokens, mean over depths at least 85 %"),
            *(Column(name=notation.tokens(length), hint="tokens") for length in lengths),
        ),
        lines=tuple(lines),
        notes=(
            _chance_note(evidence, plain),
            *_segment_notes(evidence, plain),
            "Zero-shot rows learned the corpus alone. The others learned this task from their first weights: none is a "
            "fine-tuned language model, and nothing here repeats what was published of large ones.",
        ),
    )


def _taught(evidence: Evidence, grid: Grid) -> TableCell:
    if grid.learned != "trained":
        return table.text(grid.learned, "the corpus alone")
    stage = evidence.find(grid.row, METRIC, "stage")
    windows, replay = _windows(evidence, grid)
    reached = f"stage {stage.value:g} of {stage.coordinates['of']}" if stage.value is not None else stage.reason
    more = f"replay {replay:g}" if replay > 1 else "no replay"
    return TableCell(text=reached, detail=f"windows of {windows}", more=f"{more}{_front(evidence, grid)}", sort=reached)


def _effective(evidence: Evidence, grid: Grid) -> TableCell:
    finding = evidence.find(grid.row, METRIC, "effective_length", variant=grid.variant, learned=grid.learned)
    if finding.value is None:
        return table.number(finding)
    if not finding.value:
        return TableCell(text=f"below {notation.tokens(grid.lengths[0])}", sort=0.0)
    return TableCell(text=notation.tokens(finding.value), sort=finding.value)


def _share(tally: Tally) -> TableCell:
    if not tally.n:
        return table.absent(tally.reason, tally.status)
    low, high = tally.bounds
    digits = "" if tally.digits is None else f"digits {notation.percent(tally.digits)}"
    return TableCell(text=f"{tally.right}/{tally.n}", detail=f"[{low:.2f}, {high:.2f}]", more=digits, sort=tally.value)


def _chance_note(evidence: Evidence, plain: list[Grid]) -> str:
    chances = {
        finding.value
        for grid in plain
        for finding in evidence.series(grid.row, METRIC, "chance", variant=grid.variant)
        if finding.value is not None
    }
    guessed = notation.listed([f"{chance:.0e}" for chance in sorted(chances)]) if chances else "not recorded"
    return f"Brackets hold 95 % Wilson intervals. Chance: {guessed} for all digits, 10 % for each."


def _segment_notes(evidence: Evidence, plain: list[Grid]) -> Iterator[str]:
    """How many segments the farthest needle is away, for rows that read by segments."""
    told: dict[str, list[str]] = {}
    for grid in plain:
        segment = evidence.config(grid.row).get("model", {}).get("segment")
        if not segment or not grid.distances:
            continue
        far = [max(d for (n, _), d in grid.distances.items() if n == length) for length in grid.lengths]
        away = [f"{d // segment} at {notation.tokens(n)}" for n, d in zip(grid.lengths, far, strict=True)]
        told.setdefault(f"of {segment} tokens before the question at depth 0: {', '.join(away)}", []).append(grid.name)
    for what, names in told.items():
        yield f"The needle lies so many segments {what} ({notation.listed(list(dict.fromkeys(names)))})."


def _other_texts(evidence: Evidence, plain: list[Grid], others: list[Grid]) -> Table:
    asked = list(dict.fromkeys((grid.variant, length) for grid in others for length in grid.lengths))
    lines = []
    for grid in plain:
        own = {g.variant: g for g in others if (g.row, g.learned) == (grid.row, grid.learned)}
        cells = [
            _share(own[variant].over_depths(length)) if variant in own else table.absent("not asked")
            for variant, length in asked
        ]
        lines.append((table.text(grid.name), *cells))
    return Table(
        key="passkey-texts",
        title="Passkey in other texts: answers with every digit right, all depths together",
        columns=(
            Column(name="architecture", numeric=False),
            *(Column(name=variant, hint=f"{notation.tokens(length)} tokens") for variant, length in asked),
        ),
        lines=tuple(lines),
        notes=(
            "What the texts hold: " + "; ".join(_described(evidence, name) for name in variants(evidence)) + ".",
            *_caveats(plain, others),
            "Passkey is necessary, not sufficient: a small model trained on it may look for digits, not for the key.",
        ),
    )


def _described(evidence: Evidence, variant: str) -> str:
    given = next((r.settings for r in evidence.records if r.metric == METRIC), {}).get("variants", ())
    settings: dict[str, Any] = next((v.get("settings", {}) for v in given if v.get("name") == variant), {})
    return f"{variant}: " + (", ".join(f"{name} {value}" for name, value in settings.items()) or "filler alone")


def _caveats(plain: list[Grid], others: list[Grid]) -> Iterator[str]:
    """Where a row that solves the plain texts fails in others, with the numbers."""
    for grid in plain:
        if not grid.solved_to:
            continue
        failing = []
        for other in others:
            tally = other.over_depths(other.lengths[0])
            if (other.row, other.learned) == (grid.row, grid.learned) and tally.n and tally.value < LOW:
                failing.append(f"{tally.right}/{tally.n} at {notation.tokens(other.lengths[0])} of {other.variant}")
        if failing:
            yield (
                f"Caveat: {grid.name} solves {notation.tokens(grid.solved_to)} of {grid.variant}, but answers "
                f"{notation.listed(failing)}."
            )


def _costs(evidence: Evidence, plain: list[Grid]) -> Table:
    lengths = sorted({length for grid in plain for length in grid.lengths})
    lines = [(table.text(grid.name), *(_cost(evidence, grid, length) for length in lengths)) for grid in plain]
    return Table(
        key="passkey-cost",
        title="Passkey: time for all depths and samples of a length, and the state of one row",
        columns=(
            Column(name="architecture", numeric=False),
            *(Column(name=notation.tokens(length), hint="tokens") for length in lengths),
        ),
        lines=tuple(lines),
        notes=(
            "One pass over the filler serves every depth of a length and shorter lengths; read: the tokens read so, as "
            "a share of reading every text by itself. Projected: what was not run, its time from the longest length "
            "that was, by the FLOPs of reading, its state along a line.",
            *_bytes_notes(evidence, plain),
            *_smaller(evidence, plain, lengths[-1]),
        ),
    )


def _cost(evidence: Evidence, grid: Grid, length: int) -> TableCell:
    at = {"variant": grid.variant, "learned": grid.learned, "length": length}
    seconds, state = (evidence.find(grid.row, METRIC, name, **at) for name in ("seconds", "state_bytes"))
    projected = seconds.value is None
    if projected:
        refusal, status = grid.over_depths(length).reason, grid.over_depths(length).status
        seconds, state = (
            evidence.find(grid.row, METRIC, name, **at) for name in ("projected_seconds", "projected_state_bytes")
        )
        if seconds.value is None:
            return table.absent(refusal or seconds.reason, status)
    assert seconds.value is not None
    size = "" if state.value is None else f"state {notation.plain(state.value, 'B')}"
    word = "projected " if projected else ""
    read = [evidence.find(grid.row, METRIC, "tokens_read", **at, way=way).value for way in ("shared", "apart")]
    more = f"read {notation.percent(read[0] / read[1])}" if read[0] is not None and read[1] else ""
    return TableCell(text=f"{word}{notation.plain(seconds.value, 's')}", detail=size, more=more, sort=seconds.value)


def _bytes_notes(evidence: Evidence, plain: list[Grid]) -> Iterator[str]:
    """How much text a token stands for, where it is not one byte."""
    told: dict[float, list[str]] = {}
    for grid in plain:
        found = evidence.series(grid.row, METRIC, "text_bytes", variant=grid.variant, learned=grid.learned)
        for finding in found[-1:]:
            if finding.value is not None and finding.value != finding.coordinates["length"]:
                told.setdefault(round(finding.value / finding.coordinates["length"], 1), []).append(grid.name)
    for ratio, names in told.items():
        yield f"A token of {notation.listed(names)} stands for {ratio:g} bytes of these texts, elsewhere for one."


def _smaller(evidence: Evidence, plain: list[Grid], length: int) -> Iterator[str]:
    """The smallest and the largest state at a length, of rows that solve it or had to be left out."""
    sizes = {}
    for grid in plain:
        at = {"variant": grid.variant, "learned": grid.learned, "length": length}
        finding = evidence.find(grid.row, METRIC, "state_bytes", **at)
        if finding.value is None:
            finding = evidence.find(grid.row, METRIC, "projected_state_bytes", **at)
        if finding.value is not None:
            sizes[grid.name] = (finding.value, finding)
    solving = [grid.name for grid in plain if grid.solved_to >= length and grid.name in sizes]
    if not solving:
        return
    small, large = min(solving, key=lambda name: sizes[name][0]), max(sizes, key=lambda name: sizes[name][0])
    ratio = sizes[large][0] / sizes[small][0]
    if ratio > 1:
        yield (
            f"At {notation.tokens(length)} tokens the state of {small} takes {notation.plain(sizes[small][0], 'B')} a "
            f"row, {notation.ratio(ratio).lstrip('×')} times less than the {notation.plain(sizes[large][0], 'B')} of "
            f"{large}."
        )


def _windows(evidence: Evidence, grid: Grid) -> tuple[str, float]:
    """The lengths of the training windows, and the largest replay."""
    task = (evidence.config(grid.row).get("training") or {}).get("task") or {}
    stages = task.get("stages", ())
    windows = list(dict.fromkeys(str(stage["context"]) for stage in stages))
    return notation.listed(windows) if windows else "not recorded", max((s["replay"] for s in stages), default=1.0)


def _front(evidence: Evidence, grid: Grid) -> str:
    width = evidence.config(grid.row).get("model", {}).get("frontend_conv")
    return f", convolution of {width} in front" if width else ""


def _recipe(evidence: Evidence, grid: Grid) -> str:
    if grid.learned != "trained":
        return "zero-shot"
    windows, replay = _windows(evidence, grid)
    with_replay = f"filler replay {replay:g}" if replay > 1 else "no filler replay"
    return f"trained in windows of {windows} tokens, {with_replay}{_front(evidence, grid)}"


def _unfinished(evidence: Evidence, grid: Grid) -> str:
    stage = evidence.find(grid.row, METRIC, "stage")
    if grid.learned != "trained" or stage.value is None or stage.value >= stage.coordinates["of"]:
        return ""
    return f" (training reached stage {stage.value:g} of {stage.coordinates['of']})"
