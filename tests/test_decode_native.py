"""Whole-model decode steps: all levels agree, and the native one computes each position for itself, to the last bit.

B4 to B7 and M3, M7 are the invariants of the Transformer's and multi-token prediction's specifications."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from archbench.architectures.mtp import MTPConfig
from archbench.architectures.mtp.model import MTP, MTPState
from archbench.architectures.transformer import ARCHITECTURE, Transformer, TransformerConfig
from archbench.errors import BackendError, ContextOverflow
from archbench.flops import count_three_ways, trace
from archbench.generation import continue_from, generate
from archbench.layers import KVCache
from archbench.model import AutoregressiveState, Batch
from archbench.ops import backends, native
from archbench.sampling import GREEDY, PLAIN, Sampling
from archbench.state import copy_state, select_rows, tile_state

torch.set_num_threads(1)

needs_compiler = pytest.mark.skipif(native.reason() != "ok", reason="no native kernels")

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 16, "n_layers": 2, "n_heads": 4}
CONFIGS = {
    "narrow heads": TransformerConfig(**SIZES),
    "GQA": TransformerConfig(**SIZES, n_kv_heads=2, rope_theta=100.0),
    "MQA, odd d_ffn, L=1": TransformerConfig(**{**SIZES, "n_layers": 1}, n_kv_heads=1, d_ffn=7, norm_eps=1e-2),
    "tied": TransformerConfig(**SIZES, tie_embeddings=True),
    "no positions": TransformerConfig(**SIZES, rotary=False),
    "frontend": TransformerConfig(**SIZES, frontend_conv=3),
    "one vector and a bit": TransformerConfig(vocab_size=33, d_model=40, n_layers=2, n_heads=2, n_kv_heads=1),
    "two vectors": TransformerConfig(vocab_size=64, d_model=64, n_layers=1, n_heads=2, d_ffn=70),
    "four vectors, GQA": TransformerConfig(vocab_size=300, d_model=128, n_layers=1, n_heads=2, n_kv_heads=1),
    "ten vectors": TransformerConfig(vocab_size=31, d_model=160, n_layers=1, n_heads=1, d_ffn=33),
}


def built(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model whose gains differ from one and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = Transformer(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3 * (0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)))
    return model.eval()


def text(batch_size: int, n: int, vocab_size: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> TransformerConfig:
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.forget()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chooses the level of what follows."""
    return lambda level: monkeypatch.setenv(backends.VARIABLE, level)


def read(model: Transformer, tokens: Tensor, chunk: int, layers: Any) -> tuple[Tensor, Any]:
    """Logits behind each token, read `chunk` tokens at a time."""
    found = []
    for piece in tokens.split(chunk, dim=1):
        logits, layers = model.predict(piece, layers)
        found.append(logits)
    return torch.cat(found, dim=1), layers


