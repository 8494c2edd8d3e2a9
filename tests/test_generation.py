"""Generation: rows that write several tokens a step, limits, strides, stop strings and valid UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.codec import ByteCodec
from archbench.errors import ContextOverflow
from archbench.generation import TextStream, aligned, continue_from, generate, stream
from archbench.model import Emission, FlopFormulas, Phase, SequenceModel
from archbench.sampling import GREEDY, PLAIN, Sampling
from archbench.state import tensors


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class BurstState(NamedTuple):
    last: Tensor
    length: Tensor
    steps: Tensor


class Bursts(SequenceModel):
    """Counts upwards from the last token; a step writes 1 to 3 tokens, depending on row and step."""

    def __init__(self, limit: int = 10**6) -> None:
        super().__init__()
        self.vocab_size, self.limit = 1000, limit
        self.anchor = nn.Parameter(torch.zeros(1))
        self.rows_decoded: list[int] = []

    def phases(self) -> list[Phase]:
        return []

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> BurstState:
        nothing = torch.zeros(batch_size, dtype=torch.long)
        return BurstState(nothing, nothing.clone(), torch.arange(batch_size))

    def prefill(self, tokens: Tensor, state: BurstState) -> BurstState:
        last = tokens[:, -1] if tokens.shape[1] else state.last
        return BurstState(last, state.length + tokens.shape[1], state.steps)

    def decode_step(self, state: BurstState, sampling: Sampling, generator: Generator | None) -> Emission:
        self.rows_decoded.append(len(state.last))
        counts = 1 + state.steps % 3
        tokens = state.last[:, None] + torch.arange(1, 4)
        length = state.length + counts
        if int(length.max()) > self.limit:
            raise ContextOverflow(f"bursts: {int(length.max())} tokens do not fit into {self.limit}")
        tokens = torch.where(torch.arange(3) < counts[:, None], tokens, 999)
        return Emission(tokens, counts, BurstState(state.last + counts, length, state.steps + 1))


@pytest.mark.parametrize("n_new", [0, 1, 2, 5, 12])
def test_rows_that_write_several_tokens_a_step(n_new: int) -> None:
    prompt = torch.tensor([[5], [100], [7], [300]])
    written = generate(Bursts(), prompt, n_new, GREEDY)
    assert torch.equal(written, prompt + torch.arange(1, n_new + 1))


def test_a_finished_row_does_not_run_into_the_context_limit() -> None:
    """2 new tokens after a prompt of 1: the first row needs two steps, the others would write 2 + 3 or 3 + 1 in two."""
    prompt = torch.tensor([[5], [100], [7]])
    model = Bursts(limit=4)
    assert torch.equal(generate(model, prompt, 2, GREEDY), prompt + torch.arange(1, 3))
    assert model.rows_decoded == [3, 1]
    with pytest.raises(ContextOverflow):
        generate(Bursts(limit=3), prompt, 2, GREEDY)


def tiny_transformer(seed: int = 0) -> Transformer:
    config = TransformerConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2)
    return Transformer(config, torch.Generator().manual_seed(seed)).eval()


def test_greedy_is_the_argmax_of_the_likelihood_token_by_token() -> None:
    model = tiny_transformer()
    prompt = torch.randint(1, 256, (3, 9), generator=torch.Generator().manual_seed(1))
    written = generate(model, prompt, 6, GREEDY)
    text = torch.cat([prompt, written], dim=1)
    log_probs, _ = model.score(text, model.initial_state(3))
    assert torch.equal(written, log_probs[:, 9:].argmax(dim=-1))
    assert not written.requires_grad


def test_sampling_follows_its_seed() -> None:
    model, prompt = tiny_transformer(), torch.zeros(2, 0, dtype=torch.long)

    def draw(seed: int) -> Tensor:
        return generate(model, prompt, 20, PLAIN, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_continuing_a_state_leaves_no_gradient() -> None:
    model = tiny_transformer()
    state = model.prefill(torch.ones(2, 4, dtype=torch.long), model.initial_state(2))
    assert any(tensor.requires_grad for tensor in tensors(state))
    assert continue_from(model, state, 2, 3, GREEDY).shape == (2, 3)


def test_aligned_puts_boundaries_in_front() -> None:
    prompt = torch.tensor([[4, 5, 6]])
    assert aligned(prompt, 4).tolist() == [[0, 4, 5, 6]]
    assert aligned(prompt, 3).tolist() == [[4, 5, 6]]
    assert aligned(prompt[:, :0], 4).tolist() == [[]]


# --- streams


class Recital(Bursts):
    """Writes a fixed text, 1 to 3 bytes a step, whatever it read; the state's `last` is the place in it."""

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.text = torch.tensor(list(text))

    def prefill(self, tokens: Tensor, state: BurstState) -> BurstState:
        return state

    def decode_step(self, state: BurstState, sampling: Sampling, generator: Generator | None) -> Emission:
        place, counts, after = super().decode_step(state, sampling, generator)
        return Emission(self.text[(place - 1) % len(self.text)], counts, after)


