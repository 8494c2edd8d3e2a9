"""Mamba-2 against its naive oracle and transformers, and the invariants of its specification (numbers in the names)."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Generator, Tensor

from archbench import registry
from archbench.architectures.mamba2 import ARCHITECTURE, Mamba2, Mamba2Config, candidates
from archbench.errors import CheckpointError, ConfigError
from archbench.flops import count_three_ways
from archbench.integrations import huggingface
from archbench.model import Batch
from archbench.ops import backends, ssd_chunked, ssd_native
from archbench.sampling import GREEDY
from archbench.sizes import solve
from archbench.state import copy_state, state_bytes, tensors
from tests.oracles.mamba2_naive import NaiveMamba2

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 12, "n_layers": 2}
CONFIGS = {
    "usual": Mamba2Config(**SIZES, d_state=8, head_dim=6),
    "groups": Mamba2Config(**SIZES, d_state=3, head_dim=4, n_groups=3),
    "one head, narrow": Mamba2Config(**SIZES, d_state=1, head_dim=24, d_conv=2),
    "limits, untied": Mamba2Config(
        **SIZES, d_state=5, head_dim=3, n_groups=2, d_conv=6, expand=1, step_floor=0.02, step_ceiling=0.06,
        tie_embeddings=False, norm_eps=1e-2,
    ),
}  # fmt: skip


def built(config: Mamba2Config, seed: int = 0) -> Mamba2:
    """A model whose gains and D differ from their round first values and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = Mamba2(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.75 + 0.5 * torch.rand(parameter.shape, generator=generator))
            if "embedding" in name:
                parameter.mul_(20)
    return model.eval()


