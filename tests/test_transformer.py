"""The Transformer against its naive oracle, and the invariants of its specification (their numbers in the names)."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.transformer import ARCHITECTURE, Transformer, TransformerConfig
from archbench.errors import ConfigError, ContextOverflow
from archbench.layers import KVCache, rotary_angles, rotate
from archbench.model import Batch, ParameterGroup
from archbench.ops.attention import causal_attention
from archbench.sampling import GREEDY
from archbench.state import State, copy_state, map_state
from tests.oracles import transformer_naive

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 16, "n_layers": 2, "n_heads": 4}
CONFIGS = {
    "MHA": TransformerConfig(**SIZES),
    "MHA tied": TransformerConfig(**SIZES, tie_embeddings=True),
    "GQA": TransformerConfig(**SIZES, n_kv_heads=2, rope_theta=100.0),
    "MQA": TransformerConfig(**SIZES, n_kv_heads=1, d_ffn=7, norm_eps=1e-2),
    "MQA tied": TransformerConfig(**{**SIZES, "n_layers": 1}, n_kv_heads=1, tie_embeddings=True),
}


def built(config: TransformerConfig, seed: int = 0, scale: float = 1.3) -> Transformer:
    """A model whose gains differ from one and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = Transformer(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale * (0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)))
    return model.eval()


