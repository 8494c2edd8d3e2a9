"""Tiers 0, 1 and 3: planted regressions are caught by the tier that should, and nothing is found where nothing is."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from archbench.errors import GateError, RecordError
from archbench.gate import gate as whole
from archbench.gate import series
from archbench.gate.baseline import write_baseline
from archbench.gate.compare import compare
from archbench.gate.gate import Request, parse_budget, parse_tiers
from archbench.gate.markdown import MARK, document
from archbench.gate.measure import gated_plan, measure, timed_items
from archbench.gate.noise import Noise, Spread, TimingNoise, beside, load_noise, noise_for, spreads
from archbench.gate.points import gated, read_records
from archbench.gate.quality import hold_all
from archbench.gate.significance import holm, mcnemar, over_seeds, paired
from archbench.gate.verdict import Comparison, Finding
from archbench.gate.worktree import commit_of, file_at, root_of, worktree
from archbench.record import Record, RecordFile
from archbench.suite import entries, load_suite

SUITE = """
corpus: dir:{text}
training:
  budget: {{bytes: 6_000}}
  context: 32
  batch: 4
  learning_rate: 1e-2
  precision: fp32
cells:
  - architecture: {architecture}
    label: mine
    size: custom
    model: {{d_model: 16, n_layers: 1, n_heads: 1, d_ffn: 24}}
metrics:
  training: {{}}
  likelihood: {{max_bytes: 4096, max_document_bytes: 256, states: [reset]}}
  cost: {{contexts: [32]}}
  fingerprint: {{decode_steps: 2}}
  latency: {{contexts: [16], batches: [1]}}
