"""What each operator of torch costs: the formulas of those that are counted, the names of those that are free.

Counted (a multiply-add is 2 FLOPs): matrix products, attention, convolutions and the package's own kernels. Free by
convention: views, copies, indexing, elementwise, reductions, norms, softmax, losses, random numbers. An operator on
neither list has no known cost, and who counts must say so.

Letters: b batch, t new positions, s positions attended to, e head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from archbench.ops import conv, scan, ssd

Formula = Callable[[Mapping[str, Any], Any, float], float]
"""(arguments by their names in the operator's schema, result, causal) -> FLOPs"""


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *, square: bool, masked: bool, causal: float) -> float:
    """Scores and weighted sum of attention: query [..., t, e], key [..., s, e], value [..., s, e'].

    `square` says that query i sees keys up to i (torch's `is_causal`), `masked` that an explicit mask was given.
    """
    t, s = query.shape[-2], key.shape[-2]
    side = min(t, s)
    if square and side > 1:
        pairs = causal * side * side + (t - side) * s
    elif masked and s >= t > 1:
        pairs = t * (s - t) + causal * t * t
    else:
        pairs = 1 if square and side == t else t * s
    return 2 * math.prod(query.shape[:-2]) * (query.shape[-1] + value.shape[-1]) * pairs


def _product(left: str, right: str) -> Formula:
    """Matrix product of the arguments named, [..., n, k] by [..., k, m] or [..., n, k] by [k]."""

    def flops(arguments: Mapping[str, Any], _out: Any, _causal: float) -> float:
        a, b = arguments[left], arguments[right]
        return 2 * a.numel() * (b.shape[-1] if b.ndim > 1 else 1)

    return flops


def _outer(arguments: Mapping[str, Any], _out: Any, _causal: float) -> float:
    return 2 * arguments["vec1"].numel() * arguments["vec2"].numel()


def _convolution(arguments: Mapping[str, Any], out: Tensor, _causal: float) -> float:
    # The weight is [out, in / groups, ...]; transposed, [in, out / groups, ...].
    positions = arguments["input"] if arguments["transposed"] else out
    return 2 * positions.numel() * math.prod(arguments["weight"].shape[1:])


def _convolution_backward(arguments: Mapping[str, Any], _out: Any, causal: float) -> float:
    of_input, of_weight, _ = arguments["output_mask"]
    return (of_input + of_weight) * _convolution(arguments, arguments["grad_output"], causal)


def _fused_attention(arguments: Mapping[str, Any], _out: Any, causal: float) -> float:
    masked = arguments.get("attn_mask") is not None or arguments.get("attn_bias") is not None
    square = arguments.get("is_causal", False)
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    return attention_flops(q, k, v, square=square, masked=masked, causal=causal)


def _fused_attention_backward(arguments: Mapping[str, Any], out: Any, causal: float) -> float:
    return 2 * _fused_attention(arguments, out, causal)


def _blockwise_attention(arguments: Mapping[str, Any], _out: Any, causal: float) -> float:
    q, k, v = (arguments[name] for name in "qkv")
    return attention_flops(q, k, v, square=False, masked=True, causal=causal)


def _blockwise_attention_backward(arguments: Mapping[str, Any], out: Any, causal: float) -> float:
    # Forward is two products; backward one for each of dV, dP (needed by dQ and dK), dQ and dK.
    q, k, v = arguments["wanted"]
    return _blockwise_attention(arguments, out, causal) / 2 * (q + k + v + (q or k))


