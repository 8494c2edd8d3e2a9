"""Mamba against its naive oracle, and the invariants of its specification (their numbers in the names)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Generator, Tensor

from archbench.architectures.mamba import ARCHITECTURE, Mamba, MambaConfig
from archbench.errors import ConfigError
from archbench.model import Batch
from archbench.sampling import GREEDY
from archbench.state import copy_state, state_bytes, tensors
from tests.oracles.mamba_naive import NaiveMamba

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 12, "n_layers": 2}
CONFIGS = {
    "usual": MambaConfig(**SIZES),
    "one state, narrow": MambaConfig(**SIZES, d_state=1, d_conv=2),
    "odd states, wide": MambaConfig(**SIZES, d_state=5, d_conv=6, expand=1, dt_rank=3),
    "many states, untied": MambaConfig(**SIZES, d_state=33, d_conv=3, tie_embeddings=False, norm_eps=1e-2),
}


def built(config: MambaConfig, seed: int = 0) -> Mamba:
    """A model whose gains, D and A differ from their round first values and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = Mamba(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.75 + 0.5 * torch.rand(parameter.shape, generator=generator))
            if "embedding" in name:
                parameter.mul_(20)
    return model.eval()


def text(batch_size: int, n: int, vocab_size: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> MambaConfig:
    return CONFIGS[request.param]


@torch.no_grad()
def test_whole_pass_equals_the_naive_oracle(config: MambaConfig) -> None:
    model, tokens = built(config), text(2, 11)
    hidden, layers = model.hidden(tokens, model.initial_layers(2))
    for row in range(2):
        oracle = NaiveMamba(model.state_dict(), config)
        expected = [oracle.step(token) for token in tokens[row].tolist()]
        torch.testing.assert_close(model.logits(hidden)[row], torch.tensor(expected), rtol=1e-5, atol=1e-5)
        for layer, state in enumerate(layers):
            torch.testing.assert_close(state.ssm[row], torch.tensor(oracle.states[layer]), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state.window[row], torch.tensor(oracle.windows[layer]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_4_step_by_step_equals_the_naive_oracle(config: MambaConfig) -> None:
    model, tokens = built(config), text(1, 11)
    oracle, layers = NaiveMamba(model.state_dict(), config), model.initial_layers(1)
    for token in tokens[0].tolist():
        hidden, layers = model.hidden(torch.tensor([[token]]), layers)
        torch.testing.assert_close(model.logits(hidden)[0, 0], torch.tensor(oracle.step(token)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_4_decoding_from_any_split_point_equals_the_whole_pass(config: MambaConfig) -> None:
    model, tokens = built(config), text(2, 20)
    whole, _ = model.hidden(tokens, model.initial_layers(2))
    for split in range(1, 20):
        _, layers = model.hidden(tokens[:, :split], model.initial_layers(2))
        for i in range(split, 20):
            hidden, layers = model.hidden(tokens[:, i : i + 1], layers)
            torch.testing.assert_close(hidden[:, 0], whole[:, i], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 70, [2, 1, 67], [5, 1, 12, 1, 51], [63, 1, 6], [64, 6], [69, 1]], ids=str)
def test_5_reading_in_pieces_equals_one_pass_state_included(config: MambaConfig, pieces: list[int]) -> None:
    model, tokens = built(config), text(2, 70)
    whole, expected = model.hidden(tokens, model.initial_layers(2))
    layers, found = model.initial_layers(2), []
    for piece in tokens.split(pieces, dim=1):
        hidden, layers = model.hidden(piece, layers)
        found.append(hidden)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-5, atol=2e-5)
    for state, other in zip(tensors(layers), tensors(expected), strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_7_state_bytes_are_the_formula_however_much_was_read(config: MambaConfig, batch_size: int) -> None:
    model = built(config)
    inner, kept = config.expand * config.d_model, config.d_state + config.d_conv - 1
    expected = batch_size * config.n_layers * inner * kept * 4
    layers = model.initial_layers(batch_size)
    assert state_bytes(layers) == expected
    for n in (1, 1, 2, 10, 1000):
        _, layers = model.hidden(text(batch_size, n), layers)
        assert state_bytes(layers) == expected, n


@torch.no_grad()
def test_7_state_bytes_are_the_same_after_a_hundred_thousand_tokens() -> None:
    config = MambaConfig(vocab_size=19, d_model=4, n_layers=1, d_state=2)
    model = built(config)
    state = model.prefill(text(1, 10), model.initial_state(1))
    before = state_bytes(state)
    state = model.prefill(text(1, 100_000), state)
    assert state_bytes(state) == before == 8 * (2 + 3) * 4 + 8  # and the pending token
    assert all(tensor.isfinite().all() for tensor in tensors(state))


@torch.no_grad()
def test_8_changing_a_token_leaves_earlier_outputs_bit_equal(config: MambaConfig) -> None:
    model, tokens = built(config), text(1, 12)
    base, _ = model.hidden(tokens, model.initial_layers(1))
    for j in range(12):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % config.vocab_size
        other, _ = model.hidden(changed, model.initial_layers(1))
        assert torch.equal(other[:, :j], base[:, :j])
        assert not torch.equal(other[:, j], base[:, j])


def test_8_gradient_towards_later_embeddings_is_exactly_zero(config: MambaConfig) -> None:
    model = built(config)
    read: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    hidden, _ = model.hidden(text(1, 10), model.initial_layers(1))
    for i in range(10):
        (gradient,) = torch.autograd.grad(hidden[0, i].sum(), read[0], retain_graph=True)
        assert not gradient[0, i + 1 :].any()
        assert gradient[0, : i + 1].abs().amax(dim=-1).min() > 0


@torch.no_grad()
def test_9_a_row_of_a_batch_equals_the_same_row_alone(config: MambaConfig) -> None:
    model, tokens = built(config), text(3, 33)
    whole, layers = model.hidden(tokens, model.initial_layers(3))
    for row in range(3):
        alone, own = model.hidden(tokens[row : row + 1], model.initial_layers(1))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)
        for state, other in zip(tensors(own), tensors(layers), strict=True):
            torch.testing.assert_close(state[0], other[row], rtol=1e-5, atol=1e-5)


def test_13_first_step_sizes_are_log_uniform() -> None:
    model = Mamba(MambaConfig(vocab_size=8, d_model=256, n_layers=4), Generator().manual_seed(0))
    steps = torch.cat([torch.nn.functional.softplus(block.mixer.dt_bias.detach()) for block in model.blocks])
    assert steps.min() >= 0.999e-3
    assert steps.max() <= 0.1001
    uniform = (steps.log() - math.log(1e-3)) / (math.log(0.1) - math.log(1e-3))
    assert stats.kstest(uniform.clamp(0, 1).numpy(), "uniform").pvalue > 0.01


def test_13_first_decays_skips_and_matrices_are_as_stated() -> None:
    config = MambaConfig(vocab_size=8, d_model=64, n_layers=9, d_state=7)
    model = Mamba(config, Generator().manual_seed(0))
    for block in model.blocks:
        mixer = block.mixer
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 8.0).expand(128, 7))
        assert (mixer.D == 1).all()
        for weight, bound in (
            (mixer.in_proj.weight, 64**-0.5),
            (mixer.x_proj.weight, 128**-0.5),
            (mixer.dt_proj.weight, 4**-0.5),
            (mixer.out_proj.weight, 128**-0.5 / 3),
            (mixer.conv_weight, 4**-0.5),
            (mixer.conv_bias, 4**-0.5),
        ):
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_13_parameter_count_is_the_formula(name: str) -> None:
    config = CONFIGS[name]
    V, d, D, N, W = config.vocab_size, config.d_model, config.expand * config.d_model, config.d_state, config.d_conv
    R = config.step_rank
    layer = 3 * D * d + D * (W + 1 + 2 * R + 1 + 3 * N + 1) + d
    expected = (1 if config.tie_embeddings else 2) * V * d + config.n_layers * layer + d
    assert sum(parameter.numel() for parameter in Mamba(config).parameters()) == expected


def test_13_parameter_count_of_a_known_size() -> None:
    with torch.device("meta"):
        model = Mamba(MambaConfig(vocab_size=256, d_model=256, n_layers=8))
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_569_920


def with_step(config: MambaConfig, raw: float) -> Mamba:
    """A model whose step size before softplus is `raw` for every token and channel, and whose convolution is 1 x."""
    model = built(config)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.dt_proj.weight.zero_()
            block.mixer.dt_bias.fill_(raw)
            block.mixer.conv_weight[:, :-1] = 0
    return model


ONE_LAYER = MambaConfig(vocab_size=19, d_model=12, n_layers=1, d_state=16)


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 4, 70])
def test_14_a_large_step_forgets_all_but_the_token(n_tokens: int) -> None:
    """At a step of 200 the slowest state decays by exp(-200) or less, which is 0 in fp32."""
    model = with_step(ONE_LAYER, 200.0)
    model.blocks[0].mixer.A_log.clamp_(min=0)
    last = torch.tensor([[7]])
    states = []
    for seed in (1, 2):
        _, layers = model.hidden(text(1, n_tokens, seed=seed), model.initial_layers(1))
        _, layers = model.hidden(last, layers)
        states.append(layers[0].ssm)
    assert states[0].isfinite().all()
    assert states[0].abs().max() > 0
    assert torch.equal(*states)


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 4, 70])
def test_14_a_vanishing_step_leaves_the_state_alone(n_tokens: int) -> None:
    model = with_step(ONE_LAYER, -30.0)
    _, layers = built(ONE_LAYER).hidden(text(1, 9), model.initial_layers(1))
    before = layers[0].ssm.clone()
    assert before.abs().max() > 1e-3
    hidden, layers = model.hidden(text(1, n_tokens, seed=2), layers)
    torch.testing.assert_close(layers[0].ssm, before, rtol=0, atol=1e-9)
    assert hidden.isfinite().all()


