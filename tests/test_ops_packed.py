"""Documents packed into one row equal the documents alone: convolution, both recurrences and the two together, at every
level, with gradients, states and windows. Numbers in test names are those of the specification of Mamba."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archbench.ops import backends, packed
from archbench.ops.conv import causal_conv
from archbench.ops.scan import selective_scan
from archbench.ops.ssd import ssd

torch.set_num_threads(1)

D, N, W, HEADS, GROUPS = 12, 3, 4, 4, 2
T = 70
BEGINS = ((0, 1, 5, 40), (), (3, 69), (0,))
"""Where documents begin in each row: at once; never; after what continues, and with the last token; only at once."""

STARTS = torch.zeros(len(BEGINS), T, dtype=torch.bool)
for _row, _begins in enumerate(BEGINS):
    STARTS[_row, list(_begins)] = True

Op = Callable[..., tuple[Tensor, Tensor]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def convolved(x: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], **options: object) -> tuple[Tensor, Tensor]:
    return causal_conv(x[..., :D], weights[0], weights[1], state, **options)


def scanned(x: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], **options: object) -> tuple[Tensor, Tensor]:
    values, step, gate, B, C = x.split([D, D, D, N, N], dim=-1)
    return selective_scan(values, step, -weights[2].exp(), B, C, weights[1], gate, weights[1], state, **options)


def dual(x: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], **options: object) -> tuple[Tensor, Tensor]:
    values, step, B, C = x.split([D, HEADS, GROUPS * N, GROUPS * N], dim=-1)
    B, C = (part.unflatten(-1, (GROUPS, N)) for part in (B, C))
    heads = values.unflatten(-1, (HEADS, -1))
    return ssd(heads, F.softplus(step), -weights[1][:HEADS].exp(), B, C, weights[1][:HEADS], state, **options)


OPS: dict[str, tuple[Op, int, tuple[int, ...]]] = {
    "causal_conv": (convolved, D, (W - 1, D)),
    "selective_scan": (scanned, 3 * D + 2 * N, (D, N)),
    "ssd": (dual, D + HEADS + 2 * GROUPS * N, (HEADS, D // HEADS, N)),
}


@pytest.fixture(params=["reference", "lean", "native"])
def level(request: pytest.FixtureRequest) -> str:
    for op in OPS:
        found = backends.available(op)[request.param]
        if found != "ok":
            pytest.skip(f"{request.param}: {found}")
    return request.param


def alone(op: Op, x: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor]:
    """Every document as a row and a call of its own."""
    outputs, last = [], []
    for row, begins in enumerate(BEGINS):
        borders = sorted({0, *begins, T})
        pieces = []
        for begin, end in itertools.pairwise(borders):
            continues = begin not in begins and state is not None
            y, after = op(
                x[row : row + 1, begin:end], state[row : row + 1] if continues else None, weights, backend=backend
            )
            pieces.append(y)
        outputs.append(torch.cat(pieces, dim=1))
        last.append(after)
    return torch.cat(outputs), torch.cat(last)


@pytest.mark.parametrize("carried", [True, False], ids=["from a state", "from nothing"])
@pytest.mark.parametrize("name", OPS)
def test_12_17_packed_documents_equal_separate_ones(name: str, level: str, carried: bool) -> None:
    op, width, state_shape = OPS[name]
    dtype, tolerance = (torch.float32, 1e-5) if level == "native" else (torch.float64, 1e-11)
    leaves = [draw(len(BEGINS), T, width), draw(D, W, seed=1), draw(D, seed=2), draw(D, N, seed=3)]
    leaves += [draw(len(BEGINS), *state_shape, seed=4)] if carried else []
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    x, weights, state = leaves[0], tuple(leaves[1:4]), leaves[4] if carried else None
    results = []
    for y, last in (
        op(x, state, weights, starts=STARTS, backend=level),
        alone(op, x, state, weights, level),
        op(x, state, weights, backend=level),
    ):
        into = (y * draw(*y.shape, seed=5)).sum() + (last * draw(*last.shape, seed=6)).sum()
        results.append([y, last, *torch.autograd.grad(into, leaves, allow_unused=True)])
    for found, expected in zip(*results[:2], strict=True):
        if expected is None:  # a weight that the operation does not have
            assert found is None
        else:
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    seen = (results[0][0] - results[2][0]).flatten(2).norm(dim=-1) > 1e-4  # what documents would else have seen
    assert not seen[1].any() and not seen[2, :3].any()
    assert seen[0, 1] and seen[0, 5] and seen[0, 40] and seen[2, 3] and seen[2, 69]
    assert seen[0, 0] == seen[3, 0] == carried


def test_12_17_convolution_and_recurrence_together_keep_documents_apart(level: str) -> None:
    """A block's two ops in turn; a change in one document reaches no other, and the state after is its own."""
    weights = (draw(D + 2 * GROUPS * N, W).float(), draw(D + 2 * GROUPS * N, seed=1).float())
    decays = -draw(HEADS, seed=2).float().exp()

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, _ = causal_conv(x[..., HEADS:], *weights, None, starts=STARTS, backend=level)
        values, B, C = mixed.split([D, GROUPS * N, GROUPS * N], dim=-1)
        B, C = (part.unflatten(-1, (GROUPS, N)) for part in (B, C))
        step = F.softplus(x[..., :HEADS])
        return ssd(values.unflatten(-1, (HEADS, -1)), step, decays, B, C, starts=STARTS, backend=level)

    x = draw(len(BEGINS), T, HEADS + D + 2 * GROUPS * N, seed=3).float()
    changed = x.clone()
    changed[0, 5:40] += 1
    (base, last), (found, after) = block(x), block(changed)
    same = (found == base).flatten(2).all(dim=-1)
    assert same[0, :5].all() and same[0, 40:].all() and same[1:].all()
    assert not same[0, 5:40].any()
    assert torch.equal(last, after)


@pytest.mark.parametrize("name", OPS)
def test_without_tokens_the_state_comes_back(name: str) -> None:
    op, width, state_shape = OPS[name]
    weights, state = (draw(D, W), draw(D), draw(D, N)), draw(2, *state_shape)
    _, after = op(draw(2, 0, width), state, weights, starts=torch.zeros(2, 0, dtype=torch.bool), backend="reference")
    assert torch.equal(after, state)


def test_starts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"starts is \(3, 8\); with x of 3 rows it must be \(3, 7\)"):
        packed.cut(torch.zeros(3, 8, dtype=torch.bool), 3, 7)
