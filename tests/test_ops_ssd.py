"""State-space duality: every level against the reference, and the reference against automatic differentiation.

Numbers in test names are those of the list of invariants in the specification of Mamba.
"""

from __future__ import annotations

import itertools
import resource

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from archbench.ops import backends, ssd_chunked, ssd_cuda, ssd_reference
from archbench.ops import ssd as module
from archbench.ops.scan import selective_scan
from archbench.ops.ssd import ssd

torch.set_num_threads(1)

NAMES = ("x", "step", "A", "B", "C", "D", "h0")
GRADIENT_TOLERANCE = {**dict.fromkeys(NAMES, 2e-6), "A": 5e-5}
"""Relative, in fp32. The gradient of A adds up every token of every row, and they cancel: here to a thousandth."""
LENGTHS = (0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 200)


@pytest.fixture(params=["reference", "lean", "native"])
def level(request):
    """Each level of the CPU, where it can run; `cuda` has its own tests below."""
    found = backends.available("ssd")[request.param]
    if found != "ok":
        pytest.skip(f"{request.param}: {found}")
    return request.param


@pytest.fixture
def native():
    found = backends.available("ssd")["native"]
    if found != "ok":
        pytest.skip(found)


@pytest.fixture(params=[1, 3, 16, 64, 20])
def chunk(request, monkeypatch):
    """Chunk lengths; 20 is the whole of `problem()`, and 3 and 16 do not divide it."""
    monkeypatch.setattr(ssd_chunked, "CHUNK", request.param)
    return request.param


def problem(b=2, t=20, h=4, p=3, g=2, n=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": draw(b, t, h, p),
        "step": F.softplus(draw(b, t, h) - 1),
        "A": -torch.exp(draw(h)),
        "B": draw(b, t, g, n),
        "C": draw(b, t, g, n),
        "D": draw(h),
        "h0": draw(b, h, p, n),
    }
    return in_type(inputs, dtype)


def in_type(inputs, dtype):
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def part(inputs, tokens=None, rows=None):
    """Some tokens and some rows of a problem."""
    tokens, rows = tokens or slice(None), rows or slice(None)
    cut = {name: inputs[name][rows, tokens] for name in ("x", "step", "B", "C")}
    return {**inputs, **cut, "h0": inputs["h0"][rows]}


def relative(found, wanted):
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def with_gradients(inputs, backend, gy, gh):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, h = ssd(**leaves, backend=backend)
    gradients = torch.autograd.grad([y, h], list(leaves.values()), [gy.to(y), gh.to(h)])
    return (y.detach(), h.detach()), dict(zip(leaves, gradients, strict=True))


def quadratic(x, step, A, B, C, D, h0):
    """The whole sequence as one matrix per head (section 3.2 of the paper), and what the first state adds."""
    r = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(r, 2), C.repeat_interleave(r, 2)
    s = (step * A).cumsum(1).transpose(1, 2)  # b h t
    decay = torch.exp(s[..., :, None] - s[..., None, :]).tril()
    M = torch.einsum("bihn,bjhn->bhij", C, B) * decay * step.transpose(1, 2)[:, :, None, :]
    y = torch.einsum("bhij,bjhp->bihp", M, x)
    y = y + torch.einsum("bihn,bhpn,bhi->bihp", C, h0, s.exp()) + D[:, None] * x
    h = torch.exp(s[..., -1])[..., None, None] * h0
    h = h + torch.einsum("bhj,bjh,bjhp,bjhn->bhpn", torch.exp(s[..., -1:] - s), step, x, B)
    return y, h


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
@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (3, 8, 3, 1), (2, 1, 1, 16)], ids=str)
def test_12_01_chunked_equals_reference_fp64(t, sizes):
    inputs = problem(2, t, *sizes)
    wanted = ssd(**inputs, backend="reference")
    found = ssd(**inputs, backend="lean")
    assert relative(found[0], wanted[0]) < 1e-12
    assert relative(found[1], wanted[1]) < 1e-12


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize(
    "sizes", [(4, 3, 2, 5), (3, 64, 1, 64), (6, 100, 2, 17), (1, 300, 1, 4), (2, 16, 1, 1)], ids=str
)
def test_12_02_native_equals_reference(native, t, sizes):
    """Widths that fill no lane, one, and more than a job; groups of several jobs; state sizes around the unrolling."""
    inputs = problem(2, t, *sizes, dtype=torch.float32)
    wanted = ssd(**in_type(inputs, torch.float64), backend="reference")
    found = ssd(**inputs, backend="native")
    assert found[0].dtype == found[1].dtype == torch.float32
    assert relative(found[0], wanted[0]) < 1e-6
    assert relative(found[1], wanted[1]) < 1e-6


