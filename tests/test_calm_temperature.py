"""CALM's temperature without probabilities, on laws whose answer is known."""

from __future__ import annotations

from math import comb

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.calm.temperature import batch, batch_weights, counts, exact, most_frequent, split_power
from archbench.errors import UnsupportedError

torch.set_num_threads(1)

LAW = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], dtype=torch.float64)
N_DRAWS = 4000


class Urn:
    """Chunks of two tokens with the law above, and how many were drawn."""

    def __init__(self, seed: int) -> None:
        self.generator = Generator().manual_seed(seed)

    def __call__(self, rows: Tensor, n: int) -> Tensor:
        picked = torch.multinomial(LAW, len(rows) * n, replacement=True, generator=self.generator)
        return torch.stack([picked, 7 - picked], dim=1).view(len(rows), n, 2)


def sharpened(temperature: float) -> Tensor:
    power = LAW ** (1 / temperature)
    return power / power.sum()


def distance(chunks: Tensor, law: Tensor) -> float:
    """Total variation between what was drawn and a law."""
    share = chunks[:, 0].bincount(minlength=len(law)).double() / len(chunks)
    return 0.5 * (share - law).abs().sum().item()


@pytest.mark.parametrize(
    ("temperature", "calls"), [(1 / 2, 7.69), (1 / 3, 35.6), (0.7, 6.66), (0.4, 17.1), (0.9, None), (1.0, 1.0)]
)
def test_i10_exact_law_and_number_of_calls(temperature: float, calls: float | None) -> None:
    urn = Urn(seed=1)
    found, drawn = exact(urn, N_DRAWS, temperature, 100_000, Generator().manual_seed(2), torch.device("cpu"))
    assert distance(found, sharpened(temperature)) < 0.03
    assert (found.sum(dim=1) == 7).all(), "whole chunks"
    n, rest = split_power(temperature)
    expected = (n + (rest > 0) * (LAW ** (1 / temperature - 1)).sum()) / (LAW ** (1 / temperature)).sum()
    assert drawn.double().mean().item() == pytest.approx(expected.item(), rel=0.05)
    if calls is not None:
        assert expected.item() == pytest.approx(calls, rel=0.005)


def test_i10_an_inverse_temperature_next_to_an_integer_is_that_integer() -> None:
    assert split_power(1 / 3) == (3, 0.0)
    assert split_power(0.1) == (10, 0.0)
    assert split_power(1.0) == (1, 0.0)
    assert split_power(0.7) == (1, pytest.approx(3 / 7))


def test_i10_a_budget_of_draws_ends_the_search() -> None:
    with pytest.raises(UnsupportedError, match=r"no chunk was accepted in 50 draws at temperature 0\.1"):
        exact(Urn(seed=1), 4, 0.1, 50, Generator().manual_seed(0), torch.device("cpu"))


def test_i11_the_worked_example() -> None:
    letters = torch.tensor([[[ord(letter)] for letter in "ACADBEAFBG"]])
    weights = batch_weights(counts(letters), 2)[0]
    total = {letter: weights[[i for i, other in enumerate("ACADBEAFBG") if other == letter]].sum() for letter in "ABC"}
    assert total["A"] / total["B"] == pytest.approx(3)
    assert total["C"] == 0
    picks = torch.cat([batch(lambda: letters, 0.5, Generator().manual_seed(seed)) for seed in range(400)])
    assert set(picks.flatten().tolist()) == {ord("A"), ord("B")}
    assert (picks == ord("A")).float().mean().item() == pytest.approx(0.75, abs=0.07)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_i11_weights_are_binomials(n: int) -> None:
    count = torch.tensor([5, 5, 5, 5, 5, 3, 3, 3, 1])
    weights = batch_weights(count[None], n)[0]
    chosen = min(n, 5)
    expected = torch.tensor([comb(int(c), chosen) / int(c) for c in count], dtype=torch.float64)
    torch.testing.assert_close(weights / weights.sum(), expected / expected.sum())


def test_i11_all_distinct_draws_are_picked_uniformly() -> None:
    distinct = torch.arange(8).view(1, 8, 1).repeat(8000, 1, 1)
    picks = batch(lambda: distinct, 1 / 3, Generator().manual_seed(0))
    share = picks[:, 0].bincount(minlength=8) / 8000
    assert (share - 1 / 8).abs().max() < 0.02


@pytest.mark.parametrize(("n_candidates", "expected"), [(2, 0.22), (4, 0.11), (8, 0.05), (20, 0.03), (100, 0.005)])
def test_i11_the_bias_shrinks_with_the_batch(n_candidates: int, expected: float) -> None:
    urn, rows = Urn(seed=3), torch.arange(N_DRAWS)
    found = batch(lambda: urn(rows, n_candidates), 0.5, Generator().manual_seed(4))
    assert distance(found, sharpened(0.5)) == pytest.approx(expected, abs=0.018)


@pytest.mark.parametrize("temperature", [0.7, 0.4, 0.9])
def test_i11_other_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(UnsupportedError, match="is not 1/n, which temperature_method batch needs"):
        batch(lambda: pytest.fail("nothing is drawn"), temperature, Generator().manual_seed(0))


def test_i11_very_low_temperatures_take_the_most_frequent() -> None:
    chunks = Urn(seed=5)(torch.arange(50), 200)
    cold = batch(lambda: chunks, 1 / 150, Generator().manual_seed(0))
    assert torch.equal(cold, most_frequent(chunks))


def test_the_most_frequent_of_equals_is_the_one_drawn_first() -> None:
    chunks = torch.tensor([[[3, 1], [2, 2], [5, 5], [2, 2], [3, 1]]])
    assert most_frequent(chunks).tolist() == [[3, 1]]
    assert counts(chunks).tolist() == [[2, 2, 1, 2, 2]]
