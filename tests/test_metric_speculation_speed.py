"""The worth of drafting, on scripted models whose acceptance and costs are known, and on two real ones."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from tiny_subject import built, made_up_text, subject_of
from torch import Generator, Tensor

from archbench import registry
from archbench.clocks import CLOCKS
from archbench.codec import ByteCodec, train_bpe
from archbench.data.corpus import Corpus
from archbench.data.document import Document
from archbench.drafting import Drafted
from archbench.errors import ConfigError, UnsupportedError
from archbench.metric import Companion, Measurement, Probe, Subject
from archbench.metrics.speculation_speed import METRIC, Pair, SpeculationSpeedSettings, compare
from archbench.model import Emission, FlopFormulas, Likelihood, Phase, SequenceModel, Speculative, Traits
from archbench.ops import backends
from archbench.prompts import Prompts, heldout_stream
from archbench.sampling import GREEDY, Sampling
from archbench.timing import interleave

PLAIN_S, DRAFT_S = 0.004, 0.010


class Clock:
    """Shows the seconds that scripted models said they took, so that ratios are exact on any machine. CPU time goes at
    half the pace."""

    def __init__(self) -> None:
        self.now = 0.0


CLOCK = Clock()


@pytest.fixture
def scripted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLOCKS, "wall", lambda: CLOCK.now)
    monkeypatch.setitem(CLOCKS, "cpu", lambda: CLOCK.now / 2)


class Scripted(SequenceModel, Likelihood):
    """Every step takes `seconds` and writes the counts of `cycle` in turn; the text counts up. The state is (step, last
    token) of each row. Where `slip` is set, the token written there is one too far."""

    vocab_size = 256

    def __init__(self, cycle: tuple[int, ...], seconds: float, slip: int | None = None, tie: bool = False) -> None:
        super().__init__()
        self.register_buffer("cycle", torch.tensor(cycle))
        self.seconds, self.slip, self.tie = seconds, slip, tie
        self.calls: list[str] = []

    def phases(self) -> list[Phase]:
        raise NotImplementedError

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2, dtype=torch.long)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        return state

    def score(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens are equally likely; without `tie` each is e times as likely as the one before it."""
        logits = torch.zeros(256) if self.tie else torch.arange(256.0)
        return logits.log_softmax(0).expand(*tokens.shape, 256), state

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        CLOCK.now += self.seconds
        self.calls.append(type(self).__name__)
        counts = self.cycle[state[:, 0] % len(self.cycle)]
        tokens = 1 + (state[:, 1:] + torch.arange(int(self.cycle.max()))) % 250
        if self.slip is not None:
            tokens = torch.where(tokens == self.slip, tokens + 1, tokens)
        return Emission(tokens, counts, torch.stack([state[:, 0] + 1, state[:, 1] + counts], dim=1))


class Drafting(Scripted, Speculative):
    """Drafts by a script; its plain way writes one token in PLAIN_S seconds."""

    def __init__(self, cycle: tuple[int, ...], seconds: float = DRAFT_S, **slips: Any) -> None:
        super().__init__(cycle, seconds, **slips)
        self.other = Scripted((1,), PLAIN_S, tie=self.tie)
        self.other.calls = self.calls

    def plain(self) -> Scripted:
        return self.other


def measured(subject: Subject, **options: Any) -> dict[tuple[str, str, str], Measurement]:
    """By quantity, sampling and clock (or way of decoding and clock)."""
    small = {"context": 8, "new_tokens": 12, "batches": (1,), "steps": 4, "prompts": 4, "repeats": 6}
    outcome = interleave(METRIC, {"x": subject}, SpeculationSpeedSettings(**{**small, **options}))["x"]
    if isinstance(outcome, Exception):
        raise outcome
    return {
        (m.quantity, m.at["sampling"], " ".join(str(m.at[n]) for n in ("decoding", "clock") if n in m.at)): m
        for m in outcome
    }


def value(found: dict[tuple[str, str, str], Measurement], quantity: str, clock: str = "wall") -> float:
    """Of the greedy probe."""
    got = found[quantity, "greedy", clock].value
    assert got is not None
    return got


def test_known_acceptance_and_costs_give_the_known_speedup(scripted_clock: None) -> None:
    """Steps of 2, 4 and 3 tokens in 10 ms against 1 token in 4 ms: tau 3, break-even 2.5, speed-up 1.2."""
    found = measured(subject_of(Drafting((2, 4, 3)), speculates=True), new_tokens=18, temperatures=(0.0,))
    assert value(found, "tokens_per_step", "") == 3.0
    for clock, pace in (("wall", 1.0), ("cpu", 0.5)):
        assert value(found, "break_even", clock) == pytest.approx(2.5)
        assert value(found, "speedup", clock) == pytest.approx(1.2)
        assert value(found, "predicted_speedup", clock) == pytest.approx(1.2)
        assert value(found, "time_per_token", f"plain {clock}") == pytest.approx(pace * PLAIN_S)
        assert value(found, "time_per_token", f"speculative {clock}") == pytest.approx(pace * DRAFT_S / 3)
    speedup = found["speedup", "greedy", "wall"]
    assert len(speedup.samples) == 6
    assert speedup.low == pytest.approx(1.2) == speedup.high


