"""Every architecture there is keeps every promise of the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archbench import registry
from archbench.architectures.infini_attention import InfiniConfig
from archbench.architectures.local import LocalConfig
from archbench.architectures.mamba import MambaConfig
from archbench.architectures.mamba2 import Mamba2Config
from archbench.architectures.memorizing_transformer import MemorizingConfig
from archbench.architectures.mtp import MTPConfig
from archbench.architectures.ngram import NgramConfig
from archbench.architectures.transformer import TransformerConfig
from archbench.architectures.transformer_xl import TransformerXLConfig
from archbench.contract import PROMISES, VOCAB_SIZE, Candidate, smallest, verify

torch.set_num_threads(1)

SMALL_TRANSFORMER: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 4}
SMALL_MAMBA: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 16, "n_layers": 2}
SMALL_MTP: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 16, "n_heads": 2}
SMALL_SEGMENTS: dict[str, Any] = {**SMALL_TRANSFORMER, "n_layers": 1, "segment": 7}
"""Segments that end inside the contract's texts, at odd places (the default's are longer than the texts)."""

VARIANTS = {
    "transformer": {
        "grouped": TransformerConfig(**SMALL_TRANSFORMER, n_kv_heads=2),
        "limited": TransformerConfig(**SMALL_TRANSFORMER, max_context=40),
        "no positions, convolution": TransformerConfig(**SMALL_TRANSFORMER, rotary=False, frontend_conv=4),
        "tied": TransformerConfig(**SMALL_TRANSFORMER, n_kv_heads=1, tie_embeddings=True, boundary=3),
    },
    "mamba": {
        "narrow": MambaConfig(**SMALL_MAMBA, d_conv=2, d_state=1),
        "untied": MambaConfig(**SMALL_MAMBA, d_state=5, tie_embeddings=False, boundary=3),
    },
    "mamba2": {
        "groups, limited steps": Mamba2Config(
            **SMALL_MAMBA, d_state=3, head_dim=8, n_groups=2, d_conv=2, step_floor=0.01, step_ceiling=0.1
        ),
    },
    "mtp": {
        "layers": MTPConfig(**SMALL_MTP, n_layers=3, n_future=2, head_type="layer", draft_policy="point", n_kv_heads=1),
        "sequential": MTPConfig(**SMALL_MTP, n_layers=3, n_future=3, head_type="sequential", max_context=40),
        "eight, frozen trunk": MTPConfig(
            **SMALL_MTP, n_layers=1, n_future=8, head_type="replicated", training="frozen_trunk"
        ),
    },
    "local": {"segments of 7": LocalConfig(**SMALL_SEGMENTS, n_kv_heads=2, tie_embeddings=True, frontend_conv=3)},
    "infini_attention": {
        "segments of 7": InfiniConfig(**SMALL_SEGMENTS, n_kv_heads=2, gate_init=2.0),
        "segments of 8, delta": InfiniConfig(
            **{**SMALL_SEGMENTS, "segment": 8}, update="delta", rotary=False, first_segment="bypass"
        ),
    },
    "transformer_xl": {"segments of 7": TransformerXLConfig(**SMALL_SEGMENTS, memory=7, tie_embeddings=True)},
    "memorizing_transformer": {"segments of 7": MemorizingConfig(**SMALL_SEGMENTS, memory=11, top_k=3, n_kv_heads=2)},
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
