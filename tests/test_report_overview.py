"""The overview of several sizes: who is best in each column, and who cannot be told from it."""

from archbench.record import Record
from archbench.report.evidence import Evidence
from archbench.report.overview import overview_table

SIZES = {"nano": 100_000, "micro": 400_000}
BITS = {  # by size, of seeds 0, 1, 2: b is 0.2 below a at nano; at micro their differences point both ways
    ("a", "nano"): (2.6, 2.7, 2.8),
    ("b", "nano"): (2.4, 2.51, 2.6),
    ("c", "nano"): (3.0, 3.1, 3.2),
    ("a", "micro"): (2.2, 2.3, 2.1),
    ("b", "micro"): (2.1, 2.35, 2.2),
}


def record(label: str, size: str, seed: int, metric: str, quantity: str, value: float, **at: object) -> Record:
    return Record(
        suite="laptop", run="r", job="j", cell=f"{label}-{size}-{seed}", checkpoint="c", label=label,
        architecture=label, size=size, codec="bytes", corpus="stdlib", seed=seed, metric=metric, metric_version=1,
        quantity=quantity, unit="", better="lower", status="ok", value=value, at=at,
    )  # fmt: skip


def table():
    records = []
    for (label, size), values in BITS.items():
        for seed, value in enumerate(values):
            records.append(record(label, size, seed, "likelihood", "bits_per_byte", value, state="reset", context=256))
            records.append(record(label, size, seed, "cost", "parameters", SIZES[size], kind="total"))
    return overview_table(Evidence(records))


def test_columns_go_from_small_to_large_and_lines_by_place_at_the_largest():
    found = table()
    assert [column.name for column in found.columns[:3]] == ["architecture", "nano", "micro"]
    assert [line[0].text for line in found.lines] == ["a", "b", "c"]


def test_the_best_of_a_column_is_named_and_what_cannot_be_told_from_it():
    places = {line[0].text: [cell.more for cell in line[1:3]] for line in table().lines}
    assert places["b"][0] == "best" and places["a"][0] == "" and places["c"][0] == ""
    assert (places["a"][1], places["b"][1]) == ("best", "≈ best")


def test_what_was_not_run_says_so():
    lines = {line[0].text: line for line in table().lines}
    assert lines["c"][2].reason == "not run at this size"
    assert lines["a"][4].reason  # no state was measured
