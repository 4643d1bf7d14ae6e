# SPDX-License-Identifier: Apache-2.0
"""Eager autograd of `expansion`: what is saved, and which backward operators run.

Saved are x, genes and coefficients, never a weight; x only where a gene or a coefficient needs a gradient. Genes come
tracked (ordinary gradients) or behind a tap (one gradient per pass). Arguments are already checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pylearngene import _ops  # noqa: F401  (registers the operators)
from pylearngene._ops.expansion_products import Product, weight
from pylearngene.functional._context import check_upstream
from pylearngene.functional._single_backward import anchor, anchors_of, single_backward
from pylearngene.functional._tap import Tap

_registered = torch.ops.pylearngene
TRACKED = 8  # where the tracked genes begin among the inputs of `ProductFunction`


def _tap_runs(tap: Tap) -> bool:
    """Whether this backward pass reaches the tap; if not, the genes' gradients are not asked for."""
    node: Any = tap.token.grad_fn
    return bool(torch._C._will_engine_execute_node(node))


def _wanted(flags: Sequence[bool]) -> list[int]:
    return [k for k, flag in enumerate(flags) if flag]


class Use(NamedTuple):
    """One call of a product, as its backward pass has to know it: not the tensors, which are saved.

    Attributes:
        product: which.
        size: of x.
        genes: how many.
        tap: what their gradients hang on; None where they are tracked.
    """

    product: Product
    size: torch.Size
    genes: int
    tap: Tap | None


class ProductFunction(Function):
    """`y = x W^T + b`, or a convolution; inputs (x, coeffs, bias, token, use, genes, bias genes, made, *tracked).

    `token` is the tap's, `made` holds y where it is there already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coeffs: Tensor,
        bias: Tensor | None,
        token: Tensor | None,
        use: Use,
        genes: Sequence[Tensor],
        bias_genes: Sequence[Tensor],
        made: list[Tensor],
        *tracked: Tensor,
    ) -> Tensor:
        need, tap = ctx.needs_input_grad, use.tap
        keeps_x = need[1] or (any(need[TRACKED:]) if tap is None else tap.wanted or tap.bias_wanted)
        ctx.save_for_backward(x if keeps_x else None, coeffs, *genes, *bias_genes)
        ctx.use = use
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        return made.pop() if made else use.product.forward(x, genes, coeffs, bias, bias_genes)

    @staticmethod
    @single_backward
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        check_upstream(dy)
        x, coeffs, *rest = ctx.saved_tensors
        product, size, count, tap = ctx.use
        genes, bias_genes = rest[:count], rest[count:]
        anchor(ctx, x, coeffs, *rest, None if tap is None else tap.token)
        need = ctx.needs_input_grad
        dx = product.input_gradient(dy, size, genes, coeffs) if need[0] else None
        dbias = product.bias_gradient(dy).to(ctx.bias_dtype) if need[2] else None
        if tap is None:
            dcoeffs, tracked = _tracked_gradients(ctx, dy, x, genes, bias_genes, coeffs)
        else:
            dcoeffs, tracked = _tapped_gradients(ctx, dy, x, genes, bias_genes, coeffs), []
        return dx, dcoeffs, dbias, None, None, None, None, None, *tracked


def _tapped_gradients(
    ctx: Any, dy: Tensor, x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], coeffs: Tensor
) -> Tensor | None:
    """Add to the accumulators of the running pass; returns the coefficients' gradient if it is needed."""
    need_dots = ctx.needs_input_grad[1]
    tap: Tap = ctx.use.tap
    wanted, bias_wanted, buffers = tap.wanted, tap.bias_wanted, list[Tensor]()
    if _tap_runs(tap):
        slots, unread = tap.slots + tap.bias_slots, tap.unread + tap.bias_unread
        buffers = tap.ledger.buffers(slots, anchors_of(ctx), unread)
    else:
        wanted, bias_wanted = [], []
    if not (wanted or bias_wanted or need_dots):
        return None
    weights, biases = buffers[: len(wanted)], buffers[len(wanted) :]
    dots: Tensor | None = ctx.use.product.add_gradients(
        weights, biases, dy, x, genes, bias_genes, coeffs, wanted, bias_wanted, need_dots
    )
    return dots if need_dots else None


def _tracked_gradients(
    ctx: Any, dy: Tensor, x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], coeffs: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Ordinary gradients: of the coefficients, and of every tracked gene."""
    count, need = len(genes), ctx.needs_input_grad
    results: list[Tensor | None] = [None] * (len(need) - TRACKED)
    wanted, bias_wanted = _wanted(need[TRACKED : TRACKED + count]), _wanted(need[TRACKED + count :])
    if not (wanted or bias_wanted or need[1]):
        return None, results
    *grads, dots = ctx.use.product.gradients(dy, x, genes, bias_genes, coeffs, wanted, bias_wanted, need[1])
    for slot, grad in zip([*wanted, *(count + k for k in bias_wanted)], grads, strict=True):
        results[slot] = grad.to((*genes, *bias_genes)[slot].dtype)
    return dots if need[1] else None, results


class WeightFunction(Function):
    """`W = sum_k c_k G_k`; inputs (coeffs, token, tap, dtype, genes, is_bias, *tracked genes)."""

    @staticmethod
    def forward(
        ctx: Any,
        coeffs: Tensor,
        token: Tensor | None,
        tap: Tap | None,
        dtype: torch.dtype | None,
        genes: Sequence[Tensor],
        is_bias: bool,
        *tracked: Tensor,
    ) -> Tensor:
        ctx.tap, ctx.is_bias = tap, is_bias
        ctx.save_for_backward(coeffs, *genes)
        return weight(genes, coeffs, dtype)

    @staticmethod
    @single_backward
    def backward(ctx: Any, dw: Tensor) -> tuple[Any, ...]:
        check_upstream(dw)
        coeffs, *genes = ctx.saved_tensors
        anchor(ctx, coeffs, *genes, None if ctx.tap is None else ctx.tap.token)
        need = ctx.needs_input_grad
        tracked: list[Tensor | None] = [None] * (len(need) - 6)
        dots = None
        if ctx.tap is None:
            wanted = _wanted(need[6:])
            *grads, dots = _registered.expansion_weight_wgrad.default(dw, genes, coeffs, wanted, need[0])
            for k, grad in zip(wanted, grads, strict=True):
                tracked[k] = grad.to(genes[k].dtype)
        else:
            wanted, buffers = _tapped_accumulators(ctx) if _tap_runs(ctx.tap) else ([], [])
            if wanted or need[0]:
                dots = _registered.expansion_weight_wgrad_.default(buffers, dw, genes, coeffs, wanted, need[0])
        return dots if need[0] else None, None, None, None, None, None, *tracked


def _tapped_accumulators(ctx: Any) -> tuple[list[int], list[Tensor]]:
    """Which of the genes of one part get a gradient, and their accumulators in the running pass."""
    tap: Tap = ctx.tap
    if ctx.is_bias:
        return tap.bias_wanted, tap.ledger.buffers(tap.bias_slots, anchors_of(ctx), tap.bias_unread)
    return tap.wanted, tap.ledger.buffers(tap.slots, anchors_of(ctx), tap.unread)