def text(batch_size: int, n: int, vocab_size: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> Mamba2Config:
    return CONFIGS[request.param]


# ---- the oracle ----


@torch.no_grad()
@pytest.mark.parametrize("level", ["lean", "native"])
def test_whole_pass_equals_the_naive_oracle(config: Mamba2Config, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = backends.available("ssd")[level]
    if found != "ok":
        pytest.skip(f"{level}: {found}")
    monkeypatch.setenv("ARCHBENCH_BACKEND", level)
    for module in (ssd_chunked, ssd_native):
        monkeypatch.setattr(module, "CHUNK", 5)
    model, tokens = built(config), text(2, 12)
    hidden, layers = model.hidden(tokens, model.initial_layers(2))
    for row in range(2):
        oracle = NaiveMamba2(model.state_dict(), config)
        expected = [oracle.step(token) for token in tokens[row].tolist()]
        torch.testing.assert_close(model.logits(hidden)[row], torch.tensor(expected), rtol=1e-5, atol=1e-5)
        for layer, state in enumerate(layers):
            torch.testing.assert_close(state.ssm[row], torch.tensor(oracle.states[layer]), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state.window[row], torch.tensor(oracle.windows[layer]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_4_step_by_step_equals_the_naive_oracle(config: Mamba2Config) -> None:
    model, tokens = built(config), text(1, 11)
    oracle, layers = NaiveMamba2(model.state_dict(), config), model.initial_layers(1)
    for token in tokens[0].tolist():
        hidden, layers = model.hidden(torch.tensor([[token]]), layers)
        torch.testing.assert_close(model.logits(hidden)[0, 0], torch.tensor(oracle.step(token)), rtol=1e-5, atol=1e-5)


# ---- invariants ----


@torch.no_grad()
def test_4_decoding_from_any_split_point_equals_the_whole_pass(config: Mamba2Config) -> None:
    model, tokens = built(config), text(2, 20)
    whole, _ = model.hidden(tokens, model.initial_layers(2))
    for split in range(1, 20):
        _, layers = model.hidden(tokens[:, :split], model.initial_layers(2))
        for i in range(split, 20):
            hidden, layers = model.hidden(tokens[:, i : i + 1], layers)
            torch.testing.assert_close(hidden[:, 0], whole[:, i], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 70, [2, 1, 67], [5, 1, 12, 1, 51], [63, 1, 6], [64, 6], [69, 1]], ids=str)
def test_5_reading_in_pieces_equals_one_pass_state_included(config: Mamba2Config, pieces: list[int]) -> None:
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
def test_7_state_bytes_are_the_formula_however_much_was_read(config: Mamba2Config, batch_size: int) -> None:
    model = built(config)
    D, G, N, W = config.expand * config.d_model, config.n_groups, config.d_state, config.d_conv
    expected = batch_size * config.n_layers * (D * N + (W - 1) * (D + 2 * G * N)) * 4
    layers = model.initial_layers(batch_size)
    assert state_bytes(layers) == expected
    for n in (1, 1, 2, 10, 1000):
        _, layers = model.hidden(text(batch_size, n), layers)
        assert state_bytes(layers) == expected, n


@torch.no_grad()
def test_7_state_bytes_are_the_same_after_a_hundred_thousand_tokens() -> None:
    config = Mamba2Config(vocab_size=19, d_model=4, n_layers=1, d_state=2, head_dim=4)
    model = built(config)
    state = model.prefill(text(1, 10), model.initial_state(1))
    before = state_bytes(state)
    state = model.prefill(text(1, 100_000), state)
    assert state_bytes(state) == before == (8 * 2 + 3 * (8 + 4)) * 4 + 8  # and the pending token
    assert all(tensor.isfinite().all() for tensor in tensors(state))


@torch.no_grad()
def test_8_changing_a_token_leaves_earlier_outputs_bit_equal(config: Mamba2Config) -> None:
    model, tokens = built(config), text(1, 12)
    base, _ = model.hidden(tokens, model.initial_layers(1))
    for j in range(12):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % config.vocab_size
        other, _ = model.hidden(changed, model.initial_layers(1))
        assert torch.equal(other[:, :j], base[:, :j])
        assert not torch.equal(other[:, j], base[:, j])


def test_8_gradient_towards_later_embeddings_is_exactly_zero(config: Mamba2Config) -> None:
    model = built(config)
    read: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    hidden, _ = model.hidden(text(1, 10), model.initial_layers(1))
    for i in range(10):
        (gradient,) = torch.autograd.grad(hidden[0, i].sum(), read[0], retain_graph=True)
        assert not gradient[0, i + 1 :].any()
        assert gradient[0, : i + 1].abs().amax(dim=-1).min() > 0


@torch.no_grad()
def test_9_a_row_of_a_batch_equals_the_same_row_alone(config: Mamba2Config) -> None:
    model, tokens = built(config), text(3, 33)
    whole, layers = model.hidden(tokens, model.initial_layers(3))
    for row in range(3):
        alone, own = model.hidden(tokens[row : row + 1], model.initial_layers(1))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)
        for state, other in zip(tensors(own), tensors(layers), strict=True):
            torch.testing.assert_close(state[0], other[row], rtol=1e-5, atol=1e-5)


def test_13_first_step_sizes_are_log_uniform_and_decays_uniform() -> None:
    model = Mamba2(Mamba2Config(vocab_size=8, d_model=256, n_layers=4, head_dim=2), Generator().manual_seed(0))
    steps = torch.cat([torch.nn.functional.softplus(block.mixer.dt_bias.detach()) for block in model.blocks])
    assert steps.min() >= 0.999e-3
    assert steps.max() <= 0.1001
    uniform = (steps.log() - math.log(1e-3)) / (math.log(0.1) - math.log(1e-3))
    assert stats.kstest(uniform.clamp(0, 1).numpy(), "uniform").pvalue > 0.01
    decays = torch.cat([block.mixer.A_log.detach().exp() for block in model.blocks])
    assert decays.min() >= 0.999
    assert decays.max() <= 16.01
    assert stats.kstest(((decays - 1) / 15).clamp(0, 1).numpy(), "uniform").pvalue > 0.01


def test_13_first_skips_gains_and_matrices_are_as_stated() -> None:
    config = Mamba2Config(vocab_size=8, d_model=64, n_layers=9, d_state=7, head_dim=8)
    model = Mamba2(config, Generator().manual_seed(0))
    for block in model.blocks:
        mixer = block.mixer
        assert (mixer.D == 1).all()
        assert (mixer.norm.weight == 1).all()
        for weight, bound in (
            (mixer.in_proj.weight, 64**-0.5),
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
    G, H = config.n_groups, D // config.head_dim
    layer = (2 * D + 2 * G * N + H) * d + (D + 2 * G * N) * (W + 1) + 3 * H + D + D * d + d
    expected = (1 if config.tie_embeddings else 2) * V * d + config.n_layers * layer + d
    assert sum(parameter.numel() for parameter in Mamba2(config).parameters()) == expected == config.n_parameters


def test_13_the_smallest_release_has_its_number_of_parameters() -> None:
    assert Mamba2Config(**ARCHITECTURE.published["130m"]).n_parameters == 128_989_632


def with_step(config: Mamba2Config, raw: float) -> Mamba2:
    """A model whose step before softplus is `raw` for every token and head, and whose convolution is 1 x."""
    model = built(config)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.in_proj.weight[-config.n_heads :] = 0
            block.mixer.dt_bias.fill_(raw)
            block.mixer.conv_weight[:, :-1] = 0
    return model


ONE_LAYER = Mamba2Config(vocab_size=19, d_model=12, n_layers=1, d_state=16, head_dim=6)


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 4, 70])
def test_14_a_large_step_forgets_all_but_the_token(n_tokens: int) -> None:
    """At a step of 200 the slowest head decays by exp(-200) or less, which is 0 in fp32."""
    model = with_step(ONE_LAYER, 200.0)
    model.blocks[0].mixer.A_log.clamp_(min=0)
    states = []
    for seed in (1, 2):
        _, layers = model.hidden(text(1, n_tokens, seed=seed), model.initial_layers(1))
        _, layers = model.hidden(torch.tensor([[7]]), layers)
        states.append(layers[0].ssm)
    assert states[0].isfinite().all()
    assert states[0].abs().max() > 0
    assert torch.equal(*states)


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 4, 70])
def test_14_17_a_vanishing_step_leaves_the_state_alone(n_tokens: int) -> None:
    """Padding by steps of 0: softplus(-200) is exactly 0, and the state stays the same, bit for bit or nearly."""
    model = with_step(ONE_LAYER, -200.0)
    _, layers = built(ONE_LAYER).hidden(text(1, 9), model.initial_layers(1))
    before = layers[0].ssm.clone()
    assert before.abs().max() > 1e-3
    hidden, layers = model.hidden(text(1, n_tokens, seed=2), layers)
    torch.testing.assert_close(layers[0].ssm, before, rtol=0, atol=1e-9)
    assert hidden.isfinite().all()


