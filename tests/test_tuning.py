"""Tuning: equal trials, the best rate, void at the grid's edge; and a run that goes through both stages."""

import dataclasses

import pytest
from test_report import Model
from test_report import record as record_of

from archbench.errors import SuiteError
from archbench.plan import make_plan
from archbench.record import read
from archbench.run import Options, run, search
from archbench.suite import Suite, load_suite
from archbench.tuning import choose, trials

SUITE = """
size: nano
seeds: [0, 1]
training: {budget: {bytes: 4_000}, context: 32, batch: 4, precision: fp32}
tuning: {learning_rates: [1e-4, 3e-3, 1e-1], budget: {bytes: 2_000}, size: nano}
cells:
  - architecture: transformer
  - {architecture: calm, label: chunks}
  - {architecture: mamba, training: {learning_rate: 3e-3}}
  - {architecture: ngram, label: unigram, model: {order: 1}}
metrics: {likelihood: {max_bytes: 2_048}, brier_lm: {positions: 16, draws: 2, max_bytes: 2_048}}
"""


@pytest.fixture
def suite(tmp_path) -> Suite:
    path = tmp_path / "tuned.yaml"
    path.write_text(SUITE)
    return load_suite(str(path))


def trial(label: str, rate: float, value: float | None, metric: str = "likelihood"):
    model = Model(f"{label} at {rate:g}", bits=0, first=0, slope=0, state=0, growth=0, size="nano")
    if metric == "likelihood":
        return record_of(model, metric, "bits_per_byte", value, at={"state": "reset"}, reason="" if value else "nan")
    at = {"n": 1, "estimator": "sampled", "window": "bytes"}
    return record_of(model, metric, "brier_n", value, at=at, better="higher")


def test_trials_are_equal_and_leave_out_what_needs_none(suite):
    plan = make_plan(trials(suite))
    assert {cell.name() for cell in plan.cells} == {
        f"{label} at {rate}/nano/seed100" for label in ("transformer", "chunks") for rate in ("0.0001", "0.003", "0.1")
    }
    assert {cell.training.budget.amount for cell in plan.cells} == {2_000}
    assert {(job.cell.label.split()[0], job.metric) for job in plan.jobs} == {
        ("transformer", "likelihood"), ("chunks", "brier_lm"),
    }  # fmt: skip


def test_the_best_rate_is_taken_and_recorded(suite):
    records = [trial("transformer", rate, value) for rate, value in ((1e-4, 3.0), (3e-3, 2.0), (1e-1, 4.0))]
    records += [trial("chunks", rate, value, "brier_lm") for rate, value in ((1e-4, 0.1), (3e-3, 0.3), (1e-1, 0.2))]
    choices = choose(suite, records)
    assert {key: (choice.learning_rate, choice.void) for key, choice in choices.items()} == {
        ("transformer", None): (3e-3, ""), ("chunks", None): (3e-3, ""),
    }  # fmt: skip
    plan = make_plan(suite, ["transformer"], choices)
    assert {cell.training.learning_rate for cell in plan.cells} == {3e-3}
    assert plan.cells[0].tuning["results"] == {"0.0001": 3.0, "0.003": 2.0, "0.1": 4.0}
    given = dataclasses.replace(suite, training={**suite.training, "learning_rate": 3e-3})
    assert plan.cells[0].key == make_plan(given, ["transformer"]).cells[0].key  # how it was found changes no weights


@pytest.mark.parametrize(("values", "side"), [((2.0, 3.0, 4.0), "lowest"), ((4.0, 3.0, 2.0), "highest")])
def test_an_optimum_on_the_edge_voids_the_cell(suite, values, side):
    records = [trial("transformer", rate, value) for rate, value in zip((1e-4, 3e-3, 1e-1), values, strict=True)]
    plan = make_plan(suite, ["transformer"], choose(suite, records, ["transformer"]))
    assert plan.trained_cells == [] and all(f"is the {side} one tried" in job.reason for job in plan.jobs)


def test_a_rate_that_failed_was_tried(suite):
    records = [trial("transformer", rate, value) for rate, value in ((1e-4, 3.0), (3e-3, 2.0), (1e-1, None))]
    assert choose(suite, records, ["transformer"])["transformer", None].void == ""


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ("{learning_rates: [1e-3, 2e-3], budget: {bytes: 10}}", "needs three different ones"),
        ("{learning_rates: [1e-3, 2e-3, 4e-3], budget: {bites: 10}}", r"tuning\.budget.*did you mean 'bytes'"),
        ("{learning_rates: [1e-3, 2e-3, 4e-3], budget: {bytes: 10}, seed: 1}", "1 is one of the suite's seeds"),
        ("{rates: [1e-3, 2e-3, 4e-3], budget: {bytes: 10}}", "tuning"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, tuning, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(SUITE.replace("{learning_rates: [1e-4, 3e-3, 1e-1], budget: {bytes: 2_000}, size: nano}", tuning))
    with pytest.raises(SuiteError, match=message):
        make_plan(load_suite(str(path)))


def test_a_run_searches_first_and_skips_what_is_done(suite, tmp_path):
    ran = []

    def carry_out(plan, options):
        ran.append((plan.suite.name, options.out))
        return run(plan, options)

    options = Options(out=tmp_path / "out", executor="inline")
    choices = search(suite, ["transformer"], options, carry_out)
    assert ran == [("tuned-tuning", tmp_path / "out" / "tuning")]
    assert set(choices["transformer", None].results) == {1e-4, 3e-3, 1e-1}
    outcome = run(make_plan(suite, ["transformer"], choices), options)
    assert all(record.config["tuning"]["trials"] == 3 for record in read(outcome.path) if record.status == "ok")
    assert search(suite, ["transformer"], options, lambda plan, opts: run(plan, opts)) == choices
    assert search(suite, ["unigram"], options, carry_out) == {}


def test_cells_that_differ_in_budget_alone_share_their_trials(suite, tmp_path):
    """Trained once, whatever they are called: with one budget, and in the same folder with a second one."""
    options = Options(out=tmp_path / "out", executor="inline")
    trained = []

    def carry_out(plan, options):
        outcome = run(plan, options)
        trained.append(outcome.trained)
        return outcome

    first, second = {"bytes": 4_000}, {"bytes": 8_000}
    one = dataclasses.replace(suite, grid={"training.budget": [first]})
    two = dataclasses.replace(suite, grid={"training.budget": [first, second]})
    (alone,) = search(one, ["transformer"], options, carry_out).values()
    both = search(two, ["transformer"], options, carry_out)
    assert {label for label, _ in both} == {"transformer bytes=4000", "transformer bytes=8000"}
    assert all(choice == alone and choice.quantity for choice in both.values())
    assert trained == [3, 0]
