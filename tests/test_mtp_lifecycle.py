"""What becomes of a model with several heads: training killed and gone on with, checkpoints, export as the plain model
it contains, and text that stops inside an accepted group. Numbers in test names are those of its specification."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from archbench import registry
from archbench.architectures.mtp import ARCHITECTURE, MTPConfig
from archbench.architectures.mtp.model import MTP
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.cell import Budget, Training
from archbench.checkpoint import PARTIAL, load_model, save
from archbench.data.windows import TokenStream, Windows
from archbench.errors import CheckpointError
from archbench.generation import generate, stream
from archbench.history import History
from archbench.integrations import huggingface
from archbench.sampling import GREEDY
from archbench.train import Progress, train

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

V = 31
SIZES: dict[str, Any] = {"vocab_size": V, "d_model": 16, "n_layers": 5, "n_heads": 2, "n_future": 4}
KINDS = ("replicated", "layer", "sequential")
CONFIGS = {
    **{kind: MTPConfig(**SIZES, head_type=kind) for kind in KINDS},  # type: ignore[arg-type]
    "forward": MTPConfig(**SIZES, head_type="layer", curriculum="forward"),
    "frozen trunk": MTPConfig(**SIZES, head_type="layer", training="frozen_trunk", trunk_share=0.5),
}
CONTEXT, BATCH, STEPS = 16, 4, 12


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the processor's peak takes longer than these trainings, and is only noted in their log."""
    monkeypatch.setattr("archbench.train.matmul_peak", lambda _dtype: 1e9)


def windows() -> Windows:
    """A period that is almost a rule: what follows is mostly, not always, the next number."""
    noise = np.random.default_rng(0)
    numbers = np.tile(np.arange(1, V, dtype=np.uint8), 60)
    numbers[noise.random(len(numbers)) < 0.2] = 1
    return Windows(TokenStream(numbers, len(numbers), np.r_[0, np.ones(V - 1, dtype=np.int64)]), CONTEXT, BATCH, seed=0)


def fresh(config: MTPConfig, seed: int = 0) -> MTP:
    return MTP(config, Generator().manual_seed(seed))


def run(
    model: MTP,
    folder: Path,
    precision: Any = "fp32",
    notify: Callable[[Progress], None] = lambda _progress: None,
    n_steps: int = STEPS,
) -> History:
    training = Training(
        budget=Budget(tokens=n_steps * BATCH * CONTEXT), context=CONTEXT, batch=BATCH, precision=precision,
        learning_rate=1e-2,
    )  # fmt: skip
    lookahead = ARCHITECTURE.traits(model.config).lookahead
    return train(model, windows(), training, lookahead=lookahead, seed=0, folder=folder, notify=notify, save_every_s=0)


def points(history: History) -> list[tuple[Any, ...]]:
    """The log without its clocks."""
    return [(p.step, p.phase, p.loss, p.learning_rate, list(p.parts.items())) for p in history.points]


def same_weights(one: MTP, other: MTP) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@cache
def whole(name: str, precision: str = "fp32") -> tuple[MTP, History]:
    """A model trained in one go."""
    model = fresh(CONFIGS[name])
    with TemporaryDirectory() as folder:
        return model, run(model, Path(folder), precision)


@pytest.mark.parametrize("name", CONFIGS)
def test_m20_equal_seeds_give_equal_weights_and_heads_are_logged_in_order(name: str, tmp_path: Path) -> None:
    model, history = whole(name)
    other = fresh(CONFIGS[name])
    assert points(run(other, tmp_path)) == points(history)
    assert same_weights(model, other)
    assert not same_weights(model, fresh(CONFIGS[name]))
    first, last = history.points[0].parts, history.last.parts
    heads = [f"head_{i}" for i in range(1, 5)]
    assert list(last) == (heads[1:] if name == "frozen trunk" else heads)
    assert list(first) == (heads[:1] if name in ("frozen trunk", "forward") else heads)


