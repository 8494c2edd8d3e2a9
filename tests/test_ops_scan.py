"""The selective scan: every level against the reference, and the reference against automatic differentiation.

Numbers in test names are those of the list of invariants in the specification of Mamba.
"""

from __future__ import annotations

import itertools
import resource

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from archbench.errors import BackendError
from archbench.ops import backends, scan, scan_cuda, scan_reference
from archbench.ops.scan import selective_scan, selective_scan_step

torch.set_num_threads(1)

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "h0")
LENGTHS = (0, 1, 2, 7, 8, 9, 63, 64, 65, 200)


@pytest.fixture(params=["reference", "lean", "native"])
def level(request):
    """Each level of the CPU, where it can run; `cuda` has its own tests below."""
    found = backends.available("selective_scan")[request.param]
    if found != "ok":
        pytest.skip(f"{request.param}: {found}")
    return request.param


@pytest.fixture
def native():
    found = backends.available("selective_scan")["native"]
    if found != "ok":
        pytest.skip(found)


def problem(b=2, t=20, d=5, n=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    A = -torch.exp(draw(d, n) * 0.5)
    return {
        "x": draw(b, t, d),
        "dt": draw(b, t, d) - 1,
        "A": A,
        "B": draw(b, t, n),
        "C": draw(b, t, n),
        "D": draw(d),
        "z": draw(b, t, d),
        "dt_bias": draw(d),
        "h0": draw(b, d, n),
    }


def in_type(inputs, dtype):
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def part(inputs, tokens=None, rows=None):
    """Some tokens and some rows of a problem."""
    tokens, rows = tokens or slice(None), rows or slice(None)
    cut = {name: inputs[name][rows, tokens] for name in ("x", "dt", "B", "C", "z")}
    return {**inputs, **cut, "h0": inputs["h0"][rows]}


def relative(found, wanted):
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def with_gradients(inputs, backend, gy, gh):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, h = selective_scan(**leaves, backend=backend)
    gradients = torch.autograd.grad([y, h], list(leaves.values()), [gy.to(y), gh.to(h)])
    return (y.detach(), h.detach()), dict(zip(leaves, gradients, strict=True))


class Seen(TorchDispatchMode):
    """Names and arguments of the operators that pass by."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func._schema.name, args))
        return func(*args, **(kwargs or {}))

    def ours(self):
        return [(name, args) for name, args in self.calls if name.startswith("archbench::")]


# ---- against the reference ----


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("sizes", [(2, 5, 3), (3, 260, 16)], ids=["long slabs", "short slabs"])
def test_12_01_chunked_equals_reference_fp64(t, sizes):
    b, d, n = sizes
    inputs = problem(b, t, d, n)
    wanted = selective_scan(**inputs, backend="reference")
    found = selective_scan(**inputs, backend="lean")
    assert relative(found[0], wanted[0]) < 1e-12
    assert relative(found[1], wanted[1]) < 1e-12


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("sizes", [(5, 1), (19, 16), (33, 17), (16, 4), (300, 64), (401, 5)], ids=str)
def test_12_02_native_equals_reference(native, t, sizes):
    inputs = in_type(problem(2, t, *sizes), torch.float32)
    wanted = selective_scan(**in_type(inputs, torch.float64), backend="reference")
    found = selective_scan(**inputs, backend="native")
    assert found[0].dtype == found[1].dtype == torch.float32
    assert relative(found[0], wanted[0]) < 1e-6
    assert relative(found[1], wanted[1]) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "lean"])
def test_12_03_gradcheck_of_every_input_and_of_the_last_state(backend):
    inputs = problem(2, 11, 2, 2)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, backend=backend), leaves)


def test_12_03_reference_backward_equals_autograd_through_its_forward():
    inputs = problem()
    gy, gh = torch.randn_like(inputs["x"]), torch.randn_like(inputs["h0"])
    _, found = with_gradients(inputs, "reference", gy, gh)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    y, h, _ = scan_reference.forward(*leaves, True)
    for name, wanted in zip(NAMES, torch.autograd.grad([y, h], leaves, [gy, gh]), strict=True):
        assert relative(found[name], wanted) < 1e-12, name


@pytest.mark.parametrize("t", [1, 9, 63, 65, 200])
@pytest.mark.parametrize("sizes", [(5, 1), (19, 16), (33, 17), (300, 20), (401, 5)], ids=str)
@pytest.mark.parametrize("backend", ["native", "lean"])
def test_12_03_gradients_equal_the_fp64_reference(native, backend, t, sizes):
    inputs = in_type(problem(2, t, *sizes), torch.float32)
    exact = in_type(inputs, torch.float64)
    gy, gh = problem(2, t, *sizes, seed=1)["x"], problem(2, t, *sizes, seed=1)["h0"]
    _, wanted = with_gradients(exact, "reference", gy.float().double(), gh.float().double())
    _, found = with_gradients(inputs, backend, gy.float(), gh.float())
    for name in NAMES:
        assert found[name].dtype == torch.float32
        assert relative(found[name], wanted[name]) < 2e-6, name


@pytest.mark.parametrize("missing", [("D",), ("z",), ("dt_bias",), ("h0",), ("D", "z", "dt_bias", "h0")], ids="+".join)
def test_an_input_that_is_absent_equals_its_neutral_value(level, missing):
    inputs = in_type(problem(t=70), torch.float32)
    absent = {name: tensor for name, tensor in inputs.items() if name not in missing}
    neutral = {name: torch.zeros_like(inputs[name]) for name in missing if name != "z"}
    y, h = selective_scan(**{**absent, "z": absent.get("z"), **neutral}, backend=level)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in absent.items()}
    found_y, found_h = selective_scan(**leaves, backend=level)
    assert relative(found_y, y) < 1e-6
    assert relative(found_h, h) < 1e-6
    (found_y.sum() + found_h.sum()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


def test_no_gate_is_not_a_gate_of_zero():
    inputs = problem()
    plain, _ = selective_scan(**{**inputs, "z": None})
    gated, _ = selective_scan(**inputs)
    torch.testing.assert_close(plain * F.silu(inputs["z"]), gated)


# ---- time ----


def test_12_05_pieces_equal_one_pass(level):
    inputs = in_type(problem(t=90, d=19, n=5), torch.float32)
    whole_y, whole_h = selective_scan(**inputs, backend=level)
    h, outputs = inputs["h0"], []
    for first, last in itertools.pairwise((0, 1, 2, 2, 5, 40, 41, 90)):
        piece = {**part(inputs, slice(first, last)), "h0": h}
        y, h = selective_scan(**piece, backend=level)
        outputs.append(y)
    assert relative(torch.cat(outputs, 1), whole_y) < 1e-6
    assert relative(h, whole_h) < 1e-6


@pytest.mark.parametrize("given", [(), ("z", "D", "dt_bias")], ids=["all", "bare"])
def test_12_04_step_by_step_equals_one_pass(level, given):
    inputs = in_type(problem(t=12, d=19, n=5), torch.float32)
    inputs = {**inputs, **dict.fromkeys(given)}
    whole_y, whole_h = selective_scan(**inputs, backend=level)
    h = inputs["h0"]
    for t in range(12):
        now = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        z = None if inputs["z"] is None else inputs["z"][:, t]
        y, h = selective_scan_step(**now, A=inputs["A"], D=inputs["D"], z=z, dt_bias=inputs["dt_bias"], h=h)
        assert relative(y, whole_y[:, t]) < 1e-5
    assert relative(h, whole_h) < 1e-5


def test_12_08_the_future_changes_nothing_before_it(level):
    inputs = in_type(problem(t=70, d=19, n=5), torch.float32)
    y, _ = selective_scan(**inputs, backend=level)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        changed[name][:, 66] += 1
    y_changed, _ = selective_scan(**changed, backend=level)
    assert torch.equal(y[:, :66], y_changed[:, :66])
    assert not torch.equal(y[:, 66:], y_changed[:, 66:])


def test_12_08_gradient_into_the_future_is_exactly_zero(level):
    inputs = in_type(problem(t=70, d=19, n=5), torch.float32)
    gy = torch.zeros_like(inputs["x"])
    gy[:, 30] = 1
    _, gradients = with_gradients(inputs, level, gy, torch.zeros_like(inputs["h0"]))
    for name in ("x", "dt", "B", "C", "z"):
        assert not gradients[name][:, 31:].any(), name
        assert gradients[name][:, 30].all(), name


def test_12_09_rows_are_independent(level):
    inputs = in_type(problem(b=3, t=70, d=19, n=5), torch.float32)
    together = selective_scan(**inputs, backend=level)
    for row in range(3):
        alone = selective_scan(**part(inputs, rows=slice(row, row + 1)), backend=level)
        for found, wanted in zip(alone, together, strict=True):
            if level == "native":
                assert torch.equal(found[0], wanted[row])
            assert relative(found[0], wanted[row]) < 1e-6


# ---- algebra and extremes ----


def test_12_14_a_large_step_forgets_and_a_tiny_step_ignores(level):
    inputs = in_type(problem(t=20, d=19, n=5), torch.float32)
    inputs["dt"][:, 10] = 300.0
    other = {**inputs, "h0": inputs["h0"] + 5.0}
    forgets, also = (selective_scan(**given, backend=level) for given in (inputs, other))
    assert torch.equal(forgets[0][:, 10:], also[0][:, 10:])
    assert not torch.equal(forgets[0][:, :10], also[0][:, :10])

    inputs["dt"][:, 15] = -30.0
    ignored = {**inputs, "x": inputs["x"].clone()}
    ignored["x"][:, 15] += 1.0
    one, two = (selective_scan(**{**given, "D": None}, backend=level) for given in (inputs, ignored))
    assert relative(two[0], one[0]) < 1e-6
    assert two[0].isfinite().all()


def test_12_14_a_decay_exponent_of_minus_200_gives_exactly_no_memory(level):
    x = torch.zeros(1, 2, 19)
    y, h = selective_scan(
        x,
        torch.full((1, 2, 19), 20.0),
        torch.full((19, 4), -10.0),
        torch.ones(1, 2, 4),
        torch.ones(1, 2, 4),
        h0=torch.full((1, 19, 4), 1e30),
        backend=level,
    )
    assert not h.any()
    assert not y.any()


@pytest.mark.parametrize("value", [-1e4, -90.0, 0.0, 19.9, 20.1, 90.0, 1e4])
def test_softplus_and_gate_survive_any_argument(native, value):
    inputs = in_type(problem(t=3, d=19, n=4), torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], value)
    inputs["z"] = torch.full_like(inputs["z"], -value)
    wanted = selective_scan(**in_type(inputs, torch.float64), backend="reference")
    found, gradients = with_gradients(inputs, "native", torch.ones(2, 3, 19), torch.ones(2, 19, 4))
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= 1e-6 * other.norm() + 1e-30
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "h0"])
def test_a_nan_is_never_hidden(level, name):
    inputs = in_type(problem(t=3, d=19, n=4), torch.float32)
    inputs[name].view(-1)[0] = float("nan")
    y, _ = selective_scan(**inputs, backend=level)
    assert y.isnan().any()


def test_12_15_linear_in_x_and_state_and_b_trades_with_c(level):
    one, two = (in_type(problem(t=70, d=19, n=5, seed=seed), torch.float32) for seed in (0, 1))
    mixed = {**one, "x": one["x"] + 2 * two["x"], "h0": one["h0"] + 2 * two["h0"]}
    other = {**one, "x": two["x"], "h0": two["h0"]}
    (y_one, h_one), (y_two, h_two), (y, h) = (selective_scan(**g, backend=level) for g in (one, other, mixed))
    assert relative(y, y_one + 2 * y_two) < 1e-5
    assert relative(h, h_one + 2 * h_two) < 1e-5
    traded = {**one, "B": one["B"] * 4, "C": one["C"] / 4, "h0": one["h0"] * 4}
    assert relative(selective_scan(**traded, backend=level)[0], y_one) < 1e-6


def test_12_17_padding_with_a_zero_step_keeps_the_state(level):
    inputs = in_type(problem(t=20, d=19, n=5), torch.float32)
    _, h = selective_scan(**inputs, backend=level)
    padded = {name: F.pad(inputs[name], (0, 0, 0, 50), value=1.0) for name in ("x", "B", "C", "z")}
    padded["dt"] = F.pad(inputs["dt"], (0, 0, 0, 50), value=-1e4)
    _, h_padded = selective_scan(**{**inputs, **padded}, backend=level)
    assert relative(h_padded, h) < 1e-6
    if level == "native":
        assert torch.equal(h, h_padded)


# ---- how it runs ----


@pytest.mark.parametrize("d", [40, 600])
def test_12_20_the_same_bits_twice_and_for_any_number_of_threads(native, d):
    inputs = in_type(problem(b=3, t=70, d=d, n=16), torch.float32)
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    results = []
    for n_threads in (1, 1, 2, 3):
        torch.set_num_threads(n_threads)
        try:
            outputs, gradients = with_gradients(inputs, "native", gy, gh)
        finally:
            torch.set_num_threads(1)
        results.append([*outputs, *gradients.values()])
    for other in results[1:]:
        assert all(torch.equal(found, wanted) for found, wanted in zip(other, results[0], strict=True))


def test_12_22_native_never_holds_all_states(native):
    b, t, d, n = 1, 8192, 512, 64  # all states: 1 GiB
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(b, t, d, generator=draw)
    A, B = -torch.ones(d, n), torch.randn(b, t, n, generator=draw)
    leaf = x.clone().requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y, _ = selective_scan(leaf, x, A, B, B, backend="native")
    y.backward(x)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 250  # outputs, gradients and the states at chunk starts


def test_views_into_a_wider_projection_are_taken_as_they_lie(level):
    inputs = in_type(problem(t=20, d=19, n=5), torch.float32)
    wide = torch.cat([inputs[name] for name in ("x", "dt", "z", "B", "C")], -1)
    views = dict(zip(("x", "dt", "z", "B", "C"), wide.split((19, 19, 19, 5, 5), -1), strict=True))
    strided = {name: torch.stack((t, t), -1)[..., 0] for name, t in inputs.items()}
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    wanted, wanted_gradients = with_gradients(inputs, level, gy, gh)
    for given in ({**inputs, **views}, strided):
        for one, other in zip(selective_scan(**given, backend=level), wanted, strict=True):
            assert relative(one, other) < 1e-6
    leaf = wide.clone().requires_grad_()
    views = dict(zip(("x", "dt", "z", "B", "C"), leaf.split((19, 19, 19, 5, 5), -1), strict=True))
    y, h = selective_scan(**{**inputs, **views}, backend=level)
    (y.sum() + h.sum()).backward()
    assert relative(leaf.grad[..., :19], wanted_gradients["x"]) < 1e-6


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("t", "d", "n"), [(1, 19, 5), (40, 19, 16), (70, 401, 16)])
def test_native_bf16_rows_are_fp32_rounded_to_the_bit(t, d, n, gated):
    """x, dt and z in bf16, x and z as halves of one tensor; outputs, states and gradients."""
    if backends.available("selective_scan")["native"] != "ok":
        pytest.skip("no native kernels")
    inputs = in_type(problem(t=t, d=d, n=n), torch.float32)
    both = torch.cat([inputs["x"], inputs["z"]], -1).bfloat16()
    rows = {"x": both[..., :d], "dt": inputs["dt"].bfloat16(), "z": both[..., d:]}
    if not gated:
        rows["z"] = inputs["z"] = None
    gy = problem(t=t, d=d, n=n, dtype=torch.bfloat16, seed=1)["x"]

    def outcome(dtype):
        used = {**inputs, **{name: row if row is None else row.to(dtype) for name, row in rows.items()}}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in used.items() if tensor is not None}
        y, h = selective_scan(**{"z": None, **leaves}, backend="native")
        assert (y.dtype, h.dtype) == (dtype, torch.float32)
        return [y, h, *torch.autograd.grad((y, h), tuple(leaves.values()), (gy.to(dtype), torch.ones_like(h)))]

    for found, wanted in zip(outcome(torch.bfloat16), outcome(torch.float32), strict=True):
        assert torch.equal(found, wanted.to(found.dtype))


def test_half_inputs_are_computed_in_fp32(level):
    inputs = in_type(problem(t=40, d=19, n=5), torch.bfloat16)
    wanted = selective_scan(**in_type(inputs, torch.float64), backend="reference")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, h = selective_scan(**leaves, backend=level)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert relative(h.detach(), wanted[1]) < 1e-6
    assert relative(y.detach(), wanted[0]) < 4e-3
    (y.float().sum() + h.sum()).backward()
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves.values())


def test_autocast_does_not_reach_inside(level):
    inputs = in_type(problem(t=40, d=19, n=5), torch.float32)
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    wanted, wanted_gradients = with_gradients(inputs, level, gy, gh)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = with_gradients(inputs, level, gy, gh)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in NAMES)


def test_only_one_output_used(level):
    inputs = in_type(problem(t=20), torch.float32)
    _, both = with_gradients(inputs, level, torch.ones_like(inputs["x"]), torch.zeros_like(inputs["h0"]))
    leaf = inputs["x"].clone().requires_grad_()
    y, _ = selective_scan(**{**inputs, "x": leaf}, backend=level)
    y.sum().backward()
    assert relative(leaf.grad, both["x"]) < 1e-6


def test_the_operators_are_well_formed(level):
    inputs = in_type(problem(t=9, d=4, n=2), torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    operators = torch.ops.archbench
    torch.library.opcheck(operators.selective_scan.default, (*leaves, True, level), test_utils=checks)
    values = [tensor.detach() for tensor in leaves]
    _, h, starts = operators.selective_scan(*values, True, level)
    given = (values[0].clone(), h, *values, starts, level)
    torch.library.opcheck(
        operators.selective_scan_backward.default, given, test_utils=("test_schema", "test_faketensor")
    )
    one = [values[i][:, 0] if i in (0, 1, 3, 4, 6) else values[i] for i in range(9)]
    torch.library.opcheck(operators.selective_scan_step.default, one, test_utils=("test_schema", "test_faketensor"))


def test_without_tokens_the_state_is_a_copy(level):
    inputs = in_type(problem(t=0), torch.float32)
    y, h = selective_scan(**inputs, backend=level)
    assert y.shape == inputs["x"].shape
    assert torch.equal(h, inputs["h0"])
    assert h.data_ptr() != inputs["h0"].data_ptr()


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "h0"])
def test_a_misshapen_input_is_named(name):
    inputs = problem()
    inputs[name] = inputs[name][..., :-1] if name != "A" else inputs[name][:-1]
    with pytest.raises((ValueError, TypeError), match=name):  # TypeError under the shape-checking hook
        selective_scan(**inputs)


# ---- cost ----


class Scalar:
    """A number that counts the additions and multiplications done with it."""

    count = 0

    def __add__(self, other):
        Scalar.count += 1
        return Scalar()

    def __mul__(self, other):
        Scalar.count += 1
        return Scalar()


def test_12_26_flops_equal_the_count_of_the_scalar_recurrence():
    t, d, n = 5, 3, 4
    Scalar.count = 0
    h = [[Scalar() for _ in range(n)] for _ in range(d)]
    for _ in range(t):
        for c in range(d):
            step, x, skip, y = Scalar(), Scalar(), Scalar(), Scalar()
            u = step * x
            for i in range(n):
                exponent = step * Scalar()
                assert exponent is not None  # its exponential is the decay, counted apart
                h[c][i] = Scalar() * h[c][i] + u * Scalar()
                y = y + Scalar() * h[c][i]
            y = y + skip * x
    assert Scalar.count == scan.flops(t, d, n) + scan.free_flops(t, d)


def test_every_level_is_one_operator_with_a_cost(level):
    inputs = in_type(problem(b=2, t=7, d=5, n=3), torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with Seen() as seen:
        y, _ = selective_scan(**leaves, backend=level)
        y.sum().backward()
    names = [name for name, _ in seen.ours()]
    assert names == ["archbench::selective_scan", "archbench::selective_scan_backward"]
    costs = [scan.FORMULAS[name](*args) for name, args in seen.ours()]
    assert costs == [6 * 2 * 7 * 5 * 3, 12 * 2 * 7 * 5 * 3]
    allowed = {"aten::sum", "aten::ones_like", "aten::expand", "aten::detach", "aten::new_empty", "aten::empty"}
    assert {name for name, _ in seen.calls} <= allowed | set(names)


def test_the_step_is_one_operator_with_a_cost():
    inputs = problem(b=2, t=1, d=5, n=3)
    now = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C", "z")}
    with Seen() as seen:
        selective_scan_step(**now, A=inputs["A"], D=inputs["D"], dt_bias=inputs["dt_bias"], h=inputs["h0"])
    ((name, args),) = seen.ours()
    assert scan.FORMULAS[name](*args) == 6 * 2 * 5 * 3


def test_the_meta_device_gives_shapes_and_costs(level):
    inputs = {name: tensor.to("meta").requires_grad_() for name, tensor in in_type(problem(), torch.bfloat16).items()}
    backends.forget()
    with Seen() as seen:
        y, h = selective_scan(**inputs, backend=level)
        (y.float().sum() + h.sum()).backward()
    assert (y.shape, h.shape, h.dtype) == (inputs["x"].shape, inputs["h0"].shape, torch.float32)
    assert [scan.FORMULAS[name](*args) for name, args in seen.ours()] == [6 * 2 * 20 * 5 * 3, 12 * 2 * 20 * 5 * 3]
    assert inputs["A"].grad.shape == inputs["A"].shape
    assert backends.in_use() == {}


# ---- the cuda level: its layout and algebra on CPU, itself where there is a GPU ----


def channel_major_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, return_last_state=False):
    """What mamba_ssm's selective_scan_fn computes, from the reference: a stand-in of the same signature."""
    assert softplus and return_last_state and u.is_contiguous()
    turned = [None if tensor is None else tensor.transpose(1, 2) for tensor in (u, delta, B, C, z)]
    x, dt, B, C, z = turned
    y, h, _ = scan_reference.forward(x, dt, A, B, C, D, z, delta_bias, None, False)
    return y.transpose(1, 2), h.detach()


@pytest.mark.parametrize("missing", [(), ("z",), ("D", "dt_bias"), ("h0",)], ids=str)
@pytest.mark.parametrize("t", [0, 1, 64, 70])
def test_12_06_superposition_equals_an_initial_state(missing, t):
    inputs = {**problem(t=t), **dict.fromkeys(missing)}
    y, h = scan_cuda.composed_scan(channel_major_scan, *inputs.values())
    wanted_y, wanted_h = selective_scan(**inputs, backend="reference")
    assert relative(y, wanted_y) < 1e-12
    assert relative(h, wanted_h) < 1e-12


@pytest.mark.parametrize("missing", [(), ("h0",), ("z", "D", "dt_bias")], ids=str)
def test_cuda_gradients_are_taken_inside_an_operator(monkeypatch, missing):
    """The whole path of the level, with the stand-in kernel on CPU: autograd must work inside the operator."""
    monkeypatch.setattr(scan_cuda, "_scan_kernel", lambda: channel_major_scan)
    inputs = {**problem(t=20), **dict.fromkeys(missing)}
    leaves = {name: None if tensor is None else tensor.requires_grad_() for name, tensor in inputs.items()}
    present = [leaf for leaf in leaves.values() if leaf is not None]
    gy = torch.randn(2, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y, _, _ = torch.ops.archbench.selective_scan(*leaves.values(), True, "cuda")
    found = torch.autograd.grad(y, present, gy)
    wanted_y, _ = selective_scan(**leaves, backend="reference")
    for one, other in zip(found, torch.autograd.grad(wanted_y, present, gy), strict=True):
        assert relative(one, other) < 1e-12


def test_cuda_refuses_a_gradient_through_the_last_state(monkeypatch):
    monkeypatch.setattr(scan_cuda, "_scan_kernel", lambda: channel_major_scan)
    leaves = [tensor.requires_grad_() for tensor in problem(t=4).values()]
    _, h, _ = torch.ops.archbench.selective_scan(*leaves, True, "cuda")
    with pytest.raises(BackendError, match="last state"):
        h.sum().backward()


def need_cuda_level():
    found = backends.available("selective_scan")["cuda"]
    if found != "ok":
        pytest.skip(f"cuda: {found}")


@pytest.mark.gpu
@pytest.mark.parametrize("missing", [(), ("h0",)], ids=str)
@pytest.mark.parametrize("t", [1, 65, 200])
def test_gpu_cuda_equals_reference(missing, t):
    need_cuda_level()
    inputs = {**in_type(problem(2, t, 32, 16), torch.float32), **dict.fromkeys(missing)}
    there = {name: None if v is None else v.cuda().requires_grad_() for name, v in inputs.items()}
    here = {name: None if v is None else v.double().requires_grad_() for name, v in inputs.items()}
    y, h = selective_scan(**there, backend="cuda")
    wanted_y, wanted_h = selective_scan(**here, backend="reference")
    assert relative(y.detach().cpu(), wanted_y.detach()) < 1e-3
    assert relative(h.detach().cpu(), wanted_h.detach()) < 1e-3
    y.sum().backward()
    wanted_y.sum().backward()
    for name in NAMES:
        if name not in missing:
            assert relative(there[name].grad.cpu(), here[name].grad) < 2e-3, name


def test_called_past_the_dispatcher_it_gives_the_same_and_a_watcher_still_sees_it():
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in problem(2, 9, 5, 3).items()}
    y, h = selective_scan(**leaves)
    direct = torch.autograd.grad(y.sum() + h.square().sum(), list(leaves.values()))
    with Seen() as seen:
        y, h = selective_scan(**leaves)
    dispatched = torch.autograd.grad(y.sum() + h.square().sum(), list(leaves.values()))
    assert [name for name, _ in seen.ours()] == ["archbench::selective_scan"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(direct, dispatched, strict=True))


def test_a_gradient_of_its_gradient_is_refused():
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in problem(1, 4, 3, 2).items()}
    y, _ = selective_scan(**leaves)
    slope, *_ = torch.autograd.grad(y.sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError):
        slope.sum().backward()


