"""The energy loss and the clipped KL of CALM: against naive loops, and what makes them proper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.calm.autoencoder import clipped, kl_divergence
from archbench.architectures.calm.energy import between, energy_loss
from archbench.flops import trace
from archbench.train import autocast
from tests.oracles import calm_naive

torch.set_num_threads(1)


def drawn(*shape: int, seed: int, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("exponent", [0.75, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_i06_energy_loss_equals_naive_loops(n: int, exponent: float) -> None:
    x, y = drawn(4, n, 5, seed=0), 3 + drawn(4, 7, 5, seed=1)
    expected = sum(calm_naive.energy_loss(x[p].tolist(), y[p].tolist(), exponent) for p in range(4)) / 4
    assert energy_loss(x, y, exponent).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_i06_gradient_equals_that_of_the_whole_difference_tensor(exponent: float) -> None:
    n, m = 8, 100
    x, y = drawn(6, n, 12, seed=0, requires_grad=True), drawn(6, m, 12, seed=1)
    energy_loss(x, y, exponent).backward()
    wide = x.detach().double().requires_grad_()
    crosses = (wide[:, :, None] - y.double()[:, None]).norm(dim=-1).pow(exponent).sum((1, 2)) / (n * m)
    pairs = sum((wide[:, i] - wide[:, j]).norm(dim=-1).pow(exponent) for i in range(n) for j in range(n) if i != j) / (
        n * (n - 1)
    )
    (2 * crosses - pairs).mean().backward()
    assert x.grad is not None and wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


def test_i06_order_place_and_direction_make_no_difference() -> None:
    x, y = drawn(4, 6, 5, seed=0), drawn(4, 7, 5, seed=1)
    expected = energy_loss(x, y)
    rotation = torch.linalg.qr(drawn(5, 5, seed=2))[0]
    order = torch.randperm(6, generator=Generator().manual_seed(3))
    for samples, targets in (
        (x[:, order], y.flip(1)),
        (x @ rotation, y @ rotation),
        (x + 10, y + 10),
    ):
        torch.testing.assert_close(energy_loss(samples, targets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exponent", [1.0, 1.75])
def test_i06_gradients_are_finite_when_all_samples_coincide(exponent: float) -> None:
    x = torch.zeros(3, 8, 5, requires_grad=True)
    energy_loss(x, drawn(3, 4, 5, seed=1), exponent).backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
    same = torch.ones(3, 8, 5, requires_grad=True)
    between(same, exponent).backward()
    assert same.grad is not None and not same.grad.any()


def test_i06_nothing_flows_to_the_targets() -> None:
    x, y = drawn(2, 4, 3, seed=0, requires_grad=True), drawn(2, 4, 3, seed=1, requires_grad=True)
    energy_loss(x, y).backward()
    assert y.grad is None


def test_distances_are_not_rounded_under_autocast() -> None:
    x, y = drawn(2, 4, 16, seed=0), drawn(2, 8, 16, seed=1)
    with autocast("bf16-mixed", torch.device("cpu")):
        found = energy_loss(x.bfloat16(), y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, energy_loss(x.bfloat16().float(), y), rtol=0, atol=0)


def test_the_difference_tensor_is_never_held() -> None:
    """The largest tensor that is made has N M numbers a position, not N M l."""
    positions, n, m, width = 5, 8, 100, 64
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, tensor.numel())
            return out

    x, y = drawn(positions, n, width, seed=0, requires_grad=True), drawn(positions, m, width, seed=1)
    with Watch():
        energy_loss(x, y).backward()
    assert positions * n * m <= largest <= positions * m * width < positions * n * m * width


def test_flops_are_two_products() -> None:
    x, y = drawn(5, 8, 64, seed=0, requires_grad=True), drawn(5, 100, 64, seed=1)
    assert trace(lambda: energy_loss(x, y).backward()).flops == 2 * 2 * 5 * 8 * 100 * 64


def toy_scores(exponent: float, n: int = 3000) -> dict[str, float]:
    """Mean energy score (higher is better) of several laws when outcomes come from the first."""
    generator = Generator().manual_seed(0)

    def mixture(weight: float, sigma: float) -> Tensor:
        side = torch.where(torch.rand(n, generator=generator) < weight, 2.0, -2.0)
        centre = torch.stack([side, torch.zeros(n)], dim=1)
        return centre + sigma * torch.randn(n, 2, generator=generator)

    spread = math.sqrt(0.3**2 + 16 * 0.3 * 0.7)
    gaussian = torch.randn(n, 2, generator=generator) * torch.tensor([spread, 0.3]) + torch.tensor([-0.8, 0.0])
    laws = {
        "true": mixture(0.3, 0.3),
        "wrong weight": mixture(0.5, 0.3),
        "one mode": mixture(0.0, 0.3),
        "wide": mixture(0.3, 0.8),
        "gaussian": gaussian,
        "point": torch.tensor([[-0.8, 0.0]]).repeat(n, 1),
    }
    outcomes = mixture(0.3, 0.3)
    scores = {}
    for name, law in laws.items():
        total = torch.cdist(law, outcomes).pow(exponent).mean()
        scores[name] = (torch.cdist(law, law).pow(exponent).sum() / (n * (n - 1)) - 2 * total).item()
    return scores


def test_i07_at_exponent_one_the_true_law_scores_best() -> None:
    scores = toy_scores(1.0)
    expected = {
        "true": -2.00, "wrong weight": -2.24, "one mode": -2.63, "wide": -2.10, "gaussian": -2.23, "point": -3.42
    }  # fmt: skip
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=0.08), name
    assert max(scores, key=lambda name: scores[name]) == "true"


def test_i07_at_exponent_two_laws_of_equal_mean_tie() -> None:
    scores = toy_scores(2.0)
    for name in ("wide", "gaussian", "point"):
        assert scores[name] == pytest.approx(scores["true"], abs=0.05), name
    assert scores["true"] == pytest.approx(-7.05, abs=0.4)
    assert scores["wrong weight"] < scores["true"] - 0.5


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_i07_our_loss_is_minus_the_score(exponent: float) -> None:
    """In expectation: many positions of few samples see what one position of very many does."""
    generator = Generator().manual_seed(5)
    side = torch.where(torch.rand(4000, 6, generator=generator) < 0.3, 2.0, -2.0)
    cloud = torch.stack([side, torch.zeros_like(side)], dim=-1) + 0.3 * torch.randn(4000, 6, 2, generator=generator)
    loss = energy_loss(cloud[:, :2], cloud[:, 2:], exponent)
    assert -loss.item() == pytest.approx(toy_scores(exponent)["true"], abs=0.06 if exponent == 1 else 0.6)


def test_i05_where_posterior_is_prior_the_floor_counts_and_nothing_flows() -> None:
    mean, log_sigma = torch.zeros(3, 8, requires_grad=True), torch.zeros(3, 8, requires_grad=True)
    loss = clipped(kl_divergence(mean, log_sigma), 0.5)
    loss.backward()
    assert loss.item() == 8 * 0.5
    assert mean.grad is not None and log_sigma.grad is not None
    assert not mean.grad.any() and not log_sigma.grad.any()


def test_i05_large_divergences_are_not_clipped() -> None:
    mean, log_sigma = 3 + drawn(4, 8, seed=0), -2 + 0.1 * drawn(4, 8, seed=1)
    kl = kl_divergence(mean, log_sigma)
    assert kl.min() > 0.5
    torch.testing.assert_close(clipped(kl, 0.5), kl.sum(-1).mean())
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_sigma.exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl, exact, rtol=1e-5, atol=1e-5)


def test_i05_the_maximum_comes_before_the_mean() -> None:
    assert clipped(torch.tensor([[0.0], [2.0]]), 0.5).item() == 1.25


def test_i05_clipping_equals_naive_loops() -> None:
    mean, log_sigma = drawn(5, 6, seed=2), 0.3 * drawn(5, 6, seed=3)
    expected = calm_naive.clipped_kl(mean.tolist(), log_sigma.tolist(), 0.5)
    assert clipped(kl_divergence(mean, log_sigma), 0.5).item() == pytest.approx(expected, rel=1e-5)
