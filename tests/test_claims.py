"""Claims judged on made-up records whose verdicts are known, and the claims that ship."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from archbench import registry
from archbench.claims.check import FigureCheck, Slope, parse_check, readings
from archbench.claims.claim import SCALES, Claims, load_claims
from archbench.claims.estimate import Estimate, Point, alone, compared, correlation, slope
from archbench.claims.judge import VERDICTS, Outcome, judge
from archbench.claims.run import Line, Run, load_run, load_runs, run_of
from archbench.cli import app
from archbench.errors import ArchbenchError, ConfigError
from archbench.record import Record, RecordFile
from archbench.report.claims import claims_table
from archbench.suite import entries, load_suite

SUPPORTED, CONTRADICTED, UNTESTABLE = VERDICTS


def record(label: str, quantity: str, value: float | None, **more: Any) -> Record:
    """One of architecture `label` up to its first space."""
    given: dict[str, Any] = {
        "suite": "mine",
        "run": "r",
        "job": f"{label}-{quantity}",
        "cell": f"{label}-{more.get('size', 'micro')}-{more.get('seed', 0)}",
        "checkpoint": "c",
        "label": label,
        "architecture": label.split()[0],
        "size": "micro",
        "codec": "bytes",
        "corpus": "stdlib",
        "seed": 0,
        "metric": "likelihood",
        "metric_version": 1,
        "unit": "bit/byte",
        "better": "lower",
        "status": "ok" if value is not None else "unsupported",
        "config": {"model": {"k": 1}, "training": {}},
    }
    return Record(**{**given, "quantity": quantity, "value": value, **more})


def run(*records: Record, suite: str = "mine") -> Run:
    return run_of([Line(r, i) for i, r in enumerate(records, start=1)], Path(f"results/{suite}/1-{suite}.jsonl"))


BASE = """
papers: {it: Somebody 2025}
figures:
  - id: size
    value: 100
    unit: parameter
    of: parameters of the model
    source: "it, Table 1"
    step: 1
    match: {quantity: parameters, of: {architecture: a, size: one}, at: {kind: total}}
  - {id: fixed, value: 50, unit: parameter, of: parameters of another, source: "it, Table 1", exact: 50}
  - {id: twice, value: 2, unit: ratio, of: the first over the other, source: "it, text", ratio: [size, fixed]}
  - {id: bare, value: 7, unit: number, of: something else, source: "it, text"}
claims:
  - id: one
    text: a is good.
    source: "it, section 1"
    figures: [bare]
    scale: laptop
    supports: it is low
    contradicts: it is high
    suites: [mine]
    check:
      kind: threshold
      of: {metric: likelihood, quantity: bits_per_byte, cells: {architecture: a}, at: {state: reset}}
      most: 2
