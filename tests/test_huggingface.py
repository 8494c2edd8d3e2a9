"""Checkpoints written by transformers and read back through our import compute the same function."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

from archbench import registry  # noqa: E402
from archbench.errors import CheckpointError, ConfigError  # noqa: E402
from archbench.integrations import huggingface  # noqa: E402
from archbench.integrations.huggingface import build, read_checkpoint  # noqa: E402
from archbench.sampling import GREEDY  # noqa: E402

V = 96


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@torch.no_grad()
def perturbed(model):
    """Gains and biases begin as ones and zeros; moved apart, so that a mix-up among them shows."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def llama(heads=4, kv_heads=4, tied=False, seed=0, d_model=64, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=d_model, intermediate_size=88, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, tie_word_embeddings=tied, initializer_range=0.8 * d_model**-0.5, bos_token_id=3,
        **options,
    )  # fmt: skip
    return perturbed(transformers.LlamaForCausalLM(config))


def mamba(seed=0, d_model=48, n_layers=3, **options):
    """Transformers runs compiled kernels if it finds them, and the environment of the tests has none."""
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        vocab_size=V, hidden_size=d_model, num_hidden_layers=n_layers, bos_token_id=3, **options
    )
    return perturbed(transformers.MambaForCausalLM(config))


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def imported(model, folder: Path):
    return build(read_checkpoint(saved(model, folder)))


def random_tokens(b, t, seed=1):
    return torch.randint(0, V, (b, t), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    hidden, _ = model.hidden(tokens, model.initial_layers(len(tokens)))
    return model.logits(hidden)


def greedy(model, prompt, n):
    state = model.prefill(prompt, model.initial_state(len(prompt)))
    written = []
    for _ in range(n):
        emission = model.decode_step(state, GREEDY, None)
        written.append(emission.tokens)
        state = emission.state
    return torch.cat(written, dim=1)


def hf_greedy(model, prompt, n, boundary=3):
    """With an explicit mask of ones: else transformers masks out what looks like padding."""
    inputs = torch.cat([torch.full((len(prompt), 1), boundary), prompt], dim=1)
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[:, inputs.shape[1] :]


def edit_config(folder: Path, drop=(), **changes) -> Path:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**config, **changes}))
    return folder


def edit_tensors(folder: Path, change) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


LLAMAS = [(4, 4, False), (4, 2, True), (4, 1, False), (2, 2, True)]
"""Query heads, key-value heads, tied: every head its own, grouped, one for all."""


@torch.no_grad()
@pytest.mark.parametrize("d_model", [64, 256])
@pytest.mark.parametrize("heads,kv_heads,tied", LLAMAS)
def test_llama_has_the_same_logits(tmp_path, heads, kv_heads, tied, d_model):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    theirs = llama(heads, kv_heads, tied, d_model=d_model, rope_parameters=rope)
    ours = imported(theirs, tmp_path)
    tokens = random_tokens(2, 128)
    expected = theirs(tokens).logits
    assert expected.abs().max() > 1
    assert (logits(ours, tokens) - expected).abs().max() < 1e-5
    assert (ours.config.kv_heads, ours.config.tie_embeddings, ours.config.rope_theta) == (kv_heads, tied, 5000.0)


