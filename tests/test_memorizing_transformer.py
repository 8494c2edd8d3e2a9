"""The Memorizing Transformer against its naive oracle, and the invariants of its specification (numbers in names)."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.memorizing_transformer import (
    ARCHITECTURE,
    Kept,
    MemorizingConfig,
    MemorizingTransformer,
    recall,
    unit,
)
from archbench.contract import PROMISES, Candidate, verify
from archbench.errors import ConfigError
from archbench.flops import count_three_ways
from archbench.model import Batch
from archbench.sizes import SIZES, solve
from archbench.state import tensors
from tests.oracles import memorizing_naive

torch.set_num_threads(1)

BODY: dict[str, Any] = {"vocab_size": 19, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ffn": 10}
CONFIGS = {
    "all retrieved": MemorizingConfig(**BODY, segment=4, top_k=100),
    "nearest three": MemorizingConfig(**BODY, segment=4, top_k=3),
    "short memory": MemorizingConfig(**BODY, segment=4, memory=6, top_k=4, memory_layer=0),
    "grouped": MemorizingConfig(**{**BODY, "n_heads": 4}, n_kv_heads=2, segment=3, memory=5, top_k=2),
    "no positions": MemorizingConfig(**BODY, segment=5, rotary=False, top_k=4, tie_embeddings=True),
    "segments of one": MemorizingConfig(**BODY, segment=1, memory=7, top_k=3),
}


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> MemorizingConfig:
    return CONFIGS[request.param]


def built(config: MemorizingConfig, seed: int = 0, gate: float | None = None) -> MemorizingTransformer:
    """A model in fp64 whose gains, gates and temperatures differ between heads and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = MemorizingTransformer(config, generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3 * (0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)))
        layer = model.remembering()
        layer.log_scale.copy_(torch.linspace(0.5, 1.5, config.n_heads))
        layer.gate.copy_(torch.linspace(-0.7, 1.1, config.n_heads) if gate is None else torch.tensor(gate))
    return model.eval()


