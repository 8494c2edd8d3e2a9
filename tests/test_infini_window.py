"""Training windows of Infini-attention: the shortcut in the last layer, and blocks that stand many times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.infini_attention import Infini, InfiniConfig
from archbench.model import Batch

torch.set_num_threads(1)

SEGMENT = 16


def model(**changes: Any) -> Infini:
    config = InfiniConfig(
        **{"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "segment": SEGMENT, **changes}
    )
    built = Infini(config, Generator().manual_seed(0)).double()
    with torch.no_grad():  # gates of different weight, as training makes them
        for i, layer in enumerate(built.layers()):
            layer.gate.copy_(torch.linspace(-2, 2, len(layer.gate)) + i)
    return built


def text(n: int, rows: int = 3) -> Tensor:
    return torch.randint(1, 64, (rows, n), generator=Generator().manual_seed(1))


def repeats(n: int, rows: int = 3) -> Tensor:
    """Blocks of different counts, other ones in every row."""
    counts = torch.rand(rows, n // SEGMENT, generator=Generator().manual_seed(2)) * 1000 + 1
    return counts.repeat_interleave(SEGMENT, dim=1).double()


SHAPES: list[dict[str, Any]] = [
    {}, {"n_layers": 1}, {"n_layers": 3}, {"n_kv_heads": 1}, {"rotary": False}, {"frontend_conv": 4},
    {"first_segment": "bypass"},
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("repeated", [False, True], ids=["plain", "repeated"])
@pytest.mark.parametrize("n", [1, 5, SEGMENT])
def test_I20_the_shortcut_in_the_last_layer_equals_the_full_computation(  # noqa: N802
    shape: dict[str, Any], repeated: bool, n: int
) -> None:
    """One more position than a segment has makes the model take the long way."""
    learner, tokens = model(**shape), text(4 * SEGMENT)
    told = repeats(4 * SEGMENT) if repeated else None
    short, full = learner.window_hidden(tokens, n, told), learner.window_hidden(tokens, SEGMENT + 1, told)
    assert short.shape[1] == n
    assert (short - full[:, -n:]).abs().max() < 1e-12
    if not repeated:
        streamed, _ = learner.hidden(tokens, learner.initial_layers(len(tokens)))
        assert (short - streamed[:, -n:]).abs().max() < 1e-12


@pytest.mark.parametrize("repeated", [False, True], ids=["plain", "repeated"])
def test_I20_gradients_of_the_shortcut_are_those_of_the_full_computation(repeated: bool) -> None:  # noqa: N802
    tokens = text(4 * SEGMENT)
    told = repeats(4 * SEGMENT) if repeated else None
    gradients = []
    for n in (3, SEGMENT + 1):
        learner = model()
        learner.window_hidden(tokens, n, told)[:, -3:].square().sum().backward()
        gradients.append([p.grad for p in learner.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for short, full in zip(*gradients, strict=True):
        assert (short - full).abs().max() < 1e-10 * (1 + full.abs().max())


@pytest.mark.parametrize("changes", [{"update": "delta"}, {"bptt_segments": 2}, {"segment": 2 * SEGMENT}], ids=str)
def test_without_a_sum_that_gradients_pass_there_is_no_shortcut(changes: dict[str, Any]) -> None:
    learner, tokens = model(**changes), text(4 * SEGMENT)
    streamed, _ = learner.hidden(tokens, learner.initial_layers(len(tokens)))
    assert (learner.window_hidden(tokens, 4, None) - streamed[:, -4:]).abs().max() < 1e-12


@pytest.mark.parametrize("times", [1, 2, 7])
@pytest.mark.parametrize("n_heads", [1, 2])
def test_repeats_of_a_block_equal_saying_it_so_often(times: int, n_heads: int) -> None:
    """In one layer, whose keys and values do not depend on what the memory holds: key, block, question against key,
    block, block, ..., question."""
    learner, tokens = model(n_layers=1, n_heads=n_heads), text(4 * SEGMENT)
    key, block, other, question = tokens.split(SEGMENT, dim=1)
    counts = torch.ones(tokens.shape).double()
    counts[:, SEGMENT : 2 * SEGMENT] = times
    said = torch.cat([key, *[block] * times, other, question], dim=1)
    for n in (1, SEGMENT, SEGMENT + 1):  # the shortcut and the long way
        repeated = learner.window_hidden(tokens, n, counts)
        assert (repeated - learner.window_hidden(said, n, None)[:, -n:]).abs().max() < 1e-10
    assert times == 1 or (repeated - learner.window_hidden(tokens, n, None)).abs().max() > 1e-6


def test_repeats_reach_the_memory_of_every_layer() -> None:
    """With gates open in one layer only, repeats change what comes out."""
    tokens, told = text(4 * SEGMENT), repeats(4 * SEGMENT)
    for open_layer in (0, 1):
        learner = model()
        with torch.no_grad():
            for i, layer in enumerate(learner.layers()):
                layer.gate.fill_(0.0 if i == open_layer else -1e4)
        once, often = (learner.window_hidden(tokens, 2, r) for r in (None, told))
        assert (once - often).abs().max() > 1e-4


def test_the_loss_of_answers_takes_the_repeats_of_what_stands_before_them() -> None:
    """Tokens and targets are one apart; so are repeats and targets."""
    learner, window = model(), text(4 * SEGMENT + 1)
    weights = torch.zeros(window.shape)
    weights[:, -2:] = 1
    told = torch.cat([repeats(4 * SEGMENT), torch.ones(3, 1)], dim=1)
    loss = learner.next_token_loss(Batch(window, 0.0, Generator(), weights, told))
    hidden = learner.window_hidden(window[:, :-1], SEGMENT + 1, told[:, :-1])[:, -2:]
    expected = -learner.logits(hidden).log_softmax(-1).gather(-1, window[:, -2:, None]).mean()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-6)
