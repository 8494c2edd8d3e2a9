"""Decode steps of attention models: a few new tokens of every row through the whole model, with their levels (see
`decode_ladder`)."""

from __future__ import annotations

from typing import TypeAlias

from archbench.ops.decode_ladder import Ladder
from archbench.ops.decode_lean import LeanDecoder
from archbench.ops.decode_native import NativeDecoder
from archbench.ops.decode_weights import LONGEST, DecoderWeights

Decoder: TypeAlias = LeanDecoder | NativeDecoder
Decoders: TypeAlias = Ladder[DecoderWeights, Decoder]


def decoders() -> Decoders:
    """Those of a model that has not stepped yet."""
    return Ladder({"lean": LeanDecoder, "native": NativeDecoder}, LONGEST)
