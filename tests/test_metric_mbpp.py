"""MBPP and mbpp-mini on models that write what they are told to: pass@k and bits by hand, prompts byte for byte."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_subject import built, subject_of
from torch import Generator, Tensor, nn

from archbench import coding, registry
from archbench.completions import Writing
from archbench.data import mbpp_mini, problem_sources
from archbench.data.problem_sources import load_problems, problems_of, write_problems
from archbench.data.problems import Problem, find_mbpp
from archbench.errors import ConfigError, DataError, MissingExtra, SandboxError
from archbench.metric import Measurement, Subject
from archbench.metrics import mbpp
from archbench.metrics.mbpp import MBPPSettings
from archbench.metrics.mbpp_mini import METRIC as MINI
from archbench.metrics.mbpp_mini import MiniSettings
from archbench.model import Emission, FlopFormulas, Likelihood, Phase, SequenceModel
from archbench.sampling import Sampling
from archbench.sandbox import open_sandbox

pytestmark = pytest.mark.filterwarnings("ignore::archbench.sandbox.SandboxWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sandbox() -> None:
    try:
        open_sandbox().close()
    except SandboxError as error:
        pytest.skip(str(error))


class ScribeState(NamedTuple):
    read: Tensor
    variant: Tensor
    place: Tensor


class Scribe(SequenceModel):
    """Writes to a prompt that ends with `asked` the texts told for it: the n-th row that has read it writes the n-th of
    them, 3 bytes a step.
    Likelihood: every byte is equally likely."""

    def __init__(self, told: dict[str, list[str]]) -> None:
        super().__init__()
        self.vocab_size, self.told = 256, told
        self.anchor = nn.Parameter(torch.zeros(1))
        self.readings: list[int] = []

    def phases(self) -> list[Phase]:
        return []

    def flops(self) -> FlopFormulas:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> ScribeState:
        nothing = torch.zeros(batch_size, dtype=torch.long)
        return ScribeState(torch.zeros(batch_size, 0, dtype=torch.long), nothing, nothing.clone())

    def prefill(self, tokens: Tensor, state: ScribeState) -> ScribeState:
        self.readings.append(tokens.shape[1])
        return state._replace(read=torch.cat([state.read, tokens], dim=1))

    def decode_step(self, state: ScribeState, sampling: Sampling, generator: Generator | None) -> Emission:
        variant = state.variant
        if bool((state.place == 0).all()):
            read = state.read.tolist()
            variant = torch.tensor([read[:row].count(read[row]) for row in range(len(read))])
        rows = []
        for read, which, place in zip(state.read.tolist(), variant.tolist(), state.place.tolist(), strict=True):
            prompt = bytes(read).decode()
            texts = next(texts for asked, texts in self.told.items() if prompt.endswith(asked))
            rows.append(list((texts[which].encode() + b" " * 300)[place : place + 3]))
        counts = torch.full((len(rows),), 3)
        return Emission(torch.tensor(rows), counts, ScribeState(state.read, variant, state.place + 3))


class Uniform(Scribe, Likelihood):
    def score(self, tokens: Tensor, state: ScribeState) -> tuple[Tensor, ScribeState]:
        return torch.full((*tokens.shape, 256), -math.log(256)), state


def problem(number: int, name: str, code: str, *tests: str) -> Problem:
    return Problem(task_id=number, text=f"Write {name}.", code=code, test_list=tests)


DOUBLE = problem(11, "double", "def double(x):\r\n    return 2 * x", "assert double(2) == 4", "assert double(0) == 0")
NEXT = problem(12, "next_one", "def next_one(x):\n    return x + 1", "assert next_one(2) == 3")
SPELL = problem(13, "spell", "def spell(s):\n    return list(s)", "assert spell('ab') == ['a', 'b']")
GOOD = {problem.task_id: problem.code for problem in (DOUBLE, NEXT, SPELL)}
PROTOCOL = coding.Protocol(
    name="ours", shots="# shots\n", prompt=lambda p: f"# {p.text}\n", solution=lambda p: p.code, cpu_s=2
)


def measure(subject: Subject, problems: list[Problem], **how: Any) -> list[Measurement]:
    how = {"samples": 12, "temperatures": (1.0,), "new_tokens": 80, "stop": ("[DONE]",), **how}
    found = list(coding.measure(subject, problems, PROTOCOL, Writing(**how)))
    assert {measurement.quantity for measurement in found} == set(coding.QUANTITIES)
    assert all((measurement.value is None) == bool(measurement.reason) for measurement in found)
    return found


def one(found: list[Measurement], quantity: str, **at: Any) -> Measurement:
    (only,) = (m for m in found if m.quantity == quantity and at.items() <= dict(m.at).items())
    return only


def told(double: list[str], next_one: list[str], spell: list[str]) -> dict[str, list[str]]:
    return {"# Write double.\n": double, "# Write next_one.\n": next_one, "# Write spell.\n": spell}


WRONG = "def next_one(x):\n    return x"
BROKEN = "def next_one(x)\n    return x + 1"


@pytest.fixture(scope="module")
def scripted() -> list[Measurement]:
    """12 completions each: of double all are right, of next_one the first alone, of spell none."""
    script = told(
        [f"{DOUBLE.code}\n[DONE]\nprint(" + "x" * n for n in range(12)],
        [f"{NEXT.code}[DONE]", *[WRONG + "\n[DONE]"] * 6, *[BROKEN + "[DONE]"] * 5],
        ["pass [DONE]"] * 12,
    )
    return measure(subject_of(Uniform(script)), [DOUBLE, NEXT, SPELL])


@pytest.mark.usefixtures("sandbox")
def test_pass_at_k_by_hand(scripted: list[Measurement]) -> None:
    at_1 = one(scripted, "pass_at_k", k=1)
    assert at_1.samples == pytest.approx([1, 1 / 12, 0])
    assert at_1.value == pytest.approx(13 / 36)
    at_10 = one(scripted, "pass_at_k", k=10)
    assert at_10.samples == pytest.approx([1, 1 - math.comb(11, 10) / math.comb(12, 10), 0])
    assert at_10.value == pytest.approx((1 + 5 / 6) / 3)
    assert at_10.low is not None and at_10.high is not None and at_10.low < at_10.value < at_10.high
    assert not [m for m in scripted if m.at.get("k") == 100]  # of 12 completions none is known
    assert at_1.at == {"protocol": "ours", "temperature": 1.0, "k": 1}


@pytest.mark.usefixtures("sandbox")
def test_the_record_says_how_it_came_about(scripted: list[Measurement]) -> None:
    said = one(scripted, "pass_at_k", k=1).protocol
    assert said.startswith(
        "ours; 3 problems, 11 to 13; 12 completions each at temperature 1, at most 80 tokens; sandbox '"
    )
    assert said.endswith(": 18 failed, 13 passed, 5 does not parse")


def test_valid_syntax_counts_what_parses(scripted: list[Measurement]) -> None:
    assert one(scripted, "valid_syntax").samples == pytest.approx([1, 7 / 12, 1])


def test_a_uniform_model_has_8_bits_a_byte(scripted: list[Measurement]) -> None:
    bits = one(scripted, "solution_bits_per_byte")
    assert bits.value == pytest.approx(8, rel=1e-6) and bits.samples == pytest.approx([8, 8, 8], rel=1e-6)
    assert bits.low == pytest.approx(8) and bits.high == pytest.approx(8)


@pytest.mark.usefixtures("sandbox")
def test_where_all_or_none_pass_the_interval_has_width() -> None:
    subject = subject_of(Uniform(told([GOOD[11]], [GOOD[12]], ["def spell("])))
    right = one(measure(subject, [DOUBLE, NEXT], temperatures=(0.0,)), "pass_at_k", k=1)
    assert right.value == 1 and right.high == 1 and right.low == pytest.approx(0.342, abs=1e-3)
    found = measure(subject, [SPELL], temperatures=(0.0,))
    wrong = one(found, "pass_at_k", k=1)
    assert wrong.value == 0 and wrong.low == 0 and wrong.high == pytest.approx(0.793, abs=1e-3)
    assert "; greedy, at most 80 tokens; " in wrong.protocol
    assert wrong.protocol.endswith(": 1 does not parse")
    assert one(found, "valid_syntax").value == 0


@pytest.mark.usefixtures("sandbox")
def test_shots_and_prompts_are_read_once() -> None:
    model = Uniform(told([GOOD[11]] * 9, [GOOD[12]] * 9, [GOOD[13]] * 9))
    measure(subject_of(model), [DOUBLE, NEXT, SPELL], samples=9)
    assert model.readings == [len("# shots\n# Write "), len("spell.\n"), len("double.\n"), len("next_one.\n")]


@pytest.mark.usefixtures("sandbox")
def test_a_context_limit_is_said_and_counts_against_the_model() -> None:
    model = Uniform(told([GOOD[11]] * 2, [GOOD[12]] * 2, [GOOD[13]] * 2))
    limit = len("# shots\n# Write double.\n") + len(GOOD[11])
    found = measure(subject_of(model, context_limit=limit), [DOUBLE, NEXT], samples=2, new_tokens=200)
    assert one(found, "pass_at_k", k=1).samples == [1, 0]  # the prompt of the second is longer by two bytes
    assert one(found, "solution_bits_per_byte").reason == (
        f"1 of 2 prompts with their solutions exceed the context limit of {limit} tokens"
    )
    found = measure(subject_of(model, context_limit=20), [DOUBLE, NEXT], samples=2)
    assert one(found, "pass_at_k", k=1).value == 0
    said = "2 problems, 11 to 12, of which 2 leave no room in a context of 20 tokens and count as not solved"
    assert said in found[0].protocol


@pytest.mark.usefixtures("sandbox")
def test_a_model_without_likelihood_passes_and_has_no_bits() -> None:
    """CALM: four bytes a step, prompts of whole chunks, no probabilities."""
    calm: Any = registry.architecture("calm")
    config = calm.config(vocab_size=256, d_model=8, n_layers=1, n_heads=1, d_autoencoder=8, d_latent=8, n_candidates=8)
    model = calm.build(config, torch.Generator().manual_seed(0))
    traits = calm.traits(config)
    subject = replace(subject_of(model, "calm", config), traits=traits)
    assert traits.stride > 1
    found = measure(subject, [NEXT], samples=2, temperatures=(0.0, 3.0), new_tokens=6)
    assert one(found, "pass_at_k", temperature=0.0, k=1).value == 0
    assert "at most 1" in one(found, "pass_at_k", temperature=3.0).reason
    assert one(found, "solution_bits_per_byte").reason == "this model has no likelihood"


def test_without_a_sandbox_only_pass_at_k_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise SandboxError("no sandbox here; install one")

    monkeypatch.setattr(coding, "open_sandbox", refuse)
    subject = subject_of(Uniform(told([GOOD[11]] * 10, [], [])))
    found = measure(subject, [DOUBLE], samples=10)
    for k in (1, 10):
        assert one(found, "pass_at_k", k=k).reason == "no sandbox here; install one"
    assert one(found, "valid_syntax").value == 1
    assert one(found, "solution_bits_per_byte").value == pytest.approx(8, rel=1e-6)


@pytest.mark.usefixtures("sandbox")
def test_what_is_no_python_and_what_was_judged_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running it would be of no use: a SyntaxError fails wherever it is found."""
    from archbench.sandbox import Sandbox

    ran: list[str] = []
    real = Sandbox.judge_all

    def watched(self: Sandbox, items: Any, workers: int) -> Any:
        ran.extend(solution for solution, _ in items)
        return real(self, items, workers)

    monkeypatch.setattr(Sandbox, "judge_all", watched)
    garbage = ["def f(:", "x = = 3", "", "return return", "if True:\nprint(1)", "\0", "(" * 5000, "- " * 20000 + "1"]
    verdicts = coding.judge([(text, NEXT) for text in (*garbage, NEXT.code, WRONG, NEXT.code)], cpu_s=2)
    assert ran == [NEXT.code, WRONG]
    assert [verdict.passed for verdict in verdicts] == [False] * len(garbage) + [True, False, True]
    assert {verdict.result for verdict in verdicts[: len(garbage)]} == {"does not parse"}


