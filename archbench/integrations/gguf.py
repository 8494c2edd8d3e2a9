"""Reads GGUF files of the llama kind: one file that holds config, tokenizer and (mostly quantised) weights.

Tensors are brought back to fp32 exactly as their quantisation defines them. They and the metadata are then renamed to
those of the Hugging Face checkpoint that the file was made from, so that what reads that (`Architecture.hf`) reads
this. Llama's attention is stored with the rows of queries and keys in another order, which is undone. Like there, a
file is taken only when every key that changes its function is understood and every tensor is accounted for.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md; the package `gguf` parses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from archbench.checkpoint import save
from archbench.codec import TokenizerCodec
from archbench.errors import CheckpointError, ConfigError, MissingExtra, suggestion
from archbench.foreign import integer, only
from archbench.integrations.huggingface import ImportedModel, build, model_types

KIND = "llama"
"""`general.architecture` of the files that are read, and the `model_type` they are read as."""

OPTIONS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Keys behind "llama." by the names of config.json."""

CHECKED = (
    "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scaling.type",
    "expert_count", "expert_used_count",
)  # fmt: skip
UNUSED = ("context_length",)
"""The context trained for; reading on past it is allowed, and measured."""

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""Tensors of block i: "blk.i.NAME" and "model.layers.i.NAME"."""
REORDERED = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
"""Those stored in the other order of rows, and the option that says how many heads they hold."""

NORMAL, USER_DEFINED = 1, 4
"""Token types that stand for text: made by merges, or found whole. The others (control, unknown, unused) do not."""

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
"""How `tokenizer.ggml.pre` cuts text before merging."""
MERGES_IGNORED = ("llama-bpe",)
"""Here a piece that is a token by itself stays whole, whatever the merges say."""


def read_gguf(path: Path, boundary: int | None = None) -> tuple[ImportedModel, TokenizerCodec]:
    """Reads a file. `boundary` is the token before a text; None takes the file's beginning-of-sequence token.

    Raises:
        MissingExtra: the package `gguf` is not installed.
        ConfigError: the file asks for something that no architecture here computes; names the key.
        CheckpointError: the file is missing or damaged, or a tensor is missing, left over or misshapen; names it.
    """
    if find_spec("gguf") is None:
        raise MissingExtra(f"{path}: GGUF files need the package gguf: pip install 'archbench[smollm]'")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a file that ends in .gguf")
    try:
        metadata, stored, types = _parse(path)
        options = _options(metadata, stored, boundary)
        codec = _codec(metadata, len(stored["token_embd.weight"]))
        name, reader = model_types()[KIND]
        config = reader.config(options)
        tensors = {_renamed(key): _reordered(key, tensor, options) for key, tensor in stored.items()}
        weights = reader.weights(config, tensors)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from None
    facts = {
        "folder": path.name,
        "model_type": KIND,
        "files": [path.name],
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "dtypes": types,
        **{key: metadata[f"general.{key}"] for key in ("name", "license") if f"general.{key}" in metadata},
    }
    return ImportedModel(architecture=name, config=config, state_dict=weights, facts=facts), codec


def import_gguf(path: Path, out: Path, boundary: int | None = None) -> ImportedModel:
    """Reads a file, checks that its model can be built, and writes it as one of our checkpoints, in fp32.

    Raises:
        MissingExtra, ConfigError, CheckpointError: as `read_gguf`.
    """
    imported, codec = read_gguf(path, boundary)
    model = build(imported)
    origin = {"imported": imported.facts}
    save(out, imported.architecture, imported.config, model.state_dict(), codec=codec, origin=origin, history=None)
    return imported


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Metadata by key, tensors in fp32 by name, and the kinds they were stored in."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: _value(field) for key, field in reader.fields.items()}
        tensors = {
            tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            for tensor in reader.tensors
        }
    except NotImplementedError as error:
        raise CheckpointError(f"a tensor is stored in a way that cannot be read ({error})") from None
    except (ValueError, IndexError, KeyError, TypeError, OSError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"damaged, or not a GGUF file ({reason}); fetch it again") from None
    return metadata, tensors, sorted({tensor.tensor_type.name for tensor in reader.tensors})


def _value(field: Any) -> Any:
    """A metadata field as plain Python: text, number, truth value, or a list of them."""
    is_text = field.types[-1].name == "STRING"
    values = [bytes(field.parts[index]).decode() if is_text else field.parts[index][0].item() for index in field.data]
    return values if field.types[0].name == "ARRAY" else values[0]


def _options(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], boundary: int | None) -> dict[str, Any]:
    """The metadata as a config.json would have it."""
    kind = metadata.get("general.architecture")
    if kind != KIND:
        raise ConfigError(f"general.architecture: {kind!r} is not read; allowed: '{KIND}'")
    own = {key.removeprefix(f"{KIND}."): value for key, value in metadata.items() if key.startswith(f"{KIND}.")}
    known = (*OPTIONS, *CHECKED, *UNUSED)
    for key in own:
        if key not in known:
            raise ConfigError(f"{KIND}.{key}: not known, so what it changes is not; {suggestion(key, known)}")
    if "token_embd.weight" not in tensors:
        raise CheckpointError("tensor token_embd.weight: missing")
    width, heads = integer(own, "embedding_length"), integer(own, "attention.head_count")
    head_dim = width // heads if heads else 0
    same = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    only(own, **dict.fromkeys(same, (head_dim,)), **{"rope.scaling.type": ("none",), "expert_count": (0,)})
    only(own, vocab_size=(len(tensors["token_embd.weight"]),))
    return {
        **{theirs: own[key] for key, theirs in OPTIONS.items() if key in own},
        "num_key_value_heads": integer(own, "attention.head_count_kv", heads),
        "vocab_size": len(tensors["token_embd.weight"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id") if boundary is None else boundary,
    }


def _renamed(name: str) -> str:
    """The name in a Hugging Face checkpoint; a name that is not known stays, and is refused there."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    block, number, inner = (*name.split(".", 2), "", "")[:3]
    return f"model.layers.{number}.{INSIDE[inner]}" if block == "blk" and inner in INSIDE else name


