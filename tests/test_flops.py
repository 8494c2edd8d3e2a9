"""The FLOP tracer against counts by hand, the three ways against each other, and what must not pass in silence."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from archbench import registry
from archbench.errors import UnsupportedError
from archbench.flops import WORKS, count_three_ways, trace
from archbench.model import AutoregressiveModel
from archbench.ops.attention import causal_attention, causal_attention_flops
from archbench.roofline import copy_bandwidth, matmul_peak

DEVICES = ("cpu", "meta")


@pytest.mark.parametrize("device", DEVICES)
def test_products_by_hand(device: str) -> None:
    a, b = torch.zeros(3, 4, device=device), torch.zeros(4, 5, device=device)
    batch = torch.zeros(7, 3, 4, device=device)
    vector, bias = torch.zeros(4, device=device), torch.zeros(5, device=device)
    product = 2 * 3 * 4 * 5
    assert trace(lambda: a @ b).flops == product
    assert trace(lambda: torch.mm(a, b, out=torch.empty(3, 5, device=device))).flops == product
    assert trace(lambda: F.linear(a, b.T.contiguous(), bias)).flops == product
    assert trace(lambda: batch @ b).flops == 7 * product
    assert trace(lambda: torch.einsum("nij,jk->nik", batch, b)).flops == 7 * product
    assert trace(lambda: torch.baddbmm(bias, batch, b.expand(7, 4, 5))).flops == 7 * product
    assert trace(lambda: a @ vector).flops == 2 * 3 * 4
    assert trace(lambda: vector @ vector).flops == 2 * 4
    assert trace(lambda: torch.zeros(3, 5, device=device).addmm_(a, b)).flops == product


@pytest.mark.parametrize("device", DEVICES)
def test_a_linear_layer_costs_three_times_its_forward_in_training(device: str) -> None:
    layer = nn.Linear(4, 5).to(device)
    x = torch.zeros(3, 4, device=device, requires_grad=True)
    assert trace(lambda: layer(x).sum().backward()).flops == 3 * 2 * 3 * 4 * 5
    assert trace(lambda: layer(x.detach()).sum().backward()).flops == 2 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("device", DEVICES)
def test_convolutions_by_hand(device: str) -> None:
    x = torch.zeros(2, 6, 10, device=device, requires_grad=True)
    dense = nn.Conv1d(6, 8, 3).to(device)
    depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6).to(device)
    transposed = nn.ConvTranspose1d(6, 8, 3).to(device)
    assert trace(lambda: dense(x)).flops == 2 * 2 * 8 * 8 * 6 * 3
    assert trace(lambda: depthwise(x)).flops == 2 * 2 * 6 * 10 * 3
    assert trace(lambda: transposed(x)).flops == 2 * 2 * 6 * 10 * 8 * 3
    for layer in (dense, depthwise, transposed):
        forward = trace(lambda layer=layer: layer(x)).flops
        assert trace(lambda layer=layer: layer(x).sum().backward()).flops == 3 * forward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", (0.5, 1.0))
@pytest.mark.parametrize(("n", "context", "kv_heads"), ((6, 0, 4), (6, 0, 2), (1, 9, 2), (5, 9, 4), (1, 0, 4)))
def test_attention_follows_the_convention_of_the_layers(
    device: str, causal: float, n: int, context: int, kv_heads: int
) -> None:
    def count(grad: bool) -> float:
        q = torch.randn(3, 4, n, 8, device=device, requires_grad=grad)
        k, v = (torch.randn(3, kv_heads, context + n, 8, device=device, requires_grad=grad) for _ in range(2))

        def work() -> None:
            mixed = causal_attention(q, k, v)
            if grad:
                mixed.sum().backward()

        return trace(work, causal).flops

    expected = 3 * causal_attention_flops(n, context, 4, 8, causal)
    assert count(grad=False) == expected
    assert count(grad=True) == 3 * expected


def test_attention_with_dropout_counts_like_any_other() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8, requires_grad=True).unbind()
    work = lambda: F.scaled_dot_product_attention(q, k, v, None, 0.1, True).sum().backward()  # noqa: E731
    assert trace(work).flops == 3 * causal_attention_flops(6, 0, 2, 8, 0.5)


def test_attention_by_its_dispatched_names_counts_alike() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    forward = causal_attention_flops(6, 0, 2, 8, 0.5)
    out, lse = fused(q, k, v, 0.0, True)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    assert trace(lambda: fused(q, k, v, 0.0, True)).flops == forward
    assert trace(lambda: backward(out, q, k, v, out, lse, 0.0, True)).flops == 2 * forward


def test_gradients_are_the_same_while_counting() -> None:
    inputs = [torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3)]
    bias = torch.randn(6, 6, requires_grad=True)
    weight = torch.randn(1, 2, 6, 8)

    def gradients() -> tuple[torch.Tensor, ...]:
        out = F.scaled_dot_product_attention(*inputs, attn_mask=bias)
        return torch.autograd.grad((out * weight).sum(), [*inputs, bias])

    plain, counted = gradients(), []
    trace(lambda: counted.extend(gradients()))
    for left, right in zip(plain, counted, strict=True):
        torch.testing.assert_close(left, right)


def test_only_gradients_asked_for_are_counted() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    forward = causal_attention_flops(6, 0, 2, 8, 0.5)
    q.requires_grad_()
    # dP and dQ: as many products as the forward pass has.
    assert trace(lambda: causal_attention(q, k, v).sum().backward()).flops == 2 * forward


def test_inference_mode_counts_like_no_grad() -> None:
    model = built("transformer", d_model=16, n_layers=1, n_heads=2)
    tokens = torch.ones(1, 9, dtype=torch.long)
    counts = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            counts.append(trace(lambda: model.prefill(tokens, model.initial_state(1))).flops)
    assert counts[0] == counts[1] == model.flops().prefill(9)


@torch.library.custom_op("archbench_test::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("archbench_test::registered", mutates_args=())
def registered(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@register_flop_formula(torch.ops.archbench_test.registered)
def _registered_flops(x_shape: tuple[int, ...], *, out_shape: Any = None, **_: Any) -> int:
    return 7 * x_shape[0]


def test_an_unknown_operator_is_refused_by_name() -> None:
    a = torch.eye(3)
    count = trace(lambda: (a @ a, mystery(a), mystery(a), torch.fft.rfft(a)))
    assert count.refused == {"archbench_test::mystery": 2, "aten::_fft_r2c": 1}
    with pytest.raises(UnsupportedError, match=r"archbench_test::mystery \(2 calls\)"):
        _ = count.flops


def test_a_formula_registered_with_torch_is_used() -> None:
    count = trace(lambda: registered(torch.ones(5)))
    assert count.flops == 35
    assert not count.refused


def test_elementwise_work_is_free_but_seen() -> None:
    def scan() -> torch.Tensor:
        h = torch.zeros(4)
        for _ in range(10):
            h = h.exp() * 0.5 + 1
        return h

    count = trace(scan)
    assert count.flops == 0
    assert not count.calls
    assert (count.free["aten::exp"], count.free["aten::mul"], count.free["aten::add"]) == (10, 10, 10)
    assert "0 calls counted" in count.coverage


def test_phases_are_weighed_and_calls_are_not() -> None:
    a = torch.eye(3)
    one = trace(lambda: a @ a)
    both = one.plus(one, 0.25)
    assert both.flops == 1.25 * one.flops
    assert both.calls == {"aten::mm": 2}


def built(name: str, **options: Any) -> Any:
    found = registry.architecture(name)
    return found.build(found.config(vocab_size=64, **options), torch.Generator().manual_seed(0))


def random_configs(name: str) -> list[dict[str, Any]]:
    draw, configs = random.Random(0), []
    for _ in range(10):
        options: dict[str, Any] = {"vocab_size": draw.choice((5, 64, 300)), "n_layers": draw.randint(1, 3)}
        if name == "transformer":
            heads = draw.choice((1, 2, 4))
            options |= {
                "n_heads": heads,
                "n_kv_heads": draw.choice([g for g in (1, 2, 4) if heads % g == 0]),
                "d_model": heads * draw.choice((6, 8, 10)),
                "d_ffn": draw.choice((None, 24)),
            }
        else:
            options |= {
                "d_model": draw.choice((8, 20, 32)),
                "d_state": draw.choice((4, 16)),
                "d_conv": draw.choice((2, 4)),
                "expand": draw.choice((1, 2)),
            }
        configs.append({**options, "tie_embeddings": draw.random() < 0.5})
    return configs


@pytest.mark.parametrize("name", ("transformer", "mamba"))
@pytest.mark.parametrize("index", range(10))
def test_the_three_ways_agree(name: str, index: int) -> None:
    architecture = registry.architecture(name)
    config = architecture.config(**random_configs(name)[index])
    causal = 0.5 if index % 2 else 1.0
    counts = count_three_ways(architecture, config, 10 + 3 * index, causal, steps=2)
    assert set(counts) == set(WORKS)
    for count in counts.values():
        assert count.traced is not None and count.meta is not None
        assert not count.missing
        assert count.disagreement <= 0.02


def test_sizes_too_large_to_run_are_counted_on_the_meta_device() -> None:
    architecture = registry.architecture("transformer")
    config = architecture.config(**architecture.published["mtp-13b"])
    counts = count_three_ways(architecture, config, 4096, run=False)
    assert counts["training"].traced is None
    assert counts["training"].meta == pytest.approx(6 * 13e9 * 4096, rel=0.1)
    assert all(count.agree for count in counts.values())


def test_a_wrong_formula_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = registry.architecture("transformer")
    config = architecture.config(vocab_size=64, d_model=16, n_layers=1, n_heads=2)
    honest = count_three_ways(architecture, config, 16, works=("prefill",))["prefill"]
    assert honest.agree
    build = type(architecture.build(config, None))
    monkeypatch.setattr(build, "hidden_flops", lambda *_: 1.05 * honest.analytic)
    count = count_three_ways(architecture, config, 16, works=("prefill",))["prefill"]
    assert not count.agree
    assert count.disagreement == pytest.approx(0.05 / 1.05)


def test_an_uncounted_kernel_leaves_a_reason_in_place_of_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = registry.architecture("transformer")
    config = architecture.config(vocab_size=64, d_model=16, n_layers=1, n_heads=2)
    logits = type(architecture.build(config, None)).logits

    def through_mystery(self: AutoregressiveModel, hidden: torch.Tensor) -> torch.Tensor:
        return logits(self, mystery(hidden))

    monkeypatch.setattr(type(architecture.build(config, None)), "logits", through_mystery)
    count = count_three_ways(architecture, config, 16, works=("decode",))["decode"]
    assert count.traced is None
    assert "archbench_test::mystery" in count.missing["traced"]


def test_what_depends_on_values_has_no_meta_count(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = registry.architecture("transformer")
    config = architecture.config(vocab_size=64, d_model=16, n_layers=1, n_heads=2)
    kind = type(architecture.build(config, None))
    logits = kind.logits

    def looks_at_values(self: AutoregressiveModel, hidden: torch.Tensor) -> torch.Tensor:
        return logits(self, hidden + float(hidden.sum()) * 0)

    monkeypatch.setattr(kind, "logits", looks_at_values)
    count = count_three_ways(architecture, config, 16, works=("decode",))["decode"]
    assert count.traced == count.analytic
    assert count.meta is None
    assert "meta device" in count.missing["meta"]


def test_counting_does_not_teach_a_model_that_learns_by_reading() -> None:
    architecture = registry.architecture("ngram")
    config = architecture.config(vocab_size=64)
    model = architecture.build(config, None)
    count = count_three_ways(architecture, config, 16, model=model)["training"]
    assert all(float(buffer.sum()) == 0 for buffer in model.buffers())
    assert count.traced is None  # a table look-up and elementwise work: nothing that a trace could confirm
    assert "free by convention" in count.missing["traced"]
    assert count.disagreement == 0


def test_counting_leaves_the_model_as_it_was() -> None:
    architecture = registry.architecture("transformer")
    config = architecture.config(vocab_size=64, d_model=16, n_layers=1, n_heads=2)
    model = architecture.build(config, torch.Generator().manual_seed(0)).eval()
    count_three_ways(architecture, config, 8, model=model)
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_peaks_are_of_this_machine() -> None:
    peak, bandwidth = matmul_peak(repeats=2), copy_bandwidth(repeats=1)
    assert 1e8 < peak < 1e14
    assert 1e8 < bandwidth < 1e13
    a = torch.ones(256, 256)
    assert trace(lambda: a @ a).flops < peak  # less than a second of work