"""
PLANTED = {
    "one more parameter": """
        def __init__(self, config, generator=None):
            super().__init__(config, generator)
            self.extra = torch.nn.Parameter(torch.zeros(()))

        def next_token_loss(self, batch):
            found = super().next_token_loss(batch)
            return found._replace(value=found.value + 0 * self.extra)
        """,
    "a wrong gradient scale": """
        def next_token_loss(self, batch):
            found = super().next_token_loss(batch)
            return found._replace(value=1.05 * found.value - 0.05 * found.value.detach())
        """,
    "a leaked token": """
        def hidden(self, tokens, layers):
            hidden, layers = super().hidden(tokens, layers)
            told = 4 * torch.nn.functional.normalize(self.unembedding.weight[tokens[:, 1:]], dim=-1)
            return torch.cat([hidden[:, :-1] + told, hidden[:, -1:]], dim=1), layers
        """,
    "an operator too many": """
        def hidden(self, tokens, layers):
            hidden, layers = super().hidden(tokens, layers)
            return hidden + 0.0, layers
        """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of made-up text."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), size=draw.integers(1, 6))) for _ in range(60)]
    folder = tmp_path_factory.mktemp("gate")
    (folder / "text").mkdir()
    for number in range(60):
        text = " ".join(draw.choice(words, size=70))
        (folder / "text" / f"{number:02}.txt").write_text(text)
    return folder


def suite_of(folder, architecture="transformer"):
    path = folder / "tiny.yaml"
    path.write_text(textwrap.dedent(SUITE).format(text=folder / "text", architecture=architecture))
    return str(path)


@pytest.fixture(scope="module")
def measured(folder):
    return measure(gated_plan(suite_of(folder)))


@pytest.fixture(scope="module")
def noise(folder, measured):
    records = [*measured, *measure(gated_plan(suite_of(folder), ["seeds=[1, 2]"]))]
    return Noise(suite="tiny", seeds=3, quality=spreads(records))


@cache
def planted(folder, name):
    """Records of the model with one planted defect."""
    path = folder / f"{name.replace(' ', '_')}.py"
    body = textwrap.indent(textwrap.dedent(PLANTED[name]), "    ")
    path.write_text(
        "import dataclasses\n"
        "import torch\n"
        "from archbench.architectures import transformer\n\n\n"
        f"class Planted(transformer.Transformer):\n{body}\n\n"
        "ARCHITECTURE = dataclasses.replace(transformer.ARCHITECTURE, build=Planted)\n"
    )
    return measure(gated_plan(suite_of(folder, path)))


def elsewhere(records):
    """The same records as if from another class of processor."""
    return [replace(record, environment={**record.environment, "cpu_class": "another"}) for record in records]


def held(baseline, current, fail_on="change", **options):
    return compare(baseline, current, title="test", fail_on=fail_on, **options)


def blocking(comparison):
    return {(finding.tier, finding.quantity.split(" ")[0]) for finding in comparison.blocking}


def with_values(records, quantity, change):
    """The records with every value and sample of a quantity changed."""
    return [
        replace(r, value=change(r.value), samples=[change(s) for s in r.samples])
        if r.quantity == quantity and r.value is not None
        else r
        for r in records
    ]


def test_ten_runs_of_the_same_code_are_green(folder, measured, noise):
    for _ in range(10):
        again = measure(gated_plan(suite_of(folder)))
        here = held(measured, again, noise=noise)
        assert here.exit_code == 0
        assert {finding.verdict for finding in here.findings} == {"same"}
        assert held(elsewhere(measured), again, noise=noise).exit_code == 0


def test_rounding_of_another_processor_is_fine(measured, noise):
    """A ten-thousandth of a bit, differing by document."""
    draw = np.random.default_rng(0)
    for _ in range(10):
        shaken = with_values(measured, "bits_per_byte", lambda x: x * (1 + 1e-4 * draw.standard_normal()))
        found = held(elsewhere(measured), shaken, noise=noise)
        assert found.exit_code == 0, found.blocking
        assert "fine" in {finding.verdict for finding in found.findings}


def test_one_more_parameter_is_in_the_ledger(folder, measured):
    found = held(measured, planted(folder, "one more parameter"), fail_on="regression")
    assert found.exit_code == 1
    assert (0, "parameters") in blocking(found)
    (total,) = (f for f in found.findings if f.quantity == "parameters [kind total]")
    assert total.current == total.baseline + 1


@pytest.mark.parametrize("where", [list, elsewhere])
def test_a_wrong_gradient_scale_is_in_the_ledger_on_every_machine(folder, measured, noise, where):
    """5 % too large: Adam hardly notices."""
    found = held(where(measured), planted(folder, "a wrong gradient scale"), noise=noise, fail_on="regression")
    assert found.exit_code == 1
    (norm,) = (f for f in found.blocking if f.quantity.startswith("gradient_norm"))
    assert norm.current == pytest.approx(1.05 * norm.baseline, rel=1e-3)
    (loss,) = (f for f in found.findings if f.quantity.startswith("first_loss"))
    assert loss.verdict == "same"


def test_one_wrong_gradient_among_many_is_named(measured):
    records = []
    for record in measured:
        if record.quantity == "gradient_norm":
            smallest = min(range(len(record.samples)), key=record.samples.__getitem__)
            samples = [s * (1.5 if i == smallest else 1) for i, s in enumerate(record.samples)]
            name = record.protocol.removeprefix("of ").split(", ")[smallest]
            record = replace(record, samples=samples)
        records.append(record)
    (finding,) = held(measured, records).blocking
    assert finding.note == f"{name} 1.5 x as large"


def test_an_operator_too_many_is_in_the_ledger(folder, measured):
    found = held(measured, planted(folder, "an operator too many"))
    calls = [f for f in found.blocking if f.quantity.startswith("operator_calls")]
    assert {f.quantity for f in calls} == {
        f"operator_calls [context 32, work {work}]" for work in ("training", "prefill", "decode")
    }
    assert all(f.note.startswith("add ") for f in calls)
    assert not [f for f in found.findings if f.tier == 1 and f.verdict != "same"]


def test_a_leaked_token_is_too_good_on_every_machine(folder, measured, noise):
    leaked = planted(folder, "a leaked token")
    for baseline in (measured, elsewhere(measured)):
        found = held(baseline, leaked, noise=noise)
        assert found.exit_code == 1
        bits = [f for f in found.findings if f.quantity.startswith("bits_per_byte")]
        assert [f.verdict for f in bits] == ["improved"]
        assert "a leak" in bits[0].note
    # Of two runs that somebody compares the better one is no regression; but it does another work.
    only_quality = held(elsewhere(measured), leaked, noise=noise, fail_on="regression", tiers=[1])
    assert only_quality.exit_code == 0


@pytest.mark.parametrize(("worse", "verdict"), [(1.2, "regressed"), (1.0005, "fine"), (0.8, "improved")])
def test_quality_on_another_processor(measured, noise, worse, verdict):
    changed = with_values(measured, "bits_per_byte", lambda x: worse * x)
    found = held(elsewhere(measured), changed, noise=noise, tiers=[1])
    (bits,) = (f for f in found.findings if f.quantity.startswith("bits_per_byte"))
    assert bits.verdict == verdict
    assert bits.low <= bits.high
    assert bits.margin > 0
    assert bits.detectable > bits.margin


def test_quality_on_the_same_processor_must_be_equal_or_acknowledged(measured, noise):
    changed = with_values(measured, "bits_per_byte", lambda x: 1.0005 * x)
    assert held(measured, changed, noise=noise).exit_code == 1
    assert held(measured, changed, noise=noise, fail_on="regression").exit_code == 0
    assert held(measured, with_values(measured, "bits_per_byte", lambda x: x * (1 + 1e-8))).exit_code == 0


def test_documents_that_disagree_leave_it_undecided(measured):
    """Half of the documents much worse, half much better: the mean could be anything."""
    signs = iter([1, -1] * 10_000)
    changed = [
        replace(r, value=1.001 * r.value, samples=[s * (1 + 0.2 * next(signs)) for s in r.samples])
        if r.quantity == "bits_per_byte"
        else r
        for r in measured
    ]
    found = held(elsewhere(measured), changed, fail_on="regression")
    assert found.exit_code == 3


def test_the_margin_is_the_noise_of_seeds_or_half_a_percent():
    noise = Noise(suite="s", seeds=5, quality={"a": Spread(mean=2.0, sd=0.1, n=5), "b": Spread(mean=2.0, sd=0.0, n=5)})
    assert noise.margin("a", 2.0) == pytest.approx(0.3)
    assert noise.margin("b", 2.0) == noise.margin("unknown", 2.0) == pytest.approx(0.01)


def test_cells_too_noisy_to_time_are_demoted_on_their_own_machine():
    timing = {"a decode": TimingNoise(error=0.02, detectable=0.05), "b decode": TimingNoise(error=0.08, detectable=0.2)}
    noise = Noise(suite="s", seeds=5, cpu_class="here", timing=timing)
    assert noise.demoted(0.1, "here") == ["b decode"]
    assert noise.demoted(0.3, "here") == []
    assert noise.demoted(0.1, "there") == noise.demoted(0.1, None) == []


def test_what_vanished_fails_with_its_reason(measured):
    without = [r for r in measured if r.metric != "likelihood"]
    failed = replace(
        next(r for r in measured if r.metric == "likelihood"),
        quantity="*", status="failed", reason="it broke", value=None, low=None, high=None, samples=[], at={},
    )  # fmt: skip
    found = held(measured, [*without, failed], fail_on="regression")
    assert found.exit_code == 1
    assert {f.note for f in found.blocking} == {"failed: it broke"}
    assert {f.note for f in held(measured, without).blocking} == {"likelihood was not measured"}


def test_a_new_quantity_is_no_regression(measured):
    found = held([r for r in measured if r.metric != "likelihood"], measured)
    assert found.exit_code == 0
    assert {f.verdict for f in found.findings} == {"same", "new"}


def test_a_cell_that_vanished_fails(measured):
    other = [replace(r, label="other") for r in measured]
    found = held([*measured, *other], measured)
    assert {f.note for f in found.blocking} == {"the cell is gone"}
    with pytest.raises(GateError, match="no cell in common: the baseline has other/custom/seed0; now there are mine/"):
        held(other, measured)


def test_another_text_is_not_compared(measured):
    found = held([replace(r, data_sha256="0" * 64) for r in measured], measured)
    assert found.exit_code == 2
    assert {f.verdict for f in found.findings if f.tier == 1} == {"incomparable"}
    assert "another text" in next(f.note for f in found.findings if f.tier == 1)
    assert "parameters [kind total]" in {f.quantity for f in found.findings if f.verdict == "same"}


def test_other_settings_or_versions_are_not_compared(measured):
    likelihood = [r for r in measured if r.metric in ("likelihood", "cost")]
    for other in ({"metric_version": 99}, {"settings": {**likelihood[-1].settings, "max_bytes": 5}}):
        changed = [replace(r, **other) if r.quantity == "bits_per_byte" else r for r in likelihood]
        assert held(likelihood, changed).exit_code == 2
    more = [replace(r, settings={**r.settings, "added_since": 1}) for r in likelihood]
    assert held(likelihood, more).exit_code == 0


def test_counts_of_what_ran_need_the_same_torch(measured):
    def of_torch(version):
        packages = {"torch": version}
        return [replace(r, environment={**r.environment, "packages": packages}) for r in measured]

    changed = [replace(r, value=r.value + 1) if r.quantity == "operator_bytes" else r for r in of_torch("9.9")]
    found = held(measured, changed)
    assert found.exit_code == 0
    assert not [f for f in found.findings if f.quantity.startswith("operator")]
    assert any("this on 9.9" in note for note in found.notes)


def test_a_slower_kernel_level_is_a_change(measured):
    def at(level):
        return [replace(r, backend={"attention": level}) for r in measured]

    found = held(at("native"), at("lean"), fail_on="regression")
    (kernel,) = found.blocking
    assert kernel.note == "ran at level 'lean', in the baseline at 'native'"
    assert held(elsewhere(at("native")), at("lean")).exit_code == 0


def items(right, **more):
    """A record of answers: passkey's exact match over items."""
    return replace(
        BLANK, metric="passkey", quantity="exact_match", samples=list(map(float, right)), value=float(np.mean(right)),
        **more,
    )  # fmt: skip


