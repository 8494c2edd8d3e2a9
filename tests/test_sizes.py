"""Named sizes: the solver finds the nearest config, holds overrides fixed, and refuses with one line."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from archbench import registry, sizes
from archbench.errors import ConfigError
from archbench.model import Architecture
from archbench.state import state_bytes

SHARED = ["nano", "micro", "mini", "small"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def transformer() -> Architecture:
    return registry.architecture("transformer")


@pytest.fixture(scope="module")
def mamba() -> Architecture:
    return registry.architecture("mamba")


@pytest.mark.parametrize("name", ["transformer", "mamba"])
@pytest.mark.parametrize("vocab_size", [256, 1024])
@pytest.mark.parametrize("size", SHARED)
def test_shared_sizes_are_met_within_two_percent(name, vocab_size, size):
    solved = sizes.solve(registry.architecture(name), vocab_size, size)
    assert solved.target == sizes.SIZES[size]
    assert abs(solved.residual) < 0.02
    assert solved.config.vocab_size == vocab_size


@pytest.mark.parametrize("name", ["transformer", "mamba"])
def test_the_count_is_the_built_model_s_and_the_formula_s(name):
    architecture = registry.architecture(name)
    solved = sizes.solve(architecture, 256, "nano")
    model = architecture.build(solved.config, torch.Generator().manual_seed(0))
    assert solved.actual == sum(parameter.numel() for parameter in model.parameters()) == solved.config.n_parameters


@pytest.mark.parametrize(
    "name,changes",
    [
        ("transformer", {"d_model": 48, "n_heads": 4, "n_kv_heads": 1, "d_ffn": 72, "tie_embeddings": True}),
        ("transformer", {"d_model": 40, "n_heads": 2, "n_layers": 1}),
        ("mamba", {"d_model": 24, "d_state": 7, "d_conv": 3, "expand": 3, "tie_embeddings": False}),
        ("mamba", {"d_model": 33, "dt_rank": 5}),
    ],
)
def test_formulas_hold_for_unusual_configs(name, changes):
    architecture = registry.architecture(name)
    config = architecture.config(vocab_size=77, **changes)
    assert sizes.parameters(sizes.on_meta(architecture, config)) == config.n_parameters


def test_mamba_matches_a_count_made_by_hand(mamba):
    config = mamba.config(vocab_size=256, d_model=256, n_layers=8)
    assert sizes.parameters(sizes.on_meta(mamba, config)) == 3_569_920


@pytest.mark.parametrize("name", ["transformer", "mamba"])
@pytest.mark.parametrize("size", ["micro", "medium"])
def test_no_candidate_is_nearer(name, size):
    architecture = registry.architecture(name)
    solved = sizes.solve(architecture, 256, size)
    nearest = min(abs(config.n_parameters - solved.target) for config in architecture.candidates(256))
    assert abs(solved.actual - solved.target) == nearest


def test_solving_is_quick(mamba):
    start = time.process_time()
    sizes.solve(mamba, 256, "small")
    assert time.process_time() - start < 2.0  # about 0.2 on a quiet core, without shape checks


def test_small_transformers_have_sensible_shapes(transformer):
    micro, mini = (sizes.solve(transformer, 256, size).config for size in ("micro", "mini"))
    assert 80 <= micro.d_model <= 128 and micro.n_layers <= 4
    assert 112 <= mini.d_model <= 160
    for config in transformer.candidates(256):
        assert config.head_dim % 8 == 0 and 32 <= config.head_dim <= 64
        assert 2 <= config.ffn_width / config.d_model < 3.5


@pytest.mark.parametrize("axis", ["non_embedding", "training_flops", "state_bytes"])
@pytest.mark.parametrize("name", ["transformer", "mamba"])
def test_other_axes_are_matched_in_their_own_unit(name, axis):
    architecture = registry.architecture(name)
    solved = sizes.solve(architecture, 256, "micro", axis=axis, context=128)
    model = architecture.build(solved.config, torch.Generator().manual_seed(0))
    if axis == "training_flops":
        expected, target = model.flops().training(128) / 128, 6 * sizes.SIZES["micro"]
    elif axis == "state_bytes":
        with torch.no_grad():
            state = model.prefill(torch.zeros(1, 128, dtype=torch.long), model.initial_state(1))
        expected, target = state_bytes(state), sizes.STATE_BYTES_PER_PARAMETER * sizes.SIZES["micro"]
    else:
        expected, target = solved.config.n_parameters - 256 * solved.config.d_model, sizes.SIZES["micro"]
    assert solved.actual == expected and solved.target == target
    assert abs(solved.residual) < 0.02


def test_a_longer_context_costs_a_transformer_more_per_token(transformer):
    short, long = (
        sizes.solve(transformer, 256, "micro", axis="training_flops", context=context).config.n_parameters
        for context in (64, 4096)
    )
    assert long < short


def test_overrides_are_held_and_the_rest_is_solved_around_them(transformer, mamba):
    solved = sizes.solve(transformer, 256, "small", {"n_kv_heads": 1, "tie_embeddings": True, "rope_theta": 5e5})
    assert (solved.config.kv_heads, solved.config.tie_embeddings, solved.config.rope_theta) == (1, True, 5e5)
    assert abs(solved.residual) < 0.02
    wide = sizes.solve(mamba, 256, "mini", {"d_state": 64})
    assert wide.config.d_state == 64 and abs(wide.residual) < 0.03
    deep = sizes.solve(transformer, 256, "mini", {"n_layers": 8})
    assert deep.config.n_layers == 8 and abs(deep.residual) < 0.03


def test_override_values_are_converted_as_in_a_suite_file(transformer):
    assert sizes.solve(transformer, 256, "nano", {"n_layers": 2.0}).config.n_layers == 2
    with pytest.raises(ConfigError, match=r"model\.n_layers: found 'two'; .*integer"):
        sizes.solve(transformer, 256, "nano", {"n_layers": "two"})


def test_unknown_overrides_are_refused_with_the_nearest_name(transformer):
    with pytest.raises(ConfigError, match=r"model\.d_modle: unknown key; did you mean 'd_model'\?"):
        sizes.solve(transformer, 256, "nano", {"d_modle": 64})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: comes from the codec"):
        sizes.solve(transformer, 256, "nano", {"vocab_size": 64})


def test_impossible_overrides_say_why(transformer):
    with pytest.raises(ConfigError, match="n_heads: 7 does not divide"):
        sizes.solve(transformer, 256, "nano", {"n_heads": 7, "d_model": 64})
    with pytest.raises(ConfigError, match="these overrides"):
        sizes.solve(transformer, 256, "nano", {"d_model": 1024, "n_heads": 16})


def test_published_sizes_are_exact_and_name_the_paper(transformer):
    solved = sizes.solve(transformer, 256, "mtp-1.3b")
    assert (solved.config.d_model, solved.config.n_layers, solved.config.vocab_size) == (2048, 24, 32_000)
    assert solved.residual == 0 and solved.source == transformer.paper
    assert sizes.solve(transformer, 256, "nano").source == ""
    tied = sizes.solve(transformer, 256, "mtp-1.3b", {"tie_embeddings": True})
    assert tied.actual == solved.actual - 32_000 * 2048 and tied.residual < 0


def test_unknown_sizes_and_axes_are_refused(transformer):
    with pytest.raises(ConfigError, match=r"'mirco' is not known.*did you mean 'micro'"):
        sizes.solve(transformer, 256, "mirco")
    with pytest.raises(ConfigError, match="match: 'flops' is not known"):
        sizes.solve(transformer, 256, "nano", axis="flops")


def test_a_target_out_of_reach_is_one_line(transformer):
    with pytest.raises(ConfigError, match=r"out of reach .*vocabulary 50000.*nearest has") as caught:
        sizes.solve(transformer, 50_000, "nano")
    assert "\n" not in str(caught.value)


def test_an_architecture_without_candidates_says_what_to_give():
    ngram = registry.architecture("ngram")
    assert sizes.available(ngram) == []
    with pytest.raises(ConfigError, match=r"does not come in the shared sizes.*order"):
        sizes.solve(ngram, 256, "nano")


def test_a_roughly_ordered_offer_is_searched_around_the_bisection_point(transformer):
    def candidates(vocab_size):
        widths = [8, 24, 16, 40, 32, 64, 48, 72, 56, 120, 80, 200]
        return [transformer.config(vocab_size=vocab_size, d_model=width, n_layers=2) for width in widths]

    rough = dataclasses.replace(transformer, candidates=candidates)
    nearest = min(candidates(256), key=lambda config: abs(config.n_parameters - 100_000))
    assert sizes.solve(rough, 256, "nano").config == nearest


def test_the_table_has_every_size_of_every_architecture(monkeypatch, transformer):
    monkeypatch.setattr(sizes, "SIZES", {"nano": 1e5, "micro": 4e5})
    monkeypatch.setattr(registry, "architectures", lambda: ["ngram", "transformer"])
    rows = sizes.table()
    assert [row[:2] for row in rows] == [(size, "transformer") for size in ["nano", "micro", *transformer.published]]
    micro = next(row for row in rows if row[:2] == ("micro", "transformer"))
    solved = sizes.solve(registry.architecture("transformer"), 256, "micro")
    assert micro[2] == sizes.summary(solved.config) and micro[3] == f"{solved.actual:,.0f}"
    assert all(isinstance(text, str) for row in rows for text in row)


def test_the_summary_leaves_out_defaults(transformer):
    config = transformer.config(vocab_size=300, d_model=64)
    assert sizes.summary(config) == "d_model=64"
    assert sizes.summary(dataclasses.replace(config, n_kv_heads=1)) == "d_model=64 n_kv_heads=1"
