"""Tasks made of symbols: exact lengths, answers held against solvers written from the tasks' descriptions, splits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from archbench import registry
from archbench.codec import ByteCodec, Codec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError
from archbench.task import Example, Generator, held_out

NO_TEXT = Corpus(name="none", train=(), heldout=(), sha256="")
SMALL: dict[str, dict[str, Any]] = {
    "selective_copying": {"items": 5, "values": 4},
    "induction_heads": {"symbols": 6},
    "multi_query_recall": {"pairs": 4, "keys": 9, "values": 5, "fillers": 3},
    "name_induction": {"words": 12, "firsts": 16, "characters": 3, "mentions": 4},
    "polynomial_arithmetic": {"modulus": 5, "degree": 3},
}
"""Settings with few symbols, so that what is rare happens."""
TASKS = sorted(SMALL)


def generator(name: str, codec: Codec | None = None, **settings: Any) -> Any:
    task = registry.task(name)
    return task.generator(task.settings(**settings), codec or ByteCodec(), NO_TEXT)


def drawn(maker: Generator, n: int = 60, length: int = 90, split: Any = "train", seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [maker.draw(length, split, rng) for _ in range(n)]


# Solvers: from a text whose answers are covered (by 0) to the answers.


def solve_copying(tokens: list[int], values: int = 4) -> list[int]:
    return [token for token in tokens if 1 <= token <= values]


def solve_induction(tokens: list[int]) -> list[int]:
    trigger = tokens[-2]
    return [tokens[tokens.index(trigger) + 1]]


def solve_recall(tokens: list[int], pairs: int = 4) -> list[int]:
    value_of = {tokens[2 * i]: tokens[2 * i + 1] for i in range(pairs)}
    return [value_of[tokens[i - 1]] for i, token in enumerate(tokens) if token == 0]


def solve_names(tokens: list[int]) -> list[int]:
    return [tokens[tokens.index(tokens[i - 1]) + 1] for i, token in enumerate(tokens) if token == 0]


def solve_polynomials(tokens: list[int], p: int = 5, d: int = 3) -> list[int]:
    """By evaluating the expression recursively on dictionaries from exponents to coefficients."""
    negate, add, multiply, compose, equals, blank = range(p + 1, p + 7)
    rest = [token for token in tokens if token != blank]

    def times(f: dict[int, int], g: dict[int, int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for (i, a), (j, b) in product(f.items(), g.items()):
            found[i + j] = (found.get(i + j, 0) + a * b) % p
        return found

    def plus(f: dict[int, int], g: dict[int, int]) -> dict[int, int]:
        return {i: (f.get(i, 0) + g.get(i, 0)) % p for i in {*f, *g}}

    def cut(f: dict[int, int]) -> dict[int, int]:
        return {i: a for i, a in f.items() if i < d}

    def value() -> dict[int, int]:
        head = rest[0]
        if head <= p:
            coefficients = [rest.pop(0) - 1 for _ in range(d)]
            return dict(enumerate(coefficients))
        rest.pop(0)
        f = value()
        if head == negate:
            return {i: (p - a) % p for i, a in f.items()}
        g = value()
        if head == add:
            return plus(f, g)
        if head == multiply:
            return cut(times(f, g))
        assert head == compose
        found, power = {0: 0}, {0: 1}
        for i in range(d):
            found = plus(found, times({0: f.get(i, 0)}, power))
            power = times(power, g)
        return cut(found)

    result = value()
    assert rest[0] == equals
    return [result.get(i, 0) + 1 for i in range(d)]


SOLVERS: dict[str, Callable[[list[int]], list[int]]] = {
    "selective_copying": solve_copying,
    "induction_heads": solve_induction,
    "multi_query_recall": solve_recall,
    "name_induction": solve_names,
    "polynomial_arithmetic": solve_polynomials,
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_those_of_a_solver(name: str, split: str) -> None:
    maker = generator(name, **SMALL[name])
    for example in drawn(maker, split=split):
        covered = np.where(example.answer, 0, example.tokens)
        assert SOLVERS[name](covered.tolist()) == example.tokens[example.answer].tolist()


@pytest.mark.parametrize("name", TASKS)
def test_texts_have_exactly_the_length_asked_for(name: str) -> None:
    maker = generator(name, **SMALL[name])
    rng = np.random.default_rng(0)
    for length in [*range(maker.shortest, maker.shortest + 12), 200, 513]:
        for split in ("train", "test"):
            example = maker.draw(length, split, rng)
            assert len(example.tokens) == len(example.answer) == len(example.idle) == length
            assert example.answer.any() and not (example.answer & example.idle).any()
    with pytest.raises(ConfigError, match=f"at least {maker.shortest}"):
        maker.draw(maker.shortest - 1, "train", rng)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("settings", ["small", "default"])
def test_tokens_are_symbols_and_never_the_boundary(name: str, settings: str) -> None:
    maker = generator(name, **(SMALL[name] if settings == "small" else {}))
    seen = np.concatenate([example.tokens for example in drawn(maker, n=40, length=128)])
    assert seen.min() >= 1
    assert seen.max() <= maker.n_symbols < 256


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_draws_the_same_texts(name: str) -> None:
    first, again, other = (drawn(generator(name), n=5, length=128, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert (a.tokens == b.tokens).all() and (a.answer == b.answer).all() and (a.idle == b.idle).all()
        assert (a.tokens != c.tokens).any()


def asked(name: str, example: Example) -> set[tuple[int, ...]]:
    """What a text asks, as its task's file says."""
    tokens, answer = example.tokens, example.answer
    if name == "selective_copying":
        return {tuple(tokens[answer].tolist())}
    if name == "multi_query_recall":
        return {tuple(tokens[: 2 * answer.sum()].tolist())}
    if name == "name_induction":
        return {(int(tokens[i - 1]), int(tokens[i])) for i in np.flatnonzero(answer)}
    if name == "polynomial_arithmetic":
        return {tuple(tokens[~example.idle & ~answer].tolist())}
    return {tuple(tokens.tolist())}


