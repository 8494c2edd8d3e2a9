"""The lm-eval adapter: models whose answers are known by hand, and our likelihood metric's own numbers.

What needs lm-eval itself is skipped where it is not installed; the answers behind it are tested without.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_subject import built, made_up_text, subject_of
from torch import Generator, Tensor, nn

from archbench import checkpoint, cli, registry
from archbench.cell import Budget, Cell, Training
from archbench.codec import ByteCodec, train_bpe
from archbench.data.corpus import load_corpus
from archbench.data.document import Document
from archbench.errors import (
    ArchbenchError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtra,
    SandboxError,
    UnsupportedError,
)
from archbench.history import History
from archbench.integrations import lm_eval as ours
from archbench.integrations import lm_eval_tasks
from archbench.integrations.lm_eval_answers import Respondent, split, token_ids, writing
from archbench.metric import Subject
from archbench.metrics.likelihood import METRIC, STATES, LikelihoodSettings
from archbench.model import AutoregressiveModel, Batch, Emission, FlopFormulas, Phase, SequenceModel, Traits
from archbench.sampling import GREEDY, Sampling
from archbench.sandbox import open_sandbox

BYTES = ByteCodec()
TEXTS = ["The quick brown fox jumps.", "Où est la bibliothèque ? Là-bas.", "short", "def f(x):\n    return x + 1\n\n\n"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'archbench[lm-eval]'")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # asks pip, for seconds


class Chain(AutoregressiveModel):
    """A Markov chain of bytes: row i of `table` holds the probabilities of what follows byte i."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.vocab_size = 256
        self.register_buffer("log_table", table.log())

    def initial_layers(self, batch_size: int) -> None:
        return None

    def hidden(self, tokens: Tensor, layers: None) -> tuple[Tensor, None]:
        return self.get_buffer("log_table")[tokens], None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def hidden_flops(self, n: int, context: int, causal: float) -> float:
        return 0

    def logits_flops(self) -> float:
        return 0


UNIFORM = torch.full((256, 256), 1 / 256)


def following(text: str, p: float = 0.75) -> Chain:
    """Each byte of `text` is followed by the next with probability `p`, its last one by the boundary."""
    table = UNIFORM.clone()
    ids = [0, *text.encode(), 0]
    for here, then in itertools.pairwise(ids):
        table[here] = (1 - p) / 255
        table[here, then] = p
    return Chain(table)


class Script(SequenceModel):
    """Writes a text, then boundaries, `stride` bytes a step, and remembers what it was asked to read."""

    def __init__(self, text: bytes, stride: int = 1) -> None:
        super().__init__()
        self.vocab_size, self.stride, self.text = 256, stride, text
        self.anchor = nn.Parameter(torch.zeros(1))
        self.read: list[bytes] = []

    def phases(self) -> list[Phase]:
        return []

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.long)

    def prefill(self, tokens: Tensor, state: Tensor) -> Tensor:
        assert tokens.shape[1] % self.stride == 0
        self.read.append(bytes(tokens[0].tolist()))
        return state

    def decode_step(self, state: Tensor, sampling: Sampling, generator: Generator | None) -> Emission:
        place = int(state[0])
        step = self.text[place : place + self.stride].ljust(self.stride, b"\0")
        return Emission(torch.tensor([list(step)]), torch.tensor([self.stride]), state + self.stride)


def respondent(model: SequenceModel, **more: Any) -> Respondent:
    traits = {name: more.pop(name) for name in ("likelihood", "stride", "context_limit") if name in more}
    return Respondent(model=model, traits=Traits(**{"likelihood": True, **traits}), codec=BYTES, **more)


def transformer() -> Subject:
    return built("transformer", d_model=16, n_layers=1, n_heads=2)


# Splitting


@pytest.mark.parametrize("context", ["", "a", "a ", "a  \n", "où "])
def test_bytes_are_parted_between_context_and_continuation(context: str) -> None:
    pair = split(BYTES, context, "bc d")
    assert bytes(pair.context.tolist()) == context.encode()
    assert bytes(pair.continuation.tolist()) == b"bc d"


