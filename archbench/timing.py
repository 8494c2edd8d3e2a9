"""Interleaved timing: the probes of all subjects at one place of the grid take turns, so that they share the weather.

Round r visits the subjects in order, round r + 1 in reverse. A subject's samples are then neighbours in time of every
other subject's, and sample r of one forms a pair with sample r of another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from archbench.metric import Measurement, Probe, Sample, Subject, TimedMetric
from archbench.ops import backends
from archbench.stats import CONFIDENCE, median_interval

Outcome = list[Measurement] | Exception


def interleave(
    metric: TimedMetric,
    subjects: Mapping[str, Subject],
    settings: Any,
    notify: Callable[[float], None] = lambda _done: None,
) -> dict[str, Outcome]:
    """Measures all subjects, keyed as given; the value of a quantity is the median of its samples.

    A subject whose probe raises gets that exception as its outcome, and the others go on.
    """
    outcomes: dict[str, Outcome] = {}
    places: dict[str, list[tuple[str, Probe]]] = {}
    for key, subject in subjects.items():
        found: list[Measurement] = []
        try:
            for probe in metric.probes(subject, settings):
                if isinstance(probe, Measurement):
                    found.append(probe)
                else:
                    place = json.dumps(dict(probe.at), sort_keys=True)
                    places.setdefault(place, []).append((key, probe))
            outcomes[key] = found
        except Exception as error:
            outcomes[key] = error
    for number, probes in enumerate(places.values()):
        for key, outcome in _at_one_place(probes, settings.repeats, outcomes).items():
            outcomes[key] = outcome
        notify((number + 1) / len(places))
    return outcomes


def _at_one_place(probes: list[tuple[str, Probe]], repeats: int, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """The outcomes of the probes' subjects with this place added."""
    taken: dict[str, list[list[Sample]]] = {key: [] for key, _ in probes}
    levels: dict[str, dict[str, str]] = {}
    broken: dict[str, Exception] = {
        key: outcome for key, _ in probes if isinstance(outcome := outcomes[key], Exception)
    }
    for turn in range(repeats + 1):
        for key, probe in probes if turn % 2 else reversed(probes):
            if key in broken:
                continue
            backends.forget()
            try:
                samples = list(probe.sample())
            except Exception as error:
                broken[key] = error
                continue
            levels[key] = backends.in_use()
            if turn:  # turn 0 warms up
                taken[key].append(samples)
    results: dict[str, Outcome] = {}
    for key, probe in probes:
        before = outcomes[key]
        if key in broken or isinstance(before, Exception):
            results[key] = broken[key]
        else:
            results[key] = [*before, *_medians(probe, taken[key], levels[key])]
    return results


def _medians(probe: Probe, taken: list[list[Sample]], levels: Mapping[str, str]) -> list[Measurement]:
    series: dict[str, tuple[Sample, list[float]]] = {}
    for samples in taken:
        for sample in samples:
            name = json.dumps([sample.quantity, dict(sample.at)], sort_keys=True)
            series.setdefault(name, (sample, []))[1].append(sample.value)
    measurements = []
    for first, values in series.values():
        interval = median_interval(values)
        measurements.append(
            Measurement(
                quantity=first.quantity,
                value=float(np.median(values)),
                samples=values,
                low=interval.low if interval else None,
                high=interval.high if interval else None,
                confidence=CONFIDENCE if interval else None,
                at={**probe.at, **first.at},
                protocol=probe.protocol,
                backend=levels,
            )
        )
    return measurements