@pytest.mark.parametrize(
    ("name", "length", "settings"),
    [
        ("selective_copying", 11, {"items": 5, "values": 3}),
        ("induction_heads", 5, {"symbols": 6}),
        ("multi_query_recall", 8, {"pairs": 2, "keys": 5, "values": 4}),
        ("name_induction", 70, SMALL["name_induction"]),
        ("polynomial_arithmetic", 9, {"modulus": 2, "degree": 1}),
    ],
)
def test_training_and_testing_never_ask_the_same(name: str, length: int, settings: dict[str, Any]) -> None:
    """In settings so small that without a split the two would meet."""
    maker = generator(name, **settings)
    train, test = (
        set().union(*(asked(name, example) for example in drawn(maker, n=150, length=length, split=split)))
        for split in ("train", "test")
    )
    assert len(train) > 20 and len(test) > 3
    assert not train & test


def test_one_question_in_eight_is_held_out() -> None:
    share = np.mean([held_out(np.array([a, b])) for a in range(100) for b in range(100)])
    assert share == pytest.approx(1 / 8, abs=0.01)


def test_a_task_without_enough_questions_says_so() -> None:
    maker = generator("selective_copying", items=1, values=2)
    with pytest.raises(ConfigError, match="too few questions"):
        for split in ("train", "test"):
            drawn(maker, n=20, split=split)


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_guessing_gets(name: str) -> None:
    """A guesser draws every token from all that answers can be; the tasks are shrunk so that it is often right."""
    tiny: dict[str, dict[str, Any]] = {
        "selective_copying": {"items": 3, "values": 2},
        "induction_heads": {"symbols": 6},
        "multi_query_recall": {"pairs": 2, "keys": 6, "values": 3},
        "name_induction": {"words": 3, "firsts": 60, "characters": 2, "mentions": 2},
        "polynomial_arithmetic": {"modulus": 3, "degree": 2},
    }
    maker = generator(name, **tiny[name])
    examples = drawn(maker, n=800, length=maker.shortest + 4)
    possible = np.unique(np.concatenate([example.tokens[example.answer] for example in examples]))
    rng = np.random.default_rng(1)
    right = [
        (rng.choice(possible, size=example.answer.sum()) == example.tokens[example.answer]).all()
        for example in examples
    ]
    spread = (maker.chance * (1 - maker.chance) / len(right)) ** 0.5
    assert np.mean(right) == pytest.approx(maker.chance, abs=4 * spread)


