"""Published figures as data: the files that ship are whole, and a typo is one line with its place."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from archbench import registry
from archbench.errors import ArchbenchError
from archbench.papers import Figure, load_papers

BASE = """
papers: {calm: Somebody 2025}
figures:
  - {id: a, value: 2.9, unit: ratio, of: something, source: "calm, Table 1", step: 0.1}
  - {id: b, value: 1.6e6, unit: number, of: more, source: "calm, Table 2", exact: 1_585_152}
  - id: c
    value: 7
    unit: parameter
    of: a model
    source: "calm, Table 3"
    match: {quantity: parameters, of: {architecture: mamba, size: 130m}, at: {kind: total}}
  - {id: d, value: 114, unit: ratio, of: a over b, source: "calm, text", ratio: [a, b]}
"""


def papers_of(folder: Path, text: str):
    (folder / "one.yaml").write_text(textwrap.dedent(text))
    return load_papers(folder)


def test_a_file_is_read(tmp_path):
    papers = papers_of(tmp_path, BASE)
    assert [figure.id for figure in papers.figures] == ["a", "b", "c", "d"]
    assert papers.figure("b").exact == 1_585_152
    match = papers.figure("c").match
    assert match is not None and match.of[0].size == "130m" and match.at == {"kind": "total"}
    assert papers.figure("d").ratio == ("a", "b")
    assert papers.figure("a").paper == "calm"
    with pytest.raises(ArchbenchError, match="figure 'e': not known"):
        papers.figure("e")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unit: ratio", "unt: ratio", "one.yaml: figures[0].unt: unknown key; did you mean 'unit'?"),
        ("value: 2.9", "value: many", "figures[0].value: found 'many'"),
        ("of: something, ", "", "figures[0].of: required key is missing"),
        ('"calm, Table 1"', '"clam, Table 1"', "figures[0].source: paper 'clam' is not known; did you mean 'calm'?"),
        ("id: b", "id: a", "figures[1].id: 'a' is taken by"),
        ("ratio: [a, b]", "ratio: [a, x]", "ratio: no figure 'x'"),
        ("size: 130m", "sise: 130m", "figures[2].match.of[0].sise: unknown key; did you mean 'size'?"),
        ("quantity: parameters", "quantty: parameters", "figures[2].match.quantty: unknown key"),
        ("step: 0.1", "step: 0", "step: 0.0; must be above 0"),
        ("value: 7", "value: 0", "nothing can be held against it"),
        ("papers: {calm", "paprs: {calm", "expected the keys papers and figures"),
        ("papers: {calm: Somebody 2025}", "papers: [calm]", "one.yaml: papers: expected short names"),
    ],
)
def test_every_typo_is_one_line_with_its_place(tmp_path, old, new, message):
    assert old in BASE
    with pytest.raises(ArchbenchError) as caught:
        papers_of(tmp_path, BASE.replace(old, new, 1))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("printed", "step", "value", "said"),
    [
        (2.9e8, 1e7, 2.9055e8, "as printed"),
        (2.9e8, 1e7, 2.8501e8, "as printed"),
        (2.9e8, 1e7, 2.84e8, ""),
        (281e6, 1e6, 281.96e6, "as printed, cut off"),
        (281e6, 1e6, 282.1e6, ""),
        (3.7e20, 1e19, 3.7749e20, "as printed, cut off"),
        (0.66, 0.01, 0.655, "as printed"),
        (5.0, None, 5.0, ""),
    ],
)
def test_printed_digits_may_be_rounded_or_cut_off(printed, step, value, said):
    figure = Figure(id="x", value=printed, unit="FLOP", of="it", source="calm, Table 1", step=step)
    assert figure.agreement(value) == said


def test_the_figures_that_ship_name_what_there_is():
    papers = load_papers()
    assert {figure.paper for figure in papers.figures} >= {"calm", "mtp", "infini", "mamba", "mambabyte", "txl"}
    quantities = registry.metric("design_cost").quantities
    for figure in papers.figures:
        if figure.match is not None:
            assert figure.match.quantity in quantities, figure.id
            assert quantities[figure.match.quantity].unit == figure.unit or figure.match.over is not None, figure.id
            parts = (*figure.match.of, *((figure.match.over,) if figure.match.over else ()))
            for part in parts:
                assert part.size in registry.architecture(part.architecture).published, figure.id
