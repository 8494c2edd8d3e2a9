"""Whole-model decode steps of Mamba and Mamba-2: levels agree, grouping changes no bit, weights are kept up to date."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from archbench.architectures.mamba import Mamba, MambaConfig, Mixer
from archbench.architectures.mamba2 import Mamba2, Mamba2Config
from archbench.errors import BackendError
from archbench.flops import trace
from archbench.model import AutoregressiveModel
from archbench.ops import backends, native
from archbench.ops.recurrent_weights import LONGEST
from archbench.recurrent import LayerState, RecurrentModel
from archbench.sampling import GREEDY, PLAIN
from archbench.state import copy_state, select_rows, state_bytes, tensors

torch.set_num_threads(1)

needs_compiler = pytest.mark.skipif(native.reason() != "ok", reason="no C compiler")
LEVELS = ["lean", pytest.param("native", marks=needs_compiler)]

# Widths that fill no vector and no panel, states below, at and above a vector, windows of other lengths, shared groups.
MODELS: dict[str, Any] = {
    "mamba": MambaConfig(vocab_size=37, d_model=20, n_layers=3, tie_embeddings=False),
    "mamba wide state": MambaConfig(vocab_size=300, d_model=24, n_layers=2, d_state=21, d_conv=2, dt_rank=5),
    "mamba narrow state": MambaConfig(vocab_size=16, d_model=18, n_layers=2, d_state=3, d_conv=6),
    "mamba2": Mamba2Config(vocab_size=37, d_model=32, n_layers=3, d_state=16, head_dim=16, tie_embeddings=False),
    "mamba2 groups": Mamba2Config(
        vocab_size=50, d_model=20, n_layers=2, d_state=9, head_dim=5, n_groups=4, step_floor=1e-2, step_ceiling=0.05
    ),
}


def built(name: str, seed: int = 0) -> AutoregressiveModel:
    """A model whose every parameter matters: ones and zeros are disturbed."""
    config, generator = MODELS[name], Generator().manual_seed(seed)
    model = (Mamba if isinstance(config, MambaConfig) else Mamba2)(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for table in {model.embedding.weight, model.unembedding.weight}:
            table *= 20  # so that logits differ from token to token
    return model.eval()


def drawn(model: AutoregressiveModel, b: int, t: int, seed: int = 1) -> Tensor:
    return torch.randint(model.vocab_size, (b, t), generator=Generator().manual_seed(seed))


def read(model: AutoregressiveModel, tokens: Tensor) -> Any:
    return model.prefill(tokens, model.initial_state(len(tokens)))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.forget()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_a_level_steps_as_the_modules_do(name: str, level: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, hidden vectors and states after a prompt, token by token and in one piece of several."""
    model = built(name)
    prompt, tokens = drawn(model, rows, 11), drawn(model, rows, 7, seed=2)

    def outcome(level: str) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        monkeypatch.setenv(backends.VARIABLE, level)
        state = read(model, prompt)
        hidden, _ = model.hidden(tokens[:, :1], copy_state(state.layers))
        whole, after_whole = model.score(tokens, copy_state(state))
        single = []
        for token in tokens.split(1, dim=1):
            log_probs, state = model.score(token, state)
            single.append(log_probs)
        torch.testing.assert_close(torch.cat(single, dim=1), whole, rtol=1e-4, atol=1e-4)
        return hidden, whole, tensors(after_whole), tensors(state)

    expected, backends_used = outcome("reference"), backends.in_use()["decode"]
    assert backends_used == "reference"
    backends.forget()
    found = outcome(level)
    assert backends.in_use()["decode"] == level
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_greedy_and_sampled_text_is_that_of_the_modules(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name)

    def written(level: str, sampling: Any) -> list[int]:
        monkeypatch.setenv(backends.VARIABLE, level)
        state, generator, text = read(model, drawn(model, 1, 9)), Generator().manual_seed(5), []
        for _ in range(30):
            tokens, counts, state = model.decode_step(state, sampling, generator)
            assert counts.tolist() == [1]
            text.append(int(tokens))
        return text

    for sampling in (GREEDY, PLAIN):
        expected = written("reference", sampling)
        assert len(set(expected)) > 2, "a text of a few tokens would test little"
        assert written(level, sampling) == expected


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_how_tokens_and_rows_are_grouped_changes_no_bit(name: str) -> None:
    model = built(name)
    tokens = drawn(model, 3, 24)
    start = model.initial_layers(3)
    whole, after = model.predict(tokens, copy_state(start))
    assert backends.in_use()["decode"] == "native"
    for pieces in ([1] * 24, [5, 1, 2, 16], [9, 15]):
        parts, layers = [], copy_state(start)
        for piece in tokens.split(pieces, dim=1):
            logits, layers = model.predict(piece, layers)
            parts.append(logits)
        assert torch.equal(torch.cat(parts, dim=1), whole)
        assert all(map(torch.equal, tensors(layers), tensors(after)))
    for row in range(3):
        alone, layers = model.predict(tokens[row : row + 1], model.initial_layers(1))
        assert torch.equal(alone[0], whole[row])
        chosen = select_rows(after, torch.tensor([row]))
        assert all(map(torch.equal, tensors(layers), tensors(chosen)))


