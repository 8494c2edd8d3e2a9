"""Tables of speculative decoding: what is accepted, what it is worth, and the proof that the text is the same."""

from __future__ import annotations

from typing import Any

from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.grid import coordinate, points_of
from archbench.report.rows import Row
from archbench.report.table import Column, Table, TableCell

_TIMES = ("break_even", "predicted_speedup", "speedup")


def _timed(evidence: Evidence, row: Row) -> bool:
    return bool(evidence.series(row, "speculation_speed", "speedup"))


def acceptance(evidence: Evidence, row: Row, **at: Any) -> dict[int, Finding]:
    """Acceptance by position, of the first sampling unless `at` names another."""
    found = evidence.series(row, "speculation", "acceptance", **at)
    if found and not at:
        return acceptance(evidence, row, sampling=found[0].coordinates.get("sampling"))
    return {int(finding.coordinates["position"]): finding for finding in found if "position" in finding.coordinates}


def drafting(evidence: Evidence) -> list[Row]:
    """The rows whose steps do not always write the same number of tokens."""
    curves = {row: acceptance(evidence, row).values() for row in evidence.rows}
    return [row for row, curve in curves.items() if any(known(finding) < 1 for finding in curve)]


def speculation_tables(evidence: Evidence) -> list[Table]:
    """What a step writes, and what drafting is worth; none where nobody asked."""
    return [made for made in (_acceptance_table(evidence), _speed_table(evidence)) if made is not None]


def _acceptance_table(evidence: Evidence) -> Table | None:
    rows = [row for row in evidence.rows if evidence.planned(row, "speculation")]
    if not any(acceptance(evidence, row) for row in rows):
        return None
    positions = sorted({position for row in rows for position in acceptance(evidence, row)})
    lines = []
    for row in rows:
        for at in points_of(evidence, row, "speculation", "tokens_per_step", ("sampling",)):
            lines.append(
                (
                    table.text(row.name),
                    table.text(str(at.get("sampling", "any"))),
                    table.number(evidence.find(row, "speculation", "tokens_per_step", **at)),
                    *(_accepted(evidence, row, position, at) for position in positions),
                    *(
                        table.number(evidence.find(row, "speculation", quantity, sampling="greedy"))
                        if at.get("sampling") == "greedy"
                        else table.text("greedy only")
                        for quantity in ("tokens_per_step_on_text", "distinct_8grams")
                    ),
                )
            )
    return Table(
        key="acceptance",
        title="Tokens a decode step writes",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="sampling", numeric=False),
            Column(name="tokens per step"),
            *(Column(name=f"token {position}", hint="share of steps") for position in positions),
            Column(name="tokens per step", hint="along held-out text"),
            Column(name="distinct 8-grams"),
        ),
        lines=tuple(lines),
        notes=(
            "Greedy text of a weak model runs in loops, where drafts are easy: few distinct 8-grams tell. Steps along "
            "held-out text start after true text instead.",
        ),
    )


def _accepted(evidence: Evidence, row: Row, position: int, at: dict[str, Any]) -> TableCell:
    found = acceptance(evidence, row, **at)
    if not found:
        return table.number(evidence.missing(row, "speculation", "acceptance", **at))
    return table.number(found[position]) if position in found else table.text("never")


def _speed_table(evidence: Evidence) -> Table | None:
    rows = [row for row in evidence.rows if evidence.planned(row, "speculation_speed")]
    if not any(_timed(evidence, row) for row in rows):
        return None
    lines = []
    for row in rows:
        if not _timed(evidence, row):
            continue
        for at in points_of(evidence, row, "speculation_speed", "tokens_per_step", ("batch", "sampling", "level")):
            speedup = evidence.find(row, "speculation_speed", "speedup", clock="wall", **at)
            lines.append(
                (
                    table.text(row.name),
                    coordinate(at.get("batch")),
                    table.text(str(at.get("sampling", "any"))),
                    table.text(str(at.get("level", "best"))),
                    table.number(evidence.find(row, "speculation_speed", "tokens_per_step", **at)),
                    *(
                        table.number(evidence.find(row, "speculation_speed", quantity, clock="wall", **at))
                        for quantity in _TIMES
                    ),
                    table.number(evidence.find(row, "speculation_speed", "speedup", clock="cpu", **at)),
                    *(
                        table.number(
                            evidence.find(row, "speculation_speed", "time_per_token", clock="wall", decoding=way, **at)
                        )
                        for way in ("plain", "speculative")
                    ),
                    table.text(_verdict(speedup)),
                    _proof(evidence, row, at),
                )
            )
    others = [row.name for row in rows if not _timed(evidence, row)]
    return Table(
        key="speculation-speed",
        title="What drafting is worth: with and without it, in alternating pairs",
        columns=(
            Column(name="architecture", numeric=False),
            Column(name="batch", hint="rows"),
            Column(name="sampling", numeric=False),
            Column(name="level", numeric=False),
            Column(name="tokens per step"),
            Column(name="break-even", hint="tokens per step: cost of a step in plain steps"),
            Column(name="speed-up, predicted", hint="tokens per step / break-even"),
            Column(name="speed-up, measured", hint="wall-clock"),
            Column(name="speed-up, CPU time"),
            Column(name="time per token", hint="plain, wall-clock"),
            Column(name="time per token", hint="with drafts, wall-clock"),
            Column(name="it", numeric=False),
            Column(name="same text", hint="greedy tokens equal", numeric=False),
        ),
        lines=tuple(lines),
        notes=(
            "Medians of pairs with order-statistic intervals. The plain way is the model's own weights without drafts, "
            "not another architecture of its size. Sampled text is equal in law, which the contract tests.",
            *_drafters(evidence, rows),
            *((f"Not timed, the reasons stand below: {notation.listed(others)}.",) if others else ()),
        ),
    )


def _drafters(evidence: Evidence, rows: list[Row]) -> list[str]:
    """Which rows have another cell draft for them."""
    drafted: dict[str, list[str]] = {}
    for row in rows:
        for record in evidence.records_of(row, "speculation_speed", "speedup")[:1]:
            if record.settings.get("drafter"):
                drafted.setdefault(record.settings["drafter"], []).append(row.name)
    return [f"{who} drafts for {notation.listed(names)}; its time counts." for who, names in drafted.items()]


def _verdict(speedup: Finding) -> str:
    if speedup.low is None or speedup.high is None:
        return "not decided: no interval"
    return "pays" if speedup.low > 1 else "costs" if speedup.high < 1 else "not decided"


def _proof(evidence: Evidence, row: Row, at: dict[str, Any]) -> TableCell:
    """`all of 2048`, or how many are not and whether ties explain it."""
    if at.get("sampling") != "greedy":
        return table.text("equal in law")
    share, compared, unexplained = (
        evidence.find(row, "speculation_speed", quantity, **at)
        for quantity in ("identical_tokens", "compared_tokens", "unexplained_differences")
    )
    for finding in (share, compared, unexplained):
        if finding.value is None:
            return table.number(finding)
    n = round(known(compared))
    if known(share) == 1:
        return table.text(f"all of {n}")
    differing = round((1 - known(share)) * n)
    explained = f"{round(known(unexplained))} of them no near-tie" if known(unexplained) else "all of them near-ties"
    return table.text(f"{differing} differ in {n}", explained, flagged=known(unexplained) > 0)