BLANK = Record(
    suite="s", run="r", job="j", cell="c", checkpoint="k", label="mine", architecture="a", size="nano", codec="bytes",
    corpus="t", seed=0, metric="cost", metric_version=1, quantity="parameters", unit="1", better="higher", status="ok",
    value=1.0, data_sha256="d",
)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1] * 20, [1] * 15 + [0] * 5, "regressed"),
        ([1] * 20, [1] * 17 + [0] * 3, "fine"),
        ([0] * 20, [1] * 10 + [0] * 10, "improved"),
        ([1, 0] * 10, [0, 1] * 10, "same"),  # as many right: the mean is equal
        ([1, 1, 1], [0, 0, 0], "undecided"),  # three items can show nothing
    ],
)
def test_items_by_mcnemar(before, after, verdict):
    (finding,) = (f for f in held([items(before)], [items(after)]).findings if f.tier == 1)
    assert finding.verdict == verdict


def test_mcnemar_is_the_binomial_tail():
    assert mcnemar(5, 0) == pytest.approx(1 / 32)
    assert mcnemar(0, 5) == 1.0
    assert mcnemar(3, 1) == pytest.approx((4 + 1) / 16)
    assert mcnemar(0, 0) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_equivalence_holds_its_error():
    """A difference exactly at the margin is called equivalent, and called worse, in about 5 of 100 studies."""
    rng = np.random.default_rng(1)
    equivalent = worse = 0
    for _ in range(1000):
        difference = over_seeds(rng.normal(0.5, 0.3, size=8).tolist())
        equivalent += difference.p_equivalent(0.5) < 0.05
        worse += difference.p_above(0.5) < 0.05
    assert 30 <= equivalent <= 75
    assert 30 <= worse <= 75


