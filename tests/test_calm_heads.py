"""CALM's flow and diffusion heads: against the naive oracle, on laws whose ideal network is known, and trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from archbench.architectures.calm import Calm, CalmConfig, denoiser
from archbench.architectures.calm.diffusion import DiffusionHead, schedule
from archbench.architectures.calm.flow import FlowHead
from archbench.architectures.calm.heads import Noise
from archbench.train import autocast
from tests.oracles import calm_naive

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 1, "d_latent": 3, "d_autoencoder": 8, "d_head": 10,
    "n_head_blocks": 2,
}  # fmt: skip


def built(**options: Any) -> Calm:
    generator = Generator().manual_seed(0)
    model = Calm(CalmConfig(**{**SIZES, **options}), generator)
    with torch.no_grad():
        for parameter in model.lm.head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_the_network_equals_the_naive_oracle(head: str) -> None:
    model = built(head=head)
    net: Any = model.lm.head.net
    w, hidden, x = calm_naive.floats(model.state_dict()), normal(2, 8, seed=1), normal(2, 3, 3, seed=2)
    times = torch.tensor([[0.0, 17.0, 999.0], [500.0, 1.0, 250.0]])
    found = net(x, times, net.condition(hidden))
    for p in range(2):
        for n in range(3):
            expected = calm_naive.denoise(w, model.config, x[p, n].tolist(), times[p, n].item(), hidden[p].tolist())
            torch.testing.assert_close(found[p, n], torch.tensor(expected), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["midpoint", "euler"])
def test_a_flow_s_samples_equal_the_naive_oracle(solver: str) -> None:
    model = built(head="flow", flow_steps=3, flow_solver=solver)
    hidden = normal(2, 8, seed=1)
    start = torch.randn(2, 2, 3, generator=Generator().manual_seed(5))
    found = model.lm.head.sample(hidden, 2, Noise(Generator().manual_seed(5)))
    w = calm_naive.floats(model.state_dict())
    for p in range(2):
        for n in range(2):
            expected = calm_naive.flow_sample(w, model.config, hidden[p].tolist(), start[p, n].tolist())
            torch.testing.assert_close(found[p, n], torch.tensor(expected), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_many_times_at_once_modulate_as_each_by_itself(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "MOST_NUMBERS", 40)  # some times in each of several pieces
    model = built(head=head)
    net: Any = model.lm.head.net
    x, condition, times = normal(2, 4, 3, seed=1), net.condition(normal(2, 8, seed=2)), [999.0, 640.0, 13.0, 2.0, 0.0]
    found = [net.modulated(x, by) for by in net.at_times(times, condition)]
    assert len(found) == len(times)
    for time, at_once in zip(times, found, strict=True):
        torch.testing.assert_close(at_once, net(x, torch.full((1, 1), time), condition), rtol=1e-5, atol=1e-5)


MEAN, SIGMA = torch.tensor([1.5, 0.0, -2.0]), torch.tensor([0.3, 1.0, 0.6])


class Ideal(nn.Module):
    """A network that nothing modulates but the time itself."""

    def condition(self, hidden: Tensor) -> Tensor:
        return hidden[:, None]

    def at_times(self, times: Sequence[float], condition: Tensor) -> Iterator[Tensor]:
        return (torch.full((1, 1), time) for time in times)

    def modulated(self, x: Tensor, by: Tensor) -> Tensor:
        return self(x, by, None)


class IdealVelocity(Ideal):
    """E[z - x_0 | x_t] where z ~ N(MEAN, SIGMA^2)."""

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        t = (time / 1000)[..., None]
        gain = (t * SIGMA**2 - (1 - t)) / (t**2 * SIGMA**2 + (1 - t) ** 2)
        return MEAN + gain * (x - t * MEAN)


class IdealNoise(Ideal):
    """E[eps | x_t] for the same law, and the variance between its bounds."""

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        signal = schedule(1000).signal[time.long()][..., None].float()
        found = (1 - signal).sqrt() * (x - signal.sqrt() * MEAN) / (signal * SIGMA**2 + 1 - signal)
        return torch.cat([found, torch.zeros_like(found)], dim=-1)


def drawn_law(head: Any, net: nn.Module) -> tuple[Tensor, Tensor]:
    head.net = net
    samples = head.sample(torch.zeros(4, 8), 1500, Noise(Generator().manual_seed(0))).flatten(0, 1)
    return samples.mean(0), samples.std(0)


@torch.no_grad()
def test_a_flow_with_the_ideal_network_draws_the_law() -> None:
    errors = {}
    for solver in ("midpoint", "euler"):
        mean, sigma = drawn_law(built(head="flow", flow_solver=solver).lm.head, IdealVelocity())
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.05)
        errors[solver] = (sigma - SIGMA).abs().max().item()
    assert errors["midpoint"] < 0.06 < errors["euler"]


@torch.no_grad()
@pytest.mark.parametrize("steps", [100, 1000])
def test_a_diffusion_with_the_ideal_network_draws_the_law(steps: int) -> None:
    mean, sigma = drawn_law(built(head="diffusion", diffusion_steps=steps).lm.head, IdealNoise())
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.06)
    torch.testing.assert_close(sigma, SIGMA, rtol=0.06, atol=0.02)


@pytest.mark.parametrize("steps", [4, 100, 1000])
def test_the_schedule_is_the_cosine_s_and_consistent_at_any_spacing(steps: int) -> None:
    plan = schedule(steps)
    time = plan.time.long().tolist()
    assert len(time) == steps and time[0] == 0 and time[-1] == 999

    def curve(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t, signal in zip(time[:-1], plan.signal.tolist(), strict=False):
        assert signal == pytest.approx(curve(t + 1) / curve(0), rel=1e-6)
    before = torch.cat([torch.ones(1, dtype=torch.float64), plan.signal[:-1]])
    # The mean of q(x_{t-1} | x_t, z), with x_t at its own mean, is the mean of x_{t-1}.
    torch.testing.assert_close(plan.from_latent + plan.from_noisy * plan.signal.sqrt(), before.sqrt())
    # Its variance, and what x_t brings along, make up the variance of x_{t-1}.
    spread = plan.log_variance[1:].exp() + plan.from_noisy[1:].square() * (1 - plan.signal[1:])
    torch.testing.assert_close(spread, 1 - before[1:])
    assert (plan.log_variance[1:] <= plan.log_beta[1:]).all()


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_before_training_the_network_says_zero_and_loss_is_that_of_silence(head: str) -> None:
    model = Calm(CalmConfig(**SIZES, head=head), Generator().manual_seed(0))
    net: Any = model.lm.head.net
    assert not net(normal(2, 3, 3, seed=1), torch.zeros(2, 3), net.condition(normal(2, 8, seed=2))).any()
    mean, sigma = torch.zeros(400, 3), torch.full((400, 3), 0.5)
    loss = model.lm.head.loss(normal(400, 8, seed=3), mean, sigma, Generator().manual_seed(0))
    expected = 1.25 if head == "flow" else 1.0  # E (z - x_0)^2 and E eps^2
    error = loss.value if head == "flow" else loss.parts["error"]
    assert error.item() == pytest.approx(expected, rel=0.06)


def two_sided(p: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Hidden vectors, and latents near +2 or -2 in the first dimension: the sign of the second is told by the hidden
    vector, the sign of the first by nothing."""
    hidden = torch.randn(p, 8, generator=generator)
    coin = torch.where(torch.rand(p, generator=generator) < 0.5, 2.0, -2.0)
    return hidden, torch.stack([coin, 2 * hidden[:, 0].sign(), torch.zeros(p)], dim=1)


