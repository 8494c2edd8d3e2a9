"""Cross-entropy: at every level the loss and gradient of its definition, and torch's own where somebody watches."""

import math
import subprocess
import sys
import textwrap

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Generator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from archbench.levels import at_level
from archbench.ops import backends, native
from archbench.ops.cross_entropy import NONE, cross_entropy, loss_and_gradient

LEVELS = [
    "reference",
    "lean",
    pytest.param("native", marks=pytest.mark.skipif(native.reason() != "ok", reason=native.reason())),
]
every_level = pytest.mark.parametrize("level", LEVELS)
needs_native = pytest.mark.skipif(native.reason() != "ok", reason=native.reason())


def drawn(*shape, scale=3.0, dtype=torch.float32, seed=0):
    return (scale * torch.randn(shape, generator=Generator().manual_seed(seed))).to(dtype)


def tokens(*shape, v, seed=1):
    return torch.randint(0, v, shape, generator=Generator().manual_seed(seed))


def by_definition(logits, targets, weights=None):
    """(loss, gradient) in fp64, with the denominators written out."""
    logits = logits.detach().double().requires_grad_()
    rows, places = logits.reshape(-1, logits.shape[-1]), targets.flatten()
    counted = (places != NONE).double()
    chosen = rows.gather(1, places.clamp(min=0)[:, None])[:, 0]
    each = torch.where(counted > 0, rows.logsumexp(dim=-1) - chosen, 0.0)
    if weights is None:
        loss = each.sum() / counted.sum()
    else:
        loss = (each * weights.flatten()).sum() / weights.sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def differentiated(logits, targets, weights=None, times=1.0):
    leaf = logits.detach().requires_grad_()
    loss = cross_entropy(leaf, targets, weights)
    (times * loss).backward()
    return loss.detach(), leaf.grad


def both_ways(logits, targets, weights=None, times=1.0):
    """(loss, gradient) as autograd finds it and as it is given."""
    return differentiated(logits, targets, weights, times), loss_and_gradient(logits, targets, weights, times=times)


