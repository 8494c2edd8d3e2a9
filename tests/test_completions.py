"""Completions of many prompts: what is read once, what ends them, what fits, and rows against one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_generation import Bursts, Recital, tiny_transformer
from tiny_subject import built, subject_of
from torch import Generator, Tensor

from archbench.codec import ByteCodec
from archbench.completions import Answers, Question, Writing, answer
from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import stream, write_until
from archbench.metric import Subject
from archbench.model import Emission
from archbench.sampling import GREEDY, Sampling

DECODE = ByteCodec().decode


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(text: str) -> Tensor:
    return torch.tensor([list(text.encode())])


# --- write_until


@pytest.mark.parametrize("options", ({}, {"stop": ("ab", "e")}, {"stop_tokens": (101, 120)}, {"stop": ("q",)}))
@pytest.mark.parametrize("n_new", (0, 1, 7, 40))
def test_rows_write_what_streams_of_their_own_would(n_new: int, options: dict[str, Any]) -> None:
    """Every row begins at another place of the text, and a step writes 1 to 3 bytes depending on the row."""
    text = b"abcdefg hijk xyz \xc3\xa9 lmnopqrs"
    model = Recital(text)
    state = model.initial_state(5)._replace(last=torch.tensor([0, 3, 11, 17, 24]))
    rows = write_until(model, state, 5, n_new, GREEDY, None, DECODE, **options)
    for row, written in enumerate(rows):
        alone = Recital(text)
        first = alone.initial_state(1)._replace(last=state.last[row : row + 1], steps=state.steps[row : row + 1])
        alone.initial_state = lambda _n, first=first: first  # type: ignore[method-assign]
        empty = torch.zeros(1, 0, dtype=torch.long)
        assert written == "".join(stream(alone, empty, n_new, GREEDY, None, DECODE, **options))


def test_equal_rows_of_a_real_model_equal_its_stream() -> None:
    model = tiny_transformer()
    prompts = torch.randint(1, 256, (3, 9), generator=torch.Generator().manual_seed(1))
    state = model.prefill(prompts, model.initial_state(3))
    rows = write_until(model, state, 3, 20, GREEDY, None, DECODE)
    assert rows == ["".join(stream(model, prompts[i : i + 1], 20, GREEDY, None, DECODE)) for i in range(3)]


def test_rows_that_are_done_leave_the_batch() -> None:
    model = Recital(b"ab" * 9 + b"STOP" + b"cd" * 50)
    state = model.initial_state(3)._replace(last=torch.tensor([0, 12, 30]))
    rows = write_until(model, state, 3, 60, GREEDY, None, DECODE, ("STOP",))
    assert rows[:2] == ["ab" * 9, "ab" * 3]
    assert model.rows_decoded[0] == 3 and model.rows_decoded[-1] == 1
    assert model.rows_decoded == sorted(model.rows_decoded, reverse=True)


# --- answers


class Reader(Bursts):
    """Recites "012...", remembers what each state has read, and counts the tokens of each reading."""

    def __init__(self, limit: int = 10**6) -> None:
        super().__init__(limit)
        self.readings: list[int] = []
        self.seen: list[str] = []

    def prefill(self, tokens: Tensor, state: Any) -> Any:
        self.readings.append(tokens.numel())
        before = state.steps if state.steps.ndim == 2 else torch.zeros(len(tokens), 0, dtype=torch.long)
        return state._replace(steps=torch.cat([before, tokens], dim=1), length=state.length + tokens.shape[1])

    def decode_step(self, state: Any, sampling: Sampling, generator: Generator | None) -> Emission:
        self.seen += [bytes(row.tolist()).decode() for row in state.steps[state.last == 0]]
        if sampling.temperature > 1:
            raise UnsupportedError(f"temperature {sampling.temperature:g} is too hot")
        step = super().decode_step(state._replace(steps=torch.zeros_like(state.last)), sampling, generator)
        return Emission(48 + (step.tokens - 1) % 10, step.counts, step.state._replace(steps=state.steps))


def ask(subject: Subject, *prompts: str, reference: str = "x", **how: Any) -> Answers:
    questions = [Question(number=n, prompt=prompt, reference=reference) for n, prompt in enumerate(prompts)]
    writing = Writing(**{"samples": 2, "temperatures": (0.0,), "new_tokens": 4, "stop": ("3",), **how})
    return answer(subject, questions, writing)


def test_the_common_beginning_is_read_once_and_a_prompt_once_for_its_samples() -> None:
    model = Reader()
    found = ask(subject_of(model), "shots shots: one", "shots shots: two", "shots shots: three",
                samples=40, temperatures=(0.0, 1.0))  # fmt: skip
    assert model.readings == [len("shots shots: "), 2 * len("one"), len("three")]
    assert [model.seen.count(f"shots shots: {word}") for word in ("one", "two", "three")] == [41, 41, 41]
    assert [each.completions for each in found.each] == [{0.0: ["012"], 1.0: ["012"] * 40}] * 3
    assert max(model.rows_decoded) == 32
    assert model.rows_decoded[:1] == [2]  # the greedy ones of both prompts of one length


@pytest.mark.parametrize("stride", (1, 2, 3, 5))
def test_strides_are_kept_and_boundaries_stand_in_front_only(stride: int) -> None:
    model = Reader()
    prompts = ("the shots; a", "the shots; bc", "the shots; def", "the shots; gg", "the shots; a")
    ask(subject_of(model, stride=stride), *prompts)
    assert sorted(seen.lstrip("\0") for seen in model.seen) == sorted(prompts)
    assert all(len(seen) % stride == 0 and len(seen) - len(seen.lstrip("\0")) < stride for seen in model.seen)
    assert sum(model.readings) < 0.75 * sum(map(len, model.seen))  # what prompts of one alignment share is read once


def test_a_prompt_without_room_has_empty_completions() -> None:
    found = ask(subject_of(Reader(limit=10), context_limit=10), "a" * 7, "a" * 9, "a" * 10, "a" * 11, stop=())
    assert [each.completions[0.0] for each in found.each] == [["012"], ["0"], [""], [""]]
    assert [each.fits for each in found.each] == [True, True, False, False]
    with pytest.raises(ValueError):
        ask(subject_of(Reader()), "a", temperatures=(float("nan"),))


def test_a_model_with_a_limit_writes_up_to_it() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=12)
    free = built("transformer", d_model=8, n_layers=1, n_heads=1)
    limited = ask(subject, "abcdefgh", "abcdefghijkl", new_tokens=50, stop=())
    assert limited.each[0].completions[0.0][0].encode(errors="replace") != b""
    unlimited = ask(free, "abcdefgh", new_tokens=4, stop=())
    assert limited.each[0].completions == unlimited.each[0].completions
    assert not limited.each[1].fits


def test_the_reference_s_nats_are_the_model_s() -> None:
    subject = built("transformer", d_model=16, n_layers=2, n_heads=2)
    found = ask(subject, "shot one", "shot two", reference="return")
    model: Any = subject.model
    assert found.each[0].nats != found.each[1].nats
    for prompt, each in zip(("shot one", "shot two"), found.each, strict=True):
        log_probs, _ = model.score(ids(prompt + "return"), model.initial_state(1))
        expected = -log_probs[0, len(prompt) :].gather(1, ids("return")[0][:, None]).sum().item()
        assert each.nats == pytest.approx(expected, rel=1e-4)


def test_no_likelihood_or_no_room_means_no_nats() -> None:
    assert ask(subject_of(Reader(), likelihood=False), "a").each[0].nats is None
    limited = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=12)
    assert ask(limited, "abcdefgh", reference="12345").each[0].nats is None
    assert ask(limited, "abcdefgh", reference="1234").each[0].nats is not None


def test_greedy_completions_are_those_of_each_prompt_alone() -> None:
    """Prompts of one length are read and completed as rows of a batch."""
    subject = subject_of(tiny_transformer())
    prompts = ["same length one", "same length two", "same length 1", "same length ten"]
    together = ask(subject, *prompts, new_tokens=12, stop=()).each
    for prompt, each in zip(prompts, together, strict=True):
        (alone,) = ask(subject, prompt, new_tokens=12, stop=()).each
        assert each.completions == alone.completions
        assert each.nats == pytest.approx(alone.nats, rel=1e-5)


def test_draws_depend_on_the_seed_and_the_number_alone() -> None:
    subject = subject_of(tiny_transformer())
    how = Writing(samples=3, temperatures=(1.0,), new_tokens=8, stop=())
    one, two = (Question(number=n, prompt="same", reference="x") for n in (7, 8))
    together, alone = answer(subject, [one, two], how).each, answer(subject, [two], how).each
    assert together[1].completions == alone[0].completions
    assert together[0].completions != together[1].completions
    assert len(set(alone[0].completions[1.0])) == 3


def test_a_refused_temperature_has_a_reason_and_leaves_the_others() -> None:
    found = ask(subject_of(Reader()), "a", "b", temperatures=(0.0, 2.0, 1.0))
    assert found.refused == {2.0: "temperature 2 is too hot"}
    assert [set(each.completions) for each in found.each] == [{0.0, 1.0}] * 2


@pytest.mark.parametrize(
    "bad",
    ({"samples": 0}, {"new_tokens": 0}, {"temperatures": ()}, {"temperatures": (1.0, 1.0)}, {"temperatures": (-1.0,)}),
)
def test_impossible_ways_of_writing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Writing(**{"samples": 1, "temperatures": (0.0,), "new_tokens": 1, "stop": (), **bad})


def test_a_written_boundary_ends_a_completion() -> None:
    class Ends(Reader):
        def decode_step(self, state: Any, sampling: Sampling, generator: Generator | None) -> Emission:
            tokens, counts, state = super().decode_step(state, sampling, generator)
            return Emission(torch.where(tokens == ord("2"), 0, tokens), counts, state)

    assert ask(subject_of(Ends()), "a", stop=()).each[0].completions == {0.0: ["01"]}
    assert ask(subject_of(Reader()), "a", stop=()).each[0].completions == {0.0: ["0123"]}