@needs_compiler
@torch.no_grad()
def test_any_number_of_rows_gives_the_same_bits() -> None:
    """A product has code of its own for each number of rows that it takes at once."""
    model = built(next(iter(MODELS)))
    tokens = drawn(model, 26, 1)
    alone = torch.cat([model.predict(row[None], model.initial_layers(1))[0] for row in tokens])
    for n in range(1, 27):
        assert torch.equal(model.predict(tokens[:n], model.initial_layers(n))[0], alone[:n]), n


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_chosen_token_is_the_most_likely_one(name: str) -> None:
    """The step that returns only the token agrees with the one that returns logits, in every row."""
    model = built(name)
    state = read(model, drawn(model, 5, 13))
    for _ in range(10):
        logits, _ = model.predict(state.pending[:, None], copy_state(state.layers))
        tokens, _, state = model.decode_step(state, GREEDY, None)
        assert tokens.tolist() == logits.argmax(dim=-1).tolist()


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2 groups"])
def test_bf16_weights_stay_bf16_and_states_fp32(name: str) -> None:
    """A step on rounded weights is the fp32 step on the same rounded numbers."""
    rounded = built(name).to(torch.bfloat16)
    exact = copy.deepcopy(rounded).float()
    tokens = drawn(rounded, 2, 6)
    logits, layers = rounded.predict(tokens, rounded.initial_layers(2))
    expected, reference = exact.predict(tokens, exact.initial_layers(2))
    assert backends.in_use()["decode"] == "native"
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=2e-2)  # -exp(A_log) of a rounded A_log is rounded
    assert all(state.dtype == torch.float32 for state in tensors(layers))
    for ours, theirs in zip(tensors(layers), tensors(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_step_uses_the_weights_of_now(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an optimizer step, a load and a replaced parameter; and a copy has decoders of its own."""
    model = built(name)
    pending, prompt = torch.tensor([3]), drawn(model, 1, 5)

    @torch.no_grad()
    def logits(of: AutoregressiveModel, at: str) -> Tensor:
        monkeypatch.setenv(backends.VARIABLE, at)
        return of.predict(pending[:, None], read(of, prompt).layers)[0]

    def check(of: AutoregressiveModel) -> Tensor:
        found = logits(of, level)
        torch.testing.assert_close(found, logits(of, "reference"), rtol=1e-4, atol=1e-4)
        return found

    first = check(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    hidden, _ = model.hidden(drawn(model, 2, 8), model.initial_layers(2))
    model.logits(hidden).square().mean().backward()
    optimizer.step()
    trained = check(model)
    assert (trained - first).abs().max() > 1e-3
    other = copy.deepcopy(model)
    model.load_state_dict(before)
    torch.testing.assert_close(check(model), first)
    torch.testing.assert_close(check(other), trained)
    model.norm.weight = torch.nn.Parameter(2 * model.norm.weight.detach())
    torch.testing.assert_close(check(model), 2 * first, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == before.keys()


@needs_compiler
@torch.no_grad()
def test_states_are_written_in_place_and_keep_their_size() -> None:
    model = built("mamba")
    state = read(model, drawn(model, 2, 9))
    addresses, size = [tensor.data_ptr() for tensor in tensors(state.layers)], state_bytes(state.layers)
    for _ in range(5):
        _, _, state = model.decode_step(state, GREEDY, None)
    assert [tensor.data_ptr() for tensor in tensors(state.layers)] == addresses
    assert state_bytes(state.layers) == size


def test_a_state_that_a_gradient_hangs_on_is_not_overwritten() -> None:
    """Trained through a state, then written on from it: the backward pass still finds the values of its own."""
    gradients = []
    for writes in (False, True):
        model = built("mamba")
        tokens = drawn(model, 1, 6)
        _, layers = model.hidden(tokens, model.initial_layers(1))
        loss = model.hidden(tokens, layers)[0].square().sum()
        if writes:
            with torch.no_grad():
                model.predict(tokens[:, :1], layers)
        loss.backward()
        gradients.append(model.blocks[0].mixer.A_log.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_what_is_no_decode_step_goes_through_the_modules(name: str) -> None:
    """Gradients, long texts, autocast, a FLOP count, and what asks for fp64 from C."""
    model = built(name)
    tokens = drawn(model, 1, 2)
    model.hidden(tokens, model.initial_layers(1))
    with torch.no_grad():
        for n in (0, max(LONGEST.values()) + 1):
            logits, _ = model.predict(drawn(model, 1, n), model.initial_layers(1))
            assert logits.shape[:2] == (1, n)
    assert "decode" not in backends.in_use()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.predict(tokens, model.initial_layers(1))
    assert backends.in_use()["decode"] == "reference"
    with torch.no_grad():
        counted = trace(lambda: model.predict(tokens[:, :1], model.initial_layers(1)))
    assert counted.flops == pytest.approx(model.flops().decode(0), rel=0.02)


@needs_compiler
@torch.no_grad()
def test_a_level_asked_for_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("mamba")
    pending = torch.zeros(1, 1, dtype=torch.long)
    wide = copy.deepcopy(model).double()
    wide.predict(pending, wide.initial_layers(1))
    assert backends.in_use()["decode"] == "lean"  # the C code takes no fp64
    monkeypatch.setenv(backends.VARIABLE, "native")
    with pytest.raises(BackendError, match="float64"):
        wide.predict(pending, wide.initial_layers(1))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(BackendError, match="autocast"):
        model.predict(pending, model.initial_layers(1))


@torch.no_grad()
def test_without_a_compiler_steps_are_lean_and_that_is_said(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHBENCH_CC", str(tmp_path / "no-compiler-here"))
    monkeypatch.setattr(backends, "_announced", set())
    model = built("mamba")
    pending = torch.zeros(1, 1, dtype=torch.long)
    with pytest.warns(backends.BackendWarning, match="decode runs at level 'lean'"):
        model.predict(pending, model.initial_layers(1))
    assert backends.in_use()["decode"] == "lean"
    monkeypatch.setenv(backends.VARIABLE, "native")
    with pytest.raises(BackendError, match="no C compiler found"):
        model.predict(pending, model.initial_layers(1))


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_token_outside_the_vocabulary_is_an_error_and_changes_no_state(name: str) -> None:
    model = built(name)
    state = read(model, drawn(model, 1, 4))
    before = copy_state(state.layers)
    with pytest.raises(IndexError, match="vocabulary"):
        model.predict(torch.tensor([[1, model.vocab_size]]), state.layers)
    assert all(map(torch.equal, tensors(state.layers), tensors(before)))


@needs_compiler
@torch.no_grad()
def test_extreme_weights_give_what_the_modules_give() -> None:
    """Steps so large that states are forgotten at once, and so small that tokens leave no trace."""
    for bias in (30.0, -30.0):
        model = built("mamba")
        for block in model.blocks:
            block.mixer.dt_bias.fill_(bias)
        tokens = drawn(model, 1, 5)
        found, layers = model.predict(tokens, model.initial_layers(1))
        with torch.enable_grad():  # the modules
            expected, reference = model.predict(tokens, model.initial_layers(1))
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(tensors(layers), tensors(reference), strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_many_tokens_written_in_one_call_are_those_of_single_steps(
    name: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and the state after them."""
    monkeypatch.setenv(backends.VARIABLE, level)
    model = built(name)
    start = read(model, drawn(model, 3, 9))
    singly, state = [], copy_state(start)
    for _ in range(10):
        tokens, _, state = model.decode_step(state, GREEDY, None)
        singly.append(tokens)
    together, counts, after = model.decode_steps(copy_state(start), 10, GREEDY, None)
    assert counts.tolist() == [10] * 3
    assert torch.equal(together, torch.cat(singly, dim=1))
    assert all(map(torch.equal, tensors(after), tensors(state)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_subclass_that_computes_otherwise_is_asked_itself(name: str) -> None:
    model = built(name)

    class Mute(type(model)):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden) * 0

    model.__class__ = Mute
    assert not model.predict(drawn(model, 1, 1), model.initial_layers(1))[0].any()


@torch.no_grad()
def test_a_mixer_that_computes_otherwise_is_asked_itself() -> None:
    class Silent(Mixer):
        def forward(self, u: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
            mixed, state = super().forward(u, state)
            return 0 * mixed, state

    config = MambaConfig(vocab_size=17, d_model=16, n_layers=2)
    model = RecurrentModel.__new__(Mamba)
    RecurrentModel.__init__(model, config, Silent, Generator().manual_seed(0))
    tokens = torch.tensor([[3]])
    logits, _ = model.eval().predict(tokens, model.initial_layers(1))
    expected = model.logits(model.norm(model.embedding(tokens)))
    assert torch.allclose(logits, expected)