def text(batch_size: int, n: int, vocab_size: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


def whole(model: MemorizingTransformer, tokens: Tensor) -> Tensor:
    return model.hidden(tokens, model.initial_layers(len(tokens)))[0]


def kept_after(model: MemorizingTransformer, tokens: Tensor) -> Kept:
    _, layers = model.hidden(tokens, model.initial_layers(len(tokens)))
    return layers[model.config.remembering].kept


def changed(tokens: Tensor, j: int) -> Tensor:
    other = tokens.clone()
    other[:, j] = (other[:, j] + 1) % 19
    return other


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def test_whole_pass_equals_the_naive_oracle(config: MemorizingConfig) -> None:
    model, tokens = built(config), text(2, 17)
    found = model.logits(whole(model, tokens))
    for row in range(2):
        expected = torch.tensor(memorizing_naive.logits(model.state_dict(), config, tokens[row].tolist()))
        torch.testing.assert_close(found[row], expected.double(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16])
def test_i3_any_cut_of_the_text_gives_the_whole_pass(config: MemorizingConfig, chunk: int) -> None:
    model, tokens = built(config), text(2, 25)
    layers, parts = model.initial_layers(2), []
    for piece in tokens.split(chunk, dim=1):
        hidden, layers = model.hidden(piece, layers)
        parts.append(hidden)
    assert (torch.cat(parts, dim=1) - whole(model, tokens)).abs().max() < 1e-10


@torch.no_grad()
def test_i6_changing_a_token_leaves_earlier_outputs_bit_equal(config: MemorizingConfig) -> None:
    model, tokens = built(config), text(1, 17)
    base = whole(model, tokens)
    for j in range(17):
        other = whole(model, changed(tokens, j))
        assert torch.equal(other[:, :j], base[:, :j])
        assert not torch.equal(other[:, j], base[:, j])


@torch.no_grad()
def test_i6_the_memory_carries_a_change_into_later_segments() -> None:
    tokens = text(1, 12)
    for gate, carries in ((0.0, True), (-1e4, False)):
        model = built(CONFIGS["all retrieved"], gate=gate)
        differs = (whole(model, changed(tokens, 1)) != whole(model, tokens)).any(-1)[0]
        assert differs[1:4].all()
        assert differs[4:].all() == carries
        assert differs[4:].any() == carries


@torch.no_grad()
def test_k1_retrieving_as_many_as_are_kept_is_softmax_attention() -> None:
    queries, keys, values = 5 * unit(drawn(2, 3, 7, 8)), unit(drawn(2, 3, 20, 8, seed=1)), drawn(2, 3, 20, 8, seed=2)
    expected = (queries @ keys.transpose(-1, -2)).softmax(-1) @ values
    for top_k in (20, 21, 1000):
        assert (recall(queries, Kept(keys, values), top_k) - expected).abs().max() < 1e-12
    assert (recall(queries, Kept(keys, values), 19) - expected).abs().max() > 1e-4


@torch.no_grad()
def test_k1_the_order_of_what_is_kept_does_not_matter() -> None:
    queries, keys, values = 5 * unit(drawn(1, 2, 7, 8)), unit(drawn(1, 2, 20, 8, seed=1)), drawn(1, 2, 20, 8, seed=2)
    shuffled = torch.randperm(20, generator=Generator().manual_seed(0))
    found = recall(queries, Kept(keys[:, :, shuffled], values[:, :, shuffled]), 5)
    assert (found - recall(queries, Kept(keys, values), 5)).abs().max() < 1e-12


@torch.no_grad()
def test_k1_the_nearest_one_is_copied() -> None:
    """With k = 1 the softmax over one score is 1: the value of the nearest key comes out whole."""
    keys, values = unit(drawn(1, 1, 20, 8, seed=1)), drawn(1, 1, 20, 8, seed=2)
    found = recall(3 * keys[:, :, [11, 4]], Kept(keys, values), 1)
    assert torch.equal(found, values[:, :, [11, 4]])


@torch.no_grad()
@pytest.mark.parametrize("memory", [3, 4, 6, 8, 11])
def test_k2_the_oldest_leave_first_and_capacity_is_kept(memory: int) -> None:
    base = MemorizingConfig(**BODY, segment=4, memory=1000, top_k=1, memory_layer=0)
    everything, limited = built(base), built(replace(base, memory=memory))
    for n in (3, 4, 9, 16, 23):
        tokens = text(1, n)
        complete = kept_after(everything, tokens)
        assert complete.n_tokens == n // 4 * 4
        for way in (1, n):
            layers = limited.initial_layers(1)
            for piece in tokens.split(way, dim=1):
                _, layers = limited.hidden(piece, layers)
            kept = layers[0].kept
            assert kept.n_tokens == min(memory, n // 4 * 4)
            for found, expected in zip(kept, complete, strict=True):
                last = expected[:, :, complete.n_tokens - kept.n_tokens :]
                torch.testing.assert_close(found, last, rtol=0, atol=1e-12)


@torch.no_grad()
def test_k2_what_has_left_the_memory_has_no_influence() -> None:
    """With the memory in the first layer of two and local attention in the other, reach is n_mem before the segment."""
    model, tokens = built(CONFIGS["short memory"]), text(1, 20)
    base = whole(model, tokens)[:, 19]
    reached = [not torch.equal(whole(model, changed(tokens, j))[:, 19], base) for j in range(20)]
    assert not any(reached[: 16 - 6])
    assert any(reached[10:16])
    assert all(reached[16:])


@pytest.mark.parametrize("grad_through_memory", [False, True])
def test_k3_gradients_stop_at_the_memory_unless_asked_for(grad_through_memory: bool) -> None:
    model = built(replace(CONFIGS["all retrieved"], grad_through_memory=grad_through_memory))
    read: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    hidden, layers = model.hidden(text(1, 12), model.initial_layers(1))
    (gradient,) = torch.autograd.grad(hidden[0, 11].sum(), read[0])
    assert gradient[0, :8].abs().amax(-1).bool().all() == grad_through_memory
    assert gradient[0, :8].any() == grad_through_memory
    assert gradient[0, 8:].abs().amax(-1).min() > 0
    assert layers[1].kept.keys.requires_grad == layers[1].kept.values.requires_grad == grad_through_memory


@torch.no_grad()
def test_k4_closed_gates_leave_attention_inside_segments() -> None:
    model, tokens = built(CONFIGS["nearest three"], gate=-1e4), text(2, 15)
    alone = torch.cat([whole(model, segment) for segment in tokens.split(4, dim=1)], dim=1)
    assert (whole(model, tokens) - alone).abs().max() < 1e-12


@torch.no_grad()
def test_k5_nothing_of_the_own_segment_is_retrieved() -> None:
    """With the gate wide open the layer gives only what was retrieved: nothing in the first segment, and later the
    same whatever else stands in the segment of the query."""
    model = built(CONFIGS["nearest three"], gate=1e4)
    layer = model.remembering()
    x = drawn(1, 12, 16)
    out, _ = layer(x, layer.initial_state(1), None)
    assert not out[:, :4].any()
    assert out[:, 4:].abs().amax(-1).min() > 0
    for j in range(8, 12):
        other = x.clone()
        other[:, j] += 1
        moved = (layer(other, layer.initial_state(1), None)[0] != out).any(-1)[0]
        assert moved.tolist() == [i == j for i in range(12)]


@torch.no_grad()
def test_k6_every_text_begins_with_an_empty_memory() -> None:
    model, tokens = built(CONFIGS["all retrieved"]), text(2, 16)
    base = whole(model, tokens)
    assert kept_after(model, text(2, 30, seed=5)).n_tokens == 28
    state = model.initial_layers(2)
    assert state[1].kept.n_tokens == 0
    assert torch.equal(whole(model, tokens), base)


@torch.no_grad()
def test_i19_rows_do_not_touch_each_other() -> None:
    model, tokens = built(CONFIGS["grouped"]), text(3, 16)
    mixed = torch.cat([tokens[:1], text(2, 16, seed=7)])
    assert torch.equal(whole(model, mixed)[0], whole(model, tokens)[0])


@torch.no_grad()
def test_i13_what_is_kept_knows_no_positions() -> None:
    """Keys in the memory are the unit projections, without rotation: the same token at any place of a first layer."""
    model = built(CONFIGS["short memory"])
    kept = kept_after(model, torch.full((1, 12), 7))
    assert kept.n_tokens == 6
    assert (kept.keys - kept.keys[:, :, :1]).abs().max() < 1e-12
    assert (kept.keys.norm(dim=-1) - 1).abs().max() < 1e-9


@torch.no_grad()
def test_state_size_grows_by_segments_to_the_formula() -> None:
    config = MemorizingConfig(**BODY, segment=4, memory=10, top_k=2)
    model = MemorizingTransformer(config).eval()
    sizes = []
    for n in (3, 4, 8, 12, 16, 400):
        _, layers = model.hidden(text(1, n), model.initial_layers(1))
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors(layers)) // 4)
    assert sizes == [config.segment_numbers + config.memory_numbers * kept // 10 for kept in (0, 4, 8, 10, 10, 10)]


def test_a1_memory_of_the_peer_in_the_infini_attention_table() -> None:
    """133.1M numbers in the layer that remembers; with the 50.3M of the paper's Transformer-XL caches, which this model
    does not have, the 183.5M that the table prints as 183M."""
    config = MemorizingConfig(**ARCHITECTURE.published["infini-peer"])
    caches = 12 * 2 * 8 * 128 * 2048
    assert config.memory_numbers == 133_120_000
    assert config.memory_numbers + caches == 183_451_648
    assert round(183 / 1.6) == 114


@torch.no_grad()
def test_i15_bf16_autocast_keeps_the_memory_in_fp32_and_finds_the_same() -> None:
    model, tokens = built(CONFIGS["all retrieved"]).float(), text(2, 20)
    expected = whole(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, half = model.hidden(tokens, model.initial_layers(2))
    assert all(tensor.dtype == torch.float32 for tensor in tensors(half))
    assert (found.float() - expected).abs().max() < 0.15 * expected.abs().max()


def test_i15_bf16_autocast_trains_with_nearly_the_same_gradients() -> None:
    gradients = []
    for half in (False, True):
        model = built(CONFIGS["all retrieved"]).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.next_token_loss(Batch(text(8, 15), 0.0, Generator())).value
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_i16_large_and_small_inputs_stay_finite() -> None:
    for scale in (0.0, 1e-3, 1e3):
        model = built(CONFIGS["nearest three"]).float()
        with torch.no_grad():
            model.embedding.weight.mul_(scale)
        model.next_token_loss(Batch(text(2, 13), 0.0, Generator())).value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gates_learn_faster_and_never_decay() -> None:
    model = MemorizingTransformer(CONFIGS["nearest three"])
    groups = {group.name: group for group in model.phases()[0].groups}
    assert groups["gates"].parameters == [model.remembering().gate]
    assert (groups["gates"].lr_scale, groups["gates"].weight_decay) == (25.0, False)
    assert any(parameter is model.remembering().log_scale for parameter in groups["vectors"].parameters)
    assert torch.equal(model.gates(), torch.full((2,), 0.5))


@pytest.mark.parametrize(("gate", "learns"), [(0.0, True), (-1e4, False)])
def test_a_token_seen_segments_ago_is_learned_to_be_retrieved(gate: float, learns: bool) -> None:
    """One of eight symbols stands somewhere in the first segment, filler follows, and the last token asks for it. The
    memory's values are constants to the loss, yet what asks and what reads them is learned; a closed gate cannot."""
    config = MemorizingConfig(vocab_size=10, d_model=32, n_layers=1, n_heads=2, segment=8, top_k=4, gate_init=gate)
    model = MemorizingTransformer(config, Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        generator = Generator().manual_seed(step)
        symbol, place = torch.randint(2, 10, (32,), generator=generator), torch.randint(8, (32,), generator=generator)
        tokens = torch.zeros(32, 24, dtype=torch.long)
        tokens[torch.arange(32), place] = symbol
        tokens[:, -1] = 1
        loss = torch.nn.functional.cross_entropy(model.logits(whole(model, tokens)[:, -1]), symbol)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = sum(losses[-5:]) / 5
    assert last < 0.2 if learns else last > math.log(8) - 0.2


@pytest.mark.parametrize(("n_layers", "expected"), [(1, 0), (2, 1), (3, 1), (4, 2), (12, 10)])
def test_the_layer_that_remembers_is_the_last_but_one(n_layers: int, expected: int) -> None:
    config = MemorizingConfig(vocab_size=19, n_layers=n_layers)
    assert config.remembering == expected
    with torch.device("meta"):
        model = MemorizingTransformer(config)
    assert [hasattr(block.attention, "gate") for block in model.blocks].index(True) == expected


def random_configs(n: int) -> list[MemorizingConfig]:
    chosen = random.Random(0)
    return [
        MemorizingConfig(
            vocab_size=chosen.randint(2, 100),
            d_model=(heads := chosen.choice([1, 2, 4])) * 2 * chosen.randint(2, 9),
            n_layers=chosen.randint(1, 3),
            n_heads=heads,
            n_kv_heads=chosen.choice([None, 1]),
            d_ffn=chosen.choice([None, chosen.randint(1, 50)]),
            segment=chosen.choice([16, 50, 64, 300]),
            memory=chosen.choice([20, 200, 4096]),
            top_k=chosen.choice([1, 32, 300]),
            tie_embeddings=chosen.random() < 0.5,
            grad_through_memory=chosen.random() < 0.3,
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("config", random_configs(8), ids=str)
def test_i17_parameter_count_is_the_formula(config: MemorizingConfig) -> None:
    """The Transformer's, and a gate and a temperature a head of one layer."""
    with torch.device("meta"):
        model = MemorizingTransformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_parameters


@pytest.mark.parametrize("config", [MemorizingConfig(vocab_size=40, d_model=32), *random_configs(3)], ids=str)
@pytest.mark.parametrize("context", [128, 300])
def test_flops_agree_three_ways(config: MemorizingConfig, context: int) -> None:
    for work, counts in count_three_ways(ARCHITECTURE, config, context).items():
        assert counts.agree, (work, counts.by_way)
        assert len([count for count in counts.by_way.values() if count]) == 3


def test_flops_count_the_search_on_a_long_context() -> None:
    config = MemorizingConfig(vocab_size=40, d_model=16, n_layers=1, n_heads=1)
    for counts in count_three_ways(ARCHITECTURE, config, 2048).values():
        assert counts.disagreement < 1e-6
    with torch.device("meta"):
        formulas = MemorizingTransformer(config).flops()
    # One step after c tokens scores the c // 64 * 64 kept ones: 2 d FLOPs each.
    assert formulas.decode(2048) - formulas.decode(1024) == 2 * 16 * 1024
    assert formulas.decode(8192) == formulas.decode(4096)


VARIANTS = {
    "short segments": MemorizingConfig(**{**BODY, "vocab_size": 17}, segment=5, memory=13, top_k=4),
    "all retrieved": MemorizingConfig(
        **{**BODY, "vocab_size": 17}, n_kv_heads=1, segment=8, memory=24, top_k=99, rotary=False,
        grad_through_memory=True, boundary=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_contract_holds_across_segment_borders(variant: str) -> None:
    subject = Candidate(architecture=ARCHITECTURE, config=VARIANTS[variant])
    broken = [finding for finding in (verify(promise, subject) for promise in PROMISES) if finding.verdict == "broken"]
    assert not broken, broken


@pytest.mark.parametrize("size", ["nano", "micro", "mini", "small"])
def test_sizes_are_met_within_three_percent(size: str) -> None:
    assert abs(solve(ARCHITECTURE, 256, size).actual / SIZES[size] - 1) < 0.03


@pytest.mark.parametrize("name", ARCHITECTURE.published)
def test_published_sizes_can_be_built(name: str) -> None:
    config = MemorizingConfig(**ARCHITECTURE.published[name])
    with torch.device("meta"):
        model = MemorizingTransformer(config)
    assert config.remembering == 8
    assert model.remembering().head_dim == 128


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("segment", 0),
        ("memory", 0),
        ("top_k", 0),
        ("memory_layer", 2),
        ("memory_layer", -1),
        ("temperature", 0.0),
        ("gate_lr_scale", 0.0),
        ("n_kv_heads", 3),
    ],
)
def test_impossible_configs_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"memorizing_transformer\.{field}") as caught:
        MemorizingConfig(**{**BODY, field: value})
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)
