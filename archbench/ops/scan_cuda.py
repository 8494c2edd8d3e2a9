"""Level `cuda`: the kernels of mamba-ssm and causal-conv1d, fitted to our signatures.

No GPU has run this file yet: what is tested is the layout, the resumption and the gradients, on CPU with stand-in
kernels of the same signatures. The probe compares the real kernels with the reference before anything is computed
with them.

- Their tensors are channel-major (b, d, t), ours token-major.
- Their scan starts from a zero state. By linearity in the state, with S_t the running sum of steps, a start from h0
  adds C_t . (exp(S_t A) h0) to y_t before the gate, and exp(S_T A) h0 to the last state.
- Their last state has no gradient; asking for one raises instead of giving zero.
- Inputs arrive in fp32 (`scan` and `conv` convert); the kernels could read bf16, which is left until it can be
  measured.
- `backward` recomputes the forward pass and asks autograd for its gradient.

Source: state-spaces/mamba, `ops/selective_scan_interface.py`; Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from archbench.errors import BackendError
from archbench.ops import conv_torch, scan_reference

INSTALL = (
    "install torch and a CUDA toolkit first, then: pip install --no-build-isolation mamba-ssm causal-conv1d "
    "(recent mamba-ssm builds the scan only with MAMBA_KEEP_CUDA_BUILD=TRUE)"
)
PIECE = 64  # tokens for which resuming holds a (b, t, d, n) tensor
TOLERANCE = 1e-3

Kernel = Callable[..., Tensor | tuple[Tensor, Tensor]]


def scan_reason() -> str:
    """'ok', or why mamba-ssm's selective scan cannot run on the current device. Asked once per process and device."""
    return _probed("scan", torch.cuda.current_device()) if torch.cuda.is_available() else "no CUDA device"


def conv_reason() -> str:
    """'ok', or why causal-conv1d cannot run on the current device. Asked once per process and device."""
    return _probed("conv", torch.cuda.current_device()) if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _probed(name: str, device: int) -> str:
    try:
        found, wanted = _scan_trial(device) if name == "scan" else _conv_trial(device)
    except Exception as error:  # foreign compiled code: whatever it raises is the reason
        return f"{type(error).__name__}: {error}; {INSTALL}"
    distance = (found.cpu() - wanted).abs().max().item()
    return "ok" if distance < TOLERANCE else f"the kernel differs from the reference by {distance:.1e}; {INSTALL}"


def _scan_trial(device: int) -> tuple[Tensor, Tensor]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, dt, z, B, C = draw(1, 8, 4), draw(1, 8, 4), draw(1, 8, 4), draw(1, 8, 4), draw(1, 8, 4)
    A, D, bias, h0 = -draw(4, 4).exp(), draw(4), draw(4), draw(1, 4, 4)
    inputs = (x, dt, A, B, C, D, z, bias, h0)
    wanted, _, _ = scan_reference.forward(*inputs, False)
    found, _ = composed_scan(_scan_kernel(), *(tensor.to(device) for tensor in inputs))
    return found, wanted


def _conv_trial(device: int) -> tuple[Tensor, Tensor]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, weight, bias, window = draw(1, 8, 8), draw(8, 4), draw(8), draw(1, 3, 8)
    wanted = conv_torch.forward_reference(x, weight, bias, window)
    found = composed_conv(_conv_kernel(), *(tensor.to(device) for tensor in (x, weight, bias, window)))
    return found, wanted


def _scan_kernel() -> Kernel:
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def _conv_kernel() -> Kernel:
    return importlib.import_module("causal_conv1d").causal_conv1d_fn


# ---- selective scan ----


def starts_shape(*_: int) -> tuple[int, ...]:
    """Nothing is kept: `backward` recomputes."""
    return (0,)


