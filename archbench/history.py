"""The training log of a cell: plain data, kept beside its checkpoint and read by metrics and reports."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from archbench.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Point:
    """The state of training at the end of a step of `phase`.

    `step`, `tokens`, `bytes`, `flops`, `seconds` (wall) and `cpu_seconds` are totals since training began, over all
    sessions if it was interrupted. `loss` is the mean over the steps since the previous point, in nats per token where
    the phase's loss is a likelihood; `parts` are the loss's named parts, averaged in the same way.
    """

    phase: str
    step: int
    tokens: int
    bytes: float
    flops: float
    seconds: float
    cpu_seconds: float
    loss: float
    learning_rate: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class History:
    """All points of a training, and what was decided before it began.

    `precision` is what the model trained in ("fp32" or "bf16-mixed") and `precision_reason` says why;
    `matmul_peak` is the FLOP/s of the best matrix product seen in the same process, threads and precision;
    `sessions` counts how often training was started or resumed; `backend` is the kernel level each operation ran at.
    """

    precision: str = "fp32"
    precision_reason: str = ""
    matmul_peak: float = 0.0
    threads: int = 1
    sessions: int = 1
    device: str = "cpu"
    backend: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str | Path) -> History:
        """Raises CheckpointError when the text is not a history."""
        try:
            data = json.loads(text)
            return cls(**{**data, "points": [Point(**point) for point in data["points"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{where}: not a history ({error}); delete its folder and run again") from None
