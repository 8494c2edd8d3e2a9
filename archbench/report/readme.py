"""The part of README.md that a committed run fills in: `python -m archbench.report.readme results/quick README.md`.

A figure in the README comes from records and the command that made them, or not at all.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from archbench.errors import RecordError
from archbench.record import newest, read
from archbench.report.evidence import Evidence
from archbench.report.markdown import escape, table_lines
from archbench.report.quality import quality_table
from archbench.report.table import Table
from archbench.report.verdict import headline

FIGURES = (("quality", "Bits per byte against training FLOPs"), ("time_per_token", "Time per token against context"))

LEFT_OUT = ("perplexity", "seeds", "BrierLM, teacher-forced")
"""Columns that the full report has and a first screen does without."""


def excerpt(results: Path, root: Path) -> str:
    """Headline, quality table and two plots of a run, as Markdown with paths relative to `root`.

    Raises:
        RecordError: there are no records at `results`.
    """
    file = newest(results)
    evidence = Evidence(read(file))
    head = headline(evidence, [])
    figures = file.parent.resolve().relative_to(root.resolve()) / "report" / "figures"
    facts = dict(head.subtitle)
    lines = [*(escape(paragraph) + "\n" for paragraph in head.paragraphs)]
    if head.exploratory:
        lines.append(f"> **Exploratory.** {escape('; '.join(head.exploratory))}.\n")
    lines += table_lines(_narrowed(quality_table(evidence)))
    lines += [f"![{title}]({figures / name}.png)" for name, title in FIGURES]
    lines.append(
        f"\nMade by `{facts['command']}` on {facts['machine']} ({facts['date']}); records in "
        f"`{file.resolve().relative_to(root.resolve())}`, the whole report in `{figures.parent / 'report.md'}`."
    )
    return "\n".join(lines)


def update(readme: Path, results: Path) -> None:
    """Puts the excerpt between the README's two markers. Raises RecordError when the markers are not there."""
    text = readme.read_text(encoding="utf-8")
    begin, end = (f"<!-- {results.as_posix()}: {word} -->" for word in ("begin", "end"))
    if begin not in text or end not in text:
        raise RecordError(f"{readme}: lacks the markers '{begin}' and '{end}'; put them where the excerpt belongs")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    filled = f"{before}{begin}\n\n{excerpt(results, readme.parent)}\n\n{end}{after}"
    readme.write_text(filled, encoding="utf-8")


def _narrowed(table: Table) -> Table:
    keep = [i for i, column in enumerate(table.columns) if column.name not in LEFT_OUT]
    return replace(
        table,
        columns=tuple(table.columns[i] for i in keep),
        lines=tuple(tuple(line[i] for i in keep) for line in table.lines),
    )


if __name__ == "__main__":
    update(Path(sys.argv[2]), Path(sys.argv[1]))
