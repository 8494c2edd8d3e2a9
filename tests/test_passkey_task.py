"""The passkey task: the spec's invariants P1 to P7, and its variants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_subject import made_up_text
from torch import Generator

from archbench.architectures.local import ARCHITECTURE as LOCAL
from archbench.architectures.local import LocalConfig
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.codec import BPECodec, ByteCodec, Codec, train_bpe
from archbench.data.corpus import Corpus
from archbench.data.document import Document
from archbench.errors import ConfigError
from archbench.generation import continue_from
from archbench.haystack import read_whole
from archbench.model import Batch
from archbench.sampling import GREEDY
from archbench.task import Example, Split
from archbench.tasks.passkey import DECOYS, GRASS, INTRO, QUESTION, WORDS, Passkey, PasskeySettings

torch.set_num_threads(1)

PROSE = Document("prose", made_up_text(30_000) + b" The pass key of apple is remembered. It grows in 1984, and so on.")
CORPUS = Corpus(name="made up", train=(PROSE,), heldout=(), sha256="")
NEEDLE = re.compile(r"The pass key(?: of \w+)? is (\d+)\. Remember it\. (\d+) is the pass key(?: of \w+)?\. ")


@pytest.fixture(scope="module")
def bpe() -> BPECodec:
    return train_bpe([PROSE], 300)


@pytest.fixture(params=["bytes", "bpe"])
def codec(request: pytest.FixtureRequest, bpe: BPECodec) -> Codec:
    return ByteCodec() if request.param == "bytes" else bpe


def passkey(codec: Codec | None = None, **settings: Any) -> Passkey:
    return Passkey(PasskeySettings(**settings), codec or ByteCodec(), CORPUS)


def drawn(maker: Passkey, n: int = 30, length: int = 600, split: Split = "train", seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [maker.draw(length, split, rng) for _ in range(n)]


def said(example: Example, codec: Codec | None = None) -> str:
    return (codec or ByteCodec()).decode(example.tokens).decode()


def at_depth(maker: Passkey, depth: float, length: int, rng: np.random.Generator, split: Split = "test") -> Example:
    """One text with its (asked) needle at the depth."""
    parts = maker.parts(split, rng)
    room = length - parts.fixed
    filler = maker.filler.tokens(room, rng)
    parts, places = maker.around(parts, round(depth * room), room, rng)
    return maker.placed(parts, places, filler)


VARIANTS: list[dict[str, Any]] = [
    {}, {"digits": 3}, {"intro": False}, {"filler": "words"}, {"filler": "markov"}, {"decoys": 0.5}, {"keys": 4},
    {"overwrite": True}, {"filler": "words", "decoys": 0.2, "decoy_words": "unseen"},
]  # fmt: skip


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_p1_texts_have_exactly_the_length_asked_for(settings: dict[str, Any], codec: Codec) -> None:
    maker = passkey(codec, **settings)
    rng = np.random.default_rng(0)
    for length in (maker.shortest, maker.shortest + 1, 777):
        for split in ("train", "test"):
            example = maker.draw(length, split, rng)
            assert len(example.tokens) == len(example.answer) == len(example.idle) == length
            assert example.answer[-maker.settings.digits :].all() and example.answer.sum() == maker.settings.digits
    with pytest.raises(ConfigError, match=f"at least {maker.shortest}"):
        for _ in range(50):  # where names differ in length, a text with short ones fits
            maker.draw(maker.shortest - 20, "train", rng)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.95, 1.0])
def test_p2_the_needle_stands_once_at_its_depth(depth: float, codec: Codec) -> None:
    maker, rng = passkey(codec), np.random.default_rng(1)
    unit = len(codec.encode(GRASS.encode()))
    for _ in range(10):
        example = at_depth(maker, depth, 1500, rng)
        (needle,) = NEEDLE.finditer(said(example, codec))
        key, again = needle.groups()
        assert key == again == said(example, codec)[-5:]
        before = len(codec.encode(said(example, codec)[len(INTRO) : needle.start()].encode()))
        assert abs(before - depth * (1500 - maker.shortest)) <= unit
        first = int(np.flatnonzero(~example.idle)[len(codec.encode(INTRO.encode()))])  # of the needle
        assert codec.decode(example.tokens[first : first + 5]).decode().startswith("The")


@pytest.mark.parametrize("filler", ["grass", "words", "markov"])
def test_p3_no_digit_stands_outside_needle_and_answer(filler: str, codec: Codec) -> None:
    for example in drawn(passkey(codec, filler=filler)):
        rest = NEEDLE.sub("", said(example, codec))
        assert re.findall(r"\d", rest[:-5]) == [] and re.fullmatch(r"\d{5}", rest[-5:])


def overfitted(texts: torch.Tensor, n_answer: int) -> Transformer:
    """Learned some of the answers by heart."""
    config = TransformerConfig(vocab_size=256, d_model=32, n_layers=1, n_heads=2)
    model = Transformer(config, Generator().manual_seed(0))
    weights = torch.zeros(texts.shape)
    weights[:, -n_answer:] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model.next_token_loss(Batch(texts, 0.0, Generator(), weights)).value.backward()
        optimizer.step()
    return model.eval()


def test_p4_greedy_writing_gives_what_teacher_forcing_counts() -> None:
    maker, rng = passkey(digits=2, intro=False), np.random.default_rng(2)
    rows = [at_depth(maker, 0.5, 150, rng).tokens for _ in range(16)]
    texts = torch.from_numpy(np.stack(rows))
    model = overfitted(texts, 2)
    with torch.no_grad():
        right, _ = read_whole(model, texts, 2)
        state = model.prefill(texts[:, :-2], model.initial_state(16))
        written = continue_from(model, state, 16, 2, GREEDY)
    exact = right.all(dim=1)
    assert torch.equal((written == texts[:, -2:]).all(dim=1), exact)
    assert 0 < exact.sum() < 16  # else the equality would say nothing
    assert (right.any(dim=1) & ~exact).any()


def test_p5_what_a_local_model_cannot_reach_is_chance() -> None:
    """The key lies four segments back: no digit of it changes any prediction, so guessing is all there is."""
    segment, n = 64, 200
    config = LocalConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=2, segment=segment)
    model = LOCAL.build(config, Generator().manual_seed(0)).eval()
    maker, rng = passkey(digits=2, intro=False), np.random.default_rng(3)
    texts = torch.from_numpy(np.stack([at_depth(maker, 0.0, 4 * segment, rng, "train").tokens for _ in range(n)]))
    with torch.no_grad():
        right, _ = read_whole(model, texts, 2)
    chance = maker.chance
    assert right.all(dim=1).float().mean() <= chance + 3 * (chance * (1 - chance) / n) ** 0.5
    other = texts.clone()
    places = [i for i, token in enumerate(texts[0, :-2].tolist()) if chr(token).isdigit()]
    assert len(places) == 4
    other[:, places] = 48 + (texts[:, places] - 47) % 10
    with torch.no_grad():
        one, two = (model.score(t[:, -1:], model.prefill(t[:, :-1], model.initial_state(n)))[0] for t in (texts, other))
    assert torch.equal(one, two)


def test_p6_training_and_testing_never_ask_for_the_same_number() -> None:
    keys = {split: {said(e)[-2:] for e in drawn(passkey(digits=2), 600, 400, split)} for split in ("train", "test")}
    assert not keys["train"] & keys["test"]
    assert len(keys["train"] | keys["test"]) == 100
    for place in (0, 1):  # nothing about a digit tells which split it belongs to
        assert {key[place] for key in keys["train"]} == set("0123456789")
    five = [said(e)[-5:] for e in drawn(passkey(), 400, 400, "test")]
    assert all({key[place] for key in five} == set("0123456789") for place in range(5))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_p7_the_same_seed_draws_the_same_bytes(settings: dict[str, Any]) -> None:
    first, again, other = (drawn(passkey(**settings), 4, seed=seed) for seed in (5, 5, 6))
    assert [said(e) for e in first] == [said(e) for e in again]
    assert all(said(a) != said(b) for a, b in zip(first, other, strict=True))


def test_the_template_is_the_papers() -> None:
    text = said(at_depth(passkey(), 0.0, 400, np.random.default_rng(0)))
    assert text.startswith(INTRO + "The pass key is ") and text[:-5].endswith(QUESTION)
    assert any(sentence in text for sentence in GRASS.split(". "))


def test_idle_tokens_are_the_filler() -> None:
    for example in drawn(passkey(), 5):
        shown = "".join(chr(t) if idle else "_" for t, idle in zip(example.tokens, example.idle, strict=True))
        before, needle, after, question = re.fullmatch(r"_+([^_]*)(_+)([^_]*)(_+)", shown).groups()  # type: ignore[union-attr]
        assert before + after in GRASS * 20
        assert len(needle) == len("The pass key is 12345. Remember it. 12345 is the pass key. ")
        assert len(question) == len(QUESTION) + 5


def test_far_needles_lie_a_block_before_the_end() -> None:
    share = {
        far: np.mean([said(e)[-128:].count("Remember it") == 0 for e in drawn(passkey(far=far), 60, 450)])
        for far in (0.0, 1.0)
    }
    assert share[1.0] == 1.0 and share[0.0] < 0.9


def test_decoys_are_other_numbers_than_the_key_and_have_their_own_nouns() -> None:
    for words, nouns in DECOYS.items():
        text = "".join(said(e) for e in drawn(passkey(decoys=0.5, decoy_words=words), 20, 900))
        found = re.findall(r"The ([a-z ]+) is (\d{5})\. Remember it", text)
        named = {noun for noun, _ in found}
        assert named - {"pass key"} == set(nouns)
        assert len({number for _, number in found}) > 100
    assert not set(DECOYS["seen"]) & set(DECOYS["unseen"])


def test_of_several_keys_the_one_that_is_named_is_asked() -> None:
    maker = passkey(keys=4)
    asked = set()
    for example in drawn(maker, 40, 800):
        text = said(example)
        keys = dict(re.findall(r"The pass key of (\w+) is (\d+)\. Remember", text))
        (word,) = re.findall(r"What is the pass key of (\w+)\?", text)
        assert len(keys) == 4 and set(keys) <= set(WORDS) and keys[word] == text[-5:]
        asked.add(list(keys).index(word))
    assert asked == {0, 1, 2, 3}


def test_of_two_statements_the_later_counts() -> None:
    for example in drawn(passkey(overwrite=True), 20):
        first, second = (key for key, _ in NEEDLE.findall(said(example)))
        assert second == said(example)[-5:] and first != second


@pytest.mark.parametrize(("settings", "n"), [({}, 1), ({"keys": 3}, 3), ({"overwrite": True}, 2)], ids=str)
def test_around_puts_the_asked_needle_at_its_place(settings: dict[str, Any], n: int) -> None:
    maker, rng = passkey(**settings), np.random.default_rng(4)
    others: list[Sequence[int]] = []
    for place in (0, 37, 200, 200, 200):
        parts = maker.parts("test", rng)
        ordered, places = maker.around(parts, place, 200, rng)
        assert places == sorted(places) and len(places) == n and places[ordered.asked] == place
        assert np.array_equal(ordered.needles[ordered.asked], parts.needles[parts.asked])
        assert sorted(map(bytes, ordered.needles)) == sorted(map(bytes, parts.needles))
        if maker.settings.overwrite:
            assert ordered.asked == 1 and places[0] <= place
        others.append([p for i, p in enumerate(places) if i != ordered.asked])
    assert n == 1 or len({tuple(p) for p in others}) > 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"digits": 1}, "digits: 1"),
        ({"keys": 13}, "keys: 13"),
        ({"keys": 2, "overwrite": True}, "choose one"),
        ({"far": 1.5}, "far: 1.5"),
        ({"decoys": -0.1}, "decoys: -0.1"),
        ({"far_block": 0}, "far_block: 0"),
        ({"filler": "markov", "decoys": 0.1}, "not with filler 'markov'"),
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        passkey(**bad)


def test_words_need_a_corpus_that_has_some() -> None:
    empty = Corpus(name="none", train=(), heldout=(), sha256="")
    with pytest.raises(ConfigError, match="the corpus has none"):
        Passkey(PasskeySettings(filler="words"), ByteCodec(), empty)
