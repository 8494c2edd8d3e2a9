"""Infini-attention against its naive oracle, and the invariants of its specification (their numbers in the names)."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures import transformer
from archbench.architectures.infini_attention import (
    ARCHITECTURE,
    Infini,
    InfiniConfig,
    LayerState,
    contribution,
    features,
    read,
    recall_in_order,
    recall_in_parallel,
)
from archbench.architectures.local import Local, LocalConfig
from archbench.errors import ConfigError
from archbench.flops import count_three_ways
from archbench.layers import rotary_angles
from archbench.model import Batch
from archbench.segments import Angles, carried_over, segment_angles
from archbench.sizes import SIZES as NAMED_SIZES
from archbench.sizes import on_meta, parameters, solve
from archbench.state import copy_state, state_bytes, tensors
from tests.oracles import infini_naive

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 16, "n_layers": 2, "n_heads": 4, "segment": 5}
CONFIGS = {
    "linear": InfiniConfig(**SIZES),
    "delta": InfiniConfig(**SIZES, update="delta"),
    "bypass": InfiniConfig(**SIZES, first_segment="bypass", rope_theta=100.0),
    "delta GQA tied": InfiniConfig(**SIZES, update="delta", n_kv_heads=2, tie_embeddings=True, first_segment="bypass"),
    "MQA without positions": InfiniConfig(**{**SIZES, "segment": 3}, n_kv_heads=1, rotary=False, memory_eps=0.1),
    "segments of one token": InfiniConfig(**{**SIZES, "segment": 1}, update="delta"),
}


def built(config: InfiniConfig, seed: int = 0) -> Infini:
    """A model whose gains and gates differ from their first values and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = Infini(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.3 * (0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)))
            if name.endswith("gate"):
                parameter.copy_(2 * torch.rand(parameter.shape, generator=generator) - 0.5)
    return model.eval()


def text(batch_size: int, n: int, vocab_size: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=dtype)


def logits_of(model: Infini | Local, tokens: Tensor) -> Tensor:
    return model.logits(model.hidden(tokens, model.initial_layers(tokens.shape[0]))[0])


def with_gates(model: Infini, value: float) -> Infini:
    with torch.no_grad():
        for layer in model.layers():
            layer.gate.fill_(value)
    return model


@pytest.fixture(params=CONFIGS, name="config")
def config_fixture(request: pytest.FixtureRequest) -> InfiniConfig:
    return CONFIGS[request.param]


