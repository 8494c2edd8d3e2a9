"""Multi-token prediction against its naive oracle and against the Transformer, and the invariants of its specification
(their numbers in the names)."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from archbench import sizes
from archbench.architectures.mtp import ARCHITECTURE, MTPConfig
from archbench.architectures.mtp.loss import Head, weighted_sum
from archbench.architectures.mtp.model import MTP, MTPState
from archbench.architectures.mtp.rows import Rows
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.contract.drawing import chi_square_p
from archbench.errors import ConfigError, ContextOverflow
from archbench.flops import count_three_ways
from archbench.generation import generate, stream
from archbench.layers import KVCache
from archbench.metrics.memory import peak_bytes
from archbench.model import Batch, parameters_of
from archbench.sampling import GREEDY, PLAIN, Sampling, probabilities
from archbench.state import copy_state, tile_state
from tests.oracles import mtp_naive

torch.set_num_threads(1)

KINDS = ("replicated", "layer", "sequential")
V = 19
SIZES: dict[str, Any] = {"vocab_size": V, "d_model": 16, "n_layers": 5, "n_heads": 2, "n_future": 4}


def config_of(kind: str, **options: Any) -> MTPConfig:
    options = {**SIZES, **({"n_layers": 2} if kind == "replicated" else {}), **options}
    return MTPConfig(**options, head_type=kind)


def built(config: MTPConfig, seed: int = 0) -> MTP:
    """A model whose gains differ from one and whose predictions are not flat."""
    generator = Generator().manual_seed(seed)
    model = MTP(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3 * (0.75 + 0.5 * torch.rand(parameter.shape, generator=generator)))
    return model.eval()


def text(batch_size: int, n: int, seed: int = 1, vocab_size: int = V) -> Tensor:
    return torch.randint(vocab_size, (batch_size, n), generator=Generator().manual_seed(seed))


def sentences(batch_size: int, n: int, seed: int) -> Tensor:
    """Words of a small vocabulary in random order: some tokens follow from those before, some do not."""
    draws = random.Random(seed)
    words = [[draws.randrange(V) for _ in range(length)] for length in (2, 3, 5, 6, 8)]
    rows = []
    for row in range(batch_size):
        pick = random.Random(1000 * seed + row)
        rows.append(list(itertools.chain.from_iterable(pick.choice(words) for _ in range(n)))[:n])
    return torch.tensor(rows)


@cache
def trained(kind: str) -> MTP:
    """A model that has learned half of its words' spelling, so that its drafts are right about half of the time."""
    model = MTP(config_of(kind, d_model=32), Generator().manual_seed(0))
    learn(model, sentences(16, 68, seed=0), steps=40)
    return model.eval()


def learn(model: MTP, tokens: Tensor, steps: int, phase: int = 0) -> None:
    chosen = model.phases()[phase]
    optimizer = torch.optim.AdamW(list(parameters_of(chosen)), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            chosen.loss(Batch(tokens, step / steps, Generator())).value.backward()
        optimizer.step()


def with_options(model: MTP, **options: Any) -> MTP:
    """The same weights under another config."""
    other = MTP(replace(model.config, **options), Generator().manual_seed(1))
    other.load_state_dict(model.state_dict())
    return other.eval()


def next_token_path(model: MTP) -> Transformer:
    """The Transformer of trunk and head 1, from the tensors outside `extra_heads`."""
    options = {field.name: getattr(model.config, field.name) for field in fields(TransformerConfig)}
    path = Transformer(TransformerConfig(**{**options, "n_layers": model.config.n_path_layers}))
    weights = model.state_dict()
    path.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("extra_heads.")})
    return path.eval()


def steps_of(model: MTP, state: MTPState, n: int, sampling: Sampling = GREEDY, seed: int = 0) -> tuple[list, list]:
    """At least n tokens of every row, and the counts of each step."""
    generator = Generator().manual_seed(seed)
    rows: list[list[int]] = [[] for _ in state.pending]
    counts = []
    while min(map(len, rows)) < n:
        emission = model.decode_step(state, sampling, generator)
        state = emission.state
        counts.append(emission.counts.tolist())
        for row, tokens, count in zip(rows, emission.tokens.tolist(), counts[-1], strict=True):
            row += tokens[:count]
    return rows, counts