def test_12_16_chunked_equals_recurrent_equals_quadratic_fp64(chunk):
    inputs = problem()
    wanted = quadratic(**inputs)
    for backend in ("reference", "lean"):
        found = ssd(**inputs, backend=backend)
        assert relative(found[0], wanted[0]) < 1e-13
        assert relative(found[1], wanted[1]) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "lean"])
def test_12_16_equals_the_scan_of_mamba_with_its_decay_spread_over_channels_and_states(backend):
    """One state matrix of D = H P channels: A and step of a head repeated over its channels, A over states too."""
    b, t, h, p, n = 2, 70, 3, 4, 5
    inputs = problem(b, t, h, p, 1, n)
    y, state = ssd(**inputs, backend=backend)
    step = inputs["step"].repeat_interleave(p, -1)
    raw = step + torch.log(-torch.expm1(-step))  # the scan takes steps before softplus
    A = inputs["A"].repeat_interleave(p)[:, None].expand(h * p, n).contiguous()
    wanted_y, wanted_state = selective_scan(
        inputs["x"].flatten(2), raw, A, inputs["B"][:, :, 0], inputs["C"][:, :, 0],
        D=inputs["D"].repeat_interleave(p), h0=inputs["h0"].flatten(1, 2), backend="reference",
    )  # fmt: skip
    assert relative(y.flatten(2), wanted_y) < 1e-12
    assert relative(state.flatten(1, 2), wanted_state) < 1e-12


def test_groups_are_neighbouring_heads():
    """Heads 0 and 1 read group 0, heads 2 and 3 group 1: repeated in place, not tiled."""
    inputs = problem()
    y, _ = ssd(**inputs)
    for group in range(2):
        heads = slice(2 * group, 2 * group + 2)
        own = {name: inputs[name][:, :, heads] for name in ("x", "step")}
        own |= {name: inputs[name][heads] for name in ("A", "D")}
        own |= {name: inputs[name][:, :, group : group + 1] for name in ("B", "C")}
        alone, _ = ssd(**own, h0=inputs["h0"][:, heads])
        assert relative(alone, y[:, :, heads]) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "lean"])
def test_12_03_gradcheck_of_every_input_and_of_the_last_state(backend, monkeypatch):
    monkeypatch.setattr(ssd_chunked, "CHUNK", 4)
    leaves = [tensor.requires_grad_() for tensor in problem(2, 11, 4, 2, 2, 2).values()]
    assert torch.autograd.gradcheck(lambda *given: ssd(*given, backend=backend), leaves)


def test_12_03_reference_backward_equals_autograd_through_its_forward():
    inputs = problem()
    gy, gh = torch.randn_like(inputs["x"]), torch.randn_like(inputs["h0"])
    _, found = with_gradients(inputs, "reference", gy, gh)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    y, h, _ = ssd_reference.forward(*leaves, True)
    for name, wanted in zip(NAMES, torch.autograd.grad([y, h], leaves, [gy, gh]), strict=True):
        assert relative(found[name], wanted) < 1e-12, name


@pytest.mark.parametrize("t", [1, 9, 64, 65, 200])
@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (3, 64, 1, 64), (2, 20, 1, 17), (6, 100, 2, 9)], ids=str)
@pytest.mark.parametrize("backend", ["lean", "native"])
def test_12_03_gradients_in_fp32_equal_the_fp64_reference(native, backend, t, sizes):
    inputs = problem(2, t, *sizes, dtype=torch.float32)
    other = problem(2, t, *sizes, dtype=torch.float32, seed=1)
    gy, gh = other["x"], other["h0"]
    wanted_out, wanted = with_gradients(in_type(inputs, torch.float64), "reference", gy.double(), gh.double())
    found_out, found = with_gradients(inputs, backend, gy, gh)
    for one, two in zip(found_out, wanted_out, strict=True):
        assert relative(one, two) < 1e-6
    for name in NAMES:
        assert found[name].dtype == torch.float32
        assert relative(found[name], wanted[name]) < GRADIENT_TOLERANCE[name], name


