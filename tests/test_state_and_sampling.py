"""States as plain data, and drawing tokens from logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor

from archbench.contract.drawing import chi_square_p
from archbench.errors import ConfigError
from archbench.sampling import GREEDY, PLAIN, Sampling, draw, probabilities
from archbench.state import copy_state, map_state, select_rows, state_bytes, tensors, tile_state

torch.set_num_threads(1)


class Layer(NamedTuple):
    keys: Tensor
    length: int
    spare: Tensor | None


def nested() -> Any:
    rows = torch.arange(6.0).view(3, 2)
    return {"layers": (Layer(rows, 2, None), Layer(rows + 10, 2, rows + 20)), "pending": [torch.arange(3)]}


def test_mapping_keeps_the_nesting_and_everything_but_tensors() -> None:
    mapped = map_state(lambda tensor: tensor + 1, nested())
    assert isinstance(mapped["layers"][0], Layer)
    assert mapped["layers"][0].length == 2
    assert mapped["layers"][0].spare is None
    assert [tensor.flatten()[0].item() for tensor in tensors(mapped)] == [1, 11, 21, 1]


def test_unknown_leaves_are_refused() -> None:
    with pytest.raises(TypeError, match="found str"):
        map_state(torch.clone, {"a": "text"})


def test_copies_share_no_memory() -> None:
    original = nested()
    for branch in (copy_state(original), tile_state(original, 1), select_rows(original, torch.arange(3))):
        for tensor in tensors(branch):
            tensor.fill_(-1)
    assert all((tensor >= 0).all() for tensor in tensors(original))


def test_tiling_repeats_rows_in_place() -> None:
    tiled = tile_state(nested(), 2)
    assert tiled["pending"][0].tolist() == [0, 0, 1, 1, 2, 2]
    assert tiled["layers"][0].keys[:, 0].tolist() == [0, 0, 2, 2, 4, 4]


def test_selecting_takes_rows_in_the_order_given() -> None:
    chosen = select_rows(nested(), torch.tensor([2, 0, 2]))
    assert chosen["pending"][0].tolist() == [2, 0, 2]
    assert chosen["layers"][1].keys[:, 1].tolist() == [15, 11, 15]


def test_bytes_count_each_storage_once_and_all_of_it() -> None:
    store = torch.zeros(100)
    assert state_bytes({"view": store[:10]}) == 400
    assert state_bytes([store[:10], store[50:]]) == 400
    assert state_bytes((store, torch.zeros(3, dtype=torch.int64), 7, None)) == 424
    assert state_bytes((torch.zeros(0), torch.zeros(2, 0))) == 0


LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (PLAIN, [0.1, 0.4, 0.2, 0.3]),
        (GREEDY, [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_k=99), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.3), [0, 1, 0, 0]),
        (Sampling(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_k=3, top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=0.5, top_p=0.8), [0, 16 / 25, 0, 9 / 25]),
    ],
    ids=str,
)
def test_probabilities_by_hand(sampling: Sampling, expected: list[float]) -> None:
    torch.testing.assert_close(probabilities(LOGITS, sampling), torch.tensor([expected], dtype=torch.float32))


def test_ties_go_to_the_lowest_id() -> None:
    even = torch.zeros(1, 5)
    assert draw(even, GREEDY, None).tolist() == [0]
    assert draw(torch.tensor([[1.0, 3.0, 3.0]]), GREEDY, None).tolist() == [1]
    assert probabilities(even, Sampling(top_k=2))[0].tolist() == [0.5, 0.5, 0, 0, 0]
    assert probabilities(even, GREEDY)[0].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "sampling", [PLAIN, Sampling(temperature=2.0), Sampling(top_k=3), Sampling(top_p=0.8)], ids=str
)
def test_draws_have_the_stated_distribution(sampling: Sampling) -> None:
    logits = torch.randn(1, 12, generator=Generator().manual_seed(1))
    drawn = draw(logits.expand(20_000, 12), sampling, Generator().manual_seed(2))
    expected = probabilities(logits, sampling)[0]
    assert not (expected == 0)[drawn].any()
    assert chi_square_p(drawn.bincount(minlength=12), expected) > 1e-4


def test_a_row_depends_on_its_own_logits_and_number_alone() -> None:
    logits = torch.randn(4, 12, generator=Generator().manual_seed(1))
    other = logits.clone()
    other[1:] = -other[1:]
    for seed in range(20):
        drawn, again = (draw(rows, PLAIN, Generator().manual_seed(seed)) for rows in (logits, other))
        assert drawn[0] == again[0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(5000, 5)
    assert set(draw(logits, PLAIN, Generator().manual_seed(0)).tolist()) == {1, 3}


def test_equal_generators_draw_equal_tokens_and_no_global_state_is_used() -> None:
    logits = torch.randn(64, 12, generator=Generator().manual_seed(1))
    before = torch.get_rng_state()
    drawn = [draw(logits, PLAIN, Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_logits_are_drawn_from_in_full_precision() -> None:
    probs = probabilities(torch.zeros(1, 7, dtype=torch.bfloat16), PLAIN)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, torch.full((1, 7), 1 / 7))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"sampling\.{field}: "):
        Sampling(**settings)


def test_chi_square_by_hand() -> None:
    """Counts 60 and 40 against a fair coin: statistic 4, one degree of freedom, p = 0.0455."""
    assert chi_square_p(torch.tensor([60, 40]), torch.tensor([0.5, 0.5])) == pytest.approx(0.0455, abs=1e-4)
    assert chi_square_p(torch.tensor([50, 50]), torch.tensor([0.5, 0.5])) == pytest.approx(1.0)


def test_chi_square_joins_rare_cells() -> None:
    """Cells expected once each are one cell of ten: 50 and 40 and 10 fit perfectly however the ten are spread."""
    counts = torch.tensor([50, 40, 10] + [0] * 9)
    assert chi_square_p(counts, torch.tensor([0.5, 0.4] + [0.01] * 10)) == pytest.approx(1.0)


def test_chi_square_allows_nothing_impossible() -> None:
    assert chi_square_p(torch.tensor([100, 0]), torch.tensor([1.0, 0.0])) == 1.0
    assert chi_square_p(torch.tensor([100, 1]), torch.tensor([1.0, 0.0])) == 0.0


def test_states_on_the_meta_device_count_every_tensor():
    """No storage has an address there, and yet each counts once."""
    whole = torch.zeros(4, 8, device="meta")
    assert state_bytes((whole, torch.zeros(2, 8, device="meta"))) == 4 * (32 + 16)
    assert state_bytes((whole[:1], whole[1:])) == 4 * 32
