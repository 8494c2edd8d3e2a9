"""The report as GitHub-flavoured Markdown; figures are linked, so it reads well in a repository."""

from __future__ import annotations

from collections.abc import Iterator

from archbench.report.contents import Contents
from archbench.report.drawing import Drawing
from archbench.report.table import Table, TableCell

_SAFE = {"\\": "\\\\", "|": "\\|", "*": "\\*", "<": "&lt;", "[": "\\[", "]": "\\]", "\n": " "}


def document(report: Contents) -> str:
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Contents) -> Iterator[str]:
    head = report.headline
    yield f"# {escape(head.title)}: archbench report"
    yield ""
    for name, value in head.subtitle:
        yield f"- {name}: {_code(value) if name == 'command' else escape(value)}"
    yield ""
    for paragraph in head.paragraphs:
        yield escape(paragraph)
        yield ""
    if head.exploratory:
        yield f"> **Exploratory.** {escape('; '.join(head.exploratory))}."
        yield ""
    for remark in head.remarks:
        yield f"- {escape(remark)}"
    yield ""
    if report.decision:
        yield "## Decision"
        yield from table_lines(report.decision)
    if report.quality:
        yield "## Quality"
        if report.overview:
            yield from table_lines(report.overview)
        yield from table_lines(report.quality)
    if report.correlation:
        yield from table_lines(report.correlation)
    for law in report.scaling:
        yield from table_lines(law)
    for skill in report.skills:
        yield from table_lines(skill)
    if report.budget_figure or report.budgets:
        yield "## Budget"
        yield ""
    if report.budget_figure:
        yield from _figure(report.budget_figure)
    for budget in report.budgets:
        yield from table_lines(budget)
    if report.figures:
        yield "## Figures"
        yield ""
    for figure in report.figures:
        yield from _figure(figure)
    if report.costs:
        yield "## Cost"
    for cost in report.costs:
        yield from table_lines(cost)
    if report.designs:
        yield "## Costs at the papers' sizes"
    for design in report.designs:
        yield from table_lines(design)
    if report.claims:
        yield "## Claims of papers"
        yield from table_lines(report.claims)
    if report.others:
        yield "## Other quantities"
        yield from table_lines(report.others)
    yield "## Failures and unsupported"
    yield ""
    if report.failures:
        yield from table_lines(report.failures)
    else:
        yield "Nothing failed, nothing was unsupported, and no number in the tables is missing."
        yield ""
    if report.omitted:
        yield "Not shown, for want of records:"
        yield ""
        for reason in report.omitted:
            yield f"- {escape(reason)}"
        yield ""
    yield from _provenance(report)


def table_lines(table: Table) -> Iterator[str]:
    yield ""
    yield f"**{escape(table.title)}**"
    yield ""
    hints = [f"<br><sub>{escape(column.hint)}</sub>" if column.hint else "" for column in table.columns]
    heads = [escape(column.name) + hint for column, hint in zip(table.columns, hints, strict=True)]
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---:' if column.numeric else '---' for column in table.columns)} |"
    for line in table.lines:
        yield f"| {' | '.join(_cell(cell) for cell in line)} |"
    yield ""
    for note in table.notes:
        yield f"{escape(note)}  "
    yield ""


def _cell(cell: TableCell) -> str:
    shown = f"*{escape(cell.text)}*" if cell.reason else escape(cell.text)
    flag = " ⚠" if cell.flagged else ""
    more = f"[{escape(cell.more)}]({cell.href})" if cell.more and cell.href else _aside(cell.more)
    return shown + flag + "".join(f" {extra}" for extra in (_aside(cell.detail), more) if extra)


def _aside(text: str) -> str:
    if not text:
        return ""
    return escape(text) if text.startswith("[") else f"({escape(text)})"


def _figure(figure: Drawing) -> Iterator[str]:
    yield f"### {escape(figure.title)}"
    yield ""
    yield f"![{escape(figure.alt)}](figures/{figure.name}.png)"
    yield ""
    yield f"{escape(figure.caption)} [SVG](figures/{figure.name}.svg), [data](figures/{figure.name}.csv)"
    yield ""


def _provenance(report: Contents) -> Iterator[str]:
    yield "## Provenance"
    yield ""
    yield "| the same for every record | |"
    yield "| --- | --- |"
    for name, value in report.provenance.common:
        yield f"| {escape(name)} | {_code(value)} |"
    yield ""
    for cell in report.provenance.cells:
        yield f"<details><summary>{escape(cell.heading)}</summary>"
        yield ""
        yield "| | |"
        yield "| --- | --- |"
        for name, value in cell.facts:
            yield f"| {escape(name)} | {_code(value)} |"
        yield ""
        yield "```json"
        yield cell.config
        yield "```"
        yield ""
        yield "</details>"
        yield ""
    if report.provenance.left_out:
        yield f"{report.provenance.left_out} further cells are left out here; they are in the results file."
        yield ""


def escape(text: str) -> str:
    """Keeps table and emphasis marks, and HTML, from taking effect."""
    return "".join(_SAFE.get(sign, sign) for sign in text)


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("\n", " ").replace("`", "'") + "`"