@torch.no_grad()
def test_whole_pass_equals_the_naive_oracle(config: InfiniConfig) -> None:
    model, tokens = built(config), text(2, 13)
    found = logits_of(model, tokens)
    for row in range(2):
        expected = torch.tensor(infini_naive.logits(model.state_dict(), config, tokens[row].tolist()))
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_step_by_step_equals_the_naive_oracle(config: InfiniConfig) -> None:
    model, tokens = built(config), text(1, 13)
    expected = infini_naive.logits(model.state_dict(), config, tokens[0].tolist())
    layers = model.initial_layers(1)
    for i in range(13):
        hidden, layers = model.hidden(tokens[:, i : i + 1], layers)
        torch.testing.assert_close(model.logits(hidden)[0, 0], torch.tensor(expected[i]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_i01_the_memory_has_the_size_of_the_formula_however_much_was_read(config: InfiniConfig) -> None:
    model, sizes = built(config), set()
    for n_segments in (1, 10, 1000):
        _, layers = model.hidden(text(2, n_segments * config.segment), model.initial_layers(2))
        assert {layer.n_finished for layer in layers} == {n_segments}
        sizes.add(sum(layer.memory.untyped_storage().nbytes() for layer in layers))
    head = config.head_dim
    assert sizes == {2 * config.n_layers * config.kv_heads * head * (head + 1) * 4} == {2 * config.memory_numbers * 4}


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [0, 1, 4, 5, 64])
def test_the_whole_state_is_two_memories_and_one_segment(config: InfiniConfig, n_tokens: int) -> None:
    model = built(config)
    state = model.prefill(text(3, n_tokens), model.initial_state(3))
    numbers = 2 * config.memory_numbers + config.segment_numbers
    assert state_bytes(state) == 3 * (4 * numbers + 8)  # and the pending token


def test_a1_the_papers_memory_is_1_585_152_numbers() -> None:
    config = InfiniConfig(**ARCHITECTURE.published["pg19"])
    layers = on_meta(ARCHITECTURE, config).initial_layers(1)  # type: ignore[attr-defined]
    assert sum(layer.memory.numel() for layer in layers) == config.memory_numbers == 1_585_152
    assert sum(t.numel() for layer in layers for t in tensors(layer.cache)) == config.segment_numbers == 50_331_648


@torch.no_grad()
@pytest.mark.parametrize("gate", [-math.inf, -1e4])
def test_i02_with_closed_gates_it_is_the_local_model(config: InfiniConfig, gate: float) -> None:
    model = with_gates(built(config), gate)
    control = Local(LocalConfig(**carried_over(config, LocalConfig)))
    control.load_state_dict({name: w for name, w in model.state_dict().items() if not name.endswith("gate")})
    tokens = text(2, 23)
    assert torch.equal(logits_of(model, tokens), logits_of(control, tokens))


@torch.no_grad()
@pytest.mark.parametrize("cut", [[1] * 23, [3, 1, 7, 12], [5, 18], [22, 1], [10, 13], [6, 6, 6, 5]])
def test_i03_any_partition_of_the_text_gives_the_same(config: InfiniConfig, cut: list[int]) -> None:
    """One layer in fp64 within 1e-10, and the model in fp32 (norms are fp32 in any case) within 1e-4."""
    model, tokens = built(config), text(2, 23)
    whole, layers, pieces = logits_of(model, tokens), model.initial_layers(2), []
    for piece in tokens.split(cut, dim=1):
        hidden, layers = model.hidden(piece, layers)
        pieces.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)

    layer, x = built(config).double().layers()[0], normal(2, 23, 16)
    whole, last = run_layer(config, layer, x)
    state, pieces = layer.initial_state(2), []
    for piece in x.split(cut, dim=1):
        out, state = run_layer(config, layer, piece, state)
        pieces.append(out)
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-10
    assert (state.memory - last.memory).abs().max() < 1e-10
    assert (state.open - last.open).abs().max() < 1e-10
    assert (state.n_finished, state.filled) == (last.n_finished, last.filled) == divmod(23, config.segment)


def run_layer(
    config: InfiniConfig, layer: Any, x: Tensor, state: LayerState | None = None
) -> tuple[Tensor, LayerState]:
    """One attention layer over inputs x, without what stands around it in the model."""
    state = state or layer.initial_state(x.shape[0])
    n, e = x.shape[1], config.head_dim
    angles = segment_angles(n, state.filled, config.segment, e, config.rope_theta, x.device) if config.rotary else None
    return layer(x, state, angles)