def loss_of(model: MTP, tokens: Tensor, progress: float = 0.0) -> Any:
    return model.phases()[0].loss(Batch(tokens, progress, Generator()))


# Against the oracle


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"n_heads": 4, "n_kv_heads": 2, "match": "trunk", "n_layers": 2}], ids=str)
def test_all_heads_equal_the_naive_oracle(kind: str, options: dict[str, Any]) -> None:
    model, tokens = built(config_of(kind, **options)), text(2, 10)
    found = model.all_logits(tokens)
    assert found.shape == (2, 7, 4, V)
    for row, head in itertools.product(range(2), range(1, 5)):
        expected = mtp_naive.logits(model.state_dict(), model.config, tokens[row].tolist(), head)
        torch.testing.assert_close(found[row, :, head - 1], torch.tensor(expected)[:7], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_m01_one_layer_head_is_the_transformer() -> None:
    plain = Transformer(TransformerConfig(vocab_size=V, d_model=16, n_layers=3, n_heads=2), Generator().manual_seed(5))
    model = MTP(config_of("layer", n_layers=3, n_future=1), Generator().manual_seed(5))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tokens = text(3, 20)
    for one in (plain, model):
        for parameter in one.parameters():
            parameter.grad = None
    with torch.enable_grad():
        losses = [m.phases()[0].loss(Batch(tokens, 0.0, Generator())).value for m in (plain, model)]
        for loss in losses:
            loss.backward()
    assert torch.equal(losses[0].detach(), losses[1].detach())
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=0, atol=1e-7)
    for sampling in (GREEDY, PLAIN):
        written = [generate(m.eval(), tokens, 30, sampling, Generator().manual_seed(2)) for m in (plain, model)]
        assert torch.equal(*written)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m02_next_token_decoding_is_bit_equal_to_trunk_and_head_1(kind: str) -> None:
    model = with_options(trained(kind), decoding="next_token")
    path, tokens = next_token_path(model), text(2, 12)
    assert torch.equal(model.score(tokens, model.initial_state(2))[0], path.score(tokens, path.initial_state(2))[0])
    speculative = trained(kind)
    assert torch.equal(
        speculative.score(tokens, speculative.initial_state(2))[0], path.score(tokens, path.initial_state(2))[0]
    )
    for sampling in (GREEDY, Sampling(temperature=0.8, top_k=7)):
        written = [generate(m, tokens, 24, sampling, Generator().manual_seed(3)) for m in (model, path)]
        assert torch.equal(*written)
    state = model.prefill(tokens, model.initial_state(2))
    assert not state.memory.caches and not state.memory.last.numel()


