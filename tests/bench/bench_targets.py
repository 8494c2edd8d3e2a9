"""Every target under pytest-benchmark: `make bench`.

What pytest-benchmark times is a target as a whole, in a process of its own; what counts is in `extra_info` and in the
records, which are those that `archbench bench` writes.
"""

import os
from pathlib import Path

import pytest

from archbench.bench import alone, bench, records
from archbench.bench.table import verdict
from archbench.bench.target import targets
from archbench.record import RecordFile

OUT = Path(os.environ.get("ARCHBENCH_BENCH_OUT", "results/bench"))


@pytest.fixture(scope="session")
def store():
    source = records.source()
    path = bench.results_file(OUT, source)
    return source, path.stem, RecordFile(path)


@pytest.mark.parametrize("name", targets())
def test_target(name, benchmark, store):
    source, run, file = store

    target = targets()[name]
    found = benchmark.pedantic(alone.measure, args=(target, run, source, "make bench"), rounds=1, iterations=1)
    file.append(found)
    figure = next(record for record in found if record.quantity == "figure" and record.at.get("clock") != "wall")
    if figure.status == "unsupported":
        pytest.skip(figure.reason)
    assert figure.status == "ok", figure.reason
    benchmark.extra_info.update(
        figure=figure.value, low=figure.low, high=figure.high, must=target.must, verdict=verdict(figure)
    )