def _reordered(name: str, tensor: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The tensor with the rows of each head as rotary positions in halves want them."""
    inner = name.split(".", 2)[-1]
    if inner not in REORDERED:
        return tensor
    heads = options[REORDERED[inner]]
    if tensor.ndim != 2 or not heads or len(tensor) % (2 * heads):
        raise CheckpointError(f"tensor {name}: shape {list(tensor.shape)} does not hold {heads} heads of even width")
    return halves(tensor, heads)


def halves(weight: Float[Tensor, "r d"], heads: int) -> Float[Tensor, "r d"]:
    """Rows from pairs to halves: a head's rows x0 y0 x1 y1 ... become x0 x1 ... y0 y1 ...; each (x, y) is turned as a
    point of the plane."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _codec(metadata: Mapping[str, Any], vocab_size: int) -> TokenizerCodec:
    """The byte-level BPE of the metadata, as the tokenizer.json that it was."""
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    for key, allowed in (("model", ("gpt2",)), ("pre", tuple(PRE_TOKENIZERS))):
        if of.get(key) not in allowed:
            names = " or ".join(f"'{name}'" for name in allowed)
            raise ConfigError(f"tokenizer.ggml.{key}: {of.get(key)!r} is not supported; allowed: {names}")
    for key in ("tokens", "merges", "token_type"):
        if not isinstance(of.get(key), list):
            raise CheckpointError(f"tokenizer.ggml.{key}: missing, or no list")
    ids = {token: id for id, token in enumerate(of["tokens"])}
    if not len(ids) == len(of["tokens"]) == len(of["token_type"]) == vocab_size:
        raise CheckpointError(
            f"tokenizer.ggml.tokens: {len(of['tokens'])} tokens, {len(ids)} of them distinct, of "
            f"{len(of['token_type'])} types; the embedding has {vocab_size} rows"
        )
    merges = [tuple(merge.split(" ")) for merge in of["merges"]]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=of["pre"] in MERGES_IGNORED))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"tokenizer.ggml.merges: do not fit the tokens ({error})") from None
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[of["pre"]]
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(of["tokens"], of["token_type"], strict=True):
        if kind != NORMAL:
            tokenizer.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False)])
    return TokenizerCodec(tokenizer.to_str())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
