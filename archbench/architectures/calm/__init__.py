"""CALM, continuous autoregressive language model: K tokens a step, drawn as one vector, without probabilities.

Text is cut into chunks of K tokens. Two networks, trained one after the other:

    autoencoder        chunk <-> latent z of width l, each chunk by itself; then frozen           autoencoder
    language model     chunks before -> hidden h (a Transformer over chunks) -> sample of z       backbone, heads
                       z -> frozen decoder -> argmax: K tokens, which are read back               model

There is no softmax over the vocabulary, hence no likelihood: training scores samples (energy), evaluation compares them
with the text (BrierLM), and lower temperatures reject samples (temperature).

    paper          here
    K, l           chunk_size, d_latent
    N, M, alpha    n_samples, n_targets, energy_exponent
    beta, lambda   kl_weight, kl_floor

Source: Shao, Li, Meng & Zhou 2025, Continuous Autoregressive Language Models, 2510.27688. What the text leaves out (the
head's layers) is as in the official code. Departures stand in the module they concern; beside those, learning rates are
multiples of the cell's, warm-up and cosine are the trainer's, and chunks fall anywhere in the text in both phases.
"""

from __future__ import annotations

from archbench.architectures.calm.config import PUBLISHED, CalmConfig, candidates
from archbench.architectures.calm.model import Calm
from archbench.architectures.calm.paper import PaperFlops
from archbench.model import Architecture, Traits

__all__ = ["ARCHITECTURE", "Calm", "CalmConfig"]

ARCHITECTURE = Architecture(
    config=CalmConfig,
    build=Calm,
    traits=lambda config: Traits(likelihood=False, stride=config.chunk_size, reconstruction=True),
    paper="Shao et al. 2025, Continuous Autoregressive Language Models, 2510.27688",
    candidates=candidates,
    published=PUBLISHED,
    paper_flops=PaperFlops,
)
