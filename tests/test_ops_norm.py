"""The norm: its gradient written out is the one autograd finds, and it is used where it may be, only there."""

import pytest
import torch
from torch import Generator
from torch.utils.flop_counter import FlopCounterMode

from archbench.levels import at_level
from archbench.ops.norm import rms_norm

EPS = 1e-5


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed)).to(dtype)


def by_the_equation(x, weight):
    """In fp64, for autograd to differentiate."""
    return x * weight / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def gradients(norm, x, weight, incoming):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    norm(x, weight).backward(incoming)
    return x.grad, weight.grad


def ours(x, weight):
    return rms_norm(x, weight, EPS)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 7, 16), (2, 3, 4, 33), (0, 8)])
def test_values_and_gradients_are_those_of_the_equation(shape):
    x, weight, incoming = 3 * drawn(*shape), 1 + drawn(shape[-1], seed=1), drawn(*shape, seed=2)
    wide = x.double(), weight.double(), incoming.double()
    torch.testing.assert_close(ours(x, weight), by_the_equation(*wide[:2]).float(), rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients(ours, x, weight, incoming), gradients(by_the_equation, *wide), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


def test_rows_of_any_scale():
    """A row of zeros, which eps keeps finite, beside large and small ones."""
    x = drawn(5, 32) * torch.tensor([0.0, 1e-6, 1.0, 1e4, 1e8])[:, None]
    weight, incoming = 1 + drawn(32, seed=1), drawn(5, 32, seed=2)
    found, _ = gradients(ours, x, weight, incoming)
    wanted, _ = gradients(by_the_equation, x.double(), weight.double(), incoming.double())
    errors = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (errors < 1e-5).all(), errors


def test_half_types_are_computed_in_fp32():
    x, weight, incoming = drawn(4, 24, dtype=torch.bfloat16), 1 + drawn(24, seed=1), drawn(4, 24, seed=2).bfloat16()
    of_x, of_weight = gradients(ours, x, weight, incoming)
    assert (of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32)
    wanted = gradients(ours, x.float(), weight, incoming.float())
    torch.testing.assert_close(of_x, wanted[0].bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(of_weight, wanted[1], rtol=0, atol=0)


def test_rows_that_do_not_lie_together():
    x, weight, incoming = drawn(6, 4, 10), 1 + drawn(10, seed=1), drawn(4, 6, 10, seed=2).transpose(0, 1)
    for found, wanted in zip(
        gradients(ours, x.transpose(0, 1).contiguous().transpose(0, 1), weight, incoming),
        gradients(ours, x, weight, incoming.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_autocast_changes_no_gradient():
    x, weight, incoming = drawn(4, 24), 1 + drawn(24, seed=1), drawn(4, 24, seed=2)
    wanted = gradients(ours, x, weight, incoming)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(ours, x, weight, incoming)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, weight, incoming = drawn(6, 12), 1 + drawn(12, seed=1), drawn(6, 12, seed=2)
    wanted = gradients(ours, x, weight, incoming)
    leaves = [x, weight]
    leaves[1 - frozen].requires_grad_()
    ours(x, weight).backward(incoming)
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[1 - frozen].grad, wanted[1 - frozen])


def node_of(x, weight):
    return type(ours(x, weight).grad_fn).__name__


def test_who_is_watching_sees_operators_and_the_reference_is_differentiated_by_autograd():
    x, weight = drawn(3, 8), torch.nn.Parameter(torch.ones(8))
    assert "RMSNorm" in node_of(x, weight), "a frozen input, as of the first norm after a frozen trunk"
    assert "RMSNorm" in node_of(x.requires_grad_(), weight.detach())
    with FlopCounterMode(display=False):
        assert "RMSNorm" not in node_of(x, weight)
    with at_level("reference"):
        assert "RMSNorm" not in node_of(x, weight)
    with at_level("lean"):
        assert "RMSNorm" in node_of(x, weight)
    with torch.no_grad():
        assert ours(x, weight).grad_fn is None
    assert ours(x.to("meta"), weight.to("meta")).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_level_has_the_same_values(dtype):
    x, weight = drawn(7, 48, dtype=dtype).requires_grad_(), 1 + drawn(48, seed=1)
    with at_level("reference"):
        plain = ours(x, weight)
    assert torch.equal(plain, ours(x, weight))
    with torch.no_grad():
        assert torch.equal(plain, ours(x, weight))


def test_a_gradient_of_the_gradient_is_refused_not_wrong():
    x, weight = drawn(3, 8).requires_grad_(), torch.ones(8)
    with pytest.raises(RuntimeError, match="ARCHBENCH_BACKEND=reference"):
        torch.autograd.grad(ours(x, weight).sum(), x, create_graph=True)
    with at_level("reference"):
        (first,) = torch.autograd.grad(ours(x, weight).sum(), x, create_graph=True)
        first.sum().backward()
    assert x.grad.abs().sum() > 0
