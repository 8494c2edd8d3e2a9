"""Segment-local attention and what it shares with other models that read by segments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures import transformer
from archbench.architectures.local import ARCHITECTURE, Local, LocalConfig
from archbench.errors import ConfigError
from archbench.flops import count_three_ways
from archbench.ops import backends
from archbench.segments import carried_over, segment_angles, stretches
from archbench.sizes import solve
from archbench.state import state_bytes
from tests.oracles import infini_naive

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 16, "n_layers": 2, "n_heads": 4, "segment": 5}
CONFIGS = {
    "MHA": LocalConfig(**SIZES),
    "GQA tied": LocalConfig(**SIZES, n_kv_heads=2, tie_embeddings=True, rope_theta=100.0),
    "MQA without positions": LocalConfig(**{**SIZES, "segment": 3}, n_kv_heads=1, rotary=False, d_ffn=7),
}


def built(config: LocalConfig, seed: int = 0) -> Local:
    """A model whose gains differ from one and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = Local(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3 * (0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)))
    return model.eval()


def text(batch_size: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(19, (batch_size, n), generator=Generator().manual_seed(seed))


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model.logits(model.hidden(tokens, model.initial_layers(tokens.shape[0]))[0])


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> LocalConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize(
    ("n", "filled", "expected"),
    [
        (10, 3, [1, 8, 1]),
        (10, 0, [8, 2]),
        (8, 0, [8]),
        (4, 0, [4]),
        (3, 0, [3]),
        (1, 3, [1]),
        (2, 1, [2]),
        (3, 1, [3]),
        (5, 3, [1, 4]),
        (2, 3, [1, 1]),
        (0, 2, []),
    ],
)
def test_new_tokens_fall_into_the_rest_of_a_segment_whole_ones_and_a_beginning(
    n: int, filled: int, expected: list[int]
) -> None:
    assert stretches(n, filled, 4) == expected


def test_stretches_never_cross_a_segments_end() -> None:
    for length in (1, 2, 5):
        for filled in range(length):
            for n in range(1, 14):
                found, at = stretches(n, filled, length), filled
                assert sum(found) == n
                for stretch in found:
                    assert at + stretch <= length or (at == 0 and stretch % length == 0)
                    at = (at + stretch) % length


def test_positions_restart_in_every_segment() -> None:
    whole = segment_angles(30, 0, 8, 4, 1e4, torch.device("cpu"))
    assert whole.cos.shape == (8, 4)
    for filled, n in ((3, 2), (3, 5), (3, 6), (7, 1)):
        part = segment_angles(n, filled, 8, 4, 1e4, torch.device("cpu"))
        for ours, theirs in zip(part.at(filled, min(n, 8 - filled)), whole.at(filled, min(n, 8 - filled)), strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_whole_pass_and_steps_equal_the_naive_oracle(config: LocalConfig) -> None:
    model, tokens = built(config), text(1, 13)
    expected = torch.tensor(infini_naive.logits(model.state_dict(), config, tokens[0].tolist()))
    torch.testing.assert_close(logits_of(model, tokens)[0], expected, rtol=1e-4, atol=1e-5)
    layers, steps = model.initial_layers(1), []
    for i in range(13):
        hidden, layers = model.hidden(tokens[:, i : i + 1], layers)
        steps.append(model.logits(hidden)[0, 0])
    torch.testing.assert_close(torch.stack(steps), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_i03_two_cuts_anywhere_change_nothing(config: LocalConfig) -> None:
    model, tokens = built(config), text(2, 14)
    whole = logits_of(model, tokens)
    for first in range(1, 13):
        for second in range(first + 1, 14):
            layers, pieces = model.initial_layers(2), []
            for piece in tokens.split([first, second - first, 14 - second], dim=1):
                hidden, layers = model.hidden(piece, layers)
                pieces.append(model.logits(hidden))
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_in_pieces(config: LocalConfig) -> None:
    found = []
    for cut in ([14], [3, 4, 7], [1] * 14):
        model, layers = built(config), None
        layers, total = model.initial_layers(2), torch.zeros(())
        for piece in text(2, 14).split(cut, dim=1):
            hidden, layers = model.hidden(piece, layers)
            total = total + model.logits(hidden).logsumexp(-1).sum()
        total.backward()
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inside_a_segment_it_is_the_transformer_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "reference")  # the Transformer's quick steps read a few tokens otherwise
    config = replace(CONFIGS["MHA"], segment=9)
    model = built(config)
    plain = transformer.Transformer(transformer.TransformerConfig(vocab_size=19, d_model=16, n_layers=2, n_heads=4))
    plain.load_state_dict(model.state_dict())
    tokens = text(2, 12)
    assert torch.equal(logits_of(model, tokens)[:, :9], logits_of(plain, tokens[:, :9]))
    assert torch.equal(logits_of(model, tokens[:, :7]), logits_of(plain, tokens[:, :7]))
    assert not torch.allclose(logits_of(model, tokens)[:, 9:], logits_of(plain, tokens)[:, 9:])


@torch.no_grad()
def test_i06_nothing_crosses_a_segments_end(config: LocalConfig) -> None:
    model, tokens, N = built(config), text(1, 15), config.segment
    base = logits_of(model, tokens)
    for at in range(15):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 19
        differs = (logits_of(model, changed) != base).any(-1)[0]
        assert differs.tolist() == [at <= p < (at // N + 1) * N for p in range(15)]


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [0, 1, 4, 5, 64])
def test_the_state_is_one_segment_of_keys_and_values(config: LocalConfig, n_tokens: int) -> None:
    model = built(config)
    state = model.prefill(text(3, n_tokens), model.initial_state(3))
    assert state_bytes(state) == 3 * (4 * config.segment_numbers + 8)  # and the pending token
    assert config.segment_numbers == 2 * config.segment * config.n_layers * config.kv_heads * config.head_dim


@pytest.mark.parametrize("segment", [50, 64])
@pytest.mark.parametrize("context", [128, 300, 1024])
def test_flops_agree_three_ways(segment: int, context: int) -> None:
    config = LocalConfig(vocab_size=16, d_model=16, n_layers=1, n_heads=2, segment=segment, d_ffn=8)
    for counts in count_three_ways(ARCHITECTURE, config, context, steps=2).values():
        assert not counts.missing
        assert counts.disagreement < 1e-9


@pytest.mark.parametrize("size", ["nano", "micro", "mini", "small"])
def test_i17_sizes_are_the_transformers(size: str) -> None:
    ours, theirs = solve(ARCHITECTURE, 256, size), solve(transformer.ARCHITECTURE, 256, size)
    assert carried_over(theirs.config, LocalConfig).items() <= vars(ours.config).items()
    assert ours.actual == theirs.actual == ours.config.n_parameters


@pytest.mark.parametrize(
    ("field", "value"), [("segment", 0), ("n_heads", 3), ("n_kv_heads", 3), ("d_ffn", 0), ("norm_eps", 0.0)]
)
def test_impossible_configs_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"^local\.") as caught:
        LocalConfig(**{**SIZES, field: value})
    assert str(value) in str(caught.value)