# ---- all levels agree ----


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("level", ["lean", "native"])
def test_b06_logits_and_caches_are_those_of_the_modules(config: TransformerConfig, level: str, at: Any) -> None:
    model, n = built(config), 85
    tokens = text(2, n, config.vocab_size)
    at("reference")
    expected, reference = read(model, tokens, n, model.initial_layers(2))
    at(level)
    for chunk in (1, 3, 8):
        found, layers = read(model, tokens, chunk, model.initial_layers(2))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for cache_, theirs in zip(layers[: config.n_layers], reference, strict=False):
            assert cache_.length == n
            torch.testing.assert_close(cache_.valid(), theirs.valid(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layers[config.n_layers :], reference[config.n_layers :], rtol=1e-4, atol=1e-4)
    assert backends.in_use()["decode"] == level


def same_but_for_ties(model: Any, prompts: Tensor, found: Tensor, expected: Tensor) -> None:
    """Where texts part, the modules hold the two candidates within 1e-4 of each other."""
    for row in (found != expected).any(dim=1).nonzero().flatten().tolist():
        place = int((found[row] != expected[row]).nonzero()[0])
        history = torch.cat([prompts[row], found[row, : place + 1]])[None]
        law = model.score(history, model.initial_state(1))[0][0, -1]
        assert abs(float(law[found[row, place]] - law[expected[row, place]])) < 1e-4, f"row {row} parts at {place}"


@needs_compiler
@torch.no_grad()
def test_b06_greedy_texts_are_the_same_at_every_level(at: Any) -> None:
    config = replace(CONFIGS["GQA"], d_model=32, vocab_size=64)
    model, prompts = built(config), text(20, 11, 64)
    written = {}
    for level in ("reference", "lean", "native"):
        at(level)
        written[level] = generate(model, prompts, 128, GREEDY)
    for level in ("lean", "native"):
        same_but_for_ties(model, prompts, written[level], written["reference"])
    assert len(written["native"].unique()) > 10


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("level", ["lean", "native"])
def test_drawn_texts_follow_the_same_numbers(level: str, at: Any) -> None:
    model, prompts = built(CONFIGS["narrow heads"]), text(3, 5)
    sampling = Sampling(temperature=0.8, top_k=7)
    at("reference")
    expected = generate(model, prompts, 40, sampling, Generator().manual_seed(2))
    at(level)
    assert torch.equal(generate(model, prompts, 40, sampling, Generator().manual_seed(2)), expected)


@needs_compiler
@torch.no_grad()
def test_states_pass_between_levels(at: Any) -> None:
    """A prompt read by the modules, a few tokens at each level, branches and chosen rows: the same predictions."""
    model, prompt, more = built(CONFIGS["GQA"]), text(2, 30), text(2, 4, seed=3)
    at("reference")
    expected, _ = model.score(torch.cat([prompt, more, more, more], dim=1), model.initial_state(2))
    state = model.prefill(prompt, model.initial_state(2))
    for i, level in enumerate(("native", "lean", "reference")):
        at(level)
        found, after = model.score(more, copy_state(state))
        torch.testing.assert_close(found, expected[:, 30 + 4 * i : 34 + 4 * i], rtol=1e-4, atol=1e-4)
        swapped, _ = model.score(more.flip(0), select_rows(state, torch.tensor([1, 0])))
        again, _ = model.score(more[:1].repeat(2, 1), tile_state(select_rows(state, torch.tensor([0])), 2))
        torch.testing.assert_close(swapped.flip(0) if i == 0 else again[0], found if i == 0 else found[0])
        state = after


@needs_compiler
@torch.no_grad()
def test_bf16_weights_stay_bf16_and_sums_do_not(at: Any) -> None:
    config = TransformerConfig(vocab_size=70, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=50)
    exact = built(config).to(torch.bfloat16).float()
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    tokens = text(2, 24, 70)
    at("reference")
    expected, _ = read(exact, tokens, 24, exact.initial_layers(2))
    at("native")
    found, layers = read(rounded, tokens, 3, rounded.initial_layers(2))
    assert layers[0].keys.dtype == torch.bfloat16
    assert rounded.decoders.serving(rounded, 1, rounded._weights)._held[2].n_bytes < 2 * 128 * 64 * 2
    spread = expected.std()
    assert (found.float() - expected).abs().max() < 0.03 * spread  # what rounding keys and values to bf16 does
    at("lean")
    lean, _ = read(rounded, tokens, 3, rounded.initial_layers(2))
    assert (lean.float() - expected).abs().max() < 0.2 * spread


@pytest.mark.parametrize("level", ["lean", pytest.param("native", marks=needs_compiler)])
@torch.no_grad()
def test_many_steps_at_once_are_the_same_steps(config: TransformerConfig, level: str, at: Any) -> None:
    """A call that writes many tokens, and one call a token: for rows together and alone, past the room there was."""
    at(level)
    model, prompts, n = built(config), text(3, 21, config.vocab_size), 150
    state = model.prefill(prompts, model.initial_state(3))
    together = continue_from(model, copy_state(state), 3, n, GREEDY)
    steps, after = [], copy_state(state)
    for _ in range(n):
        tokens, _, after = model.decode_step(after, GREEDY, None)
        steps.append(tokens)
    assert torch.equal(torch.cat(steps, dim=1), together)
    found, counts, reached = model.decode_steps(state, 7, GREEDY, None)
    most = 1 if config.frontend_conv else 7
    assert counts.tolist() == [most] * 3 and torch.equal(found, together[:, :most])
    assert torch.equal(model.decode_step(reached, GREEDY, None).tokens, together[:, most : most + 1])


@torch.no_grad()
def test_lean_texts_in_turn_stay_where_they_are_while_they_have_room(at: Any) -> None:
    """Two texts of one model, one a copy: written in turn, in place, and as if each were alone."""
    at("lean")
    model, prompt = built(CONFIGS["GQA"]), text(1, 9)
    first = model.decode_step(model.prefill(prompt, model.initial_state(1)), GREEDY, None).state
    second = copy_state(first)
    alone = continue_from(model, copy_state(first), 1, 12, GREEDY)
    places, written = [], []
    for _ in range(12):
        one, two = model.decode_step(first, GREEDY, None), model.decode_step(second, GREEDY, None)
        first, second = one.state, two.state
        places.append([cache.keys.data_ptr() for state in (first, second) for cache in state.layers])
        written.append((one.tokens, two.tokens))
    assert all(place == places[0] for place in places)
    assert all(torch.equal(torch.cat(tokens, dim=1), alone) for tokens in zip(*written, strict=True))


# ---- each position for itself ----


@needs_compiler
@torch.no_grad()
def test_b07_native_results_do_not_depend_on_how_many_positions_or_rows_are_read(config: TransformerConfig) -> None:
    model, tokens = built(config), text(3, 8, config.vocab_size)
    whole = text(3, 75, config.vocab_size, seed=2)
    _, layers = model.hidden(whole, model.initial_layers(3))
    together, caches = model.predict(tokens, copy_state(layers))
    for chunk in (1, 2, 3, 5, 7):
        found, other = read(model, tokens, chunk, copy_state(layers))
        assert torch.equal(found, together)
        assert all(
            torch.equal(a, b)
            for x, y in zip(other, caches, strict=True)
            if isinstance(x, KVCache)
            for a, b in zip(x.valid(), y.valid(), strict=True)
        )
    for row in range(3):
        alone = select_rows(layers, torch.tensor([row]))
        assert torch.equal(model.predict(tokens[row : row + 1], alone)[0], together[row : row + 1])


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("level", ["lean", "native"])
@pytest.mark.parametrize("junk", [1, 5, 8, 100])
def test_b04_rolling_back_by_length_is_bit_exact(level: str, junk: int, at: Any) -> None:
    at(level)
    model, more = built(CONFIGS["GQA"]), text(2, 4, seed=3)
    _, layers = model.hidden(text(2, 9), model.initial_layers(2))
    clean, _ = model.predict(more, copy_state(layers))
    _, spoiled = model.hidden(text(2, junk, seed=4), layers)
    found, _ = model.predict(more, tuple(cache_._replace(length=9) for cache_ in spoiled))
    assert torch.equal(found, clean)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("level", ["lean", "native"])
def test_b05_what_lies_beyond_the_length_changes_nothing(config: TransformerConfig, level: str, at: Any) -> None:
    at(level)
    model, more = built(config), text(2, 4, config.vocab_size, seed=3)
    _, layers = model.hidden(text(2, 21, config.vocab_size), model.initial_layers(2))
    clean, _ = model.predict(more, copy_state(layers))
    spoiled = []
    for layer in layers:
        if isinstance(layer, KVCache):
            keys, values, _ = layer.with_room(30)
            keys[:, :, 21:], values[:, :, 21:] = float("nan"), float("nan")
            layer = KVCache(keys, values, 21)
        spoiled.append(layer)
    found, _ = model.predict(more, tuple(spoiled))
    assert torch.equal(found, clean)


@needs_compiler
@torch.no_grad()
def test_ties_go_to_the_lowest_id_and_a_missing_number_is_taken_for_the_largest() -> None:
    model = built(CONFIGS["two vectors"])
    state = model.prefill(text(1, 12, 64), model.initial_state(1))
    model.unembedding.weight[7:] = model.unembedding.weight[7]
    model.unembedding.weight[:7] = -model.unembedding.weight[7]
    token = int(model.decode_step(copy_state(state), GREEDY, None).tokens)
    assert token in (0, 7)
    model.unembedding.weight[33] = float("nan")
    assert int(model.decode_step(state, GREEDY, None).tokens) == 33


@needs_compiler
@torch.no_grad()
def test_positions_far_out_are_exact(at: Any) -> None:
    """Angles come from fp64, also where their table is made anew."""
    model, tokens = built(CONFIGS["two vectors"]), text(1, 1030, 64)
    at("reference")
    expected, _ = read(model, tokens, 1030, model.initial_layers(1))
    at("native")
    _, layers = model.hidden(tokens[:, :1020], model.initial_layers(1))
    found, layers = read(model, tokens[:, 1020:], 3, layers)
    torch.testing.assert_close(found, expected[:, 1020:], rtol=1e-4, atol=1e-4)
    back, _ = model.predict(tokens[:, 7:8], tuple(cache_._replace(length=7) for cache_ in layers))
    torch.testing.assert_close(back, expected[:, 7:8], rtol=1e-4, atol=1e-4)


# ---- when it is used ----


@needs_compiler
def test_auto_takes_native_for_few_tokens_without_gradients_and_nothing_else() -> None:
    model, tokens = built(CONFIGS["GQA"]), text(2, 12)
    state = model.initial_state(2)
    with torch.no_grad():
        state = model.prefill(tokens, state)
        assert "decode" not in backends.in_use()  # a longer prompt is no decode step
        with torch.autocast("cpu", torch.bfloat16):
            model.decode_step(copy_state(state), GREEDY, None)
        assert backends.in_use()["decode"] == "reference"
        backends.forget()
        model.decode_step(copy_state(state), GREEDY, None)
        assert backends.in_use()["decode"] == "native"
        backends.forget()
        model.to(torch.float64).decode_step(model.initial_state(2), GREEDY, None)
        assert backends.in_use()["decode"] == "lean"
    backends.forget()
    model = built(CONFIGS["GQA"])
    logits, _ = model.predict(tokens[:, :3], model.initial_layers(2))
    logits.sum().backward()
    assert model.blocks[0].attention.qkv.weight.grad is not None
    model.next_token_loss(Batch(tokens[:, :6], 0.0, Generator())).value.backward()
    assert "decode" not in backends.in_use()


@needs_compiler
@torch.no_grad()
def test_large_weights_and_many_threads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, at: Any) -> None:
    config = TransformerConfig(vocab_size=270_000, d_model=64, n_layers=1, n_heads=1, d_ffn=8, tie_embeddings=True)
    model = Transformer(config).eval()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    model.decode_step(model.initial_state(1), GREEDY, None)
    assert backends.in_use() == {"decode": "lean"}
    backends.forget()
    at("native")  # unless it is asked for
    model.decode_step(model.initial_state(1), GREEDY, None)
    assert backends.in_use() == {"decode": "native"}