"""


def claims_with(folder: Path, check: str = "", **changes: str) -> Claims:
    """The one claim of BASE with another check, and other lines."""
    text = textwrap.dedent(BASE)
    if check:
        text = text[: text.index("    check:")] + "    check:\n" + textwrap.indent(textwrap.dedent(check), " " * 6)
    for key, value in changes.items():
        line = next(line for line in text[text.index("claims:") :].splitlines() if line.strip().startswith(f"{key}:"))
        text = text.replace(line, f"    {key}: {value}")
    (folder / "one.yaml").write_text(text)
    return load_claims(folder)


def verdict(folder: Path, check: str, *records: Record, **changes: str) -> Outcome:
    (found,) = judge(claims_with(folder, check, **changes), [run(*records)] if records else [])
    assert found.verdict in VERDICTS and found.reason
    return found


def bits(label: str, value: float, half: float | None = 0.05, **more: Any) -> Record:
    bounds = {} if half is None else {"low": value - half, "high": value + half, "confidence": 0.95}
    return record(label, "bits_per_byte", value, at={"state": "reset"}, **{**bounds, **more})


AT_MOST_2 = """
kind: threshold
of: {metric: likelihood, quantity: bits_per_byte, cells: {architecture: a}, at: {state: reset}}
most: 2
"""


@pytest.mark.parametrize(
    ("value", "half", "expected", "said"),
    [
        (1.9, 0.05, SUPPORTED, "1.9 [1.85, 1.95]; claimed is at most 2"),
        (2.1, 0.05, CONTRADICTED, "2.1 [2.05, 2.15]"),
        (1.98, 0.05, UNTESTABLE, "the interval holds both"),
        (1.0, None, UNTESTABLE, "without an interval nothing follows"),
    ],
)
def test_a_threshold_needs_the_whole_interval(tmp_path, value, half, expected, said):
    found = verdict(tmp_path, AT_MOST_2, bits("a", value, half))
    assert found.verdict == expected
    assert said in found.reason
    assert "one training each" in found.reason and found.exploratory
    assert [entry["value"] for entry in found.evidence] == [value]


def test_missing_records_name_the_command(tmp_path):
    found = verdict(tmp_path, AT_MOST_2)
    assert (found.verdict, found.missing) == (UNTESTABLE, True)
    assert found.reason == "no records; they come from `archbench run mine`"
    found = verdict(tmp_path, AT_MOST_2, bits("b", 1.0))
    assert (found.verdict, found.evidence) == (UNTESTABLE, [])
    assert "mine has no cell for a; such records come from `archbench run mine`" in found.reason
    refused = record("a", "bits_per_byte", None, at={"state": "reset"}, reason="it has none")
    assert "it has none" in verdict(tmp_path, AT_MOST_2, refused).reason


def test_what_was_assumed_for_a_number_without_interval_decides(tmp_path):
    spread = AT_MOST_2.replace("reset}}", "reset}, spread: 0.1}")
    assert verdict(tmp_path, spread, bits("a", 1.7, None)).verdict == SUPPORTED
    assert verdict(tmp_path, spread, bits("a", 1.95, None)).verdict == UNTESTABLE
    counted = verdict(tmp_path, AT_MOST_2.replace("reset}}", "reset}, spread: 0}"), bits("a", 2.0, None))
    assert counted.verdict == SUPPORTED and not counted.exploratory


def test_luck_is_allowed_for_below_three_seeds_only(tmp_path):
    check = AT_MOST_2 + "luck: 0.2\n"
    assert verdict(tmp_path, check, bits("a", 1.9)).verdict == UNTESTABLE
    assert "0.2 allowed for its luck" in verdict(tmp_path, check, bits("a", 1.9)).reason
    seeds = [bits("a", 1.9 + shift, 0.5, seed=i) for i, shift in enumerate((-0.01, 0.0, 0.01))]
    found = verdict(tmp_path, check, *seeds)
    assert found.verdict == SUPPORTED and not found.exploratory
    half = 4.302652729911275 * 0.01 / math.sqrt(3)
    assert found.found[0].estimate == pytest.approx((1.9, 1.9 - half, 1.9 + half, 3))


RATIO = """
kind: threshold
of: {metric: latency, quantity: time_per_token, cells: {architecture: a}, at: {context: max}}
over: {cells: {architecture: b}}
least: 2
"""


def times(label: str, samples: Sequence[float], context: int = 8) -> Record:
    return record(
        label,
        "time_per_token",
        float(np.median(samples)),
        low=min(samples),
        high=max(samples),
        samples=list(samples),
        metric="latency",
        at={"context": context},
    )


def test_ratios_of_times_go_by_turns(tmp_path):
    """Both drift by a factor of three, together: every turn has the ratio 3."""
    drift = [1, 1.2, 1.5, 2, 2.2, 2.5, 3]
    records = [times("a", [3 * d for d in drift]), times("b", drift), times("a", [0.1] * 7, 4), times("b", [9] * 7, 4)]
    found = verdict(tmp_path, RATIO, *records)
    assert found.verdict == SUPPORTED and not found.exploratory
    assert found.found[0].estimate == pytest.approx((3, 3, 3, 0))
    assert verdict(tmp_path, RATIO, times("a", [1.5 * d for d in drift]), times("b", drift)).verdict == CONTRADICTED
    unpaired = verdict(tmp_path, RATIO, times("a", [3 * d for d in drift]), times("b", drift[:6]))
    assert unpaired.verdict == UNTESTABLE, "apart, their intervals are wide"


ORDERING = """
kind: ordering
of: {metric: likelihood, quantity: bits_per_byte, cells: {architecture: a}, at: {state: reset}}
rivals: [{cells: {architecture: b}}, {cells: {architecture: c}}]
"""


def test_an_ordering_must_hold_against_each_rival(tmp_path):
    a, worse, equal, better = bits("a", 1.5), bits("b", 1.8), bits("c", 1.52), bits("c", 1.2)
    assert verdict(tmp_path, ORDERING, a, worse, bits("c", 1.9)).verdict == SUPPORTED
    found = verdict(tmp_path, ORDERING, a, worse, equal)
    assert found.verdict == UNTESTABLE and "that of c" in found.reason and "that of b" not in found.reason
    found = verdict(tmp_path, ORDERING, a, worse, better)
    assert found.verdict == CONTRADICTED
    assert [finding.estimate.value for finding in found.found] == pytest.approx([0.3, -0.3])
    half = math.hypot(0.05, 0.05)
    assert found.found[1].estimate == pytest.approx((-0.3, -0.3 - half, -0.3 + half, 1))


def test_higher_is_better_where_the_quantity_says_so(tmp_path):
    high = [bits(label, value, better="higher") for label, value in (("a", 1.5), ("b", 1.2), ("c", 1.1))]
    assert verdict(tmp_path, ORDERING, *high).verdict == SUPPORTED
    neither = [bits(label, 1.0, better="neither") for label in "abc"]
    assert "neither direction is better" in verdict(tmp_path, ORDERING, *neither).reason


def documents(label: str, each: Sequence[float], sizes: Sequence[float]) -> Iterator[Record]:
    value = float(np.average(each, weights=sizes))
    yield bits(label, value, 1.0, samples=list(each))
    yield record(label, "heldout_bytes", sum(sizes), samples=list(sizes), at={"state": "reset"}, better="neither")


def test_one_seed_is_compared_document_by_document(tmp_path):
    """Documents differ by far more than the models do."""
    hard, sizes = np.linspace(1, 4, 20), [100.0 + i for i in range(20)]
    records = [*documents("a", hard, sizes), *documents("b", hard + 0.1, sizes), *documents("c", hard + 0.1, sizes)]
    found = verdict(tmp_path, ORDERING, *records)
    assert found.verdict == SUPPORTED
    assert found.found[0].estimate == pytest.approx((0.1, 0.1, 0.1, 1))
    other = [*documents("a", hard, sizes), *documents("b", hard + 0.1, sizes[::-1]), *documents("c", hard + 0.1, sizes)]
    assert verdict(tmp_path, ORDERING, *other).verdict == UNTESTABLE, "other documents do not pair"


def test_seeds_are_paired(tmp_path):
    """Seeds move both alike, by more than they differ."""
    records = [
        bits(label, 2 + seed + shift + 0.01 * (seed == 2), None, seed=seed)
        for label, shift in (("a", 0.0), ("b", 0.2), ("c", 0.3))
        for seed in range(4)
    ]
    found = verdict(tmp_path, ORDERING, *records)
    assert found.verdict == SUPPORTED and not found.exploratory
    lone = [*records[:4], *(bits(label, 3.0, None, seed=9) for label in "bc")]
    assert "share no seed" in verdict(tmp_path, ORDERING, *lone).reason


def costs(label: str, values: dict[int, float], metric: str = "cost", **more: Any) -> list[Record]:
    return [record(label, "flops", y, metric=metric, at={"context": x}, **more) for x, y in values.items()]


SLOPE = """
kind: slope
of: {metric: cost, quantity: flops, cells: {architecture: a}}
along: at.context
"""


def test_slopes_along_a_coordinate(tmp_path):
    square = costs("a", {x: 3.0 * x * x for x in (2, 8, 32)})
    assert verdict(tmp_path, SLOPE + "least: 1.9\nmost: 2.1", *square).verdict == SUPPORTED
    found = verdict(tmp_path, SLOPE + "most: 1.5", *square)
    assert found.verdict == CONTRADICTED and found.found[0].estimate == pytest.approx((2, 2, 2, 0))
    grown = costs("a", {x: 100 + 3.0 * x for x in (2, 8, 32)})
    assert verdict(tmp_path, SLOPE + "least: 0.99\nmost: 1.01", *grown).verdict == CONTRADICTED
    assert verdict(tmp_path, SLOPE + "least: 0.99\nmost: 1.01\nrise: true", *grown).verdict == SUPPORTED
    assert "1 values of context" in verdict(tmp_path, SLOPE + "most: 1", *square[:1]).reason
    over = SLOPE + "over: {cells: {architecture: b}}\nleast: 0.99\nmost: 1.01"
    assert verdict(tmp_path, over, *square, *costs("b", {x: 5.0 * x for x in (2, 8, 64, 32)})).verdict == SUPPORTED


def test_the_error_of_a_slope_is_that_of_its_points(tmp_path):
    """Two points an e apart: the slope is the difference of their logarithms."""
    wide = [
        record("a", "flops", y, low=y / 1.2, high=y * 1.2, metric="timing", at={"context": x})
        for x, y in ((1.0, 10.0), (math.e, 10.0 * math.e))
    ]
    check = SLOPE.replace("metric: cost", "metric: timing")
    found = verdict(tmp_path, check + "most: 1.2", *wide)
    half = math.sqrt(2) * math.log(1.2)
    assert found.found[0].estimate == pytest.approx((1, 1 - half, 1 + half, 1))
    assert found.verdict == UNTESTABLE
    assert verdict(tmp_path, check + "most: 1.3", *wide).verdict == SUPPORTED


def test_slopes_along_a_key_of_the_config_and_over_named_places(tmp_path):
    records = [
        r
        for k in (1, 2, 4)
        for r in costs(f"a {k}", {8: 5.0 * k**3}, config={"model": {"k": k}}, size=("s", "m", "l")[k // 2])
    ]
    along = """
    kind: slope
    of: {metric: cost, quantity: flops, cells: {architecture: a}}
    along: config.model.k
    least: 2.99
    most: 3.01
    """
    assert verdict(tmp_path, along, *records).verdict == SUPPORTED
    places = """
    kind: slope
    places:
      - x: 1
        of: {metric: cost, quantity: flops, cells: {architecture: a, size: s}}
        over: {cells: {architecture: a, size: m}}
      - x: 10
        of: {cells: {architecture: a, size: l}}
        over: {cells: {architecture: a, size: m}}
    least: 0
    """
    found = verdict(tmp_path, places, *records)
    assert found.found[0].estimate.value == pytest.approx(math.log10(64))
    assert found.verdict == SUPPORTED and len(found.evidence) == 3


CORRELATION = """
kind: correlation
x: {metric: likelihood, quantity: bits_per_byte, cells: {}, at: {state: reset}}
y: {metric: brier_lm, quantity: brier_lm, cells: {}}
most: -0.9
"""


def cloud(n: int, noise: float) -> list[Record]:
    draw = np.random.default_rng(1).normal(size=n)
    found = []
    for i in range(n):
        found.append(bits(f"a {i}", 1 + i / n, None))
        found.append(record(f"a {i}", "brier_lm", 50 - 30 * i / n + noise * draw[i], metric="brier_lm"))
    return found


def test_correlations(tmp_path):
    assert verdict(tmp_path, CORRELATION, *cloud(12, 0.1)).verdict == SUPPORTED
    assert verdict(tmp_path, CORRELATION, *cloud(12, 60.0)).verdict == CONTRADICTED
    assert verdict(tmp_path, CORRELATION, *cloud(12, 5.0)).verdict == UNTESTABLE
    found = verdict(tmp_path, CORRELATION, *cloud(4, 0.1), bits("a 9", 1.0))
    assert found.verdict == UNTESTABLE and "4 cells with both numbers" in found.reason
    x, y = np.random.default_rng(0).normal(size=(2, 15)).tolist()
    for name, reference in (("pearson", scipy_stats.pearsonr), ("spearman", scipy_stats.spearmanr)):
        assert correlation(x, y, name).value == pytest.approx(reference(x, y).statistic)
    low, high = scipy_stats.pearsonr(x, y).confidence_interval(0.95)
    assert correlation(x, y, "pearson")[1:3] == pytest.approx((low, high))
    perfect = correlation(x[:8], [2 * value for value in x[:8]], "spearman")
    assert perfect.value == 1 and 0.7 < (perfect.low or 0) < 0.99, "eight in order do not prove a law"


def test_figures_are_counted_here(tmp_path):
    count = {"metric": "design_cost", "size": "one", "at": {"kind": "total"}, "unit": "parameter"}
    for value, expected in ((100.4, SUPPORTED), (101.9, SUPPORTED), (98.1, SUPPORTED), (103.0, CONTRADICTED)):
        for figure in ("size", "twice"):
            check = f"{{kind: figure, figure: {figure}}}"
            found = verdict(tmp_path, check, record("a", "parameters", value, **count), scale="paper-cost")
            assert found.verdict == expected, (figure, value)
    other = record("b", "parameters", 100.0, **count)
    check = "{kind: figure, figure: size}"
    assert verdict(tmp_path, check, other, scale="paper-cost").verdict == UNTESTABLE
    both = [record(label, "parameters", v, **count) for label, v in (("a", 100.0), ("a variant", 500.0))]
    assert verdict(tmp_path, check, *both, scale="paper-cost").verdict == SUPPORTED


POOLED = """
kind: threshold
of:
  metric: passkey
  quantity: exact_match
  cells: {architecture: a}
  at: {length: 1000}
  pool: true
  given_up: failed before