def same_but_for_ties(model: MTP, prompts: Tensor, found: Tensor, expected: Tensor) -> None:
    """Section 7.6: where texts part, the two candidates' logits are within 1e-4."""
    for row in (found != expected).any(dim=1).nonzero().flatten().tolist():
        place = int((found[row] != expected[row]).nonzero()[0])
        history = torch.cat([prompts[row], found[row, : place + 1]])[None]
        law = model.score(history, model.initial_state(1))[0][0, -1]
        assert abs(float(law[found[row, place]] - law[expected[row, place]])) < 1e-4, f"row {row} parts at {place}"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m03_m15_greedy_text_is_that_of_plain_decoding_in_ragged_batches_and_alone(kind: str) -> None:
    model, prompts, n = trained(kind), sentences(12, 13, seed=4), 72
    expected = generate(with_options(model, decoding="next_token"), prompts, n, GREEDY)
    state = model.prefill(prompts, model.initial_state(len(prompts)))
    rows, counts = steps_of(model, state, n)
    same_but_for_ties(model, prompts, torch.tensor([row[:n] for row in rows]), expected)
    assert any(len(set(step)) > 1 for step in counts)
    assert 1.2 < n / len(counts) < 3.9  # neither all drafts kept nor none
    for k in (2, 3, 4):
        shorter = with_options(model, draft_length=k)
        for rows in (prompts[:6], prompts[:1]):
            same_but_for_ties(model, rows, generate(shorter, rows, n, GREEDY), expected[: len(rows)])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m03_untrained_weights_write_the_same_greedy_text(kind: str) -> None:
    model, prompts = built(config_of(kind, n_kv_heads=1)), text(4, 3)
    expected = generate(with_options(model, decoding="next_token"), prompts, 64, GREEDY)
    same_but_for_ties(model, prompts, generate(model, prompts, 64, GREEDY), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m04_drafts_are_those_of_an_uncached_pass_over_the_text(kind: str) -> None:
    model, prompts = built(config_of(kind)), text(3, 3)
    state = model.prefill(prompts, model.initial_state(3))
    written = [row.tolist() for row in prompts]
    ragged = False
    for step in range(6):
        drafts = model.extra_heads.draft(
            model.path, copy_state(state.memory), state.rows, 3, lambda logits: logits.argmax(dim=-1)
        )
        for row in (0, 1, 2) if step % 2 else (2,):
            seen = [model.config.boundary, *written[row]]
            assert drafts[row].tolist() == mtp_naive.drafts(model.state_dict(), model.config, seen, 3)
        # Sampling with few choices makes rows keep different numbers.
        emission = model.decode_step(state, Sampling(temperature=0.3), Generator().manual_seed(step))
        state = emission.state
        ragged |= state.rows.behind is not None
        for row, tokens, count in zip(written, emission.tokens.tolist(), emission.counts.tolist(), strict=True):
            row += tokens[:count]
    assert ragged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"loss_ratio": 1.0, "n_kv_heads": 1}], ids=str)
def test_m05_head_by_head_gradients_are_those_of_the_sum(kind: str, options: dict[str, Any]) -> None:
    gradients, losses = [], []
    for backward in ("naive", "sequential"):
        model = built(config_of(kind, backward=backward, **options)).double()
        loss = loss_of(model, text(2, 13))
        loss.value.backward()
        losses.append(loss)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[0].value, losses[1].value, rtol=1e-14, atol=0)
    for i in range(1, 5):
        torch.testing.assert_close(losses[0].parts[f"head_{i}"], losses[1].parts[f"head_{i}"], rtol=1e-14, atol=0)
    for name, naive in gradients[0].items():
        assert naive.norm() > 0, name
        assert (gradients[1][name] - naive).norm() / naive.norm() < 1e-12, name


def test_m05_ignored_targets_and_frozen_streams() -> None:
    """The node by itself: targets of -100 count nowhere, and a stream without gradient gets none."""
    draw = Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(V, 4, generator=draw, dtype=torch.float64))
    targets = text(2, 6)
    targets[0, 2:] = -100
    results = []
    for naive in (True, False):
        draw.manual_seed(1)
        streams = [torch.randn(2, 6, 4, generator=draw, dtype=torch.float64) for _ in range(2)]
        streams[0].requires_grad_()
        heads = [Head(i, lambda x: x @ weight.T, targets, w) for i, w in ((0, 1.0), (0, 0.3), (1, 0.7))]
        weight.grad = None
        value, losses = weighted_sum(heads, streams, [weight], naive=naive)
        (2 * value).backward()
        assert not losses.requires_grad
        results.append((value.detach(), losses, weight.grad, streams[0].grad))
        assert streams[1].grad is None
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_m05_gradients_are_handed_out_without_a_copy_and_once() -> None:
    weight = nn.Parameter(torch.randn(V, 4, generator=Generator().manual_seed(0)))
    heads = [Head(0, lambda x: nn.functional.linear(x, weight), text(2, 6), w) for w in (1.0, 0.5)]
    value, _ = weighted_sum(heads, [torch.ones(2, 6, 4)], [weight], naive=False)
    place = value.grad_fn.gradients[1].data_ptr()  # type: ignore[union-attr]
    value.backward(retain_graph=True)
    assert weight.grad is not None and weight.grad.data_ptr() == place
    with pytest.raises(RuntimeError, match="hands its gradients out once"):
        value.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_m05_under_bf16_autocast_both_agree_within_its_rounding(kind: str) -> None:
    gradients = []
    for backward in ("naive", "sequential"):
        model = built(config_of(kind, backward=backward))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, text(2, 13)).value
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.02