def test_a_byte_pair_that_straddles_the_place_belongs_to_the_continuation() -> None:
    codec = train_bpe([Document("text", b"hello world hello world hello world " * 20)], 266)
    pieces = [codec.decode(ids[None].numpy()) for ids in token_ids(codec, "hello world")]
    assert pieces == [b"hello", b" world"], "the codec of this test"
    for context, continuation in (("hello", " world"), ("hello ", "world"), ("hello w", "orld")):
        pair = split(codec, context, continuation)
        assert codec.decode(pair.context.numpy()) == b"hello"
        assert codec.decode(pair.continuation.numpy()) == b" world"


# Log-likelihoods of continuations


def test_a_uniform_model_gives_every_byte_ln_256() -> None:
    answers = respondent(Chain(UNIFORM)).log_likelihoods([("some context", "four"), ("", "ab"), ("x", "")])
    assert [answer.log_likelihood for answer in answers] == pytest.approx([-4 * math.log(256), -2 * math.log(256), 0])
    assert answers[2].greedy, "nothing is written by any decoding"


def test_log_likelihood_and_greedy_by_hand() -> None:
    asked = respondent(following("abcd"))
    right, wrong, late = asked.log_likelihoods([("ab", "cd"), ("ab", "ca"), ("ab", "xd")])
    assert right.log_likelihood == pytest.approx(2 * math.log(0.75), abs=1e-5)
    assert wrong.log_likelihood == pytest.approx(math.log(0.75) + math.log(0.25 / 255), abs=1e-5)
    assert (right.greedy, wrong.greedy, late.greedy) == (True, False, False)
    (first,) = asked.log_likelihoods([("", "a")])
    assert first.log_likelihood == pytest.approx(math.log(0.75), abs=1e-5), "the first byte is predicted after 0"


def test_shared_contexts_and_batches_change_no_answer() -> None:
    subject = transformer()
    requests = [(f"context {n % 3}", f" and continuation {'x' * n}") for n in range(11)]
    told: list[int] = []
    together = respondent(subject.model, batch=2).log_likelihoods(requests, told.append)
    assert sum(told) == len(requests)
    for (context, continuation), answer in zip(requests, together, strict=True):
        ids = torch.tensor([list((context + continuation).encode())])
        with torch.no_grad():
            log_probs, _ = subject.model.score(ids, subject.model.initial_state(1))
        each = log_probs.gather(-1, ids[..., None])[0, len(context) :, 0]
        assert answer.log_likelihood == pytest.approx(float(each.double().sum()), rel=1e-5)
        assert answer.greedy == bool((log_probs.argmax(-1) == ids)[0, len(context) :].all())


def test_a_long_context_loses_its_beginning_and_is_counted() -> None:
    subject = transformer()
    limited, free = respondent(subject.model, context_limit=12), respondent(subject.model)
    cut = limited.log_likelihoods([("0123456789", "abcd"), ("789", "ab"), ("0123456789", "a" * 12)])
    whole = free.log_likelihoods([("23456789", "abcd"), ("789", "ab"), ("", "a" * 12)])
    assert [answer.log_likelihood for answer in cut] == pytest.approx([answer.log_likelihood for answer in whole])
    assert (limited.cut, free.cut) == (2, 0)


def test_a_continuation_beyond_the_limit_is_refused_before_anything_is_read() -> None:
    told: list[int] = []
    with pytest.raises(UnsupportedError, match=r"a continuation of 13 tokens does not fit .* limit of 12"):
        respondent(transformer().model, context_limit=12).log_likelihoods([("", "ok"), ("", "a" * 13)], told.append)
    assert not told


# Whole texts


@pytest.mark.parametrize("rule", STATES)
def test_rolling_is_the_likelihood_metrics_number(rule: str) -> None:
    subject = transformer()
    settings = LikelihoodSettings(states=(rule,), max_bytes=1_000)
    (expected,) = [m for m in METRIC.measure(subject, settings) if m.quantity == "bits_per_byte"]
    text = made_up_text().decode()[:1_000]
    (found,) = respondent(subject.model, window=subject.context, rule=rule).rolling([text])
    assert -found / math.log(2) / len(text) == pytest.approx(expected.value, rel=1e-9)


