"""The n-gram floor against counts by hand and against a dictionary."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.ngram import Ngram, NgramConfig
from archbench.errors import ConfigError
from archbench.model import Batch

torch.set_num_threads(1)


def counted(config: NgramConfig, *windows: Tensor) -> Ngram:
    model = Ngram(config)
    (phase,) = model.phases()
    for window in windows:
        phase.loss(Batch(window, 0.0, Generator()))
    return model


def probabilities(model: Ngram, tokens: list[int]) -> Tensor:
    log_probs, _ = model.score(torch.tensor([tokens]), model.initial_state(1))
    return log_probs[0].exp()


def test_unigram_by_hand() -> None:
    """The window 0 1 2 1 2 holds the targets 1 2 1 2; with a = 4 and V = 3 each count gains 4/3, the total 4."""
    model = counted(NgramConfig(vocab_size=3, order=1), torch.tensor([[0, 1, 2, 1, 2]]))
    expected = torch.tensor([4 / 3, 2 + 4 / 3, 2 + 4 / 3]) / 8
    torch.testing.assert_close(probabilities(model, [0, 1]), expected.expand(2, 3))


def test_bigram_by_hand() -> None:
    """After 1 comes 2 twice and nothing else; after 0 comes 1 once; after 2 comes 1 once."""
    model = counted(NgramConfig(vocab_size=3, order=2, backoff=1.0), torch.tensor([[0, 1, 2, 1, 2]]))
    unigram = torch.tensor([1 / 3, 2 + 1 / 3, 2 + 1 / 3]) / 5
    after = {
        0: (torch.tensor([0.0, 1.0, 0.0]) + unigram) / 2,
        1: (torch.tensor([0.0, 0.0, 2.0]) + unigram) / 3,
        2: (torch.tensor([0.0, 1.0, 0.0]) + unigram) / 2,
    }
    # The first prediction stands after the boundary, token 0.
    torch.testing.assert_close(probabilities(model, [1, 2, 0]), torch.stack([after[0], after[1], after[2]]))


def test_unread_it_is_uniform_and_its_first_loss_is_ln_v() -> None:
    model = Ngram(NgramConfig(vocab_size=7, order=3))
    torch.testing.assert_close(probabilities(model, [1, 2, 3]), torch.full((3, 7), 1 / 7))
    window = torch.randint(7, (2, 9), generator=Generator().manual_seed(0))
    assert model.phases()[0].loss(Batch(window, 0.0, Generator())).value.item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_any_order_equals_a_dictionary_of_counts(order: int) -> None:
    config = NgramConfig(vocab_size=5, order=order, backoff=2.5)
    windows = torch.randint(5, (3, 2, 12), generator=Generator().manual_seed(order))
    model = counted(config, *windows)
    counts: Counter[tuple[int, ...]] = Counter()
    totals: Counter[tuple[int, ...]] = Counter()
    for row in windows.flatten(0, 1).tolist():
        padded = [0] * order + row  # boundaries stand before a window
        for i in range(order + 1, len(padded)):
            for k in range(1, order + 1):
                counts[tuple(padded[i - k + 1 : i + 1])] += 1
                totals[tuple(padded[i - k + 1 : i])] += 1

    def probability(token: int, context: list[int]) -> float:
        p = 1 / 5
        for k in range(1, order + 1):
            seen = tuple(context[len(context) - k + 1 :])
            p = (counts[(*seen, token)] + 2.5 * p) / (totals[seen] + 2.5)
        return p

    tokens = [3, 1, 4, 1, 0, 2, 2]
    expected = [[probability(v, [0] * order + tokens[:i]) for v in range(5)] for i in range(len(tokens))]
    torch.testing.assert_close(probabilities(model, tokens), torch.tensor(expected))


def test_counting_goes_on_beyond_what_fp32_can_count() -> None:
    model = Ngram(NgramConfig(vocab_size=3, order=1))
    model.counts(1)[1] = 2**24
    model.phases()[0].loss(Batch(torch.ones(1, 6, dtype=torch.long), 0.0, Generator()))
    assert model.counts(1).tolist() == [0, 2**24 + 5, 0]


def test_a_bigram_reaches_the_entropy_of_a_bigram_source() -> None:
    """Each token is followed by itself plus one (3 of 4 times) or plus two: H = 0.5623 nats a token."""
    generator = Generator().manual_seed(0)
    steps = 1 + (torch.rand(8, 2001, generator=generator) < 0.25).long()
    text = steps.cumsum(dim=1) % 11
    model = counted(NgramConfig(vocab_size=11, order=2), text)
    held_out = (1 + (torch.rand(8, 2001, generator=generator) < 0.25).long()).cumsum(dim=1) % 11
    loss = model.next_token_loss(Batch(held_out, 0.0, Generator())).value.item()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert loss == pytest.approx(entropy, rel=0.02)
    unigram = counted(NgramConfig(vocab_size=11, order=1), text)
    assert unigram.next_token_loss(Batch(held_out, 0.0, Generator())).value.item() == pytest.approx(
        math.log(11), rel=0.02
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 1}, "ngram.vocab_size: 1"),
        ({"vocab_size": 256, "order": 0}, "ngram.order: 0"),
        ({"vocab_size": 256, "order": 4}, "vocab_size^order = 256^4"),
        ({"vocab_size": 256, "backoff": 0.0}, "ngram.backoff: 0.0"),
    ],
)
def test_impossible_configs_are_refused_by_name(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NgramConfig(**settings)  # type: ignore[arg-type]
    assert message in str(caught.value)