def test_paired_differences_weigh_documents_by_their_bytes():
    difference = paired([1.0, 2.0, 3.0], [1.1, 2.0, 3.0], [100.0, 300.0, 600.0], 1.0)
    assert difference.mean == pytest.approx(0.01)
    assert difference.freedom == 2
    assert paired([1.0, 2.0], [2.0, 3.0], [1.0, 1.0], -1.0).mean == pytest.approx(-1.0)


def test_three_seeds_are_one_question():
    loss = replace(BLANK, metric="training", quantity="loss", better="lower")
    before = [replace(loss, seed=s, value=2.0 + s) for s in range(4)]
    after = [replace(r, value=r.value + 0.5 + 0.01 * (-1) ** r.seed) for r in before]
    (finding,) = (f for f in held(before, after, fail_on="regression").findings)
    assert finding.cell == "mine/nano/4 seeds"
    assert finding.verdict == "regressed"
    assert finding.current - finding.baseline == pytest.approx(0.5)


def test_holm_is_over_the_table():
    """One lost batch of items in forty cells is chance."""
    after = [[1] * 15 + [0] * 5, *[[1] * 19 + [0]] * 39]
    cells = [(items([1] * 20, seed=s), items(right, seed=s)) for s, right in enumerate(after)]
    pairs = {point: pair for pair in cells for point in gated([pair[0]])}
    assert {f.verdict for f in hold_all(pairs, pairs, Noise(suite="", seeds=0))} == {"fine"}


