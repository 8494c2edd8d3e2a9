"""Seeds and power: against a simulation, and known values."""

import math

import numpy as np
import pytest
from scipy import stats
from test_report import Model
from test_report import record as record_of
from typer.testing import CliRunner

from archbench.cli import app
from archbench.errors import ConfigError, RecordError
from archbench.record import RecordFile
from archbench.seeds import needed, pooled, resolvable, spreads


def test_the_resolvable_difference_is_found_with_the_promised_power():
    rng = np.random.default_rng(0)
    for n in (3, 5, 20):
        shift = resolvable(1.0, n)
        p = stats.ttest_1samp(rng.normal(shift, 1.0, (20_000, n)), 0.0, axis=1).pvalue
        assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.01), n


def test_seeds_needed_grow_with_the_square_of_the_spread():
    assert resolvable(1.0, 1) == math.inf
    assert needed(0.01, 0.5) == 2
    large = needed(1.0, 0.2)
    assert 197 <= large <= 200 and needed(0.5, 0.1) == large  # 196.2 by normal quantiles
    assert needed(1.0, 0.01) is None


def bits(label: str, seed: int, value: float):
    model = Model(label, bits=value, first=0, slope=0, state=0, growth=0)
    return record_of(model, "likelihood", "bits_per_byte", value, seed=seed, at={"state": "reset"})


def test_differences_are_paired_by_seed():
    luck = {0: 0.3, 1: -0.1, 2: 0.05}
    records = [bits(label, seed, level + luck[seed]) for label, level in (("a", 2.0), ("b", 2.2)) for seed in luck]
    (spread,) = spreads(records)
    assert spread.sd == pytest.approx(0.0, abs=1e-12) and spread.n == 3
    shifted = [*records[:3], *(bits("b", seed, 2.2 + luck[seed] + 0.01 * seed) for seed in luck)]
    assert spreads(shifted)[0].sd == pytest.approx(0.01) and pooled(spreads(shifted)) == pytest.approx(0.01)


def test_one_seed_says_nothing_about_luck():
    with pytest.raises(RecordError, match=r"no two labels have likelihood\.bits_per_byte on two common seeds"):
        spreads([bits("a", 0, 2.0), bits("b", 0, 2.1)])


def test_plan_power_says_how_many_seeds(tmp_path, monkeypatch):
    suite = tmp_path / "tiny.yaml"
    suite.write_text("{size: nano, training: {budget: {bytes: 10}}, cells: [{architecture: local}]}")
    noise = tmp_path / "noise.jsonl"
    rng = np.random.default_rng(1)
    RecordFile(noise).append(bits(label, seed, 2 + rng.normal(0, 0.02)) for label in "ab" for seed in range(3))
    told = CliRunner().invoke(app, ["plan", str(suite), "--power", "0.05", "--noise", str(noise)])
    assert told.exit_code == 0 and "seeds needed" in told.output, told.output
    given = CliRunner().invoke(app, ["plan", str(suite), "--power", "0.05", "--sd", "0.02"])
    assert given.exit_code == 0 and f" {needed(0.02, 0.05)} " in given.output
    monkeypatch.chdir(tmp_path)
    lost = CliRunner().invoke(app, ["plan", str(suite), "--power", "0.05"])
    assert isinstance(lost.exception, ConfigError) and "give --noise RUN" in str(lost.exception)
