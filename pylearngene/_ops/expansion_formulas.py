# SPDX-License-Identifier: Apache-2.0
"""Autograd formulas of the `expansion` operators, for compiled graphs and functorch.

Eager calls use the `autograd.Function`s of `pylearngene.functional`, which cost less per call. A plain operator returns
ordinary gradients of its genes; a tapped one adds to accumulators made at the start of the pass, and `gene_tap`
returns those once. Double backward raises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pylearngene._ops import expansion_conv  # noqa: F401  (defines operators that get formulas here)
from pylearngene._ops.expansion import LIBRARY
from pylearngene._ops.expansion_products import Conv2d, Linear, Product
from pylearngene.errors import DOUBLE_BACKWARD, DoubleBackwardError

Grads = tuple[Any, ...]
_ops = torch.ops.pylearngene


def _needed(flags: Any) -> list[int]:
    return [k for k, flag in enumerate(flags or ()) if flag]


def _save_product(product: Callable[..., Product], ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, genes, coeffs, bias, bias_genes, *settings = inputs
    ctx.product = product(*settings)
    ctx.counts = (len(genes), len(bias_genes))
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, coeffs, *genes, *bias_genes)


def _of_numbers(numbers: list[int]) -> list[None] | None:
    """The gradient of an `int[]` input: torch takes an empty one for an empty list of tensors."""
    return None if numbers else []


def _dbias(ctx: Any, dy: Tensor) -> Tensor | None:
    if ctx.bias_dtype is None or not ctx.needs_input_grad[3]:
        return None
    db: Tensor = ctx.product.bias_gradient(dy)
    return db.to(ctx.bias_dtype)


def _product_backward(ctx: Any, dy: Tensor) -> Grads:
    x, coeffs, *rest = ctx.saved_tensors
    genes, bias_genes = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    need = ctx.needs_input_grad
    wanted, bias_wanted = _needed(need[1]), _needed(need[4])
    dx = ctx.product.input_gradient(dy, x.shape, genes, coeffs) if need[0] else None
    dgenes: list[Tensor | None] = [None] * len(genes)
    dbias_genes: list[Tensor | None] = [None] * len(bias_genes)
    dcoeffs = None
    if wanted or bias_wanted or need[2]:
        *grads, dots = ctx.product.gradients(dy, x, genes, bias_genes, coeffs, wanted, bias_wanted, need[2])
        for k, grad in zip(wanted, grads[: len(wanted)], strict=True):
            dgenes[k] = grad.to(genes[k].dtype)
        for k, grad in zip(bias_wanted, grads[len(wanted) :], strict=True):
            dbias_genes[k] = grad.to(bias_genes[k].dtype)
        dcoeffs = dots if need[2] else None
    return dx, dgenes, dcoeffs, _dbias(ctx, dy), dbias_genes, *[None] * len(ctx.product)


def _save_product_tapped(product: Callable[..., Product], ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, genes, coeffs, bias, bias_genes, *settings, _, buffers, bias_buffers, wanted, bias_wanted = inputs
    ctx.product = product(*settings)
    ctx.counts = (len(genes), len(bias_genes), len(buffers), len(bias_buffers))
    ctx.wanted = (list(wanted), list(bias_wanted))
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, coeffs, *genes, *bias_genes, *buffers, *bias_buffers)


def _product_tapped_backward(ctx: Any, dy: Tensor) -> Grads:
    x, coeffs, *rest = ctx.saved_tensors
    parts = []
    for count in ctx.counts:
        parts.append(rest[:count])
        rest = rest[count:]
    genes, bias_genes, buffers, bias_buffers = parts
    need = ctx.needs_input_grad
    dx = ctx.product.input_gradient(dy, x.shape, genes, coeffs) if need[0] else None
    dots = ctx.product.add_gradients(buffers, bias_buffers, dy, x, genes, bias_genes, coeffs, *ctx.wanted, need[2])
    token = dy.new_zeros((), dtype=torch.float32)
    nothing = [[None] * count for count in ctx.counts]
    dcoeffs = dots if need[2] else None
    settings = [None] * len(ctx.product)
    numbers = [_of_numbers(wanted) for wanted in ctx.wanted]
    return (
        dx, nothing[0], dcoeffs, _dbias(ctx, dy), nothing[1], *settings, token, nothing[2], nothing[3], *numbers,
    )  # fmt: skip


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    genes, coeffs, _ = inputs
    ctx.save_for_backward(coeffs, *genes)


def _weight_backward(ctx: Any, dw: Tensor) -> Grads:
    coeffs, *genes = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = _needed(need[0])
    *grads, dots = _ops.expansion_weight_wgrad(dw, genes, coeffs, wanted, need[1])
    dgenes: list[Tensor | None] = [None] * len(genes)
    for k, grad in zip(wanted, grads, strict=True):
        dgenes[k] = grad.to(genes[k].dtype)
    return dgenes, dots if need[1] else None, None


def _save_weight_tapped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    genes, coeffs, _, _, buffers, wanted = inputs
    ctx.count, ctx.wanted = len(genes), list(wanted)
    ctx.save_for_backward(coeffs, *genes, *buffers)


def _weight_tapped_backward(ctx: Any, dw: Tensor) -> Grads:
    coeffs, *rest = ctx.saved_tensors
    genes, buffers = rest[: ctx.count], rest[ctx.count :]
    need_dots = ctx.needs_input_grad[1]
    dots = _ops.expansion_weight_wgrad_(buffers, dw, genes, coeffs, ctx.wanted, need_dots)
    token = dw.new_zeros((), dtype=torch.float32)
    return [None] * len(genes), dots if need_dots else None, None, token, [None] * len(buffers), _of_numbers(ctx.wanted)


def _save_tap(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    genes, buffers = inputs
    ctx.dtypes = [gene.dtype for gene in genes]
    ctx.save_for_backward(*buffers)


def _tap_backward(ctx: Any, token: Tensor) -> Grads:
    buffers = ctx.saved_tensors
    return [buffer.to(dtype) for buffer, dtype in zip(buffers, ctx.dtypes, strict=True)], [None] * len(buffers)


def _raise_double_backward(ctx: Any, *grads: Any) -> Grads:
    raise DoubleBackwardError(DOUBLE_BACKWARD)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


_Formula = tuple[Callable[..., Grads], Callable[..., None]]
_FORMULAS: dict[str, _Formula] = {
    "expansion_linear": (_product_backward, partial(_save_product, Linear)),
    "expansion_linear_tapped": (_product_tapped_backward, partial(_save_product_tapped, Linear)),
    "expansion_conv2d": (_product_backward, partial(_save_product, Conv2d)),
    "expansion_conv2d_tapped": (_product_tapped_backward, partial(_save_product_tapped, Conv2d)),
    "expansion_weight": (_weight_backward, _save_weight),
    "expansion_weight_tapped": (_weight_tapped_backward, _save_weight_tapped),
    "gene_tap": (_tap_backward, _save_tap),
    "expansion_conv2d_dx": (_raise_double_backward, _save_nothing),
    "expansion_conv2d_wgrad": (_raise_double_backward, _save_nothing),
    "expansion_linear_dx": (_raise_double_backward, _save_nothing),
    "expansion_linear_wgrad": (_raise_double_backward, _save_nothing),
    "expansion_weight_wgrad": (_raise_double_backward, _save_nothing),
}
for _name, (_backward, _save) in _FORMULAS.items():
    torch.library.register_autograd(f"pylearngene::{_name}", _backward, setup_context=_save, lib=LIBRARY)
