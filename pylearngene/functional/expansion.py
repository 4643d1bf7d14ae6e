# SPDX-License-Identifier: Apache-2.0
"""Public functions of `expansion`: weights that are sums of shared genes, and the products with such a weight.

Checks arguments and picks the autograd path; kernels, regimes and formulas are below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pylearngene import _checks
from pylearngene._ops import expansion_direct as _direct
from pylearngene.errors import ArgumentError, DTypeError, ShapeError
from pylearngene.functional import _expansion_calls as _calls
from pylearngene.functional import _expansion_conv as _conv
from pylearngene.functional._context import autocast, check_pair, check_storages

Genes = Tensor | Sequence[Tensor]
MAX_GENES = 64


def expansion_linear(
    x: Tensor, genes: Genes, coeffs: Tensor, bias: Genes | None = None, activation: str | None = None
) -> Tensor:
    """Apply a linear layer whose weight is a sum of genes.

    `y = activation(x W^T + b)`, `W = sum_k c_k G_k`; `b` is given, or `sum_k c_k b_k` for bias genes.

    The `[O, I]` weight is never stored, in neither pass: forward and backward work on tiles in registers or on
    panels of at most 1 MiB (24 MiB on a GPU), and x, genes and coefficients are all that is saved.

    Args:
        x: `[*, I]`, any strides; float32, float64, bfloat16 or float16. Differentiable.
        genes: K tensors `[O, I]`, or one stacked `[K, O, I]`; one dtype: x's, or any of float32, bfloat16, float16
            where x is one of these (float64 goes only with float64). Any strides. Differentiable.
        coeffs: `[K]`, any of the four dtypes; used in float32 (float64 for float64 genes). Differentiable.
        bias: None, `[O]`, or bias genes (K tensors `[O]`, or one `[K, O]`). Differentiable.
        activation: None, "relu", "gelu" or "silu"; fused where no gradient is needed.

    Returns:
        `[*, O]`, contiguous, in x's dtype (under autocast: the autocast dtype).

    Raises:
        DTypeError: a tensor is not floating, is a tensor subclass, or float64 is mixed with another dtype.
        ShapeError: shapes of x, genes, coeffs or bias do not fit each other.
        DeviceError: the tensors are on different devices, or reach past their storage.
        ArgumentError: no gene or more than 64, or an unknown activation.
        DoubleBackwardError: a gradient of this function is differentiated again.

    Numerics: W is a float32 FMA chain in k order, rounded once to x's dtype; products accumulate as in `F.linear`.
    Gene gradients are summed in float32. Deterministic.

    Backends: C++ (CPU), Triton (CUDA, compute capability 8.0 or newer) and PyTorch (any device). Under functorch
    transforms (`vmap`, `jvp`, ...) the specification runs: it builds the full weight and may be differentiated again.

    Source: linear expansion of layers, Xia et al., "Transformer as Linear Expansion of Learngene", AAAI 2024, eq. 2;
    the general sum over K components as in "Linearly Decomposing and Recomposing Vision Transformers", NeurIPS 2024.

    Example:
        >>> import torch, pylearngene as plg
        >>> genes = [torch.ones(3, 4), torch.ones(3, 4)]
        >>> plg.functional.expansion_linear(torch.ones(2, 4), genes, torch.tensor([1.0, 0.5])).tolist()
        [[6.0, 6.0, 6.0], [6.0, 6.0, 6.0]]
    """
    y = _at_once(x, genes, coeffs, bias) if activation is None else None
    if y is not None:
        return y
    _checks.tensor(x, "x")
    _checks.floating(x, "x")
    genes = _genes(genes, "genes")
    if genes[0].dim() != 2:
        raise ShapeError(f"genes: expected K tensors [O, I], got shape {list(genes[0].shape)}")
    out_features, in_features = genes[0].shape
    _checks.last_dim(x, "x", in_features, "I")
    _checks.same_device(x, "x", genes[0], "genes")
    check_coeffs(coeffs, genes)
    plain, bias_genes = _bias(bias, genes, out_features)
    if activation is not None:
        _checks.choice(activation, "activation", (None, *_calls.ACTIVATIONS))
    x = autocast(x)
    check_pair(x, genes[0])
    _check_bias_dtype(x, plain, *bias_genes[:1])
    return _calls.linear(x, genes, coeffs, plain, bias_genes, activation)


def expansion_conv2d(
    x: Tensor,
    genes: Genes,
    coeffs: Tensor,
    bias: Genes | None = None,
    stride: _conv.Pair = 1,
    padding: _conv.Pair | str = 0,
    dilation: _conv.Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Apply a convolution whose weight is a sum of genes.

    `y = conv2d(x, W) + b`, `W = sum_k c_k G_k`; `b` is given, or `sum_k c_k b_k` for bias genes.

    The `[O, C/groups, kh, kw]` weight is never stored, in neither pass: forward and backward work on panels of at most
    1 MiB (24 MiB on a GPU) or one channel, and x, genes and coefficients are all that is saved. Native kernels (CPU,
    one group) hold a panel and sums that wait, 1 to 2 MiB together, per thread, a copy of an image that does not lie
    channels-last and, for dW, of dy that does; else the vendor's own convolution runs on each panel.

    Args:
        x: `[B, C, H, W]` or `[C, H, W]`, any strides; float32, float64, bfloat16 or float16. Differentiable.
        genes: K tensors `[O, C/groups, kh, kw]`, or one stacked `[K, O, C/groups, kh, kw]`; dtypes as
            `expansion_linear`. Any strides; of genes that are not contiguous a panel is copied at a time, which takes
            longer. Differentiable.
        coeffs: `[K]`, any of the four dtypes; used in float32 (float64 for float64 genes). Differentiable.
        bias: None, `[O]`, or bias genes (K tensors `[O]`, or one `[K, O]`). Differentiable.
        stride: an int or (height, width).
        padding: zeros added on both sides: an int, (height, width), "valid" (none) or "same" (stride 1 only).
        dilation: an int or (height, width).
        groups: divides C and O.

    Returns:
        `[B, O, H', W']` or `[O, H', W']`, in x's dtype (under autocast: the autocast dtype) and memory format.

    Raises:
        DTypeError: as `expansion_linear`.
        ShapeError: shapes of x, genes, coeffs or bias do not fit each other, or x is smaller than the kernel.
        DeviceError: the tensors are on different devices, or reach past their storage.
        ArgumentError: no gene or more than 64, groups that do not divide the channels, or a stride, padding or
            dilation that is not one, or above a million.
        DoubleBackwardError: a gradient of this function is differentiated again.

    Numerics: W is a float32 FMA chain in k order, rounded once to x's dtype; products accumulate in float32, or as in
    `F.conv2d`. Gene gradients are summed in float32; where the vendor convolves, dW is rounded to x's dtype once per
    call. Native kernels multiply the zeros of the padding too, as `F.conv2d` does in some dtypes: at the border an
    infinite W or dy gives NaN. Deterministic.

    Backends: C++ on the CPU for one group, kernels of up to 64 positions and results of 16 channels or more (the
    gradient of x with stride 1 only), where W is more than one panel or the vendor is slow: float64, float16, and
    bfloat16 without AVX512_BF16; else as `expansion_linear` for the weight, and PyTorch's convolution of the
    device for the products. `set_regime("panel")` pins the latter.

    Source: as `expansion_linear`; convolutions are expanded like any other weight.

    Example:
        >>> import torch, pylearngene as plg
        >>> genes = [torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)]
        >>> plg.functional.expansion_conv2d(torch.ones(1, 2, 3, 4), genes, torch.tensor([1.0, 0.5])).tolist()
        [[[[27.0, 27.0]]]]
    """
    _checks.tensor(x, "x")
    _checks.floating(x, "x")
    genes = _genes(genes, "genes")
    if genes[0].dim() != 4 or 0 in genes[0].shape:
        raise ShapeError(
            f"genes: expected K tensors [O, C/groups, kh, kw] of sizes above 0, got {list(genes[0].shape)}"
        )
    weight = genes[0].shape
    conv, sides = _conv.settings(weight[2:], stride, padding, dilation, groups)
    _conv.check_groups(groups, weight[1] * groups, weight[0])
    _checks.same_device(x, "x", genes[0], "genes")
    check_coeffs(coeffs, genes)
    plain, bias_genes = _bias(bias, genes, weight[0])
    _conv.check_image(x, weight, conv, sides)
    x = autocast(_conv.padded(x, sides))
    check_pair(x, genes[0])
    _check_bias_dtype(x, plain, *bias_genes[:1])
    return _conv.convolve(conv, x, genes, coeffs, plain, bias_genes)


