"""The parts of README.md that committed runs fill in: `python -m archbench.report.readme README.md [--check]`.

A figure in the README comes from records and the command that made them, or not at all. Between two markers

    <!-- PART FOLDER: begin -->
    <!-- PART FOLDER: end -->

stands what PART makes of the newest records in FOLDER; every pair of markers in the file is filled in.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from archbench.bench.table import markdown as bench_markdown
from archbench.claims.claim import load_claims
from archbench.claims.judge import VERDICTS, Outcome, judge
from archbench.claims.run import load_runs
from archbench.errors import RecordError, suggestion
from archbench.papers import load_papers
from archbench.record import newest, read
from archbench.report import notation
from archbench.report.choice import decision_table
from archbench.report.code import code_tables
from archbench.report.correlation_figure import correlation_table
from archbench.report.crossovers import crossover_table
from archbench.report.energies import energy_table
from archbench.report.evidence import Evidence
from archbench.report.gates import gate_table
from archbench.report.latencies import latency_tables
from archbench.report.markdown import escape, table_lines
from archbench.report.overview import largest_size, overview_table
from archbench.report.paper_costs import summary
from archbench.report.passkey import passkey_tables
from archbench.report.quality import quality_table
from archbench.report.scalings import scaling_tables, scalings
from archbench.report.skills import skill_tables
from archbench.report.speculation import speculation_tables
from archbench.report.table import Table
from archbench.report.verdict import headline, subtitle

FIGURES = (("quality", "Bits per byte against training FLOPs"), ("time_per_token", "Time per token against context"))

LEFT_OUT = ("perplexity", "seeds", "BrierLM, teacher-forced")
"""Columns that the full report has and a first screen does without."""

_BEGIN = re.compile(r"<!-- (\w+) ([\w./-]+): begin -->")


def fill(text: str, root: Path) -> str:
    """The README's text with every part filled in; paths of folders are relative to `root`.

    Raises:
        RecordError: it has no markers, one of a pair is missing, a part is not known, or a folder holds no records.
    """
    for remembered in (_evidence, _judged):  # records may have changed since the last time
        remembered.cache_clear()
    marks = list(_BEGIN.finditer(text))
    if not marks:
        raise RecordError("README: lacks markers such as '<!-- quality results/quick: begin -->'")
    for part, folder in [(mark.group(1), mark.group(2)) for mark in marks]:
        begin, end = (f"<!-- {part} {folder}: {word} -->" for word in ("begin", "end"))
        if end not in text:
            raise RecordError(f"README: lacks '{end}' after its begin")
        if part not in PARTS:
            raise RecordError(f"README: {part} {folder}: no such part; {suggestion(part, PARTS)}")
        before, rest = text.split(begin, 1)
        _, after = rest.split(end, 1)
        text = f"{before}{begin}\n\n{PARTS[part](root / folder, root).strip()}\n\n{end}{after}"
    return text


@cache
def _evidence(results: Path) -> Evidence:
    """A folder's newest records; several parts read the same."""
    return Evidence(read(newest(results)))


@cache
def _judged(results: Path) -> list[Outcome]:
    return judge(load_claims(), load_runs([results]))


def _quality(results: Path, root: Path) -> str:
    """Headline, quality table and two plots of a run."""
    return _ranked(results, root, FIGURES)


def _ranked(results: Path, root: Path, figures: Iterable[tuple[str, str]] = ()) -> str:
    """Who leads, along which axis they were made equal, and the quality table."""
    evidence = _evidence(results)
    head = headline(evidence, [])
    lines = [*(escape(paragraph) + "\n" for paragraph in head.paragraphs)]
    if head.exploratory:
        lines.append(f"> **Exploratory.** {escape('; '.join(head.exploratory))}.\n")
    lines += table_lines(_narrowed(quality_table(evidence)))
    lines += _pictures(results, root, figures)
    return "\n".join([*lines, _made_by(evidence, results, root)])