def test_m06_peak_memory_is_that_of_one_head() -> None:
    # Logits of 34 MB: the allocator hands buffers of 32 MB and more back as soon as they are freed.
    tokens = text(2, 530, vocab_size=8192)

    def peak(n: int, backward: str) -> int:
        options = {"vocab_size": 8192, "n_future": n, "backward": backward, "d_model": 32}
        model = MTP(config_of("replicated", **options), Generator().manual_seed(0))  # type: ignore[arg-type]

        def work() -> None:
            model.zero_grad(set_to_none=True)
            loss_of(model, tokens[:, : 526 + n]).value.backward()

        return peak_bytes(lambda: work, torch.device("cpu"))

    naive, sequential, single = peak(4, "naive"), peak(4, "sequential"), peak(1, "sequential")
    assert sequential <= 0.65 * naive, (sequential, naive)
    assert sequential <= 1.25 * single, (sequential, single)


def valid(cache: KVCache, rows: Rows, row: int) -> tuple[Tensor, Tensor]:
    length = rows.length - (0 if rows.behind is None else int(rows.behind[row]))
    return cache.keys[row, :, :length], cache.values[row, :, :length]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m07_caches_after_refusals_are_those_of_reading_the_text(kind: str) -> None:
    model, prompts = trained(kind), sentences(4, 9, seed=6)
    state = model.prefill(prompts, model.initial_state(4))
    written = [row.tolist() for row in prompts]
    for step in range(8):
        emission = model.decode_step(state, PLAIN, Generator().manual_seed(step))
        state = emission.state
        for row, tokens, count in zip(written, emission.tokens.tolist(), emission.counts.tolist(), strict=True):
            row += tokens[:count]
    assert state.rows.behind is not None
    for row in range(4):
        fresh = model.prefill(torch.tensor([written[row]]), model.initial_state(1))
        assert state.pending[row] == fresh.pending[0]
        torch.testing.assert_close(state.memory.last[row], fresh.memory.last[0], rtol=1e-4, atol=1e-5)
        caches = zip(state.layers + state.memory.caches, fresh.layers + fresh.memory.caches, strict=True)
        for depth, (ours, theirs) in enumerate(caches):
            void = max(0, depth - len(state.layers)) if kind == "sequential" else 0
            for one, other in zip(valid(ours, state.rows, row), valid(theirs, fresh.rows, 0), strict=True):
                torch.testing.assert_close(one[:, void:], other[:, void:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m07_nan_beyond_each_rows_length_changes_nothing(kind: str) -> None:
    model, prompts = trained(kind), sentences(4, 9, seed=6)
    state = model.prefill(prompts, model.initial_state(4))
    while state.rows.behind is None:
        state = model.decode_step(state, PLAIN, Generator().manual_seed(int(state.rows.length))).state
    spoiled = copy_state(state)
    for entries in spoiled.layers + spoiled.memory.caches:
        for row in range(4):
            length = state.rows.length - int(state.rows.behind[row])
            entries.keys[row, :, length:] = math.nan
            entries.values[row, :, length:] = math.nan
    assert steps_of(model, spoiled, 30) == steps_of(model, state, 30)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m08_every_head_is_causal(kind: str) -> None:
    model, tokens = built(config_of(kind)), text(1, 12)
    base = model.all_logits(tokens)
    for j in range(12):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % V
        other = model.all_logits(changed)
        for head in range(1, 5):
            seen = head - 1 if kind == "sequential" else 0  # sequential heads read that many tokens further on
            last = max(0, j - seen)
            assert torch.equal(other[:, :last, head - 1], base[:, :last, head - 1])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m09_head_i_learns_from_the_token_i_positions_on(kind: str) -> None:
    model, tokens = built(config_of(kind, loss_ratio=0.5)), text(2, 14)
    loss = loss_of(model, tokens)
    logits = model.all_logits(tokens[:, :13])
    total = 0.0
    for i in range(1, 5):
        expected = F.cross_entropy(logits[:, :, i - 1].flatten(0, 1), tokens[:, i : i + 10].flatten())
        torch.testing.assert_close(loss.parts[f"head_{i}"], expected, rtol=1e-5, atol=1e-6)
        total += 0.5 ** (i - 1) * float(expected)
    assert float(loss.value) == pytest.approx(total, rel=1e-5)
    assert ARCHITECTURE.traits(model.config).lookahead == 4


@pytest.mark.parametrize("kind", KINDS)
def test_m09_m12_counting_is_learned_by_all_heads_and_every_draft_is_kept(kind: str) -> None:
    counting = (torch.arange(60) % V).repeat(8, 1)
    for row in range(8):
        counting[row] = (counting[row] + 3 * row) % V
    model = MTP(config_of(kind, loss_ratio=1.0), Generator().manual_seed(0))
    learn(model, counting, steps=60)
    model.eval()
    with torch.no_grad():
        found = model.all_logits(counting[:, :30]).argmax(dim=-1)
        for i in range(1, 5):
            assert torch.equal(found[:, 2:, i - 1], counting[:, 2 + i : 27 + i])
        state = model.prefill(counting[:3, :10], model.initial_state(3))
        rows, counts = steps_of(model, state, 40)
        assert all(step == [4, 4, 4] for step in counts)
        assert [row[:40] for row in rows] == counting[:3, 10:50].tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m12_spoiled_heads_draft_in_vain_and_change_no_token(kind: str) -> None:
    model, prompts = trained(kind), sentences(6, 13, seed=4)
    spoiled = with_options(model)
    for parameter in spoiled.extra_heads.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=Generator().manual_seed(parameter.numel())))
    expected = generate(model, prompts, 60, GREEDY)
    rows, counts = steps_of(spoiled, spoiled.prefill(prompts, spoiled.initial_state(6)), 60)
    same_but_for_ties(model, prompts, torch.tensor([row[:60] for row in rows]), expected)
    assert sum(map(sum, counts)) / (6 * len(counts)) < 1.35