_FUSED = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""What torch makes of attention on some devices; met only where code calls these by name."""

FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::_scaled_mm", "aten::_int_mm"), _product("self", "mat2")),
    **dict.fromkeys(("aten::addmm", "aten::_addmm_activation"), _product("mat1", "mat2")),
    **dict.fromkeys(("aten::baddbmm", "aten::addbmm"), _product("batch1", "batch2")),
    "aten::mv": _product("self", "vec"),
    "aten::addmv": _product("mat", "vec"),
    "aten::dot": _product("self", "tensor"),
    "aten::vdot": _product("self", "other"),
    "aten::addr": _outer,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "archbench::blockwise_attention": _blockwise_attention,
    "archbench::blockwise_attention_backward": _blockwise_attention_backward,
    **{f"aten::{name}": _fused_attention for name in _FUSED},
    **{f"aten::{name}_backward": _fused_attention_backward for name in _FUSED},
}
"""Operators of torch that are counted, by name without overload."""


def is_counted(operator: Any) -> bool:
    """Whether there is a formula for an operator (torch's OpOverload)."""
    return any(_formulas_of(operator))


def flops_of(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, causal: float) -> float:
    """FLOPs of one call, with these arguments and this result, of an operator that is counted."""
    schema = operator._schema.arguments
    named = {**{a.name: value for a, value in zip(schema, args, strict=False)}, **kwargs}
    formula, kernel, registered = _formulas_of(operator)
    if formula is not None:
        return formula(named, out, causal)
    if kernel is not None:
        return kernel(*(named.get(a.name, a.default_value) for a in schema))
    assert registered is not None, f"{name_of(operator)} is not counted"
    return registered(*args, **kwargs, out_val=out)


class _Formulas(NamedTuple):
    """At most one is there: of torch's own operators (in-place variants, with a trailing underscore, count alike), of
    this package's kernels (taking the operator's arguments in order), or registered with torch by other packages."""

    own: Formula | None
    kernel: Callable[..., float] | None
    registered: Callable[..., float] | None


def _formulas_of(operator: Any) -> _Formulas:
    name = name_of(operator)
    return _Formulas(
        FORMULAS.get(name) or FORMULAS.get(name.removesuffix("_")),
        scan.FORMULAS.get(name) or conv.FORMULAS.get(name) or ssd.FORMULAS.get(name),
        None if name.startswith("aten::") else flop_registry.get(operator.overloadpacket),
    )


_FREE_BY_KIND = {
    "memory": (
        "empty empty_strided empty_like empty_permuted new_empty new_empty_strided new_zeros new_ones new_full zeros "
        "zeros_like ones ones_like full full_like eye arange linspace scalar_tensor fill zero copy clone _to_copy lift "
        "lift_fresh_copy _pin_memory resize set_ cat stack constant_pad_nd repeat repeat_interleave roll flip tril "
        "triu tril_indices triu_indices unfold_backward slice_backward select_backward slice_scatter select_scatter "
        "diagonal_scatter diagonal_backward as_strided_scatter _reshape_copy _unsafe_view _local_scalar_dense "
        "_assert_async _assert_scalar complex polar view_as_real_copy view_as_complex_copy _foreach_copy"
    ),
    "indexing": (
        "embedding embedding_dense_backward embedding_renorm index index_put _unsafe_index _unsafe_index_put "
        "_index_put_impl index_select index_add index_copy index_fill index_reduce gather scatter scatter_add "
        "scatter_reduce take put masked_fill masked_select masked_scatter masked_scatter_backward nonzero "
        "nonzero_static bincount _unique2 unique_consecutive unique_dim sort topk kthvalue searchsorted bucketize isin "
        "histc"
    ),
    "reductions and prefix sums": (
        "sum nansum mean prod amax amin aminmax max min argmax argmin any all var var_mean std std_mean logsumexp "
        "median nanmedian mode norm linalg_vector_norm count_nonzero trace cumsum cumprod cumprod_backward cummax "
        "cummin logcumsumexp _logcumsumexp _cummax_helper _cummin_helper"
    ),
    "norms": (
        "native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm "
        "native_batch_norm_backward _native_batch_norm_legit _native_batch_norm_legit_functional cudnn_batch_norm "
        "cudnn_batch_norm_backward _fused_rms_norm _fused_rms_norm_backward"
    ),
    "softmax and losses": (
        "softmax log_softmax _softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data "
        "_masked_softmax _masked_softmax_backward nll_loss_forward nll_loss_backward nll_loss2d_forward "
        "nll_loss2d_backward mse_loss mse_loss_backward smooth_l1_loss smooth_l1_loss_backward huber_loss "
        "huber_loss_backward binary_cross_entropy binary_cross_entropy_backward log_sigmoid_forward "
        "log_sigmoid_backward"
    ),
    "activations without the tag": (
        "softplus_backward leaky_relu_backward elu_backward hardtanh_backward hardsigmoid_backward hardswish "
        "hardswish_backward mish_backward softshrink_backward glu glu_backward glu_jvp _prelu_kernel "
        "_prelu_kernel_backward native_dropout native_dropout_backward bitwise_xor"
    ),
    "random numbers": (
        "rand rand_like randn randn_like randint randint_like randperm bernoulli multinomial uniform normal "
        "exponential cauchy log_normal geometric random poisson binomial _standard_gamma _sample_dirichlet"
    ),
}

FREE = frozenset(name for names in _FREE_BY_KIND.values() for name in names.split())
"""Operators of `aten` that are free by convention, beside those tagged pointwise and those that only make views. An
in-place variant (a trailing underscore) is free alike."""


def is_free(operator: Any) -> bool:
    """Whether an operator (torch's OpOverload) costs nothing by convention."""
    if torch.Tag.pointwise in operator.tags or operator.is_view:
        return True
    space, _, base = name_of(operator).partition("::")
    return space == "aten" and (base in FREE or base.removesuffix("_") in FREE)


def name_of(operator: Any) -> str:
    """`namespace::name`, without the overload."""
    return operator._schema.name