def test_24_bf16_autocast_is_near_fp32_and_keeps_the_recurrence_in_fp32() -> None:
    model = Mamba(MambaConfig(vocab_size=64, d_model=32, n_layers=4), Generator().manual_seed(0))
    batch = Batch(text(4, 65, 64), 0.0, Generator())
    exact = model.next_token_loss(batch).value.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.next_token_loss(batch).value
        with torch.no_grad():
            state = model.prefill(text(2, 9, 64), model.initial_state(2))
            state = model.decode_step(state, GREEDY, None).state
    loss.backward()
    assert loss.item() == pytest.approx(exact, abs=2e-2)
    assert {tensor.dtype for tensor in tensors(state.layers)} == {torch.float32}
    mixer = model.blocks[0].mixer
    for parameter in (mixer.A_log, mixer.D, mixer.dt_bias):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_24_states_stay_fp32_in_a_bf16_model() -> None:
    model = built(CONFIGS["usual"]).to(torch.bfloat16)
    with torch.no_grad():
        _, layers = model.hidden(text(1, 5), model.initial_layers(1))
    assert {tensor.dtype for tensor in tensors(layers)} == {torch.float32}


def test_a_log_biases_and_gains_do_not_decay() -> None:
    model = built(CONFIGS["many states, untied"])
    groups = {group.name: group for group in model.phases()[0].groups}
    decayed = {id(parameter) for parameter in groups["matrices"].parameters}
    names = {name.rpartition("mixer.")[2] for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {
        *(f"{part}_proj.weight" for part in ("in", "x", "dt", "out")),
        "conv_weight",
        "unembedding.weight",
    }


@torch.no_grad()
def test_reading_does_not_write_into_a_copied_state() -> None:
    model = built(CONFIGS["usual"])
    _, layers = model.hidden(text(1, 9), model.initial_layers(1))
    kept = copy_state(layers)
    model.hidden(text(1, 9, seed=3), copy_state(layers))
    assert all(torch.equal(a, b) for a, b in zip(tensors(layers), tensors(kept), strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("d_model", 0), ("n_layers", 0), ("d_state", 0), ("expand", 0), ("dt_rank", 0),
        ("d_conv", 1), ("dt_min", 0.0), ("dt_min", 0.2), ("boundary", 19),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"mamba\.") as caught:
        replace(CONFIGS["usual"], **{field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("name", ARCHITECTURE.published)
def test_published_sizes_can_be_built(name: str) -> None:
    with torch.device("meta"):
        Mamba(MambaConfig(**{**ARCHITECTURE.published[name], "n_layers": 1}))