def trained(head: str, steps: int) -> Any:
    config = CalmConfig(**{**SIZES, "d_head": 32, "n_head_blocks": 1}, head=head, n_samples=4, n_targets=4)
    module = Calm(config, Generator().manual_seed(0)).lm.head
    optimizer = torch.optim.Adam(module.parameters(), lr=4e-3)
    generator = Generator().manual_seed(1)
    for step in range(steps):
        hidden, mean = two_sided(96, generator)
        loss = module.loss(hidden, mean, torch.full_like(mean, 0.2), generator).value
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        optimizer.step()
    return module


@pytest.mark.parametrize("head", ["energy", "flow"])
def test_trained_heads_keep_both_modes_and_use_what_they_are_told(head: str) -> None:
    module = trained(head, 250)
    generator = Generator().manual_seed(2)
    with torch.no_grad():
        hidden, mean = two_sided(100, generator)
        drawn = module.sample(hidden, 20, Noise(generator))
    assert (drawn[..., 1].sign() == mean[:, None, 1].sign()).float().mean() > 0.85
    assert 0.35 < (drawn[..., 0] > 0).float().mean() < 0.65
    assert (drawn[..., 0].abs() > 1).float().mean() > 0.8, "not their mean, 0"


@torch.no_grad()
def test_a_trained_diffusion_uses_what_it_is_told() -> None:
    """Its samples need a longer training: at the first steps an error of eps is magnified 20,000 times, as nothing is
    clipped."""
    with torch.enable_grad():
        module = trained("diffusion", 250)
    hidden, mean = two_sided(400, Generator().manual_seed(2))
    sigma = torch.full_like(mean, 0.2)
    told, misled = (module.loss(h, mean, sigma, Generator().manual_seed(3)).parts for h in (hidden, -hidden))
    assert told["error"] < 0.6
    assert misled["error"] > told["error"] + 0.1
    assert told["divergence"] < 2


@pytest.mark.parametrize("head", ["energy", "flow", "diffusion"])
def test_shared_noise_makes_rows_independent_of_their_number(head: str) -> None:
    model = built(head=head, diffusion_steps=5, flow_steps=3)
    hidden = normal(4, 8, seed=1)
    with torch.no_grad():
        four = model.lm.head.sample(hidden, 3, Noise(Generator().manual_seed(0), shared=True))
        one = model.lm.head.sample(hidden[2:3], 3, Noise(Generator().manual_seed(0), shared=True))
    torch.testing.assert_close(four[2:3], one, rtol=1e-5, atol=1e-5)
    assert not torch.equal(four[:, 0], four[:, 1])


@pytest.mark.parametrize("head", ["energy", "flow", "diffusion"])
def test_losses_and_samples_are_fp32_under_autocast(head: str) -> None:
    model = built(head=head, diffusion_steps=3, flow_steps=2)
    module: Any = model.lm.head
    assert isinstance(module, {"flow": FlowHead, "diffusion": DiffusionHead}.get(head, nn.Module))
    with autocast("bf16-mixed", torch.device("cpu")):
        loss = module.loss(normal(5, 8, seed=1), normal(5, 3, seed=2), torch.ones(5, 3), Generator().manual_seed(0))
        samples = module.sample(normal(5, 8, seed=1), 2, Noise(Generator().manual_seed(0)))
    assert loss.value.dtype == samples.dtype == torch.float32
    assert loss.value.isfinite() and samples.isfinite().all()
