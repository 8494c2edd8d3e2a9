"""Transformer-XL against its naive oracle, and the invariants of its specification (their numbers in the names)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.transformer_xl import (
    ARCHITECTURE,
    TransformerXL,
    TransformerXLConfig,
    pieces,
    realign,
)
from archbench.contract import PROMISES, Candidate, verify
from archbench.errors import ConfigError
from archbench.flops import count_three_ways
from archbench.model import Batch
from archbench.sizes import SIZES, solve
from archbench.state import copy_state, state_bytes, tensors
from tests.oracles import transformer_xl_naive

torch.set_num_threads(1)

BODY: dict[str, Any] = {"vocab_size": 19, "d_model": 12, "n_layers": 2, "n_heads": 2, "d_ffn": 10}
CONFIGS = {
    "memory = segment": TransformerXLConfig(**BODY, segment=4),
    "long memory": TransformerXLConfig(**BODY, segment=3, memory=8),
    "short memory": TransformerXLConfig(**BODY, segment=5, memory=2, tie_embeddings=True),
    "no memory": TransformerXLConfig(**BODY, segment=4, memory=0),
    "clamped": TransformerXLConfig(**BODY, segment=4, clamp=2),
    "segments of one": TransformerXLConfig(**{**BODY, "n_heads": 1}, segment=1, memory=3),
}


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> TransformerXLConfig:
    return CONFIGS[request.param]


def built(config: TransformerXLConfig, seed: int = 0) -> TransformerXL:
    """A model in fp64 whose gains and biases matter and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = TransformerXL(config, generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3 * (0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)))
        for bias in (model.content_bias, model.distance_bias):
            bias.mul_(40.0)
    return model.eval()


def text(batch_size: int, n: int, vocab_size: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


def whole(model: TransformerXL, tokens: Tensor) -> Tensor:
    return model.hidden(tokens, model.initial_layers(len(tokens)))[0]


def changed(tokens: Tensor, j: int) -> Tensor:
    other = tokens.clone()
    other[:, j] = (other[:, j] + 1) % 19
    return other


@torch.no_grad()
def test_whole_pass_equals_the_naive_oracle(config: TransformerXLConfig) -> None:
    model, tokens = built(config), text(2, 13)
    found = model.logits(whole(model, tokens))
    for row in range(2):
        expected = torch.tensor(transformer_xl_naive.logits(model.state_dict(), config, tokens[row].tolist()))
        torch.testing.assert_close(found[row], expected.double(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16])
def test_i3_any_cut_of_the_text_gives_the_whole_pass(config: TransformerXLConfig, chunk: int) -> None:
    model, tokens = built(config), text(2, 25)
    expected = whole(model, tokens)
    layers, parts = model.initial_layers(2), []
    for piece in tokens.split(chunk, dim=1):
        hidden, layers = model.hidden(piece, layers)
        parts.append(hidden)
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-10


@torch.no_grad()
def test_i3_every_single_cut_and_then_tokens_one_by_one() -> None:
    model, tokens = built(CONFIGS["long memory"]), text(1, 20)
    expected = whole(model, tokens)
    for cut in range(1, 20):
        _, layers = model.hidden(tokens[:, :cut], model.initial_layers(1))
        for i in range(cut, 20):
            hidden, layers = model.hidden(tokens[:, i : i + 1], layers)
            assert (hidden[:, 0] - expected[:, i]).abs().max() < 1e-10


@torch.no_grad()
def test_i6_changing_a_token_leaves_earlier_outputs_bit_equal(config: TransformerXLConfig) -> None:
    model, tokens = built(config), text(1, 17)
    base = whole(model, tokens)
    for j in range(17):
        other = whole(model, changed(tokens, j))
        assert torch.equal(other[:, :j], base[:, :j])
        assert not torch.equal(other[:, j], base[:, j])


def test_t1_realigning_equals_gathering_by_distance() -> None:
    generator = Generator().manual_seed(0)
    for n, s in [(1, 1), (1, 6), (4, 4), (3, 8), (5, 5)]:
        by_distance = torch.randn(2, 3, n, s + 1, generator=generator)  # column c: distance s - c
        found = realign(by_distance)
        assert found.shape == (2, 3, n, s)
        for i in range(n):
            for j in range(s - n + i + 1):
                distance = (s - n + i) - j
                assert torch.equal(found[:, :, i, j], by_distance[:, :, i, s - distance])


@torch.no_grad()
def test_t2_without_memory_segments_know_nothing_of_each_other() -> None:
    config = CONFIGS["no memory"]
    model, tokens = built(config), text(2, 14)
    alone = torch.cat([whole(model, piece) for piece in tokens.split(config.segment, dim=1)], dim=1)
    assert (alone - whole(model, tokens)).abs().max() < 1e-12
    remembering = built(replace(config, memory=4))
    assert (whole(remembering, tokens) - alone)[:, 4:].abs().min(dim=-1).values.max() > 1e-3


def test_t3_no_gradient_enters_the_memory() -> None:
    """The last segment's output has a gradient at the embeddings of its own segment, exactly none at earlier ones,
    though the tokens there matter."""
    config = CONFIGS["memory = segment"]
    model, tokens = built(config), text(1, 12)
    read: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    hidden = whole(model, tokens)
    (gradient,) = torch.autograd.grad(hidden[0, 11].sum(), read[0])
    assert not gradient[0, :8].any()
    assert gradient[0, 8:].abs().amax(dim=-1).min() > 0
    with torch.no_grad():
        assert not torch.equal(whole(model, changed(tokens, 7))[0, 11], hidden[0, 11])


@pytest.mark.parametrize("name", ["memory = segment", "long memory", "short memory", "no memory"])
def test_t3_gradients_equal_training_segment_by_segment(name: str) -> None:
    """One loss, two ways: all segments at once, and one after another with a detached memory."""
    config = CONFIGS[name]
    model, tokens = built(config), text(1, 18)
    loss = model.next_token_loss(Batch(tokens, 0.0, Generator())).value
    loss.backward()
    weights = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    naive = {**weights, "unembedding.weight": weights.get("unembedding.weight", weights["embedding.weight"])}
    expected = transformer_xl_naive.loss(naive, config, tokens[0])
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-6  # the trainer's loss is fp32
    for key, parameter in model.named_parameters():
        # Gains are compared without what reaches them through the memory: there, too, the gradient stops.
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-5, atol=1e-6, msg=key)