def test_rolling_of_several_texts_keeps_their_order_and_nothing_costs_nothing() -> None:
    asked = respondent(Chain(UNIFORM), window=8, rule="carried")
    assert asked.rolling(["", "abc", "x" * 20]) == pytest.approx([0, -3 * math.log(256), -20 * math.log(256)])
    assert asked.rolling([""]) == [0]


def test_rolling_beyond_the_context_limit_or_without_a_window_is_refused() -> None:
    carried = respondent(transformer().model, window=8, rule="carried", context_limit=12)
    with pytest.raises(UnsupportedError, match="20 tokens must be read in one go with --state carried"):
        carried.rolling(["x" * 20])
    with pytest.raises(ConfigError, match="--context: missing"):
        respondent(Chain(UNIFORM)).rolling(["x"])


def test_impossible_windows_and_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="--state resett: not known; did you mean 'reset'"):
        respondent(Chain(UNIFORM), rule="resett")
    with pytest.raises(ConfigError, match="--context 0"):
        respondent(Chain(UNIFORM), window=0)


def test_texts_that_a_codec_cannot_hold_are_named() -> None:
    asked = respondent(Chain(UNIFORM), window=8)
    with pytest.raises(DataError, match="NUL"):
        asked.rolling(["a\0b"])
    with pytest.raises(DataError, match="lone surrogate"):
        asked.rolling(["a\ud800"])


def test_a_model_without_likelihood_refuses_both() -> None:
    asked = respondent(Script(b"text"), likelihood=False, window=8)
    for ask in (lambda: asked.log_likelihoods([("a", "b")]), lambda: asked.rolling(["a"])):
        with pytest.raises(UnsupportedError, match="gives no probabilities to tokens"):
            ask()


# Writing


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(
    ("until", "n_new", "expected"),
    [
        ([], 8, "def f():"),
        (["\n"], 100, "def f():"),
        (["return 1\n"], 100, "def f():\n    "),  # begins and ends within steps of 3
        (["zz", "turn", "():"], 100, "def f"),
        ([], 100, "def f():\n    return 1\nmore"),  # ends before the boundary
    ],
)
def test_writing_ends_at_stop_strings_the_limit_or_a_boundary(
    stride: int, until: list[str], n_new: int, expected: str
) -> None:
    model = Script(b"def f():\n    return 1\nmore\0after", stride)
    how = writing({"until": until, "max_gen_toks": n_new}, "here")
    assert respondent(model, stride=stride, likelihood=False).write("prompt", how) == expected


def test_prompts_are_filled_up_to_the_stride_and_cut_to_the_context_limit() -> None:
    model = Script(b"words", stride=4)
    asked = respondent(model, stride=4, likelihood=False, context_limit=15)
    how = writing({"max_gen_toks": 5}, "here")  # two steps, which leave room for one stride of prompt
    asked.write("abc", how)
    asked.write("abcdef", how)
    assert model.read == [b"\0abc", b"cdef"]
    assert asked.cut == 1
    with pytest.raises(UnsupportedError, match="max_gen_toks 16 does not fit"):
        asked.write("abc", writing({"max_gen_toks": 16}, "here"))


def test_draws_depend_on_seed_and_place_alone() -> None:
    how = writing({"do_sample": True, "temperature": 1.0, "max_gen_toks": 24}, "here")
    model = transformer().model
    texts = [respondent(model, seed=3).write("ab", how, index) for index in range(4)]
    assert texts == [respondent(model, seed=3).write("ab", how, index) for index in range(4)]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, GREEDY),
        ({"temperature": 0.0}, GREEDY),
        ({"temperature": 0.7}, Sampling(temperature=0.7)),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": True, "temperature": "0.5", "top_k": 0, "top_p": 1}, Sampling(temperature=0.5)),
        ({"temperature": 2, "top_k": 5, "top_p": 0.9}, Sampling(temperature=2.0, top_k=5, top_p=0.9)),
    ],
)
def test_generation_options_mean_what_they_mean_in_lm_eval(options: dict[str, Any], sampling: Sampling) -> None:
    assert writing(options, "here").sampling == sampling


