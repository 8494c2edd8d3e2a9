"""The tasks a user names, as lm-eval's task objects: lm-eval's own, those of YAML files, and ours over local files.

wikitext                     lm-eval's own; most fetch their data from the Hugging Face hub
tasks/mine.yaml, tasks/      a task's or group's file, or every task below a folder; a path has a '/' or ends in .yaml
text:PATH                    bits per byte of a text file, of the text files below a folder, or of a .jsonl file
heldout[:BYTES[:PER_TEXT]]   bits per byte of the held-out text of the checkpoint's own training corpus; the limits
                             are those of the metric `likelihood`, so that equal ones give its number
mbpp:PATH                    Python problems from a copy of mbpp.jsonl, three shots, judged in archbench's sandbox
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archbench.cell import Cell
from archbench.codec import Codec
from archbench.data import files
from archbench.data.cache import cache_dir
from archbench.data.document import Document
from archbench.data.windows import heldout_documents
from archbench.errors import CheckpointError, ConfigError, DataError, suggestion
from archbench.metrics.likelihood import LikelihoodSettings
from archbench.plan import corpus_of

Config = dict[str, Any]
"""A task as lm-eval's YAML files describe one, functions included."""

VERSION = 1
"""Of our tasks, in lm-eval's results; raised whenever the meaning of their numbers changes."""


@dataclass
class Asked:
    """What was named, sorted by where it comes from."""

    own: list[Config] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def local(self) -> bool:
        """Nothing of it needs the network, unless a user's YAML file says so."""
        return not self.names


def sort_out(specs: Sequence[str], cell: Cell | None, codec: Codec) -> Asked:
    """Reads what `--tasks` names, and the local files of our own tasks.

    `cell` is what the checkpoint was trained as, None for an imported one.

    Raises:
        ConfigError: nothing is named, or not in a known form.
        DataError: a file is missing or holds no text.
        CheckpointError: `heldout` of a checkpoint that was not trained here.
    """
    asked = Asked()
    for spec in specs:
        kind, _, argument = spec.partition(":")
        if kind == "heldout":
            asked.own.append(_rolling(spec, _heldout_texts(spec, argument, cell, codec)))
        elif kind == "text":
            asked.own.append(_rolling(spec, _texts(spec, argument)))
        elif kind == "mbpp" and argument:
            asked.own.append(_mbpp(spec, argument))
        elif "/" in spec or spec.endswith((".yaml", ".yml")):
            path = Path(spec).expanduser()
            if not path.exists():
                raise DataError(f"--tasks {spec}: no such file or folder (looked in {Path.cwd()})")
            asked.paths.append(path)
        elif ":" in spec:
            raise ConfigError(f"--tasks {spec}: not known; {suggestion(kind, ('text', 'heldout', 'mbpp'))}")
        elif spec:
            asked.names.append(spec)
    if not (asked.own or asked.paths or asked.names):
        raise ConfigError("--tasks: names no task; for instance heldout, text:notes.txt or tasks/mine.yaml")
    return asked


def stay_offline() -> None:
    """Tells the Hugging Face libraries, for the rest of this process, not to ask the network and to keep what they
    prepare in our cache. Must come before they are imported; what the user's environment says goes first."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache_dir() / "lm-eval"))


def load(asked: Asked) -> list[Any]:
    """lm-eval's tasks and groups. Imports lm-eval.

    Raises:
        DataError: lm-eval cannot find or load one; its reason in one line.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=[str(path) for path in asked.paths if path.is_dir()], include_defaults=bool(asked.names)
    )
    found: dict[str, Any] = {}
    with _quiet():  # lm-eval warns of what ours do on purpose
        for config in asked.own:
            found.update(_loaded(manager, config, config["task"]))
    for name in asked.names:
        if name not in manager.all_tasks:
            raise DataError(f"--tasks {name}: lm-eval has no such task; {_near(name, manager.all_tasks)}")
        found.update(_loaded(manager, name, name))
    for path in asked.paths:
        for spec in _below(path) if path.is_dir() else [str(path)]:
            found.update(_loaded(manager, spec, str(path)))
    return list(found.values())


