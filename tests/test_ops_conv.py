"""The causal convolution: every level against torch's conv1d, and the window against one long pass.

Numbers in test names are those of the list of invariants in the specification of Mamba.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from archbench.errors import BackendError
from archbench.ops import backends, conv, scan_cuda
from archbench.ops.conv import causal_conv, causal_conv_step

torch.set_num_threads(1)

LENGTHS = (0, 1, 3, 4, 70)
WIDTHS = (1, 2, 4, 7)


@pytest.fixture(params=["reference", "lean", "native"])
def level(request):
    """Each level of the CPU, where it can run; `cuda` has its own tests below."""
    found = backends.available("causal_conv")[request.param]
    if found != "ok":
        pytest.skip(f"{request.param}: {found}")
    return request.param


def problem(b=2, t=20, d=19, w=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (b, t, d), "weight": (d, w), "bias": (d,), "window": (b, w - 1, d)}
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def oracle(x, weight, bias, window):
    """The same through F.conv1d, in fp64."""
    width = weight.shape[1]
    x, weight, bias = x.double(), weight.double(), bias.double()
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if window is None else window.double()
    whole = torch.cat((before, x), 1)
    if x.shape[1] == 0:
        return x.clone(), whole
    pre = F.conv1d(whole.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0])
    return F.silu(pre).transpose(1, 2), whole[:, x.shape[1] :]


def relative(found, wanted):
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("w", WIDTHS)
@pytest.mark.parametrize("d", [19, 300])
def test_output_and_window_equal_conv1d(level, t, w, d, windowed):
    inputs = problem(2, t, d, w)
    if not windowed:
        inputs["window"] = None
    y, window = causal_conv(**inputs, backend=level)
    wanted_y, wanted_window = oracle(**inputs)
    assert relative(y, wanted_y) < 1e-6
    assert torch.equal(window.double(), wanted_window)


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("w", WIDTHS)
def test_gradients_equal_those_of_conv1d(level, t, w, windowed):
    inputs = problem(2, t, 19, w)
    if not windowed:
        del inputs["window"]
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    outputs = causal_conv(**{"window": None, **leaves}, backend=level)
    wanted = oracle(**{"window": None, **leaves})
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(3)) for o in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), weights)
    exact = torch.autograd.grad(wanted, list(leaves.values()), [g.double() for g in weights], materialize_grads=True)
    for name, one, other in zip(leaves, found, exact, strict=True):
        assert relative(one, other) < 2e-6, name


@pytest.mark.parametrize("backend", ["reference", "lean"])
def test_gradcheck(backend):
    leaves = [tensor.requires_grad_() for tensor in problem(2, 5, 2, 3, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *given: causal_conv(*given, backend=backend), leaves)


def test_12_05_pieces_equal_one_pass(level):
    inputs = problem(t=40)
    wanted, last = causal_conv(**inputs, backend=level)
    window, outputs = inputs["window"], []
    for first, end in itertools.pairwise((0, 1, 3, 3, 5, 20, 21, 40)):
        y, window = causal_conv(**{**inputs, "x": inputs["x"][:, first:end], "window": window}, backend=level)
        outputs.append(y)
    assert relative(torch.cat(outputs, 1), wanted) < 1e-6
    assert torch.equal(window, last)


@pytest.mark.parametrize("w", WIDTHS)
def test_12_04_step_by_step_equals_one_pass(level, w):
    inputs = problem(t=12, w=w)
    wanted, last = causal_conv(**inputs, backend=level)
    window = inputs["window"]
    for t in range(12):
        y, window = causal_conv_step(inputs["x"][:, t], inputs["weight"], inputs["bias"], window)
        assert relative(y, wanted[:, t]) < 1e-6
    assert torch.equal(window, last)
    assert window.untyped_storage().nbytes() == window.numel() * 4


def test_12_08_causal_both_ways(level):
    inputs = problem(t=40)
    y, _ = causal_conv(**inputs, backend=level)
    changed = inputs["x"].clone()
    changed[:, 30] += 1
    other, _ = causal_conv(**{**inputs, "x": changed}, backend=level)
    assert torch.equal(y[:, :30], other[:, :30])
    assert torch.equal(y[:, 34:], other[:, 34:])
    assert not torch.equal(y[:, 30:34], other[:, 30:34])
    leaf = inputs["x"].clone().requires_grad_()
    y, _ = causal_conv(**{**inputs, "x": leaf}, backend=level)
    y[:, 20].sum().backward()
    assert not leaf.grad[:, 21:].any()
    assert not leaf.grad[:, :17].any()
    assert leaf.grad[:, 17:21].all()


def test_12_09_rows_are_independent(level):
    inputs = problem(b=3)
    together = causal_conv(**inputs, backend=level)
    for row in range(3):
        alone = {**inputs, "x": inputs["x"][row : row + 1], "window": inputs["window"][row : row + 1]}
        for found, wanted in zip(causal_conv(**alone, backend=level), together, strict=True):
            assert relative(found[0], wanted[row]) < 1e-6
            if level == "native":
                assert torch.equal(found[0], wanted[row])


def test_12_20_the_same_bits_for_any_number_of_threads():
    if backends.available("causal_conv")["native"] != "ok":
        pytest.skip(backends.available("causal_conv")["native"])
    inputs = problem(b=3, d=300)
    results = []
    for n_threads in (1, 1, 2, 3):
        torch.set_num_threads(n_threads)
        try:
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
            y, window = causal_conv(**leaves, backend="native")
            (y.sum() + window.sum()).backward()
        finally:
            torch.set_num_threads(1)
        results.append([y, window, *(leaf.grad for leaf in leaves.values())])
    for other in results[1:]:
        assert all(torch.equal(found, wanted) for found, wanted in zip(other, results[0], strict=True))


def test_strided_views_are_accepted(level):
    inputs = problem()
    wide = torch.cat((inputs["x"], inputs["x"]), -1)
    every_second = torch.stack((inputs["x"], inputs["x"]), -1)[..., 0]
    wanted, _ = causal_conv(**inputs, backend=level)
    for x in (wide[..., 19:], every_second):
        y, _ = causal_conv(**{**inputs, "x": x}, backend=level)
        assert relative(y, wanted) < 1e-6


def test_half_inputs_keep_an_exact_window(level):
    inputs = problem(dtype=torch.bfloat16)
    y, window = causal_conv(**inputs, backend=level)
    wanted, wanted_window = oracle(**inputs)
    assert (y.dtype, window.dtype) == (torch.bfloat16, torch.float32)
    assert relative(y, wanted) < 4e-3
    assert torch.equal(window.double(), wanted_window)


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("w", WIDTHS)
@pytest.mark.parametrize("t", [1, 3, 40])
@pytest.mark.parametrize("d", [19, 300])
def test_native_bf16_is_fp32_rounded_to_the_bit(d, t, w, spoiled):
    """Rows of a wider tensor, outputs and gradients; what is no number stays none."""
    if backends.available("causal_conv")["native"] != "ok":
        pytest.skip("no native kernels")
    inputs = {**problem(2, t, d, w), "x": problem(2, t, 2 * d, w, torch.bfloat16)["x"][..., d:]}
    if spoiled:
        inputs["x"][0, t // 2, d // 2], inputs["x"][1, t // 2, 0] = float("nan"), float("inf")
    gy = problem(2, t, d, w, torch.bfloat16, seed=1)["x"]

    def outcome(dtype):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items() if name != "x"}
        whole = inputs["x"].to(dtype).requires_grad_()
        y, window = causal_conv(whole, **leaves, backend="native")
        assert y.dtype == dtype
        grads = torch.autograd.grad((y, window), (whole, *leaves.values()), (gy.to(dtype), 0.3 * window.detach()))
        return [y, window, *grads]

    for found, wanted in zip(outcome(torch.bfloat16), outcome(torch.float32), strict=True):
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("t", [0, 1, 20])
def test_outputs_share_no_memory_with_inputs(level, t):
    inputs = problem(t=t)
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    for output in causal_conv(**inputs, backend=level):
        output.zero_()
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)


def test_the_operators_are_well_formed(level):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [tensor.requires_grad_() for tensor in problem(t=5).values()]
    operators = torch.ops.archbench
    torch.library.opcheck(operators.causal_conv.default, (*leaves, level), test_utils=checks)
    values = [tensor.detach() for tensor in leaves]
    given = (values[0].clone(), values[3].clone(), *values, level)
    torch.library.opcheck(operators.causal_conv_backward.default, given, test_utils=("test_schema", "test_faketensor"))
    step = (values[0][:, 0], *values[1:])
    torch.library.opcheck(operators.causal_conv_step.default, step, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["weight", "bias", "window"])
def test_a_misshapen_input_is_named(name):
    inputs = problem()
    inputs[name] = inputs[name][:-1]
    with pytest.raises((ValueError, TypeError), match=name):  # TypeError under the shape-checking hook
        causal_conv(**inputs)


class Seen(TorchDispatchMode):
    """Names and arguments of our operators that pass by."""

    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "archbench":
            self.ours.append((func._schema.name, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_level_is_one_operator_with_the_cost_of_its_scalar_loop(level, device):
    b, t, d, w = 2, 7, 5, 3
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in problem(b, t, d, w).items()}
    with Seen() as seen:
        y, window = causal_conv(**inputs, backend=level)
        (y.sum() + window.sum()).backward()
        causal_conv_step(inputs["x"][:, 0], inputs["weight"], inputs["bias"], inputs["window"])
    assert (y.shape, window.shape) == ((b, t, d), (b, w - 1, d))
    per_token = sum(2 for _channel in range(d) for _tap in range(w))  # one multiplication, one addition
    assert [(name.split("::")[1], conv.FORMULAS[name](*args)) for name, args in seen.ours] == [
        ("causal_conv", b * t * per_token),
        ("causal_conv_backward", 2 * b * t * per_token),
        ("causal_conv_step", b * per_token),
    ]


# ---- the cuda level: its layout on CPU, itself where there is a GPU ----


def channel_major_conv(x, weight, bias=None, activation=None):
    """What causal_conv1d_fn computes: a stand-in of the same signature."""
    assert activation == "silu" and x.is_contiguous()
    pre = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
    return F.silu(pre)


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("t", [0, 1, 9])
def test_cuda_layout_window_and_gradients(monkeypatch, t, windowed):
    monkeypatch.setattr(scan_cuda, "_conv_kernel", lambda: channel_major_conv)
    inputs = problem(t=t, dtype=torch.float64)
    if not windowed:
        inputs["window"] = None
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in inputs.values()]
    found = torch.ops.archbench.causal_conv(*leaves, "cuda")
    wanted = oracle(*leaves)
    assert relative(found[0], wanted[0]) < 1e-12
    assert torch.equal(found[1], wanted[1])
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(found[0].sum() + found[1].sum(), present)
    exact = torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), present, materialize_grads=True)
    for one, other in zip(gradients, exact, strict=True):
        assert relative(one, other) < 1e-12


def test_cuda_names_the_widths_it_has():
    with pytest.raises(BackendError, match="widths 2 to 4, got 7"):
        scan_cuda.composed_conv(channel_major_conv, **problem(w=7))


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 3, 65])
def test_gpu_cuda_equals_conv1d(t):
    found = backends.available("causal_conv")["cuda"]
    if found != "ok":
        pytest.skip(f"cuda: {found}")
    inputs = problem(t=t, d=32)
    there = {name: tensor.cuda().requires_grad_() for name, tensor in inputs.items()}
    here = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    y, window = causal_conv(**there, backend="cuda")
    wanted, wanted_window = oracle(**here)
    assert relative(y.detach().cpu(), wanted.detach()) < 1e-3
    assert torch.equal(window.cpu().double(), wanted_window)
    y.sum().backward()
    wanted.sum().backward()
    for name in inputs:
        assert relative(there[name].grad.cpu(), here[name].grad) < 2e-3, name
