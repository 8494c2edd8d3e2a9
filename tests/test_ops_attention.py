"""Attention levels agree with the reference, forward and backward, and say which ran."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from archbench.errors import BackendError
from archbench.flops import trace
from archbench.ops import backends
from archbench.ops.attention import FEW, KEPT, causal_attention, causal_attention_flops, in_masked_blocks
from archbench.ops.attention_blockwise import BLOCK, blockwise
from archbench.ops.attention_parts import in_parts
from archbench.ops.attention_reference import written_out


def inputs(t, s, heads=4, groups=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(t * 1000 + s)
    shapes = ((2, heads, t, width), (2, groups, s, width), (2, groups, s, width))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def literal(q, k, v):
    """Position by position, head by head, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    t, s, share = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for i in range(t):
            seen = s - t + i + 1
            keys, values = k[:, head // share, :seen], v[:, head // share, :seen]
            weights = (torch.einsum("be,bse->bs", q[:, head, i], keys) / q.shape[-1] ** 0.5).softmax(-1)
            out[:, head, i] = torch.einsum("bs,bse->be", weights, values)
    return out


@pytest.mark.parametrize(("t", "s"), [(1, 1), (5, 5), (1, 7), (3, 9), (FEW + 1, 40), (BLOCK + 3, BLOCK + 3)])
@pytest.mark.parametrize("level", ["reference", "lean"])
def test_levels_equal_the_literal_sum(t, s, level):
    q, k, v = inputs(t, s)
    found = causal_attention(q, k, v, backend=level)
    assert torch.allclose(found.double(), literal(q, k, v), atol=1e-6)


WAYS = {
    "one block": (causal_attention, 33, 33),
    "blocks, weights kept": (causal_attention, 2 * BLOCK + 5, 2 * BLOCK + 5),
    "blocks, weights made anew": (lambda q, k, v: blockwise(q, k, v, keep=False), BLOCK + 5, BLOCK + 5),
    "blocks after cached keys": (lambda q, k, v: blockwise(q, k, v, keep=True), BLOCK + 5, BLOCK + 50),
    "fused": (causal_attention, KEPT + 1, KEPT + 1),
    "masked": (causal_attention, FEW, 50),
    "masked blocks": (in_masked_blocks, BLOCK + 5, BLOCK + 50),
    "in two parts": (causal_attention, FEW + 9, 150),
}


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_equal_the_reference(way, heads):
    attend, t, s = WAYS[way]
    ours, written = (inputs(t, s, heads=heads, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(2, heads, t, 8, generator=torch.Generator().manual_seed(1))
    found, expected = attend(*ours), written_out(*written)
    assert torch.allclose(found, expected, atol=1e-12)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(ours, written, strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-11)


@pytest.mark.parametrize("attend", [in_parts, lambda q, k, v: blockwise(q, k, v, keep=True)])
def test_tensors_whose_last_dimension_is_strided_are_read_as_they_are(attend):
    q, k, v = (x.detach().transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(20, 70, dtype=torch.float64))
    assert q.stride(-1) != 1
    assert torch.allclose(attend(q, k, v), written_out(q, k, v), atol=1e-12)


def largest_and_peak(work):
    """Bytes of the largest allocation that `work` made, inside torch's kernels too, and of the most held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return max(event.nbytes() for event in events), peak


def memory(attend, t, s, dtype, gradients):
    q, k, v = inputs(t, s, heads=2, groups=2, dtype=dtype)

    def work():
        with torch.set_grad_enabled(gradients):
            out = attend(q, k, v)
        if gradients:
            out.backward(torch.ones_like(out))

    return largest_and_peak(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("t", "s"), [(1024, 1024), (256, 1024), (4, 1024)])
def test_memory_is_linear_in_the_length(t, s, dtype, gradients):
    """Twice the positions, new and cached, take at most twice the memory, and nowhere is there a t x s tensor."""
    few = t <= FEW
    _, short = memory(causal_attention, t, s, dtype, gradients)
    largest, long = memory(causal_attention, t if few else 2 * t, 2 * s, dtype, gradients)
    assert long < 2.2 * short
    assert few or largest < 0.6 * (2 * t) * (2 * s) * dtype.itemsize


def test_the_reference_holds_all_scores():
    """What the test above would find in an attention that is not linear."""
    _, short = memory(written_out, 256, 1024, torch.float32, False)
    largest, long = memory(written_out, 512, 2048, torch.float32, False)
    assert long > 3.5 * short
    assert largest >= 512 * 2048 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "s"), [(1, 90), (300, 300), (600, 600), (9, 90), (40, 90)])
def test_flops_are_those_of_the_formula_whatever_the_way(t, s, dtype, device):
    ours = [x.detach().to(device).requires_grad_() for x in inputs(t, s, dtype=dtype)]

    def work():
        out = causal_attention(*ours)
        out.backward(torch.ones_like(out))

    count = trace(work)
    assert count.flops == pytest.approx(3 * 2 * causal_attention_flops(t, s - t, 4, 8, 0.5))
    assert not count.refused


@pytest.mark.parametrize(("t", "s"), [(64, 64), (700, 700), (64, 90)])
def test_bf16_stays_within_rounding(t, s):
    ours, exact = inputs(t, s, dtype=torch.bfloat16), inputs(t, s, dtype=torch.bfloat16)
    weight = torch.randn(2, 4, t, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = causal_attention(*ours), written_out(*(x.double() for x in exact))
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.01 * expected.norm()
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(ours, exact, strict=True):
        assert (one.grad.double() - other.grad.double()).norm() < 0.02 * other.grad.double().norm()


def test_the_level_is_noted_and_absent_levels_are_refused(monkeypatch):
    q, k, v = inputs(3, 3)
    backends.forget()
    causal_attention(q, k, v)
    assert backends.in_use() == {"attention": "lean"}
    with pytest.raises(BackendError, match="backend=cuda: this level runs on cuda tensors"):
        causal_attention(q, k, v, backend="cuda")
    with pytest.raises(BackendError, match="no such level"):
        causal_attention(q, k, v, backend="native")
    monkeypatch.setenv("ARCHBENCH_BACKEND", "native")  # which attention does not have
    causal_attention(q, k, v)
    assert backends.in_use() == {"attention": "lean"}


@pytest.mark.gpu
def test_flash_attention_equals_the_reference():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v = (x.detach().cuda() for x in inputs(16, 48, width=64, dtype=torch.bfloat16))
    found = causal_attention(q, k, v, backend="cuda").float().cpu()
    assert (found - literal(q.cpu(), k.cpu(), v.cpu()).float()).abs().max() < 0.05
