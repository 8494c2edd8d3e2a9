"""Decode steps of Mamba and Mamba-2, level `lean`: one torch loop without module calls, a few tokens of every row.

A step of a few rows is not arithmetic but calls, so it makes few of them (see `lean_stream`), and what does not change
from step to step, exp(A_log) above all, is made once. Recurrence and state are fp32 at least.

Letters: b rows, t new tokens of each, m = b t, d width, w convolution width - 1, c inner width, n states, v vocabulary,
h heads, g groups, p head width.
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

    most_at_once = 256
    """Tokens of a row that one call writes at most."""
    rows_together = False
    """Several tokens of several rows: the modules do that quicker."""

    def __init__(self, weights: RecurrentWeights) -> None:
        self._weights = weights
        table = weights.embedding
        self._stream = LeanStream(table.shape[1], weights.eps, table.dtype)
        self._wide = self._stream.wide
        self._gain, self._unembedding = self._stream.product(weights.norm, weights.unembedding)
        self._mixers = [self._mixer(mixer) for mixer in weights.mixers]
        self._last = LastStates()

    def write(self, pending: Int[Tensor, " b"], states: States, n: int) -> tuple[Int[Tensor, "b n"], States]:
        """Reads the pending token of each row and writes the n most likely next ones, each read but for the last. Gives
        up the states."""
        written = [pending]
        for _ in range(n):
            logits, states = self.predict(written[-1][:, None], states)
            written.append(logits[:, 0].argmax(-1))
        return torch.stack(written[1:], dim=1), states

    def continues(self, states: States) -> bool:
        """Whether these are the states of the last call."""
        return self._last.are(states)

    def predict(self, tokens: Int[Tensor, "b t"], states: States) -> tuple[Float[Tensor, "b t v"], States]:
        """Reads tokens and returns the logits of what follows each. Gives up the states."""
        stream, x, states = self._read(tokens, states)
        logits = torch.mm(self._stream.normed(stream, x, self._gain), self._unembedding)
        return logits.view(*tokens.shape, -1), states

    def hidden(self, tokens: Int[Tensor, "b t"], states: States) -> tuple[Float[Tensor, "b t d"], States]:
        """Reads tokens and returns what the last norm makes of each. Gives up the states."""
        stream, x, states = self._read(tokens, states)
        return self._stream.final(stream, x, self._gain).view(*tokens.shape, -1), states

    def _read(self, tokens: Int[Tensor, "b t"], states: States) -> tuple[Tensor, Tensor, States]:
        """The residual stream (m, d) with its further column, without it, and the states after the tokens."""
        weights = self._weights
        stream, x = self._stream.begun(F.embedding(tokens.reshape(-1), weights.embedding))
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
        self, mixer: _Mixer, projected: Float[Tensor, "m _"], window: Tensor, state: Tensor
    ) -> tuple[Float[Tensor, "m c"], Tensor, Tensor]:
        n, inner = self._weights.n_states, self._weights.d_inner
        x, z = projected.split(inner, dim=1)
        x, window = _convolved(mixer, x, window)
        selected = torch.mm(x.to(projected.dtype), mixer.x_proj)
        raw, b, c = selected.split((mixer.dt_proj.shape[0], n, n), dim=1)
        step = F.softplus(torch.addmm(mixer.step_bias, raw, mixer.dt_proj).to(self._wide))
        decay = (step[:, :, None] * mixer.A).exp_()
        states, state = _passed_on((step * x)[:, :, None] * b[:, None].to(self._wide), decay, state)
        y = torch.bmm(states, c[:, :, None].to(self._wide))[:, :, 0].addcmul_(mixer.skip, x)
        return (y * F.silu(z)).to(projected.dtype), window, state

    def _step_by_heads(
        self, mixer: _Mixer, projected: Float[Tensor, "m _"], window: Tensor, state: Tensor
    ) -> tuple[Float[Tensor, "m c"], Tensor, Tensor]:
        weights = self._weights
        n, inner, groups, heads = weights.n_states, weights.d_inner, weights.n_groups, weights.n_heads
        z, convolved, raw = projected.split((inner, inner + 2 * groups * n, heads), dim=1)
        convolved, window = _convolved(mixer, convolved, window)
        x, b, c = convolved.split((inner, groups * n, groups * n), dim=1)
        step = F.softplus(raw.to(self._wide) + mixer.step_bias).clamp_(weights.step_floor, weights.step_ceiling)
        m = len(x)
        x = x.view(m, heads, -1)
        # (m, g, channels of a group, n): what a group shares stands beside all its channels at once.
        fed = (step[:, :, None] * x).view(m, groups, -1, 1) * b.view(m, groups, 1, n)
        decay = (step * mixer.A).exp_()[:, :, None, None]
        states, state = _passed_on(fed.view(m, heads, -1, n), decay, state)
        y = states.view(m * groups, -1, n).bmm(c.reshape(m * groups, n, 1)).view(m, heads, -1)
        y = y.addcmul_(mixer.skip[:, None], x).view(m, -1).mul_(F.silu(z.to(self._wide))).view(m, groups, -1)
        scale = y.square().mean(-1, keepdim=True).add_(weights.eps).rsqrt_()
        return (y.mul_(scale).view(m, -1) * mixer.inner_norm).to(projected.dtype), window, state

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


def _convolved(mixer: _Mixer, x: Float[Tensor, "m c"], window: Float[Tensor, "b w c"]) -> tuple[Tensor, Tensor]:
    """silu(conv) of the new tokens of each row, and the window after them."""
    wide, b, width = mixer.conv.dtype, len(window), len(mixer.conv)
    whole = torch.cat((window.to(wide), x.view(b, -1, x.shape[1]).to(wide)), 1)
    t = len(x) // b
    seen = whole if t == 1 else whole.unfold(1, width, 1).transpose(2, 3).flatten(0, 1)
    return F.silu((seen * mixer.conv).sum(1).add_(mixer.conv_bias)), whole[:, t:].clone()


def _passed_on(fed: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All states s_t = decay_t s_{t-1} + fed_t (m, ...), made in place of what is fed, and the last of each row."""
    b = len(state)
    if len(fed) == b:
        return fed.addcmul_(decay, state), fed
    for now, kept in zip(fed.unflatten(0, (b, -1)).unbind(1), decay.unflatten(0, (b, -1)).unbind(1), strict=True):
        state = now.addcmul_(kept, state)
    return fed, state.clone()
