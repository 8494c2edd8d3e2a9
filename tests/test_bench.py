"""The bench: ratios of sides whose costs are known, records, the table, and going on after a stop."""

import time

import pytest
from typer.testing import CliRunner

from archbench.bench import alone, bench, records
from archbench.bench.table import markdown, rows, verdict
from archbench.bench.target import Target, chosen, targets
from archbench.bench.trial import Race, Reading, Side
from archbench.cli import app
from archbench.errors import ConfigError, MissingExtra
from archbench.record import read


def burn(seconds):
    """Uses the processor for that long."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def target(**changes):
    settings = {
        "id": "family/what",
        "level": "lean",
        "question": "How fast?",
        "ours": "ours",
        "peer": "theirs",
        "must": 2.0,
        "stretch": 4.0,
        "turns": 7,
        "prepare": lambda: Race(ours=Side(call=lambda: burn(0.002)), peer=Side(call=lambda: burn(0.006))),
    }
    return Target(**{**settings, **changes})


def measured(found):
    return bench.measure(found, "run", "source", "command")


def figure(found):
    return next(record for record in found if record.quantity == "figure" and record.at["clock"] != "wall")


def test_a_race_gives_the_ratio_of_its_sides():
    found = measured(target())
    cpu = figure(found)
    assert 2.0 < cpu.value < 4.0 and cpu.low <= cpu.value <= cpu.high and len(cpu.samples) == 7
    sides = {(record.quantity, record.at["clock"]) for record in found}
    assert sides == {(quantity, clock) for quantity in ("figure", "ours", "peer") for clock in ("cpu", "wall")}


def test_a_ratio_is_per_unit_of_work():
    race = Race(ours=Side(call=lambda: burn(0.004), work=4), peer=Side(call=lambda: (burn(0.004), 1)[1]))
    for _ in range(3):
        race.turn()
    assert race.samples["cpu"] == pytest.approx([4.0] * 3, rel=0.3)


def test_sides_take_turns_after_warming_up():
    order = []

    def side(name, seconds):
        return Side(call=lambda: (order.append(name), burn(seconds))[1])

    race = Race(ours=side("ours", 0.01), peer=side("peer", 0.01))
    for _ in range(3):
        race.turn()
    warming = ["ours", "peer", "ours", "peer"]
    assert order == [*warming, "ours", "peer", "peer", "ours", "ours", "peer"]
    assert len(race.samples["cpu"]) == 3


def test_the_quicker_side_has_as_much_time_as_the_slower_one():
    calls = []
    quick = Side(call=lambda: (calls.append(1), burn(0.002))[1], prepare=lambda: calls.append(0))
    race = Race(ours=quick, peer=Side(call=lambda: burn(0.04)))
    for _ in range(2):
        race.turn()
    assert 2 + 2 * 10 <= sum(calls) <= 2 + 2 * 30 and sum(calls) == calls.count(0)  # 20 calls a turn, each prepared
    assert race.samples["cpu"] == pytest.approx([20.0] * 2, rel=0.5)


@pytest.mark.parametrize(
    ("value", "better", "expected"),
    [(1.9, "higher", "not met"), (2.0, "higher", "met"), (4.0, "higher", "met (stretch)"), (2.1, "lower", "not met")],
)
def test_verdicts(value, better, expected):
    found = measured(target(better=better, unit="B", turns=1, prepare=lambda: Reading(take=lambda: value)))
    assert verdict(figure(found)) == expected


def test_a_missing_peer_is_a_reason_and_a_crash_a_failure():
    def absent():
        raise MissingExtra("peer is not installed; pip install peer")

    (found,) = measured(target(prepare=absent))
    assert found.status == "unsupported" and "pip install peer" in verdict(found)
    (found,) = measured(target(prepare=lambda: 1 // 0))
    assert found.status == "failed" and "ZeroDivisionError" in found.reason


def test_an_interrupted_bench_goes_on_with_what_is_left(tmp_path):
    calls = []

    def counted(name, stop=False):
        def prepare():
            calls.append(name)
            if stop and calls.count(name) == 1:
                raise KeyboardInterrupt
            return Reading(take=lambda: 3.0)

        return target(id=f"family/{name}", unit="B", prepare=prepare)

    both = [counted("first"), counted("second", stop=True)]
    with pytest.raises(KeyboardInterrupt):
        bench.run(both, tmp_path, "command", lambda *_: None)
    path = bench.run(both, tmp_path, "command", lambda *_: None)
    assert calls == ["first", "second", "second"]
    assert [row.target for row in rows(read(path))] == ["family/first", "family/second"]
    bench.run(both, tmp_path, "command", lambda *_: None, again=True)
    assert calls[3:] == ["first", "second"]


def test_the_table_says_what_is_met():
    slow = target(id="b/slow", must=50.0, stretch=None, why_missed="it is slow")
    found = [*measured(target(id="a/fast", why_missed="never seen")), *measured(slow)]
    text = markdown(found)
    assert text.startswith("1 of 2 targets met.")
    assert "| a/fast | lean | ours: " in text and "≥ 50" in text and "not met" in text
    assert "it is slow" in text and "never seen" not in text


def test_all_targets_are_sound():
    for found in targets().values():
        assert found.stretch is None or found.met(found.stretch), f"{found.id}: the stretch is behind the must"
        assert "?" in found.question and found.turns > 0 and found.seconds > 0, found.id


def test_targets_are_chosen_by_family_or_id():
    assert {found.id.partition("/")[0] for found in chosen(["overheads"])} == {"overheads"}
    assert [found.id for found in chosen(["overheads/help"])] == ["overheads/help"]
    with pytest.raises(ConfigError, match="overheds: no such target or family; did you mean 'overheads'"):
        chosen(["overheds"])


def test_the_command_measures_and_shows(tmp_path):
    ran = CliRunner().invoke(app, ["bench", "overheads/help", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    shown = CliRunner().invoke(app, ["bench", "--show", str(tmp_path)])
    assert shown.exit_code == 0 and "overheads/help" in shown.output
    listed = CliRunner().invoke(app, ["bench", "--list"])
    assert listed.exit_code == 0 and "overheads/report" in listed.output
    assert records.METRIC in {record.metric for record in read(tmp_path)}


def test_a_target_whose_process_dies_is_a_failure():
    (found,) = alone.measure(target(id="no/such"), "run", "source", "command")
    assert found.status == "failed" and "code 1" in found.reason