@every_level
@pytest.mark.parametrize(
    "shape", [(1,), (17,), (1, 1), (1, 2), (3, 15), (5, 16), (2, 7, 17), (4, 33), (2, 3, 1000), (2, 4099)]
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("times", [1.0, 0.3])
def test_values_and_gradients_are_those_of_the_definition(level, shape, weighted, times):
    logits, targets = drawn(*shape), tokens(*shape[:-1], v=shape[-1])
    weights = drawn(*shape[:-1], seed=2).abs() if weighted else None
    loss, gradient = by_definition(logits, targets, weights)
    with at_level(level):
        for value, of_logits in both_ways(logits, targets, weights, times):
            torch.testing.assert_close(value, loss.float(), rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(of_logits, times * gradient.float(), rtol=1e-5, atol=1e-7)


@every_level
def test_rows_without_a_target_say_nothing(level):
    """Not even when its first token is ruled out, nor when it is broken."""
    logits, targets = drawn(2, 5, 20), tokens(2, 5, v=20)
    targets[0, 1] = targets[1, 4] = NONE
    for weights in (None, drawn(2, 5, seed=2).abs()):
        loss, gradient = by_definition(logits, targets, weights)
        logits[0, 1, 0] = -math.inf
        with at_level(level):
            for value, of_logits in both_ways(logits, targets, weights):
                torch.testing.assert_close(value, loss.float(), rtol=2e-6, atol=2e-6)
                torch.testing.assert_close(of_logits, gradient.float(), rtol=1e-5, atol=1e-7)
                assert not of_logits[0, 1].any() and not of_logits[1, 4].any()


@every_level
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_any_type(level, dtype):
    logits, targets, weights = drawn(6, 20), tokens(6, v=20), torch.tensor([1, 0, 2, 3, 0, 1]).to(dtype)
    loss, gradient = by_definition(logits, targets, weights.double())
    with at_level(level):
        for value, of_logits in both_ways(logits, targets, weights):
            torch.testing.assert_close(value.float(), loss.float(), rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(of_logits, gradient.float(), rtol=1e-5, atol=1e-7)


@every_level
def test_weights_have_a_gradient_too(level):
    logits, targets, weights = drawn(6, 20), tokens(6, v=20), drawn(6, seed=2).abs()
    found = []
    for to in (torch.float64, torch.float32):
        leaf, counted = logits.to(to).requires_grad_(), weights.to(to).requires_grad_()
        with at_level("reference" if to is torch.float64 else level):
            cross_entropy(leaf, targets, counted).backward()
        found.append((leaf.grad.float(), counted.grad.float()))
    for wanted, given in zip(*found, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


@every_level
@pytest.mark.parametrize("rows", [(4,), (9,), (2, 4)])
def test_targets_and_weights_are_one_a_row(level, rows, monkeypatch):
    logits, targets = drawn(8, 20).requires_grad_(), tokens(8, v=20)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # outside the tests nobody looks at shapes
    for compute in (cross_entropy, loss_and_gradient):
        with at_level(level):
            with pytest.raises(ValueError, match=r"targets .* one a row"):
                compute(logits, tokens(*rows, v=20))
            with pytest.raises(ValueError, match=r"weights .* one a row"):
                compute(logits, targets, torch.ones(rows))


@needs_native
def test_targets_of_another_integer_type():
    logits, targets = drawn(8, 20), tokens(8, v=20)
    with at_level("native"):
        wanted, found = both_ways(logits, targets), both_ways(logits, targets.int())
    for (loss, gradient), (value, of_logits) in zip(wanted, found, strict=True):
        assert value == loss and torch.equal(of_logits, gradient)


@every_level
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_say_at_all_has_no_mean(level, n):
    with at_level(level):
        for loss, gradient in both_ways(drawn(n, 20), torch.full((n,), NONE)):
            assert loss.isnan() and gradient.shape == (n, 20) and not gradient.any()


@every_level
def test_known_by_hand(level):
    """All tokens alike: log v, and a gradient of 1/v everywhere but at the target."""
    logits, targets = torch.full((4, 50), 7.0), torch.tensor([0, 49, 16, 31])
    wanted = torch.full((4, 50), 1 / 50)
    wanted[torch.arange(4), targets] -= 1
    with at_level(level):
        for loss, gradient in both_ways(logits, targets):
            assert loss.item() == pytest.approx(math.log(50), rel=1e-6)
            torch.testing.assert_close(gradient, wanted / 4, rtol=1e-5, atol=0)


@every_level
@pytest.mark.parametrize("logits", [drawn(6, 40, scale=30), drawn(6, 40) + 1e4, drawn(6, 40) - 1e4, drawn(6, 40) * 1e4])
def test_large_logits(level, logits):
    targets = tokens(6, v=40)
    loss, gradient = by_definition(logits, targets)
    with at_level(level):
        for value, of_logits in both_ways(logits, targets):
            torch.testing.assert_close(value, loss.float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(of_logits, gradient.float(), rtol=1e-4, atol=1e-6)


NOT_NUMBERS = {  # of any bits; the last is what a mask of all ones reads as
    torch.float32: [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1],
    torch.bfloat16: [0x7FC0, 0x7FFF, 0x7F81, -1],
}


@every_level
@pytest.mark.parametrize("place", [3, 32])  # within whole vectors, and in what is left over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_impossible_and_the_broken_are_told(level, place, dtype):
    """A token ruled out has no gradient; not-a-number and infinity in any logit reach loss and gradient."""
    targets = torch.tensor([1])
    ruled_out = drawn(1, 34, dtype=dtype)
    ruled_out[0, place] = -math.inf
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    broken = torch.cat(
        [torch.tensor(NOT_NUMBERS[dtype], dtype=bits).view(dtype), torch.tensor([math.inf], dtype=dtype)]
    )
    with at_level(level):
        for loss, gradient in both_ways(ruled_out, targets):
            assert loss.isfinite() and gradient[0, place] == 0 and gradient.isfinite().all()
        for loss, _ in both_ways(ruled_out, torch.tensor([place])):
            assert loss == math.inf
        for value in broken:
            logits = drawn(1, 34, dtype=dtype)
            logits[0, place] = value
            for loss, gradient in both_ways(logits, targets):
                assert loss.isnan() and gradient.isnan().any()


@every_level
@pytest.mark.parametrize("times", [1.0, 1 / 3])
def test_half_types_are_computed_in_fp32(level, times):
    """And a factor is not rounded to them first."""
    logits, targets = drawn(500, 70, dtype=torch.bfloat16), tokens(500, v=70)
    with at_level(level):
        wide = both_ways(logits.float(), targets, times=times)
        for (loss, gradient), (wanted, of_wide) in zip(both_ways(logits, targets, times=times), wide, strict=True):
            assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
            torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
            rounded = 2**-8 if times == 1.0 else 2**-7  # once, or twice where the factor comes behind
            torch.testing.assert_close(gradient.float(), of_wide, rtol=rounded, atol=0)
            others = of_wide > 0  # of many sizes, so that rounding errors cancel out
            assert gradient[others].double().sum().item() == pytest.approx(
                of_wide[others].double().sum().item(), rel=5e-4
            )


@pytest.mark.parametrize("level", [*LEVELS, "auto"])
def test_fp64_and_fp16_are_served(level):
    """By torch, also where native kernels are asked for."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float16, 1e-3)):
        logits, targets = drawn(8, 70, dtype=dtype), tokens(8, v=70)
        loss, gradient = by_definition(logits, targets)
        with at_level(level):
            for value, of_logits in both_ways(logits, targets):
                assert of_logits.dtype is dtype
                torch.testing.assert_close(value.double(), loss, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(of_logits.double(), gradient, rtol=tolerance, atol=tolerance)


@every_level
@pytest.mark.parametrize("target", [20, -1, -101, 1 << 40])
def test_a_target_that_is_no_token_is_refused(level, target):
    logits, targets = drawn(6, 20), torch.tensor([0, 3, 2, 1, target, 1])
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            with at_level(level):
                with pytest.raises(IndexError):
                    differentiated(logits, targets)
                with pytest.raises(IndexError):
                    loss_and_gradient(logits, targets)
    finally:
        torch.set_num_threads(before)


@every_level
def test_rows_apart_in_memory(level):
    """Rows with a stride, and columns with one."""
    targets = tokens(2, 3, v=20)
    for logits in (drawn(2, 3, 30)[..., 5:25], drawn(2, 6, 20)[:, ::2], drawn(20, 3, 2).permute(2, 1, 0)):
        with at_level(level):
            wanted, found = both_ways(logits.contiguous(), targets), both_ways(logits, targets)
        for (loss, gradient), (value, of_logits) in zip(wanted, found, strict=True):
            torch.testing.assert_close(value, loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(of_logits, gradient, rtol=1e-6, atol=1e-9)


@needs_native
def test_threads_change_no_bit():
    logits, targets = drawn(37, 50), tokens(37, v=50)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            with at_level("native"):
                found.append(differentiated(logits, targets))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in found[1:]:
        assert loss == found[0][0] and torch.equal(gradient, found[0][1])


@every_level
def test_several_who_use_the_logits_and_differentiate_twice(level):
    """The gradient kept for the backward pass is not added to by what else comes to the logits."""
    x, targets = drawn(4, 20).requires_grad_(), tokens(4, v=20)
    with at_level(level):
        logits = x * 1.0
        loss = cross_entropy(logits, targets) + logits.sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, by_definition(x, targets)[1].float() + 1, rtol=1e-5, atol=1e-6)


@every_level
def test_logits_are_only_read(level):
    logits, targets = drawn(4, 20), tokens(4, v=20)
    before = logits.clone()
    with at_level(level):
        loss_and_gradient(logits, targets)
        differentiated(logits, targets)
    assert torch.equal(logits, before)
    assert not logits.requires_grad


@needs_native
def test_the_native_gradient_has_none_and_says_so():
    logits, targets = drawn(4, 20).requires_grad_(), tokens(4, v=20)
    with at_level("native"):
        (gradient,) = torch.autograd.grad(cross_entropy(logits, targets), logits, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.sum().backward()
    with at_level("reference"):
        (gradient,) = torch.autograd.grad(cross_entropy(logits, targets), logits, create_graph=True)
        gradient.square().sum().backward()


def test_whoever_watches_sees_torchs_own():
    """Operator counts, transforms and the meta device work, and count for no level's run."""
    logits, targets = drawn(4, 20).requires_grad_(), tokens(4, v=20)
    backends.forget()
    with FlopCounterMode(display=False):
        cross_entropy(logits, targets).backward()
    torch.testing.assert_close(logits.grad, by_definition(logits, targets)[1].float(), rtol=1e-5, atol=1e-7)
    of_rows = torch.func.vmap(torch.func.grad(lambda row, target: cross_entropy(row[None], target[None])))
    torch.testing.assert_close(of_rows(logits.detach(), targets) / 4, logits.grad, rtol=1e-5, atol=1e-7)
    meta = torch.empty(4, 20, device="meta", requires_grad=True)
    cross_entropy(meta, targets.to("meta")).backward()
    assert meta.grad is not None and meta.grad.shape == (4, 20)
    mode = FakeTensorMode()
    fake = cross_entropy(mode.from_tensor(logits), mode.from_tensor(targets))  # outside the mode
    assert fake.shape == ()
    assert backends.in_use() == {}


def test_a_compiler_sees_one_graph():
    """In a process of its own: what looks at shapes in tests cannot be compiled."""
    program = """
        import torch
        from archbench.ops.cross_entropy import cross_entropy
        logits, targets = torch.randn(4, 20, requires_grad=True), torch.arange(4)
        compiled = torch.compile(cross_entropy, fullgraph=True, backend="eager")
        assert compiled(logits, targets) == torch.nn.functional.cross_entropy(logits, targets)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@every_level
def test_many_gradients_at_once(level):
    logits, targets = drawn(4, 20).requires_grad_(), tokens(4, v=20)
    with at_level(level):
        loss = cross_entropy(logits, targets)
        (found,) = torch.autograd.grad(loss, logits, torch.tensor([1.0, 0.5]), is_grads_batched=True)
    wanted = by_definition(logits, targets)[1].float()
    torch.testing.assert_close(found, torch.stack([wanted, wanted / 2]), rtol=1e-5, atol=1e-7)


def test_without_a_gradient_it_is_torchs():
    logits, targets = drawn(4, 20).requires_grad_(), tokens(4, v=20)
    with torch.no_grad():
        assert cross_entropy(logits, targets) == F.cross_entropy(logits, targets)
    assert cross_entropy(logits.detach(), targets) == F.cross_entropy(logits, targets)


@every_level
def test_the_level_that_ran_is_noted(level):
    backends.forget()
    with at_level(level):
        differentiated(drawn(2, 8), tokens(2, v=8))
    assert backends.in_use() == {"cross_entropy": level}


@needs_native
def test_one_more_tensor_of_the_logits_size_is_all_the_memory_it_takes():
    """Nothing of the vocabulary's width is held in fp32 beside logits in bf16."""
    logits, targets = drawn(16, 4096, dtype=torch.bfloat16).requires_grad_(), tokens(16, v=4096)
    held = []
    with at_level("native"), torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        cross_entropy(logits, targets)
    assert [(x.dtype, x.shape) for x in held] == [(torch.bfloat16, (16, 4096))]