def test_the_prediction_can_be_wrong(scripted_clock: None) -> None:
    """Plain steps become dearer after the first eight: single steps, timed at the beginning, do not know it."""
    model = Drafting((2,), seconds=0.004)
    model.other = LaterDearer((1,), PLAIN_S)
    found = measured(subject_of(model, speculates=True), new_tokens=16, steps=4, temperatures=(0.0,))
    assert value(found, "break_even") == pytest.approx(1.0)
    assert value(found, "predicted_speedup") == pytest.approx(2.0)
    assert value(found, "speedup") == pytest.approx(2.0 * (8 + 8 * 3) / 16)


class LaterDearer(Scripted):
    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        self.seconds = PLAIN_S if int(state[0, 0]) < 8 else 3 * PLAIN_S
        return super().decode_step(state, sampling, generator)


def test_who_goes_first_alternates_and_batches_count_rows() -> None:
    model = Drafting((2,))
    found = measured(
        subject_of(model, speculates=True), batches=(3,), temperatures=(0.0,), new_tokens=4, steps=2, prompts=3,
        repeats=2,
    )  # fmt: skip
    calls = ["D" if name == "Drafting" else "P" for name in model.calls]
    comparison, first = "DD" + "PPPP", "DD" + "PPPP" + "DPDP"
    second = "PPPP" + "DD" + "PDPD"
    assert "".join(calls) == comparison + first + second + first
    assert value(found, "tokens_per_step", "") == 2.0


def test_equal_texts_are_proved_token_by_token() -> None:
    found = measured(subject_of(Drafting((2, 4, 3)), speculates=True), temperatures=(0.0,), prompts=5)
    assert value(found, "identical_tokens", "") == 1.0
    assert value(found, "compared_tokens", "") == 5 * 12
    assert value(found, "unexplained_differences", "") == 0


@pytest.mark.parametrize(("tie", "unexplained"), [(False, 5), (True, 0)])
def test_a_difference_is_found_where_it_begins(tie: bool, unexplained: int) -> None:
    """The seventh token slips: six are equal, one differs, what follows is not compared."""
    found = measured(subject_of(Drafting((2, 4, 3), slip=7, tie=tie), speculates=True), temperatures=(0.0,), prompts=5)
    assert value(found, "identical_tokens", "") == pytest.approx(6 / 7)
    assert value(found, "compared_tokens", "") == 5 * 7
    assert value(found, "unexplained_differences", "") == unexplained


def test_mtp_speculates_exactly_and_both_samplings_are_timed() -> None:
    subject = built("mtp", d_model=16, n_layers=2, n_heads=1, n_future=3)
    assert registry.architecture("mtp").traits(subject.config).speculates
    found = measured(subject, batches=(1, 2), new_tokens=6, prompts=2, steps=3, repeats=2)
    assert value(found, "identical_tokens", "") == 1.0
    for sampling in ("greedy", "temperature 1"):
        for clock in ("wall", "cpu"):
            for quantity in ("speedup", "break_even", "predicted_speedup"):
                got = found[quantity, sampling, clock].value
                assert got is not None and got > 0
    assert ("identical_tokens", "temperature 1", "") not in found


def test_the_plain_way_shares_the_weights_and_drops_what_only_drafting_needs() -> None:
    model = built("mtp", d_model=16, n_layers=3, n_heads=1, n_future=3, head_type="layer", match="trunk").model
    assert isinstance(model, Speculative)
    plain = model.plain()
    assert [p.data_ptr() for p in plain.parameters()] == [p.data_ptr() for p in model.parameters()]
    own, bare = (m.initial_state(1) for m in (model, plain))
    assert len(bare.memory.caches) == 0 < len(own.memory.caches)
    assert not plain.training


def test_a_model_with_a_drafter_is_compared_in_the_same_way() -> None:
    """The verifier drafts for itself byte by byte: every draft holds, so each step writes them all."""
    transformer = registry.architecture("transformer")
    config = transformer.config(vocab_size=256, d_model=16, n_layers=1, n_heads=1)
    verifier = transformer.build(config, Generator().manual_seed(0)).eval()
    model = Drafted(verifier, verifier, ByteCodec(), n_subwords=4)
    assert model.plain() is verifier
    document = Document("text", made_up_text())
    stream = heldout_stream(Corpus(name="made up", train=(), heldout=(document,), sha256=""), ByteCodec(), 8)
    pair = Pair(model, model.plain(), Prompts(stream, 0), 0)
    (comparison,) = compare(model, model.plain(), pair.take(1, 8), 12, batch=1)
    assert (comparison.identical, comparison.differing) == (12, 0)
    run = pair.continued(model, pair.take(1, 8), 12, GREEDY)
    assert run.tokens / run.steps > 1
    assert pair.break_even(pair.take(1, 8), 3, GREEDY, True)["wall"] > 1