@needs_compiler
def test_a_flop_count_sees_every_product() -> None:
    counts = count_three_ways(ARCHITECTURE, CONFIGS["GQA"], 40, works=("prefill", "decode"), steps=2)
    assert all(count.agree and count.traced is not None for count in counts.values())
    model = built(CONFIGS["GQA"])
    state = model.initial_state(1)
    with torch.inference_mode():
        assert trace(lambda: model.decode_step(state, GREEDY, None)).flops > 0
    assert "decode" not in backends.in_use()
    with torch.device("meta"):
        shadow = Transformer(CONFIGS["GQA"])
    with torch.no_grad():
        assert shadow.decode_step(shadow.initial_state(1), GREEDY, None).tokens.is_meta


@needs_compiler
def test_inference_mode_serves_and_so_do_states_it_left_behind() -> None:
    model, tokens = built(CONFIGS["GQA"]), text(1, 20)
    expected = generate(model, tokens, 12, GREEDY)
    with torch.inference_mode():
        state = model.prefill(tokens, model.initial_state(1))
        first = continue_from(model, copy_state(state), 1, 12, GREEDY)
    assert torch.equal(first, expected)
    with torch.no_grad():
        assert torch.equal(continue_from(model, state, 1, 12, GREEDY), expected)


@torch.no_grad()
def test_without_a_compiler_lean_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("ARCHBENCH_CC", str(tmp_path / "no-such-compiler"))
    model = built(CONFIGS["GQA"])
    with pytest.warns(backends.BackendWarning, match="decode runs at level 'lean'.*no C compiler") as told:
        model.decode_step(model.initial_state(1), GREEDY, None)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.decode_step(model.initial_state(1), GREEDY, None)
    assert backends.in_use() == {"decode": "lean"}
    monkeypatch.setenv(backends.VARIABLE, "native")
    with pytest.raises(BackendError, match="decode: ARCHBENCH_BACKEND=native: not available here: no C compiler"):
        model.decode_step(model.initial_state(1), GREEDY, None)


