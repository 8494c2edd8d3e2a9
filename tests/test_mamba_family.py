"""What the specification asks of Mamba and Mamba-2 alike: every kernel level, no compiler, checkpoints there and back,
and a task that only a selective state can learn. Numbers in test names are those of its list of invariants."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor

from archbench import registry
from archbench.errors import BackendError
from archbench.integrations import huggingface
from archbench.model import AutoregressiveModel
from archbench.ops import backends, native
from archbench.sampling import GREEDY
from archbench.state import state_bytes, tensors

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

V, BOUNDARY = 19, 3
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"d_model": 12, "n_layers": 2, "d_state": 5},
    "mamba2": {"d_model": 12, "n_layers": 2, "d_state": 5, "head_dim": 6, "n_groups": 2},
}
RECURRENCE = {"mamba": "selective_scan", "mamba2": "ssd"}


def built(name: str, vocab_size: int = V, seed: int = 0, **options: Any) -> AutoregressiveModel:
    """A model whose gains and D differ from their round first values and whose predictions are not flat."""
    architecture = registry.architecture(name)
    generator = Generator().manual_seed(seed)
    model = architecture.build(architecture.config(vocab_size=vocab_size, **{**SIZES[name], **options}), generator)
    assert isinstance(model, AutoregressiveModel)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(0.75 + 0.5 * torch.rand(parameter.shape, generator=generator))
            if "embedding" in parameter_name:
                parameter.mul_(20)
    return model.eval()


def text(batch_size: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch_size, n), generator=Generator().manual_seed(seed))


def logits(model: AutoregressiveModel, tokens: Tensor) -> Tensor:
    hidden, _ = model.hidden(tokens, model.initial_layers(len(tokens)))
    return model.logits(hidden)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# ---- levels ----


@pytest.fixture(params=backends.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A level that all models of the test run at. One that is not here is refused with its reason before skipping."""
    reasons = [backends.available(op)[request.param] for op in (*RECURRENCE.values(), "causal_conv")]
    monkeypatch.setenv(backends.VARIABLE, request.param)
    missing = [reason for reason in reasons if reason != "ok"]
    if missing:
        with pytest.raises(BackendError, match=f"{backends.VARIABLE}={request.param}: "):
            logits(built("mamba2"), text(1, 3))
        pytest.skip(f"{request.param}: {missing[0]}")
    return request.param


