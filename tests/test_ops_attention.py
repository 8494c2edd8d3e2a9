"""Attention levels agree with the reference, forward and backward, and say which ran."""

import pytest
import torch

from archbench.errors import BackendError
from archbench.ops import backends
from archbench.ops.attention import EXPLICIT_LENGTH, causal_attention
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


@pytest.mark.parametrize(("t", "s"), [(1, 1), (5, 5), (1, 7), (3, 9)])
@pytest.mark.parametrize("level", ["reference", "lean"])
def test_levels_equal_the_literal_sum(t, s, level):
    q, k, v = inputs(t, s)
    found = causal_attention(q, k, v, backend=level)
    assert torch.allclose(found.double(), literal(q, k, v), atol=1e-6)


def test_gradients_of_the_written_out_form_equal_the_fused_ones():
    fused, written = inputs(33, 33), inputs(33, 33)
    weight = torch.randn(2, 4, 33, 8, generator=torch.Generator().manual_seed(1))
    (causal_attention(*fused, backend="lean") * weight).sum().backward()
    (written_out(*written) * weight).sum().backward()
    for one, other in zip(fused, written, strict=True):
        assert (one.grad - other.grad).norm() < 1e-5 * one.grad.norm()


def test_bf16_at_short_lengths_stays_within_rounding():
    q, k, v = inputs(64, 64, dtype=torch.bfloat16)
    assert q.shape[2] <= EXPLICIT_LENGTH
    exact = literal(q, k, v)
    found = causal_attention(q, k, v)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.02 * exact.norm()


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