def test_models_that_do_not_draft_say_so() -> None:
    settings = SpeculationSpeedSettings()
    assert METRIC.cannot(Traits(likelihood=True, speculates=True), settings) is None
    one = METRIC.cannot(Traits(likelihood=True), settings)
    assert one == "the model writes one token a step by design: it does not draft"
    assert "4 tokens a step by design" in (METRIC.cannot(Traits(likelihood=False, stride=4), settings) or "")
    with pytest.raises(UnsupportedError, match="does not draft"):
        METRIC.probes(subject_of(Scripted((1,), 0.0)), settings)


def test_a_context_limit_is_a_reason() -> None:
    subject = built("mtp", d_model=16, n_layers=2, n_heads=1, n_future=3, max_context=40)
    settings = SpeculationSpeedSettings(context=8, new_tokens=12, batches=(1, 2), steps=4, prompts=2, repeats=1)
    found = METRIC.probes(subject, settings)
    places = [dict(p.at) for p in found if isinstance(p, Probe)]
    assert {place["batch"] for place in places} == {1, 2}  # 8 + 2 * 12 + 3 tokens at most
    longer = METRIC.probes(subject, SpeculationSpeedSettings(context=8, new_tokens=31, prompts=2, repeats=1))
    assert all(isinstance(m, Measurement) and "context limit is 40" in m.reason for m in longer)


@pytest.mark.parametrize(
    "bad", [{"context": 0}, {"batches": ()}, {"temperatures": ()}, {"temperatures": (-1.0,)}, {"steps": 1}]
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SpeculationSpeedSettings(**bad)


def test_a_cell_of_its_run_drafts_for_a_byte_model() -> None:
    """Greedy text is the byte model's own, and the record names who drafts."""
    codec = train_bpe([Document("text", made_up_text())], 300)
    found = registry.architecture("mamba")
    config = found.config(vocab_size=codec.vocab_size, d_model=16, n_layers=1)
    drafter = found.build(config, torch.Generator().manual_seed(1)).eval()
    subject = dataclasses.replace(built("mamba", d_model=16, n_layers=1), beside={"small": Companion(drafter, codec)})
    settings = SpeculationSpeedSettings(
        drafter="small", context=16, new_tokens=12, batches=(1,), temperatures=(0.0,), steps=3, prompts=3, repeats=2
    )
    outcome = interleave(METRIC, {"own": subject}, settings)["own"]
    assert not isinstance(outcome, Exception)
    values = {m.quantity: m for m in outcome if m.at.get("clock", "wall") == "wall"}
    assert values["identical_tokens"].value == 1
    assert values["compared_tokens"].value == 36
    assert (values["tokens_per_step"].value or 0) >= 1
    assert "'small'" in values["speedup"].protocol


def test_a_drafter_asks_for_one_greedy_text() -> None:
    with pytest.raises(ConfigError, match="one greedy text"):
        SpeculationSpeedSettings(drafter="small", batches=(1, 4), temperatures=(0.0,))
    settings = SpeculationSpeedSettings(drafter="small", batches=(1,), temperatures=(0.0,))
    assert METRIC.cannot(Traits(likelihood=True), settings) is None
    assert METRIC.cannot(Traits(likelihood=True, speculates=True), settings) == "it drafts by itself"
    assert METRIC.beside(settings) == ("small",)


def test_both_ways_run_at_the_level_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the level is a coordinate, since a speed-up at one says nothing of another."""
    seen: list[str] = []
    plain = Pair.continued

    def continued(pair: Pair, *given: Any) -> Any:
        seen.append(os.environ.get(backends.VARIABLE, "none"))
        return plain(pair, *given)

    monkeypatch.setattr(Pair, "continued", continued)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    settings = SpeculationSpeedSettings(
        level="lean", context=8, new_tokens=6, batches=(1,), temperatures=(0.0,), steps=2, prompts=2, repeats=1
    )
    subject = built("mtp", d_model=16, n_layers=2, n_heads=1, n_future=2)
    (outcome,) = interleave(METRIC, {"mtp": dataclasses.replace(subject, model=subject.model)}, settings).values()
    assert not isinstance(outcome, Exception)
    assert set(seen) == {"lean"} and all(m.at["level"] == "lean" for m in outcome)
    with pytest.raises(ConfigError, match=r"speculation_speed\.level: leen: no such level; did you mean 'lean'"):
        SpeculationSpeedSettings(level="leen")
