"""Windows: the same for every model, any step at once, and held-out text that is the same for every codec."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import archbench.data.cache as cache_module
from archbench.codec import ByteCodec, train_bpe
from archbench.data.cache import cache_dir
from archbench.data.corpus import Corpus, build_corpus
from archbench.data.document import Document
from archbench.data.windows import TokenStream, Windows, heldout_documents, tokenize
from archbench.errors import DataError

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(1)
    sentence = "der Zustand größer 状態 🙂 state space model token byte reads keeps"
    words = sentence.split()
    texts = (" ".join(words[j] for j in rng.integers(len(words), size=200)) for _ in range(40))
    return build_corpus("words", [Document(f"doc{i}", text.encode()) for i, text in enumerate(texts)], 0.2)


@pytest.fixture(scope="module")
def bpe(corpus):
    return train_bpe(corpus.train, 300)


def counting(n: int) -> TokenStream:
    """A stream whose tokens are their places; every third stands for no byte."""
    return TokenStream(np.arange(n, dtype=np.uint16), n, (np.arange(n) % 3 > 0).astype(np.int64))


# Streams


def test_stream_holds_every_document_once_each_followed_by_the_boundary(corpus, bpe):
    for codec in (ByteCodec(), bpe):
        stream = tokenize(corpus.train, codec, seed=0)
        ends = np.flatnonzero(stream.tokens == 0)
        pieces = [codec.decode(piece) for piece in np.split(stream.tokens, ends + 1)]
        assert pieces.pop() == b""
        assert sorted(pieces) == sorted(document.text for document in corpus.train)
        assert stream.n_bytes == corpus.n_train_bytes == codec.token_bytes()[stream.tokens].sum()
        assert stream.bytes_per_token == stream.n_bytes / len(stream.tokens)
    assert stream.bytes_per_token > 1.5


def test_document_order_follows_the_seed_alone(corpus):
    first = tokenize(corpus.train, ByteCodec(), seed=0).tokens
    np.testing.assert_array_equal(tokenize(reversed(corpus.train), ByteCodec(), seed=0).tokens, first)
    assert (tokenize(corpus.train, ByteCodec(), seed=1).tokens != first).any()


def test_stream_is_cached_and_a_damaged_cache_is_rebuilt(corpus, bpe, monkeypatch):
    whole = np.array(tokenize(corpus.train, bpe, seed=0).tokens)
    (path,) = (cache_dir() / "tokens").iterdir()
    kept = path.read_bytes()

    class Forbidden(ByteCodec):
        def __init__(self):
            super().__init__()
            self.fingerprint = bpe.fingerprint

        def token_bytes(self):
            return bpe.token_bytes()

        def encode(self, text):
            raise AssertionError("encoded again")

    np.testing.assert_array_equal(tokenize(corpus.train, Forbidden(), seed=0).tokens, whole)
    with pytest.raises(AssertionError, match="encoded again"):
        tokenize(corpus.train[1:], Forbidden(), seed=0)
    for damaged in (b"", kept[:-2], b"nonsense", kept[:-2] + b"\xff\xff", kept[:-2] + b"\x05\x00"):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(tokenize(corpus.train, bpe, seed=0).tokens, whole)
        assert path.read_bytes() == kept


def test_large_streams_are_memory_mapped(corpus, monkeypatch):
    small = tokenize(corpus.train, ByteCodec(), seed=0)
    monkeypatch.setattr(cache_module, "MEMORY_MAP_BYTES", 1000)
    large = tokenize(corpus.train, ByteCodec(), seed=0)
    assert isinstance(large.tokens, np.memmap)
    assert not isinstance(small.tokens, np.memmap)
    assert torch.equal(Windows(large, 32, 4, seed=0).batch_at(3), Windows(small, 32, 4, seed=0).batch_at(3))


def test_no_documents_is_an_error():
    with pytest.raises(DataError, match="no documents"):
        tokenize([], ByteCodec(), seed=0)


# Windows


def test_windows_are_runs_of_the_stream():
    windows = Windows(counting(5000), context=64, batch=8, seed=0)
    batch = windows.batch_at(0, lookahead=4)
    assert batch.shape == (8, 68)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, batch[:, :1] + torch.arange(68))


def test_lookahead_only_lengthens():
    windows = Windows(counting(5000), context=32, batch=8, seed=3)
    longest = windows.batch_at(7, lookahead=16)
    for lookahead in range(1, 17):
        assert torch.equal(windows.batch_at(7, lookahead), longest[:, : 32 + lookahead])


def test_steps_and_seeds_differ_and_any_step_is_reached_at_once():
    stream = counting(5000)
    run = [Windows(stream, 32, 8, seed=3).batch_at(step) for step in range(20)]
    assert len({tuple(batch[:, 0].tolist()) for batch in run}) == 20
    resumed = Windows(stream, 32, 8, seed=3)
    assert torch.equal(resumed.batch_at(13), run[13])
    assert torch.equal(resumed.batch_at(2), run[2])
    assert not torch.equal(Windows(stream, 32, 8, seed=4).batch_at(13), run[13])


def test_every_place_is_used_and_the_longest_lookahead_always_fits():
    windows = Windows(counting(60), context=40, batch=64, seed=0, lookahead_max=16)
    starts = {start for step in range(20) for start in windows.batch_at(step, 16)[:, 0].tolist()}
    assert starts == {0, 1, 2, 3, 4}
    exact = Windows(counting(56), context=40, batch=2, seed=0, lookahead_max=16)
    assert exact.batch_at(0, 16)[:, -1].tolist() == [55, 55]


def test_bytes_at_counts_the_targets_of_the_step():
    windows = Windows(counting(5000), context=32, batch=8, seed=0)
    targets = windows.batch_at(5)[:, 1:]
    assert windows.bytes_at(5) == int((targets % 3 > 0).sum())


def test_a_batch_owns_its_memory():
    stream = counting(500)
    batch = Windows(stream, 32, 8, seed=0).batch_at(0)
    batch.zero_()
    assert stream.tokens.tolist() == list(range(500))


def test_impossible_windows_name_the_numbers():
    with pytest.raises(DataError, match=r"has 50 tokens and one window needs 56 \(context 40 \+ lookahead 16\)"):
        Windows(counting(50), context=40, batch=2, seed=0)
    windows = Windows(counting(500), context=40, batch=2, seed=0, lookahead_max=4)
    for lookahead in (0, 5):
        with pytest.raises(DataError, match=f"lookahead is {lookahead}; allowed: 1 to 4"):
            windows.batch_at(0, lookahead)
    with pytest.raises(DataError, match="batch is 0"):
        Windows(counting(500), context=40, batch=0, seed=0)
    with pytest.raises(DataError, match="context is 0"):
        Windows(counting(500), context=0, batch=1, seed=0)


# Held-out text


@pytest.mark.parametrize("limits", [(10**9, 10**9), (3000, 10**9), (3000, 701), (1001, 250), (7, 5)])
def test_heldout_text_is_the_same_bytes_for_every_codec(corpus, bpe, limits):
    by_bytes = heldout_documents(corpus, ByteCodec(), *limits)
    by_bpe = heldout_documents(corpus, bpe, *limits)
    assert [(d.name, d.n_bytes) for d in by_bytes] == [(d.name, d.n_bytes) for d in by_bpe]
    whole = {document.name: document.text for document in corpus.heldout}
    for one, other in zip(by_bytes, by_bpe, strict=True):
        text = ByteCodec().decode(one.tokens.numpy())
        assert text == bpe.decode(other.tokens.numpy())
        assert whole[one.name].startswith(text)
        assert len(text) == one.n_bytes <= limits[1]
        assert one.tokens.dtype == other.tokens.dtype == torch.int64
        text.decode()
    total = sum(d.n_bytes for d in by_bytes)
    assert min(limits[0], corpus.n_heldout_bytes, len(by_bytes) * (limits[1] - 3)) - 3 <= total <= limits[0]


def test_heldout_order_is_fixed_and_covers_all(corpus):
    everything = heldout_documents(corpus, ByteCodec(), 10**9, 10**9)
    assert sorted(d.name for d in everything) == sorted(d.name for d in corpus.heldout)
    assert [d.name for d in heldout_documents(corpus, ByteCodec(), 2000, 500)] == [d.name for d in everything[:4]]


def test_heldout_budget_must_hold_a_character(corpus):
    with pytest.raises(DataError, match="max_bytes is 3"):
        heldout_documents(corpus, ByteCodec(), 3, 100)


def test_text_and_codecs_need_no_torch():
    code = "import sys, archbench.codec, archbench.data.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
