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
    return bool(torch._C._will_engine_execute_node(tap.node))


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
        product, _, count, tap = ctx.use
        anchor(ctx, x, coeffs, *rest, None if tap is None else tap.token)
        gradients = _tracked_gradients if tap is None else _tapped_gradients
        dx, dcoeffs, *tracked = gradients(ctx, dy, x, rest[:count], rest[count:], coeffs)
        dbias = product.bias_gradient(dy).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dcoeffs, dbias, None, None, None, None, None, *tracked


def _tapped_gradients(
    ctx: Any, dy: Tensor, x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], coeffs: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Add to the sums of the running pass; returns dx and the coefficients' gradient, each if it is needed."""
    (need_dx, need_dots, *_), (product, size, _, tap) = ctx.needs_input_grad, ctx.use
    runs = _tap_runs(tap)
    if runs and not need_dots:
        sums = tap.ledger.sums(anchors_of(ctx), tap.unread + tap.bias_unread)
        done, dx = _at_once(ctx, dy, x, genes, bias_genes, coeffs, (tap.places, tap.bias_places), sums)
        if done:
            return dx, None
    else:
        dx = product.input_gradient(dy, size, genes, coeffs) if need_dx else None
    wanted, bias_wanted, buffers = [], [], []
    if runs:
        wanted, bias_wanted = tap.wanted, tap.bias_wanted
        buffers = tap.ledger.buffers(tap.slots + tap.bias_slots, anchors_of(ctx), tap.unread + tap.bias_unread)
    if not (wanted or bias_wanted or need_dots):
        return dx, None
    weights, biases = buffers[: len(wanted)], buffers[len(wanted) :]
    dots = product.add_gradients(weights, biases, dy, x, genes, bias_genes, coeffs, wanted, bias_wanted, need_dots)
    return dx, dots if need_dots else None


def _tracked_gradients(
    ctx: Any, dy: Tensor, x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], coeffs: Tensor
) -> list[Tensor | None]:
    """Ordinary gradients: of x, of the coefficients, and of every tracked gene."""
    count, need, product = len(genes), ctx.needs_input_grad, ctx.use.product
    wanted, bias_wanted = _wanted(need[TRACKED : TRACKED + count]), _wanted(need[TRACKED + count :])
    grads: list[Any] = [None] * (len(need) - TRACKED)
    places = [k if need[TRACKED + k] else -1 for k in range(len(grads))]
    done, dx = False, None
    if (wanted or bias_wanted) and not need[1]:
        pair = places[:count], places[count:]
        done, dx = _at_once(ctx, dy, x, genes, bias_genes, coeffs, pair, grads)
    elif need[0]:
        dx = product.input_gradient(dy, ctx.use.size, genes, coeffs)
    dots = None
    if not done and (wanted or bias_wanted or need[1]):
        *found, dots = product.gradients(dy, x, genes, bias_genes, coeffs, wanted, bias_wanted, need[1])
        for slot, grad in zip([*wanted, *(count + k for k in bias_wanted)], found, strict=True):
            grads[slot] = grad
    tracked = [
        grad if grad is None else grad.to(gene.dtype) for grad, gene in zip(grads, (*genes, *bias_genes), strict=True)
    ]
    return [dx, dots if need[1] else None, *tracked]


def _at_once(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    places: tuple[list[int], list[int]],
    sums: list[Tensor | None],
) -> tuple[bool, Tensor | None]:
    """Whether sums have got what is theirs in one call, and dx if it is needed, from that call or one of its own."""
    need_dx, (product, size, _, _) = ctx.needs_input_grad[0], ctx.use
    done = product.at_once(dy, x, genes, coeffs, bias_genes, places, sums, need_dx)
    if done is not None or not need_dx:
        return done is not None, done if need_dx else None
    dx = product.input_gradient(dy, size, genes, coeffs)
    return product.at_once(dy, x, genes, coeffs, bias_genes, places, sums, False) is not None, dx


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