@torch.no_grad()
def test_steps_stay_within_their_limits() -> None:
    """Beyond its limits the raw step makes no difference."""
    config = replace(ONE_LAYER, step_floor=0.02, step_ceiling=0.06)
    runs = {raw: with_step(config, raw).hidden(text(1, 9), Mamba2(config).initial_layers(1))[0] for raw in RAW_STEPS}
    assert torch.equal(runs[-20.0], runs[-5.0])
    assert torch.equal(runs[0.0], runs[20.0])
    assert not torch.equal(runs[-5.0], runs[0.0])


RAW_STEPS = (-20.0, -5.0, 0.0, 20.0)


@torch.no_grad()
def test_the_gate_comes_before_the_norm() -> None:
    """Scaling the gate's rows moves a norm before the gate, but not one after it (a large gate is nearly linear)."""
    model = built(replace(ONE_LAYER, norm_eps=1e-12))
    mixer, u, state = model.blocks[0].mixer, torch.randn(1, 5, 12, generator=Generator().manual_seed(3)), None
    state = mixer.initial_state(1)
    mixer.in_proj.weight[: model.config.d_inner].abs_().mul_(50)
    u = u.abs()  # gates are large and positive
    base, _ = mixer(u, copy_state(state))
    mixer.in_proj.weight[: model.config.d_inner].mul_(10)
    scaled, _ = mixer(u, state)
    torch.testing.assert_close(scaled, base, rtol=1e-4, atol=1e-4)