@pytest.mark.parametrize("kind", ["layer", "replicated"])
def test_m10_heads_learn_apart(kind: str) -> None:
    model, tokens = built(config_of(kind)), text(2, 12)
    logits = model.all_logits(tokens)
    for j in range(2, 5):
        model.zero_grad()
        logits[:, :, j - 1].square().sum().backward(retain_graph=True)
        for i, head in enumerate(model.extra_heads.children().__next__(), start=2):  # type: ignore[arg-type]
            reached = any(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
            assert reached == (i == j)


@pytest.mark.parametrize("kind", ["layer", "replicated"])
def test_m10_the_trunks_gradient_is_the_sum_of_what_the_heads_send(kind: str) -> None:
    model, tokens = built(config_of(kind)), text(2, 12)
    trunk = [model.embedding.weight, *model.blocks[0].parameters()]
    logits = model.all_logits(tokens)
    each = [torch.autograd.grad(logits[:, :, i].square().sum(), trunk, retain_graph=True) for i in range(4)]
    whole = torch.autograd.grad(logits.square().sum(), trunk)
    for got, parts in zip(whole, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(parts).sum(dim=0), rtol=1e-4, atol=1e-5)
        assert all(bool(part.any()) for part in parts), "every head reaches the trunk"


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_m11_steps_write_one_to_k_tokens(k: int) -> None:
    model = built(config_of("replicated", n_future=8, draft_length=k))
    state = model.prefill(text(3, 7), model.initial_state(3))
    _, counts = steps_of(model, state, 50, Sampling(temperature=0.5))
    assert {count for step in counts for count in step} <= set(range(1, k + 1))
    assert max(count for step in counts for count in step) > 1 or k == 1


def test_m13_layers_that_move_leave_the_count_alone() -> None:
    for n, depth, kv in ((2, 4, None), (4, 6, 1), (8, 9, 2)):
        sizes_of = {"vocab_size": 300, "d_model": 24, "n_layers": depth, "n_heads": 4, "n_kv_heads": kv}
        matched = MTPConfig(**sizes_of, n_future=n, head_type="layer")
        assert counted(matched) == matched.n_parameters == TransformerConfig(**sizes_of).n_parameters
        assert matched.n_path_layers == depth - n + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("match", ["params", "trunk"])
def test_m13_parameter_count_is_the_formula(kind: str, match: str) -> None:
    for n, depth in ((1, 3), (3, 5), (8, 12)):
        config = config_of(kind, n_future=n, n_layers=depth, match=match, d_ffn=29, vocab_size=57)
        assert counted(config) == config.n_parameters


def counted(config: MTPConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MTP(config).parameters())


def test_m13_published_sizes_have_their_nominal_parameters() -> None:
    for name, nominal in (("0.3b", 3e8), ("0.6b", 6e8), ("1.3b", 1.3e9), ("3b", 3e9), ("6.7b", 6.7e9), ("13b", 1.3e10)):
        config = MTPConfig(**ARCHITECTURE.published[name])
        assert config.n_parameters == pytest.approx(nominal, rel=0.1)
        assert (config.heads, config.n_future, config.weight_ratio) == ("layer", 4, 1.0)
    # Table S14, synthetic tasks, without embeddings.
    for nominal, d, layers, heads in ((1e6, 128, 5, 4), (3e6, 256, 4, 8), (1e7, 384, 6, 8), (3e7, 512, 10, 8)):
        config = MTPConfig(vocab_size=256, d_model=d, n_layers=layers, n_heads=heads, n_future=2, head_type="layer")
        assert config.n_parameters - 2 * 256 * d == pytest.approx(nominal, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["point", "stochastic"])
@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        ("replicated", Sampling(temperature=0.7)),
        ("sequential", PLAIN),
        ("replicated", Sampling(temperature=1.3, top_p=0.9)),
    ],
    ids=str,
)
def test_m14_sampled_triples_have_the_law_of_the_next_token_path(kind: str, policy: str, sampling: Sampling) -> None:
    v, n_draws = 5, 8_192
    model = built(config_of(kind, vocab_size=v, n_future=3, n_layers=3, draft_policy=policy), seed=2)
    prompt = text(1, 5, vocab_size=v)
    state = model.prefill(prompt, model.initial_state(1))
    triples = torch.tensor(list(itertools.product(range(v), repeat=3)))
    logs, _ = model.score(triples, tile_state(state, len(triples)))
    law = probabilities(logs, sampling).double().gather(-1, triples[..., None])[..., 0].prod(dim=1)
    draws = tile_state(state, n_draws)
    generator = Generator().manual_seed(7)
    rows: list[Tensor] = []
    out = torch.zeros(n_draws, 9, dtype=torch.long)
    written = torch.zeros(n_draws, dtype=torch.long)
    kept = 0
    while int(written.min()) < 3:
        tokens, counts, draws = model.decode_step(draws, sampling, generator)
        rows.append(counts)
        kept += int((counts > 1).sum())
        for j in range(tokens.shape[1]):
            use = (j < counts) & (written + j < 9)
            out[use.nonzero().flatten(), (written + j)[use]] = tokens[use, j]
        written += counts
    cells = out[:, 0] * v * v + out[:, 1] * v + out[:, 2]
    assert kept > 0.1 * n_draws
    assert chi_square_p(cells.bincount(minlength=v**3), law) > 1e-3


