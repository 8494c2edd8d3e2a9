"""Every target under pytest-benchmark: `make bench`.

What pytest-benchmark times is one turn, both sides; what counts is in `extra_info` and in the records, which are those
that `archbench bench` writes.
"""

import os
from pathlib import Path

import pytest
import torch

from archbench.bench import records
from archbench.bench.table import verdict
from archbench.bench.target import targets
from archbench.errors import ArchbenchError
from archbench.ops import backends
from archbench.record import RecordFile

OUT = Path(os.environ.get("ARCHBENCH_BENCH_OUT", "results/bench"))


@pytest.fixture(scope="session")
def store():
    from archbench.bench.bench import results_file

    source = records.source()
    path = results_file(OUT, source)
    return source, path.stem, RecordFile(path)


@pytest.mark.parametrize("name", targets())
def test_target(name, benchmark, store):
    source, run, file = store
    target = targets()[name]
    torch.set_num_threads(1)
    backends.forget()
    try:
        trial = target.prepare()
    except ArchbenchError as error:
        file.append([records.missing(target, run, source, "make bench", str(error))])
        pytest.skip(str(error))
    benchmark.pedantic(trial.turn, rounds=target.turns, iterations=1)
    found = records.outcome(target, trial, run, source, "make bench")
    file.append(found)
    figure = next(record for record in found if record.quantity == "figure")
    benchmark.extra_info.update(
        figure=figure.value, low=figure.low, high=figure.high, must=target.must, verdict=verdict(figure)
    )
