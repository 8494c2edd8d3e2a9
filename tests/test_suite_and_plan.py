"""Suites are read strictly, and plans resolve them into cells and jobs."""

import textwrap

import pytest

from archbench.cell import Cell
from archbench.errors import ArchbenchError
from archbench.plan import make_plan
from archbench.suite import available, load_suite

BASE = """
size: nano
training:
  budget: {bytes: 20_000}
  context: 32
  batch: 4
  learning_rate: 4e-3
cells:
  - architecture: transformer
  - {architecture: ngram, label: bigram, model: {order: 2}, metrics: [likelihood]}
metrics:
  likelihood: {max_bytes: 4096}
  training: {}
"""


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "mine.yaml"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return make


def plan_of(path, settings=(), only=()):
    return make_plan(load_suite(path, settings), only)


def test_cells_get_what_the_suite_says(write):
    plan = plan_of(write(BASE))
    transformer, bigram = plan.cells
    assert transformer.training.learning_rate == 4e-3
    assert transformer.training.budget.bytes == 20_000
    assert transformer.metrics == ("likelihood", "training")
    assert abs(transformer.residual) < 0.05
    assert (bigram.label, bigram.metrics, bigram.config.order) == ("bigram", ("likelihood",), 2)
    assert [(job.cell.label, job.metric) for job in plan.jobs] == [
        ("transformer", "likelihood"), ("transformer", "training"), ("bigram", "likelihood"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("BASE.replace('size:', 'sizee:')", "mine.yaml: sizee: unknown key; did you mean 'size'?"),
        ("BASE.replace('context', 'contxt')", "mine.yaml: training.contxt: unknown key; did you mean 'context'?"),
        ("BASE.replace('context: 32', 'context: long')", "training.context: found 'long'"),
        ("BASE.replace('context: 32', 'context: 0')", "training.context: 0; must lie between 1"),
        ("BASE.replace('{bytes: 20_000}', '{byts: 20_000}')", "training.budget.byts: unknown key; did you mean 'bytes'?"),
        ("BASE.replace('bytes: 20_000', 'bytes: 1, tokens: 2')", "exactly one of bytes, tokens, flops, seconds"),
        ("BASE.replace('bytes: 20_000', 'bytes: -1')", "training.budget.bytes: -1.0; must be above 0"),
        ("BASE.replace('architecture: transformer', 'architecture: transfomer')", "cells[0]: there is no architecture 'transfomer'; did you mean 'transformer'?"),
        ("BASE.replace('order: 2', 'ordr: 2')", "cells[1].model.ordr: unknown key; did you mean 'order'?"),
        ("BASE.replace('order: 2', 'order: 9')", "ngram.order: 9"),
        ("BASE.replace('size: nano', 'size: nanno')", "nanno"),
        ("BASE.replace('likelihood: {max', 'likelyhood: {max')", "metrics.likelyhood: there is no metric 'likelyhood'"),
        ("BASE.replace('max_bytes', 'max_byte')", "metrics.likelihood.max_byte: unknown key; did you mean 'max_bytes'?"),
        ("BASE.replace('[likelihood]', '[cost]')", "cells[1].metrics: 'cost' is not measured by the suite"),
        ("BASE + 'corpus: stdlob'", "stdlob"),
        ("BASE + 'codec: bytez'", "bytez"),
        ("BASE + 'size: micro'", "key 'size' is given twice"),
        ("BASE + 'cells'", "not valid YAML"),
        ("'- a'", "a suite is a mapping"),
    ],
    # ruff: noqa: E501 (a case a line)
)  # fmt: skip
def test_every_typo_is_one_line_with_its_place(write, change, message):
    with pytest.raises(ArchbenchError) as caught:
        plan_of(write(eval(change)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_suites_name_the_nearest():
    with pytest.raises(ArchbenchError, match="suite 'quik' is not known; did you mean 'quick'"):
        load_suite("quik")
    with pytest.raises(ArchbenchError, match="no such file"):
        load_suite("nowhere/quick.yaml")


def test_set_changes_the_suite(write):
    plan = plan_of(write(BASE), ["training.budget.bytes=5e4", "cells.0.label=yardstick", "seeds=[3]"])
    assert plan.cells[0].training.budget.bytes == 5e4
    assert plan.cells[0].label == "yardstick"
    assert plan.cells[0].seed == 3
    with pytest.raises(ArchbenchError, match="expected KEY=VALUE"):
        load_suite(write(BASE), ["training.context"])
    with pytest.raises(ArchbenchError, match="no index of a list"):
        load_suite(write(BASE), ["cells.7.label=x"])


def test_only_keeps_labels_and_architectures(write):
    assert [cell.label for cell in plan_of(write(BASE), only=["bigram"]).cells] == ["bigram"]
    assert [cell.label for cell in plan_of(write(BASE), only=["ngram"]).cells] == ["bigram"]
    with pytest.raises(ArchbenchError, match="--only mamba: no such cell"):
        plan_of(write(BASE), only=["mamba"])


def test_grids_expand_to_every_combination(write):
    rates = "    grid: {training.learning_rate: [1e-3, 2e-3]}\n"
    plan = plan_of(write(BASE.replace("transformer\n", "transformer\n" + rates)))
    assert [cell.label for cell in plan.cells] == [
        "transformer learning_rate=0.001", "transformer learning_rate=0.002", "bigram",
    ]  # fmt: skip
    plan = plan_of(write(BASE + "grid: {size: [nano, micro]}\nseeds: [0, 1]\n"), only=["transformer"])
    assert {(cell.size, cell.seed) for cell in plan.cells} == {("nano", 0), ("nano", 1), ("micro", 0), ("micro", 1)}
    assert len({cell.key for cell in plan.cells}) == 4


def test_cells_travel_as_json_and_are_known_by_content(write):
    cell = plan_of(write(BASE)).cells[0]
    assert Cell.from_dict(cell.to_dict()) == cell
    other = plan_of(write(BASE), ["training.learning_rate=5e-3"]).cells[0]
    relabelled = plan_of(write(BASE), ["cells.0.label=x"]).cells[0]
    assert other.key != cell.key
    assert other.address != cell.address
    assert relabelled.key == cell.key


def test_every_suite_that_ships_can_be_planned():
    for name in available():
        plan = plan_of(name)
        assert plan.jobs
        assert plan.suite.description


def test_cells_that_differ_need_names_that_differ(write):
    twin = BASE.replace("cells:\n", "cells:\n  - {architecture: transformer, training: {learning_rate: 1e-3}}\n")
    with pytest.raises(ArchbenchError, match="two different cells are called 'transformer/nano/seed0'"):
        plan_of(write(twin))


DRAFTED = """
size: nano
seeds: [0, 1]
training: {budget: {bytes: 20_000}, context: 32, batch: 4}
cells:
  - {architecture: mamba, label: of bytes}
  - {architecture: mamba, label: small, model: {d_state: 8}, metrics: [training]}
metrics:
  training: {}
  speculation_speed: {drafter: small, batches: [1], temperatures: [0.0]}
"""


def test_a_metric_that_needs_another_cell_gets_the_one_of_its_seed(write):
    plan = plan_of(write(DRAFTED))
    addresses = {(cell.label, cell.seed): cell.address for cell in plan.cells}
    jobs = {job.cell.seed: job for job in plan.jobs if job.metric == "speculation_speed"}
    for seed in (0, 1):
        assert jobs[seed].beside == {"small": addresses["small", seed]} and jobs[seed].reason is None
    other = plan_of(write(DRAFTED.replace("d_state: 8", "d_state: 4")))
    changed = {job.cell.seed: job for job in other.jobs if job.metric == "speculation_speed"}
    assert changed[0].id != jobs[0].id, "what another drafter gave is not carried over"
    own = plan_of(write(DRAFTED.replace(", metrics: [training]", "")))
    reasons = {job.cell.label: job.reason for job in own.jobs if job.metric == "speculation_speed"}
    assert reasons == {"of bytes": None, "small": "the other cells' speculation_speed needs it"}
    alone = plan_of(write(DRAFTED.replace("metrics: [training]", "metrics: [speculation_speed]")))
    assert {cell.label for cell in alone.trained_cells} == {"of bytes", "small"}, "it is trained for the others' sake"


def test_a_metric_that_needs_a_cell_that_is_not_there_says_so(write):
    message = "mine.yaml: metrics.speculation_speed: cell 'smal' is not in this run; did you mean 'small'"
    with pytest.raises(ArchbenchError, match=message):
        plan_of(write(DRAFTED.replace("drafter: small", "drafter: smal")))
    with pytest.raises(ArchbenchError, match="cell 'small' is not in this run"):
        plan_of(write(DRAFTED), only=["of bytes"])
    with pytest.raises(ArchbenchError, match="cell 'small': 2 cells are called so"):
        plan_of(write(DRAFTED.replace("size: nano", "grid: {size: [nano, micro]}")))