@pytest.mark.parametrize(
    ("name", "killed_after", "precision"),
    [
        ("replicated", 1, "fp32"),
        ("layer", 5, "fp32"),
        ("layer", 5, "bf16-mixed"),
        ("sequential", 11, "fp32"),
        ("forward", 6, "fp32"),  # between the steps of two heads
        ("frozen trunk", 4, "fp32"),
        ("frozen trunk", 6, "fp32"),  # with the first phase's last step
        ("frozen trunk", 9, "fp32"),
    ],
)
def test_m20_training_killed_and_resumed_ends_with_the_same_weights(
    name: str, killed_after: int, precision: str, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    steps = itertools.count(1)

    def kill(_progress: Progress) -> None:
        if next(steps) > killed_after:
            raise Killed

    with pytest.raises(Killed):
        run(fresh(CONFIGS[name]), tmp_path, precision, kill)
    assert (tmp_path / PARTIAL).is_file()
    resumed = fresh(CONFIGS[name], seed=9)  # its own weights must not matter
    found = run(resumed, tmp_path, precision)
    model, expected = whole(name, precision)
    assert found.sessions == 2
    assert same_weights(resumed, model)
    assert points(found) == points(expected)


# ---- the plain model inside ----


@cache
def trained(kind: str) -> MTP:
    """Trained a little longer: its drafts are right now and then."""
    model = fresh(CONFIGS[kind])
    with TemporaryDirectory() as folder, torch.enable_grad():
        run(model, Path(folder), n_steps=40)
    return model.eval()


def path_of(model: MTP) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Config and weights of the Transformer made of trunk and head 1."""
    options = {field.name: getattr(model.config, field.name) for field in fields(TransformerConfig)}
    weights = {name: t for name, t in model.state_dict().items() if not name.startswith("extra_heads.")}
    return TransformerConfig(**{**options, "n_layers": model.config.n_path_layers}), weights


def as_llama(config: TransformerConfig, weights: dict[str, Tensor]) -> Any:
    """The same model as one of transformers, loaded strictly: our names and fused matrices taken apart."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.ffn_width,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False, bos_token_id=config.boundary,
        )
    )  # fmt: skip
    theirs = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["unembedding.weight"],
    }
    for i in range(config.n_layers):
        own, layer = f"blocks.{i}", f"model.layers.{i}"
        keys = config.kv_heads * config.head_dim
        q, k, v = weights[f"{own}.attention.qkv.weight"].split([config.d_model, keys, keys])
        gate, up = weights[f"{own}.ffn.gate_up.weight"].chunk(2)
        theirs |= {
            f"{layer}.input_layernorm.weight": weights[f"{own}.norm_attention.weight"],
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": weights[f"{own}.attention.out.weight"],
            f"{layer}.post_attention_layernorm.weight": weights[f"{own}.norm_ffn.weight"],
            f"{layer}.mlp.gate_proj.weight": gate,
            f"{layer}.mlp.up_proj.weight": up,
            f"{layer}.mlp.down_proj.weight": weights[f"{own}.ffn.down.weight"],
        }
    found.load_state_dict(theirs, strict=True)
    return found.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m02_m19_trunk_and_head_1_are_a_llama_and_come_back_from_it(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    config, weights = path_of(model)
    llama = as_llama(config, weights)
    tokens = torch.randint(V, (2, 40), generator=Generator().manual_seed(1))
    expected = llama(tokens).logits
    assert expected.abs().max() > 1
    found = model.all_logits(tokens)
    assert (found[:, :, 0] - expected[:, : found.shape[1]]).abs().max() < 1e-5
    scores, _ = model.score(tokens[:, 1:], model.prefill(tokens[:, :1], model.initial_state(2)))
    inputs = torch.cat([torch.full((2, 1), config.boundary), tokens[:, :-1]], dim=1)
    assert (scores - llama(inputs).logits.log_softmax(-1)[:, 1:]).abs().max() < 1e-5

    llama.save_pretrained(tmp_path / "hf")
    read = huggingface.read_checkpoint(tmp_path / "hf")
    assert read.state_dict.keys() == weights.keys()
    assert all(torch.equal(read.state_dict[name], weight) for name, weight in weights.items())
    plain = huggingface.build(read)
    written = [generate(m, tokens[:, :9], 30, GREEDY) for m in (model, plain)]
    assert torch.equal(*written)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m19_checkpoints_keep_what_the_heads_draft_and_plain_loaders_may_leave_them_aside(
    kind: str, tmp_path: Path
) -> None:
    model = trained(kind)
    origin: dict[str, Any] = {}
    save(tmp_path / "own", "mtp", model.config, model.state_dict(), codec=None, origin=origin, history=None)
    back = load_model(tmp_path / "own")
    prompts = torch.randint(1, V, (3, 9), generator=Generator().manual_seed(2))
    for step in range(6):
        ours, theirs = (m.prefill(prompts[:, : 3 + step], m.initial_state(3)) for m in (model, back))
        one, other = model.decode_step(ours, GREEDY, None), back.decode_step(theirs, GREEDY, None)
        assert torch.equal(one.tokens, other.tokens)  # drafts that were refused included
        assert torch.equal(one.counts, other.counts)
    config, _ = path_of(model)
    plain = Transformer(config, Generator().manual_seed(1))
    missing, extra = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert extra and all(name.startswith("extra_heads.") for name in extra)
    tokens = prompts  # more than a decode step reads, so that both go through their modules
    assert torch.equal(
        plain.eval().score(tokens, plain.initial_state(3))[0], model.score(tokens, model.initial_state(3))[0]
    )
    save(tmp_path / "wrong", "transformer", config, model.state_dict(), codec=None, origin=origin, history=None)
    with pytest.raises(CheckpointError, match=r"holds unknown tensor extra_heads\."):
        load_model(tmp_path / "wrong")
    assert registry.architecture("mtp").config(**asdict(model.config)) == model.config


# ---- stops ----


def letters(ids: np.ndarray) -> bytes:
    return bytes(65 + int(id) for id in ids)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_m16_a_stop_string_ends_the_text_wherever_in_a_group_it_falls(kind: str) -> None:
    """Stop strings of one to six tokens at every place of the text: inside a group, and across two or three."""
    model = trained(kind)
    prompt = torch.arange(1, 10)[None]
    n = 24
    whole = letters(generate(model, prompt, n, GREEDY)[0].numpy()).decode()
    state, groups = model.prefill(prompt, model.initial_state(1)), []
    while sum(groups) < n:
        _, counts, state = model.decode_step(state, GREEDY, None)
        groups.append(int(counts[0]))
    assert max(groups) > 1  # some drafts are kept, so that there are groups to stop in
    borders = set(itertools.accumulate(groups))
    inside = across = 0
    for begin, length in itertools.product(range(0, n - 6, 3), (1, 2, 6)):
        stop = whole[begin : begin + length]
        written = "".join(stream(model, prompt, n, GREEDY, None, letters, stop=(stop, "never")))
        assert written == whole[: whole.index(stop)]
        end = whole.index(stop) + length
        inside += end not in borders
        across += any(border in borders for border in range(end - length + 1, end))
    assert inside and across