@torch.no_grad()
def test_t4_reach_is_one_memory_a_layer() -> None:
    config = TransformerXLConfig(**{**BODY, "n_layers": 3}, segment=4)
    model, tokens = built(config), text(1, 32)
    last, begin = 31, 28
    base = whole(model, tokens)[:, last]
    differs = [not torch.equal(whole(model, changed(tokens, j))[:, last], base) for j in range(32)]
    reach = config.n_layers * config.memory_length
    assert not any(differs[: begin - reach])
    assert all(differs[begin - reach :])


@torch.no_grad()
def test_t5_a_memory_as_long_as_the_text_is_full_relative_attention() -> None:
    short = built(TransformerXLConfig(**BODY, segment=3, memory=30))
    full = built(TransformerXLConfig(**BODY, segment=30, memory=0))
    tokens = text(2, 25)
    assert (whole(short, tokens) - whole(full, tokens)).abs().max() < 1e-10


@torch.no_grad()
def test_the_memory_length_can_grow_after_training() -> None:
    """Weights do not depend on it: the authors evaluate with a longer memory than they train with."""
    trained, longer = (
        built(CONFIGS["memory = segment"]),
        TransformerXL(TransformerXLConfig(**BODY, segment=2, memory=9)),
    )
    longer.double().load_state_dict(trained.state_dict())
    assert whole(longer, text(1, 15)).isfinite().all()


@torch.no_grad()
def test_i1_state_size_is_constant_and_as_the_formula() -> None:
    config = TransformerXLConfig(**BODY, segment=4, memory=6)
    model = TransformerXL(config).eval()
    expected = 4 * (config.memory_numbers + 2 * config.d_model * config.segment * config.n_layers)
    for n in (1, 4, 40, 4000):
        _, layers = model.hidden(text(1, n), model.initial_layers(1))
        assert state_bytes(layers) == expected


def test_a1_memory_of_the_peer_in_the_infini_attention_table() -> None:
    """(d_k + d_v) H N l = 50,331,648 numbers; the open segment's keys and values come on top in the live state."""
    config = TransformerXLConfig(**ARCHITECTURE.published["infini-peer"])
    with torch.device("meta"):
        state = TransformerXL(config).initial_layers(1)
    assert config.memory_numbers == 50_331_648
    live = sum(tensor.numel() for tensor in tensors(state))
    assert live * config.memory_length / (config.memory_length + config.segment) == 50_331_648