@pytest.fixture(params=SIZES, name="name")
def name_fixture(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_21_every_level_reads_decodes_and_resumes_alike(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariants 2, 4, 5, 7, 8 and 9, of the whole model."""
    model, tokens = built(name), text(3, 66)
    backends.forget()
    whole, after = model.score(tokens, model.initial_state(3))
    assert backends.in_use() == {"causal_conv": level, RECURRENCE[name]: level}
    for split in (1, 60):
        state = model.prefill(tokens[:, :split], model.initial_state(3))
        for i in range(split, 66):
            one, state = model.score(tokens[:, i : i + 1], state)
            torch.testing.assert_close(one[:, 0], whole[:, i], rtol=1e-5, atol=1e-5)
        for found, expected in zip(tensors(state), tensors(after), strict=True):
            assert near(found.double(), expected.double())
    size = state_bytes(model.initial_state(1))
    state = model.initial_state(1)
    for n in (1, 9, 90):
        state = model.prefill(text(1, n), state)
        assert state_bytes(state) == size
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % V
    assert torch.equal(model.score(changed, model.initial_state(3))[0][:, :41], whole[:, :41])
    for row in range(3):
        alone, _ = model.score(tokens[row : row + 1], model.initial_state(1))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)
    monkeypatch.setenv(backends.VARIABLE, "reference")
    wide = model.double()
    torch.testing.assert_close(
        whole.double(), wide.score(tokens, wide.initial_state(3))[0].double(), rtol=1e-4, atol=1e-4
    )


def test_21_every_level_has_the_gradients_of_the_reference(
    name: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 3, of the whole model."""
    model, tokens = built(name), text(2, 70)
    weights = torch.randn(2, 70, V, generator=Generator().manual_seed(3))
    gradients = []
    for at in (level, "reference"):
        monkeypatch.setenv(backends.VARIABLE, at)
        model = model.double() if at == "reference" else model
        model.zero_grad()
        (logits(model, tokens) * weights).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, expected in gradients[1].items():
        assert expected is not None and expected.any(), key
        assert near(gradients[0][key].double(), expected.double(), 1e-4), key


@torch.no_grad()
def test_27_without_a_compiler_the_next_level_computes_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(That a second process starts no compiler is a test of the library, which all kernels share.)"""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    model, tokens = built(name), text(2, 70)
    expected = logits(model, tokens)
    monkeypatch.setenv("ARCHBENCH_CC", str(tmp_path / "absent"))
    backends.forget()
    with pytest.warns(backends.BackendWarning, match="no C compiler found") as told:
        found = logits(model, tokens)
        model.decode_step(model.prefill(tokens, model.initial_state(2)), GREEDY, None)
    assert len(told) == 1
    assert backends.in_use() == {"causal_conv": "lean", "decode": "lean", RECURRENCE[name]: "lean"}
    assert near(found, expected)
    assert set(native.UNITS) >= {"scan.c", "ssd.c", "conv.c"}


# ---- checkpoints ----


def release_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of the original release."""
    renamed = {}
    for key, tensor in weights.items():
        for ours, theirs in (
            ("unembedding.", "lm_head."),
            ("blocks.", "backbone.layers."),
            ("conv_weight", "conv1d.weight"),
            ("conv_bias", "conv1d.bias"),
        ):
            key = key.replace(ours, theirs)
        key = {"embedding.weight": "backbone.embedding.weight", "norm.weight": "backbone.norm_f.weight"}.get(key, key)
        renamed[key] = tensor[:, None] if key.endswith("conv1d.weight") else tensor
    return renamed


def hf_names(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Our tensors under the names of transformers."""
    back = {key.replace("backbone.embedding.", "backbone.embeddings."): t for key, t in release_names(weights).items()}
    step = "dt_proj.bias" if name == "mamba" else "dt_bias"
    return {key.replace("mixer.dt_bias", f"mixer.{step}"): tensor.clone() for key, tensor in back.items()}


def released(model: AutoregressiveModel, name: str, folder: Path) -> Path:
    """A checkpoint in the layout of the original release, its vocabulary padded to a multiple of 8."""
    stored = hf_names(dict(model.state_dict()), name)
    table = stored.pop("backbone.embeddings.weight")
    table = torch.cat([table, torch.full((-len(table) % 8, table.shape[1]), 9.0)])
    config: Any = model.config
    ssm = {"layer": "Mamba1", "d_state": config.d_state}
    if name == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": config.head_dim, "ngroups": config.n_groups}
    save_file(
        {**stored, "backbone.embedding.weight": table, "lm_head.weight": table.clone()}, folder / "model.safetensors"
    )
    options = {"d_model": config.d_model, "n_layer": config.n_layers, "vocab_size": V, "ssm_cfg": ssm}
    options |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def theirs(model: AutoregressiveModel, name: str) -> Any:
    """The same model as one of transformers, loaded strictly."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config: Any = model.config
    options = {
        "vocab_size": V, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "state_size": config.d_state, "tie_word_embeddings": True,
    }  # fmt: skip
    if name == "mamba":
        found = transformers.MambaForCausalLM(transformers.MambaConfig(**options))
    else:
        options |= {"num_heads": config.n_heads, "head_dim": config.head_dim, "n_groups": config.n_groups}
        found = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**options))
    weights = hf_names(dict(model.state_dict()), name)
    weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    found.load_state_dict(weights, strict=True)
    return found.eval()


@torch.no_grad()
def test_12_from_the_release_to_transformers_and_back_no_tensor_changes(name: str, tmp_path: Path) -> None:
    origin = built(name)
    (tmp_path / "release").mkdir()
    first = huggingface.read_checkpoint(released(origin, name, tmp_path / "release"))
    assert first.architecture == name
    ours = huggingface.build(first)
    assert isinstance(ours, AutoregressiveModel)
    exported = theirs(ours, name)
    tokens = text(2, 40)
    assert near(logits(ours, tokens), exported(tokens).logits, 1e-4)
    exported.save_pretrained(tmp_path / "hf")
    second = huggingface.read_checkpoint(tmp_path / "hf")
    facts = [{**asdict(stage.config), "dt_rank": None} for stage in (first, second)]  # transformers writes out its rule
    assert facts[0] == facts[1]
    for stage in (first.state_dict, second.state_dict):
        expected = {key: tensor for key, tensor in origin.state_dict().items() if key in stage}
        assert expected.keys() == stage.keys() == first.state_dict.keys()
        assert all(torch.equal(stage[key], tensor) for key, tensor in expected.items())


# ---- learning ----


def induction(generator: Generator, n: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens 0..14; the trigger 15 stands at a random place and at the end. Wanted is what followed it."""
    tokens = torch.randint(15, (n, length), generator=generator)
    row, place = torch.arange(n), torch.randint(length - 2, (n,), generator=generator)
    tokens[row, place] = 15
    tokens[:, -1] = 15
    return tokens, tokens[row, place + 1]


def steps_to_learn(model: AutoregressiveModel, length: int, rate: float, most: int) -> int | None:
    """Steps of 32 fresh sequences until 99 % of 256 others are right; None if `most` are not enough."""
    generator = Generator().manual_seed(0)
    held_out = induction(generator, 256, length)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def answers(tokens: Tensor) -> Tensor:
        hidden, _ = model.hidden(tokens, model.initial_layers(len(tokens)))
        return model.logits(hidden[:, -1])

    for step in range(1, most + 1):
        tokens, wanted = induction(generator, 32, length)
        optimizer.zero_grad()
        F.cross_entropy(answers(tokens), wanted).backward()
        optimizer.step()
        if step % 20 == 0:
            with torch.no_grad():
                right = answers(held_out[0]).argmax(dim=-1) == held_out[1]
            if right.float().mean() >= 0.99:
                return step
    return None


def learner(name: str, d_model: int) -> AutoregressiveModel:
    heads = {"head_dim": 16, "d_state": 16} if name == "mamba2" else {}
    architecture = registry.architecture(name)
    config = architecture.config(vocab_size=16, d_model=d_model, n_layers=2, **heads)
    model = architecture.build(config, Generator().manual_seed(0))
    assert isinstance(model, AutoregressiveModel)
    return model


def test_23_induction_over_16_tokens_is_learned_in_a_few_hundred_steps(name: str) -> None:
    assert steps_to_learn(learner(name, 32), length=16, rate=4e-3, most=600) is not None


@pytest.mark.slow
def test_23_induction_over_64_tokens_is_learned_within_1500_steps(name: str) -> None:
    """At the width, rate and batch of the specification; about 500 steps and 20 s of one core."""
    assert steps_to_learn(learner(name, 64), length=64, rate=1e-3, most=1_500) is not None
