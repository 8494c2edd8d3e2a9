"""What the cells of a run have learned of tasks: how much at the length they trained at, and how much of it lasts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from archbench.report import notation, table
from archbench.report.evidence import Evidence, Finding, known
from archbench.report.rows import Row, flatten
from archbench.report.table import Column, Table, TableCell

MOST_DIFFERENCES = 2
"""Settings that a name can hold."""
LEARNED = 0.9
"""Accuracy from which on a skill counts as learned."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A row at the task it was trained on, `trained_at` tokens long. `name` is its architecture's, so that a reader
    finds it again at other tasks; where several of that architecture tried the task, with what tells them apart."""

    row: Row
    task: str
    name: str
    trained_at: int
    accuracy: dict[int, Finding]
    """By length; only lengths that have one."""

    @property
    def shown_at(self) -> int:
        """The length it trained at, or the nearest one that was examined."""
        return min(self.accuracy, key=lambda length: abs(length - self.trained_at), default=self.trained_at)


def entrants(evidence: Evidence) -> list[Entrant]:
    """The rows that were trained on a task and asked for what they learned, in order of appearance."""
    found = []
    for row in evidence.architectures:
        training = evidence.config(row).get("training", {})
        if not evidence.planned(row, "skill") or not training.get("task"):
            continue
        curve = evidence.series(row, "skill", "accuracy")
        found.append(
            Entrant(
                row=row,
                task=training["task"]["name"],
                name=row.architecture,
                trained_at=training["context"],
                accuracy={int(finding.coordinates["length"]): finding for finding in curve},
            )
        )
    alike: dict[tuple[str, str], list[Entrant]] = defaultdict(list)
    for entrant in found:
        alike[entrant.task, entrant.name].append(entrant)
    return [_told_apart(evidence, entrant, alike[entrant.task, entrant.name]) for entrant in found]


def _told_apart(evidence: Evidence, entrant: Entrant, alike: list[Entrant]) -> Entrant:
    """Under a name of its own: `mtp n_future=2`, or the row's if the models' settings are the same."""
    if len(alike) == 1:
        return entrant
    settings = [dict(flatten(evidence.config(other.row).get("model", {}))) for other in alike]
    own = settings[alike.index(entrant)]
    differing = [f"{key}={value}" for key, value in own.items() if any(s.get(key) != value for s in settings)]
    name = f"{entrant.name} {' '.join(differing)}" if 1 <= len(differing) <= MOST_DIFFERENCES else entrant.row.name
    return replace(entrant, name=name)


def title(task: str) -> str:
    return task.replace("_", " ")


def skill_tables(evidence: Evidence) -> list[Table]:
    """Tasks against architectures, and every length; none where no cell was asked for its skill."""
    found = entrants(evidence)
    return [_matrix(evidence, found), _lengths(evidence, found)] if found else []


def skill_remarks(evidence: Evidence) -> list[str]:
    """A sentence for each task: who has learned it at the training length, and who still has it at the longest."""
    remarks = []
    found = [entrant for entrant in entrants(evidence) if entrant.accuracy]
    for task in dict.fromkeys(entrant.task for entrant in found):
        own = [entrant for entrant in found if entrant.task == task]
        longest = max(max(entrant.accuracy) for entrant in own)
        learned = [e for e in own if _has_learned(e.accuracy[e.shown_at])]
        lasting = [e.name for e in learned if _has_learned(e.accuracy.get(longest))]
        heading = title(task).capitalize()
        if not learned:
            remarks.append(f"{heading}: learned by none of {notation.listed([entrant.name for entrant in own])}.")
            continue
        still = f"{notation.listed(lasting)} still" if lasting else "none of them"
        remarks.append(
            f"{heading}: learned by {notation.listed([e.name for e in learned])} (at least {notation.share(LEARNED)} "
            f"right at the training length), {still} at {notation.tokens(longest)} tokens."
        )
    return remarks


def _has_learned(finding: Finding | None) -> bool:
    return finding is not None and known(finding) >= LEARNED


def _matrix(evidence: Evidence, found: list[Entrant]) -> Table:
    names, tasks = (list(dict.fromkeys(part)) for part in ([e.name for e in found], [e.task for e in found]))
    at = {(entrant.task, entrant.name): entrant for entrant in found}
    lines = []
    for task in tasks:
        lengths = sorted({entrant.trained_at for entrant in found if entrant.task == task})
        trained = f"trained at {notation.listed([notation.tokens(length) for length in lengths])}"
        chance = evidence.find(next(e.row for e in found if e.task == task), "skill", "chance")
        lines.append(
            (
                table.text(title(task), trained),
                *(_learned(evidence, at[task, name]) if (task, name) in at else _ABSENT for name in names),
                table.number(chance),
            )
        )
    return Table(
        key="skill",
        title="Skills learned: accuracy at the training length, and at the longest",
        columns=(
            Column(name="task", hint="length in tokens", numeric=False),
            *(Column(name=name) for name in names),
            Column(name="chance"),
        ),
        lines=tuple(lines),
        notes=(
            "Share of the answers' tokens that are right, on questions kept from training; brackets hold 95 % "
            "intervals over texts. They do not cover the luck of one training, which for skills like these is large: "
            "a skill comes suddenly or not at all.",
        ),
    )


_ABSENT = table.text("not tried")


def _learned(evidence: Evidence, entrant: Entrant) -> TableCell:
    if not entrant.accuracy:
        return table.number(evidence.missing(entrant.row, "skill", "accuracy"))
    shown, longest = entrant.accuracy[entrant.shown_at], max(entrant.accuracy)
    cell = table.number(shown)
    if longest == entrant.shown_at:
        return cell
    last = notation.plain(entrant.accuracy[longest].value or 0.0, shown.unit)
    return replace(cell, more=f"{last} at {notation.tokens(longest)}")


def _lengths(evidence: Evidence, found: list[Entrant]) -> Table:
    quantities = ("accuracy", "exact_match", "chance", "state_bytes")
    lines = []
    for entrant in found:
        points = {record.at["length"] for record in evidence.problems_of(entrant.row, "skill") if "length" in record.at}
        for length in sorted({*entrant.accuracy, *points}) or [entrant.trained_at]:
            cells = (
                table.number(evidence.find(entrant.row, "skill", quantity, length=length)) for quantity in quantities
            )
            heading = TableCell(text=notation.tokens(length), sort=float(length))
            lines.append((table.text(title(entrant.task)), table.text(entrant.name), heading, *cells))
    return Table(
        key="skill-lengths",
        title="Skills at every length",
        columns=(
            Column(name="task", numeric=False),
            Column(name="architecture", numeric=False),
            Column(name="length", hint="tokens"),
            Column(name="accuracy", hint="of the answers' tokens"),
            Column(name="exact match", hint="of texts"),
            Column(name="chance"),
            Column(name="state", hint="live, one row"),
        ),
        lines=tuple(lines),
        folded=True,
    )
