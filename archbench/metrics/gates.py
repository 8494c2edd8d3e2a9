"""How far each head of a model trusts its memory: the gates it learned, and whether it learned any.

A gate g weighs what a head recalls from memory, 1 - g what it sees locally. Gates start at one value, 0.5 unless
configured otherwise; trained too slowly, or with weight decay, they stay there, and the memory is then read with a
weight that nobody chose. Of several seeds each has its own.

Source: Munkhdalai et al. 2024, 2404.07143, section 2.2 and figure 3 (heads specialise to 0 or 1, or mix); Wu et al.
2022, 2203.08913, section 3.2.

Letters: l layers that have a memory, h heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from archbench.metric import Measurement, Metric, Quantity, Subject

NONE = "the model has no gates between a memory and local attention"


@runtime_checkable
class Gated(Protocol):
    """A model whose heads mix a memory with local attention."""

    def gates(self) -> Float[Tensor, ...]:
        """The memory's weight in every head, 0 to 1: (l, h), or (h) of the only layer that has a memory."""


@dataclass(frozen=True, kw_only=True)
class GatesSettings:
    """Nothing to set."""


class GatesMetric(Metric):
    name = "gates"
    version = 1
    settings = GatesSettings
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "gate": Quantity(
            unit="fraction", better="neither", meaning="weight of the memory in a head; the rest is local"
        ),
        "spread": Quantity(
            unit="fraction",
            better="neither",
            meaning="largest gate less smallest; 0 where no head differs from another",
        ),
    }

    def measure(self, subject: Subject, settings: GatesSettings) -> Iterator[Measurement]:
        """Layers and heads count from 1; layers are those that have a memory."""
        del settings
        if not isinstance(subject.model, Gated):
            for quantity in self.quantities:
                yield Measurement(quantity=quantity, value=None, reason=NONE)
            return
        gates = torch.atleast_2d(subject.model.gates()).float()
        for layer, heads in enumerate(gates.tolist(), start=1):
            for head, gate in enumerate(heads, start=1):
                yield Measurement(quantity="gate", value=gate, at={"layer": layer, "head": head})
        yield Measurement(quantity="spread", value=float(gates.max() - gates.min()))


METRIC = GatesMetric()