@torch.no_grad()
def test_a_level_asked_for_is_refused_where_it_cannot_serve(at: Any) -> None:
    at("native")
    model = built(CONFIGS["GQA"])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendError, match="autocast is on"):
        model.decode_step(model.initial_state(1), GREEDY, None)
    chained = MTP(MTPConfig(**{**SIZES, "n_layers": 5}, head_type="sequential"), Generator().manual_seed(0)).eval()
    with pytest.raises(BackendError, match="heads of type sequential"):
        chained.decode_step(chained.initial_state(1), GREEDY, None)
    with torch.inference_mode():
        strange = built(CONFIGS["GQA"])
        with pytest.raises(BackendError, match="inference mode"):
            strange.decode_step(strange.initial_state(1), GREEDY, None)
    with pytest.raises(BackendError, match=r"float32, bfloat16, got torch\.float64"):
        model.to(torch.float64).decode_step(model.initial_state(1), GREEDY, None)


@needs_compiler
@torch.no_grad()
def test_limits_are_errors_at_every_level(at: Any) -> None:
    model = built(replace(CONFIGS["GQA"], max_context=6))
    for level in ("reference", "lean", "native"):
        at(level)
        state = model.prefill(text(1, 5), model.initial_state(1))
        state = model.decode_step(state, GREEDY, None).state
        with pytest.raises(ContextOverflow, match="7 tokens do not fit into 6"):
            model.decode_step(state, GREEDY, None)
        with pytest.raises(IndexError):
            model.predict(torch.tensor([[3, 19]]), model.initial_layers(1))