@torch.no_grad()
@pytest.mark.parametrize("heads,kv_heads,tied", LLAMAS[:3])
def test_llama_scores_and_decodes_the_same_from_a_cache(tmp_path, heads, kv_heads, tied):
    theirs = llama(heads, kv_heads, tied)
    ours = imported(theirs, tmp_path)
    tokens = random_tokens(2, 48)
    inputs = torch.cat([torch.full((2, 1), 3), tokens[:, :-1]], dim=1)
    cache, expected = None, []
    for piece in inputs.split([20, 1, 1, 7, 1, 18], dim=1):
        out = theirs(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected.append(out.logits.log_softmax(-1))
    expected = torch.cat(expected, dim=1)
    for sizes in ([48], [1] * 48, [5, 1, 20, 22]):
        state, found = ours.initial_state(2), []
        for piece in tokens.split(sizes, dim=1):
            scores, state = ours.score(piece, state)
            found.append(scores)
        assert (torch.cat(found, dim=1) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("heads,kv_heads,tied", [(4, 2, False), (4, 4, False), (4, 1, True)])
def test_llama_continues_greedily_with_the_same_128_tokens(tmp_path, heads, kv_heads, tied):
    theirs = llama(heads, kv_heads, tied, seed=5)
    ours = imported(theirs, tmp_path)
    prompt = random_tokens(2, 9)
    expected = hf_greedy(theirs, prompt, 128)
    assert tied or len(expected.unique()) > 10  # a tied table without training mostly repeats its input
    assert torch.equal(greedy(ours, prompt, 128), expected)


@torch.no_grad()
def test_grouped_heads_repeated_are_plain_multi_head_attention(tmp_path):
    grouped = read_checkpoint(saved(llama(4, 2), tmp_path))
    (tmp_path / "config.json").unlink()

    def repeat(tensors):
        for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
            tensors[name] = tensors[name].view(2, 16, -1).repeat_interleave(2, dim=0).reshape(64, -1).contiguous()

    edit_tensors(tmp_path, repeat)
    llama(4, 4).config.save_pretrained(tmp_path)
    tokens = random_tokens(1, 32)
    plain = build(read_checkpoint(tmp_path))
    assert (logits(plain, tokens) - logits(build(grouped), tokens)).abs().max() < 1e-5


@torch.no_grad()
def test_configs_from_before_transformers_5_are_read(tmp_path):
    saved(llama(), tmp_path)
    assert read_checkpoint(tmp_path).config.rope_theta == 10_000.0
    edit_config(tmp_path, drop=("rope_parameters", "head_dim"), rope_theta=123.0, rope_scaling=None)
    assert read_checkpoint(tmp_path).config.rope_theta == 123.0
    edit_config(tmp_path, drop=("rope_theta", "num_key_value_heads", "bos_token_id"))
    config = read_checkpoint(tmp_path).config
    assert (config.rope_theta, config.kv_heads, config.boundary) == (10_000.0, 4, 0)


@torch.no_grad()
def test_shards_half_precision_and_facts(tmp_path):
    theirs = llama().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    read = read_checkpoint(tmp_path)
    assert len(read.facts["files"]) > 1 and read.facts["dtypes"] == ["bfloat16"]
    assert read.facts["model_type"] == "llama" and len(read.facts["sha256"]) == 64
    ours = build(read)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32} and not ours.training
    tokens = random_tokens(1, 16)
    wide = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (logits(ours, tokens) - wide(tokens).logits).abs().max() < 1e-5
    (tmp_path / read.facts["files"][1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{read.facts['files'][1]}: missing"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: {'type': 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters.rope_type: 'llama3'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor: 0.5"),
        ({"attention_bias": True}, "attention_bias: True is not supported; allowed: False"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"head_dim": 32}, "head_dim: 32 is not supported; allowed: 16"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; allowed: 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers: '3'; must be a whole number"),
        ({"num_key_value_heads": 3}, "n_kv_heads: 3 does not divide"),
        ({"bos_token_id": 4000}, "bos_token_id: 4000; must lie in"),
        ({"model_type": "lama"}, "model_type: 'lama' is read by no architecture; did you mean 'llama'"),
    ],
)
def test_llama_options_that_are_not_computed_are_refused_by_name(tmp_path, changes, named):
    llama().config.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(tmp_path)
    assert "config.json: " in str(caught.value) and named in str(caught.value) and "\n" not in str(caught.value)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


