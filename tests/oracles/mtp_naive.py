"""Multi-token prediction once more, slowly, in Python floats (fp64): all heads over a whole text, and drafts from them.

Written from the papers' equations; blocks, norms and products are those of the Transformer's oracle.

    z            the trunk's output: the residual stream after its blocks, before the final norm
    head 1       `layer`: the last of `blocks`; else nothing                      logits_1 = U N(head_1(z))
    replicated   logits_i = U_i N(z)                                              Gloeckle et al. 2024, appendix B
    layer        logits_i = U N(block_i(z))                                       Gloeckle et al. 2024, section 2
    sequential   h_i = block_i(M_i [N h_{i-1}; N E x_{t+i-1}]), h_1 = z           DeepSeek-V3 2024, section 2.2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles.transformer_naive import Matrix, Vector, block, norm, times


def logits(weights: Mapping[str, Tensor], config: Any, tokens: list[int], head: int) -> Matrix:
    """Logits of a head (1..n) after each of the tokens at positions 0, 1, ...; a sequential head has none after the
    last head - 2, since it reads tokens further on."""
    w = {name: tensor.double().tolist() for name, tensor in weights.items()}
    return _logits(w, config, tokens, head)


def drafts(weights: Mapping[str, Tensor], config: Any, tokens: list[int], n: int) -> list[int]:
    """The likeliest tokens of heads 2..n+1 at the position before the last token: guesses at what comes after the token
    that follows. Sequential heads go on from the drafts before theirs."""
    w = {name: tensor.double().tolist() for name, tensor in weights.items()}
    found: list[int] = []
    for head in range(2, n + 2):
        rows = _logits(w, config, tokens + found, head)
        row = rows[len(tokens) - 2]
        found.append(max(range(len(row)), key=row.__getitem__))
    return found


def _logits(w: Mapping[str, Any], config: Any, tokens: list[int], head: int) -> Matrix:
    stream = [list(w["embedding.weight"][token]) for token in tokens]
    kind = config.head_type
    n_blocks = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    n_trunk = n_blocks - (kind == "layer")
    for layer in range(n_trunk):
        stream = block(w, f"blocks.{layer}", config, stream)
    unembedding = "unembedding.weight"
    if kind == "layer":
        stream = block(w, f"blocks.{n_trunk}" if head == 1 else f"extra_heads.heads.{head - 2}", config, stream)
    elif kind == "replicated" and head > 1:
        unembedding = f"extra_heads.heads.{head - 2}.weight"
    elif kind == "sequential":
        for i in range(head - 1):
            stream = _module(w, f"extra_heads.heads.{i}", config, stream, tokens[i + 1 :])
    return [times(w[unembedding], norm(w["norm.weight"], u, config.norm_eps)) for u in stream]


def _module(w: Mapping[str, Any], name: str, config: Any, hidden: Matrix, ahead: list[int]) -> Matrix:
    merged: list[Vector] = []
    for h, token in zip(hidden, ahead, strict=False):
        left = norm(w[f"{name}.norm_hidden.weight"], h, config.norm_eps)
        right = norm(w[f"{name}.norm_token.weight"], w["embedding.weight"][token], config.norm_eps)
        merged.append(times(w[f"{name}.merge.weight"], left + right))
    return block(w, f"{name}.block", config, merged)
