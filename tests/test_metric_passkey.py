"""The passkey metric on a model that knows the key at some depths, and its shared pass against texts read whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_subject import built, subject_of
from torch import Generator, Tensor

from archbench import registry
from archbench.codec import ByteCodec
from archbench.data.corpus import Corpus
from archbench.errors import ConfigError, SuiteError
from archbench.examination import Examination
from archbench.exercise import Exercise, Stage
from archbench.generation import continue_from
from archbench.haystack import Texts, Walk, read_whole
from archbench.history import History, Point
from archbench.metric import Measurement, Subject
from archbench.metrics.passkey import METRIC, PasskeyMetricSettings, Variant
from archbench.model import Emission, FlopFormulas, Likelihood, Phase, SequenceModel, Traits
from archbench.parse import parse
from archbench.projection import Projection
from archbench.sampling import GREEDY, Sampling
from archbench.stats import wilson_interval
from archbench.tasks.passkey import INTRO, QUESTION, Passkey, PasskeySettings

torch.set_num_threads(1)

NO_TEXT = Corpus(name="none", train=(), heldout=(), sha256="")
Knows = Callable[[str, str, int], int]
"""(text before the question, key, where its needle begins) -> how many digits the model knows."""


class Scripted(SequenceModel, Likelihood):
    """Keeps the whole text as its state, and says the first digits of the key as told, then x."""

    vocab_size = 256

    def __init__(self, knows: Knows, power: int = 1) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))
        self.knows, self.power = knows, power
        self.n_read = 0

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 0, dtype=torch.long)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        self.n_read += tokens.numel()
        return torch.cat([state, tokens], dim=1)

    def score(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.prefill(tokens, state)
        log_probs = torch.zeros(*tokens.shape, self.vocab_size)
        for row, text in enumerate(whole):
            said = bytes(text.tolist()).decode()
            for i in range(tokens.shape[1]):
                log_probs[row, i, ord(self.next_letter(said[: state.shape[1] + i]))] = 1.0
        return log_probs.log_softmax(-1), whole

    def next_letter(self, said: str) -> str:
        before, _, given = said.rpartition(QUESTION)
        needle = re.search(r"The pass key is (\d+)\. Remember it", before)
        if needle is None or not re.fullmatch(r"\d{0,4}", given):
            return "?"
        key = needle.group(1)
        return key[len(given)] if len(given) < self.knows(before, key, needle.start()) else "x"

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        return []

    def flops(self) -> FlopFormulas:
        power = self.power

        class Formulas(FlopFormulas):
            def training(self, context: int, causal: float = 0.5) -> float:
                raise NotImplementedError

            def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
                return float((context + n) ** power - context**power)

            def decode(self, context: int) -> float:
                raise NotImplementedError

        return Formulas()


class Silent(Scripted):
    """Says nothing, whatever it reads."""

    def score(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(*tokens.shape, self.vocab_size), self.prefill(tokens, state)


def measured(subject: Subject, **settings: Any) -> list[Measurement]:
    found = list(METRIC.measure(subject, PasskeyMetricSettings(**settings)))
    assert {m.quantity for m in found} <= set(METRIC.quantities)
    assert all((m.value is None) == bool(m.reason) for m in found)
    return found


def only(found: list[Measurement], quantity: str, **at: Any) -> Measurement:
    (one,) = [m for m in found if m.quantity == quantity and at.items() <= dict(m.at).items()]
    return one


def scripted(knows: Knows, **more: Any) -> Subject:
    return subject_of(Scripted(knows, **more))


HALF_KNOWN = scripted(lambda _text, key, start: 5 if start < 500 else 5 if key[0] in "02468" else 2)


def test_a_model_that_knows_some_keys_gets_what_counting_by_hand_gives() -> None:
    """It knows every needle that begins within 500 tokens, beyond them those of even keys, of others two digits."""
    found = measured(HALF_KNOWN, lengths=(400, 1200), depths=(0.0, 1.0), samples=10, batch=4)
    generator = Passkey(PasskeySettings(), ByteCodec(), NO_TEXT)
    keys = [bytes(generator.parts("test", np.random.default_rng([0, row])).answer.tolist()) for row in range(10)]
    even = [key[:1] in b"02468" for key in keys]
    assert 0 < sum(even) < 10
    for length, depth in ((400, 0.0), (400, 1.0), (1200, 0.0)):
        exact = only(found, "exact_match", length=length, depth=depth)
        assert (exact.value, exact.samples) == (1.0, [1.0] * 10)
        assert only(found, "token_accuracy", length=length, depth=depth).value == 1.0
    exact = only(found, "exact_match", length=1200, depth=1.0)
    assert exact.samples == [float(e) for e in even]
    assert exact.value == sum(even) / 10
    bounds = wilson_interval(sum(even), 10)
    assert (exact.low, exact.high, exact.confidence) == tuple(bounds)
    digits = only(found, "token_accuracy", length=1200, depth=1.0)
    assert digits.value == pytest.approx((sum(even) + 0.4 * (10 - sum(even))) / 10)
    assert only(found, "chance").value == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("known_to", "reached"),
    [(0, 0), (600, 400), (10**9, 1600)],
    ids=["none", "short ones", "all"],
)
def test_the_effective_length_is_the_largest_with_all_shorter_ones_solved(known_to: int, reached: int) -> None:
    subject = scripted(lambda text, _key, _start: 5 if len(text) < known_to else 0)
    found = measured(subject, lengths=(400, 800, 1600), depths=(0.5, 1.0), samples=2, least_samples=2)
    assert only(found, "effective_length").value == reached


def test_a_gap_ends_the_effective_length() -> None:
    subject = scripted(lambda text, _key, _start: 0 if 500 < len(text) < 1000 else 5)
    found = measured(subject, lengths=(400, 800, 1600), depths=(1.0,), samples=2)
    assert only(found, "effective_length").value == 400


def test_the_mean_over_depths_decides() -> None:
    subject = scripted(lambda _text, _key, start: 0 if start < 300 else 5)
    one_of_six = {"lengths": (1000,), "samples": 2, "depths": (0.0, 0.4, 0.6, 0.8, 0.9, 1.0)}
    assert only(measured(subject, **one_of_six), "effective_length").value == 0  # 5/6 = 0.83
    one_of_seven = {**one_of_six, "depths": (0.0, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0)}
    assert only(measured(subject, **one_of_seven), "effective_length").value == 1000  # 6/7 = 0.857


def test_depth_and_distance_are_those_of_the_texts() -> None:
    seen = {}

    def note(text: str, key: str, start: int) -> int:
        seen[len(text), start] = len(text) - start
        return 5

    found = measured(scripted(note), lengths=(700,), depths=(0.0, 0.5, 1.0), samples=2)
    needle = len("The pass key is 12345. Remember it. 12345 is the pass key. ")
    distances = [m.at["distance"] for m in found if m.quantity == "exact_match"]
    assert sorted(distances, reverse=True) == distances and distances[-1] == 0
    assert sorted(d + needle for d in distances) == sorted(seen.values())


def test_samples_halve_as_lengths_double() -> None:
    settings = PasskeyMetricSettings(samples=20, least_samples=4, token_budget=2**20)
    found = [settings.samples_at(n) for n in (512, 32_768, 65_536, 131_072, 2**20, 2**22)]
    assert found == [20, 20, 16, 8, 4, 4]


# The shared pass.


def random_texts(filler: int, rows: int = 3) -> Texts:
    rng = Generator().manual_seed(1)
    sizes = {"intro": 11, "filler": filler, "needle": 7, "question": 5, "answer": 3}
    return Texts(**{name: torch.randint(1, 256, (rows, n), generator=rng) for name, n in sizes.items()})


def whole(texts: Texts, length: int, place: int, rows: int) -> Tensor:
    filler = texts.filler[:, : texts.room(length)]
    pieces = [texts.intro, filler[:, :place], texts.needle, filler[:, place:], texts.question, texts.answer]
    return torch.cat(pieces, dim=1)[:rows]


SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"d_model": 16, "n_layers": 2, "n_heads": 2, "frontend_conv": 4},
    "infini_attention": {"d_model": 16, "n_layers": 2, "n_heads": 2, "segment": 16, "frontend_conv": 4},
    "memorizing_transformer": {"d_model": 16, "n_layers": 2, "n_heads": 2, "segment": 16, "memory": 40, "top_k": 4},
    "mamba": {"d_model": 16, "n_layers": 2},
}


@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_the_shared_pass_gives_what_reading_every_text_by_itself_gives(architecture: str) -> None:
    """Answers are what the model says of one of the texts, so that some digits are right and some are not."""
    model = built(architecture, **SMALL[architecture]).model
    lengths, rows_at = (40, 90, 200), {40: 3, 90: 2, 200: 2}
    texts = random_texts(200)
    places = {n: [round(p * texts.room(n)) for p in (0.0, 0.3, 1.0)] for n in lengths}
    with torch.inference_mode():
        prompt = whole(texts, 90, places[90][1], 3)[:, :-3]
        answer = continue_from(model, model.prefill(prompt, model.initial_state(3)), 3, 3, GREEDY)
        texts = texts._replace(answer=answer)
        walk, hits, misses, apart = Walk(model, texts, places), 0, 0, 0
        for length in lengths:
            shared = walk.right(length, rows_at[length])
            for place in places[length]:
                text = whole(texts, length, place, rows_at[length])
                right, _ = read_whole(model, text, 3)
                assert torch.equal(right, shared[place])
                hits, misses, apart = hits + int(right.sum()), misses + int((~right).sum()), apart + text.numel()
    assert hits > 5 and misses > 5
    assert walk.n_read < 0.75 * apart


def test_the_pass_reads_the_front_once_and_a_shared_place_once() -> None:
    """Place 0 of both lengths is one branch; 30 and 100 lie along one trunk; 20 lies behind 30 and begins anew."""
    model = Silent(lambda *_: 0)
    texts = random_texts(200, rows=1)
    fixed = {"intro": 11, "needle": 7, "rest": 5 + 3}
    lengths = {n: n + sum(fixed.values()) for n in (50, 150)}
    walk = Walk(model, texts, {lengths[50]: [0, 30], lengths[150]: [0, 20, 100]})
    walk.right(lengths[50], 1)
    first = 11 + (7 + 50 + 8) + 30 + (7 + 20 + 8)
    assert walk.n_read == first
    walk.right(lengths[150], 1)
    assert walk.n_read == first + (100 + 8) + (11 + 20) + (7 + 130 + 8) + 80 + (7 + 50 + 8)
    assert walk.n_read == model.n_read
    assert not walk.kept


def test_what_is_read_is_recorded_beside_what_it_would_be() -> None:
    found = measured(HALF_KNOWN, lengths=(400, 1200), depths=(0.0, 0.5, 1.0), samples=3)
    for length in (400, 1200):
        apart = only(found, "tokens_read", length=length, way="apart").value
        assert apart == 3 * 3 * length
        assert only(found, "tokens_read", length=length, way="shared").value < 0.8 * apart


@pytest.mark.parametrize("settings", [{"keys": 3}, {"overwrite": True}], ids=str)
def test_texts_with_several_needles_are_read_by_themselves(settings: dict[str, Any]) -> None:
    """This model answers the last key it read of; it is right where that is the one asked."""
    subject = scripted(lambda *_: 5)
    subject.model.next_letter = lambda said: _last_key(said)  # type: ignore[method-assign, operator]
    variant = Variant(name="several", settings=settings)
    found = measured(subject, lengths=(900,), depths=(0.0, 1.0), samples=12, variants=(variant,))
    front, end = (only(found, "exact_match", depth=d).value for d in (0.0, 1.0))
    assert "distance" not in only(found, "exact_match", depth=1.0).at
    assert end == 1.0
    assert (front == 1.0) if settings.get("overwrite") else (front == 0.0)


def _last_key(said: str) -> str:
    before, _, given = said.rpartition(" is ")
    return re.findall(r"is (\d{5})\. Remember", before)[-1][len(given)] if re.fullmatch(r"\d{0,4}", given) else "?"


def test_p2_needles_of_several_stand_where_they_are_asked() -> None:
    generator = Passkey(PasskeySettings(keys=3), ByteCodec(), NO_TEXT)
    texts = []

    class Listening(Silent):
        def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
            texts.extend(bytes(row.tolist()).decode() for row in tokens)
            return super().prefill(tokens, state)

    Examination(
        Listening(lambda *_: 0), generator, lengths=(900,), depths=(0.25,), most_rows=lambda _: 5, batch=2, seed=0
    ).ask(900, 5)
    texts = [text for text in texts if len(text) > 100]  # the others are digits of answers
    assert len(texts) == 5
    for text in texts:
        needles = {m.group(1): m for m in re.finditer(NAMED, text)}
        (word,) = re.findall(r"What is the pass key of (\w+)\?", text)
        question = len(text) - text.index(" What is the pass key") + 5  # of which the digits are read later
        room = 900 - len(INTRO) - sum(len(m.group()) for m in needles.values()) - question
        start = needles[word].start()
        before = start - len(INTRO) - sum(len(m.group()) for m in needles.values() if m.start() < start)
        assert before == round(0.25 * room)


NAMED = r"The pass key of (\w+) is \d+\. Remember it\. \d+ is the pass key of \w+\. "


# Budgets.


def test_a_length_over_its_memory_budget_is_a_data_point() -> None:
    subject = built("transformer", d_model=8, n_layers=2, n_heads=1)
    row = lambda n: 2 * 2 * 8 * 4 * n  # noqa: E731 - keys and values of two layers in fp32
    budget = 3 * 2 * row(900)
    found = measured(subject, lengths=(400, 800, 1600), depths=(0.0, 1.0), samples=2, max_state_bytes=budget)
    refused = only(found, "exact_match", length=1600, depth=0.0)
    assert refused.value is None and "at 1600 tokens" in refused.reason
    assert refused.reason.startswith("beyond the budget: projected")
    for length in (400, 800, 1600):
        projected = only(found, "projected_state_bytes", length=length).value
        assert projected == pytest.approx(row(length), rel=0.15)  # a cache has an eighth of slack
    assert only(found, "state_bytes", length=800).value == pytest.approx(row(800), rel=0.15)
    assert only(found, "exact_match", length=800, depth=0.0).value is not None


def test_a_length_over_its_time_budget_is_a_data_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is quadratic in the length here, and projected so: 2 s at 400 tokens become 8 s and 32 s."""
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr("archbench.metrics.passkey.time.process_time", lambda: float(next(clock)))
    subject = scripted(lambda *_: 5, power=2)
    found = measured(subject, lengths=(400, 800, 1600), depths=(0.0,), samples=2, max_seconds=20.0)
    assert only(found, "seconds", length=400).value == 2.0
    assert only(found, "projected_seconds", length=800).value == pytest.approx(8.0, rel=0.05)
    assert only(found, "seconds", length=800).value == 2.0  # and that is what the next projection goes by
    assert only(found, "projected_seconds", length=1600).value == pytest.approx(8.0, rel=0.05)
    found = measured(subject, lengths=(400, 800, 1600), depths=(0.0,), samples=2, max_seconds=5.0)
    assert "projected 8" in only(found, "exact_match", length=800, depth=0.0).reason
    assert "projected 32" in only(found, "exact_match", length=1600, depth=0.0).reason
    reached = only(found, "effective_length")
    assert reached.value == 400 and reached.protocol.endswith("; 800 tokens were not run")


