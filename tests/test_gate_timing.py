"""Tier 2: what lock-step pairs show, on made-up machines and once on a real one."""

import itertools
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import archbench
from archbench.errors import GateError
from archbench.gate import timing
from archbench.gate.lockstep import Item, Ratios, Side, Took, start
from archbench.gate.ratios import speed
from archbench.gate.timing import Policy, Timings

ITEM = Item(name="mine/nano decode", architecture="mine", config={}, work="decode", context=8, batch=1)
OTHER = Item(name="other/nano decode", architecture="other", config={}, work="decode", context=8, batch=1)


class Machine:
    """Two sides on one machine whose speed drifts. `slower` is what a step of the current version takes more of."""

    def __init__(self, slower=0.0, seed=0, drift=0.05, noise=0.05, layout=0.02):
        self.slower, self.draw = dict.fromkeys((ITEM.name, OTHER.name), slower), random.Random(seed)
        self.drift, self.noise, self.layout = drift, noise, layout
        self.weather, self.starts = 0.0, 0

    def start(self):
        self.starts += 1
        return [MadeUp(self, False), MadeUp(self, True)]

    def seconds(self, item, current, luck):
        self.weather += self.draw.gauss(0, self.drift)
        slower = math.log1p(self.slower[item.name]) if current else 0.0
        return 0.02 * math.exp(self.weather + slower + luck + self.draw.gauss(0, self.noise))


class MadeUp(Side):
    def __init__(self, machine, current):
        self.machine, self.current = machine, current
        self.luck = machine.draw.gauss(0, machine.layout)
        self.closed = False

    def prepare(self, item):
        return []

    def step(self, item, repeat):
        seconds = self.machine.seconds(item, self.current, self.luck)
        return Took(seconds, 3 * seconds)

    def forget(self, item):
        pass

    def close(self):
        self.closed = True


def verdicts(machine, items=(ITEM,), **options):
    found = timing.hold(items, machine.start, Policy(**{"budget_s": 0} | options))
    return {finding.cell: finding for finding in found}


def test_a_version_is_as_fast_as_itself():
    found = [verdicts(Machine(seed=seed))[ITEM.name].verdict for seed in range(40)]
    assert "regressed" not in found
    assert found.count("fine") >= 36


def test_a_slowdown_of_30_percent_is_found_and_confirmed():
    for seed in range(20):
        machine = Machine(slower=0.3, seed=seed)
        finding = verdicts(machine)[ITEM.name]
        assert finding.verdict == "regressed"
        assert machine.starts == 6  # three, and three to confirm
        assert "confirmed on fresh processes" in finding.note
        assert finding.low <= 0.3 * 1.2
        assert finding.high >= 0.3 * 0.8


def test_a_slowdown_within_the_margin_is_fine():
    assert verdicts(Machine(slower=0.03, noise=0.02, layout=0.005))[ITEM.name].verdict == "fine"
    assert verdicts(Machine(slower=-0.4))[ITEM.name].verdict == "fine"


def test_only_the_slow_cell_is_flagged():
    machine = Machine(seed=3)
    machine.slower[OTHER.name] = 0.4
    found = verdicts(machine, (ITEM, OTHER))
    assert {name: finding.verdict for name, finding in found.items()} == {ITEM.name: "fine", OTHER.name: "regressed"}


def test_false_alarms_are_rare_when_restarts_differ_much():
    """Layout of 8 % from start to start, a margin of 5 %: the hard case of a noisy machine."""
    policy = Policy(margin=0.05)
    rng = np.random.default_rng(0)
    flagged = confirmed = 0
    for _ in range(100):
        both = []
        for _ in range(2):
            timings = Timings()
            timings.ratios[ITEM.name] = [_ratios(rng.normal(rng.normal(0, 0.08), 0.05, 15)) for _ in range(3)]
            both.append(timing.judge(timings, policy)[0].verdict == "regressed")
        flagged += both[0]
        confirmed += all(both)
    assert flagged <= 15
    assert confirmed <= 3


def _ratios(values):
    return Ratios(list(values), list(values))