def _below(folder: Path) -> list[str]:
    from lm_eval.tasks import TaskManager

    names = TaskManager(include_path=str(folder), include_defaults=False).all_subtasks
    if not names:
        raise DataError(f"--tasks {folder}: no YAML file below this folder describes a task")
    return names


def _loaded(manager: Any, spec: str | Config, where: str) -> dict[str, Any]:
    """Groups that no other group holds, and tasks that are in none, by name."""
    try:
        loaded = manager.load([spec])
    except Exception as error:  # tasks run code of their own, and fetch from anywhere
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        offline = "; HF_HUB_OFFLINE=1 keeps it from the network" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        found = f"{type(error).__name__}: {reason}"
        raise DataError(f"--tasks {where}: lm-eval cannot load it ({found}){offline}") from error
    groups = loaded["groups"]
    inner = {name for children in loaded["group_map"].values() for name in children}
    grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    tops = {name: group for name, group in groups.items() if name not in inner}
    return tops | {name: task for name, task in loaded["tasks"].items() if name not in grouped}


def _near(name: str, known: Sequence[str]) -> str:
    hint = suggestion(name, known)
    return hint if hint.startswith("did you mean") else "see `lm_eval ls tasks`"


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _rolling(name: str, texts: Sequence[str]) -> Config:
    """Bits per byte, byte perplexity and word perplexity of these texts."""
    metrics = ("bits_per_byte", "byte_perplexity", "word_perplexity")
    return _config(name, [{"text": text} for text in texts]) | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",  # the column as it is; a template would read "[1, 2]" as a list
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": _AGGREGATION[metric], "higher_is_better": False} for metric in metrics
        ],
    }


_AGGREGATION = {
    "bits_per_byte": "bits_per_byte",
    "byte_perplexity": "weighted_perplexity",
    "word_perplexity": "weighted_perplexity",
}


def _mbpp(name: str, argument: str) -> Config:
    from archbench.integrations import lm_eval_mbpp

    rows, options = lm_eval_mbpp.task(f"--tasks {name}", Path(argument).expanduser())
    return _config(name, rows) | options


def _config(name: str, rows: Sequence[Mapping[str, Any]]) -> Config:
    """A task over these rows; what it asks comes on top."""

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list([dict(row) for row in rows])}

    return {"task": name, "custom_dataset": dataset, "test_split": "test", "metadata": {"version": VERSION}}


def _heldout_texts(spec: str, argument: str, cell: Cell | None, codec: Codec) -> list[str]:
    if cell is None:
        raise CheckpointError(
            f"--tasks {spec}: this checkpoint was imported and has no held-out text of its own; use text:PATH"
        )
    usual = LikelihoodSettings()
    limits = [usual.max_bytes, usual.max_document_bytes]
    given = argument.split(":") if argument else []
    if len(given) > len(limits) or not all(number.isascii() and number.isdigit() for number in given):
        raise ConfigError(f"--tasks {spec}: expected heldout, heldout:BYTES or heldout:BYTES:BYTES_PER_TEXT")
    limits[: len(given)] = map(int, given)
    corpus = corpus_of(cell.corpus)
    if corpus.sha256 != cell.corpus_sha256:
        raise CheckpointError(
            f"--tasks {spec}: corpus {cell.corpus} has changed since the training ({corpus.sha256[:12]} instead of "
            f"{cell.corpus_sha256[:12]}), and what was held out may be training text now; use text:PATH"
        )
    documents = heldout_documents(corpus, codec, *limits)
    return [codec.decode(document.tokens.numpy()).decode() for document in documents]


def _texts(spec: str, argument: str) -> list[str]:
    if not argument:
        raise ConfigError(f"--tasks {spec}: names no file; write text:PATH")
    if not Path(argument).expanduser().exists():
        raise DataError(f"--tasks {spec}: no such file or folder (looked in {Path.cwd()})")
    documents = files.read_jsonl(argument) if argument.endswith(".jsonl") else files.read_tree(argument)
    texts = [_decoded(spec, document) for document in documents if document.text]
    if not texts:
        raise DataError(f"--tasks {spec}: holds no text")
    return texts


def _decoded(spec: str, document: Document) -> str:
    try:
        return document.text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"--tasks {spec}: {document.name}: not UTF-8 at byte {error.start}; convert it") from None
