"""Codecs lose nothing, count bytes right, and are the same each time they are trained."""

from __future__ import annotations

import json

import numpy as np
import pytest

import archbench.codec as codec_module
from archbench.codec import BOUNDARY_ID, ByteCodec, codec_from, load_codec, train_bpe
from archbench.data.corpus import Corpus, build_corpus
from archbench.data.document import Document
from archbench.errors import DataError

SENTENCE = "the state of a model is what it keeps between one token and the next while it reads"
WORDS = SENTENCE.split()

AWKWARD = [
    "",
    "plain words, and more words",
    "tabs\tand\ttabs\n\n\n    indented\n\tmixed  \n",
    "CRLF\r\nand lone \r carriage\r\n\r\n",
    "emoji 🙂👩‍👩‍👧 flags 🇩🇪 and accents é e\u0301 ß",
    "日本語とかな、العربية, Ελληνικά",
    "NUL \x00 and controls \x01\x1c\x7f\x85\u2028",
    "spelled out: <|boundary|> and </s>",
    "  leading and trailing  ",
    "\n".join(["a line"] * 40_000),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    documents = [
        Document(f"doc{i}", " ".join(WORDS[j] + "ly" * (j % 3) for j in rng.integers(len(WORDS), size=400)).encode())
        for i in range(20)
    ]
    return build_corpus("words", documents)


@pytest.fixture(scope="module")
def bpe(corpus):
    return train_bpe(corpus.train, 300)


def test_bytes_round_trip_every_value():
    text = bytes(range(1, 256))
    ids = ByteCodec().encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(text)
    assert ByteCodec().decode(ids) == text


def test_bytes_refuse_nul():
    with pytest.raises(DataError, match="NUL at byte 2"):
        ByteCodec().encode(b"ab\0c")


@pytest.mark.parametrize("text", AWKWARD)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text.encode())
    assert ids.dtype == np.uint16
    assert BOUNDARY_ID not in ids
    assert bpe.decode(ids) == text.encode()


def test_long_text_encodes_as_one_string_would(bpe):
    text = "def f(x):\n    return x\n\n\nclass A:\n\n    pass\nthe state\n  of\n" * 3000
    whole = bpe._tokenizer.encode(text).ids
    assert len(text) > 2 * codec_module.PIECE_CHARACTERS
    assert len(list(codec_module._pieces(text))) > 1
    assert bpe.encode(text.encode()).tolist() == whole


def test_bpe_refuses_text_that_is_not_utf8(bpe):
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        bpe.encode(b"abc\xff")


def test_boundary_decodes_to_nothing(bpe):
    for codec in (ByteCodec(), bpe):
        ids = codec.encode(b"model").astype(np.int64)
        assert codec.decode(np.concatenate([[0], ids, [0, 0], ids])) == b"modelmodel"


@pytest.mark.parametrize("text", [text for text in AWKWARD if "\0" not in text])
def test_token_bytes_sum_to_the_length_of_the_text(bpe, text):
    for codec in (ByteCodec(), bpe):
        sizes = codec.token_bytes()
        assert len(sizes) == codec.vocab_size
        assert sizes[BOUNDARY_ID] == 0
        assert (sizes[1:] > 0).all()
        assert sizes[codec.encode(text.encode())].sum() == len(text.encode())


def test_every_byte_is_a_token(bpe):
    assert {bpe.decode(np.array([id])) for id in range(1, 257)} == {bytes([byte]) for byte in range(256)}


def test_bpe_compresses_and_its_size_is_what_was_asked(bpe, corpus):
    text = corpus.heldout[0].text
    assert (bpe.name, bpe.vocab_size) == ("bpe-300", 300)
    assert len(bpe.encode(text)) < 0.6 * len(text)


def test_training_is_deterministic_and_ignores_order(bpe, corpus):
    again = train_bpe(tuple(reversed(corpus.train)), 300)
    assert again.fingerprint == bpe.fingerprint
    assert train_bpe(corpus.train, 301).fingerprint != bpe.fingerprint


def test_only_training_text_shapes_the_codec(bpe, corpus):
    other = Corpus(name="words", train=corpus.train, heldout=(Document("x", b"zzzz" * 5000),), sha256="other")
    assert codec_from("bpe-300", other).fingerprint == bpe.fingerprint


def test_training_sample_is_bounded(corpus, monkeypatch):
    first = min(corpus.train, key=lambda document: document.sha256)
    monkeypatch.setattr(codec_module, "TRAINING_SAMPLE_BYTES", len(first.text))
    assert train_bpe(corpus.train, 280).fingerprint == train_bpe([first], 280).fingerprint


def test_codec_is_cached_and_a_damaged_cache_is_rebuilt(corpus, bpe, tmp_path, monkeypatch):
    assert codec_from("bpe-300", corpus).fingerprint == bpe.fingerprint
    (file,) = (tmp_path / "cache" / "bpe").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(codec_module, "train_bpe", lambda *_: pytest.fail("trained again"))
        assert codec_from("bpe-300", corpus).fingerprint == bpe.fingerprint
    whole = file.read_bytes()
    for damaged in (b"", whole[:-50], whole.replace(b"state", b"stale", 1), b"\xff\xfe"):
        file.write_bytes(damaged)
        assert codec_from("bpe-300", corpus).fingerprint == bpe.fingerprint
        assert file.read_bytes() == whole


def test_save_and_load(bpe, tmp_path):
    for codec in (ByteCodec(), bpe):
        path = tmp_path / f"{codec.name}.json"
        codec.save(path)
        loaded = load_codec(path)
        assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == (codec.name, codec.vocab_size, codec.fingerprint)
        text = AWKWARD[4].encode()
        np.testing.assert_array_equal(loaded.encode(text), codec.encode(text))


def test_altered_codec_file_is_refused(bpe, tmp_path):
    path = tmp_path / "codec.json"
    bpe.save(path)
    body = json.loads(path.read_text())
    body["merges"].pop()
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="altered"):
        load_codec(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": "x", "kind": "bpe"}', "not json"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "codec.json"
    path.write_text(content)
    with pytest.raises(DataError, match="not a codec file"):
        load_codec(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_codec(tmp_path / "absent.json")


@pytest.mark.parametrize("spec", ["byte", "", "bpe", "bpe-", "bpe-x", "bpe--5", "bpe-256", "bpe-2000000", "gpt2"])
def test_unknown_codec_names_are_refused(spec, corpus):
    with pytest.raises(DataError, match="allowed: 'bytes', or 'bpe-N' with N from 257") as caught:
        codec_from(spec, corpus)
    assert "\n" not in str(caught.value)


def test_vocabulary_beyond_the_text_is_refused(corpus):
    with pytest.raises(DataError, match=r"'bpe-5000': this text yields only \d+ tokens"):
        codec_from("bpe-5000", corpus)


def test_ids_out_of_range_are_refused(bpe):
    for codec in (ByteCodec(), bpe):
        with pytest.raises(DataError, match="allowed: 0 to"):
            codec.decode(np.array([codec.vocab_size]))
        with pytest.raises(DataError, match="allowed: 0 to"):
            codec.decode(np.array([-1]))
