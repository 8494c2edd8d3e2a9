"""Decode steps of Mamba and Mamba-2: a few new tokens of every row through the whole model, with their levels (see
`decode_ladder`)."""

from __future__ import annotations

from typing import TypeAlias

from archbench.ops.decode_ladder import Ladder
from archbench.ops.recurrent_lean import LeanStepper
from archbench.ops.recurrent_native import NativeStepper
from archbench.ops.recurrent_weights import LONGEST, RecurrentWeights

Stepper: TypeAlias = LeanStepper | NativeStepper
Steppers: TypeAlias = Ladder[RecurrentWeights, Stepper]


def steppers() -> Steppers:
    """Those of a model that has not stepped yet."""
    return Ladder({"lean": LeanStepper, "native": NativeStepper}, LONGEST)