def test_samples_are_fewer_where_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 s for ten rows of 400 tokens become 8 s at 800; 5 s are time for six of them, and not for eight."""
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr("archbench.metrics.passkey.time.process_time", lambda: float(next(clock)))
    asked = {"lengths": (400, 800), "depths": (0.0,), "samples": 10, "max_seconds": 5.0}
    found = measured(scripted(lambda *_: 5, power=2), least_samples=3, **asked)
    assert [len(only(found, "exact_match", length=n, depth=0.0).samples) for n in (400, 800)] == [10, 6]
    assert only(found, "projected_seconds", length=800).value == pytest.approx(0.6 * 8, rel=0.05)
    assert only(found, "tokens_read", length=800, way="apart").value == 6 * 800
    found = measured(scripted(lambda *_: 5, power=2), least_samples=8, **asked)
    assert "projected 6." in only(found, "exact_match", length=800, depth=0.0).reason


def test_a_context_limit_is_a_reason() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=500)
    found = measured(subject, lengths=(400, 800), depths=(1.0,), samples=2)
    assert "limit is 500" in only(found, "exact_match", length=800).reason
    assert only(found, "exact_match", length=400).value is not None


def test_a_model_that_failed_is_not_asked_for_more() -> None:
    subject = scripted(lambda text, *_: 5 if len(text) < 600 else 0)
    found = measured(subject, lengths=(400, 800, 1600), depths=(1.0,), samples=2, always=800, proceed=0.5)
    assert only(found, "exact_match", length=800).value == 0.0
    assert "failed before: exact match 0.00 at 800 tokens" in only(found, "exact_match", length=1600).reason
    assert only(found, "projected_seconds", length=1600).value > 0  # what it would have cost is told all the same


def test_a_projection_follows_the_last_two_sizes() -> None:
    projection = Projection([(50, 600.0), (100, 1100.0)])
    assert projection.expected(300, flops=1.0) == (None, 3100.0)
    projection.learn(100, flops=10.0, seconds=2.0, row_bytes=1100.0)
    assert projection.expected(300, flops=90.0) == (18.0, 3100.0)
    projection.learn(200, flops=40.0, seconds=4.0, row_bytes=1100.0)
    assert projection.expected(300, flops=90.0) == (9.0, 1100.0)
    assert projection.basis == (100, 200)


# What was learned.


def trained(subject: Subject, stage: float, name: str = "passkey", **settings: Any) -> Subject:
    point = Point(
        phase="p", step=9, tokens=9, bytes=9, flops=9, seconds=9, cpu_seconds=9, loss=1.0, learning_rate=0.1,
        parts={"stage": stage, "exact": 0.5},
    )  # fmt: skip
    exercise = Exercise(name=name, settings=settings, stages=(Stage(context=128), Stage(context=512, replay=3e4)))
    return replace(subject, exercise=exercise, history=History(points=[point]))


def test_trained_and_zero_shot_rows_are_told_apart() -> None:
    asked = {"lengths": (400,), "depths": (1.0,), "samples": 1}
    found = measured(trained(HALF_KNOWN, 1.7), **asked)
    exact = only(found, "exact_match")
    assert exact.at["learned"] == "trained"
    assert "in windows of 128, 512 (replay 30000) tokens" in exact.protocol
    stage = only(found, "stage")
    assert (stage.value, stage.at) == (1, {"of": 2})
    for subject in (HALF_KNOWN, trained(HALF_KNOWN, 2.0, name="induction_heads")):
        found = measured(subject, **asked)
        assert only(found, "exact_match").at["learned"] == "zero-shot"
        assert not [m for m in found if m.quantity == "stage"]
    assert "trained on the text of made up alone" in only(measured(HALF_KNOWN, **asked), "exact_match").protocol


def test_texts_are_those_of_the_variant_with_as_many_digits_as_were_learned() -> None:
    subject = trained(HALF_KNOWN, 2.0, digits=3, filler="words", decoys=0.5)  # of which nothing but digits is asked
    variants = (Variant(name="as taught"), Variant(name="longer", settings={"digits": 4}, lengths=(500,)))
    found = measured(subject, lengths=(400,), depths=(1.0,), samples=1, variants=variants)
    assert only(found, "chance", variant="as taught").value == pytest.approx(1e-3)
    assert only(found, "chance", variant="longer").value == pytest.approx(1e-4)
    assert {m.at["length"] for m in found if m.at.get("variant") == "longer" and "length" in m.at} == {500}


def test_equal_seeds_get_equal_texts_and_another_seed_others() -> None:
    asked = {"lengths": (400,), "depths": (1.0,), "samples": 12}
    odd_one_out = scripted(lambda _text, key, _start: 5 if key[0] in "13579" else 0)
    one, again, other = (
        only(measured(replace(odd_one_out, seed=seed), **asked), "exact_match").samples for seed in (0, 0, 1)
    )
    assert one == again != other


def test_a_model_without_likelihood_is_refused_with_the_reason() -> None:
    assert "no likelihood" in (METRIC.cannot(Traits(likelihood=False), PasskeyMetricSettings()) or "")
    assert METRIC.cannot(Traits(likelihood=True), PasskeyMetricSettings()) is None
    assert registry.metric("passkey") is METRIC


def test_lengths_too_short_for_a_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"passkey.lengths: 100; texts of variant plain need at least \d+ tokens"):
        measured(HALF_KNOWN, lengths=(100,))


def test_unknown_settings_of_a_variant_are_refused_by_name() -> None:
    with pytest.raises(SuiteError, match=r"metrics.passkey.variants.odd.settings.decoy: unknown key"):
        Variant(name="odd", settings={"decoy": 1})
    with pytest.raises(SuiteError, match=r"passkey\.digits: 1"):
        parse(PasskeyMetricSettings, {"variants": [{"name": "odd", "settings": {"digits": 1}}]}, "metrics.passkey")


@pytest.mark.parametrize(
    "bad",
    [
        {"lengths": ()}, {"lengths": (800, 400)}, {"depths": ()}, {"depths": (1.2,)}, {"samples": 0}, {"batch": 0},
        {"least_samples": 0}, {"token_budget": 0}, {"proceed": 2}, {"max_seconds": 0}, {"max_state_bytes": 0},
        {"variants": ()}, {"variants": (Variant(name="a"), Variant(name="a"))}, {"always": 0},
        {"variants": (Variant(name="a", lengths=()),)},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"passkey\."):
        PasskeyMetricSettings(**bad)
