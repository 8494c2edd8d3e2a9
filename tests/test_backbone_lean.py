"""Lean decode steps of models with a memory and of CALM: what the modules give, over any number of segments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench import registry
from archbench.flops import trace
from archbench.ops import backends, native
from archbench.sampling import GREEDY, PLAIN
from archbench.state import copy_state

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 23, "d_model": 24, "n_layers": 3, "n_heads": 4, "segment": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {"n_kv_heads": 2, "frontend_conv": 3}),
    "local without positions": ("local", {"rotary": False, "segment": 1}),
    "infini": ("infini_attention", {}),
    "infini delta, grouped, bypass": (
        "infini_attention", {"update": "delta", "n_kv_heads": 2, "first_segment": "bypass", "tie_embeddings": True},
    ),
    "memorizing": ("memorizing_transformer", {"memory": 12, "top_k": 3}),
    "memorizing, grouped": ("memorizing_transformer", {"memory": 7, "n_kv_heads": 1, "memory_layer": 0}),
    "xl": ("transformer_xl", {}),
    "xl, long memory": ("transformer_xl", {"memory": 11, "clamp": 9}),
    "xl, no memory": ("transformer_xl", {"memory": 0}),
    "xl, segments of one": ("transformer_xl", {"memory": 3, "segment": 1, "n_heads": 2}),
}  # fmt: skip


def built(name: str) -> Any:
    """A model whose every parameter matters: ones and zeros are disturbed."""
    architecture, options = MODELS[name]
    found, generator = registry.architecture(architecture), Generator().manual_seed(0)
    model = found.build(found.config(**{**SIZES, **options}), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def text(b: int, t: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (b, t), generator=Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.forget()


def read_one_by_one(model: Any, tokens: Tensor, levels: list[str], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Log-probabilities of each token and of one more, read singly at levels that take turns."""
    state, found = model.prefill(tokens[:, :3], model.initial_state(len(tokens))), []
    for i, token in enumerate(tokens[:, 3:].split(1, dim=1)):
        monkeypatch.setenv(backends.VARIABLE, levels[i % len(levels)])
        log_probs, state = model.score(token, state)
        found.append(log_probs)
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_lean_steps_are_those_of_the_modules_from_segment_to_segment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both take turns on one state."""
    model, tokens = built(name), text(2, 30)
    expected = read_one_by_one(model, tokens, ["reference"], monkeypatch)
    assert backends.in_use()["decode"] == "reference"
    backends.forget()
    torch.testing.assert_close(read_one_by_one(model, tokens, ["lean"], monkeypatch), expected, rtol=1e-4, atol=1e-4)
    assert backends.in_use()["decode"] == "lean"
    in_turns = read_one_by_one(model, tokens, ["lean", "reference", "reference"], monkeypatch)
    torch.testing.assert_close(in_turns, expected, rtol=1e-4, atol=1e-4)
    whole, _ = model.score(tokens, model.initial_state(2))
    torch.testing.assert_close(whole[:, 3:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["infini", "xl", "memorizing", "local"])
def test_hidden_vectors_are_those_of_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = built(name), text(2, 14)
    state = model.prefill(tokens, model.initial_state(2))
    found = []
    for level in ("reference", "lean"):
        monkeypatch.setenv(backends.VARIABLE, level)
        found.append(model.hidden(tokens[:, :1], copy_state(state.layers))[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["infini", "xl"])
def test_without_being_asked_the_best_level_there_is_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lean, since there is no C step; to whom asks for C as well, as for any operation that has none."""
    model = built(name)
    for level in (None, "native"):
        if level and native.reason() != "ok":
            continue
        backends.forget()
        if level:
            monkeypatch.setenv(backends.VARIABLE, level)
        model.decode_step(model.initial_state(1), GREEDY, None)
        assert backends.in_use()["decode"] == "lean"


@pytest.mark.parametrize("name", ["infini", "xl", "memorizing", "local"])
def test_lean_steps_use_the_weights_of_now(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = built(name), text(2, 8)

    @torch.no_grad()
    def logits(level: str, of: Any) -> Tensor:
        monkeypatch.setenv(backends.VARIABLE, level)
        state = of.prefill(tokens, of.initial_state(2))
        return of.predict(state.pending[:, None], state.layers)[0]

    first = logits("lean", model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    hidden, _ = model.hidden(tokens, model.initial_layers(2))
    model.logits(hidden).square().mean().backward()
    optimizer.step()
    second = logits("lean", model)
    assert (second - first).abs().max() > 1e-2
    torch.testing.assert_close(second, logits("reference", model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits("lean", copy.deepcopy(model)), second)


@torch.no_grad()
@pytest.mark.parametrize("name", ["infini", "xl", "memorizing", "local"])
def test_a_flop_count_sees_the_modules(name: str) -> None:
    model = built(name)
    state = model.prefill(text(1, 12), model.initial_state(1))
    counted = trace(lambda: model.predict(state.pending[:, None], state.layers))
    assert counted.flops == pytest.approx(model.flops().decode(11), rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("level", ["lean", "native"])
@pytest.mark.parametrize("inputs", ["discrete", "both"])
def test_calm_writes_the_chunks_that_its_modules_write(
    inputs: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level == "native" and native.reason() != "ok":
        pytest.skip(native.reason())
    found = registry.architecture("calm")
    sizes = {"d_model": 24, "n_layers": 3, "n_heads": 2, "d_latent": 3, "d_autoencoder": 8, "d_head": 10}
    config = found.config(vocab_size=23, **sizes, inputs=inputs)
    generator = Generator().manual_seed(0)
    model = found.build(config, generator).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    read = model.prefill(text(2, 4 * config.chunk_size), model.initial_state(2))

    def written(level: str) -> list[list[int]]:
        monkeypatch.setenv(backends.VARIABLE, level)
        state, draws, chunks = copy_state(read), Generator().manual_seed(3), []
        for _ in range(12):
            tokens, _, state = model.decode_step(state, PLAIN, draws)
            chunks += tokens.tolist()
        return chunks

    expected = written("reference")
    assert len({tuple(chunk) for chunk in expected}) > 3, "a text of a few chunks would test little"
    backends.forget()
    assert written(level) == expected
    assert backends.in_use()["decode"] == level
