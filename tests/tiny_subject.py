"""A cell to measure costs of: any model, on a few kilobytes of made-up text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from archbench import registry
from archbench.codec import ByteCodec
from archbench.data.corpus import Corpus
from archbench.data.document import Document
from archbench.history import History
from archbench.metric import Subject
from archbench.model import SequenceModel, Traits


def made_up_text(n_bytes: int = 8_192) -> bytes:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(200)]
    return " ".join(draw.choice(words) for _ in range(n_bytes)).encode()[:n_bytes]


def subject_of(
    model: SequenceModel,
    architecture: str = "none",
    config: Any = None,
    history: History | None = None,
    text: bytes | None = None,
    **traits: Any,
) -> Subject:
    """A subject around `model`, trained (so it claims) in windows of 16 tokens, 2 rows a batch."""
    document = Document("text", made_up_text() if text is None else text)
    return Subject(
        label="tiny",
        architecture=architecture,
        config=config,
        model=model.eval(),
        traits=Traits(**{"likelihood": True, **traits}),
        codec=ByteCodec(),
        corpus=Corpus(name="made up", train=(), heldout=(document,), sha256=""),
        history=history or History(),
        context=16,
        batch=2,
        seed=0,
        folder=Path(),
    )


def built(architecture: str, **options: Any) -> Subject:
    """A subject of one of our architectures with the byte vocabulary."""
    found = registry.architecture(architecture)
    config = found.config(vocab_size=256, **options)
    model = found.build(config, torch.Generator().manual_seed(0))
    limit = found.traits(config).context_limit
    return subject_of(model, architecture, config, context_limit=limit)