def _overview(results: Path, root: Path) -> str:
    """What a comparison at several sizes found, on one screen."""
    evidence = _evidence(results)
    head, found = headline(evidence, []), overview_table(evidence)
    if found is None:
        raise RecordError(f"README: overview {results}: no architecture is in these records")
    lines = [*table_lines(found), ""]
    if head.exploratory:
        lines.append(f"> **Exploratory.** {escape('; '.join(head.exploratory))}.\n")
    return "\n".join([*lines, *_pictures(results, root, FIGURES[:1]), _made_by(evidence, results, root)])


def _short(results: Path, root: Path) -> str:
    """Who wins at the largest size, by how much and how sure."""
    del root
    return " ".join(escape(sentence) for sentence in largest_size(_evidence(results)))


def _contradicted(results: Path, root: Path) -> str:
    """The published claims that did not hold, a line each."""
    del root
    outcomes = _judged(results)
    held, failed = ([o for o in outcomes if o.verdict == verdict] for verdict in VERDICTS[:2])
    lines = [f"- {_sentence(outcome)} ({escape(outcome.claim.paper)})" for outcome in failed]
    judged = len(held) + len(failed)
    return "\n".join(
        [f"Of {judged} published claims that these records could judge, {len(failed)} did not hold:", "", *lines]
    )


def _passkey(results: Path, root: Path) -> str:
    """How far retrieval reaches, the gates, and the heatmap."""
    evidence = _evidence(results)
    pictures = _pictures(results, root, [("passkey", "Passkey retrieval by length and depth")])
    return _tables([*passkey_tables(evidence)[:2], gate_table(evidence)], evidence, results, root, pictures)


def _measures(results: Path, root: Path) -> str:
    """Quality, passkey and code of a run that compares by measures alone."""
    evidence = _evidence(results)
    found = [_narrowed(quality_table(evidence)), *passkey_tables(evidence)[:1], *code_tables(evidence)]
    return _tables(found, evidence, results, root)


def _serving(results: Path, root: Path) -> str:
    """Times over contexts and batches, energy where there is any, and which architectures change places."""
    evidence = _evidence(results)
    found = [*latency_tables(evidence), energy_table(evidence), crossover_table(evidence)]
    told = [text for text in found if isinstance(text, str)]
    tables = [table for table in found if isinstance(table, Table)]
    return _tables(tables, evidence, results, root, [*told, *_pictures(results, root, FIGURES[1:])])


def _costs(results: Path, root: Path) -> str:
    evidence = _evidence(results)
    return "\n".join([*summary(evidence, load_papers()), _made_by(evidence, results, root)])


def _bench(results: Path, root: Path) -> str:
    evidence = _evidence(results)
    return "\n".join([bench_markdown(evidence.records), _made_by(evidence, results, root)])


def _claims(results: Path, root: Path) -> str:
    """Every claim's verdict over all committed runs, best known first."""
    del root
    outcomes = _judged(results)
    told = {verdict: [outcome for outcome in outcomes if outcome.verdict == verdict] for verdict in VERDICTS}
    counts = ", ".join(f"{len(found)} {verdict}" for verdict, found in told.items())
    lines = [f"Of {len(outcomes)} published claims: {counts}.", "", "| claim | verdict | measured | published |"]
    lines.append("| --- | --- | --- | --- |")
    for verdict in VERDICTS[:2]:
        lines += [_claim_line(outcome) for outcome in told[verdict]]
    left = ", ".join(f"`{outcome.claim.id}`" for outcome in told[VERDICTS[2]])
    if left:
        lines += ["", f"Not testable at this scale: {left}; `archbench claims run` says why."]
    return "\n".join([*lines, "", "Verdicts are computed from the committed records by `archbench claims run`."])