def test_a_baseline_keeps_what_the_gate_needs(folder, measured, tmp_path):
    path = tmp_path / "baselines" / "tiny.jsonl"
    n = write_baseline(path, measured)
    kept = read_records(path, "--baseline")
    assert n == len(kept) == len(gated(measured))
    assert held(kept, measured).exit_code == 0
    assert {f.verdict for f in held(kept, measured).findings} == {"same"}
    assert path.stat().st_size < 1500 * n
    again = measure(gated_plan(suite_of(folder)))
    before = path.read_text()
    write_baseline(path, again)
    assert path.read_text() == before  # nothing in it varies by itself
    with pytest.raises(GateError, match="no quantity that the gate looks at was measured"):
        write_baseline(path, [replace(BLANK, metric="latency")])


def test_the_gate_of_a_suite(folder, measured, noise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = suite_of(folder)
    with pytest.raises(GateError, match=r"baselines/tiny\.jsonl: no such baseline; `archbench gate .*--accept`"):
        whole.gate(Request(suite=suite))
    path, n = whole.accept(Request(suite=suite))
    assert str(path) == "baselines/tiny.jsonl"
    assert n > 10
    noise.save(beside(path))
    kept = tmp_path / "now.jsonl"
    found = whole.gate(Request(suite=suite, save=kept))
    assert found.exit_code == 0
    assert found.counts.keys() == {0, 1}
    assert whole.gate(Request(suite=suite, records=kept)).exit_code == 0
    RecordFile(tmp_path / "bad.jsonl").append(with_values(measured, "bits_per_byte", lambda x: 2 * x))
    assert whole.gate(Request(suite=suite, records=tmp_path / "bad.jsonl")).exit_code == 1
    assert load_noise(beside(path)) == noise
    assert noise_for(measured, path, None) == noise


def test_a_failed_cell_is_no_baseline(folder, measured, tmp_path):
    records = [*measured, replace(measured[0], status="failed", reason="it broke", value=None, low=None, high=None)]
    RecordFile(tmp_path / "now.jsonl").append([replace(r, job=str(i)) for i, r in enumerate(records)])
    request = Request(suite=suite_of(folder), records=tmp_path / "now.jsonl", baseline=tmp_path / "base.jsonl")
    with pytest.raises(GateError, match=r"not written, for .* failed on mine: it broke"):
        whole.accept(request)
    assert not (tmp_path / "base.jsonl").exists()


def test_what_is_timed(folder):
    found = timed_items(suite_of(folder))
    assert [item.name for item in found] == ["mine/custom training", "mine/custom prefill", "mine/custom decode"]
    assert found[0].config["d_model"] == 16
    assert (found[0].context, found[0].batch) == (32, 4)
    assert (found[1].context, found[1].batch) == (16, 1)


def test_every_cell_of_smoke_is_in_the_committed_baseline():
    path = Path(__file__).parents[1] / "baselines" / "smoke.jsonl"
    labels = {entry.label or entry.architecture for entry in entries(load_suite("smoke"))}
    assert {record.label for record in read_records(path, "--baseline")} == labels
    assert path.stat().st_size < 500_000


# Other versions of a checkout


@pytest.fixture
def checkout(tmp_path, folder, measured):
    """A repository with a baseline in its first commit."""
    git(tmp_path, "init", "-q", "-b", "main")
    write_baseline(tmp_path / "baselines" / "tiny.jsonl", measured)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def git(folder, *words):
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *name, *words], check=True, capture_output=True)


