"""Drafting: whatever the drafter drafts, the text is the verifier's own. Numbers are those of Mamba's invariants."""

from __future__ import annotations

import os
import subprocess
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
from archbench.codec import BPECodec, ByteCodec, Codec, train_bpe
from archbench.data.document import Document
from archbench.drafting import BOUNDARY_BYTES, LONGEST_ALONE, LONGEST_UNREAD, Drafted, accepted
from archbench.errors import ConfigError, UnsupportedError
from archbench.generation import generate, stream
from archbench.model import AutoregressiveModel, Batch
from archbench.plan import make_plan
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


VERIFIERS = {
    "mamba": lambda: net("mamba"),
    "mamba2": lambda: net("mamba2", d_state=8, head_dim=8),
    "transformer": lambda: net("transformer", n_heads=2),
    "trigrams": lambda: counted(ByteCodec(), 3),
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


def wrong_half_the_time() -> tuple[AutoregressiveModel, Drafted]:
    verifier = counted(ByteCodec(), 3)
    return verifier, Drafted(verifier, counted(bpe(), 2), bpe())


# ---- 18: the text ----


@pytest.mark.parametrize("n_subwords", [1, 3, 7])
def test_18_greedy_text_is_the_verifiers_own_byte_for_byte(
    verifier: AutoregressiveModel, drafter: tuple[AutoregressiveModel, Codec], n_subwords: int
) -> None:
    pair = Drafted(verifier, *drafter, n_subwords=n_subwords)
    for prompt in (b"", b"The verifier wri", "schön\xc3".encode("latin-1"), b"a, b. c "):
        plain = generate(verifier, ids(prompt), 60, GREEDY)
        assert torch.equal(generate(pair, ids(prompt), 60, GREEDY), plain)


@pytest.mark.parametrize("n_new", [0, 1, 2, 3, 17, 64])
def test_18_the_budget_of_bytes_is_kept_exactly(n_new: int) -> None:
    verifier, pair = wrong_half_the_time()
    written = generate(pair, ids(b"The "), n_new, GREEDY)
    assert written.shape == (1, n_new)
    assert torch.equal(written, generate(verifier, ids(b"The "), 64, GREEDY)[:, :n_new])
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


def test_18_rank_1_is_greedy_and_a_larger_rank_accepts_more() -> None:
    tallies = []
    for rank in (1, 3, 20):
        pair = Drafted(counted(ByteCodec(), 3), counted(bpe(), 2), bpe(), rank=rank)
        state = pair.prefill(ids(b"The "), pair.initial_state(1))
        while state.tally.written < 400:
            state = pair.decode_step(state, GREEDY, None).state
        tallies.append(state.tally)
    shares = [tally.accepted / tally.drafted for tally in tallies]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]
    assert 0 < tallies[0].accepted < tallies[0].drafted  # the exact pair is neither always right nor always wrong


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
def test_19_after_every_round_states_are_those_of_a_fresh_run_on_the_text(
    verifier: AutoregressiveModel, drafter: tuple[AutoregressiveModel, Codec]
) -> None:
    pair = Drafted(verifier, *drafter)
    text, rejections = b"The verifier", 0
    state = pair.prefill(ids(text), pair.initial_state(1))
    for _ in range(12):
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
    if drafter[0] is not verifier:
        assert rejections


@torch.no_grad()
def test_19_the_drafter_reads_what_it_would_read_of_the_text_itself() -> None:
    _, pair = wrong_half_the_time()
    pair.drafter = net("mamba", 300)
    state = pair.prefill(ids(b"The verifier reads them all"), pair.initial_state(1))
    assert bytes(state.unread[0].tolist()) == b" all"
    tokens = torch.from_numpy(bpe().encode(b"The verifier reads them").astype("int64"))[None]
    fresh = pair.drafter.prefill(tokens, pair.drafter.initial_state(1))
    for found, expected in zip(tensors(state.drafter), tensors(fresh), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reading_in_pieces_makes_no_difference() -> None:
    verifier, pair = wrong_half_the_time()
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
    _, pair = wrong_half_the_time()
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


@torch.no_grad()
def test_the_tally_adds_up() -> None:
    verifier, pair = wrong_half_the_time()
    calls = {"n": 0}
    count_call = verifier.register_forward_hook  # scores and steps go through `hidden`, which is no forward
    del count_call
    plain_hidden = type(verifier).hidden

    def counting(self: Any, *given: Any) -> Any:
        calls["n"] += self is verifier
        return plain_hidden(self, *given)

    state = pair.prefill(ids(b"The "), pair.initial_state(1))
    type(verifier).hidden = counting  # type: ignore[method-assign]
    try:
        emissions = []
        for _ in range(30):
            emission = pair.decode_step(state, GREEDY, None)
            emissions.append(int(emission.counts))
            state = emission.state
    finally:
        type(verifier).hidden = plain_hidden  # type: ignore[method-assign]
    assert state.tally.rounds == 30
    assert state.tally.passes == calls["n"]
    assert state.tally.written == sum(emissions)
    assert state.tally.written / state.tally.passes > 1.5  # bytes a pass of the verifier; plain decoding has 1


# ---- refusals ----


def test_what_cannot_be_done_is_refused() -> None:
    verifier, pair = wrong_half_the_time()
    with pytest.raises(UnsupportedError, match=r"temperature 0\.8; drafted text is greedy"):
        pair.decode_step(pair.initial_state(1), Sampling(temperature=0.8), Generator())
    with pytest.raises(UnsupportedError, match="2 texts at once"):
        pair.initial_state(2)
    with pytest.raises(UnsupportedError, match="vocabulary of 300; it must read bytes"):
        Drafted(pair.drafter, pair.drafter, bpe())
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


def archbench(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "archbench.cli", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more
    )  # noqa: E501


def test_mambabyte_is_a_label(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(textwrap.dedent(SUITE))
    cells = {cell.label: cell for cell in make_plan(load_suite(str(path)), ()).cells}
    assert cells["mambabyte"].architecture == "mamba"
    assert cells["mambabyte"].codec == "bytes"
    assert cells["mambabyte"].config.vocab_size == 256


def test_a_cell_drafts_for_another_on_the_command_line(tmp_path: Path) -> None:
    path, out = tmp_path / "pair.yaml", tmp_path / "out"
    path.write_text(textwrap.dedent(SUITE))
    done = archbench("run", path, "--out", out, "--no-report", "--workers", 1, "--executor", "inline")
    assert done.returncode == 0, done.stderr
    ask = ("generate", out, "--architecture", "mambabyte", "--prompt", "def ", "--tokens", 60)
    plain = archbench(*ask, "--temperature", 0)
    drafted = archbench(*ask, "--drafter", "drafter")
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert len(plain.stdout) > len("def ") + 20
    checkpoint = next((out / "checkpoints").glob("*/codec.json")).parent
    for words, message in (
        (("--drafter", "nobody"), "no cell 'nobody'"),
        (("--drafter", checkpoint, "--temperature", 0.5), "temperature 0.5; drafted text is greedy"),
        (("--drafter", "drafter", "--rank", 300), "drafting.rank: 300"),
        (("--rank", 3), "--rank 3: needs --drafter"),
    ):
        refused = archbench(*ask, *words)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    swapped = archbench("generate", out, "--architecture", "drafter", "--drafter", "mambabyte", "--tokens", 5)
    assert swapped.returncode == 2
    assert "it must read bytes" in swapped.stderr