def test_lengths_and_stops_of_generation_options() -> None:
    assert writing({}, "here").n_new == 256
    assert writing({"max_new_tokens": 7}, "here").n_new == 7
    assert writing({"until": "\n"}, "here").stop == ("\n",)
    assert writing({"until": ["", "a", "b"]}, "here").stop == ("a", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "here: generation_kwargs.num_beams: not supported"),
        ({"temperatur": 1}, "did you mean 'temperature'"),
        ({"temperature": "warm"}, "here: generation_kwargs: could not convert"),
        ({"temperature": -1}, "here: generation_kwargs: sampling.temperature"),
        ({"max_gen_toks": 0}, "0 new tokens"),
        ({"until": [3]}, "until: 3; expected strings"),
    ],
)
def test_generation_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        writing(options, "here")


# Tasks and checkpoints


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("", ConfigError, "names no task"),
        ("texts:a.txt", ConfigError, "did you mean 'text'"),
        ("text:", ConfigError, "names no file"),
        ("text:nowhere.txt", DataError, "text:nowhere.txt: no such file"),
        ("nowhere/task.yaml", DataError, "nowhere/task.yaml: no such file"),
        ("heldout", CheckpointError, "was imported and has no held-out text"),
    ],
)
def test_tasks_that_cannot_be_are_named(spec: str, error: type[ArchbenchError], message: str) -> None:
    with pytest.raises(error, match=message):
        lm_eval_tasks.sort_out([spec], None, BYTES)


def test_tasks_are_sorted_by_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    asked = lm_eval_tasks.sort_out([f"text:{tmp_path}/a.txt", f"{tmp_path}"], None, BYTES)
    assert [config["task"] for config in asked.own] == [f"text:{tmp_path}/a.txt"]
    assert (asked.paths, asked.names, asked.local) == ([tmp_path], [], True)
    assert not lm_eval_tasks.sort_out(["wikitext"], None, BYTES).local


def test_without_lm_eval_the_line_that_installs_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pip install 'archbench\[lm-eval\]'"):
        ours.evaluate(tmp_path, ["heldout"], ours.Options())


def corpus_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{number}: {TEXTS[number % len(TEXTS)] * (1 + number % 5)}")
    return folder


def trained(tmp_path: Path, architecture: str, text: bytes = b"", **options: Any) -> tuple[Path, Subject]:
    """A checkpoint with all that a run leaves in it, and the same cell as metrics see it.

    Nothing is trained; a model that learns by reading reads `text`.
    """
    found = registry.architecture(architecture)
    config = found.config(vocab_size=256, **options)
    corpus = load_corpus(f"dir:{corpus_folder(tmp_path)}")
    cell = Cell(
        label=architecture,
        architecture=architecture,
        size="custom",
        config=config,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        codec="bytes",
        seed=0,
        training=Training(budget=Budget(bytes=1), context=16),
        metrics=(),
    )
    model = found.build(config, Generator().manual_seed(0)).eval()
    if text:
        model.phases()[0].loss(Batch(torch.tensor([list(text)]), 0.0, Generator()))
    folder = tmp_path / "checkpoint"
    origin = {"cell": cell.to_dict()}
    checkpoint.save(folder, architecture, config, model.state_dict(), codec=BYTES, origin=origin, history=History())
    subject = subject_of(model, architecture, config)
    return folder, replace(subject, corpus=corpus, traits=found.traits(config))


def task_file(folder: Path, name: str, rows: Sequence[dict[str, Any]], **more: Any) -> Path:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**config, "test_split": "test", "num_fewshot": 0, **more}))  # JSON is YAML
    return path


ROWS = [{"q": "ab", "a": ["c", "x"], "gold": 0}, {"q": "a", "a": ["q", "bc"], "gold": 1}]
METRIC_OF = {"aggregation": "mean", "higher_is_better": True}


def choice(folder: Path) -> Path:
    return task_file(
        folder,
        "choice",
        ROWS,
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="{{a}}",
        doc_to_target="gold",
        target_delimiter="",
        metric_list=[{"metric": "acc", **METRIC_OF}],
    )


def written(folder: Path, **more: Any) -> Path:
    return task_file(
        folder,
        "written",
        ROWS,
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{q}}",
        generation_kwargs={"until": [" "], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match", **METRIC_OF}],
        **more,
    )