def test_a_worktree_comes_and_goes(checkout):
    first = commit_of(checkout, "main")
    (checkout / "new.txt").write_text("new")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "second")
    assert root_of(checkout / "baselines").resolve() == checkout.resolve()
    assert file_at(checkout, first, checkout.relative_to(checkout) / "new.txt") is None
    with worktree(checkout, first) as tree:
        assert (tree / "baselines" / "tiny.jsonl").is_file()
        assert not (tree / "new.txt").exists()
    assert not tree.exists()
    listed = subprocess.check_output(["git", "-C", str(checkout), "worktree", "list"], text=True)
    assert len(listed.splitlines()) == 1


def test_what_was_acknowledged_is_shown(checkout, folder, measured, monkeypatch):
    """The baseline is rewritten with the change: the gate is green, and says what it was made to accept."""
    monkeypatch.chdir(checkout)
    now = with_values(measured, "bits_per_byte", lambda x: 1.1 * x)
    write_baseline(checkout / "baselines" / "tiny.jsonl", now)
    RecordFile(checkout / "now.jsonl").append(now)
    request = Request(suite=suite_of(folder), records=checkout / "now.jsonl", base="HEAD")
    found = whole.gate(request)
    assert found.exit_code == 0
    (told,) = found.acknowledged
    assert told.current == pytest.approx(1.1 * told.baseline)
    assert "Acknowledged in the baseline file: 1" in document(found)


def test_history_shows_steps_and_blocks_nothing(tmp_path, measured, monkeypatch):
    draw = np.random.default_rng(0)
    slow = replace(BLANK, metric="latency", quantity="time_per_token", better="lower", environment={"cpu_class": "x"})
    for day in range(20):
        value = (1.0 if day < 12 else 1.2) * (1 + 0.01 * draw.standard_normal())
        record = replace(slow, value=value, created=f"2026-01-{day + 1:02}T00:00:00+00:00")
        RecordFile(tmp_path / "history" / f"{20 - day}.jsonl").append([record])
    (step,) = series.watch(tmp_path / "history")
    assert step.note == "a step since 2026-01-13T00:00, run 13 of 20"
    assert step.change == pytest.approx(0.2, abs=0.02)
    found = Comparison(title="t", findings=[step], fail_on="change")
    assert found.exit_code == 0
    assert "time_per_token" in document(found)
    with pytest.raises(GateError, match="holds no"):
        series.watch(tmp_path / "nothing")


def test_steady_noise_has_no_steps_and_a_step_is_found_where_it_is():
    rng = np.random.default_rng(0)
    false = sum(bool(series.steps((10 * np.exp(rng.normal(0, 0.03, size=30))).tolist())) for _ in range(100))
    assert false <= 5
    found = 0
    for _ in range(50):
        values = np.exp(rng.normal(0, 0.03, size=30)) * np.where(np.arange(30) < 18, 1.0, 1.15)
        found += [abs(step.index - 18) <= 1 for step in series.steps(values.tolist())] == [True]
    assert found >= 45
    outlier = [1.0, 1.01, 0.99, 1.0, 3.0, 1.0, 1.01, 0.99, 1.0, 1.02]
    assert series.steps(outlier) == []
    assert series.steps([1.0] * 20) == []
    assert [step.index for step in series.steps([1.0] * 5 + [2.0] * 5)] == [5]


