"""Codecs: text in, token ids out, and exactly back. Bytes, or a byte-pair encoding trained on the corpus itself.

Token id 0 is the boundary in every codec: it separates documents and stands for "nothing read yet". It decodes to
nothing. Every other token is a fixed run of bytes, so token counts convert to bytes of raw text by a table
(`token_bytes`), and bits per byte compare across codecs.

Bytes: id = byte value, vocabulary 256; NUL is the boundary and so cannot be text.
BPE: Sennrich et al. 2016 over bytes (GPT-2's pre-tokenisation), trained by the package `tokenizers`; "bpe-1024" has
the boundary, the 256 bytes and 767 merges. It is trained on the training side only, else held-out text would shape it.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer, UInt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from archbench.data.cache import cache_dir, cache_key, read_json, write_atomically, write_json
from archbench.data.corpus import Corpus
from archbench.data.document import Document, utf8_prefix
from archbench.errors import DataError

BOUNDARY = "<|boundary|>"
BOUNDARY_ID = 0
TRAINING_SAMPLE_BYTES = 20_000_000
MIN_BPE_SIZE = 257  # the boundary and the bytes
MAX_BPE_SIZE = 1_000_000
PIECE_CHARACTERS = 65_536
LONE_NEWLINE = re.compile(r"(?<=\S)\n(?=\S)")
ALLOWED = f"allowed: 'bytes', or 'bpe-N' with N from {MIN_BPE_SIZE} to {MAX_BPE_SIZE}"


class Codec(ABC):
    """Turns UTF-8 text into token ids and back without loss.

    name: as in a suite file. fingerprint: sha256 (hex) of everything that decides the ids; two codecs with the same
    fingerprint are interchangeable.
    """

    name: str
    vocab_size: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: bytes) -> UInt[np.ndarray, " n"]:
        """Ids in the smallest unsigned type that holds the vocabulary, no boundary added. Raises DataError."""

    @abstractmethod
    def decode(self, ids: Integer[np.ndarray, " n"]) -> bytes:
        """The bytes of the tokens; boundaries vanish. May end inside a UTF-8 character, as tokens may."""

    @abstractmethod
    def token_bytes(self) -> Int64[np.ndarray, " v"]:
        """How many bytes of text each token stands for; 0 for the boundary."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `codec_from_state` rebuilds it from, as JSON values."""

    def save(self, path: Path) -> None:
        """Write it as JSON, so that a checkpoint can carry its codec."""
        body = {"fingerprint": self.fingerprint, **self.state()}
        write_atomically(path, lambda file: file.write(json.dumps(body).encode()))


class ByteCodec(Codec):
    """One token a byte."""

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 256
        self.fingerprint = hashlib.sha256(b"archbench bytes").hexdigest()

    def encode(self, text: bytes) -> UInt[np.ndarray, " n"]:
        """Raises DataError for a NUL byte, which is the boundary."""
        position = text.find(b"\0")
        if position >= 0:
            raise DataError(f"codec bytes: NUL at byte {position}; NUL is the boundary token, remove it from the text")
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: Integer[np.ndarray, " n"]) -> bytes:
        _require_ids(self, ids)
        return ids[ids != BOUNDARY_ID].astype(np.uint8).tobytes()

    def token_bytes(self) -> Int64[np.ndarray, " v"]:
        return (np.arange(256) != BOUNDARY_ID).astype(np.int64)

    def state(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class BPECodec(Codec):
    """Byte-level BPE.

    vocabulary: token strings in the order of their ids, the boundary first, bytes written in the printable alphabet of
    `byte_alphabet`. merges: pairs in the order of their rank.
    """

    def __init__(self, vocabulary: list[str], merges: list[tuple[str, str]]) -> None:
        if vocabulary[:1] != [BOUNDARY]:
            raise DataError(f"codec bpe: token 0 is {vocabulary[:1]}; expected '{BOUNDARY}'")
        self.name = f"bpe-{len(vocabulary)}"
        self.vocab_size = len(vocabulary)
        self._vocabulary = vocabulary
        self._merges = merges
        self.fingerprint = hashlib.sha256(json.dumps(self.state()).encode()).hexdigest()
        # The boundary is an ordinary entry that no merge produces, not a "special token" of the library: those are
        # searched for in the text, and a text that spells the boundary out would lose it.
        ids = {token: id for id, token in enumerate(vocabulary)}
        self._tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        self._pieces = [b"", *(bytes(byte_of[character] for character in token) for token in vocabulary[1:])]
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: bytes) -> UInt[np.ndarray, " n"]:
        """Raises DataError for text that is not UTF-8."""
        try:
            pieces = _pieces(text.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"codec {self.name}: not UTF-8 at byte {error.start}; convert the text") from error
        ids = [np.array(self._tokenizer.encode(piece).ids, dtype=self._dtype) for piece in pieces]
        return np.concatenate(ids) if ids else np.empty(0, dtype=self._dtype)

    def decode(self, ids: Integer[np.ndarray, " n"]) -> bytes:
        _require_ids(self, ids)
        return b"".join(self._pieces[id] for id in ids.tolist())

    def token_bytes(self) -> Int64[np.ndarray, " v"]:
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    def state(self) -> dict[str, Any]:
        return {"kind": "bpe", "vocabulary": self._vocabulary, "merges": [list(pair) for pair in self._merges]}