def forward(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h0: Float[Tensor, "b d n"] | None,
    _keep: bool,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"], Tensor]:
    """y, the last state, and an empty tensor."""
    y, h_last = composed_scan(_scan_kernel(), x, dt, A, B, C, D, z, dt_bias, h0)
    return y, h_last, x.new_empty(0)


def composed_scan(
    kernel: Kernel,
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h0: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Our scan out of `kernel`, which has the signature of mamba_ssm's selective_scan_fn. Differentiable, but for h."""
    if x.shape[1] == 0:
        return torch.zeros_like(x), (x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0.clone())
    channel_major = [tensor.transpose(1, 2).contiguous() for tensor in (x, dt, B, C)]
    u, delta, B_major, C_major = channel_major
    gate = z.transpose(1, 2).contiguous() if z is not None and h0 is None else None
    outcome = kernel(u, delta, A, B_major, C_major, D, gate, dt_bias, True, True)  # softplus, return the last state
    y, h_last = outcome[0].transpose(1, 2), outcome[1]
    if h0 is None:
        return y.contiguous(), h_last.to(x.dtype).contiguous()
    elapsed = F.softplus(dt if dt_bias is None else dt + dt_bias).cumsum(1)
    from_start = []
    for first in range(0, x.shape[1], PIECE):
        piece = slice(first, first + PIECE)
        decayed = torch.exp(elapsed[:, piece, :, None] * A) * h0[:, None]
        from_start.append((decayed * C[:, piece, None, :]).sum(-1))
    y = y + torch.cat(from_start, 1)
    h_last = h_last + torch.exp(elapsed[:, -1, :, None] * A) * h0
    return (y if z is None else y * F.silu(z)).contiguous(), h_last


def backward(
    gy: Float[Tensor, "b t d"] | None,
    gh: Float[Tensor, "b d n"] | None,
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
    h0: Float[Tensor, "b d n"] | None,
    _starts: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, h0, in that order; None for an input that is None.

    Raises:
        BackendError: a gradient through the last state is asked for; the kernel has none.
    """
    return gradients_of_scan(_scan_kernel(), gy, gh, (x, dt, A, B, C, D, z, dt_bias, h0))


def gradients_of_scan(
    kernel: Kernel, gy: Tensor | None, gh: Tensor | None, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """`backward` for any kernel of that signature."""
    if gh is not None:
        raise BackendError(
            "selective_scan: the cuda level has no gradient through the last state; detach it, or use backend='lean'"
        )
    return _gradients(lambda *leaves: composed_scan(kernel, *leaves)[0], gy, inputs)


# ---- causal convolution ----


def conv_forward(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> Float[Tensor, "b t d"]:
    """silu(conv(x))."""
    return composed_conv(_conv_kernel(), x, weight, bias, window)


def composed_conv(
    kernel: Kernel,
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> Float[Tensor, "b t d"]:
    """Our convolution out of `kernel`, which has the signature of causal_conv1d_fn.

    The window goes in as leading tokens whose outputs are dropped: the kernel's own initial state asks for a layout
    that not every width allows.
    """
    width = weight.shape[1]
    if not 2 <= width <= 4:
        raise BackendError(f"causal_conv: the cuda level has widths 2 to 4, got {width}; use backend='lean'")
    if x.shape[1] == 0:
        return torch.zeros_like(x)
    whole = x if window is None else torch.cat((window, x), 1)
    y = kernel(whole.transpose(1, 2).contiguous(), weight, bias, activation="silu")
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)[:, whole.shape[1] - x.shape[1] :].contiguous()


def conv_backward(
    gy: Float[Tensor, "b t d"],
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"],
    window: Float[Tensor, "b v d"] | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, window (None without one)."""
    kernel = _conv_kernel()
    return _gradients(lambda *leaves: composed_conv(kernel, *leaves), gy, (x, weight, bias, window))


# ---- autograd inside an operator ----


def _gradients(
    function: Callable[..., Tensor], gy: Tensor | None, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)` for the output gradient gy; zero where it does not depend on an input."""
    if gy is None or gy.numel() == 0:
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in inputs)
    with autograd_on():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        present = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(function(*leaves), present, gy, allow_unused=True, materialize_grads=True))
    # Two gradients may be parts of one tensor, which an operator must not return.
    return tuple(None if leaf is None else next(found).clone() for leaf in leaves)


@contextmanager
def autograd_on() -> Iterator[None]:
    """Record gradients inside a custom operator, where the dispatcher has switched autograd off.

    Only autograd's own keys are let in again (autocast stays as it is), and in this thread: a second thread would wait
    for the device thread that runs the outer backward pass.
    """
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in (
        torch._C.DispatchKey.AutogradFunctionality,
        torch._C.DispatchKey.AutogradOther,
        torch._C.DispatchKey.AutogradNestedTensor,
    ):
        keys = keys.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys), torch.enable_grad():
        yield
