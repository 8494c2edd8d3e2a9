"""How the paper counts, reconstructed from the caption of its table 1; the model's own formulas stand in `model`.

Per chunk of K tokens, a multiply-add being 2, attention at the full context of c chunks:

    backbone   B = 2 W + 4 c d layers        W: weights of the layers without norms
    inputs     I = 2 (2 K d^2 + 2 d^2)
    head       H = 2 (6 blocks d^2 + 2 d^2 + noise d + l d)                one sample
    encoder    E,  decoder D = that of K tokens, their logits included

    writing a token    (B + I + H + D) / K
    training a token   (3 (B + I + N H) + E) / K      N samples, each with the whole head; no loss, no autoencoder

This gives the parameters, and to the printed digits the FLOPs, of CALM-M and of two of the three Transformers. It
overshoots the FLOPs of CALM-L in training (5 %) and of CALM-XL in both columns (3 and 10 %): the rest of the paper's
rule is not stated. What departs from our count: what depends on the hidden vector alone is charged for each of the N
samples, although it need be computed once; the energy loss and the autoencoder's own training are left out.

Source: Shao et al. 2025, 2510.27688, table 1.
"""

from __future__ import annotations

from archbench.architectures.calm.config import CalmConfig
from archbench.model import FlopFormulas


class PaperFlops(FlopFormulas):
    """The rule above, in tokens; contexts that are no whole chunks are rounded down. `causal` weighs attention over a
    window: 1 is the paper's."""

    def __init__(self, config: CalmConfig) -> None:
        self.config = config

    def training(self, context: int, causal: float = 0.5) -> float:
        """The share of the budget that the autoencoder is trained with costs nothing here."""
        n, samples = context // self.config.chunk_size, self.config.n_samples
        passes = 3 * (self._reading(causal * n) + samples * self._head)
        return (1 - self.config.autoencoder_share) * n * (passes + self._encoder)

    def prefill(self, n: int, context: int = 0, causal: float = 0.5) -> float:
        chunks = n // self.config.chunk_size
        return chunks * self._reading(causal * chunks + context // self.config.chunk_size)

    def decode(self, context: int) -> float:
        return self._reading(context // self.config.chunk_size) + self._head + self._decoder

    def further_draw(self) -> float:
        return self._head + self._decoder

    def _reading(self, attended: float) -> float:
        """One chunk through inputs and backbone."""
        c, d = self.config, self.config.d_model
        weights = c.n_layers * (4 * d * d + 3 * d * c.ffn_width)
        inputs = 2 * (2 * c.chunk_size * d * d + 2 * d * d)
        return 2 * weights + 4 * attended * d * c.n_layers + inputs

    @property
    def _head(self) -> float:
        c, d = self.config, self.config.d_model
        return 2 * (6 * c.head_blocks * d * d + 2 * d * d + c.d_noise * d + c.latent_width * d)

    @property
    def _encoder(self) -> float:
        c, w = self.config, self.config.autoencoder_width
        return self._autoencoder_blocks + 2 * (c.chunk_size * w * w + 2 * w * c.latent_width)

    @property
    def _decoder(self) -> float:
        c, w = self.config, self.config.autoencoder_width
        logits = 2 * c.chunk_size * c.vocab_size * w
        return self._autoencoder_blocks + 2 * (c.latent_width * w + c.chunk_size * w * w) + logits

    @property
    def _autoencoder_blocks(self) -> float:
        """Half of them see tokens, half chunks."""
        c = self.config
        each = 2 * 3 * c.autoencoder_width * c.autoencoder_ffn_width
        return c.n_autoencoder_blocks // 2 * each * (c.chunk_size + 1)
