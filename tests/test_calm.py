"""CALM against its naive oracle, and the invariants of its specification (their numbers in the names)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.calm import ARCHITECTURE, Calm, CalmConfig
from archbench.contract import Candidate, check
from archbench.contract.subject import train
from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import aligned, generate
from archbench.metrics.brier_lm import continuations, sampled_terms
from archbench.model import Batch, parameters_of
from archbench.sampling import GREEDY, PLAIN, Sampling
from archbench.state import copy_state
from archbench.train import autocast
from tests.oracles import calm_naive

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "vocab_size": 19,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "d_latent": 8,
    "d_autoencoder": 12,
    "d_noise": 6,
    "n_samples": 4,
    "n_targets": 5,
    "n_candidates": 16,
}
CONFIGS = {
    "K4": CalmConfig(**SIZES),
    "K1": CalmConfig(**SIZES, chunk_size=1),
    "K2 wide head": CalmConfig(**SIZES, chunk_size=2, d_head=20, n_head_blocks=2),
    "K8 deep autoencoder": CalmConfig(**SIZES, chunk_size=8, n_autoencoder_blocks=4),
    "latent inputs": CalmConfig(**SIZES, inputs="latent"),
    "both inputs": CalmConfig(**SIZES, inputs="both"),
}


def built(config: CalmConfig, seed: int = 0) -> Calm:
    """A model whose every parameter matters: gains differ from one, and nothing is zero."""
    generator = Generator().manual_seed(seed)
    model = Calm(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.75 + 0.5 * torch.rand(parameter.shape, generator=generator))
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def text(batch_size: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(19, (batch_size, n), generator=Generator().manual_seed(seed))


def hidden(model: Calm, tokens: Tensor) -> Tensor:
    """After each chunk, read from the first one on."""
    chunks = tokens.unflatten(1, (-1, model.config.chunk_size))
    return model._read(chunks, model.lm.initial_layers(len(tokens)))[0]


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> CalmConfig:
    return CONFIGS[request.param]


@torch.no_grad()
def test_autoencoder_equals_the_naive_oracle(config: CalmConfig) -> None:
    model, tokens = built(config), text(1, 3 * config.chunk_size)
    w = calm_naive.floats(model.state_dict())
    mean, sigma = model.posterior(tokens)
    logits = model.reconstruct(mean)[0].unflatten(0, (3, config.chunk_size))
    for i, chunk in enumerate(tokens[0].split(config.chunk_size)):
        mu, log_sigma = calm_naive.encode(w, config, chunk.tolist())
        torch.testing.assert_close(mean[0, i], torch.tensor(mu), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sigma[0, i], torch.tensor(log_sigma).exp(), rtol=1e-5, atol=1e-5)
        expected = torch.tensor(calm_naive.decode(w, config, mean[0, i].tolist()))
        torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hidden_and_samples_equal_the_naive_oracle(config: CalmConfig) -> None:
    model, tokens = built(config), text(1, 5 * config.chunk_size)
    w = calm_naive.floats(model.state_dict())
    expected = calm_naive.hidden(w, config, [chunk.tolist() for chunk in tokens[0].split(config.chunk_size)])
    found = hidden(model, tokens)[0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    noise = torch.rand(5, 2, config.d_noise, generator=Generator().manual_seed(3)) - 0.5
    drawn = model.lm.head(found, noise)
    for i in range(5):
        for n in range(2):
            latent = calm_naive.energy_sample(w, config, expected[i], noise[i, n].tolist())
            torch.testing.assert_close(drawn[i, n], torch.tensor(latent), rtol=1e-4, atol=1e-4)


def test_i01_shapes_and_shift() -> None:
    model = built(CONFIGS["K4"])
    mean, sigma = model.posterior(text(3, 20))
    assert mean.shape == sigma.shape == (3, 5, 8)
    assert model.reconstruct(mean).shape == (3, 20, 19)
    window = text(3, 20 + ARCHITECTURE.traits(model.config).lookahead)
    chunks = model.window(window)
    assert torch.equal(chunks[:, 1:].flatten(1), window[:, 1:]), "the targets are the next tokens of any architecture"
    assert torch.equal(chunks[:, 0], aligned(window[:, :1], 4)), "before them, what a prompt of one token would be"
    terms: list[Tensor] = []
    model.lm.head.register_forward_hook(lambda _module, _inputs, output: terms.append(output))
    model.latent_loss(Batch(window, 0.0, Generator().manual_seed(0)))
    assert terms[0].shape == (3 * 5, 4, 8), "B (L - 1) positions, N samples, l"


@pytest.mark.parametrize("work", ["prefill", "posterior"])
def test_i01_lengths_that_are_no_whole_chunks_are_refused(work: str) -> None:
    model = built(CONFIGS["K4"])
    with pytest.raises(ConfigError, match="7 tokens are no whole chunks of 4; put boundaries in front"):
        model.posterior(text(1, 7)) if work == "posterior" else model.prefill(text(1, 7), model.initial_state(1))


def test_i01_a_window_without_a_chunk_to_predict_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 tokens has no chunk of 4 to predict; raise training\.context"):
        built(CONFIGS["K4"]).latent_loss(Batch(text(1, 4), 0.0, Generator()))


@torch.no_grad()
def test_i02_a_chunk_s_code_depends_on_that_chunk_alone() -> None:
    model, tokens = built(CONFIGS["K4"]), text(2, 24)
    base = model.posterior(tokens)
    for j in range(24):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % 19
        for before, after in zip(base, model.posterior(changed), strict=True):
            same = (before == after).all(dim=-1)
            assert not same[:, j // 4].any()
            assert same[:, [i for i in range(6) if i != j // 4]].all()


@torch.no_grad()
def test_i03_changing_a_token_leaves_earlier_hidden_vectors_bit_equal(config: CalmConfig) -> None:
    model, k = built(config), config.chunk_size
    tokens = text(1, 6 * k)
    base = hidden(model, tokens)
    for j in range(6 * k):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % 19
        other = hidden(model, changed)
        assert torch.equal(other[:, : j // k], base[:, : j // k])
        assert not torch.equal(other[:, j // k], base[:, j // k])


@torch.no_grad()
def test_i03_reading_chunk_by_chunk_equals_the_whole_pass(config: CalmConfig) -> None:
    model, k = built(config), config.chunk_size
    tokens = text(2, 9 * k)
    layers, pieces = model.lm.initial_layers(2), []
    for chunk in tokens.unflatten(1, (-1, k)).split([1, 1, 4, 2, 1], dim=1):
        found, layers = model._read(chunk, layers)
        pieces.append(found)
    torch.testing.assert_close(torch.cat(pieces, dim=1), hidden(model, tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_i03_prefill_in_its_own_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = built(CONFIGS["K4"]), text(2, 44)
    whole = model.prefill(tokens, model.initial_state(2))
    monkeypatch.setattr(Calm, "prefill_chunk", 8)
    pieces = model.prefill(tokens, model.initial_state(2))
    assert torch.equal(whole.pending, pieces.pending)
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        torch.testing.assert_close(one.valid(), other.valid(), rtol=1e-5, atol=1e-5)


def test_i04_phase_two_leaves_the_autoencoder_as_it_is() -> None:
    model = built(CONFIGS["both inputs"])
    kept = {name: tensor.clone() for name, tensor in model.autoencoder.state_dict().items()}
    first, second = model.phases()
    assert not {*map(id, parameters_of(first))} & {*map(id, parameters_of(second))}
    optimizer = torch.optim.AdamW(list(parameters_of(second)), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.lm.state_dict().items()}
    for step in range(3):
        model.train()
        optimizer.zero_grad()
        second.loss(Batch(text(2, 25), 0.0, Generator().manual_seed(step))).value.backward()
        assert all(parameter.grad is None for parameter in model.autoencoder.parameters())
        optimizer.step()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.autoencoder.state_dict().items())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.lm.state_dict().items())


def test_i04_targets_do_not_depend_on_training_mode_or_autocast() -> None:
    model, chunks = built(CONFIGS["K4"]), text(2, 24).unflatten(1, (-1, 4))
    expected = model.eval()._frozen_codes(chunks)
    model.train()
    assert model.training and not any(module.training for module in model.autoencoder.modules())
    with autocast("bf16-mixed", torch.device("cpu")):
        found = model._frozen_codes(chunks)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not any(code.requires_grad for code in found)


def test_phase_one_leaves_the_language_model_without_gradient() -> None:
    model = built(CONFIGS["K4"])
    model.autoencoder_loss(Batch(text(2, 25), 0.0, Generator().manual_seed(0))).value.backward()
    assert all(parameter.grad is None for parameter in model.lm.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_losses_are_finite_fp32_under_autocast(config: CalmConfig, precision: str) -> None:
    model = built(config)
    for phase in model.phases():
        with autocast(precision, torch.device("cpu")):
            loss = phase.loss(Batch(text(2, 33), 0.0, Generator().manual_seed(0)))
        assert loss.value.dtype == torch.float32 and loss.value.isfinite()
        loss.value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters_of(phase))


def test_the_autoencoder_learns_and_latents_do_not_collapse() -> None:
    """Reconstruction from the posterior's samples, all regularisers on."""
    config = CalmConfig(**{**SIZES, "d_autoencoder": 24, "d_latent": 32, "vocab_size": 8})
    model = Calm(config, Generator().manual_seed(0))
    windows = torch.randint(1, 8, (16, 65), generator=Generator().manual_seed(1))
    phase = model.phases()[0]
    optimizer = torch.optim.AdamW(list(parameters_of(phase)), lr=1e-2)
    for step in range(150):
        loss = phase.loss(Batch(windows, 0.0, Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    mean, sigma = model.posterior(windows[:, 1:])
    drawn = mean + sigma * torch.randn(mean.shape, generator=Generator().manual_seed(2))
    accuracy = (model.reconstruct(drawn).argmax(-1) == windows[:, 1:]).float().mean()
    assert accuracy > 0.97
    assert 0.01 < sigma.mean() < 0.9


@torch.no_grad()
def test_i08_before_training_every_sample_is_zero_and_brier_is_twice_the_accuracy_less_one() -> None:
    model = Calm(CONFIGS["K4"], Generator().manual_seed(0)).eval()
    noise = torch.rand(6, 3, 6, generator=Generator().manual_seed(1))
    assert not model.lm.head(torch.randn(6, 16, generator=Generator().manual_seed(2)), noise).any()
    state = model.prefill(text(6, 8), model.initial_state(6))
    drawn = continuations(model, state, 6, 3, Generator().manual_seed(3)).numpy()
    truth = text(6, 4, seed=5).numpy()
    truth[:3] = drawn[:3, 0]
    hits = (drawn[:, 0] == truth).cumprod(axis=1)
    assert (drawn == drawn[:, :1]).all(), "collision is 1"
    assert (sampled_terms(truth, drawn) == 2 * hits - 1).all()
    assert hits[:3].all() and not hits.all()


@torch.no_grad()
def test_a_step_writes_and_reads_k_tokens(config: CalmConfig) -> None:
    model, k = built(config), config.chunk_size
    state = model.prefill(text(2, 3 * k), model.initial_state(2))
    tokens, counts, state = model.decode_step(state, PLAIN, Generator().manual_seed(0))
    assert tokens.shape == (2, k) and counts.tolist() == [k, k]
    assert torch.equal(state.pending, tokens)
    assert state.layers[0].length == 4, "the boundaries' chunk and three of text"


@torch.no_grad()
def test_plain_draws_are_the_decoder_s_choice_for_the_head_s_samples() -> None:
    model = built(CONFIGS["K4"])
    state = model.prefill(text(2, 8), model.initial_state(2))
    last, _ = model._read(state.pending[:, None], copy_state(state).layers)
    noise = torch.rand(2, 1, 6, generator=Generator().manual_seed(4)) - 0.5
    expected = model.reconstruct(model.lm.head(last[:, 0], noise)).argmax(-1)
    assert torch.equal(model.decode_step(state, PLAIN, Generator().manual_seed(4)).tokens, expected)


@torch.no_grad()
def test_draws_in_pieces_are_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = built(CONFIGS["K4"]), text(3, 8)
    whole = generate(model, prompt, 8, PLAIN, Generator().manual_seed(0))
    monkeypatch.setattr("archbench.architectures.calm.model.MAX_LOGITS", 1)
    assert torch.equal(generate(model, prompt, 8, PLAIN, Generator().manual_seed(0)), whole)


@torch.no_grad()
def test_greedy_is_the_most_frequent_draw_and_needs_no_generator() -> None:
    model = built(replace(CONFIGS["K4"], n_candidates=64))
    prompt = text(5, 8)
    texts = [generate(model, prompt, 12, GREEDY) for _ in range(2)]
    assert torch.equal(texts[0], texts[1])
    alone = torch.cat([generate(model, row, 12, GREEDY) for row in prompt.split(1)])
    assert torch.equal(texts[0], alone), "the same noise in every row"
    state = model.prefill(prompt, model.initial_state(5))
    draws = continuations(model, copy_state(state), 5, 400, Generator().manual_seed(1))
    chosen = model.decode_step(state, GREEDY, None).tokens
    share = (draws == chosen[:, None]).all(-1).float().mean(1)
    for row, mine in zip(draws, share, strict=True):
        _, counts = row.unique(dim=0, return_counts=True)
        assert mine >= counts.max() / 400 - 0.15, "no chunk is drawn much more often"


@torch.no_grad()
@pytest.mark.parametrize("method", ["batch", "exact"])
def test_lower_temperatures_agree_more(method: str) -> None:
    model = built(replace(CONFIGS["K1"], temperature_method=method, n_candidates=50))
    prompt = text(1, 6).repeat(200, 1)

    def collision(temperature: float) -> float:
        first = generate(model, prompt, 1, Sampling(temperature=temperature), Generator().manual_seed(0))
        return first.flatten().bincount().double().div(200).square().sum().item()

    plain, half = collision(1.0), collision(0.5)
    assert plain < 0.9 and half > plain + 0.02


@pytest.mark.parametrize(
    ("sampling", "method", "reason"),
    [
        (Sampling(top_k=3), "batch", "no probabilities; leave them out"),
        (Sampling(top_p=0.9), "batch", "no probabilities; leave them out"),
        (Sampling(temperature=1.5), "exact", "only be sharpened: at most 1"),
        (Sampling(temperature=0.7), "batch", r"nearest: 1/1 = 1 or 1/2 = 0\.5"),
    ],
)
def test_what_needs_probabilities_is_refused_with_the_reason(sampling: Sampling, method: str, reason: str) -> None:
    model = built(replace(CONFIGS["K4"], temperature_method=method))
    with pytest.raises(UnsupportedError, match=reason):
        model.decode_step(model.initial_state(1), sampling, Generator().manual_seed(0))


@torch.no_grad()
def test_exact_temperature_gives_up_after_its_budget() -> None:
    model = built(replace(CONFIGS["K8 deep autoencoder"], temperature_method="exact", max_draws=40))
    with pytest.raises(UnsupportedError, match=r"no chunk was accepted in 40 draws at temperature 0\.1; raise"):
        model.decode_step(model.initial_state(8), Sampling(temperature=0.1), Generator().manual_seed(0))


VARIANTS = {
    "K1": {"chunk_size": 1, "inputs": "latent"},
    "K2 flow": {"chunk_size": 2, "head": "flow", "flow_steps": 2},
    "K8 diffusion": {"chunk_size": 8, "head": "diffusion", "diffusion_steps": 4},
    "exact, both inputs": {"inputs": "both", "temperature_method": "exact"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_contract(name: str) -> None:
    config = CalmConfig(**{**SIZES, "vocab_size": 17, "n_candidates": 8, "d_autoencoder": 24, **VARIANTS[name]})
    broken = [finding for finding in check(ARCHITECTURE, config) if finding.verdict == "broken"]
    assert broken == []


def test_training_lowers_the_energy_below_that_of_context_free_draws() -> None:
    """The skill becomes positive: hidden vectors are used."""
    config = CalmConfig(**{**SIZES, "vocab_size": 8, "d_model": 32, "d_autoencoder": 24, "d_latent": 16})
    subject = Candidate(architecture=ARCHITECTURE, config=config)
    model, windows = subject.fresh(), subject.text(8, 65)
    train(model, windows, steps_each_phase=150, learning_rate=6e-3)
    parts = model.latent_loss(Batch(windows, 0.0, Generator().manual_seed(0))).parts
    assert parts["perfect"] < parts["context_free"]
    assert parts["skill"] > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 3}, "chunk_size: 3; allowed: 1, 2, 4, 8"),
        ({"n_heads": 3}, "n_heads: 3 does not cut d_model 16"),
        ({"n_samples": 1}, "n_samples: 1; the energy loss compares samples"),
        ({"n_autoencoder_blocks": 3}, "must be even"),
        ({"energy_exponent": 0.0}, "energy_exponent: 0; must be above 0"),
        ({"energy_exponent": 2.5}, "energy_exponent: 2.5; must lie between 0 and 2"),
        ({"dropout": 1.0}, "dropout: 1.0; must lie between 0 and 0.9"),
        ({"d_latent": 0}, "latent_width: 0; must be at least 1"),
        ({"diffusion_steps": 1}, "diffusion_steps: 1; must lie between 2 and 1000"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        CalmConfig(**{**SIZES, **changes})
