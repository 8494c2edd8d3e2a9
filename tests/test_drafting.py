"""Drafting: whatever the drafter drafts, the text is the verifier's own. Numbers are those of Mamba's invariants."""

from __future__ import annotations

import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from archbench import registry
from archbench.cli import main
from archbench.codec import BPECodec, ByteCodec, Codec, train_bpe
from archbench.data.document import Document
from archbench.drafting import BOUNDARY_BYTES, LONGEST_ALONE, LONGEST_UNREAD, Drafted, accepted
from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import generate, stream
from archbench.model import AutoregressiveModel, Batch
from archbench.plan import make_plan
from archbench.run import Options, run
from archbench.sampling import GREEDY, Sampling
from archbench.state import copy_state, tensors
from archbench.suite import load_suite

torch.set_num_threads(1)

TEXT = (
    "The drafter writes a few words; the verifier reads them all at once. What it would have written itself, it keeps. "
    "What it would not, it writes itself, up to the next space.\nThen the drafter may try again: it reads the text, "
    "writes a few words, and the verifier reads them. Words that are often seen are often kept.\n\n"
    "(Where a word is new, the verifier writes it.) Ein Wort mit Umlauten: schön, größer, für. "
).encode() * 4


@cache
def bpe(n: int = 300) -> BPECodec:
    return train_bpe([Document("text", TEXT)], n)


def net(name: str, vocab_size: int = 256, seed: int = 0, **options: Any) -> AutoregressiveModel:
    """An untrained model whose predictions are far from flat and depend on what it read."""
    architecture = registry.architecture(name)
    config = architecture.config(vocab_size=vocab_size, d_model=16, n_layers=2, **options)
    model = architecture.build(config, Generator().manual_seed(seed))
    assert isinstance(model, AutoregressiveModel)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "embedding" in parameter_name:
                parameter.mul_(30)
    return model.eval()


@cache
def counted(codec: Codec, order: int) -> AutoregressiveModel:
    """A model that has learned TEXT by counting: drafts by it are often right, and often not."""
    architecture = registry.architecture("ngram")
    model = architecture.build(architecture.config(vocab_size=codec.vocab_size, order=order), None)
    assert isinstance(model, AutoregressiveModel)
    tokens = torch.from_numpy(codec.encode(TEXT).astype("int64"))[None]
    model.phases()[0].loss(Batch(torch.cat([torch.zeros(1, 1, dtype=torch.long), tokens], 1), 0.0, Generator()))
    return model.eval()


