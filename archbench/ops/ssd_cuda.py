"""State-space duality, level `cuda`: mamba-ssm's Triton kernels, fitted to our signature.

This file has never run on a GPU: what is tested is the arguments, the initial state and the gradients, on CPU with a
stand-in kernel of the same signature. The probe compares the real kernel with the reference before anything is computed
with it. Its tensors are token-major as ours are, it takes an initial state, and its last state has a gradient.

Inputs arrive in fp32 (`ssd` converts); the kernel could read bf16, which is left until it can be measured. `backward`
recomputes the forward pass and asks autograd for its gradient.

Source: state-spaces/mamba, `ops/triton/ssd_combined.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from archbench.ops import ssd_reference
from archbench.ops.scan_cuda import INSTALL, TOLERANCE, autograd_on

CHUNK = 256
"""Tokens of a chunk; the kernel's own default."""

Kernel = Callable[..., tuple[Tensor, Tensor]]


def reason() -> str:
    """'ok', or why mamba-ssm's SSD cannot run on the current device. Asked once per process and device."""
    return _probed(torch.cuda.current_device()) if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _probed(device: int) -> str:
    try:
        found, wanted = _trial(device)
    except Exception as error:  # foreign compiled code: whatever it raises is the reason
        return f"{type(error).__name__}: {error}; {INSTALL}"
    distance = (found.cpu() - wanted).abs().max().item()
    return "ok" if distance < TOLERANCE else f"the kernel differs from the reference by {distance:.1e}; {INSTALL}"


def _trial(device: int) -> tuple[Tensor, Tensor]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, step, A, D = draw(1, 20, 4, 16), 0.1 * draw(1, 20, 4).exp(), -draw(4).exp(), draw(4)
    B, C, h0 = draw(1, 20, 2, 16), draw(1, 20, 2, 16), draw(1, 4, 16, 16)
    inputs = (x, step, A, B, C, D, h0)
    wanted, _, _ = ssd_reference.forward(*inputs, False)
    found, _ = composed(_kernel(), *(tensor.to(device) for tensor in inputs))
    return found, wanted


def _kernel() -> Kernel:
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


def starts_shape(*_: int) -> tuple[int, ...]:
    """Nothing is kept: `backward` recomputes."""
    return (0,)


def forward(
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
    _keep: bool,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"], Tensor]:
    """y, the last state, and an empty tensor."""
    return *composed(_kernel(), x, step, A, B, C, D, h0), x.new_empty(0)


def composed(
    kernel: Kernel,
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Our recurrence out of `kernel`, which has the signature of mamba_chunk_scan_combined. Differentiable."""
    if x.shape[1] == 0:
        b, _, h, p = x.shape
        return torch.zeros_like(x), (x.new_zeros(b, h, p, B.shape[3]) if h0 is None else h0.clone())
    x, step, B, C = (tensor.contiguous() for tensor in (x, step, B, C))
    y, h_last = kernel(x, step, A, B, C, CHUNK, D=D, initial_states=h0, return_final_states=True)
    return y.contiguous(), h_last.to(x.dtype).contiguous()


def backward(
    gy: Float[Tensor, "b t h p"] | None,
    gh: Float[Tensor, "b h p n"] | None,
    x: Float[Tensor, "b t h p"],
    step: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None,
    h0: Float[Tensor, "b h p n"] | None,
    _starts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, step, A, B, C, D, h0, in that order; None for an input that is None."""
    return gradients(_kernel(), gy, gh, (x, step, A, B, C, D, h0))


def gradients(
    kernel: Kernel, gy: Tensor | None, gh: Tensor | None, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """`backward` for any kernel of that signature."""
    x, h0 = inputs[0], inputs[-1]
    assert x is not None
    if x.shape[1] == 0:  # nothing was computed: the state passed through
        zeros = [None if tensor is None else torch.zeros_like(tensor) for tensor in inputs]
        return *zeros[:-1], zeros[-1] if h0 is None or gh is None else gh.clone()
    with autograd_on():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        y, h_last = composed(kernel, *leaves)  # type: ignore[arg-type]
        into = [torch.zeros_like(y) if gy is None else gy, torch.zeros_like(h_last) if gh is None else gh]
        present = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad([y, h_last], present, into, allow_unused=True, materialize_grads=True))
    # Two gradients may be parts of one tensor, which an operator must not return.
    return tuple(None if leaf is None else next(found).clone() for leaf in leaves)