# As a person uses it

RUN = [sys.executable, "-m", "archbench.cli"]


def archbench(*words, **more):
    return subprocess.run([*RUN, *map(str, words)], capture_output=True, text=True, timeout=300, **more)


def test_exit_codes():
    def code(*verdicts, fail_on="regression", tier=1):
        findings = [Finding(tier=tier, cell="c", quantity="q", verdict=verdict) for verdict in verdicts]
        return Comparison(title="t", findings=findings, fail_on=fail_on).exit_code

    assert code() == code("same", "fine", "new", "watched", "improved", "changed") == 0
    assert code("undecided", "incomparable", "regressed") == code("vanished") == code("changed", tier=0) == 1
    assert code("undecided", "incomparable") == 2
    assert code("undecided", "fine") == 3
    assert code("improved", fail_on="change") == code("changed", fail_on="change") == 1
    assert code("regressed", "vanished", "undecided", fail_on="nothing") == 0
    assert code("watched", tier=3) == 0


def test_compare_from_the_command_line(measured, tmp_path):
    RecordFile(tmp_path / "a" / "1.jsonl").append(measured)
    RecordFile(tmp_path / "b.jsonl").append(with_values(measured, "bits_per_byte", lambda x: 2 * x))
    done = archbench(
        "compare", "a", "b.jsonl", "--fail-on", "regression", "--markdown", "table.md", "--json", cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    assert (data["exit_code"], data["verdict"]) == (1, "regressed")
    (worse,) = (f for f in data["findings"] if f["blocks"])
    assert worse["change"] == pytest.approx(1.0)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(MARK)
    assert "**regressed**" in table
    assert "+100 %" in table


def test_errors_are_kind(tmp_path, measured, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordError, match="BASELINE nowhere: no such file or folder"):
        read_records("nowhere", "BASELINE")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RecordError, match=r"CURRENT .*cannot be read"):
        read_records("binary.jsonl", "CURRENT")
    with pytest.raises(GateError, match="not in a git checkout"):
        root_of(tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(GateError, match="--base nosuch: no such commit"):
        commit_of(tmp_path, "nosuch")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GateError, match="git is not installed here"):
        root_of(tmp_path)
    for tiers in ((2,), (3,)):
        with pytest.raises(GateError, match=r"name it with --(base REF|history DIR)"):
            whole.gate(Request(suite=suite_of(folder), tiers=tiers))
    with pytest.raises(GateError, match="measures nothing that the gate looks at"):
        (tmp_path / "none.yaml").write_text("training: {budget: {bytes: 1}}\ncells: [{architecture: ngram}]\n")
        gated_plan(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.noise.json").write_text("[]")
    with pytest.raises(RecordError, match="not a noise file"):
        load_noise(tmp_path / "bad.noise.json")


def test_words_of_the_command_line(tmp_path):
    assert parse_tiers(None, None, None) == (0, 1)
    assert parse_tiers(None, "main", tmp_path) == (0, 1, 2, 3)
    assert parse_tiers("1, 0", "main", None) == (0, 1)
    assert [parse_budget(text) for text in ("90", "90s", "1.5m", "1h")] == [90, 90, 90, 3600]
    for wrong in ("4", "0,x", ""):
        with pytest.raises(GateError, match="--tiers"):
            parse_tiers(wrong, None, None)
    with pytest.raises(GateError, match="not a time; write 90s or 6m"):
        parse_budget("soon")


def test_a_usage_error_is_exit_code_2(tmp_path):
    done = archbench("compare", "nowhere", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "archbench: BASELINE nowhere: no such file or folder; `archbench run SUITE` writes results/SUITE\n"
    )


def test_numbers_of_a_table_are_finite():
    finding = Finding(tier=1, cell="a|b", quantity="q", verdict="undecided", baseline=0.0, current=1e-9, low=-1, high=3)
    text = document(Comparison(title="t", findings=[finding], fail_on="change"))
    assert "a\\|b" in text
    assert "nan" not in text