# ---- the official package's own plain-torch references, where it is installed ----


@pytest.mark.parametrize("t", [1, 9, 65])
def test_equals_the_official_reference(t):
    official = pytest.importorskip(
        "mamba_ssm.ops.selective_scan_interface",
        reason="mamba_ssm is not installed, or not importable without a GPU",
        exc_type=ImportError,
    )
    inputs = problem(2, t, 7, 4)
    plain = {name: tensor for name, tensor in inputs.items() if name != "h0"}
    y, h = selective_scan(**plain, backend="reference")
    x, dt, B, C, z = (inputs[name].transpose(1, 2) for name in ("x", "dt", "B", "C", "z"))
    wanted_y, wanted_h = official.selective_scan_ref(
        x, dt, inputs["A"], B, C, inputs["D"], z, inputs["dt_bias"], delta_softplus=True, return_last_state=True
    )
    assert relative(y, wanted_y.transpose(1, 2)) < 1e-5
    assert relative(h, wanted_h) < 1e-5


def test_a_step_equals_the_official_reference():
    official = pytest.importorskip(
        "mamba_ssm.ops.triton.selective_state_update",
        reason="mamba_ssm is not installed, or not importable without a GPU",
        exc_type=ImportError,
    )
    inputs = problem(2, 1, 7, 4)
    x, dt, B, C, z = (inputs[name][:, 0] for name in ("x", "dt", "B", "C", "z"))
    y, h = selective_scan_step(x, dt, inputs["A"], B, C, inputs["D"], z, inputs["dt_bias"], inputs["h0"].clone())
    state = inputs["h0"].clone()  # which theirs writes to
    wanted = official.selective_state_update_ref(
        state, x, dt, inputs["A"], B, C, inputs["D"], z, inputs["dt_bias"], dt_softplus=True
    )
    assert relative(y, wanted) < 1e-5
    assert relative(h, state) < 1e-5