@torch.no_grad()
def test_m14_refusing_always_or_never_would_be_noticed() -> None:
    """The chi-square of the test above on a sampler that keeps every draft."""
    v = 6
    model = built(config_of("replicated", vocab_size=v, n_future=3), seed=2)
    state = model.prefill(text(1, 5, vocab_size=v), model.initial_state(1))
    drafts = model.extra_heads.draft(model.path, state.memory, state.rows, 1, lambda logits: logits.argmax(dim=-1))
    pairs = torch.tensor(list(itertools.product(range(v), repeat=2)))
    law = model.score(pairs, tile_state(state, len(pairs)))[0].gather(-1, pairs[..., None])[..., 0].sum(dim=1).exp()
    first = torch.multinomial(law.view(v, v).sum(dim=1), 16_384, replacement=True, generator=Generator().manual_seed(0))
    cells = first * v + drafts[0, 0]
    assert chi_square_p(cells.bincount(minlength=v * v), law) < 1e-3


@torch.no_grad()
def test_m16_the_number_asked_for_is_written_and_stops_cut_a_group() -> None:
    model, prompt = trained("replicated"), sentences(1, 13, seed=4)
    whole = generate(model, prompt, 41, GREEDY)[0].tolist()
    for n in (1, 2, 3, 7):
        assert generate(model, prompt, n, GREEDY)[0].tolist() == whole[:n]
    stop = whole[5]
    pieces = stream(model, prompt, 41, GREEDY, None, lambda ids: bytes(65 + id for id in ids), stop_tokens={stop})
    assert "".join(pieces) == "".join(chr(65 + id) for id in whole[: whole.index(stop)])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m16_blocks_shrink_before_the_context_limit_and_overflow_is_refused(kind: str) -> None:
    model = with_options(trained(kind), max_context=30)
    prompts = sentences(3, 13, seed=4)
    expected = generate(with_options(model, max_context=None), prompts, 17, GREEDY)
    for rows in (prompts[:1], prompts):
        assert torch.equal(generate(model, rows, 17, GREEDY), expected[: len(rows)])
    full = model.prefill(text(1, 30), model.initial_state(1))
    with pytest.raises(ContextOverflow, match=r"mtp\.max_context: 31 tokens do not fit into 30"):
        model.decode_step(full, GREEDY, None)


