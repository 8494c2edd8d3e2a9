"""Decode steps of Mamba and Mamba-2, level `lean`: one torch loop without module calls, one token of every row.

A step of a few rows is not arithmetic but calls, so it makes few of them (see `lean_stream`), and what does not change
from step to step, exp(A_log) above all, is made once. Recurrence and state are fp32 at least.

Letters: b rows, d width, c inner width, n states, v vocabulary, h heads, g groups, p head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from archbench.ops.lean_stream import LeanStream, transposed
from archbench.ops.recurrent_weights import LastStates, MixerWeights, RecurrentWeights, States


class _Mixer(NamedTuple):
    """A block's weights as the loop wants them; `x_proj`, `dt_proj` are empty in Mamba-2, `inner_norm` in Mamba."""

    gain: Tensor
    in_proj: Tensor
    conv: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    step_bias: Tensor
    A: Tensor
    skip: Tensor
    inner_norm: Tensor
    out_proj: Tensor


class LeanStepper:
    """A model's weights, ready for steps."""

    most_at_once = 1
    """Tokens of a row that one call writes at most."""

    def __init__(self, weights: RecurrentWeights) -> None:
        self._weights = weights
        table = weights.embedding
        self._stream = LeanStream(table.shape[1], weights.eps, table.dtype)
        self._wide = self._stream.wide
        self._gain, self._unembedding = self._stream.product(weights.norm, weights.unembedding)
        self._mixers = [self._mixer(mixer) for mixer in weights.mixers]
        self._last = LastStates()

    def write(self, pending: Int[Tensor, " b"], states: States, n: int) -> tuple[Int[Tensor, "b n"], States]:
        """Reads the pending token of each row and returns the most likely next one. Gives up the states."""
        assert n == 1
        logits, states = self.predict(pending[:, None], states)
        return logits.argmax(-1), states

    def continues(self, states: States) -> bool:
        """Whether these are the states of the last call."""
        return self._last.are(states)

    def predict(self, tokens: Int[Tensor, "b 1"], states: States) -> tuple[Float[Tensor, "b 1 v"], States]:
        """Reads a token of each row and returns the logits of what follows it. Gives up the states."""
        stream, x, states = self._read(tokens, states)
        return torch.mm(self._stream.normed(stream, x, self._gain), self._unembedding)[:, None], states

    def hidden(self, tokens: Int[Tensor, "b 1"], states: States) -> tuple[Float[Tensor, "b 1 d"], States]:
        """Reads a token of each row and returns what the last norm makes of it. Gives up the states."""
        stream, x, states = self._read(tokens, states)
        return self._stream.final(stream, x, self._gain)[:, None], states

    def _read(self, tokens: Int[Tensor, "b 1"], states: States) -> tuple[Tensor, Tensor, States]:
        """The residual stream with its further column, without it, and the states after the tokens."""
        weights = self._weights
        stream, x = self._stream.begun(F.embedding(tokens[:, 0], weights.embedding))
        step = self._step_by_heads if weights.n_heads else self._step
        after = []
        for mixer, (window, state) in zip(self._mixers, states, strict=True):
            projected = torch.mm(self._stream.normed(stream, x, mixer.gain), mixer.in_proj)
            y, window, state = step(mixer, projected, window, state)
            x.addmm_(y, mixer.out_proj)
            after.append((window, state))
        self._last.become(after)
        return stream, x, after

    def _step(
        self, mixer: _Mixer, projected: Float[Tensor, "b _"], window: Tensor, state: Tensor
    ) -> tuple[Float[Tensor, "b c"], Tensor, Tensor]:
        n, inner = self._weights.n_states, self._weights.d_inner
        x, z = projected.split(inner, dim=1)
        x, window = _convolved(mixer, x, window)
        selected = torch.mm(x.to(projected.dtype), mixer.x_proj)
        raw, b, c = selected.split((mixer.dt_proj.shape[0], n, n), dim=1)
        step = F.softplus(torch.addmm(mixer.step_bias, raw, mixer.dt_proj).to(self._wide))
        state = (step[:, :, None] * mixer.A).exp_().mul_(state)
        state.addcmul_((step * x)[:, :, None], b[:, None].to(self._wide))
        y = torch.bmm(state, c[:, :, None].to(self._wide))[:, :, 0].addcmul_(mixer.skip, x)
        return (y * F.silu(z)).to(projected.dtype), window, state

    def _step_by_heads(
        self, mixer: _Mixer, projected: Float[Tensor, "b _"], window: Tensor, state: Tensor
    ) -> tuple[Float[Tensor, "b c"], Tensor, Tensor]:
        weights = self._weights
        n, inner, groups, heads = weights.n_states, weights.d_inner, weights.n_groups, weights.n_heads
        z, convolved, raw = projected.split((inner, inner + 2 * groups * n, heads), dim=1)
        convolved, window = _convolved(mixer, convolved, window)
        x, b, c = convolved.split((inner, groups * n, groups * n), dim=1)
        step = F.softplus(raw.to(self._wide) + mixer.step_bias).clamp_(weights.step_floor, weights.step_ceiling)
        rows = len(x)
        x = x.view(rows, heads, -1)
        # (b, g, channels of a group, n): what a group shares stands beside all its channels at once.
        state = (step * mixer.A).exp_()[:, :, None, None] * state
        state.view(rows, groups, -1, n).addcmul_(
            (step[:, :, None] * x).view(rows, groups, -1, 1), b.view(rows, groups, 1, n)
        )
        y = state.view(rows * groups, -1, n).bmm(c.reshape(rows * groups, n, 1)).view(rows, heads, -1)
        y = y.addcmul_(mixer.skip[:, None], x).view(rows, -1).mul_(F.silu(z.to(self._wide))).view(rows, groups, -1)
        scale = y.square().mean(-1, keepdim=True).add_(weights.eps).rsqrt_()
        return (y.mul_(scale).view(rows, -1) * mixer.inner_norm).to(projected.dtype), window, state

    def _mixer(self, mixer: MixerWeights) -> _Mixer:
        wide, nothing = self._wide, mixer.norm.new_empty(0)
        gain, in_proj = self._stream.product(mixer.norm, mixer.in_proj)
        step_bias = mixer.step_bias.detach()
        return _Mixer(
            gain=gain,
            in_proj=in_proj,
            conv=mixer.conv.detach().t().to(wide).contiguous(),
            conv_bias=mixer.conv_bias.detach().to(wide),
            x_proj=nothing if mixer.x_proj is None else transposed(mixer.x_proj),
            dt_proj=nothing if mixer.dt_proj is None else transposed(mixer.dt_proj),
            step_bias=step_bias.to(wide) if mixer.dt_proj is None else step_bias.to(mixer.dt_proj.dtype),
            A=mixer.A.detach().to(wide),
            skip=mixer.skip.detach().to(wide),
            inner_norm=nothing if mixer.inner_norm is None else mixer.inner_norm.detach().to(wide),
            out_proj=transposed(mixer.out_proj),
        )


def _convolved(mixer: _Mixer, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """silu(conv) of one token of each row, and the window after it."""
    wide = mixer.conv.dtype
    whole = torch.cat((window.to(wide), x[:, None].to(wide)), 1)
    return F.silu((whole * mixer.conv).sum(1).add_(mixer.conv_bias)), whole[:, 1:].clone()