def text(batch_size: int, n: int, vocab_size: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> TransformerConfig:
    return CONFIGS[request.param]


@torch.no_grad()
def test_whole_pass_equals_the_naive_oracle(config: TransformerConfig) -> None:
    model, tokens = built(config), text(2, 9)
    hidden, _ = model.hidden(tokens, model.initial_layers(2))
    for row in range(2):
        expected = torch.tensor(transformer_naive.logits(model.state_dict(), config, tokens[row].tolist()))
        torch.testing.assert_close(model.logits(hidden)[row], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_step_by_step_equals_the_naive_oracle(config: TransformerConfig) -> None:
    model, tokens = built(config), text(1, 9)
    expected = transformer_naive.logits(model.state_dict(), config, tokens[0].tolist())
    layers = model.initial_layers(1)
    for i in range(9):
        hidden, layers = model.hidden(tokens[:, i : i + 1], layers)
        torch.testing.assert_close(model.logits(hidden)[0, 0], torch.tensor(expected[i]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_score_reads_a_boundary_before_the_text() -> None:
    config = replace(CONFIGS["GQA"], boundary=5)
    model, tokens = built(config), text(1, 6)
    expected = transformer_naive.logits(model.state_dict(), config, [5, *tokens[0, :-1].tolist()])
    found, _ = model.score(tokens, model.initial_state(1))
    torch.testing.assert_close(found[0], torch.tensor(expected).log_softmax(-1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_b2_changing_a_token_leaves_earlier_logits_bit_equal(config: TransformerConfig) -> None:
    model, tokens = built(config), text(1, 12)
    base, _ = model.hidden(tokens, model.initial_layers(1))
    for j in range(12):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % config.vocab_size
        other, _ = model.hidden(changed, model.initial_layers(1))
        assert torch.equal(other[:, :j], base[:, :j])
        assert not torch.equal(other[:, j], base[:, j])


def test_b2_gradient_towards_later_embeddings_is_exactly_zero() -> None:
    model = built(CONFIGS["GQA"])
    read: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    hidden, _ = model.hidden(text(1, 10), model.initial_layers(1))
    for i in range(10):
        (gradient,) = torch.autograd.grad(hidden[0, i].sum(), read[0], retain_graph=True)
        assert not gradient[0, i + 1 :].any()
        assert gradient[0, : i + 1].abs().amax(dim=-1).min() > 0


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 7, 24])
def test_b3_cached_reading_in_chunks_equals_the_whole_pass(config: TransformerConfig, chunk: int) -> None:
    model, tokens = built(config), text(2, 24)
    whole, _ = model.hidden(tokens, model.initial_layers(2))
    layers, pieces = model.initial_layers(2), []
    for piece in tokens.split(chunk, dim=1):
        hidden, layers = model.hidden(piece, layers)
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_b3_prefill_in_its_own_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = built(CONFIGS["GQA"]), text(2, 23)
    whole, _ = model.score(text(2, 5, seed=2), model.prefill(tokens, model.initial_state(2)))
    monkeypatch.setattr(Transformer, "prefill_chunk", 4)
    chunked, _ = model.score(text(2, 5, seed=2), model.prefill(tokens, model.initial_state(2)))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("junk", [1, 5, 100])
def test_b4_rolling_back_by_length_is_bit_exact(junk: int) -> None:
    model, tokens, more = built(CONFIGS["GQA"]), text(2, 9), text(2, 4, seed=3)
    _, layers = model.hidden(tokens, model.initial_layers(2))
    clean, _ = model.hidden(more, copy_state(layers))
    _, spoiled = model.hidden(text(2, junk, seed=4), layers)
    assert spoiled[0].length == 9 + junk
    rolled_back = tuple(cache._replace(length=9) for cache in spoiled)
    found, _ = model.hidden(more, rolled_back)
    assert torch.equal(found, clean)


@torch.no_grad()
def test_b4_rolling_back_to_nothing_is_bit_exact() -> None:
    model, tokens = built(CONFIGS["GQA"]), text(1, 9)
    for n_before in (3, 9, 30):
        _, layers = model.hidden(text(1, n_before, seed=4), model.initial_layers(1))
        found, _ = model.hidden(tokens, tuple(cache._replace(length=0) for cache in layers))
        assert torch.equal(found, model.hidden(tokens, model.initial_layers(1))[0])


def poisoned(caches: tuple[KVCache, ...]) -> State:
    """The caches with everything beyond their length overwritten by NaN."""

    def poison(cache: KVCache) -> KVCache:
        keys, values, length = copy_state(cache)
        keys[:, :, length:] = math.nan
        values[:, :, length:] = math.nan
        return KVCache(keys, values, length)

    return tuple(map(poison, caches))


@torch.no_grad()
@pytest.mark.parametrize("more", [1, 3, 90])
def test_b5_nan_beyond_the_length_changes_nothing(more: int) -> None:
    model = built(CONFIGS["GQA"])
    _, layers = model.hidden(text(2, 9), model.initial_layers(2))
    _, layers = model.hidden(text(2, 1, seed=5), layers)  # growth leaves slack
    assert layers[0].keys.shape[2] > layers[0].length == 10
    tokens = text(2, more, seed=6)
    spoiled, spoiled_layers = model.hidden(tokens, poisoned(layers))
    clean, clean_layers = model.hidden(tokens, layers)
    assert torch.equal(spoiled, clean)
    assert torch.equal(spoiled_layers[0].valid()[0], clean_layers[0].valid()[0])


def random_configs(n: int) -> list[TransformerConfig]:
    chosen = random.Random(0)
    configs = []
    for _ in range(n):
        heads = chosen.choice([1, 2, 4, 6])
        configs.append(
            TransformerConfig(
                vocab_size=chosen.randint(2, 300),
                d_model=heads * 2 * chosen.randint(1, 9),
                n_layers=chosen.randint(1, 4),
                n_heads=heads,
                n_kv_heads=chosen.choice([k for k in range(1, heads + 1) if heads % k == 0]),
                d_ffn=chosen.choice([None, chosen.randint(1, 50)]),
                tie_embeddings=chosen.random() < 0.5,
            )
        )
    return configs


@pytest.mark.parametrize("config", random_configs(10), ids=str)
def test_b8_parameter_count_is_the_formula(config: TransformerConfig) -> None:
    V, d, L, H, f = config.vocab_size, config.d_model, config.n_layers, config.n_heads, config.ffn_width
    K, h = config.kv_heads, d // H
    tables = V * d if config.tie_embeddings else 2 * V * d
    expected = tables + L * (d * (H + 2 * K) * h + H * h * d + 3 * d * f + 2 * d) + d
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_b9_scores_depend_on_the_distance_of_positions_only() -> None:
    q, k = torch.randn(2, 1, 1, 12, 8, generator=Generator().manual_seed(0))
    here = rotary_angles(0, 12, 8, 10_000.0, torch.device("cpu"))
    scores = rotate(q, here) @ rotate(k, here).transpose(-1, -2)
    for shift in (17, 100_000):
        there = rotary_angles(shift, 12, 8, 10_000.0, torch.device("cpu"))
        shifted = rotate(q, there) @ rotate(k, there).transpose(-1, -2)
        torch.testing.assert_close(shifted, scores, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores, q @ k.transpose(-1, -2))


def test_b9_rotation_pairs_the_halves_of_a_head() -> None:
    """Channel i turns with channel i + e/2 by p theta^(-2i/e): unit vectors at position 3, by hand."""
    angles = rotary_angles(3, 1, 4, 100.0, torch.device("cpu"))
    turned = rotate(torch.eye(4).view(1, 4, 1, 4), angles)[0, :, 0]
    fast, slow = 3.0, 3.0 * 100**-0.5
    expected = torch.tensor(
        [
            [math.cos(fast), 0, math.sin(fast), 0],
            [0, math.cos(slow), 0, math.sin(slow)],
            [-math.sin(fast), 0, math.cos(fast), 0],
            [0, -math.sin(slow), 0, math.cos(slow)],
        ]
    )
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("sizes", [(64, 2, 2), (128, 4, 2), (32, 8, 1)])
def test_b10_the_first_loss_is_near_the_logarithm_of_the_vocabulary(sizes: tuple[int, int, int]) -> None:
    d_model, n_layers, n_heads = sizes
    config = TransformerConfig(vocab_size=256, d_model=d_model, n_layers=n_layers, n_heads=n_heads)
    model = Transformer(config, Generator().manual_seed(0))
    with torch.no_grad():
        loss = model.next_token_loss(Batch(text(8, 65, 256), 0.0, Generator())).value.item()
    assert loss == pytest.approx(math.log(256), rel=0.03)


def test_b10_the_first_residual_stream_has_the_stated_size() -> None:
    model = Transformer(TransformerConfig(vocab_size=256, d_model=128), Generator().manual_seed(0))
    assert model.embedding.weight.square().mean().sqrt().item() == pytest.approx(0.6, rel=0.05)


def test_b10_one_batch_is_learned_by_heart() -> None:
    config = TransformerConfig(vocab_size=32, d_model=64, n_layers=2, n_heads=2)
    losses = trained(config, text(2, 17, 32), steps=200, learning_rate=3e-3)
    assert losses[-1] < 0.1


def test_b11_equal_seeds_give_bit_equal_losses_for_20_steps() -> None:
    runs = [trained(CONFIGS["GQA"], text(2, 17), steps=20, learning_rate=1e-2, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def trained(
    config: TransformerConfig, windows: Tensor, *, steps: int, learning_rate: float, seed: int = 0
) -> list[float]:
    """The losses of AdamW on the same windows again and again."""
    model = Transformer(config, Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = model.next_token_loss(Batch(windows, step / steps, Generator())).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def test_b12_as_many_key_heads_as_query_heads_is_plain_attention() -> None:
    plain, grouped = (built(replace(CONFIGS["MHA"], n_kv_heads=n)) for n in (None, 4))
    assert plain.state_dict().keys() == grouped.state_dict().keys()
    tokens = text(2, 9)
    assert torch.equal(*(model.hidden(tokens, model.initial_layers(2))[0] for model in (plain, grouped)))


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_b12_repeated_key_heads_are_plain_attention(n_kv_heads: int) -> None:
    grouped = built(replace(CONFIGS["MHA"], n_kv_heads=n_kv_heads))
    plain = Transformer(CONFIGS["MHA"], Generator().manual_seed(9))
    weights = dict(grouped.state_dict())
    width, head = 16, 4
    for name, weight in weights.items():
        if name.endswith("qkv.weight"):
            q, k, v = weight.split([width, n_kv_heads * head, n_kv_heads * head])
            repeated = [
                part.view(n_kv_heads, head, width).repeat_interleave(4 // n_kv_heads, dim=0).reshape(width, width)
                for part in (k, v)
            ]
            weights[name] = torch.cat([q, *repeated])
    plain.load_state_dict(weights)
    tokens = text(2, 9)
    found, expected = (model.hidden(tokens, model.initial_layers(2))[0] for model in (grouped, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_b13_greedy_rows_of_a_batch_equal_single_runs(config: TransformerConfig) -> None:
    model, prompts = built(config), text(3, 8)

    def greedy(tokens: Tensor) -> Tensor:
        state, out = model.prefill(tokens, model.initial_state(len(tokens))), []
        for _ in range(20):
            emission = model.decode_step(state, GREEDY, None)
            state = emission.state
            out.append(emission.tokens)
        return torch.cat(out, dim=1)

    assert torch.equal(greedy(prompts), torch.cat([greedy(prompt[None]) for prompt in prompts]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("d_model", 0),
        ("n_layers", 0),
        ("n_heads", 0),
        ("n_heads", 3),
        ("n_heads", 16),
        ("n_kv_heads", 0),
        ("n_kv_heads", 3),
        ("d_ffn", 0),
        ("rope_theta", 1.0),
        ("norm_eps", 0.0),
        ("max_context", 0),
    ],
)
def test_b16_impossible_configs_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"transformer\.") as caught:
        TransformerConfig(**{**SIZES, field: value})
    assert str(value) in str(caught.value) or "odd width" in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_b16_overflow_is_refused_with_the_numbers() -> None:
    model = built(replace(CONFIGS["GQA"], max_context=12))
    full = model.prefill(text(1, 12), model.initial_state(1))
    message = r"transformer\.max_context: 13 tokens do not fit into 12"
    with pytest.raises(ContextOverflow, match=message):
        model.prefill(text(1, 13), model.initial_state(1))
    with pytest.raises(ContextOverflow, match=message):
        model.score(text(1, 1), copy_state(full))
    with pytest.raises(ContextOverflow, match=message):
        model.decode_step(full, GREEDY, None)


@torch.no_grad()
def test_queries_see_keys_aligned_at_the_last_position() -> None:
    """With values that are unit vectors the output lists the attention shares: none lie in the future."""
    q, k = torch.randn(2, 1, 1, 6, 6, generator=Generator().manual_seed(0))
    for t in range(1, 7):
        shares = causal_attention(q[:, :, 6 - t :], k, torch.eye(6)[None, None])[0, 0]
        assert not shares.triu(diagonal=6 - t + 1).any()
        torch.testing.assert_close(shares.sum(-1), torch.ones(t))


@torch.no_grad()
def test_state_bytes_are_keys_and_values_of_what_was_read() -> None:
    """2 x layers x key heads x head width x 4 bytes a token, and nothing else: no slack after a prompt."""
    config = CONFIGS["GQA"]
    model = built(config)
    _, layers = model.hidden(text(3, 21), model.initial_layers(3))
    sizes: list[int] = []

    def weigh(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    map_state(weigh, layers)
    assert sum(sizes) == 3 * 21 * 2 * config.n_layers * 2 * 4 * 4


def test_every_matrix_but_the_embedding_decays() -> None:
    model = built(CONFIGS["MHA"])
    groups: dict[str, ParameterGroup] = {group.name: group for group in model.phases()[0].groups}
    spared = {id(parameter) for parameter in groups["vectors"].parameters}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in spared}
    assert not groups["vectors"].weight_decay
    assert names == {"embedding.weight", *(name for name in model.state_dict() if "norm" in name)}


def test_candidates_are_valid_and_grow() -> None:
    configs = list(ARCHITECTURE.candidates(64))
    widths = [config.d_model for config in configs]
    assert widths[0] <= 32
    assert widths[-1] >= 8192
    assert all(config.vocab_size == 64 and config.head_dim <= 64 for config in configs)


@pytest.mark.parametrize("name", ARCHITECTURE.published)
def test_published_sizes_can_be_built(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**{**ARCHITECTURE.published[name], "n_layers": 1}))
    assert model.blocks[0].attention.head_dim in (48, 64, 96, 128)