@pytest.mark.parametrize(
    ("curriculum", "schedule"), [("none", [4, 4, 4, 4, 4]), ("forward", [1, 2, 3, 3, 4]), ("reverse", [4, 3, 2, 2, 1])]
)
def test_m17_heads_come_and_go_as_scheduled(curriculum: str, schedule: list[int]) -> None:
    model = built(config_of("replicated", curriculum=curriculum))
    for progress, active in zip((0.0, 0.3, 0.5, 0.7, 0.99), schedule, strict=True):
        assert model.config.active_heads(progress) == active
        assert list(loss_of(model, text(1, 9), progress).parts) == [f"head_{i}" for i in range(1, active + 1)]


@pytest.mark.parametrize("curriculum", ["forward", "reverse"])
def test_m17_inactive_heads_do_not_change_by_a_bit(curriculum: str) -> None:
    model = built(config_of("layer", curriculum=curriculum))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for progress in (0.0, 0.3, 0.6, 0.9):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, text(2, 9), progress).value.backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            head = int(name.split(".")[2]) + 2 if name.startswith("extra_heads.heads") else 1
            inactive = head > model.config.active_heads(progress)
            assert torch.equal(parameter, before[name]) == inactive, name


def test_m19_the_next_token_path_is_a_transformers_checkpoint() -> None:
    for kind in KINDS:
        model = built(config_of(kind))
        names = [name for name in model.state_dict() if not name.startswith("extra_heads.")]
        assert set(names) == set(next_token_path(model).state_dict())