@pytest.mark.parametrize(
    "change,named",
    [
        (drop("lm_head.weight"), "tensor lm_head.weight: missing"),
        (drop("model.layers.1.self_attn.k_proj.weight"), "tensor model.layers.1.self_attn.k_proj.weight: missing"),
        (put("model.layers.2.mlp.up_proj.weight", 8, 8), r"mlp.up_proj.weight: shape \[8, 8\]; .* \[88, 64\]"),
        (put("model.layers.3.mlp.up_proj.weight", 88, 64), "tensor model.layers.3.mlp.up_proj.weight: unknown"),
        (put("model.layers.0.self_attn.q_proj.bias", 64), "tensor model.layers.0.self_attn.q_proj.bias: unknown"),
    ],
)
def test_llama_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, named):
    saved(llama(), tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(tmp_path)


def test_tied_heads_may_be_absent_or_equal(tmp_path):
    saved(llama(tied=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    alone = read_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit_tensors(tmp_path, put("model.layers.0.self_attn.rotary_emb.inv_freq", 8))
    assert read_checkpoint(tmp_path).state_dict.keys() == alone.state_dict.keys()
    edit_tensors(tmp_path, put("lm_head.weight", V, 64))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight: differs from model\.embed_tokens\.weight"):
        read_checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_a_line_that_converts_them(tmp_path, monkeypatch):
    saved(llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights are not read") as caught:
        read_checkpoint(tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    monkeypatch.chdir(tmp_path)
    exec(line.partition('python -c "')[2].removesuffix('"'), {})
    assert build(read_checkpoint(tmp_path)).vocab_size == V


def test_folders_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        read_checkpoint(tmp_path)
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00rubbish!")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        read_checkpoint(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    saved(llama(), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight: dtype torch\.int8; allowed: float32"):
        read_checkpoint(tmp_path)


def test_no_two_architectures_read_the_same_model_type(monkeypatch):
    assert set(huggingface.model_types()) >= {"llama", "mamba"}
    monkeypatch.setattr(registry, "architectures", lambda: ["transformer", "transformer"])
    with pytest.raises(ConfigError, match="'llama': claimed by both"):
        huggingface.model_types()


MAMBAS = [{}, {"state_size": 5, "conv_kernel": 3, "time_step_rank": 7}, {"tie_word_embeddings": False, "expand": 3}]


def release(model, folder: Path, padded=True, **config) -> Path:
    """The same weights in the layout of the original release, whose vocabulary is padded to a multiple of 8."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = tensors.pop("backbone.embeddings.weight")
    if padded:
        table = torch.cat([table, torch.full((-len(table) % 8, table.shape[1]), 9.0)])
    tensors["backbone.embedding.weight"], tensors["lm_head.weight"] = table, table.clone()
    save_file(tensors, folder / "model.safetensors")
    basis = {
        "d_model": model.config.hidden_size, "n_layer": model.config.num_hidden_layers,
        "vocab_size": model.config.vocab_size, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**basis, **config}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("options", MAMBAS)
def test_10_mamba_has_the_same_logits(tmp_path, options):
    theirs = mamba(**options)
    ours = imported(theirs, tmp_path)
    tokens = random_tokens(2, 48)
    expected = theirs(tokens).logits
    assert (logits(ours, tokens) - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_10_mamba_decodes_the_same_token_by_token(tmp_path):
    """Transformers resumes Mamba rightly for one token at a time only; our chunks must agree with that."""
    theirs = mamba()
    ours = imported(theirs, tmp_path)
    tokens = random_tokens(2, 24)
    inputs = torch.cat([torch.full((2, 1), 3), tokens[:, :-1]], dim=1)
    cache, expected = None, []
    for piece in inputs.split(1, dim=1):
        out = theirs(piece, cache_params=cache, use_cache=True)
        cache = out.cache_params
        expected.append(out.logits.log_softmax(-1))
    expected = torch.cat(expected, dim=1)
    for sizes in ([24], [1] * 24, [2, 1, 9, 12]):
        state, found = ours.initial_state(2), []
        for piece in tokens.split(sizes, dim=1):
            scores, state = ours.score(piece, state)
            found.append(scores)
        assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("d_model,n_layers", [(32, 2), (48, 4)])
def test_11_mamba_continues_greedily_with_the_same_48_tokens(tmp_path, d_model, n_layers):
    theirs = mamba(seed=2, d_model=d_model, n_layers=n_layers)
    ours = imported(theirs, tmp_path)
    prompt = random_tokens(2, 9)
    assert torch.equal(greedy(ours, prompt, 48), hf_greedy(theirs, prompt, 48))


def test_10_mamba_has_the_same_gradients(tmp_path):
    """32 tokens: the backward pass of transformers without kernels is quadratic in their number."""
    theirs = mamba(d_model=32, n_layers=2)
    read = read_checkpoint(saved(theirs, tmp_path))
    ours = build(read)
    tokens = random_tokens(2, 32)
    weights = torch.randn(2, 32, V, generator=torch.Generator().manual_seed(3))
    (logits(ours, tokens) * weights).sum().backward()
    (theirs(tokens).logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = registry.architecture(read.architecture).hf["mamba"].weights(read.config, gradients)
    compared = dict(ours.named_parameters())
    assert compared.keys() == expected.keys()
    for name, parameter in compared.items():
        scale = expected[name].abs().max()
        assert scale > 0 and (parameter.grad - expected[name]).abs().max() <= 1e-5 * scale, name


@torch.no_grad()
def test_mamba_in_the_layout_of_the_release_is_the_same_model(tmp_path):
    theirs = mamba()
    theirs.resize_token_embeddings(V - 3, mean_resizing=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = read_checkpoint(saved(theirs, tmp_path / "a"))
    two = read_checkpoint(release(theirs, tmp_path / "b"))
    assert two.config.vocab_size == V - 3 and two.facts["model_type"] is None
    assert one.state_dict.keys() == two.state_dict.keys()
    assert all(torch.equal(one.state_dict[name], two.state_dict[name]) for name in one.state_dict)
    tokens = random_tokens(1, 12).clamp(max=V - 4)
    assert (logits(build(two), tokens) - theirs(tokens).logits).abs().max() < 1e-4


@torch.no_grad()
def test_mamba_s_imported_tensors_come_back_under_their_names(tmp_path):
    theirs = mamba()
    ours = imported(theirs, tmp_path).state_dict()
    back = {
        "embedding.weight": "backbone.embeddings.weight",
        "unembedding.weight": "lm_head.weight",
        "norm.weight": "backbone.norm_f.weight",
    }
    back |= {
        f"blocks.{i}.{name}": f"backbone.layers.{i}.{theirs_name}"
        for i in range(3)
        for name, theirs_name in {
            "norm.weight": "norm.weight",
            **{f"mixer.{n}.weight": f"mixer.{n}.weight" for n in ("in_proj", "x_proj", "dt_proj", "out_proj")},
            "mixer.conv_weight": "mixer.conv1d.weight",
            "mixer.conv_bias": "mixer.conv1d.bias",
            "mixer.dt_bias": "mixer.dt_proj.bias",
            "mixer.A_log": "mixer.A_log",
            "mixer.D": "mixer.D",
        }.items()
    }
    assert back.keys() == ours.keys()
    for name, theirs_name in back.items():
        tensor = theirs.state_dict()[theirs_name]
        assert torch.equal(ours[name], tensor.squeeze(1) if "conv_weight" in name else tensor)
    assert set(back.values()) == set(theirs.state_dict())


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"use_bias": True}, "use_bias: True is not supported; allowed: False"),
        ({"use_conv_bias": False}, "use_conv_bias: False"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"intermediate_size": 100}, "intermediate_size: 100 is not supported; allowed: 96"),
        ({"expand": 1.5}, "expand: 1.5; must be a whole number"),
    ],
)
def test_mamba_options_that_are_not_computed_are_refused_by_name(tmp_path, changes, named):
    mamba().config.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(tmp_path)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"rms_norm": False}, "rms_norm: False"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer: 'Mamba3' is not supported; allowed: 'Mamba1'"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"d_intermediate": 64}, "d_intermediate: 64"),
    ],
)
def test_releases_that_are_not_computed_are_refused_by_name(tmp_path, changes, named):
    release(mamba(n_layers=1), tmp_path, **changes)
    with pytest.raises(ConfigError, match="names no model_type") as caught:
        read_checkpoint(tmp_path)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change,named",
    [
        (put("backbone.layers.0.norm.bias", 48), r"backbone\.layers\.0\.norm\.bias: the bias of a LayerNorm"),
        (drop("backbone.layers.1.mixer.A_log"), r"tensor backbone\.layers\.1\.mixer\.A_log: missing"),
        (put("backbone.layers.1.mixer.conv1d.weight", 96, 4), r"conv1d\.weight: shape \[96, 4\]; .*\[96, 1, 4\]"),
        (put("backbone.layers.0.mixer.dt_bias", 96), r"tensor backbone\.layers\.0\.mixer\.dt_bias: unknown"),
        (put("lm_head.weight", V, 48), r"tensor lm_head\.weight: differs from backbone\.embeddings\.weight"),
        (drop("backbone.embeddings.weight"), r"tensor backbone\.embeddings\.weight: missing"),
    ],
)
def test_mamba_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, named):
    saved(mamba(), tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(tmp_path)