# With lm-eval


def test_heldout_text_has_the_metrics_bits_per_byte_under_every_rule(lm_eval: None, tmp_path: Path) -> None:
    folder, subject = trained(tmp_path, "transformer", d_model=16, n_layers=1, n_heads=2)
    measured = METRIC.measure(subject, LikelihoodSettings())
    expected = {m.at["state"]: m.value for m in measured if m.quantity == "bits_per_byte"}
    assert len(set(expected.values())) == len(STATES)
    for rule in STATES:
        evaluation = ours.evaluate(folder, ["heldout"], ours.Options(state=rule))
        found = {score.metric: score.value for score in evaluation.scores()}
        assert found["bits_per_byte"] == pytest.approx(expected[rule], rel=1e-9)
        assert found["byte_perplexity"] == pytest.approx(2 ** expected[rule], rel=1e-9)


def test_25_a_model_that_knows_nothing_has_byte_perplexity_256(lm_eval: None, tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, "ngram", order=1)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "list.txt").write_text("[1, 2]")  # a template engine would read this as a list
    tasks = [f"text:{tmp_path}/text.jsonl", f"text:{tmp_path}/list.txt"]
    scores = ours.evaluate(folder, tasks, ours.Options()).scores()
    assert [score.value for score in scores if score.metric == "byte_perplexity"] == pytest.approx([256, 256])
    assert [score.value for score in scores if score.metric == "bits_per_byte"] == pytest.approx([8, 8])
    words = {score.task: score.value for score in scores if score.metric == "word_perplexity"}
    assert words[tasks[1]] == pytest.approx(256 ** (6 / 2))  # "[1, 2]" has six bytes in two words
    assert {score.task: score.n for score in scores} == {tasks[0]: len(TEXTS), tasks[1]: 1}
    assert all(score.higher_is_better is False and score.stderr is None for score in scores)


def test_multiple_choice_and_writing_from_local_files(lm_eval: None, tmp_path: Path) -> None:
    """A bigram that has read "abc abc abc ": what follows is known."""
    folder, _ = trained(tmp_path, "ngram", order=2, text=b"\0abc abc abc abc abc abc abc abc \0")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    choice(tasks)
    task_file(
        tasks,
        "written",
        [{"q": "a", "answer": "bc"}, {"q": "x ab", "answer": "c"}, {"q": "b", "answer": "nothing"}],
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [" a"], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match", **METRIC_OF}],
    )
    evaluation = ours.evaluate(folder, [f"{tasks}/"], ours.Options())
    found = {score.task: score for score in evaluation.scores()}
    assert found["choice"].value == 1.0
    assert found["written"].value == pytest.approx(2 / 3)
    assert found["written"].stderr == pytest.approx(1 / 3)  # of 1, 1, 0: their deviation over the root of 3
    limited = ours.evaluate(folder, [f"{tasks}/written.yaml"], ours.Options(limit=2))
    assert [(score.value, score.n) for score in limited.scores()] == [(1.0, 2)]