def test_a_warning_of_the_parser_is_none_of_ours() -> None:
    assert coding.parses('x = "\\d"')
    assert not coding.parses("  \n")


# --- MBPP itself


@pytest.fixture(scope="module")
def real() -> list[Problem]:
    try:
        return load_problems(str(find_mbpp()))
    except DataError as error:
        pytest.skip(str(error))


def test_the_prompt_is_lm_evaluation_harness_s_own(real: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task's own texts, put together by its own code."""
    lm_eval = pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    yaml = pytest.importorskip("yaml")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api.task import ConfigurableTask

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    folder = Path(lm_eval.__file__).parent / "tasks" / "mbpp"
    theirs = yaml.load((folder / "mbpp.yaml").read_text(), Loader)
    (shots,) = (
        ast.literal_eval(node.body[0].value)
        for node in ast.parse((folder / "utils.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples"
    )
    asked = [problem for problem in real if problem.task_id in (11, 400, 510)]
    rows = [{**asdict(problem), "test_list": list(problem.test_list), "challenge_test_list": []} for problem in asked]
    names = ("output_type", "test_split", "doc_to_text", "doc_to_target", "target_delimiter", "generation_kwargs")
    task = ConfigurableTask(
        config={
            **{name: theirs[name] for name in names},
            "task": "wording",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "fewshot_config": {"sampler": "first_n", "samples": shots},
            "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
        }
    )
    ours = mbpp.protocol("lm-eval-3shot", [problem for problem in real if problem.task_id in mbpp.SHOTS])
    for doc, problem in zip(task.test_docs(), asked, strict=True):
        assert task.fewshot_context(doc, theirs["num_fewshot"]) == ours.shots + ours.prompt(problem)
    assert MBPPSettings().writing().stop == tuple(theirs["generation_kwargs"]["until"])


def mbpp_file(folder: Path) -> Path:
    """Problems 2 to 4 as shots, and three to ask."""
    shots = [problem(n, f"shot_{n}", f"def shot_{n}():\r\n    return {n}", f"assert shot_{n}() == {n}")
             for n in mbpp.SHOTS]  # fmt: skip
    path = folder / "mbpp.jsonl"
    write_problems(path, [*shots, DOUBLE, NEXT, SPELL])
    return path


class Parrot(Uniform):
    """Answers every prompt alike, and remembers what it read."""

    def __init__(self, text: str) -> None:
        super().__init__({"": [text]})
        self.prompts: list[str] = []

    def decode_step(self, state: ScribeState, sampling: Sampling, generator: Generator | None) -> Emission:
        if bool((state.place == 0).all()):
            self.prompts += [bytes(row.tolist()).decode() for row in state.read]
        return super().decode_step(state, sampling, generator)


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("name", ("lm-eval-3shot", "meta-3shot"))
def test_mbpp_asks_after_three_shots(tmp_path: Path, name: Any) -> None:
    model = Parrot(f"{GOOD[12]}\r\n[DONE]")
    settings = MBPPSettings(path=str(mbpp_file(tmp_path)), protocol=name, new_tokens=60)
    found = list(mbpp.METRIC.measure(subject_of(model), settings))
    assert one(found, "pass_at_k", k=1, protocol=f"mbpp@{name}").samples == [0, 1, 0]
    assert one(found, "problems").value == 3
    end = "\r\n" if name == "lm-eval-3shot" else "\n"
    asking = "You are an expert Python programmer, and here is your task: Write {}. "
    asking += "Your code should pass these tests:\n\n"
    shots = "".join(
        asking.format(f"shot_{n}")
        + f"assert shot_{n}() == {n}\n[BEGIN]\ndef shot_{n}():{end}    return {n}\n[DONE]\n\n"
        for n in (2, 3, 4)
    )
    assert shots + asking.format("next_one") + "assert next_one(2) == 3\n[BEGIN]\n" in model.prompts
    assert len(model.prompts) == 3
    size = len(DOUBLE.code) - (name == "meta-3shot")  # one CRLF
    bits = one(found, "solution_bits_per_byte")
    assert bits.value == pytest.approx(8, rel=1e-6)
    assert bits.samples[0] * size == pytest.approx(8 * size)


def test_what_is_asked_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def note(_subject: object, problems: list[Problem], *_: object) -> Iterator[Measurement]:
        asked.append([problem.task_id for problem in problems])
        return iter(())

    monkeypatch.setattr(coding, "measure", note)
    path = tmp_path / "many.jsonl"
    write_problems(path, [replace(NEXT, task_id=n) for n in range(1, 601)])
    for settings in ({}, {"limit": 4}, {"first": 2, "last": 3, "limit": 5}):
        list(mbpp.METRIC.measure(subject_of(Parrot("")), MBPPSettings(path=str(path), **settings)))
    assert asked == [list(range(11, 511)), [11, 136, 261, 386], [2, 3]]
    with pytest.raises(ConfigError, match="no problem from 700 to 800"):
        list(mbpp.METRIC.measure(subject_of(Parrot("")), MBPPSettings(path=str(path), first=700, last=800)))


def test_a_file_without_the_shots_is_refused(tmp_path: Path) -> None:
    write_problems(tmp_path / "part.jsonl", [DOUBLE])
    with pytest.raises(ConfigError, match="problems 2, 3, 4, are not in the file"):
        list(mbpp.METRIC.measure(subject_of(Parrot("")), MBPPSettings(path=str(tmp_path / "part.jsonl"))))


def test_without_mbpp_the_reason_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCHBENCH_DATA", raising=False)
    found = list(mbpp.METRIC.measure(subject_of(Parrot("")), MBPPSettings()))
    assert {m.quantity for m in found} == set(coding.QUANTITIES)
    assert all(m.value is None and "download https://" in m.reason for m in found)
    with pytest.raises(DataError, match="cannot be read"):  # a file that was named must be there
        list(mbpp.METRIC.measure(subject_of(Parrot("")), MBPPSettings(path=str(tmp_path / "none.jsonl"))))


@pytest.mark.parametrize(
    "bad", ({"first": 5, "last": 4}, {"limit": -1}, {"samples": 0}, {"temperatures": (-1.0,)}, {"new_tokens": 0})
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MBPPSettings(**bad)
    if "limit" not in bad and "first" not in bad:
        with pytest.raises(ConfigError):
            MiniSettings(**bad)
    with pytest.raises(ConfigError):
        MiniSettings(problems=-1)


# --- mbpp-mini


@pytest.mark.usefixtures("sandbox")
def test_mbpp_mini_of_a_scribe_that_knows_some() -> None:
    test = mbpp_mini.problems("test")[:4]
    script = {mbpp_mini.prompt(p): [f"{p.code}\n[DONE]\n"] * 3 for p in test[:3]}
    script[mbpp_mini.prompt(test[3])] = ["def nothing(): return 0[DONE]"] * 3
    found = list(MINI.measure(subject_of(Uniform(script)), MiniSettings(problems=4, samples=3)))
    for temperature in (0.0, 0.5):
        assert one(found, "pass_at_k", k=1, temperature=temperature).samples == [1, 1, 1, 0]
    assert one(found, "solution_bits_per_byte").value == pytest.approx(8, rel=1e-6)
    assert found[0].at == {"protocol": "mbpp-mini@0shot"}


@pytest.mark.usefixtures("sandbox")
def test_a_model_that_writes_noise_scores_nothing() -> None:
    settings = MiniSettings(problems=2, samples=10, new_tokens=20)
    found = list(MINI.measure(built("transformer", d_model=8, n_layers=1, n_heads=1), settings))
    assert one(found, "pass_at_k", k=10).value == 0
    assert one(found, "valid_syntax", temperature=0.5).value < 0.5
    assert 6 < (one(found, "solution_bits_per_byte").value or 0) < 10


# --- where problems come from


def test_problems_of_the_hub_are_those_of_the_file() -> None:
    rows = [("test:0", {**asdict(NEXT), "test_list": list(NEXT.test_list)}), ("prompt:0", asdict(DOUBLE))]
    assert problems_of("hf:somebody/mbpp", rows) == [DOUBLE, NEXT]


@pytest.mark.parametrize(
    ("row", "said"),
    (
        ({"task_id": 1, "text": "t", "code": "c"}, "test:0.test_list: required key is missing"),
        ({"task_id": 1, "prompt": "t"}, "test:0.prompt: unknown key"),
        ({**asdict(NEXT), "test_list": [3]}, r"test:0.test_list\[0\]: found 3"),
    ),
)
def test_rows_of_another_schema_are_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=rf"hf:x/y: {said}.*google-research-datasets/mbpp"):
        problems_of("hf:x/y", [("test:0", row)])
    with pytest.raises(DataError, match="task_id 12 comes a second time"):
        problems_of("hf:x/y", [("a:0", asdict(NEXT)), ("b:0", asdict(NEXT))])


def test_without_network_or_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"hf:a/b: cannot be loaded \(ConnectionError: .* on the Hub\); .*mbpp.jsonl"):
        load_problems("hf:a/b")
    monkeypatch.setattr(problem_sources, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install 'archbench\[hub\]'"):
        load_problems("hf:a/b")


def test_the_hub_s_splits_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"test": [asdict(NEXT)], "prompt": [asdict(DOUBLE)]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits if name == "a/b" else {})
    assert load_problems("hf:a/b") == [DOUBLE, NEXT]


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_problems(tmp_path / "nowhere" / "x.jsonl", [])
    write_problems(tmp_path / "x.jsonl", [NEXT])
    assert json.loads((tmp_path / "x.jsonl").read_text())["task_id"] == 12
