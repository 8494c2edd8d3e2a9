"""Multi-token prediction: one trunk predicts the next n tokens, and drafts them for itself when it writes.

    z_t   = trunk(x_1..x_t)                                        residual stream before the final norm
    P(x_{t+i} | x_1..x_t) = softmax(head_i(z_t)),  i = 1..n        heads are independent given z
    L_n   = sum_i w_i mean_t -log P(x_{t+i} | x_1..x_t)            trained together; quality is that of head 1 alone

Head 1 is the ordinary next-token head: trunk and head 1 are a Transformer, whose file's blocks are used here. When
writing, heads 2..k guess what follows the next token and head 1 checks the guesses in one pass (self-speculative
decoding): up to k tokens a step, the same ones that the next-token path would have written alone, or when sampling
tokens of the same law.

Where heads are layers (`match: params`), the parameters are those of a Transformer of n_layers layers: n - 1 layers
move from the trunk to the heads, so the next-token path has n_layers - n + 1. A replicated unembedding moves nothing
and adds (n - 1) V d parameters; shared sizes contain them.

Which head type is the default depends on the vocabulary. Up to 1024 tokens (bytes) it is `replicated`, as in the
paper's byte models: at V = 256 its surplus is small (14 % of a 1.6M model for n = 8, and it vanishes with width), it
drafts in one product a head, and it takes no layer from a trunk that has but three or four. With four heads of type
`layer` a small model would keep a next-token path of one to three layers; at 1.65M parameters such a model was no
better in bits per byte, and its speculative decoding was slower than its plain one. Above, where V d would exceed a
layer's 12 d^2, it is `layer`, the paper's choice for its 32k vocabulary.

The default weights w_i = 0.5^(i-1) below width 512 depart from the paper's plain sum for a reason measured at 1.9M
parameters with n = 8: head 1 stood at 2.63 bits per byte with the plain sum, 2.15 with these, 2.20 without any extra
head (one seed). The paper finds the same below about 1.3B parameters, and its plain sum is the default from 512 on.

Drafts are drawn from their heads when tokens are sampled: at temperature 1, 0.4M parameters and 200 kB of training, a
step then writes 2.2 tokens and takes a seventh longer; with the likeliest tokens as drafts it writes 1.3 (one seed).

    config   sizes and choices          rows    rows of a batch at different places of their caches
    heads    heads 2..n                 verify  which drafts stay
    loss     head-by-head backward      flops   what it costs             model   the model

Sources: Gloeckle et al. 2024, 2404.19737 (the paper); Stern et al. 2018, 1811.03115 (blockwise decoding); Leviathan et
al. 2023, 2211.17192 (sampling); DeepSeek-V3 2024, 2412.19437, section 2.2 (`sequential` heads, an extension);
Aynetdinov & Akbik 2025, 2505.22757 (curricula). Departures: weights and head type by size, as above; a step's first
token is verified, not certain, so that a state after any text can write, and tokens per step count alike.

Letters: b batch, t time, d width, v vocabulary, n heads (n_future), k tokens of a block, s positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from archbench.architectures import transformer
from archbench.architectures.mtp.config import MTPConfig
from archbench.architectures.mtp.model import MTP
from archbench.architectures.transformer import TransformerConfig
from archbench.errors import ConfigError
from archbench.model import Architecture, Traits


@lru_cache
def candidates(vocab_size: int) -> tuple[MTPConfig, ...]:
    """The Transformer's candidates with four heads, made deeper where its layers are too few for them. Below width 64,
    where heads are a large part, one more layer is offered."""
    found: dict[MTPConfig, None] = {}
    for config in transformer.candidates(vocab_size):
        options = {field.name: getattr(config, field.name) for field in fields(TransformerConfig)}
        wanted = 2 if config.d_model < 64 else 1
        for n_layers in range(config.n_layers, config.n_layers + MTPConfig.n_future + wanted):
            try:
                found[MTPConfig(**{**options, "n_layers": n_layers})] = None
            except ConfigError:
                continue
            wanted -= 1
            if not wanted:
                break
    return tuple(sorted(found, key=lambda config: config.n_parameters))


def _paper(d_model: int, n_layers: int, n_heads: int) -> Mapping[str, Any]:
    return {
        "vocab_size": 32_000,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_future": 4,
        "head_type": "layer",
        "loss_ratio": 1.0,
    }


ARCHITECTURE = Architecture(
    config=MTPConfig,
    build=MTP,
    traits=lambda config: Traits(
        likelihood=True,
        context_limit=config.max_context,
        lookahead=config.n_future,
        answers=True,
        speculates=config.block > 1,
    ),
    paper="Gloeckle et al. 2024, Better & Faster Large Language Models via Multi-token Prediction, 2404.19737",
    candidates=candidates,
    published={
        # Table S14, code models, with the n = 4 of tables 1 and S7.
        "0.3b": _paper(1024, 18, 16),
        "0.6b": _paper(1280, 27, 20),
        "1.3b": _paper(2048, 24, 16),
        "3b": _paper(2560, 36, 20),
        "6.7b": _paper(4096, 32, 32),
        "13b": _paper(5120, 40, 40),
        # Table 1, first block: bytes with n = 8, whose heads are unembeddings (caption of table S13).
        "6.7b-bytes": {**_paper(4096, 32, 32), "vocab_size": 256, "n_future": 8, "head_type": "replicated"},
    },
)