def recite(text: str | bytes, n_new: int | None = None, **options: object) -> list[str]:
    raw = text.encode() if isinstance(text, str) else text
    n_new = len(raw) if n_new is None else n_new
    prompt = torch.zeros(1, 0, dtype=torch.long)
    return list(stream(Recital(raw), prompt, n_new, GREEDY, None, ByteCodec().decode, **options))  # type: ignore[arg-type]


def test_stream_writes_exactly_n_tokens_piece_by_piece() -> None:
    pieces = recite("the quick brown fox", n_new=11)
    assert "".join(pieces) == "the quick b"
    assert pieces == ["t", "he", " qu", "i", "ck", " b"]


def test_stream_holds_back_unfinished_characters() -> None:
    pieces = recite("aé€🙂z")
    assert "".join(pieces) == "aé€🙂z"
    assert "�" not in "".join(pieces) and len(pieces) > 2


def test_stream_shows_an_unfinished_last_character_as_replaced() -> None:
    assert "".join(recite("a€", n_new=3)) == "a�"


def test_stream_stops_before_a_stop_string_across_token_borders() -> None:
    assert "".join(recite("def f():\n    pass\n\n\nclass A", stop=["\nclass", "\ndef"])) == "def f():\n    pass\n\n"


def test_stream_releases_what_only_looked_like_a_stop_string() -> None:
    assert "".join(recite("END of", stop=["END."])) == "END of"
    assert "".join(recite("so EN", stop=["END"])) == "so EN"


def test_stream_stops_before_a_stop_token() -> None:
    assert "".join(recite(b"one\0two", stop_tokens={0})) == "one"
    assert "".join(recite(b"one\0two")) == "onetwo"  # the boundary itself is no text


def test_a_stopped_stream_decodes_no_further() -> None:
    model = Recital(b"ab" * 500)
    prompt = torch.zeros(1, 0, dtype=torch.long)
    list(stream(model, prompt, 1000, GREEDY, None, ByteCodec().decode, stop=["ba"]))
    assert len(model.rows_decoded) == 2


def test_streaming_equals_generating() -> None:
    model = tiny_transformer()
    prompt = torch.randint(1, 256, (1, 5), generator=torch.Generator().manual_seed(3))
    whole = generate(model, prompt, 40, PLAIN, torch.Generator().manual_seed(7))
    pieces = stream(model, prompt, 40, PLAIN, torch.Generator().manual_seed(7), ByteCodec().decode)
    assert "".join(pieces) == ByteCodec().decode(whole[0].numpy()).decode("utf-8", errors="replace")


def test_stream_leaves_gradients_on_for_its_caller() -> None:
    for _ in stream(Recital(b"abcdef"), torch.zeros(1, 0, dtype=torch.long), 6, GREEDY, None, ByteCodec().decode):
        assert torch.is_grad_enabled()


def by_the_definition(text: bytes, stops: list[str]) -> str:
    """Byte by byte: the first stop string to be complete ends the text before itself, the longest of several."""
    for end in range(len(text) + 1):
        complete = [stop.encode() for stop in stops if text[:end].endswith(stop.encode())]
        if complete:
            return text[: end - max(map(len, complete))].decode("utf-8", errors="replace")
    return text.decode("utf-8", errors="replace")


@pytest.mark.parametrize("stops", [[], ["aab"], ["ab", "b", "aabb"], ["éa", "aé", "bbb"], ["abab", "bc"]])
def test_any_cut_of_the_bytes_gives_the_same_text(stops: list[str]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        text = "".join(rng.choice(list("aabbcé"), size=12)).encode()
        text = text[: int(rng.integers(1, len(text) + 1))]
        found, place = TextStream(stops), 0
        written = ""
        while place < len(text):
            step = int(rng.integers(1, 5))
            written += found.feed(text[place : place + step])
            place += step
        assert written + found.close() == by_the_definition(text, stops)
        assert found.feed(b"more") == "" and found.close() == ""