def test_24_bf16_autocast_is_near_fp32_and_keeps_the_recurrence_in_fp32() -> None:
    config = Mamba2Config(vocab_size=64, d_model=32, n_layers=4, d_state=16)
    model = Mamba2(config, Generator().manual_seed(0))
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
    model = built(CONFIGS["limits, untied"])
    groups = {group.name: group for group in model.phases()[0].groups}
    decayed = {id(parameter) for parameter in groups["matrices"].parameters}
    names = {name.rpartition("mixer.")[2] for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {"in_proj.weight", "out_proj.weight", "conv_weight", "unembedding.weight"}


# ---- sizes and cost ----


@pytest.mark.parametrize("size", ["nano", "micro", "mini", "small", "medium", "base"])
def test_shared_sizes_are_met(size: str) -> None:
    assert abs(solve(ARCHITECTURE, 256, size).residual) < 0.03


def test_candidates_grow() -> None:
    counts = [config.n_parameters for config in candidates(256)]
    assert counts == sorted(counts)


@pytest.mark.parametrize(("name", "context"), [("usual", 128), ("groups", 1000), ("limits, untied", 2048)])
def test_26_flops_agree_three_ways(name: str, context: int) -> None:
    for count in count_three_ways(ARCHITECTURE, CONFIGS[name], context, steps=2).values():
        assert count.traced is not None and count.meta is not None
        assert count.disagreement < 1e-9


def test_26_flops_of_a_known_size() -> None:
    """d 8, D 16, G 1, N 4, H 2, W 4, one layer, V 10: 2*8*42 + 2*4*24 + 5*16*4 + 2*16*8, and 2*8*10 for the head."""
    config = Mamba2Config(vocab_size=10, d_model=8, n_layers=1, d_state=4, head_dim=8)
    assert Mamba2(config).flops().decode(0) == 672 + 192 + 320 + 256 + 160


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("d_model", 0), ("n_layers", 0), ("d_state", 0), ("expand", 0), ("head_dim", 0),
        ("head_dim", 7), ("n_groups", 0), ("n_groups", 5), ("d_conv", 1), ("dt_min", 0.0), ("dt_min", 0.2),
        ("step_floor", -1.0), ("step_ceiling", 0.0), ("boundary", 19),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"mamba2\.") as caught:
        replace(CONFIGS["usual"], **{field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("name", ARCHITECTURE.published)
def test_published_sizes_can_be_built(name: str) -> None:
    with torch.device("meta"):
        Mamba2(Mamba2Config(**{**ARCHITECTURE.published[name], "n_layers": 1}))


# ---- transformers ----

V = 96


def theirs(seed: int = 0, d_model: int = 48, n_layers: int = 3, n_groups: int = 1, **options: Any) -> Any:
    """Their first gains, biases and decays are round numbers; moved apart, so that a mix-up among them shows."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    options = {"head_dim": 8, "state_size": 12, "tie_word_embeddings": True, **options}
    config = transformers.Mamba2Config(
        vocab_size=V, hidden_size=d_model, num_hidden_layers=n_layers, n_groups=n_groups, bos_token_id=3,
        num_heads=options.get("expand", 2) * d_model // options["head_dim"], **options,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config)
    generator = Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


HF_MODELS: list[dict[str, Any]] = [
    {},
    {"n_groups": 3, "conv_kernel": 3, "tie_word_embeddings": False},
    {"expand": 3, "head_dim": 16, "state_size": 5, "chunk_size": 16, "n_groups": 9},
    {"time_step_limit": (0.01, 0.05), "n_groups": 2},
]


def imported(model: Any, folder: Path) -> Mamba2:
    model.save_pretrained(folder)
    ours = huggingface.build(huggingface.read_checkpoint(folder))
    assert isinstance(ours, Mamba2)
    return ours


def logits(model: Mamba2, tokens: Tensor) -> Tensor:
    hidden, _ = model.hidden(tokens, model.initial_layers(len(tokens)))
    return model.logits(hidden)


def assert_as_near_as_fp32(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("options", HF_MODELS)
def test_10_the_same_logits_as_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    model = theirs(**options)
    ours = imported(model, tmp_path)
    tokens = text(2, 70, V)
    assert_as_near_as_fp32(logits(ours, tokens), model(tokens).logits)
    assert ours.boundary == 3


@torch.no_grad()
@pytest.mark.parametrize("options", HF_MODELS[:3])
def test_10_token_by_token_and_in_pieces_as_transformers_continues_from_its_cache(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Not with limited steps: their single-token update leaves the limits out."""
    model = theirs(**options)
    ours = imported(model, tmp_path)
    tokens = text(2, 40, V)
    cache, layers = None, ours.initial_layers(2)
    for piece in tokens.split([9, 1, 1, 1, 12, 1, 15], dim=1):
        out = model(piece, cache_params=cache, use_cache=True)
        cache = out.cache_params
        hidden, layers = ours.hidden(piece, layers)
        assert_as_near_as_fp32(ours.logits(hidden), out.logits)


def test_10_the_same_gradients_as_transformers(tmp_path: Path) -> None:
    model = theirs(d_model=32, n_layers=2, n_groups=2)
    ours = imported(model, tmp_path)
    tokens = text(2, 32, V)
    model(tokens).logits.square().mean().backward()
    logits(ours, tokens).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name != "lm_head.weight"}
    expected = registry.architecture("mamba2").hf["mamba2"].weights(ours.config, gradients)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        largest = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * largest, name


@torch.no_grad()
@pytest.mark.parametrize(("d_model", "n_layers"), [(32, 2), (64, 4)])
def test_11_the_same_48_greedy_tokens_as_transformers(tmp_path: Path, d_model: int, n_layers: int) -> None:
    model = theirs(seed=2, d_model=d_model, n_layers=n_layers)
    ours = imported(model, tmp_path)
    prompt = text(2, 7, V)
    state, written = ours.prefill(prompt, ours.initial_state(2)), []
    for _ in range(48):
        tokens, _, state = ours.decode_step(state, GREEDY, None)
        written.append(tokens)
    inputs = torch.cat([torch.full((2, 1), 3), prompt], dim=1)
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=48, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(torch.cat(written, 1), out[:, inputs.shape[1] :])


def release(model: Any, folder: Path, **config: Any) -> Path:
    """The same weights in the layout of the original release, whose vocabulary is padded to a multiple of 16."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = tensors.pop("backbone.embeddings.weight")[: V - 5]
    table = torch.cat([table, torch.full((5, table.shape[1]), 9.0)])
    tensors["backbone.embedding.weight"], tensors["lm_head.weight"] = table, table.clone()
    save_file(tensors, folder / "model.safetensors")
    options = model.config
    ssm = {"layer": "Mamba2", "d_state": options.state_size, "headdim": options.head_dim, "ngroups": options.n_groups}
    basis = {
        "d_model": options.hidden_size, "n_layer": options.num_hidden_layers, "vocab_size": V - 5, "ssm_cfg": ssm,
        "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**basis, **config}))
    return folder


@torch.no_grad()
def test_12_the_layout_of_the_release_is_the_same_model(tmp_path: Path) -> None:
    model = theirs(n_groups=2)
    read = huggingface.read_checkpoint(release(model, tmp_path))
    assert read.architecture == "mamba2"
    ours = huggingface.build(read)
    assert isinstance(ours, Mamba2)
    tokens = text(2, 30, V - 5)
    assert_as_near_as_fp32(logits(ours, tokens), model(tokens).logits[..., : V - 5])


@torch.no_grad()
def test_12_tensors_come_back_under_their_names(tmp_path: Path) -> None:
    model = theirs(tie_word_embeddings=False, n_groups=2)
    ours = imported(model, tmp_path)
    back = {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("blocks.", "backbone.layers.").replace("conv_weight", "conv1d.weight")
        name = name.replace("conv_bias", "conv1d.bias").replace("unembedding", "lm_head")
        name = "backbone.embeddings.weight" if name == "embedding.weight" else name
        name = "backbone.norm_f.weight" if name == "norm.weight" else name
        back[name] = tensor[:, None] if name.endswith("conv1d.weight") else tensor
    stored = load_file(tmp_path / "model.safetensors")
    assert set(back) == set(stored)
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_bias": True}, "use_bias: True"),
        ({"use_conv_bias": False}, "use_conv_bias: False"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"num_heads": 5}, "num_heads: 5; times head_dim 8 it must be expand * hidden_size, 96"),
        ({"time_step_limit": 3}, "time_step_limit: 3"),
        ({"time_step_limit": ["low", 1.0]}, "time_step_limit: 'low'"),
        ({"state_size": "many"}, "state_size: 'many'"),
    ],
)
def test_12_options_that_are_not_computed_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    theirs(n_layers=1).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError) as caught:
        huggingface.read_checkpoint(tmp_path)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rms_norm": False}, "rms_norm: False"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer: 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate: True"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}}, "d_ssm: 32"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
    ],
)
def test_12_releases_that_are_not_computed_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    release(theirs(n_layers=1), tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        huggingface.read_checkpoint(tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def _drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _put(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_drop("backbone.layers.1.mixer.A_log"), r"tensor backbone\.layers\.1\.mixer\.A_log: missing"),
        (_put("backbone.layers.1.mixer.conv1d.weight", 96, 4), r"conv1d\.weight: shape \[96, 4\]; .*\[120, 1, 4\]"),
        (_put("backbone.layers.0.mixer.x_proj.weight", 96), r"tensor backbone\.layers\.0\.mixer\.x_proj\.weight: unk"),
        (_put("backbone.layers.0.norm.bias", 48), r"backbone\.layers\.0\.norm\.bias: the bias of a LayerNorm"),
        (_put("lm_head.weight", V, 48), r"tensor lm_head\.weight: differs from backbone\.embeddings\.weight"),
    ],
)
def test_12_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=named):
        huggingface.read_checkpoint(tmp_path)