def segments(seed: int = 0, s: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of queries and keys, values (b=2, s, g=3, 4 positions, e=5), and a memory of one earlier segment."""
    q, k, v = (normal(2, s, 3, 4, 5, seed=10 * seed + i) for i in range(3))
    return (
        features(q),
        features(k),
        v,
        contribution(features(normal(2, 3, 4, 5, seed=7)), normal(2, 3, 4, 5), None, 0.0),
    )


@pytest.mark.parametrize("n_finished", [0, 1])
@pytest.mark.parametrize("s", [1, 2, 6])
def test_i04_parallel_equals_the_loop_in_values_and_gradients(s: int, n_finished: int) -> None:
    found = []
    for recall in (recall_in_parallel, recall_in_order):
        leaves = [x.requires_grad_() for x in segments(s=s)]
        q, k, v, memory = leaves
        memory = memory * n_finished
        reads, after = recall(q, k, v, memory, n_finished=n_finished, eps=1e-6)
        ((reads * normal(*reads.shape, seed=3)).sum() + (after * normal(*after.shape, seed=4)).sum()).backward()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        found.append([reads, after, *gradients])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-10


def test_i04_the_model_takes_the_parallel_form_and_gets_the_loops_loss_and_gradients() -> None:
    found = []
    for bptt_segments in (None, 100):  # a horizon beyond the window changes nothing but the form
        model = built(replace(CONFIGS["linear"], bptt_segments=bptt_segments))
        loss = model.next_token_loss(Batch(text(2, 24), 0.0, Generator())).value
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_i05_the_linear_read_is_kernel_attention_over_all_earlier_tokens() -> None:
    q, k, v, _ = segments()
    reads, _ = recall_in_parallel(q, k, v, torch.zeros(2, 3, 5, 6, dtype=torch.float64), n_finished=0, eps=0.0)
    for s in range(1, 6):
        keys, values = (x[:, :s].transpose(1, 2).flatten(2, 3) for x in (k, v))  # b g (s n) e
        shares = q[:, s] @ keys.transpose(-1, -2)
        expected = (shares / shares.sum(-1, keepdim=True)) @ values
        assert (reads[:, s] - expected).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("at", [4, 5, 9, 10, 12])
def test_i06_a_token_changes_nothing_before_it_and_reaches_the_next_segments(config: InfiniConfig, at: int) -> None:
    model, tokens = built(config), text(1, 20)
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % 19
    base, other = logits_of(model, tokens), logits_of(model, changed)
    assert torch.equal(base[:, :at], other[:, :at])
    assert not torch.equal(base[:, at], other[:, at])
    next_start = (at // config.segment + 1) * config.segment
    assert all(not torch.equal(base[:, p], other[:, p]) for p in range(next_start, 20))
    closed = with_gates(model, -math.inf)
    base, other = logits_of(closed, tokens), logits_of(closed, changed)
    assert torch.equal(base[:, next_start:], other[:, next_start:])


@torch.no_grad()
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_i07_in_the_first_segment_the_memory_is_silent(update: Any) -> None:
    """Whatever the tokens, A_mem = 0: the layer gives (1 - g) times the attention inside the segment, or all of it."""
    config = InfiniConfig(**{**SIZES, "n_layers": 1}, update=update)
    x = normal(2, 5, 16, dtype=torch.float32)
    strict, bypass = (built(replace(config, first_segment=kind)).layers()[0] for kind in ("strict", "bypass"))
    for layer in (strict, bypass):
        layer.gate.fill_(0.7)
        layer.out.weight.copy_(torch.eye(16))
    silent, whole = (run_layer(config, layer, x)[0] for layer in (strict, bypass))
    torch.testing.assert_close(silent, (1 - torch.tensor(0.7).sigmoid()) * whole)
    q, k, v, _ = segments()
    reads, _ = recall_in_order(q, k, v, torch.zeros(2, 3, 5, 6, dtype=torch.float64), n_finished=0, eps=1e-6)
    assert not reads[:, 0].any()
    assert reads[:, 1:].all()


def test_i08_the_memory_does_not_know_the_order_of_past_tokens() -> None:
    q, k, v, _ = segments()
    order = torch.randperm(4 * 5, generator=Generator().manual_seed(0))

    def shuffled(x: Tensor) -> Tensor:
        """The tokens of all segments but the last in another order, across segment borders."""
        past = x[:, :-1].transpose(1, 2).flatten(2, 3)[:, :, order].unflatten(2, (5, 4)).transpose(1, 2)
        return torch.cat([past, x[:, -1:]], dim=1)

    empty = torch.zeros(2, 3, 5, 6, dtype=torch.float64)
    base, _ = recall_in_parallel(q, k, v, empty, n_finished=0, eps=1e-6)
    other, _ = recall_in_parallel(q, shuffled(k), shuffled(v), empty, n_finished=0, eps=1e-6)
    assert (base[:, -1] - other[:, -1]).abs().max() < 1e-12
    assert (base[:, 1] - other[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize(("bptt_segments", "reaches"), [(None, 0), (100, 0), (1, 4), (2, 4), (3, 3), (4, 4)])
def test_i09_gradients_reach_back_to_the_horizon(update: Any, bptt_segments: int | None, reaches: int) -> None:
    """Gradient of the fifth segment's output towards the inputs of each segment: none before number `reaches`."""
    config = InfiniConfig(**SIZES, update=update, bptt_segments=bptt_segments)
    layer, x = built(config).layers()[0], normal(1, 27, 16, dtype=torch.float32).requires_grad_()
    run_layer(config, layer, x)[0][:, 20:25].sum().backward()
    assert x.grad is not None
    reached = [bool(x.grad[:, 5 * s : 5 * s + 5].any()) for s in range(6)]
    assert reached == [s >= reaches for s in range(5)] + [False]


def test_i09_the_horizon_of_a_window_holds_for_its_unfinished_segment() -> None:
    for bptt_segments, reached in ((None, True), (2, False), (4, True)):
        config = InfiniConfig(**SIZES, bptt_segments=bptt_segments)
        layer, x = built(config).layers()[0], normal(1, 13, 16, dtype=torch.float32).requires_grad_()
        run_layer(config, layer, x)[0][:, 10:].sum().backward()
        assert x.grad is not None
        assert bool(x.grad[:, :10].any()) == reached


def test_i10_delta_is_linear_on_the_first_segment_and_keeps_what_it_holds() -> None:
    q, k, v, memory = segments()
    empty = torch.zeros_like(memory)
    for _ in range(2):
        linear, delta = (
            recall_in_order(q[:, :1], k[:, :1], v[:, :1], empty, n_finished=0, eps=1e-6, update=update)[1]
            for update in ("linear", "delta")
        )
        assert torch.equal(linear, delta)
    held = read(k[:, 0], memory, 0.0)
    change = contribution(k[:, 0], held, memory, 0.0)
    assert change[..., :-1].abs().max() < 1e-12
    assert change[..., -1].min() > 0


def repeated_reads(update: Any, values: list[Tensor]) -> list[Tensor]:
    """What the memory returns for one key after each of the segments that hold it, with these values, alone."""
    key, found = features(normal(1, 1, 1, 5)), []
    memory, eps = torch.zeros(1, 1, 5, 6, dtype=torch.float64), 1e-13
    for n, value in enumerate(values):
        row = value.view(1, 1, 1, 1, 5)
        _, memory = recall_in_order(key[:, None], key[:, None], row, memory, n_finished=n, eps=eps, update=update)
        found.append(read(key, memory, eps).flatten())
    return found


def test_i11_a_repeated_pair_is_read_as_itself_by_linear_and_half_by_delta() -> None:
    value = normal(5, seed=3)
    for update, shares in (("linear", [1.0, 1.0, 1.0, 1.0]), ("delta", [1.0, 0.5, 0.5, 0.5])):
        for found, share in zip(repeated_reads(update, [value] * 4), shares, strict=True):
            assert (found - share * value).abs().max() < 1e-9


def test_i12_delta_forgets_more_of_an_overwritten_value() -> None:
    old, new = torch.eye(5, dtype=torch.float64)[:2]
    shares = {update: repeated_reads(update, [old] * 20 + [new] * 20)[-1] for update in ("linear", "delta")}
    assert shares["linear"][:2].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert shares["delta"][:2].tolist() == pytest.approx([0.1218, 0.3782], abs=1e-3)
    assert shares["delta"][1] / shares["delta"][0] > 2.5


@torch.no_grad()
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_i13_rotation_does_not_touch_the_memory(update: Any) -> None:
    config = InfiniConfig(**SIZES, update=update)
    layer, x = built(config).layers()[0], normal(2, 17, 16, dtype=torch.float32)
    cos, sin = rotary_angles(0, 5, 4, 1e4, x.device)
    shifted = rotary_angles(40, 5, 4, 1e4, x.device)
    order = torch.tensor([3, 0, 4, 1, 2])
    base, state = layer(x, layer.initial_state(2), Angles(cos, sin, 0))
    for angles in (Angles(*shifted, 0), Angles(cos[order], sin[order], 0), None):
        out, other = layer(x, layer.initial_state(2), angles)
        assert torch.equal(other.memory, state.memory)
        assert torch.equal(other.open, state.open)
        same = angles is not None and angles.cos is shifted[0]  # rotary positions are relative
        assert torch.allclose(out, base, atol=1e-4) == same


@torch.no_grad()
def test_i14_what_lies_beyond_the_open_segments_tokens_never_matters(config: InfiniConfig) -> None:
    """No rows are padded in this contract; the room left in the buffer is what could leak."""
    model = built(config)
    _, layers = model.hidden(text(2, 8), model.initial_layers(2))
    spoiled = copy_state(layers)
    for layer in spoiled:
        for buffer in (layer.cache.keys, layer.cache.values):
            buffer[:, :, layer.filled :] = math.nan
    more = text(2, 9, seed=4)
    (clean, after), (found, spoiled_after) = model.hidden(more, layers), model.hidden(more, spoiled)
    assert torch.equal(found, clean)
    assert all(torch.equal(a.memory, b.memory) for a, b in zip(after, spoiled_after, strict=True))


@pytest.mark.parametrize(
    "recall",
    [recall_in_parallel, recall_in_order, partial(recall_in_order, update="delta")],
    ids=["parallel", "in order", "delta"],
)
@pytest.mark.parametrize("n_finished", [0, 1])
@pytest.mark.parametrize("n_real", [0, 1, 3])
def test_i14_a_mask_on_the_keys_features_keeps_padding_out_of_the_memory(
    n_real: int, n_finished: int, recall: Any
) -> None:
    """Right padding of the last segment; where its keys' features are zero, memory and reads are as without it."""
    q, k, v, memory = segments(s=3)
    memory = memory * n_finished
    padding = normal(2, 3, 4 - n_real, 5, seed=5)
    v = torch.cat([v[:, :2], torch.cat([v[:, 2:, :, :n_real], padding[:, None]], dim=3)], dim=1)
    mask = torch.ones(3, 4, 1, dtype=torch.float64)
    mask[2, n_real:] = 0
    settings = {"n_finished": n_finished, "eps": 1e-6}
    _, before = recall(q[:, :2], k[:, :2], v[:, :2], memory, **settings)
    real = [x[:, 2:, :, :n_real] for x in (q, k, v)]
    alone, after = recall(*real, before, n_finished=n_finished + 2, eps=1e-6)
    masked, masked_after = recall(q, k * mask[:, None], v, memory, **settings)
    assert (masked_after - after).abs().max() < 1e-12
    assert torch.allclose(masked[:, 2:, :, :n_real], alone, rtol=0, atol=1e-12)
    _, unmasked_after = recall(q, k, v, memory, **settings)
    assert (unmasked_after - after).abs().amax(dim=(-1, -2)).min() > 0.1  # each head of each row


@torch.no_grad()
def test_i14_tokens_read_as_padding_change_no_earlier_logits_and_enter_the_memory(config: InfiniConfig) -> None:
    """Why rows of one call have the same number of tokens: nothing masks a token that was read."""
    model, n = built(config), 2 * config.segment - config.segment // 2
    tokens, padding = text(2, n), torch.zeros(2, 2 * config.segment - n, dtype=torch.long)
    hidden, layers = model.hidden(tokens, model.initial_layers(2))
    padded, spoiled = model.hidden(torch.cat([tokens, padding], dim=1), model.initial_layers(2))
    torch.testing.assert_close(padded[:, :n], hidden, rtol=1e-5, atol=1e-5)
    assert all(layer.n_finished == 2 for layer in spoiled)
    for layer, other in zip(layers, spoiled, strict=True):
        changed = not torch.allclose(layer.memory + layer.open, other.memory, atol=1e-3)
        assert changed == (padding.shape[1] > 0)


def test_i14_an_empty_key_is_not_an_absent_one() -> None:
    """phi(0) = 1: a key of zeros counts in the norm, so padding must never be written."""
    assert contribution(features(torch.zeros(1, 1, 5)), torch.zeros(1, 1, 5), None, 0.0)[..., -1].tolist() == [
        [1.0] * 5
    ]


def test_i15_sums_stay_fp32_under_autocast_and_exact_enough_after_8192_segments() -> None:
    model = built(CONFIGS["delta"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for cut in ([23], [1] * 23):
            layers = model.initial_layers(2)
            for piece in text(2, 23).split(cut, dim=1):
                hidden, layers = model.hidden(piece, layers)
            assert {layer.memory.dtype for layer in layers} | {layer.open.dtype for layer in layers} == {torch.float32}
            assert hidden.isfinite().all()
    keys = features(normal(1, 8192, 1, 16, 4))
    exact = keys.sum(dim=(1, 3))
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.zeros(1, 1, 4, dtype=dtype)
        for segment in keys.to(torch.float32).sum(dim=3).unbind(dim=1):
            z = z + segment.to(dtype)
        errors[dtype] = ((z.double() - exact) / exact).abs().max().item()
    k = keys.to(torch.float32)
    for recall in (recall_in_parallel, recall_in_order):
        _, memory = recall(k, k, torch.zeros_like(k), torch.zeros(1, 1, 4, 5), n_finished=0, eps=1e-6)
        assert memory.dtype == torch.float32
        assert ((memory[..., -1].double() - exact) / exact).abs().max() < 1e-3
    assert errors[torch.float32] < 1e-3 < 0.5 < errors[torch.bfloat16]


@torch.no_grad()
@pytest.mark.parametrize("n", [10, 3])
@torch.autocast("cpu", dtype=torch.bfloat16)
def test_i15_products_with_the_memory_are_fp32_under_autocast(n: int) -> None:
    """Of keys and values rounded to bf16, but themselves not rounded: two whole segments, or part of one."""
    layer, x = built(CONFIGS["linear"]).layers()[0], normal(1, n, 16, dtype=torch.float32)
    _, k, v = layer.parts(layer.rows(layer.stretches(x, 0)[0]))
    assert k.dtype == torch.bfloat16
    exact = contribution(features(k).double(), v.double(), None, 0.0).sum(dim=0)
    _, state = run_layer(CONFIGS["linear"], layer, x)
    torch.testing.assert_close((state.memory + state.open)[0].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_i16_extreme_inputs_give_finite_outputs_and_gradients(update: Any, scale: float) -> None:
    for layer in built(InfiniConfig(**SIZES, update=update)).layers():
        x = (scale * normal(2, 23, 16, dtype=torch.float32)).requires_grad_()
        out, _ = run_layer(InfiniConfig(**SIZES), layer, x)
        out.sum().backward()
        assert out.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert layer.gate.grad is not None
        assert layer.gate.grad.isfinite().all()


def test_features_keep_small_values_that_elu_plus_one_loses() -> None:
    """A needle among a million tokens needs weights near 1e-6, of which elu(x) + 1 in fp32 keeps one digit."""
    x = torch.tensor([-16.0, -14.0, -1.0, 0.0, 2.0])
    exact = torch.tensor([math.exp(-16), math.exp(-14), math.exp(-1), 1.0, 3.0])
    torch.testing.assert_close(features(x), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(features(x), torch.nn.functional.elu(x) + 1, atol=1e-6, rtol=0)
    assert features(x.to(torch.bfloat16)).dtype == torch.float32
    assert torch.autograd.gradcheck(features, normal(7).requires_grad_())


@pytest.mark.parametrize("size", ["nano", "micro", "mini", "small"])
def test_i17_it_is_the_transformer_and_one_parameter_a_head_and_layer(size: str) -> None:
    config = solve(ARCHITECTURE, 256, size).config
    sizes = {name: value for name, value in vars(config).items() if name in vars(transformer.candidates(256)[0])}
    plain = transformer.TransformerConfig(**sizes)
    counts = [parameters(on_meta(a, c)) for a, c in ((transformer.ARCHITECTURE, plain), (ARCHITECTURE, config))]
    assert counts[1] - counts[0] == config.n_layers * config.n_heads
    assert counts[1] == config.n_parameters == pytest.approx(NAMED_SIZES[size], rel=0.03)


@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_i18_linear_reads_do_not_depend_on_the_memorys_scale(c: float) -> None:
    q, _, _, memory = segments()
    base, scaled = read(q[:, 0], memory, 1e-6), read(q[:, 0], c * memory, 1e-6)
    assert (base - scaled).abs().max() < (1e-6 if c > 1 else 1e-3 * base.abs().max())
    assert (base - read(q[:, 0], c * memory, 1e-12)).abs().max() < 1e-6


@torch.no_grad()
def test_i19_a_fresh_state_is_a_reset(config: InfiniConfig) -> None:
    """What was read before leaves no trace in a state asked for anew, nor do the rows beside."""
    model, tokens = built(config), text(3, 23)
    base = logits_of(model, tokens)
    model.hidden(text(3, 40, seed=8), model.initial_layers(3))
    assert torch.equal(logits_of(model, tokens), base)
    beside = torch.cat([tokens[:1], text(2, 23, seed=9)])
    assert torch.equal(logits_of(model, beside)[0], base[0])


def random_configs(n: int) -> list[InfiniConfig]:
    chosen = random.Random(0)
    configs = []
    for _ in range(n):
        heads = chosen.choice([1, 2, 4])
        configs.append(
            InfiniConfig(
                vocab_size=chosen.randint(2, 40),
                d_model=heads * 2 * chosen.randint(1, 9),
                n_layers=chosen.randint(1, 2),
                n_heads=heads,
                n_kv_heads=chosen.choice([k for k in range(1, heads + 1) if heads % k == 0]),
                d_ffn=chosen.randint(1, 20),
                segment=chosen.choice([16, 50, 64, 128]),
                update=chosen.choice(["linear", "delta"]),
                bptt_segments=chosen.choice([None, 1, 2, 3]),
                first_segment=chosen.choice(["strict", "bypass"]),
            )
        )
    return configs


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("context", [128, 200])
def test_flops_agree_three_ways(number: int, context: int) -> None:
    for counts in count_three_ways(ARCHITECTURE, random_configs(4)[number], context, steps=2).values():
        assert not counts.missing
        assert counts.disagreement < 1e-9


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_flops_agree_three_ways_on_a_long_context(update: Any) -> None:
    config = InfiniConfig(vocab_size=16, d_model=16, n_layers=1, n_heads=2, update=update)
    for counts in count_three_ways(ARCHITECTURE, config, 2048).values():
        assert counts.disagreement < 1e-9


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_flops_of_a_token_are_the_specifications(update: Any) -> None:
    """Beyond the first segment, a layer: 8 d^2 + 6 d f, half of 4 H e N of attention on average, and two (delta: three)
    products with the memory, whose norm is one more column."""
    config = InfiniConfig(vocab_size=64, d_model=64, n_layers=1, n_heads=2, d_ffn=96, segment=32, update=update)
    model = on_meta(ARCHITECTURE, config)
    d, f, H, e, N = 64, 96, 2, 32, 32
    products = 2 if update == "linear" else 3
    expected = 8 * d * d + 6 * d * f + 2 * H * e * N + products * 2 * H * e * (e + 1)
    assert model.flops().prefill(N * 10, N * 3) / (N * 10) == pytest.approx(expected)
    mean_step = sum(model.flops().decode(N * 3 + i) for i in range(N)) / N - 2 * 64 * d
    assert mean_step == pytest.approx(expected, rel=0.01)  # a step counts its own pair whole


@torch.no_grad()
def test_steps_cost_the_same_wherever_they_fall_in_a_segment_but_for_attention() -> None:
    flops = on_meta(ARCHITECTURE, InfiniConfig(**SIZES)).flops()
    steps = [flops.decode(n) for n in range(50, 56)]
    attention = 4 * 16 * 2
    assert [step - steps[0] for step in steps] == [0, attention, 2 * attention, 3 * attention, 4 * attention, 0]


def test_gates_learn_faster_and_do_not_decay() -> None:
    model = Infini(InfiniConfig(**SIZES))
    assert model.gates().tolist() == [[0.5] * 4] * 2
    (phase,) = model.phases()
    groups = {group.name: group for group in phase.groups}
    assert [id(p) for p in groups["gates"].parameters] == [id(layer.gate) for layer in model.layers()]
    assert groups["gates"].lr_scale == 25
    assert not groups["gates"].weight_decay
    assert sum(len(group.parameters) for group in phase.groups) == len(list(model.parameters()))


def test_gates_and_loss_move_when_trained_on_what_only_the_memory_knows() -> None:
    """A text's key stands in its first segment; later ones hold a question, its answer and filler. A model without
    memory must guess: 5 times among 14 in 24 predictions; one with it, once."""
    config = InfiniConfig(vocab_size=16, d_model=32, n_layers=1, n_heads=2, segment=4)
    model = Infini(config, Generator().manual_seed(0))
    (phase,) = model.phases()
    groups = [{"params": list(g.parameters), "lr": 4e-3 * g.lr_scale} for g in phase.groups]
    optimizer, generator = torch.optim.AdamW(groups, weight_decay=0.0), Generator().manual_seed(1)
    losses = []
    for _ in range(160):
        key = torch.randint(1, 15, (16, 1), generator=generator)
        windows = torch.zeros(16, 25, dtype=torch.long)
        windows[:, 1:2] = key
        windows[:, 8:21:4] = 15
        windows[:, 9:22:4] = key
        loss = phase.loss(Batch(windows, 0.0, generator)).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    guessing = 5 * math.log(14) / 24
    assert sum(losses[-5:]) / 5 < 0.6 * guessing
    assert (model.gates() - 0.5).abs().max() > 0.1


def test_a_training_step_in_bf16_is_close_to_fp32() -> None:
    losses = []
    for enabled in (False, True):
        model = built(CONFIGS["delta"])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model.next_token_loss(Batch(text(4, 24), 0.0, Generator())).value
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("segment", 0),
        ("n_heads", 3),
        ("n_heads", 16),
        ("n_kv_heads", 3),
        ("rope_theta", 1.0),
        ("norm_eps", 0.0),
        ("boundary", 19),
        ("memory_eps", 0.0),
        ("bptt_segments", 0),
        ("gate_lr_scale", 0.0),
    ],
)
def test_impossible_configs_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=r"infini_attention\.") as caught:
        InfiniConfig(**{**SIZES, field: value})
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)
