"""Corpora: what is read, what is dropped, how it is split, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import types
from pathlib import Path

import pytest

from archbench.data import books, pydocs, sources, stdlib
from archbench.data.books import Book, fetch_books, manifest, prepare
from archbench.data.cache import cache_dir, cache_key, read_json, write_json
from archbench.data.corpus import build_corpus, load_corpus
from archbench.data.document import Document, utf8_prefix
from archbench.errors import DataError, MissingExtra


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))


def texts(n: int, size: int = 1000) -> list[Document]:
    return [Document(f"d{i:03}", f"{i:04} ".encode() * (size // 5)) for i in range(n)]


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value)


# The split


def test_split_holds_out_the_share_and_nothing_twice():
    corpus = build_corpus("t", texts(200))
    train, heldout = ({d.text for d in side} for side in (corpus.train, corpus.heldout))
    assert not train & heldout
    assert train | heldout == {d.text for d in texts(200)}
    assert corpus.n_heldout_bytes == 0.05 * corpus.n_bytes == 10_000
    assert build_corpus("t", texts(200), 0.25).n_heldout_bytes == 50_000


def test_split_follows_the_text_not_the_order_or_the_name():
    corpus = build_corpus("t", texts(100))
    backwards = build_corpus("t", reversed(texts(100)))
    renamed = build_corpus("t", [Document(f"x{d.name}", d.text) for d in texts(100)])
    assert backwards == corpus
    assert [d.text for d in renamed.heldout] == [d.text for d in corpus.heldout]
    assert renamed.sha256 != corpus.sha256


def test_duplicates_are_dropped_and_never_leak():
    copies = [Document(f"copy of {d.name}", d.text) for d in texts(60)]
    corpus = build_corpus("t", texts(60) + copies)
    assert corpus.n_duplicates == 60
    assert len(corpus.train) + len(corpus.heldout) == 60
    assert {d.text for d in corpus.train}.isdisjoint(d.text for d in corpus.heldout)


def test_each_side_has_a_document_even_when_all_are_long_or_one_is_huge():
    two = build_corpus("t", [Document("long", b"l" * 5000), Document("short", b"s" * 3000)])
    assert [d.name for d in two.heldout] == ["short"]
    huge = build_corpus("t", [Document("huge", b"h" * 100_000), Document("tiny", b"t")])
    assert [d.name for d in huge.heldout] == ["tiny"]
    greedy = build_corpus("t", texts(2), 0.9)
    assert len(greedy.train) == len(greedy.heldout) == 1


def test_empty_and_nul_documents_are_dropped_and_counted():
    corpus = build_corpus("t", [*texts(5), Document("empty", b""), Document("nul", b"a\0b"), Document("nul2", b"\0")])
    assert (corpus.n_empty, corpus.n_with_nul) == (1, 2)
    assert corpus.provenance()["n_with_nul"] == 2
    assert not any(b"\0" in d.text or not d.text for d in corpus.train + corpus.heldout)


def test_hash_names_text_and_split_rule():
    hashes = {
        build_corpus("t", texts(50)).sha256,
        build_corpus("t", texts(50), 0.1).sha256,
        build_corpus("t", texts(51)).sha256,
        build_corpus("t", [Document("d000", b"other"), *texts(50)[1:]]).sha256,
    }
    assert len(hashes) == 4
    assert build_corpus("another name", texts(50)).sha256 in hashes


def test_single_document_says_what_to_do():
    with pytest.raises(DataError, match=r"cannot be split by document; .* only above 1,000,000 bytes") as short:
        build_corpus("dir:a.txt", texts(1))
    with pytest.raises(DataError, match=r"write 'dir:a.txt#tail' to hold out the last 5%") as long:
        build_corpus("dir:a.txt", texts(1, 1_100_000))
    assert one_line(short) and one_line(long)


def test_tail_splits_a_long_document_at_a_line(tmp_path):
    lines = "".join(f"line {i} ünïcode\n" for i in range(60_000))
    (tmp_path / "book.txt").write_text(lines, encoding="utf-8")
    corpus = load_corpus(f"dir:{tmp_path}/book.txt#tail")
    (train,), (heldout,) = corpus.train, corpus.heldout
    assert (train.text + heldout.text).decode() == lines
    assert train.text.endswith(b"\n")
    assert heldout.text.startswith(b"line ")
    assert 0.049 < len(heldout.text) / corpus.n_bytes < 0.051
    (tmp_path / "flat.txt").write_text("ü" * 600_000, encoding="utf-8")
    flat = load_corpus(f"dir:{tmp_path}/flat.txt#tail")
    assert set(flat.heldout[0].text.decode()) == {"ü"}


def test_tail_refuses_short_texts_and_several_documents(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="has 5 bytes; '#tail' needs more than 1,000,000"):
        load_corpus(f"dir:{tmp_path}/a.txt#tail")
    (tmp_path / "b.txt").write_text("also")
    with pytest.raises(DataError, match="for a single document and here are 2"):
        load_corpus(f"dir:{tmp_path}#tail")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_impossible_shares_are_refused(share):
    with pytest.raises(DataError, match="above 0 and below 1"):
        build_corpus("t", texts(5), share)


def test_utf8_prefix_never_cuts_a_character():
    text = "aé€🙂b".encode()
    for limit in range(len(text) + 3):
        prefix = utf8_prefix(text, limit)
        assert text.startswith(prefix)
        assert limit - 4 < len(prefix) <= limit or prefix == text
        prefix.decode()
    assert utf8_prefix(text, 10) == "aé€🙂".encode()


# Specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("xyzzy", "allowed: books, dir, hf, jsonl, mbpp-mini, parquet, pydocs, stdlib"),
        ("", "corpus '' is not known"),
        ("stdlib:x", "'stdlib' takes no argument"),
        ("dir", "write 'dir:PATH'"),
        ("dir:", "write 'dir:PATH'"),
        ("hf", r"write 'hf:NAME\[:CONFIG\]\[:SPLIT\]\[:FIELD\]'"),
    ],
)
def test_wrong_specs_say_what_is_allowed(spec, message):
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(spec)
    assert one_line(caught)


def _entry_point(monkeypatch, name, value):
    point = importlib.metadata.EntryPoint(name=name, value=value, group=sources.GROUP)
    points = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(sources, "entry_points", lambda **chosen: points.select(**chosen))


def test_a_package_can_bring_a_corpus(monkeypatch):
    module = types.ModuleType("archbench_test_plugin")
    module.poems = sources.Source(read=lambda argument: texts(int(argument)), argument="N", summary="poems")
    module.wrong = "not a source"
    monkeypatch.setitem(sys.modules, "archbench_test_plugin", module)
    _entry_point(monkeypatch, "poems", "archbench_test_plugin:poems")
    assert load_corpus("poems:30").n_bytes == 30_000
    assert sources.source_names()[-1] == "poems"
    with pytest.raises(DataError, match="write 'poems:N'"):
        load_corpus("poems")
    _entry_point(monkeypatch, "poems", "archbench_test_plugin:wrong")
    with pytest.raises(DataError, match="is not an archbench Source"):
        load_corpus("poems:30")
    _entry_point(monkeypatch, "stdlib", "archbench_test_plugin:poems")
    with pytest.raises(DataError, match="defined more than once"):
        load_corpus("stdlib")


# Built-in sources


def test_stdlib_is_pythons_own_code():
    documents = {document.name: document for document in stdlib.read()}
    assert documents["argparse.py"].text == Path(sys.modules["argparse"].__file__).read_bytes()
    assert "asyncio/tasks.py" in documents
    assert "pydoc_data/topics.py" not in documents
    parts = {part for name in documents for part in Path(name).parts[:-1]}
    assert parts.isdisjoint({"test", "tests", "site-packages", "dist-packages"})
    assert max(len(document.text) for document in documents.values()) <= 400_000
    corpus = load_corpus("stdlib")
    assert 5e6 < corpus.n_bytes < 30e6
    assert 0.04 < corpus.n_heldout_bytes / corpus.n_bytes <= 0.05


def test_stdlib_reads_declared_encodings_as_utf8(tmp_path):
    (tmp_path / "old.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"# -*- coding: utf-8 -*-\n\xff")
    assert "é".encode() in stdlib.source_text(tmp_path / "old.py")
    assert stdlib.source_text(tmp_path / "bad.py") is None


LONG = "This sentence is long enough to be worth keeping as text to learn from. " * 4 + "Is it?"


def test_pydocs_keeps_long_docstrings_once(tmp_path):
    (tmp_path / "a.py").write_text(f'"""{LONG}"""\ndef f():\n    """Short."""\nclass A:\n    """{LONG[5:]}"""\n')
    (tmp_path / "b.py").write_text(f'async def g():\n    """{LONG}"""\n')
    (tmp_path / "c.py").write_text("def broken(:\n")
    (tmp_path / "d.py").write_text('x = "\\d"\n"""not a docstring, it comes second"""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "e.py").write_text(f'"""{LONG[9:]}"""\n')
    (document,) = pydocs.extract([("lib", tmp_path)])
    assert document.name == "lib/a.py"
    assert document.text.decode() == f"{LONG}\n\n{LONG[5:]}\n"


def test_pydocs_are_cached_by_versions(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(f'"""{LONG}"""\n')
    monkeypatch.setattr(pydocs, "PACKAGES", {})
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    first = pydocs.read()
    assert [document.name for document in first][:1] == ["python/a.py"]
    assert "topics/truth" in {document.name for document in first}
    (tmp_path / "a.py").unlink()
    assert pydocs.read() == first
    (file,) = (cache_dir() / "pydocs").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert len(pydocs.read()) == len(first) - 1


def test_pydocs_say_which_package_is_missing(monkeypatch):
    monkeypatch.setattr(pydocs, "PACKAGES", {"absent_package": "absent-package"})
    with pytest.raises(DataError, match="'absent-package' is not installed"):
        load_corpus("pydocs")


def test_dir_reads_text_files_below(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "sub/b.MD", "c.py", "image.png", ".git/config.txt", ".hidden.txt"):
        (tmp_path / name).write_text(f"content of {name}")
    corpus = load_corpus(f"dir:{tmp_path}", 0.3)
    assert sorted(d.name for d in corpus.train + corpus.heldout) == ["a.txt", "c.py", "sub/b.MD"]


def test_dir_hash_does_not_depend_on_the_place(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("first")
        (tmp_path / place / "b.txt").write_text("second")
    assert load_corpus(f"dir:{tmp_path}/one").sha256 == load_corpus(f"dir:{tmp_path}/two").sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        (b"", r"no text here \(1 empty"),
        (b"abc\0def", "1 binary documents"),
        (b"\x89PNG\0\xff", "binary; convert it to UTF-8"),
        ("café".encode("latin-1"), r"not UTF-8 \(byte 3\)"),
    ],
)
def test_unusable_files_are_refused_by_name(content, message, tmp_path):
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(f"dir:{path}")
    assert "file.txt" in str(caught.value)
    assert one_line(caught)


def test_folder_without_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text files below this folder"):
        load_corpus(f"dir:{tmp_path}")


def test_jsonl_reads_one_document_a_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one\\nand"}\n\n{"text": "zwei ü", "id": 2}\n{"text": "x"}', encoding="utf-8")
    corpus = load_corpus(f"jsonl:{path}")
    found = {d.name: d.text.decode() for d in corpus.train + corpus.heldout}
    assert found == {"t.jsonl:1": "one\nand", "t.jsonl:3": "zwei ü", "t.jsonl:4": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2: not JSON"),
        ('{"body": "x", "id": 1}', "line 2: found keys body, id; expected"),
        ('["text"]', "line 2: found list"),
        ('{"text": 3}', "line 2: found keys text; expected an object with a string"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds a lone surrogate"),
        (b'{"text": "\xff"}', "line 2: not JSON in UTF-8"),
    ],
)
def test_jsonl_errors_name_the_line(line, message, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(f"jsonl:{path}")
    assert one_line(caught)


def test_jsonl_missing_or_empty(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_corpus(f"jsonl:{tmp_path}/absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="empty; expected lines"):
        load_corpus(f"jsonl:{tmp_path}/empty.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load_corpus(f"jsonl:{tmp_path}")


def test_parquet_reads_a_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "drei ü"], "id": [1, 2, 3]}), tmp_path / "t.parquet")
    corpus = load_corpus(f"parquet:{tmp_path}/t.parquet")
    assert {d.name: d.text.decode() for d in corpus.train + corpus.heldout} == {
        "t.parquet:0": "one",
        "t.parquet:2": "drei ü",
    }
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match="no column 'text'; its columns are: body"):
        load_corpus(f"parquet:{tmp_path}/u.parquet")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match="row 0: 'text' holds int"):
        load_corpus(f"parquet:{tmp_path}/v.parquet")
    (tmp_path / "w.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        load_corpus(f"parquet:{tmp_path}/w.parquet")
    assert one_line(caught)


def test_missing_packages_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'archbench\[parquet\]'"):
        load_corpus("parquet:x.parquet")
    with pytest.raises(MissingExtra, match=r"pip install 'archbench\[hub\]'"):
        load_corpus("hf:wikitext")


class _Rows:
    column_names = ("text", "page", "n")

    def __getitem__(self, field):
        return {"text": ["one", "two"], "page": ["p1", "p2"], "n": [1, 2]}[field]


def _datasets(monkeypatch, load_dataset):
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_addresses(monkeypatch):
    asked = []
    _datasets(monkeypatch, lambda name, config, split: asked.append((name, config, split)) or _Rows())
    assert {d.text for d in load_corpus("hf:org/name:::page").train + load_corpus("hf:org/name").train}
    load_corpus("hf:org/name:en:validation:text")
    assert asked == [("org/name", None, "train")] * 2 + [("org/name", "en", "validation")]
    with pytest.raises(DataError, match="no field 'body'; this data set has: text, page, n"):
        load_corpus("hf:org/name:::body")
    with pytest.raises(DataError, match="row 0: 'n' holds int"):
        load_corpus("hf:org/name:::n")
    with pytest.raises(DataError, match="5 parts"):
        load_corpus("hf:a:b:c:d:e")


def test_hub_offline_is_said(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand more lines")

    _datasets(monkeypatch, offline)
    with pytest.raises(
        DataError, match=r"cannot be loaded .*Couldn't reach the hub.*check the name and the net"
    ) as caught:
        load_corpus("hf:org/name")
    assert one_line(caught)


# Books


def _book(text: bytes, opening: str = "THE BOOK\n\nby Someone\n") -> Book:
    return Book(
        id=7,
        title="The Book",
        author="Someone",
        n_bytes=len(text),
        sha256=hashlib.sha256(text).hexdigest(),
        url="https://example.org/7.txt",
        opening=opening,
    )


TEXT = "THE BOOK\n\nby Someone\n\nIt began – slowly.\n\n\nIt ended.\n".encode()
HEADER = b"\xef\xbb\xbfThe Project Gutenberg EBook of THE BOOK\n\nTHE BOOK\n\n*** START ***\n\n"
FOOTER = b"\n\nEnd of Project Gutenberg's THE BOOK\n\nTHE BOOK\n\nby Someone\n\nlicence\n"


def test_manifest_lists_nine_books():
    listed = manifest()
    assert len({book.sha256 for book in listed}) == len({book.id for book in listed}) == 9
    assert sum(book.n_bytes for book in listed) == 17_167_406
    assert all(book.url.startswith("https://raw.githubusercontent.com/GITenberg/") for book in listed)
    assert all("{" not in book.url and book.opening.endswith("\n") for book in listed)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    "between",
    [
        b"\n\n",
        b"\n\n[Note: not in the\nproject gutenberg edition]\n\n",
        b"\n\nGUTENBERG note\n\n\n\n",
        b"\n\nProject Gutenberg\n\n\n",
        b"\nProject Gutenberg\n\n",
    ],
)
def test_books_are_prepared_exactly(newline, between):
    raw = (HEADER + TEXT.replace(b"\n\nIt ended", between + b"It ended") + FOOTER).replace(b"\n", newline)
    assert prepare(_book(TEXT), raw) == TEXT


def test_a_book_that_differs_is_refused():
    raw = HEADER + TEXT.replace(b"slowly", b"slouly") + FOOTER
    with pytest.raises(DataError, match=r"the book's opening is in it.*refused") as caught:
        prepare(_book(TEXT), raw)
    assert one_line(caught)
    with pytest.raises(DataError, match="the book's opening is not in it"):
        prepare(_book(TEXT), b"404: Not Found")


def test_fetch_downloads_verifies_and_resumes(tmp_path):
    asked, lines = [], []

    def download(url):
        asked.append(url)
        return HEADER + TEXT + FOOTER

    for _ in range(2):
        (path,) = fetch_books(tmp_path / "books", lines.append, download=download, books=[_book(TEXT)])
        assert path.read_bytes() == TEXT
    assert asked == ["https://example.org/7.txt"]
    assert lines[1] == "The Book: already there"
    path.write_bytes(b"damaged")
    fetch_books(tmp_path / "books", lines.append, download=download, books=[_book(TEXT)])
    assert path.read_bytes() == TEXT
    assert [file.name for file in path.parent.iterdir()] == ["pg7.txt"]


def test_fetch_keeps_nothing_unverified(tmp_path):
    with pytest.raises(DataError, match="refused"):
        fetch_books(tmp_path, print, download=lambda url: b"other text", books=[_book(TEXT)])
    assert not list(tmp_path.iterdir())


def test_download_reads_urls_and_names_those_it_cannot(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"x")
    assert books.download((tmp_path / "x.txt").as_uri()) == b"x"
    with pytest.raises(DataError, match=r"absent.txt: cannot be fetched"):
        books.download((tmp_path / "absent.txt").as_uri())


def test_books_that_are_nowhere_name_both_ways(monkeypatch, tmp_path):
    monkeypatch.delenv("ARCHBENCH_DATA", raising=False)
    with pytest.raises(DataError, match=r"archbench data fetch.*ARCHBENCH_DATA"):
        load_corpus("books")
    monkeypatch.setenv("ARCHBENCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"corpora/books or .*/books; run"):
        load_corpus("books")


def test_books_are_read_from_either_place_and_verified(monkeypatch, tmp_path):
    other = b"THE BOOK\n\nby Someone\n, another one"
    listed = [_book(TEXT), Book(**{**vars(_book(other)), "id": 8})]
    monkeypatch.setattr(books, "manifest", lambda: listed)
    monkeypatch.setenv("ARCHBENCH_DATA", str(tmp_path))
    for folder in (books.fetched_folder(), tmp_path / "corpora" / "books"):
        folder.mkdir(parents=True)
        (folder / "pg7.txt").write_bytes(TEXT)
        with pytest.raises(DataError, match=r"pg8.txt: No such file.*data fetch"):
            load_corpus("books")
        (folder / "pg8.txt").write_bytes(other)
        assert load_corpus("books").n_bytes == len(TEXT) + len(other)
        (folder / "pg8.txt").write_bytes(other + b"!")
        with pytest.raises(DataError, match=r"pg8.txt: sha256 is .* expected .*delete it"):
            load_corpus("books")


@pytest.mark.skipif("ARCHBENCH_DATA" not in os.environ, reason="set ARCHBENCH_DATA to a folder with corpora/books")
def test_the_nine_books():
    corpus = load_corpus("books")
    assert corpus.n_bytes == 17_167_406
    assert [d.name for d in corpus.heldout] == ["pg1400.txt"]
    by_name = {d.name: d.text for d in corpus.train + corpus.heldout}
    for book in manifest():
        text = by_name[book.filename]
        assert text.startswith(book.opening.encode())
        header = b"Project Gutenberg\r\n*** START ***\r\n\r\n"
        assert prepare(book, header + text.replace(b"\n", b"\r\n") + b"\r\n\r\nEnd of Project Gutenberg\r\n") == text


# The cache


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ARCHBENCH_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("ARCHBENCH_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "archbench"


def test_cached_json_is_whole_or_nothing(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    assert read_json(path) is None
    write_json(path, {"text": "ü\n"})
    assert read_json(path) == {"text": "ü\n"}
    whole = path.read_bytes()
    for damaged in (b"", whole[:-4], whole.replace(b"text", b"test"), json.dumps([1]).encode(), b"\xff"):
        path.write_bytes(damaged)
        assert read_json(path) is None
    assert [file.name for file in path.parent.iterdir()] == ["x.jsonl"]


def test_cache_keys_separate_their_parts():
    assert cache_key("ab", "c") != cache_key("a", "bc") != cache_key("abc")


def test_unwritable_cache_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write here.*ARCHBENCH_CACHE"):
        write_json(tmp_path / "file" / "x.jsonl", 1)