def expansion_weight(genes: Genes, coeffs: Tensor) -> Tensor:
    """Synthesize the weight of one layer, or of a stack of layers.

    `W[l] = sum_k c[l, k] G_k`.

    This writes the full weight: for inspection, export and benchmarks. Layers use `expansion_linear`.

    Args:
        genes: K tensors of one shape `[O, I]` (or any other), or one stacked `[K, O, I]`. Differentiable.
        coeffs: `[K]` or `[L, K]`, floating. Differentiable.

    Returns:
        `[O, I]`, or `[L, O, I]`, in the genes' dtype.

    Raises:
        DTypeError: a tensor is not floating, or is a tensor subclass.
        ShapeError: genes differ in shape, or coeffs is not `[K]` or `[L, K]`.
        DeviceError: the tensors are on different devices, or reach past their storage.
        ArgumentError: no gene or more than 64.
        DoubleBackwardError: a gradient of this function is differentiated again.

    Numerics: a float32 FMA chain in k order (float64 for float64 genes), rounded once.

    Backends: as `expansion_linear`. On the CPU, several layers of 2 genes or more are made in one pass over the genes
    (regime `stack`), with the same bits as one by one.

    Source: as `expansion_linear`.

    Example:
        >>> import torch, pylearngene as plg
        >>> genes = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
        >>> plg.functional.expansion_weight(genes, torch.tensor([1.0, 0.25])).tolist()
        [[0.25, 0.25], [0.25, 0.25]]
    """
    genes = _genes(genes, "genes")
    check_coeffs(coeffs, genes, stacked=True)
    return _calls.weight(genes, coeffs)