def test_gradients_stay_accurate_where_decays_are_strong(level):
    """At A = -16 and steps of 0.3 or more hardly anything is remembered, and the gradient of A is a small remainder."""
    inputs = problem(2, 64, 2, 8, 1, 8, dtype=torch.float32)
    inputs["A"] = torch.tensor([-16.0, -8.0])
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    _, wanted = with_gradients(in_type(inputs, torch.float64), "reference", gy, gh)
    _, found = with_gradients(inputs, level, gy, gh)
    for name in NAMES:
        assert relative(found[name], wanted[name]) < GRADIENT_TOLERANCE[name], name


@pytest.mark.parametrize("missing", [("D",), ("h0",), ("D", "h0")], ids="+".join)
def test_an_input_that_is_absent_equals_zero(level, missing):
    inputs = problem(t=70, dtype=torch.float32)
    absent = {name: tensor for name, tensor in inputs.items() if name not in missing}
    y, h = ssd(**absent, **{name: torch.zeros_like(inputs[name]) for name in missing}, backend=level)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in absent.items()}
    found_y, found_h = ssd(**leaves, backend=level)
    assert relative(found_y, y) < 1e-6
    assert relative(found_h, h) < 1e-6
    (found_y.sum() + found_h.sum()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


# ---- time ----


def test_12_05_pieces_equal_one_pass(level):
    inputs = problem(t=90, dtype=torch.float32)
    whole_y, whole_h = ssd(**inputs, backend=level)
    h, outputs = inputs["h0"], []
    for first, last in itertools.pairwise((0, 1, 2, 2, 5, 40, 41, 90)):
        y, h = ssd(**{**part(inputs, slice(first, last)), "h0": h}, backend=level)
        outputs.append(y)
    assert relative(torch.cat(outputs, 1), whole_y) < 1e-6
    assert relative(h, whole_h) < 1e-6


def test_12_04_step_by_step_equals_one_pass(level):
    inputs = problem(t=70, dtype=torch.float32)
    whole_y, whole_h = ssd(**inputs, backend=level)
    h = inputs["h0"]
    for t in range(70):
        y, h = ssd(**{**part(inputs, slice(t, t + 1)), "h0": h}, backend=level)
        assert relative(y, whole_y[:, t : t + 1]) < 1e-5
    assert relative(h, whole_h) < 1e-5


def test_12_08_the_future_changes_nothing_before_it(level):
    inputs = problem(t=70, dtype=torch.float32)
    y, _ = ssd(**inputs, backend=level)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("x", "step", "B", "C"):
        changed[name][:, 60] += 1
    y_changed, _ = ssd(**changed, backend=level)
    assert torch.equal(y[:, :60], y_changed[:, :60])
    assert not torch.equal(y[:, 60:], y_changed[:, 60:])


def test_12_08_gradient_into_the_future_is_exactly_zero(level):
    inputs = problem(t=70, dtype=torch.float32)
    gy = torch.zeros_like(inputs["x"])
    gy[:, 50] = 1
    _, gradients = with_gradients(inputs, level, gy, torch.zeros_like(inputs["h0"]))
    for name in ("x", "step", "B", "C"):
        assert not gradients[name][:, 51:].any(), name
        assert gradients[name][:, 50].all(), name


def test_12_09_rows_are_independent(level):
    inputs = problem(b=3, t=70, dtype=torch.float32)
    together = ssd(**inputs, backend=level)
    for row in range(3):
        alone = ssd(**part(inputs, rows=slice(row, row + 1)), backend=level)
        for found, wanted in zip(alone, together, strict=True):
            if level == "native":
                assert torch.equal(found[0], wanted[row])
            assert relative(found[0], wanted[row]) < 1e-6


def test_12_17_padding_with_a_zero_step_keeps_the_state(level):
    inputs = problem(t=20, dtype=torch.float32)
    y, h = ssd(**inputs, backend=level)
    padded = {name: F.pad(inputs[name], (0, 0, 0, 0, 0, 50), value=1.0) for name in ("x", "B", "C")}
    padded["step"] = F.pad(inputs["step"], (0, 0, 0, 50))
    y_padded, h_padded = ssd(**{**inputs, **padded}, backend=level)
    assert relative(h_padded, h) < 1e-6
    assert relative(y_padded[:, :20], y) < 1e-6
    if level != "lean":
        assert torch.equal(h, h_padded)


# ---- algebra and extremes ----


def test_12_14_a_large_step_forgets(level):
    inputs = problem(t=70, dtype=torch.float32)
    inputs["step"][:, 35] = 3e3
    other = {**inputs, "h0": inputs["h0"] + 5.0}
    forgets, also = (ssd(**given, backend=level) for given in (inputs, other))
    assert torch.equal(forgets[0][:, 35:], also[0][:, 35:])
    assert not torch.equal(forgets[0][:, :5], also[0][:, :5])
    assert forgets[0].isfinite().all()


def test_12_14_strong_decays_overflow_nothing(level):
    """step A = -200 at every token: exp of the differences above the diagonal would be infinite."""
    inputs = problem(t=70, dtype=torch.float32)
    inputs["step"] = torch.full_like(inputs["step"], 20.0)
    inputs["A"] = torch.full_like(inputs["A"], -10.0)
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    (y, h), gradients = with_gradients(inputs, level, gy, gh)
    alone = torch.einsum("bhp,bhn->bhpn", 20 * inputs["x"][:, -1], inputs["B"][:, -1].repeat_interleave(2, 1))
    assert relative(h, alone) < 1e-6
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["h0"].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_is_never_hidden(level, name):
    inputs = problem(t=3, dtype=torch.float32)
    inputs[name].view(-1)[0] = float("nan")
    y, _ = ssd(**inputs, backend=level)
    assert y.isnan().any()


def test_12_15_linear_in_x_and_state_and_b_trades_with_c(level):
    one, two = (problem(t=70, dtype=torch.float32, seed=seed) for seed in (0, 1))
    mixed = {**one, "x": one["x"] + 2 * two["x"], "h0": one["h0"] + 2 * two["h0"]}
    other = {**one, "x": two["x"], "h0": two["h0"]}
    (y_one, h_one), (y_two, h_two), (y, h) = (ssd(**given, backend=level) for given in (one, other, mixed))
    assert relative(y, y_one + 2 * y_two) < 1e-5
    assert relative(h, h_one + 2 * h_two) < 1e-5
    traded = {**one, "B": one["B"] * 4, "C": one["C"] / 4, "h0": one["h0"] * 4}
    assert relative(ssd(**traded, backend=level)[0], y_one) < 1e-6


# ---- how it runs ----


def test_12_20_the_same_bits_twice(level):
    inputs = problem(b=3, t=70, dtype=torch.float32)
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    runs = []
    for _ in range(2):
        outputs, gradients = with_gradients(inputs, level, gy, gh)
        runs.append([*outputs, *gradients.values()])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_12_20_the_same_bits_for_any_number_of_threads(native):
    inputs = problem(b=3, t=70, h=12, p=48, g=2, n=16, dtype=torch.float32)
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        try:
            outputs, gradients = with_gradients(inputs, "native", gy, gh)
        finally:
            torch.set_num_threads(1)
        results.append([*outputs, *gradients.values()])
    for other in results[1:]:
        assert all(torch.equal(found, wanted) for found, wanted in zip(other, results[0], strict=True))


def test_12_22_native_never_holds_all_states(native):
    b, t, h, p, n = 1, 8192, 8, 64, 64  # all states: 1 GiB
    draw = torch.Generator().manual_seed(0)
    x, B = torch.randn(b, t, h, p, generator=draw), torch.randn(b, t, 1, n, generator=draw)
    leaf = x.clone().requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y, _ = ssd(leaf, torch.ones(b, t, h), -torch.ones(h), B, B, backend="native")
    y.backward(x)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 250  # outputs, gradients and the states at chunk starts


def test_views_into_a_wider_projection_are_taken_as_they_lie(level):
    inputs = problem(t=20, h=4, p=3, g=2, n=5, dtype=torch.float32)
    wide = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], -1)
    x, B, C = wide.split((12, 10, 10), -1)
    views = {"x": x.unflatten(-1, (4, 3)), "B": B.unflatten(-1, (2, 5)), "C": C.unflatten(-1, (2, 5))}
    wanted = ssd(**inputs, backend=level)
    for one, other in zip(ssd(**{**inputs, **views}, backend=level), wanted, strict=True):
        assert relative(one, other) < 1e-6


