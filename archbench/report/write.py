"""From a results file to a report: Markdown, one self-contained HTML page, and each figure as PNG, SVG and CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archbench.clocks import collector_paused
from archbench.record import newest, read
from archbench.report.claims import claims_table
from archbench.report.contents import FIGURES, contents
from archbench.report.drawing import house_style, save
from archbench.report.evidence import Evidence
from archbench.report.html import page
from archbench.report.markdown import document


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where a report lies. `figures` are PNG and SVG, `data` the CSV of each figure."""

    markdown: Path
    html: Path
    figures: tuple[Path, ...]
    data: tuple[Path, ...]


def write_report(path: Path, out: Path | None = None) -> ReportFiles:
    """Writes the report of a results file, or of the newest run in a results folder.

    It goes into `out`, or into `report` beside the results file. An older report there is replaced.

    Raises:
        RecordError: there are no records at `path`, or a line of them is damaged.
    """
    # Few cycles arise here, and looking for them through all records is a quarter of a large report's time.
    with collector_paused():
        return _written(path, out)


def _written(path: Path, out: Path | None) -> ReportFiles:
    records = read(path)
    folder = newest(Path(path)).parent / "report" if out is None else Path(out)
    plots = folder / "figures"
    plots.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:  # a figure of an older report that this one does not have would mislead
        for ending in ("png", "svg", "csv"):
            (plots / f"{name}.{ending}").unlink(missing_ok=True)
    with house_style():
        report = contents(Evidence(records), claims_table(Path(path), folder))
        written = [file for drawing in report.drawings for file in save(drawing, plots)]
    markdown, html = folder / "report.md", folder / "report.html"
    markdown.write_text(document(report), encoding="utf-8")
    drawn = {drawing.name: (plots / f"{drawing.name}.svg").read_text(encoding="utf-8") for drawing in report.drawings}
    html.write_text(page(report, drawn), encoding="utf-8")
    return ReportFiles(
        markdown=markdown,
        html=html,
        figures=tuple(file for file in written if file.suffix != ".csv"),
        data=tuple(file for file in written if file.suffix == ".csv"),
    )