def _check_bias_dtype(x: Tensor, *biases: Tensor | None) -> None:
    for bias in biases:
        if bias is not None and bias.dtype != x.dtype and torch.float64 in (bias.dtype, x.dtype):
            expected, got = _checks.short(x.dtype), _checks.short(bias.dtype)
            raise DTypeError(f"bias: expected {expected} (x's dtype, float64 does not mix), got {got}")


def _at_once(x: Tensor, genes: Genes, coeffs: Tensor, bias: Any) -> Tensor | None:
    """The short way, for lists; they are copied, since other threads of the caller may change theirs meanwhile."""
    if not isinstance(genes, (list, tuple)):
        return None
    genes, bias_genes = tuple(genes), ()
    if isinstance(bias, (list, tuple)):
        bias, bias_genes = None, tuple(bias)
        if not bias_genes:  # refused, unlike None
            return None
    y = _direct.forward(x, genes, coeffs, bias, bias_genes)
    return None if y is None else _calls.recorded(y, x, genes, coeffs, bias, bias_genes)


def _genes(genes: Genes, name: str) -> list[Tensor]:
    """The genes as a list, each checked."""
    if isinstance(genes, Tensor):
        _checks.tensor(genes, name)
        if genes.dim() < 1:
            raise ShapeError(f"{name}: expected a sequence of tensors or one stacked [K, *], got a scalar tensor")
        check_storages(**{name: genes})
        genes = genes.unbind(0)
    elif not isinstance(genes, Sequence):
        raise DTypeError(f"{name}: expected tensors, or one stacked tensor, got {type(genes).__name__}")
    listed = list(genes)
    if not 1 <= len(listed) <= MAX_GENES:
        raise ArgumentError(f"{name}: expected 1 to {MAX_GENES} genes, got {len(listed)}")
    for k, gene in enumerate(listed):
        _checks.tensor(gene, f"{name}[{k}]")
        _checks.floating(gene, f"{name}[{k}]")
        _checks.shape(gene, f"{name}[{k}]", listed[0].shape, f"that of {name}[0]")
        _checks.same_device(gene, f"{name}[{k}]", listed[0], f"{name}[0]")
        if gene.dtype != listed[0].dtype:
            expected, got = _checks.short(listed[0].dtype), _checks.short(gene.dtype)
            raise DTypeError(f"{name}[{k}]: expected {expected} (that of {name}[0]), got {got}")
    return listed


def check_coeffs(coeffs: Tensor, genes: Sequence[Tensor], stacked: bool = False) -> None:
    """Refuse coefficients that are not floating, not where the genes are, or not one per gene."""
    _checks.tensor(coeffs, "coeffs")
    _checks.floating(coeffs, "coeffs")
    _checks.same_device(coeffs, "coeffs", genes[0], "genes")
    allowed = (1, 2) if stacked else (1,)
    if coeffs.dim() not in allowed or coeffs.shape[-1] != len(genes):
        letters = "[K] or [L, K]" if stacked else "[K]"
        raise ShapeError(f"coeffs: expected shape {letters} with K = {len(genes)} genes, got {list(coeffs.shape)}")


def _bias(bias: Genes | None, genes: Sequence[Tensor], out_features: int) -> tuple[Tensor | None, list[Tensor]]:
    """A plain bias, or bias genes; at most one of the two."""
    if bias is None:
        return None, []
    if isinstance(bias, Tensor) and bias.dim() == 1:
        _checks.tensor(bias, "bias")
        _checks.floating(bias, "bias")
        _checks.shape(bias, "bias", (out_features,), "[O]")
        _checks.same_device(bias, "bias", genes[0], "genes")
        return bias, []
    listed = _genes(bias, "bias")
    if len(listed) != len(genes):
        raise ShapeError(f"bias: expected [O] or K = {len(genes)} bias genes, got {len(listed)}")
    _checks.shape(listed[0], "bias[0]", (out_features,), "[O]")
    _checks.same_device(listed[0], "bias[0]", genes[0], "genes")
    return None, listed