def test_half_inputs_are_computed_in_fp32(level):
    inputs = problem(t=40, dtype=torch.bfloat16)
    wanted = ssd(**in_type(inputs, torch.float64), backend="reference")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, h = ssd(**leaves, backend=level)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert relative(h.detach(), wanted[1]) < 1e-6
    assert relative(y.detach(), wanted[0]) < 4e-3
    (y.float().sum() + h.sum()).backward()
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves.values())


def test_autocast_does_not_reach_inside(level):
    inputs = problem(t=70, dtype=torch.float32)
    gy, gh = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    wanted, wanted_gradients = with_gradients(inputs, level, gy, gh)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = with_gradients(inputs, level, gy, gh)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in NAMES)


def test_only_one_output_used(level):
    inputs = problem(dtype=torch.float32)
    _, both = with_gradients(inputs, level, torch.ones_like(inputs["x"]), torch.zeros_like(inputs["h0"]))
    leaf = inputs["x"].clone().requires_grad_()
    y, _ = ssd(**{**inputs, "x": leaf}, backend=level)
    y.sum().backward()
    assert relative(leaf.grad, both["x"]) < 1e-6


@pytest.mark.parametrize("t", [1, 9])
def test_the_operators_are_well_formed(level, t):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [tensor.requires_grad_() for tensor in problem(t=t, dtype=torch.float32).values()]
    operators = torch.ops.archbench
    torch.library.opcheck(operators.ssd.default, (*leaves, True, level), test_utils=checks)
    values = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(operators.ssd.default, (*values, False, level), test_utils=("test_schema", "test_faketensor"))
    _, h, starts = operators.ssd(*values, True, level)
    given = (values[0].clone(), h, *values, starts, level)
    torch.library.opcheck(operators.ssd_backward.default, given, test_utils=("test_schema", "test_faketensor"))