@pytest.mark.parametrize("name", TASKS)
def test_idle_tokens_can_be_said_again(name: str) -> None:
    """Doubling one of them leaves question and answer as they were."""
    maker = generator(name, **SMALL[name])
    rng = np.random.default_rng(2)
    for example in drawn(maker, n=30, length=100):
        place = int(rng.choice(np.flatnonzero(example.idle)))
        tokens, answer = (np.insert(part, place, part[place]) for part in (example.tokens, example.answer))
        covered = np.where(answer, 0, tokens).tolist()
        assert SOLVERS[name](covered) == tokens[answer].tolist()


@pytest.mark.parametrize("name", TASKS)
def test_a_codec_too_small_is_refused(name: str) -> None:
    class Small(ByteCodec):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.vocab_size = "small", generator(name).n_symbols

    with pytest.raises(ConfigError, match=f"{name}: needs .* codec small has"):
        generator(name, codec=Small())


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("selective_copying", {"items": 0}),
        ("selective_copying", {"values": 1}),
        ("induction_heads", {"symbols": 2}),
        ("multi_query_recall", {"pairs": 65}),
        ("multi_query_recall", {"power": 0.0}),
        ("name_induction", {"mentions": 0}),
        ("name_induction", {"p_rare": 1.5}),
        ("name_induction", {"words_per_sentence": (4, 3)}),
        ("polynomial_arithmetic", {"modulus": 6}),
        ("polynomial_arithmetic", {"operators": ()}),
        ("polynomial_arithmetic", {"operations": 0}),
    ],
)
def test_impossible_settings_are_refused(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.{next(iter(bad)) if bad != {'pairs': 65} else 'keys'}"):
        registry.task(name).settings(**bad)


def test_too_few_names_for_testing_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few names"):
        generator("name_induction", firsts=4, words=2)


def test_copied_items_stand_at_every_place() -> None:
    examples = drawn(generator("selective_copying", items=2, values=3), n=400, length=12)
    places = np.concatenate([np.flatnonzero(example.tokens[:9] <= 3) for example in examples])
    assert set(places) == set(range(9))


def test_the_trigger_stands_at_every_place_but_those_next_to_the_question() -> None:
    examples = drawn(generator("induction_heads"), n=300, length=10)
    assert {int(np.argmax(example.tokens == 16)) for example in examples} == set(range(7))


def test_queries_come_soon_rather_than_late() -> None:
    examples = drawn(generator("multi_query_recall", pairs=2), n=300, length=204)
    late = np.mean([example.answer[104:].sum() / 2 for example in examples])
    assert 0.05 < late < 0.25  # under a uniform law it would be a half


def test_names_of_a_test_story_are_never_common_ones() -> None:
    maker = generator("name_induction", p_rare=0.0)
    common = {tuple(pair) for pair in maker.common.tolist()}
    for split, share in (("train", 1.0), ("test", 0.0)):
        names = [pair for example in drawn(maker, length=128, split=split) for pair in asked("name_induction", example)]
        assert np.mean([pair in common for pair in names]) == share


def test_longer_texts_have_harder_expressions_unless_limited() -> None:
    def operations(maker: Generator, length: int) -> set[int]:
        texts = drawn(maker, n=80, length=length)
        return {int(((example.tokens >= 8) & (example.tokens <= 11)).sum()) for example in texts}

    assert operations(generator("polynomial_arithmetic"), 41) == {1, 2, 3, 4, 5}
    assert operations(generator("polynomial_arithmetic"), 71) == set(range(1, 11))
    assert operations(generator("polynomial_arithmetic", operations=2), 71) == {1, 2}
    only = drawn(generator("polynomial_arithmetic", operators=("add",)), n=20, length=41)
    assert all(set(example.tokens) & {8, 9, 10, 11} == {9} for example in only)