def test_pairs_of_one_restart_are_no_independent_samples():
    """Three restarts that agree within themselves and not with each other leave a wide interval."""
    apart = speed([[level] * 50 for level in (0.0, 0.1, 0.2)])
    assert apart.value == pytest.approx(0.1)
    low, high = apart.interval
    assert low < 0.02
    assert high > 0.18
    together = speed([[0.1] * 50] * 3)
    assert together.interval == pytest.approx((0.1, 0.1))


def test_undecided_cells_are_sampled_until_the_time_is_spent():
    ticks = itertools.count()
    machine = Machine(slower=0.1, seed=1)
    policy = Policy(budget_s=12)
    (finding,) = timing.hold([ITEM], machine.start, policy, clock=lambda: float(next(ticks)))
    assert machine.starts > 3
    assert finding.verdict == "undecided"
    assert "12" not in finding.note  # of restarts; the clock above moves once a look
    assert finding.detectable > policy.margin


def test_an_alarm_that_fresh_processes_do_not_repeat_is_none():
    machine = Machine()
    calm = machine.start

    def start():
        machine.slower[ITEM.name] = 0.5 if machine.starts < 3 else 0.0
        return calm()

    (finding,) = timing.hold([ITEM], start, Policy(budget_s=0))
    assert finding.verdict == "fine"
    assert "not confirmed" in finding.note


def test_demoted_cells_are_watched():
    found = timing.hold([ITEM], Machine(slower=0.5).start, Policy(budget_s=0), demoted=[ITEM.name])
    assert [finding.verdict for finding in found] == ["watched"]
    assert not found[0].blocks("change")


class Refuses(MadeUp):
    def prepare(self, item):
        if item is OTHER:
            raise GateError("base: ConfigError: there is no architecture 'other'")
        return []


@pytest.mark.parametrize(("side", "verdict"), [(0, "new"), (1, "incomparable")])
def test_a_side_that_cannot_do_it_leaves_the_others_alone(side, verdict):
    machine = Machine()

    def start():
        sides = machine.start()
        sides[side] = Refuses(machine, bool(side))
        return sides

    found = {f.cell: f for f in timing.hold([OTHER, ITEM], start, Policy(budget_s=0))}
    assert found[ITEM.name].verdict == "fine"
    assert found[OTHER.name].verdict == verdict
    assert "no architecture 'other'" in found[OTHER.name].note


def test_noise_is_what_one_gate_would_see():
    timings = Timings(ratios={ITEM.name: [_ratios([level] * 5) for level in (-0.03, 0.0, 0.03)]})
    assert timing.errors(timings, restarts=3)[ITEM.name] == pytest.approx(0.03 / math.sqrt(3))


SLOW = """

_decode_step = Transformer.decode_step


def _slow(self, *given):
    for _ in range(100_000):
        pass
    return _decode_step(self, *given)


Transformer.decode_step = _slow
"""


def test_a_slower_op_of_another_checkout_is_seen_on_this_machine(tmp_path):
    """Two real versions in lock-step: this one, and a copy with a busy loop in its decode step."""
    package = Path(archbench.__file__).parent
    copy = tmp_path / "archbench"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "architectures" / "transformer.py").open("a") as file:
        file.write(SLOW)
    item = Item(
        name="decode",
        architecture="transformer",
        config={"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 1, "gone": 1},
        work="decode",
        context=16,
        batch=1,
        new_tokens=4,
    )
    timings, policy = Timings(), Policy(pairs=9)
    sides = start((package.parent, tmp_path), ("base", "current"))
    begin = time.perf_counter()
    try:
        assert timing._time(item, sides, policy, timings)
    finally:
        for side in sides:
            side.close()
    assert all(side.process.returncode is not None for side in sides)
    (finding,) = timing.judge(timings, policy)
    assert finding.verdict == "regressed"
    assert finding.low > 0.3
    assert "does not know gone" in finding.note
    assert time.perf_counter() - begin < 60


def test_a_version_from_elsewhere_is_refused(tmp_path):
    """The folder holds an archbench, and another one is imported: nothing would be compared."""
    (tmp_path / "archbench").mkdir()
    (tmp_path / "archbench" / "__init__.py").write_text("raise ImportError('broken')\n")
    with pytest.raises(GateError, match="base: its process ended; does `import archbench` work in"):
        start((tmp_path,), ("base",))