def _verdicts(results: Path, root: Path) -> str:
    """Which claims held over all committed runs and which did not, a line a paper."""
    del root
    outcomes = _judged(results)
    counts = ", ".join(f"{sum(o.verdict == verdict for o in outcomes)} {verdict}" for verdict in VERDICTS)
    lines = ["| paper | held here | did not hold here | not testable here |", "| --- | --- | --- | ---: |"]
    for paper in dict.fromkeys(outcome.claim.paper for outcome in outcomes):
        of_paper = [outcome for outcome in outcomes if outcome.claim.paper == paper]
        held, failed, untested = ([o for o in of_paper if o.verdict == verdict] for verdict in VERDICTS)
        told = (" ".join(_sentence(outcome) for outcome in found) or "none" for found in (held, failed))
        lines.append(f"| {escape(paper)} | {' | '.join(told)} | {len(untested)} |")
    return "\n".join(
        [*lines, "", f"In all: {counts}. *Italic*: exploratory, from fewer than three seeds or unequal budgets."]
    )


def _sentence(outcome: Outcome) -> str:
    text = escape(outcome.claim.text)
    return f"*{text}*" if outcome.exploratory else text


def _claim_line(outcome: Outcome) -> str:
    verdict = f"{outcome.verdict}{' (exploratory)' if outcome.exploratory else ''}"
    cells = (outcome.claim.text, verdict, outcome.measured, f"{outcome.published} ({outcome.claim.source})")
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"


def _only(tables: Callable[[Evidence], Iterable[Table | None]]) -> Callable[[Path, Path], str]:
    """A part that is these tables of a run and nothing else."""

    def part(results: Path, root: Path) -> str:
        evidence = _evidence(results)
        return _tables(tables(evidence), evidence, results, root)

    return part


PARTS: Mapping[str, Callable[[Path, Path], str]] = {
    "quality": _quality,
    "ranked": _ranked,
    "verdicts": _verdicts,
    "overview": _overview,
    "short": _short,
    "contradicted": _contradicted,
    "decision": _only(lambda evidence: [decision_table(evidence)]),
    "passkey": _passkey,
    "code": _only(code_tables),
    "measures": _measures,
    "skills": _only(skill_tables),
    "speculation": _only(speculation_tables),
    "serving": _serving,
    "correlation": _only(lambda evidence: [correlation_table(evidence)]),
    "scaling": _only(lambda evidence: scaling_tables(evidence, scalings(evidence))),
    "costs": _costs,
    "bench": _bench,
    "claims": _claims,
}


def _tables(
    tables: Iterable[Table | None], evidence: Evidence, results: Path, root: Path, more: Iterable[str] = ()
) -> str:
    lines = [line for table in tables if table is not None for line in table_lines(table)]
    return "\n".join([*lines, *more, _made_by(evidence, results, root)])


def _pictures(results: Path, root: Path, figures: Iterable[tuple[str, str]]) -> list[str]:
    folder = results.resolve().relative_to(root.resolve()) / "report" / "figures"
    return [f"![{title}]({folder / name}.png)" for name, title in figures]


def _made_by(evidence: Evidence, results: Path, root: Path) -> str:
    facts = dict(subtitle(evidence.records))
    file = newest(results).resolve().relative_to(root.resolve())
    return (
        f"\nMade by `{facts['command']}` on {facts['machine']} ({facts['date']}), {_took(evidence, file)} from "
        f"its start to its last record; records in `{file}`."
    )


def _took(evidence: Evidence, file: Path) -> str:
    """How long a run lasted, pauses between sittings included: a results file is named by when it began."""
    began = datetime.strptime(file.name.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    ended = max(datetime.fromisoformat(record.created) for record in evidence.records)
    return notation.plain((ended - began).total_seconds(), "s")


def _narrowed(table: Table) -> Table:
    keep = [i for i, column in enumerate(table.columns) if column.name not in LEFT_OUT]
    return replace(
        table,
        columns=tuple(table.columns[i] for i in keep),
        lines=tuple(tuple(line[i] for i in keep) for line in table.lines),
    )


def main(arguments: list[str]) -> int:
    readme = Path(arguments[0])
    text = readme.read_text(encoding="utf-8")
    filled = fill(text, readme.resolve().parent)
    if "--check" in arguments:
        if filled != text:
            print(f"{readme}: not what the committed runs say; run `make readme`", file=sys.stderr)
        return int(filled != text)
    readme.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