# ---- weights that change ----


def _by_optimizer(model: Transformer) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        model.next_token_loss(Batch(text(2, 9), 0.0, Generator())).value.backward()
    optimizer.step()


def _by_copy(model: Transformer) -> None:
    model.load_state_dict(built(model.config, seed=7).state_dict())


def _by_assignment(model: Transformer) -> None:
    model.load_state_dict(built(model.config, seed=7).state_dict(), assign=True)


def _by_data(model: Transformer) -> None:
    model.blocks[1].ffn.down.weight.data = 2 * model.blocks[1].ffn.down.weight.data


def _by_parameter(model: Transformer) -> None:
    model.norm.weight = nn.Parameter(-model.norm.weight)


def _in_inference_mode(model: Transformer) -> None:
    with torch.inference_mode():
        model.unembedding.weight.mul_(-1)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("level", ["lean", "native"])
@pytest.mark.parametrize(
    "change", [_by_optimizer, _by_copy, _by_assignment, _by_data, _by_parameter, _in_inference_mode]
)
def test_changed_weights_are_used(level: str, change: Any, at: Any) -> None:
    model, tokens = built(CONFIGS["GQA"]), text(1, 6)
    at(level)
    before, _ = model.predict(tokens, model.initial_layers(1))
    change(model)
    after, _ = model.predict(tokens, model.initial_layers(1))
    at("reference")
    expected, _ = model.predict(tokens, model.initial_layers(1))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (before - after).abs().max() > 1e-3


