"""Reports of runs at several sizes: panels, looks and sentences by size; gates by seed; pages that stay light."""

from __future__ import annotations

import random
from pathlib import Path

from test_report import Model, measured, record

from archbench.report import drawing
from archbench.report.context_figures import TIME_PER_TOKEN, against_context
from archbench.report.drawing import Drawing
from archbench.report.evidence import Evidence
from archbench.report.gates import gate_table
from archbench.report.html import inline_svg
from archbench.report.learning_figures import loss_curves
from archbench.report.palette import one_a_label, styles

KINDS = {"nano": 1.0, "micro": 2.0}


def of_sizes(batches: tuple[int, ...] = (1, 4)) -> Evidence:
    records = []
    for size, scale in KINDS.items():
        for label, first, slope in (("transformer", 0.6e-3, 1.1e-6), ("mamba", 1.7e-3, 0.0)):
            model = Model(label, bits=2.0, first=first * scale, slope=slope, state=1e5, growth=64, size=size)
            records += measured(model, 0, batches)
    return Evidence(records)


def test_a_figure_has_a_panel_a_size_at_the_smallest_batch_and_one_legend_entry_a_label() -> None:
    evidence = of_sizes()
    with drawing.house_style():
        figure, sentences = against_context(evidence, styles(evidence.rows), TIME_PER_TOKEN)
    assert isinstance(figure, Drawing)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.figure.axes] == [
        "size nano, batch 1", "size micro, batch 1",
    ]  # fmt: skip
    (legend,) = figure.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["transformer", "mamba"]
    assert "size nano, batch 4 and size micro, batch 4" in figure.caption
    assert set(figure.data["batch"]) == {1, 4}, "what is not drawn is in the data"
    for size in KINDS:
        assert any(f"at size {size}, batch 1" in sentence for sentence in sentences), sentences


def test_labels_whose_sizes_read_other_text_keep_looks_of_their_own() -> None:
    rows = of_sizes().rows
    looks = styles(rows)
    shared, entries = one_a_label(looks, rows)
    assert [entry.name for entry in entries] == ["transformer", "mamba"]
    assert len({(shared[row].colour, shared[row].marker) for row in rows}) == 2
    records = [*measured(Model("a", bits=2, first=1e-3, slope=0, state=1, growth=0, size="nano"))]
    other = Model("a", bits=2, first=1e-3, slope=0, state=1, growth=0, size="micro")
    mixed = Evidence([*records, *(r.__class__(**{**vars(r), "codec": "bpe-512"}) for r in measured(other))]).rows
    assert one_a_label(styles(mixed), mixed)[1] == mixed


def test_a_later_phase_is_smoothed_over_its_own_text() -> None:
    """400 points from 1.5 MB on, once as long as the phase before: sixty means, not thirty."""
    model = Model("calm", bits=2, first=1e-3, slope=0, state=1, growth=0)
    along = {"bytes": [1.5e6 + 1.5e6 * (i + 1) / 400 for i in range(400)]}
    losses = [3.0 - i / 400 for i in range(400)]
    evidence = Evidence([record(model, "training", "loss", 2.0, samples=losses, along=along, at={"phase": "energy"})])
    with drawing.house_style():
        figure = loss_curves(evidence, styles(evidence.rows))
    assert isinstance(figure, Drawing)
    (line,) = figure.figure.axes[0].get_lines()
    assert len(line.get_xdata()) == 60
    assert len(figure.data) == 400


def test_gates_of_every_seed_have_a_line_of_their_own() -> None:
    model = Model("infini", bits=2, first=1e-3, slope=0, state=1, growth=0)
    values = {(0, 1): 0.0, (0, 2): 1.0, (1, 1): 1.0, (1, 2): 0.0}
    records = [
        record(model, "gates", "gate", g, seed=seed, at={"layer": 1, "head": head})
        for (seed, head), g in values.items()
    ]
    table = gate_table(Evidence(records))
    assert table is not None
    assert [[cell.text for cell in line] for line in table.lines] == [
        ["infini, seed 0", "0.000", "1.000", "1.000"],
        ["infini, seed 1", "1.000", "0.000", "1.000"],
    ]


def test_inlined_figures_lose_digits_and_comments_but_no_place(tmp_path: Path) -> None:
    evidence = of_sizes((1,))
    with drawing.house_style():
        figure, _ = against_context(evidence, styles(evidence.rows), TIME_PER_TOKEN)
        assert isinstance(figure, Drawing)
        drawing.save(figure, tmp_path)
    svg = (tmp_path / f"{figure.name}.svg").read_text()
    page = str(inline_svg(svg, figure.name, figure.alt))
    assert len(page) < len(svg) and "<!--" not in page
    assert page.count("<use") == svg.count("<use") and page.count("<path") == svg.count("<path")
    assert 'transform="scale(0.015625)"' in page, "the size of letters is not rounded"
    ids = {part.split('"')[0] for part in page.split(' id="')[1:]}
    assert {part.split('"')[0] for part in page.split('href="#')[1:]} <= ids


def test_numbers_of_a_page_can_all_be_sorted() -> None:
    """A number's cell either says what it is sorted by, or stands for a missing one."""
    from archbench.report.contents import contents
    from archbench.report.html import page

    draw = random.Random(0)
    models = [Model(f"m{i}", bits=2 + draw.random(), first=1e-3, slope=0, state=1e5, growth=64) for i in range(3)]
    evidence = Evidence([r for model in models for r in measured(model)])
    with drawing.house_style():
        found = contents(evidence)
    html = page(found, {drawn.name: '<svg viewBox="0 0 1 1"></svg>' for drawn in found.drawings})
    cells = [part.split(">", 1) for part in html.split('class="number"')[1:]]
    unsorted = [
        body.split("</", 1)[0] for head, body in cells if "data-sort" not in head and "<button" not in body[:60]
    ]
    assert not [body for body in unsorted if any(letter.isdigit() for letter in body.rpartition(">")[2])]
