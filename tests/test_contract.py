"""Every architecture there is keeps every promise of the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archbench import registry
from archbench.architectures.mamba import MambaConfig
from archbench.architectures.ngram import NgramConfig
from archbench.architectures.transformer import TransformerConfig
from archbench.contract import PROMISES, VOCAB_SIZE, Candidate, smallest, verify

torch.set_num_threads(1)

SMALL_TRANSFORMER: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 4}
SMALL_MAMBA: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 16, "n_layers": 2}

VARIANTS = {
    "transformer": {
        "grouped": TransformerConfig(**SMALL_TRANSFORMER, n_kv_heads=2),
        "limited": TransformerConfig(**SMALL_TRANSFORMER, max_context=40),
        "tied": TransformerConfig(**SMALL_TRANSFORMER, n_kv_heads=1, tie_embeddings=True, boundary=3),
    },
    "mamba": {
        "narrow": MambaConfig(**SMALL_MAMBA, d_conv=2, d_state=1),
        "untied": MambaConfig(**SMALL_MAMBA, d_state=5, tie_embeddings=False, boundary=3),
    },
    "ngram": {
        "unigram": NgramConfig(vocab_size=VOCAB_SIZE, order=1),
        "trigram": NgramConfig(vocab_size=VOCAB_SIZE, order=3),
    },
}


def candidates() -> list[Any]:
    """The smallest config of every architecture, and further ones that take other paths through ours."""
    found = []
    for name in registry.architectures():
        found.append(pytest.param((name, None), id=name))
        for label, config in VARIANTS.get(name, {}).items():
            found.append(pytest.param((name, config), id=f"{name}-{label}"))
    return found


@pytest.fixture(scope="module", params=candidates())
def subject(request: pytest.FixtureRequest) -> Candidate:
    name, config = request.param
    architecture = registry.architecture(name)
    return Candidate(architecture=architecture, config=config or smallest(architecture))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise(subject: Candidate, promise: Any) -> None:
    finding = verify(promise, subject)
    assert finding.verdict != "broken", finding.detail


def test_variants_name_architectures_that_exist() -> None:
    assert set(VARIANTS) <= set(registry.architectures())