@needs_compiler
@torch.no_grad()
def test_copies_and_checkpoints_hold_no_packed_weights() -> None:
    model, tokens = built(CONFIGS["GQA"]), text(1, 6)
    names = set(model.state_dict())
    expected, _ = model.predict(tokens, model.initial_layers(1))
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model)
    twin.norm.weight.mul_(-1)
    torch.testing.assert_close(twin.predict(tokens, twin.initial_layers(1))[0], -expected)
    assert torch.equal(model.predict(tokens, model.initial_layers(1))[0], expected)
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert torch.equal(again.predict(tokens, again.initial_layers(1))[0], expected)


@pytest.mark.parametrize("level", ["lean", pytest.param("native", marks=needs_compiler)])
def test_threads_may_share_a_model(level: str, at: Any) -> None:
    at(level)
    model = built(CONFIGS["four vectors, GQA"])
    prompts = [text(1, 20 + i, 300, seed=i) for i in range(4)]
    expected = [generate(model, prompt, 60, GREEDY) for prompt in prompts]
    found: dict[int, Tensor] = {}
    workers = [
        threading.Thread(target=lambda i=i: found.update({i: generate(model, prompts[i], 60, GREEDY)}))
        for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


# ---- multi-token prediction ----


def sentences(batch_size: int, n: int, seed: int) -> Tensor:
    """Words of a small vocabulary in random order: some tokens follow from those before, some do not."""
    draws = Generator().manual_seed(seed)
    words = [torch.randint(19, (length,), generator=Generator().manual_seed(length)) for length in (2, 3, 5, 6, 8)]
    rows = []
    for _ in range(batch_size):
        order = torch.randint(len(words), (n,), generator=draws)
        rows.append(torch.cat([words[i] for i in order])[:n])
    return torch.stack(rows)


HEADS = pytest.mark.parametrize("heads", ["replicated", "layer"])


@cache
def trained(heads: str = "replicated") -> MTP:
    """A model that has learned half of its words' spelling, so that its drafts are right about half of the time."""
    sizes = {"vocab_size": 19, "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "n_future": 6}
    model = MTP(MTPConfig(**sizes, head_type=heads, match="trunk"), Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    tokens = sentences(16, 68, seed=0)
    for step in range(40):
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            model.joint_loss(Batch(tokens, step / 40, Generator())).value.backward()
        optimizer.step()
    return model.eval()


def with_options(model: MTP, **options: Any) -> MTP:
    other = MTP(replace(model.config, **options), Generator().manual_seed(1))
    other.load_state_dict(model.state_dict())
    return other.eval()


def steps_of(model: MTP, state: MTPState, n: int) -> tuple[Tensor, list[list[int]], MTPState]:
    """The first n tokens of every row, the counts of each step, and the last state."""
    rows: list[list[int]] = [[] for _ in state.pending]
    counts = []
    while min(map(len, rows)) < n:
        tokens, count, state = model.decode_step(state, GREEDY, None)
        counts.append(count.tolist())
        for row, written, kept in zip(rows, tokens.tolist(), counts[-1], strict=True):
            row += written[:kept]
    return torch.tensor([row[:n] for row in rows]), counts, state


@needs_compiler
@torch.no_grad()
@HEADS
def test_m03_native_speculation_is_bit_exact_over_thousands_of_tokens(heads: str) -> None:
    model, prompts, n = trained(heads), sentences(10, 13, seed=4), 160
    expected = generate(model.plain(), prompts, n, GREEDY)
    written = 0
    for k in (2, 3, 4, 5, 6):
        drafting = with_options(model, draft_length=k)
        together, counts, _ = steps_of(drafting, drafting.prefill(prompts, drafting.initial_state(10)), n)
        assert torch.equal(together, expected)
        assert any(len(set(step)) > 1 for step in counts)  # rows drifted apart
        assert 1.2 < n / len(counts) < k
        written += together.numel()
    for row in range(4):
        prompt = prompts[row : row + 1]
        alone, _, _ = steps_of(model, model.prefill(prompt, model.initial_state(1)), n)
        assert torch.equal(alone, expected[row : row + 1])
    assert written == 8000
    assert backends.in_use()["decode"] == "native"


@needs_compiler
@torch.no_grad()
@HEADS
@pytest.mark.parametrize("level", ["lean", "native"])
def test_m03_speculation_at_each_level_writes_what_the_modules_write(level: str, heads: str, at: Any) -> None:
    model, prompts, n = trained(heads), sentences(6, 13, seed=5), 60
    at("reference")
    expected = generate(with_options(model, decoding="next_token"), prompts, n, GREEDY)
    at(level)
    found, counts, _ = steps_of(model, model.prefill(prompts, model.initial_state(6)), n)
    same_but_for_ties(model, prompts, found, expected)
    for row in range(3):
        prompt = prompts[row : row + 1]
        alone, _, _ = steps_of(model, model.prefill(prompt, model.initial_state(1)), n)
        same_but_for_ties(model, prompt, alone, expected[row : row + 1])
    assert max(map(max, counts)) > 2


@needs_compiler
@torch.no_grad()
@HEADS
def test_m07_rolled_back_caches_are_bitwise_those_of_the_text_read_alone(heads: str) -> None:
    model, prompt = trained(heads), sentences(1, 8, seed=6)
    state = model.initial_state(1)
    written, _, after = steps_of(model, model.prefill(prompt, state), 40)
    length = after.rows.length
    committed = torch.cat([torch.zeros(1, 1, dtype=torch.long), prompt, written], dim=1)[:, 1 : length + 1]
    fresh = model.initial_state(1)
    for piece in committed.split(5, dim=1):
        fresh = model.prefill(piece, fresh)
    assert fresh.rows.length == length
    caches = [
        *zip(after.layers, fresh.layers, strict=True),
        *zip(after.memory.caches, fresh.memory.caches, strict=True),
    ]
    for ours, theirs in caches:
        assert torch.equal(ours.keys[:, :, :length], theirs.keys[:, :, :length])
        assert torch.equal(ours.values[:, :, :length], theirs.values[:, :, :length])
    assert torch.equal(after.memory.last, fresh.memory.last)


@needs_compiler
@torch.no_grad()
@HEADS
@pytest.mark.parametrize("policy", ["point", "stochastic"])
def test_sampled_speculation_draws_the_same_at_each_level(policy: str, heads: str, at: Any) -> None:
    model, prompts = with_options(trained(heads), draft_policy=policy), sentences(3, 13, seed=7)
    written = {}
    for level in ("reference", "lean", "native"):
        at(level)
        written[level] = generate(model, prompts, 40, PLAIN, Generator().manual_seed(3))
    assert torch.equal(written["native"], written["reference"])
    assert torch.equal(written["lean"], written["reference"])


@needs_compiler
@torch.no_grad()
@HEADS
def test_blocks_shrink_before_the_context_limit(heads: str) -> None:
    model = with_options(trained(heads), max_context=30)
    prompts = sentences(2, 20, seed=8)
    free = generate(trained(heads), prompts, 10, GREEDY)
    assert torch.equal(generate(model, prompts, 10, GREEDY), free)
    with pytest.raises(ContextOverflow):
        generate(model, prompts, 13, GREEDY)


@needs_compiler
@torch.no_grad()
def test_a_plain_transformer_of_the_same_path_writes_the_same() -> None:
    model, prompts = trained(), sentences(3, 13, seed=9)
    plain = model.plain()
    state = plain.prefill(prompts, plain.initial_state(3))
    assert not state.memory.caches and not state.memory.last.numel()
    options = {name: getattr(model.config, name) for name in TransformerConfig.__dataclass_fields__}
    path = Transformer(TransformerConfig(**options))
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("extra_heads.")}
    path.load_state_dict(weights)
    assert torch.equal(generate(plain, prompts, 50, GREEDY), generate(path.eval(), prompts, 50, GREEDY))
    assert isinstance(path.initial_state(1), AutoregressiveState)