class Stubborn(AutoregressiveModel):
    """Writes the same tokens over and over, whatever it reads. State: how many it has read."""

    def __init__(self, vocab_size: int, tokens: list[int]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.register_buffer("sequence", torch.tensor(tokens))

    def initial_layers(self, batch_size: int) -> Int[Tensor, "b 1"]:
        return torch.zeros(batch_size, 1, dtype=torch.long)

    def hidden(self, tokens: Int[Tensor, "b t"], layers: Int[Tensor, "b 1"]) -> tuple[Float[Tensor, "b t v"], Tensor]:
        sequence = self.get_buffer("sequence")
        places = (layers + torch.arange(tokens.shape[1])) % len(sequence)
        return torch.nn.functional.one_hot(sequence[places], self.vocab_size).float(), layers + tokens.shape[1]

    def logits(self, hidden: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        return hidden

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        return 0.0

    def logits_flops(self) -> float:
        return 0.0


def reciting() -> AutoregressiveModel:
    """A verifier whose own text is TEXT, whatever was read before."""
    return Stubborn(256, list(TEXT))


VERIFIERS = {
    "mamba": lambda: net("mamba"),
    "mamba2": lambda: net("mamba2", d_state=8, head_dim=8),
    "transformer": lambda: net("transformer", n_heads=2),
    "reciting": reciting,
}
DRAFTERS = {
    "random mamba": lambda: (net("mamba", 300, seed=5), bpe()),
    "random transformer": lambda: (net("transformer", 300, seed=5, n_heads=2), bpe()),
    "bigrams of subwords": lambda: (counted(bpe(), 2), bpe()),
    "trigrams of bytes": lambda: (counted(ByteCodec(), 3), ByteCodec()),
    "always wrong": lambda: (Stubborn(300, [bpe().encode(b"qqq").tolist()[0]]), bpe()),
    "boundaries": lambda: (Stubborn(300, [0]), bpe()),
    "broken characters": lambda: (Stubborn(300, [bpe().encode("ö".encode()).tolist()[0], 200, 255]), bpe()),
}


@pytest.fixture(params=VERIFIERS, name="verifier")
def verifier_fixture(request: pytest.FixtureRequest) -> AutoregressiveModel:
    return VERIFIERS[request.param]()


@pytest.fixture(params=DRAFTERS, name="drafter")
def drafter_fixture(request: pytest.FixtureRequest) -> tuple[AutoregressiveModel, Codec]:
    return DRAFTERS[request.param]()


def ids(text: bytes) -> Tensor:
    return torch.tensor([list(text)], dtype=torch.long)


def right_now_and_then(rank: int = 1) -> Drafted:
    """Pairs of subwords, against the text they were counted in."""
    return Drafted(reciting(), counted(bpe(380), 2), bpe(380), rank=rank)


# ---- 18: the text ----


def test_18_greedy_text_is_the_verifiers_own_byte_for_byte(
    verifier: AutoregressiveModel, drafter: tuple[AutoregressiveModel, Codec]
) -> None:
    pair = Drafted(verifier, *drafter)
    for prompt in (b"", b"schon gr\xc3"):
        plain = generate(verifier, ids(prompt), 24, GREEDY)
        assert torch.equal(generate(pair, ids(prompt), 24, GREEDY), plain)


@pytest.mark.parametrize("n_subwords", [1, 2, 7])
def test_18_whatever_the_number_of_subwords(n_subwords: int) -> None:
    pair = Drafted(reciting(), counted(bpe(380), 2), bpe(380), n_subwords=n_subwords)
    assert bytes(generate(pair, ids(TEXT[:4]), 300, GREEDY)[0].tolist()) == TEXT[4:304]


@pytest.mark.parametrize("n_new", [0, 1, 2, 3, 17, 64])
def test_18_the_budget_of_bytes_is_kept_exactly(n_new: int) -> None:
    pair = right_now_and_then()
    written = generate(pair, ids(b"The "), n_new, GREEDY)
    assert bytes(written[0].tolist()) == TEXT[4 : 4 + n_new]
    pieces = stream(pair, ids(b"The "), n_new, GREEDY, None, ByteCodec().decode)
    assert "".join(pieces).encode() == bytes(written[0].tolist())


def test_18_a_verifier_that_drafts_for_itself_accepts_everything() -> None:
    verifier = counted(ByteCodec(), 3)
    pair = Drafted(verifier, verifier, ByteCodec(), n_subwords=8)
    state = pair.prefill(ids(b"The "), pair.initial_state(1))
    for _ in range(20):
        _, counts, state = pair.decode_step(state, GREEDY, None)
        assert counts.item() == 8
    assert state.tally == (20, 20, 160, 160, 160)


@pytest.mark.parametrize("name", ["random mamba", "bigrams of subwords", "broken characters"])
def test_18_rank_256_accepts_everything(name: str) -> None:
    drafter, codec = DRAFTERS[name]()
    pair = Drafted(net("mamba"), drafter, codec, n_subwords=3, rank=256)
    tokens = generate(drafter, torch.zeros(1, 0, dtype=torch.long), 30, GREEDY)[0]
    expected = b"".join(codec.decode(tokens[i : i + 1].numpy()) or b"\0" for i in range(30))
    written = generate(pair, ids(b""), len(expected), GREEDY)
    assert bytes(written[0].tolist()) == expected


def test_18_the_exact_pair_accepts_some_bytes_and_rank_256_all() -> None:
    for rank, everything in ((1, False), (256, True)):
        pair = right_now_and_then(rank)
        state = pair.prefill(ids(b"The "), pair.initial_state(1))
        while state.tally.written < 400:
            state = pair.decode_step(state, GREEDY, None).state
        assert state.tally.accepted > 0
        assert (state.tally.accepted == state.tally.drafted) == everything


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_acceptance_is_the_longest_beginning_within_the_rank(rank: int) -> None:
    generator = Generator().manual_seed(rank)
    for _ in range(200):
        log_probs = torch.randint(4, (6, 9), generator=generator).float()  # many ties
        tokens = torch.randint(9, (6,), generator=generator)
        if rank == 1:
            tokens[:3] = log_probs[:3].argmax(-1)
        expected = 0
        for row, token in zip(log_probs.tolist(), tokens.tolist(), strict=True):
            order = sorted(range(9), key=lambda id: (-row[id], id))
            if order.index(token) >= rank:
                break
            expected += 1
        assert accepted(log_probs, tokens, rank) == expected
        if rank == 1:
            assert expected >= 3


# ---- 19: states ----


@torch.no_grad()
def test_19_scores_of_one_pass_equal_those_of_single_steps(verifier: AutoregressiveModel) -> None:
    tokens = ids(TEXT[:40])
    state = verifier.prefill(ids(b"before"), verifier.initial_state(1))
    together, _ = verifier.score(tokens, copy_state(state))
    for i in range(40):
        alone, state = verifier.score(tokens[:, i : i + 1], state)
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["random transformer", "bigrams of subwords", "broken characters"])
def test_19_after_a_rejected_round_states_are_those_of_a_fresh_run_on_the_text(
    verifier: AutoregressiveModel, name: str
) -> None:
    pair = Drafted(verifier, *DRAFTERS[name]())
    text, rejections = b"The verifier", 0
    state = pair.prefill(ids(text), pair.initial_state(1))
    for _ in range(5):
        before = state.tally
        tokens, counts, state = pair.decode_step(state, GREEDY, None)
        text += bytes(tokens[0, : counts.item()].tolist())
        fresh = verifier.prefill(ids(text), verifier.initial_state(1))
        probe = ids(b"next")
        found, _ = verifier.score(probe, copy_state(state.verifier))
        expected, _ = verifier.score(probe, copy_state(fresh))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert torch.equal(state.verifier.pending, fresh.pending)
        rejected = state.tally.accepted - before.accepted < counts.item()
        rejections += rejected
        if rejected:  # the drafter stands at the last boundary, the bytes from there on wait for it
            unread = bytes(state.unread[0].tolist())
            assert text.endswith(unread)
            assert len(unread) <= LONGEST_UNREAD
            assert unread == b"" or not any(byte in BOUNDARY_BYTES for byte in unread[1:])
    assert state.tally.written == len(text) - len(b"The verifier")
    assert rejections


@torch.no_grad()
def test_19_the_drafter_reads_what_it_would_read_of_the_text_itself() -> None:
    pair = Drafted(reciting(), net("mamba", 300), bpe())
    state = pair.prefill(ids(b"The verifier reads them all"), pair.initial_state(1))
    assert bytes(state.unread[0].tolist()) == b" all"
    tokens = torch.from_numpy(bpe().encode(b"The verifier reads them").astype("int64"))[None]
    fresh = pair.drafter.prefill(tokens, pair.drafter.initial_state(1))
    for found, expected in zip(tensors(state.drafter), tensors(fresh), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reading_in_pieces_makes_no_difference() -> None:
    pair = right_now_and_then()
    prompt, state = ids(TEXT[:57]), pair.initial_state(1)
    for piece in prompt.split([1, 4, 0, 20, 32], dim=1):
        state = pair.prefill(piece, state)
    written = [pair.decode_step(copy_state(state), GREEDY, None).tokens for _ in range(2)]
    assert torch.equal(*written)  # and a copied state is not written into
    whole = pair.prefill(prompt, pair.initial_state(1))
    assert torch.equal(pair.decode_step(whole, GREEDY, None).tokens, written[0])


@torch.no_grad()
def test_the_first_draft_begins_with_the_unread_bytes() -> None:
    """After 'The ve' the drafter has read 'The'; it must write ' verifier', not another word."""
    pair = right_now_and_then()
    state = pair.prefill(ids(b"Then the ve"), pair.initial_state(1))
    assert bytes(state.unread[0].tolist()) == b" ve"
    draft, _ = pair._draft(b" ve", copy_state(state.drafter))
    assert draft.startswith(b"ri")


@torch.no_grad()
def test_text_without_boundaries_goes_on() -> None:
    """A verifier that never writes a boundary byte, and a drafter that is never right."""
    verifier = Stubborn(256, list(b"abc"))
    pair = Drafted(verifier, Stubborn(300, [bpe().encode(b"q").tolist()[0]]), bpe())
    state, text = pair.initial_state(1), b""
    for _ in range(4):
        tokens, counts, state = pair.decode_step(state, GREEDY, None)
        assert counts.item() == LONGEST_ALONE
        text += bytes(tokens[0].tolist())
        assert state.unread.shape[1] <= LONGEST_UNREAD
    assert text == (b"abc" * 50)[: 4 * LONGEST_ALONE]


class Counting(Stubborn):
    """Counts its passes."""

    passes = 0

    def hidden(self, tokens: Int[Tensor, "b t"], layers: Int[Tensor, "b 1"]) -> tuple[Float[Tensor, "b t v"], Tensor]:
        self.passes += 1
        return super().hidden(tokens, layers)


@torch.no_grad()
def test_the_tally_adds_up() -> None:
    verifier = Counting(256, list(TEXT))
    pair = Drafted(verifier, counted(bpe(380), 2), bpe(380))
    state = pair.prefill(ids(b"The "), pair.initial_state(1))
    verifier.passes, n_written = 0, 0
    for _ in range(30):
        emission = pair.decode_step(state, GREEDY, None)
        n_written += int(emission.counts)
        state = emission.state
    assert state.tally.rounds == 30
    assert state.tally.passes == verifier.passes
    assert state.tally.written == n_written
    assert n_written / verifier.passes > 1.2  # bytes a pass; plain decoding has 1


# ---- refusals ----


def test_what_cannot_be_done_is_refused() -> None:
    pair = right_now_and_then()
    verifier = pair.verifier
    with pytest.raises(UnsupportedError, match=r"temperature 0\.8; drafted text is greedy"):
        pair.decode_step(pair.initial_state(1), Sampling(temperature=0.8), Generator())
    with pytest.raises(UnsupportedError, match="2 texts at once"):
        pair.initial_state(2)
    with pytest.raises(UnsupportedError, match="vocabulary of 380; it must read bytes"):
        Drafted(pair.drafter, pair.drafter, bpe(380))
    with pytest.raises(UnsupportedError, match="codec bpe-300 has 300 tokens, the drafter 256"):
        Drafted(verifier, verifier, bpe())
    with pytest.raises(ConfigError, match=r"drafting\.n_subwords: 0"):
        Drafted(verifier, pair.drafter, bpe(), n_subwords=0)
    with pytest.raises(ConfigError, match=r"drafting\.rank: 257"):
        Drafted(verifier, pair.drafter, bpe(), rank=257)


# ---- a run: MambaByte is a cell with the byte codec ----

SUITE = """
size: nano
training: {budget: {bytes: 12_000}, context: 32, batch: 8, learning_rate: 4e-3, precision: fp32}
cells:
  - {architecture: mamba, label: mambabyte, codec: bytes}
  - {architecture: mamba2, label: drafter, codec: bpe-300}
metrics: {training: {}}
"""


def archbench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["archbench", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_mambabyte_is_a_label(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(textwrap.dedent(SUITE))
    cells = {cell.label: cell for cell in make_plan(load_suite(str(path)), ()).cells}
    assert cells["mambabyte"].architecture == "mamba"
    assert cells["mambabyte"].codec == "bytes"
    assert cells["mambabyte"].config.vocab_size == 256


def test_a_cell_drafts_for_another_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "pair.yaml", tmp_path / "out"
    path.write_text(textwrap.dedent(SUITE))
    run(make_plan(load_suite(str(path)), ()), Options(out=out, executor="inline"), lambda _event: None)
    ask = ("generate", out, "--architecture", "mambabyte", "--prompt", "def ", "--tokens", 40)
    code, plain, _ = archbench(monkeypatch, capsys, *ask, "--temperature", 0)
    assert code == 0
    assert len(plain) > len("def ") + 10
    checkpoint = next(file.parent for file in out.glob("checkpoints/*/codec.json") if '"bpe"' in file.read_text())
    for drafter in ("drafter", checkpoint):
        assert archbench(monkeypatch, capsys, *ask, "--drafter", drafter) == (0, plain, "")
    for words, message in (
        (("--drafter", "nobody"), "no cell 'nobody'"),
        (("--drafter", checkpoint, "--temperature", 0.5), "temperature 0.5; drafted text is greedy"),
        (("--drafter", "drafter", "--rank", 300), "drafting.rank: 300"),
        (("--rank", 3), "--rank 3: needs --drafter"),
        (("--architecture", "drafter", "--drafter", "mambabyte"), "it must read bytes"),
    ):
        code, _, said = archbench(monkeypatch, capsys, *ask, *words)
        assert code == 2
        assert message in said
        assert said.count("\n") == 1