least: 0.85
"""


def test_points_are_pooled_and_failures_count(tmp_path):
    def asked(depth: float, right: int, n: int = 10) -> Record:
        samples = [1.0] * right + [0.0] * (n - right)
        given: dict[str, Any] = {"metric": "passkey", "at": {"length": 1000, "depth": depth}, "better": "higher"}
        return record("a", "exact_match", right / n, samples=samples, **given)

    assert verdict(tmp_path, POOLED, *(asked(depth, 10) for depth in (0, 0.5, 1))).verdict == SUPPORTED
    assert verdict(tmp_path, POOLED, asked(0, 10)).verdict == UNTESTABLE, "ten right ones do not exclude 0.85"
    assert verdict(tmp_path, POOLED, *(asked(depth, 2) for depth in (0, 0.5, 1))).verdict == CONTRADICTED
    gone = {"metric": "passkey", "at": {"length": 1000, "depth": 0}, "better": "higher"}
    failed = record("a", "exact_match", None, reason="failed before: 0.02 at 500 tokens", **gone)
    found = verdict(tmp_path, POOLED, failed)
    assert (found.verdict, found.exploratory) == (CONTRADICTED, True)
    assert "failed before: 0.02 at 500 tokens" in found.reason
    dear = record("a", "exact_match", None, reason="beyond the budget: projected 900 s", **gone)
    found = verdict(tmp_path, POOLED, dear)
    assert found.verdict == UNTESTABLE and "beyond the budget" in found.reason
    several = verdict(tmp_path, POOLED.replace("pool: true", "pool: false"), asked(0, 10), asked(1, 10))
    assert several.verdict == UNTESTABLE and "2 points, which differ in depth" in several.reason


def test_the_largest_shared_size_is_taken_and_ambiguity_refused(tmp_path):
    def sized(label: str, size: str, value: float, parameters: float) -> list[Record]:
        count = record(label, "parameters", parameters, metric="cost", size=size, at={"kind": "total"})
        return [bits(label, value, size=size), count]

    check = AT_MOST_2.replace("kind: threshold", "kind: ordering").replace(
        "most: 2", "rivals: [{cells: {architecture: b}}]"
    )
    small = [*sized("a", "nano", 3.0, 1e5), *sized("b", "nano", 2.0, 1e5)]
    large = [*sized("a", "micro", 1.0, 4e5), *sized("b", "micro", 2.0, 4e5)]
    assert verdict(tmp_path, check, *small, *large, *sized("a", "mini", 9.0, 1e6)).verdict == SUPPORTED
    assert verdict(tmp_path, check, *small).verdict == CONTRADICTED
    twins = verdict(tmp_path, check, *large, bits("a twin", 0.5))
    assert twins.verdict == UNTESTABLE and "2 cells for a: a, a twin" in twins.reason


def test_scale_and_suites(tmp_path):
    known = claims_with(tmp_path, AT_MOST_2)
    good, bad = run(bits("a", 1.0)), run(bits("a", 3.0, suite="other"), suite="other")
    assert judge(known, [bad, good])[0].verdict == SUPPORTED, "its own suites only"
    assert judge(known, [bad])[0].missing
    assert judge(known, [bad], any_suite=True)[0].verdict == CONTRADICTED
    (small,) = judge(known, [good], scale="paper-cost")
    assert (small.verdict, small.reason) == (UNTESTABLE, "its smallest faithful scale is laptop")
    assert judge(known, [good], scale="gpu")[0].verdict == SUPPORTED
    with pytest.raises(ConfigError, match="--scale huge: not known; allowed: gpu, laptop, paper-cost"):
        judge(known, [good], scale="huge")
    large = claims_with(tmp_path, AT_MOST_2, scale="gpu")
    assert judge(large, [good])[0].reason.startswith("its smallest faithful scale is gpu; there are those of laptop")
    assert "no records; they come from `archbench run mine`" in judge(large, [])[0].reason
    on_gpu = run(bits("a", 1.0, backend={"attention": "cuda"}))
    assert (on_gpu.scale, judge(large, [on_gpu])[0].verdict) == ("gpu", SUPPORTED)
    assert run(record("a", "parameters", 1.0, metric="design_cost")).scale == "paper-cost"
    first = claims_with(tmp_path, AT_MOST_2, suites="[other, mine]")
    assert judge(first, [good, bad])[0].verdict == CONTRADICTED, "the first suite that has the records"
    without = run(bits("b", 1.0, suite="other"), suite="other")
    assert judge(first, [without, good])[0].verdict == SUPPORTED


def test_outcomes_are_plain_data_with_linked_evidence(tmp_path):
    file = RecordFile(tmp_path / "results" / "mine" / "20260101T000000Z-ab.jsonl")
    mended = bits("a", None, None, status="failed", reason="out of memory", job="j")  # type: ignore[arg-type]
    file.append([bits("b", 9.0), mended, bits("a", 1.0, job="j")])
    (tmp_path / "papers").mkdir()
    known = claims_with(tmp_path / "papers", AT_MOST_2)
    (found,) = judge(known, load_runs([tmp_path / "results"]))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {"id", "verdict", "evidence", "source", "reason", "text", "published", "measured"} <= set(data)
    assert (data["id"], data["verdict"], data["published"]) == ("one", SUPPORTED, "7 number (something else)")
    assert data["measured"] == "bits_per_byte (state reset) of a micro: 1 [0.95, 1.05] bit/byte"
    (evidence,) = data["evidence"]
    assert (evidence["line"], evidence["job"], evidence["value"], evidence["label"]) == (3, "j", 1.0, "a")
    line = Path(evidence["file"]).read_text().splitlines()[evidence["line"] - 1]
    assert json.loads(line)["value"] == 1.0
    with pytest.raises(ArchbenchError, match="holds no results"):
        load_runs([tmp_path / "papers"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("text: a", "txt: a", "one.yaml: claims[0].txt: unknown key; did you mean 'text'?"),
        ("    text: a is good.\n", "", "claims[0].text: required key is missing"),
        ("scale: laptop", "scale: desk", "claims[0]: scale: 'desk'; allowed: gpu, laptop, paper-cost"),
        ("figures: [bare]", "figures: [bar]", "claims[0]: figure 'bar' is not known; did you mean 'bare'?"),
        ("    figures: [bare]\n", "", "found neither; say what was published"),
        ('source: "it, section 1"', 'source: "its, 1"', "claims[0].source: paper 'its' is not known"),
        ("suites: [mine]", "suites: []", "suites, how: found neither; say whose records decide"),
        ("supports: it is low", "supports: ''", "supports: empty"),
        ("kind: threshold", "kind: treshold", "claims[0].check.kind: found 'treshold'; did you mean 'threshold'?"),
        ("most: 2", "mos: 2", "claims[0].check.mos: unknown key; did you mean 'most'?"),
        ("      most: 2\n", "", "least, most: found neither; give one or both"),
        ("most: 2", "most: 2\n      least: 3", "3.0 and 2.0; nothing lies between"),
        ("quantity: bits", "quantty: bits", "check.of.quantty: unknown key; did you mean 'quantity'?"),
        ("architecture: a}", "architectur: a}", "check.of.cells.architectur: unknown key"),
        ("most: 2", "most: 2\n      luck: -1", "luck: -1.0; must be at least 0"),
        ("kind: threshold", "kind: slope", "of, along, places: give of and along, or places"),
        ("kind: threshold", "kind: ordering", "check.rivals: required key is missing"),
        (
            "check:\n      kind: threshold",
            "check: 3\n    more:\n      kind: threshold",
            "check: found int; expected a mapping",
        ),
        ("- id: one", "- &first\n    id: one", ""),
    ],
)
def test_every_typo_is_one_line_with_its_place(tmp_path, old, new, message):
    assert old in BASE
    (tmp_path / "one.yaml").write_text(BASE.replace(old, new, 1))
    if not message:
        (tmp_path / "one.yaml").write_text(BASE.replace(old, new, 1) + "  - *first\n")
        message = "claims[1].id: 'one' is taken by"
    with pytest.raises(ArchbenchError) as caught:
        load_claims(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_impossible_checks():
    of = {"metric": "m", "quantity": "q", "cells": {}}
    for data, message in (
        ({"kind": "slope", "of": of, "along": "context", "most": 1}, "expected at.NAME or config.NAME"),
        ({"kind": "slope", "places": [{"x": 1, "of": of}], "most": 1}, "a slope needs two"),
        ({"kind": "slope", "places": {}, "most": 1}, "expected a list"),
        ({"kind": "ordering", "of": of, "rivals": []}, "expected a list"),
        ({"kind": "figure", "figure": "x", "tolerance": -1}, "tolerance"),
        ({"kind": "correlation", "x": of, "y": of, "coefficient": "kendall", "most": 0}, "coefficient"),
    ):
        with pytest.raises(ArchbenchError, match=message):
            parse_check(data, "here")


def test_a_figure_without_a_match_cannot_be_checked(tmp_path):
    with pytest.raises(ArchbenchError, match=r"check.figure: 'bare' has no match"):
        claims_with(tmp_path, "{kind: figure, figure: bare}")


def test_estimates_by_hand():
    exact = Point(value=4.0, exact=True)
    assert alone([exact, exact]) == Estimate(4.0, 4.0, 4.0, 0)
    assert compared([(exact, Point(value=2.0, exact=True))], ratio=True) == pytest.approx((2, 2, 2, 0))
    assert compared([(exact, Point(value=2.0))], ratio=False)[1:3] == (None, None), "no interval, no verdict"
    two = [Point(value=1.0, low=0.9, high=1.2), Point(value=3.0, low=2.9, high=3.2)]
    assert alone(two) == pytest.approx((2, 2 - math.hypot(0.1, 0.1) / 2, 2 + math.hypot(0.2, 0.2) / 2, 2))
    line = [Estimate(2.0 * x**1.5, 2.0 * x**1.5, 2.0 * x**1.5, 0) for x in (1, 3, 10)]
    assert slope([1.0, 3.0, 10.0], line) == pytest.approx((1.5, 1.5, 1.5, 0))
    texts = ([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0])
    a, b = (Point(value=float(np.mean(t)), samples=tuple(t), statistic="mean", codec="bytes") for t in texts)
    paired = compared([(a, b)], ratio=False)
    assert paired.value == 0.5 and 0 <= (paired.low or 0) < 0.5 < (paired.high or 0) <= 1


# The claims that ship


SHIPPED = load_claims()


def test_the_claims_that_are_asked_for_are_there():
    assert len(SHIPPED.claims) >= 30
    papers = {claim.paper for claim in SHIPPED.claims}
    assert papers >= {"calm", "mtp", "infini", "mamba", "mambabyte", "transformer"}
    assert {claim.scale for claim in SHIPPED.claims} == set(SCALES)
    with pytest.raises(ConfigError, match=r"claim 'calm-step': not known; did you mean 'calm-steps'\?"):
        SHIPPED.claim("calm-step")


@pytest.mark.parametrize("claim", SHIPPED.claims, ids=lambda claim: claim.id)
def test_shipped_claims_ask_for_what_there_is(claim):
    """Metrics, quantities, architectures, published sizes, keys of configs, and labels that a named suite has."""
    known = {suite: entries(load_suite(suite)) for suite in claim.suites}
    for reading in readings(claim.check):
        metric, cells = registry.metric(reading.metric), reading.cells
        assert reading.quantity in metric.quantities
        if cells.architecture is not None:
            architecture = registry.architecture(cells.architecture)
            config = {field.name for field in fields(architecture.config)}
            named = {key.split(".", 1)[1] for key in cells.config if key.startswith("model.")}
            assert named <= config
            assert reading.metric != "design_cost" or cells.size in architecture.published
        if cells.label is not None and known:
            labels = [e.label or e.architecture for own in known.values() for e in own]
            assert any(fnmatchcase(label, cells.label) for label in labels), cells.label
        for suite, own in known.items():
            assert reading.metric in load_suite(suite).metrics or len(known) > 1
            assert cells.architecture is None or cells.architecture in {entry.architecture for entry in own}
    if isinstance(claim.check, Slope) and claim.check.along.startswith("config.model."):
        assert claim.check.along.rsplit(".", 1)[1] in {
            field.name for field in fields(registry.architecture(claim.check.of.cells.architecture).config)
        }
    if not readings(claim.check):
        assert isinstance(claim.check, FigureCheck)


# Commands and report


def test_commands(tmp_path):
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["claims", *words])

    listed = json.loads(call("list", "--json").stdout)
    assert [entry["id"] for entry in listed] == [claim.id for claim in SHIPPED.claims]
    assert "calm-training-flops" in call("list").stdout
    file = RecordFile(tmp_path / "results" / "quick" / "20260101T000000Z-ab.jsonl")
    sizes = {128: 100.0, 512: 100.0, 2048: 100.0}
    file.append(costs("infini_attention", sizes, suite="quick"))
    text = file.path.read_text().replace('"flops"', '"state_bytes"')
    file.path.write_text(text)
    (one,) = json.loads(call("run", "infini-constant-state", "--json", "--results", str(tmp_path / "results")).stdout)
    assert (one["verdict"], len(one["evidence"])) == (SUPPORTED, 3)
    every = call("run", "--scale", "laptop", "--results", str(tmp_path / "results"))
    assert every.exit_code == 0
    assert f"1 {SUPPORTED}" in every.stdout and f"{len(SHIPPED.claims) - 1} {UNTESTABLE}" in every.stdout
    for words, message in (
        (("run", "nope", "--results", str(tmp_path)), "claim 'nope': not known"),
        (("run", "--scale", "huge", "--results", str(tmp_path / "results")), "--scale huge: not known"),
        (("run", "--results", str(tmp_path / "none")), "holds no results"),
    ):
        found = call(*words)
        assert isinstance(found.exception, ArchbenchError) and message in str(found.exception)


def test_the_report_holds_what_its_run_can_judge(tmp_path):
    file = RecordFile(tmp_path / "quick" / "20260101T000000Z-ab.jsonl")
    file.append(costs("a", {1: 1.0}, suite="quick"))
    assert claims_table(file.path, tmp_path / "quick" / "report") is None
    text = "".join(r.to_json() + "\n" for r in costs("infini_attention", {128: 9.0, 512: 9.0}, suite="quick"))
    file.path.write_text(text.replace('"flops"', '"state_bytes"'))
    table = claims_table(file.path, tmp_path / "quick" / "report")
    assert table is not None
    (line,) = table.lines
    assert (line[0].detail, line[1].text) == ("infini-constant-state", SUPPORTED)
    assert (line[2].more, line[2].href) == ("2 records, the first in line 1", "../20260101T000000Z-ab.jsonl")
    assert load_run(file.path).name == "quick"