def test_without_tokens_the_state_is_a_copy(level):
    inputs = problem(t=0, dtype=torch.float32)
    y, h = ssd(**inputs, backend=level)
    assert y.shape == inputs["x"].shape
    assert torch.equal(h, inputs["h0"])
    assert h.data_ptr() != inputs["h0"].data_ptr()


@pytest.mark.parametrize("name", ["step", "A", "B", "C", "D", "h0"])
def test_a_misshapen_input_is_named(name):
    inputs = problem()
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises((ValueError, TypeError), match=name):  # TypeError under the shape-checking hook
        ssd(**inputs)


def test_groups_that_do_not_divide_the_heads_are_refused():
    inputs = problem(h=4, g=3)
    with pytest.raises(ValueError, match="3 groups in B; their number must divide the 4 heads"):
        ssd(**inputs)


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
    t, heads, width, n = 5, 2, 3, 4
    Scalar.count = 0
    h = [[Scalar() for _ in range(n)] for _ in range(heads * width)]
    for _ in range(t):
        for c in range(heads * width):
            step, x, skip, decay, y = Scalar(), Scalar(), Scalar(), Scalar(), Scalar()
            u = step * x
            for i in range(n):
                h[c][i] = decay * h[c][i] + u * Scalar()
                y = y + Scalar() * h[c][i]
            y = y + skip * x
    assert Scalar.count == module.flops(t, heads * width, n) + module.free_flops(t, heads * width)


def test_every_level_is_one_operator_with_a_cost(level):
    leaves = {k: v.requires_grad_() for k, v in problem(b=2, t=7, h=4, p=3, g=2, n=5, dtype=torch.float32).items()}
    with Seen() as seen:
        y, _ = ssd(**leaves, backend=level)
        y.sum().backward()
    names = [name for name, _ in seen.ours()]
    assert names == ["archbench::ssd", "archbench::ssd_backward"]
    costs = [module.FORMULAS[name](*args) for name, args in seen.ours()]
    assert costs == [5 * 2 * 7 * 12 * 5, 10 * 2 * 7 * 12 * 5]


def test_the_meta_device_gives_shapes_and_costs(level):
    inputs = {name: tensor.to("meta").requires_grad_() for name, tensor in problem(dtype=torch.bfloat16).items()}
    backends.forget()
    with Seen() as seen:
        y, h = ssd(**inputs, backend=level)
        (y.float().sum() + h.sum()).backward()
    assert (y.shape, h.shape, h.dtype) == (inputs["x"].shape, inputs["h0"].shape, torch.float32)
    cost = 5 * 2 * 20 * 12 * 5
    assert [module.FORMULAS[name](*args) for name, args in seen.ours()] == [cost, 2 * cost]
    assert inputs["A"].grad.shape == inputs["A"].shape
    assert backends.in_use() == {}