def archbench(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The console script's exit code."""
    monkeypatch.setattr(sys, "argv", ["archbench", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_calm_refuses_likelihood_before_anything_runs_and_writes(
    lm_eval: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained(tmp_path, "calm", d_model=16, n_layers=1, n_heads=2, n_candidates=4)
    writes, chooses = written(tmp_path), choice(tmp_path)
    assert archbench(monkeypatch, "lm-eval", folder, "--tasks", f"{writes},{chooses}") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    refusal = shown.err.splitlines()[-1]
    assert refusal.startswith("archbench: lm-eval: task choice (multiple_choice): this model gives no probabilities")
    assert "Traceback" not in shown.err
    out = tmp_path / "results.json"
    assert archbench(monkeypatch, "lm-eval", folder, "--tasks", writes, "--out", out) == 0
    assert "exact_match" in capsys.readouterr().out
    body = json.loads(out.read_text())
    assert body["results"]["written"]["exact_match,none"] == 0.0
    assert body["archbench"]["architecture"] == "calm"
    assert body["archbench"]["weights_sha256"] == checkpoint.weights_sha256(folder)
    assert str(writes) in body["archbench"]["command"]


def test_code_is_not_run_outside_the_sandbox_and_options_are_checked_first(lm_eval: None, tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, "ngram", order=1)
    with pytest.raises(UnsupportedError, match="outside of any sandbox; for mbpp use mbpp:PATH"):
        ours.evaluate(folder, [str(written(tmp_path, unsafe_code=True))], ours.Options())
    path = written(tmp_path)
    path.write_text(path.read_text().replace('"until"', '"num_beams": 3, "until"'))
    with pytest.raises(ConfigError, match=r"task written: generation_kwargs\.num_beams: not supported"):
        ours.evaluate(folder, [str(path)], ours.Options())


def test_a_task_that_cannot_be_loaded_is_one_line(lm_eval: None, tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, "ngram", order=1)
    path = choice(tmp_path)
    (tmp_path / "choice.jsonl").unlink()
    with pytest.raises(DataError, match=r"choice\.yaml: lm-eval cannot load it") as error:
        ours.evaluate(folder, [str(path)], ours.Options())
    assert "\n" not in str(error.value)


# MBPP


def problem(number: int, name: str, value: int) -> dict[str, Any]:
    return {
        "task_id": number,
        "text": f"Write {name}.",
        "code": f"def {name}(x):\r\n    return x + {value}",
        "test_list": [f"assert {name}({n}) == {n + value}" for n in range(3)],
    }


def mbpp_file(folder: Path, *left_out: int) -> Path:
    problems = [problem(n, f"f{n}", n) for n in (1, 2, 3, 4, 11, 12, 13, 601) if n not in left_out]
    path = folder / "mbpp.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in problems))
    return path


@pytest.fixture
def sandbox() -> None:
    try:
        open_sandbox().close()
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")


@pytest.mark.filterwarnings("ignore::archbench.sandbox.SandboxWarning")
@pytest.mark.parametrize(("left_out", "message"), [((3,), "lacks problem 3"), ((11, 12, 13), "lacks the test split")])
def test_an_mbpp_file_must_be_whole(sandbox: None, tmp_path: Path, left_out: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"--tasks mbpp:.* {message}"):
        lm_eval_tasks.sort_out([f"mbpp:{mbpp_file(tmp_path, *left_out)}"], None, BYTES)


class Programmer(Respondent):
    """Solves problem 11, says something else to 12, and writes nothing to 13."""

    asked: ClassVar[list[tuple[str, Any]]] = []

    def write(self, prompt: str, how: Any, index: int = 0) -> str:
        self.asked.append((prompt, how))
        return ["def f11(x):\n    return x + 11", "def f12(x):\n    return 12", ""][index]


@pytest.mark.filterwarnings("ignore::archbench.sandbox.SandboxWarning")
def test_mbpp_is_asked_with_three_shots_and_judged_in_the_sandbox(lm_eval: None, sandbox: None, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from archbench.integrations.lm_eval_model import ArchbenchLM

    spec = f"mbpp:{mbpp_file(tmp_path)}"
    programmer = Programmer(model=Chain(UNIFORM), traits=Traits(likelihood=True), codec=BYTES)
    results = simple_evaluate(
        model=ArchbenchLM(programmer),
        tasks=lm_eval_tasks.load(lm_eval_tasks.sort_out([spec], None, BYTES)),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=10,
        log_samples=False,
    )
    (score,) = ours.Evaluation(results=results, provenance={}, notices=[]).scores()
    assert (score.metric, score.value, score.n, score.shots) == ("pass_at_1", pytest.approx(1 / 3), 3, 3)
    assert score.stderr == pytest.approx(1 / 3)
    prompt, how = programmer.asked[0]
    assert how.stop == ("[DONE]",)
    assert how.sampling == GREEDY

    def turn(number: int) -> str:
        tests = "\n".join(problem(number, f"f{number}", number)["test_list"])
        return (
            f"You are an expert Python programmer, and here is your task: Write f{number}. Your code should pass these "
            f"tests:\n\n{tests}\n[BEGIN]\n"
        )

    shots = [f"{turn(n)}def f{n}(x):\r\n    return x + {n}\n[DONE]\n\n" for n in (2, 3, 4)]
    assert prompt == "".join(shots) + turn(11)
