"""Level `cuda` of attention: flash-attn's kernel, fitted to our signature. No GPU has run this file yet; the probe
compares the kernel with the reference before anything is computed with it."""

from __future__ import annotations

import functools
import importlib

import torch
from jaxtyping import Float
from torch import Tensor

from archbench.ops.attention_reference import written_out

INSTALL = "install torch and a CUDA toolkit first, then: pip install --no-build-isolation flash-attn"


def flash(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b g s e"], v: Float[Tensor, "b g s e"]
) -> Float[Tensor, "b h t e"]:
    """flash-attn's tensors are (b, t, h, e); its causal mask is aligned to the last position, as ours is."""
    kernel = importlib.import_module("flash_attn").flash_attn_func
    return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)


@functools.cache
def flash_reason() -> str:
    """'ok', or why flash-attn cannot run on the current device."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
        q, k, v = (x.to("cuda", torch.bfloat16) for x in (draw(1, 4, 8, 64), draw(1, 2, 16, 64), draw(1, 2, 16, 64)))
        distance = (flash(q, k, v).float() - written_out(q.float(), k.float(), v.float())).abs().max().item()
    except Exception as error:  # foreign compiled code: whatever it raises is the reason
        return f"{type(error).__name__}: {error}; {INSTALL}"
    return "ok" if distance < 0.05 else f"the kernel differs from the reference by {distance:.1e}; {INSTALL}"