@torch.no_grad()
def test_i15_bf16_autocast_keeps_the_state_in_fp32_and_is_near() -> None:
    model, tokens = built(CONFIGS["long memory"]).float(), text(2, 20)
    expected = whole(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, half = model.hidden(tokens, model.initial_layers(2))
    assert all(tensor.dtype == torch.float32 for tensor in tensors(half))
    assert (found.float() - expected).abs().max() < 0.15 * expected.abs().max()


def test_i15_bf16_autocast_trains_with_nearly_the_same_gradients() -> None:
    gradients = []
    for half in (False, True):
        model = built(CONFIGS["memory = segment"]).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.next_token_loss(Batch(text(8, 13), 0.0, Generator())).value
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_i16_large_and_small_inputs_stay_finite() -> None:
    for scale in (1e-3, 1e3):
        model = built(CONFIGS["memory = segment"]).float()
        with torch.no_grad():
            model.embedding.weight.mul_(scale)
        model.next_token_loss(Batch(text(2, 13), 0.0, Generator())).value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_i19_rows_do_not_touch_each_other_and_states_begin_empty() -> None:
    model, tokens = built(CONFIGS["long memory"]), text(3, 16)
    base = whole(model, tokens)
    mixed = torch.cat([tokens[:1], text(2, 16, seed=7)])
    assert torch.equal(whole(model, mixed)[0], base[0])
    _, layers = model.hidden(text(3, 40, seed=3), model.initial_layers(3))
    del layers
    assert torch.equal(whole(model, tokens), base)


@torch.no_grad()
def test_what_lies_beyond_the_valid_places_never_matters() -> None:
    model = built(CONFIGS["long memory"])
    for n in (2, 4, 7, 13):
        _, layers = model.hidden(text(1, n), model.initial_layers(1))
        spoiled, N, M = copy_state(layers), 3, 8
        for buffer in spoiled.buffers:
            buffer[:, M + n % N :] = float("nan")
            buffer[:, : M - min(M, n - n % N)] = float("nan")
        more = text(1, 9, seed=4)
        assert torch.equal(model.hidden(more, spoiled)[0], model.hidden(more, layers)[0])


def test_pieces_cover_the_tokens_once_and_keep_to_segments() -> None:
    for start in range(9):
        for n in range(1, 20):
            plan = list(pieces(start, n, 4, 6))
            assert plan[0].start == start
            for piece, following in zip(plan, [*plan[1:], None], strict=True):
                stop = piece.start + piece.rows * piece.n
                assert stop == (following.start if following else start + n)
                assert piece.start % 4 + piece.n <= 4
                assert piece.behind == piece.start % 4 + min(6, piece.start // 4 * 4)


def random_configs(n: int) -> list[TransformerXLConfig]:
    chosen = random.Random(0)
    return [
        TransformerXLConfig(
            vocab_size=chosen.randint(2, 100),
            d_model=(heads := chosen.choice([1, 2, 4])) * 2 * chosen.randint(2, 9),
            n_layers=chosen.randint(1, 3),
            n_heads=heads,
            d_ffn=chosen.choice([None, chosen.randint(1, 50)]),
            segment=chosen.choice([16, 50, 64, 300]),
            memory=chosen.choice([None, 0, 20, 200]),
            tie_embeddings=chosen.random() < 0.5,
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("config", random_configs(8), ids=str)
def test_i17_parameter_count_is_the_formula(config: TransformerXLConfig) -> None:
    """The Transformer's, a d x d matrix of distances a layer, and two biases of d numbers."""
    with torch.device("meta"):
        model = TransformerXL(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_parameters


@pytest.mark.parametrize("config", [TransformerXLConfig(vocab_size=40, d_model=32), *random_configs(3)], ids=str)
@pytest.mark.parametrize("context", [128, 300])
def test_flops_agree_three_ways(config: TransformerXLConfig, context: int) -> None:
    for work, counts in count_three_ways(ARCHITECTURE, config, context).items():
        assert counts.agree, (work, counts.by_way)
        assert len([count for count in counts.by_way.values() if count]) == 3


def test_flops_agree_on_a_long_context() -> None:
    config = TransformerXLConfig(vocab_size=40, d_model=16, n_layers=1, n_heads=1)
    for counts in count_three_ways(ARCHITECTURE, config, 2048).values():
        assert counts.disagreement < 1e-6


VARIANTS = {
    "short segments": TransformerXLConfig(vocab_size=17, d_model=32, n_layers=2, n_heads=2, segment=5, memory=7),
    "no memory": TransformerXLConfig(
        vocab_size=17, d_model=32, n_layers=2, n_heads=2, segment=8, memory=0, tie_embeddings=True, boundary=3
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_contract_holds_across_segment_borders(variant: str) -> None:
    subject = Candidate(architecture=ARCHITECTURE, config=VARIANTS[variant])
    broken = [finding for finding in (verify(promise, subject) for promise in PROMISES) if finding.verdict == "broken"]
    assert not broken, broken


def test_biases_and_vectors_do_not_decay() -> None:
    model = TransformerXL(CONFIGS["memory = segment"])
    groups = {group.name: group for group in model.phases()[0].groups}
    spared = {id(parameter) for parameter in groups["vectors"].parameters}
    assert {id(model.content_bias), id(model.distance_bias)} <= spared
    assert not groups["vectors"].weight_decay


@pytest.mark.parametrize("size", ["nano", "micro", "mini", "small"])
def test_sizes_are_met_within_three_percent(size: str) -> None:
    assert abs(solve(ARCHITECTURE, 256, size).actual / SIZES[size] - 1) < 0.03


@pytest.mark.parametrize(
    ("name", "printed"), [("enwik8-12l", 41e6), ("enwik8-24l", 277e6), ("wikitext103-base", 151e6)]
)
def test_published_sizes_have_the_parameters_printed(name: str, printed: float) -> None:
    config = TransformerXLConfig(**ARCHITECTURE.published[name])
    assert config.n_parameters == pytest.approx(printed, rel=0.01)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("d_model", 0),
        ("n_layers", 0),
        ("n_heads", 5),
        ("d_ffn", 0),
        ("segment", 0),
        ("memory", -1),
        ("clamp", 0),
        ("norm_eps", 0.0),
        ("boundary", 19),
    ],
)
def test_impossible_configs_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"transformer_xl\.") as caught:
        TransformerXLConfig(**{**BODY, field: value})
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transformer_xl\.d_model: 15 is odd"):
        TransformerXLConfig(**{**BODY, "d_model": 15, "n_heads": 3})