class TokenizerCodec(Codec):
    """A tokenizer.json that came with an imported model. Its token 0 need not be a boundary: the model knows its own.

    Text is text: what spells a special token out is encoded as the characters it is made of, and special tokens decode
    to nothing. Tokens of a byte-level vocabulary are exact runs of bytes; those of others decode to whole characters.

    definition: the text of the file.
    """

    def __init__(self, definition: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(definition)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"tokenizer.json: cannot be read ({error}); fetch it again") from None
        self._tokenizer.encode_special_tokens = True
        self._definition = definition
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.name = f"tokenizer-{self.vocab_size}"
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()
        self._pieces = _byte_pieces(self._tokenizer, self.vocab_size)

    def encode(self, text: bytes) -> UInt[np.ndarray, " n"]:
        """Raises DataError for text that is not UTF-8."""
        try:
            characters = text.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"codec {self.name}: not UTF-8 at byte {error.start}; convert the text") from error
        return np.array(self._tokenizer.encode(characters, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Integer[np.ndarray, " n"]) -> bytes:
        """Where the vocabulary is not one of bytes, whole characters: a token that ends inside one gives U+FFFD."""
        _require_ids(self, ids)
        if self._pieces is None:
            return self._tokenizer.decode(ids.tolist()).encode()
        return b"".join(self._pieces[id] for id in ids.tolist())

    def token_bytes(self) -> Int64[np.ndarray, " v"]:
        return np.array([len(self.decode(np.array([id]))) for id in range(self.vocab_size)], dtype=np.int64)

    def state(self) -> dict[str, Any]:
        return {"kind": "tokenizer", "definition": self._definition}


def _byte_pieces(tokenizer: Tokenizer, vocab_size: int) -> list[bytes] | None:
    """The bytes of every token of a byte-level vocabulary; None for a vocabulary of another kind."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    added = tokenizer.get_added_tokens_decoder()
    pieces = []
    for id in range(vocab_size):
        token = tokenizer.id_to_token(id) or ""
        if id in added:
            pieces.append(b"" if added[id].special else token.encode())
        elif byte_of.keys() >= set(token):
            pieces.append(bytes(byte_of[character] for character in token))
        else:  # as the library's own decoder has it
            pieces.append(token.encode())
    return pieces


def codec_from(spec: str, corpus: Corpus) -> Codec:
    """The codec a suite names: "bytes", or "bpe-1024" trained on this corpus (or read from the cache).

    Raises DataError for an unknown name and for a vocabulary that the corpus is too small to fill.
    """
    if spec == "bytes":
        return ByteCodec()
    kind, _, size = spec.partition("-")
    if kind != "bpe" or not size.isascii() or not size.isdigit():
        raise DataError(f"codec '{spec}' is not known; {ALLOWED}")
    if not MIN_BPE_SIZE <= int(size) <= MAX_BPE_SIZE:
        raise DataError(f"codec '{spec}': vocabulary of {int(size)}; {ALLOWED}")
    return _cached_bpe(corpus, int(size))


def load_codec(path: Path) -> Codec:
    """The codec that `save` wrote. Raises DataError when the file is missing, damaged or altered."""
    try:
        body = json.loads(path.read_bytes())
        fingerprint = body.pop("fingerprint")
        codec = codec_from_state(body)
    except OSError as error:
        raise DataError(f"{path}: codec cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a codec file ({type(error).__name__}: {error})") from error
    if codec.fingerprint != fingerprint:
        raise DataError(
            f"{path}: codec was altered: fingerprint {codec.fingerprint[:12]}…, expected {fingerprint[:12]}…"
        )
    return codec


def codec_from_state(state: dict[str, Any]) -> Codec:
    """The inverse of `Codec.state`."""
    if state["kind"] == "bytes":
        return ByteCodec()
    if state["kind"] == "bpe":
        return BPECodec(state["vocabulary"], [(left, right) for left, right in state["merges"]])
    if state["kind"] == "tokenizer":
        return TokenizerCodec(state["definition"])
    raise DataError(f"codec kind '{state['kind']}' is not known; allowed: bytes, bpe, tokenizer")


def train_bpe(documents: Iterable[Document], vocab_size: int) -> BPECodec:
    """Train on at most 20 MB, taken in the order of the texts' hashes: the same codec whatever the order given.

    Raises DataError when the text has too few pairs to fill the vocabulary.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARY],
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(_sample(documents), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    if len(vocabulary) != vocab_size:
        raise DataError(
            f"codec 'bpe-{vocab_size}': this text yields only {len(vocabulary)} tokens; "
            f"use bpe-{len(vocabulary)} or fewer, or more text"
        )
    return BPECodec(vocabulary, [_pair(merge) for merge in trained["merges"]])


@cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's way to write any byte as one printable character: printable Latin-1 as itself, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _cached_bpe(corpus: Corpus, vocab_size: int) -> BPECodec:
    key = cache_key("bpe", corpus.sha256, str(vocab_size), version("tokenizers"))
    path = cache_dir() / "bpe" / f"{key}.jsonl"
    state = read_json(path)
    if state is not None:
        return BPECodec(state["vocabulary"], [(left, right) for left, right in state["merges"]])
    codec = train_bpe(corpus.train, vocab_size)
    write_json(path, codec.state())
    return codec


def _sample(documents: Iterable[Document]) -> Iterable[str]:
    room = TRAINING_SAMPLE_BYTES
    for document in sorted(documents, key=lambda document: document.sha256):
        text = utf8_prefix(document.text, room)
        room -= len(text)
        yield from _pieces(text.decode())
        if room < 4:  # not even one character of any length is sure to fit
            return


def _pieces(text: str) -> Iterable[str]:
    """The text in pieces of about 64 KB that encode to the same ids as the whole, for the library's memory's sake.

    A lone newline between two visible characters is always a pre-token of its own, so no merge reaches across it.
    Text without such a place stays whole. Cutting at every newline would not do: "\\n    " is a token worth having.
    """
    begin = 0
    while begin < len(text):
        place = LONE_NEWLINE.search(text, begin + PIECE_CHARACTERS)
        end = place.end() if place else len(text)
        yield text[begin:end]
        begin = end


def _pair(merge: list[str] | str) -> tuple[str, str]:
    """Merges are pairs in new versions of the library's JSON and "left right" in old ones."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _require_ids(codec: Codec, ids: np.ndarray) -> None:
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < codec.vocab_size:
        raise DataError(
            f"codec {codec.name}: ids from {ids.min()} to {ids.max()}; allowed: 0 to {codec.vocab_size - 1}"
        )