def test_frozen_trunk_trains_the_path_first_and_then_the_heads_alone() -> None:
    for kind in KINDS:
        model = built(config_of(kind, training="frozen_trunk", trunk_share=0.6))
        first, second = model.phases()
        assert (first.share, second.share) == (0.6, 0.4)
        assert not {id(p) for p in parameters_of(first)} & {id(p) for p in parameters_of(second)}
        loss = first.loss(Batch(text(2, 13), 0.0, Generator()))
        assert list(loss.parts) == ["head_1"]
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        learn(model, text(2, 13), steps=3, phase=1)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, before[name]) == (not name.startswith("extra_heads.")), name


@pytest.mark.parametrize(
    "options",
    [
        {"head_type": "replicated", "n_future": 8, "n_layers": 2},
        {"head_type": "layer", "n_kv_heads": 1},
        {"head_type": "sequential", "n_future": 3, "backward": "naive"},
        {"head_type": "layer", "training": "frozen_trunk", "draft_length": 3},
        {"head_type": "replicated", "training": "frozen_trunk", "decoding": "next_token"},
    ],
    ids=str,
)
def test_flops_agree_three_ways(options: dict[str, Any]) -> None:
    config = MTPConfig(**{"vocab_size": 97, "d_model": 32, "n_layers": 5, "n_heads": 2, **options})
    for context, works in ((128, ("training", "prefill", "decode")), (512, ("decode",))):
        counts = count_three_ways(ARCHITECTURE, config, context, works=works, steps=2)  # type: ignore[arg-type]
        for count in counts.values():
            assert not count.missing
            assert count.disagreement <= 0.02, count
    assert counts["decode"].analytic > 0


def test_a_curriculum_costs_its_mean() -> None:
    model = MTP(config_of("replicated", curriculum="forward"))
    flops = [MTP(config_of("replicated", n_future=n)).flops().training(64) for n in (1, 2, 3, 4)]
    assert model.flops().training(64) == pytest.approx(sum(flops) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [("nano", {}), ("nano", {"n_future": 8}), ("micro", {"head_type": "layer", "n_future": 2}), ("small", {})],
    ids=str,
)
def test_candidates_meet_the_shared_sizes(size: str, overrides: dict[str, Any]) -> None:
    solved = sizes.solve(ARCHITECTURE, 256, size, overrides)
    assert abs(solved.residual) < 0.03, solved


def test_the_head_type_follows_the_vocabulary() -> None:
    assert MTPConfig(vocab_size=256).heads == "replicated"
    assert MTPConfig(vocab_size=4096, n_layers=6).heads == "layer"
    assert MTPConfig(vocab_size=256).weight_ratio == 0.5
    assert MTPConfig(vocab_size=256, d_model=512).loss_weights() == [1.0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_future": 0}, r"mtp\.n_future: 0"),
        ({"head_type": "layer", "n_layers": 4}, r"mtp\.n_layers: 4 leave no trunk .*5 or more"),
        ({"head_type": "sequential", "n_layers": 3}, r"mtp\.n_layers: 3 leave no trunk .*4 or more"),
        ({"loss_ratio": 0.0}, r"mtp\.loss_ratio: 0\.0"),
        ({"draft_length": 5}, r"mtp\.draft_length: 5"),
        ({"draft_length": 0}, r"mtp\.draft_length: 0"),
        ({"training": "frozen_trunk", "n_future": 1}, r"mtp\.training: frozen_trunk"),
        ({"trunk_share": 1.0}, r"mtp\.trunk_share: 1\.0"),
        ({"tie_embeddings": True}, r"mtp\.tie_embeddings"),
        ({"d_model": 0}, r"d_model: 0"),
    ],
)
def test_impossible_configs_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        MTPConfig(**{**SIZES, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["head_type", "match", "curriculum", "backward", "training", "decoding"])
def test_unknown_choices_are_refused(name: str) -> None:
    config = MTPConfig(**SIZES)
    object.__setattr__(config, name, "sideways")  # past the type checker that tests run under
    with pytest.raises(ConfigError, match=rf"mtp\.{name}: 'sideways'; allowed: "):
        config.__post_init__()