def test_chunked_flops_are_what_the_matrix_products_of_a_pass_take(monkeypatch):
    monkeypatch.setattr(ssd_chunked, "CHUNK", 8)
    inputs = problem(b=2, t=32, h=4, p=3, g=2, n=5)
    with Seen() as seen:
        ssd_chunked.forward(*inputs.values(), False)
    products = [args for name, args in seen.calls if name == "aten::bmm"]
    executed = sum(2 * a.numel() * b.shape[-1] for a, b in products)
    assert executed == module.chunked_flops(2 * 32, 8, 4, 3, 2, 5)


# ---- the cuda level: its arguments and algebra on CPU, itself where there is a GPU ----


def stand_in(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False,
):  # fmt: skip
    """What mamba_ssm's mamba_chunk_scan_combined computes, from the reference: a stand-in of the same signature."""
    assert return_final_states and not dt_softplus and z is None and dt_bias is None and x.is_contiguous()
    return ssd_reference.forward(x, dt, A, B, C, D, initial_states, False)[:2]


@pytest.mark.parametrize("missing", [(), ("h0",), ("D", "h0")], ids=str)
@pytest.mark.parametrize("t", [0, 1, 20])
def test_the_cuda_level_on_cpu_with_a_stand_in_kernel(monkeypatch, missing, t):
    """The whole path of the level: autograd must work inside the operator, also through the last state."""
    monkeypatch.setattr(ssd_cuda, "_kernel", lambda: stand_in)
    inputs = {**problem(t=t), **dict.fromkeys(missing)}
    leaves = {name: None if tensor is None else tensor.requires_grad_() for name, tensor in inputs.items()}
    present = [leaf for leaf in leaves.values() if leaf is not None]
    gy, gh = problem(t=t, seed=1)["x"], problem(t=t, seed=1)["h0"]
    y, h, _ = torch.ops.archbench.ssd(*leaves.values(), True, "cuda")
    wanted_y, wanted_h = ssd(**leaves, backend="reference")
    assert relative(y, wanted_y) < 1e-12
    assert relative(h, wanted_h) < 1e-12
    found = torch.autograd.grad([y, h], present, [gy, gh])
    for one, other in zip(found, torch.autograd.grad([wanted_y, wanted_h], present, [gy, gh]), strict=True):
        assert relative(one, other) < 1e-12


def test_the_cuda_level_says_why_it_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert backends.available("ssd")["cuda"] == "no CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 65, 300])
def test_gpu_cuda_equals_reference(t):
    found = backends.available("ssd")["cuda"]
    if found != "ok":
        pytest.skip(f"cuda: {found}")
    inputs = problem(2, t, 4, 64, 1, 64, dtype=torch.float32)
    there = {name: tensor.cuda().requires_grad_() for name, tensor in inputs.items()}
    here = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    y, h = ssd(**there, backend="cuda")
    wanted_y, wanted_h = ssd(**here, backend="reference")
    assert relative(y.detach().cpu(), wanted_y.detach()) < 1e-3
    assert relative(h.detach().cpu(), wanted_h.detach()) < 1e-3
    y.sum().backward()
    wanted_y.sum().backward()
    for name in NAMES:
        if here[name].grad is not None:
            assert relative(there[name].grad.cpu(), here[name].grad) < 2e-3, name


# ---- the official package's own plain-torch references, where it is installed ----


@pytest.mark.parametrize("t", [64, 128])
def test_equals_the_official_reference(t):
    official = pytest.importorskip(
        "mamba_ssm.ops.triton.ssd_combined", reason="mamba_ssm is not installed, or not importable without a GPU"
    )
    inputs = problem(2, t, 4, 8, 2, 16, dtype=torch.float32)
    plain = {name: tensor for name, tensor in inputs.items() if name != "h0"}
    y, _ = ssd(**plain, backend="lean")
    given = (inputs[name] for name in ("x", "step", "A", "B", "C"))
    wanted = official.ssd_chunk_scan_combined_ref(*given, 64, D=inputs["D"])
    assert relative(y, wanted) < 1e-5
