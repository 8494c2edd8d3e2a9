"""The cost metric against formulas written out by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_subject import built, subject_of

from archbench.errors import ConfigError, UnsupportedError
from archbench.metric import Measurement, Subject
from archbench.metrics.cost import METRIC, CostSettings, parameter_counts


def measure(subject: Subject, **settings: Any) -> list[Measurement]:
    found = list(METRIC.measure(subject, CostSettings(**settings)))
    assert {measurement.quantity for measurement in found} == set(METRIC.quantities)
    assert all((measurement.value is None) == bool(measurement.reason) for measurement in found)
    return found


def value(found: list[Measurement], quantity: str, **at: Any) -> float | None:
    (only,) = (m.value for m in found if m.quantity == quantity and at.items() <= dict(m.at).items())
    return only


@pytest.mark.parametrize("seed", range(10))
def test_transformer_parameters_are_the_formula(seed: int) -> None:
    draw = random.Random(seed)
    h, layers, f, v, tie = 2 * draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 40), 256, draw.random() < 0.5
    heads = draw.choice((1, 2, 4))
    groups = draw.choice([g for g in (1, 2, 4) if heads % g == 0])
    d = heads * h
    subject = built(
        "transformer", d_model=d, n_layers=layers, n_heads=heads, n_kv_heads=groups, d_ffn=f, tie_embeddings=tie
    )
    total = (1 if tie else 2) * v * d + layers * (d * (heads + 2 * groups) * h + heads * h * d + 3 * d * f + 2 * d) + d
    # A tied table is one table, and an embedding; an unembedding of its own is none.
    assert parameter_counts(subject.model) == (total, total - v * d)


@pytest.mark.parametrize("seed", range(10))
def test_mamba_parameters_are_the_formula(seed: int) -> None:
    draw = random.Random(seed)
    d, layers, n, w, expand = (draw.randint(low, high) for low, high in ((2, 24), (1, 3), (1, 16), (2, 5), (1, 3)))
    subject = built("mamba", d_model=d, n_layers=layers, d_state=n, d_conv=w, expand=expand)
    inner, r = expand * d, -(-d // 16)
    block = 3 * inner * d + inner * (w + 1 + 2 * r + 1 + 3 * n + 1) + d
    total = layers * block + 256 * d + d
    assert parameter_counts(subject.model) == (total, total - 256 * d)


def test_mamba_check_value() -> None:
    assert parameter_counts(built("mamba", d_model=256, n_layers=8).model)[0] == 3_569_920


def test_what_an_ngram_learned_are_its_counts() -> None:
    assert parameter_counts(built("ngram", order=2).model) == (256 + 256**2, 256 + 256**2)


def test_transformer_state_is_keys_and_values_and_the_pending_token() -> None:
    options = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    found = measure(built("transformer", **options), contexts=(7, 40))
    for context in (7, 40):
        assert value(found, "state_bytes", context=context) == 2 * 3 * 2 * 8 * context * 4 + 8


def test_mamba_state_is_constant() -> None:
    found = measure(built("mamba", d_model=16, n_layers=3, d_state=8, d_conv=4), contexts=(7, 40))
    for context in (7, 40):
        assert value(found, "state_bytes", context=context) == 3 * 32 * (8 + 4 - 1) * 4 + 8


@pytest.mark.parametrize("causal", (0.5, 1.0))
def test_flops_per_token_by_hand(causal: float) -> None:
    d, f, n = 16, 48, 20
    subject = built("transformer", d_model=d, n_layers=2, n_heads=2, d_ffn=f)
    found = measure(subject, contexts=(n,), causal=causal, decode_steps=1)
    matrices = 2 * 2 * (4 * d * d + 3 * d * f)
    unembedding = 2 * 256 * d
    reading = matrices + 2 * 4 * d * causal * n
    writing = matrices + 2 * 4 * d * (n + 1) + unembedding
    for way in ("analytic", "traced", "meta"):
        at = {"count": way, "context": n, "causal": causal}
        assert value(found, "prefill_flops_per_token", **at) == pytest.approx(reading)
        assert value(found, "training_flops_per_token", **at) == pytest.approx(3 * (reading + unembedding))
        assert value(found, "decode_flops_per_token", **at) == pytest.approx(writing)
    for work in ("training", "prefill", "decode"):
        assert value(found, "flops_disagreement", work=work, context=n) == pytest.approx(0, abs=1e-9)
    # The byte codec has one byte a token.
    assert value(found, "training_flops_per_byte", context=n) == pytest.approx(3 * (reading + unembedding))


def test_protocols_tell_convention_and_coverage() -> None:
    found = measure(built("mamba", d_model=8, n_layers=1), contexts=(8,))
    protocol = next(m.protocol for m in found if m.quantity == "prefill_flops_per_token")
    assert "causal attention weighed 0.5" in protocol
    assert "0 calls refused" in protocol


def test_a_wrong_formula_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = built("mamba", d_model=8, n_layers=1)
    right = subject.model.hidden_flops
    monkeypatch.setattr(type(subject.model), "hidden_flops", lambda _self, *given: 1.1 * right(*given))
    found = [m for m in measure(subject, contexts=(8,)) if m.quantity == "flops_disagreement"]
    assert all("FLAGGED" in m.protocol for m in found)
    assert next(m.value for m in found if m.at["work"] == "prefill") == pytest.approx(0.1 / 1.1)


def test_contexts_beyond_the_limit_have_a_reason() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1, max_context=20)
    found = measure(subject, contexts=(10, 20, 30), decode_steps=2)
    assert value(found, "state_bytes", context=30) is None
    assert value(found, "state_bytes", context=20) is not None
    at = {"count": "traced", "context": 20}
    assert value(found, "prefill_flops_per_token", **at) is not None
    assert value(found, "decode_flops_per_token", **at) is None  # no room for another token
    assert value(found, "decode_flops_per_token", count="traced", context=10) is not None
    reasons = {m.reason for m in found if m.at.get("context") == 30}
    assert len(reasons) == 2 and all("limit is 20" in reason for reason in reasons)


def test_an_ngram_is_measured_without_gradients() -> None:
    found = measure(built("ngram", order=2), contexts=(8,))
    assert value(found, "training_flops_per_token", count="analytic") > 0
    assert value(found, "training_flops_per_token", count="traced") is None


def test_measuring_changes_nothing() -> None:
    subject = built("transformer", d_model=8, n_layers=1, n_heads=1)
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    measure(subject, contexts=(8,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert not subject.model.training


def test_too_little_heldout_text_is_said() -> None:
    subject = built("mamba", d_model=8, n_layers=1)
    short = subject_of(subject.model, "mamba", subject.config, text=b"a few words")
    with pytest.raises(UnsupportedError, match="held-out text has 12 tokens"):
        measure(short, contexts=(16,))


@pytest.mark.parametrize("bad", ({"contexts": ()}, {"contexts": (0,)}, {"causal": 0.0}, {"decode_steps": 0}))
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CostSettings(**bad)
