# SPDX-License-Identifier: Apache-2.0
"""Layer and RMS norms whose gain and bias are sums of shared genes: which autograd path a call takes, what is saved.

On the CPU gain and bias are combined inside the normalization; saved are x, the moments of its tokens, genes and
coefficients. Elsewhere, in compiled graphs and under functorch transforms they are expanded whole, and PyTorch's own
norm follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pylearngene import _backends
from pylearngene._ops import expansion_norm as _kernels
from pylearngene._ops.expansion import place
from pylearngene._ops.expansion_norm import LAYER, RMS, RMS_GAIN_LAST
from pylearngene.functional import _expansion_calls as _calls
from pylearngene.functional._context import autocast_enabled, check_upstream, transformed
from pylearngene.functional._single_backward import anchor, anchors_of, single_backward
from pylearngene.functional._tap import Tap

_registered = torch.ops.pylearngene
How = tuple[int, float]  # the kind of a norm, of `pylearngene._ops.expansion_norm`, and its eps


class Norm(NamedTuple):
    """One call, as its backward pass has to know it: not the tensors, which are saved.

    Attributes:
        kind: of `pylearngene._ops.expansion_norm`.
        eps: as given.
        genes: how many.
        tap: what their gradients hang on; None where they need none.
    """

    kind: int
    eps: float
    genes: int
    tap: Tap | None


def norm(
    how: How,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    tap: _calls.AnyTap,
) -> Tensor:
    """A norm of a kind with an eps, on checked arguments: x `[*, N]`, genes `[N]`, coeffs `[K]`."""
    if not _fused(how[0], x, genes, bias_genes, tap):
        return separate(how, x, genes, bias_genes, coeffs, tap)
    coeffs = coeffs.contiguous()  # some of a row's may be left out
    with torch.no_grad():
        made = _kernels.forward(how[0], x, genes, bias_genes, coeffs, how[1])
    return recorded(made, how, x, genes, bias_genes, coeffs, tap)


def recorded(
    made: tuple[Tensor, Tensor],
    how: How,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    tap: _calls.AnyTap,
) -> Tensor:
    """The norm of which y and the moments are made, in the graph where something needs a gradient."""
    if not torch.is_grad_enabled():
        return made[0]
    if isinstance(tap, Tap):
        return _recorded(x, coeffs, tap.token, Norm(*how, len(genes), tap), genes, bias_genes, [*made])
    if _trained(genes, bias_genes):
        return separate(how, x, genes, bias_genes, coeffs, tap)
    if x.requires_grad or coeffs.requires_grad:
        return _recorded(x, coeffs, None, Norm(*how, len(genes), None), genes, bias_genes, [*made])
    return made[0]


def separate(
    how: How,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    tap: _calls.AnyTap,
) -> Tensor:
    """The norm with gain and bias as tensors, on any device and in any graph."""
    gain = _calls.weight(genes, coeffs, None, tap)
    bias = _calls.weight(bias_genes, coeffs, None, tap, True) if bias_genes else None
    if gain.dtype != x.dtype and not autocast_enabled(x):
        gain, bias = gain.to(x.dtype), None if bias is None else bias.to(x.dtype)
    kind, eps = how
    if kind == RMS_GAIN_LAST:
        return rms_norm_gain_last(x, gain, eps)
    return F.rms_norm(x, gain.shape, gain, eps) if kind == RMS else F.layer_norm(x, gain.shape, gain, bias, eps)


def rms_norm_gain_last(x: Tensor, gain: Tensor, eps: float | None) -> Tensor:
    """RMS norm as in Llama: in float32, rounded to x's dtype, then multiplied by the gain."""
    work = x.to(torch.float32)
    least = torch.finfo(work.dtype).eps if eps is None else eps
    normed = work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + least)
    return gain * normed.to(x.dtype)


def _fused(kind: int, x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], tap: _calls.AnyTap) -> bool:
    """Whether gain and bias are combined inside; a call that is repeated in the backward pass answers the same."""
    if kind == RMS_GAIN_LAST and x.dtype == torch.float64:
        return False  # it works in float32
    if x.device.type != "cpu" or _backends.implementation(x.device) != "cpp":
        return False
    if torch.compiler.is_compiling() or transformed() or (x.dtype != genes[0].dtype and autocast_enabled(x)):
        return False
    return isinstance(tap, Tap) or not (torch.is_grad_enabled() and _trained(genes, bias_genes))


def _trained(*groups: Sequence[Tensor]) -> bool:
    return any(gene.requires_grad for genes in groups for gene in genes)


class _Saved(NamedTuple):
    """What the forward pass has left for the backward pass, unpacked once, as `saved_tensors` may be."""

    x: Tensor
    genes: Sequence[Tensor]
    bias_genes: Sequence[Tensor]
    coeffs: Tensor
    moments: Tensor


class NormFunction(Function):
    """The fused norm; inputs (x, coeffs, token, norm, genes, bias genes, [y, moments])."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coeffs: Tensor,
        token: Tensor | None,
        norm: Norm,
        genes: Sequence[Tensor],
        bias_genes: Sequence[Tensor],
        made: list[Tensor],
    ) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x, coeffs, made.pop(), *genes, *bias_genes)
        return made.pop()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, coeffs, moments, *rest = ctx.saved_tensors
        count, need = ctx.norm.genes, ctx.needs_input_grad
        saved = _Saved(x, rest[:count], rest[count:], coeffs, moments)
        found = None
        if not torch.is_grad_enabled():
            wanted, bias_wanted, buffers = _accumulators(ctx)
            placed: Sequence[Tensor | None] = buffers[: len(wanted)]
            bias_placed: Sequence[Tensor | None] = buffers[len(wanted) :]
            if len(buffers) != len(rest):
                placed = place(buffers[: len(wanted)], wanted, count)
                bias_placed = place(buffers[len(wanted) :], bias_wanted, len(rest) - count)
            found = _kernels.backward(ctx.norm.kind, dy, saved, placed, bias_placed, need[0], need[1])
        dx, dcoeffs = _through_pytorch(ctx, dy, saved) if found is None else found
        return dx, dcoeffs, None, None, None, None, None


_recorded: Callable[..., Tensor] = super(Function, NormFunction).apply  # beneath its care for functorch


def _accumulators(ctx: Any) -> tuple[list[int], list[int], list[Tensor]]:
    """Which genes and bias genes get a gradient, and their accumulators in the running pass."""
    tap: Tap | None = ctx.norm.tap
    node: Any = None if tap is None else tap.token.grad_fn
    if tap is None or not torch._C._will_engine_execute_node(node):
        return [], [], []
    slots, unread = tap.slots + tap.bias_slots, tap.unread + tap.bias_unread
    return tap.wanted, tap.bias_wanted, tap.ledger.buffers(slots, anchors_of(ctx), unread)


def _through_pytorch(ctx: Any, dy: Tensor, saved: _Saved) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and dcoeffs, for any dy; dx may be differentiated again, what genes and coefficients get may not."""
    x, genes, bias_genes, coeffs, moments = saved
    tap, need_dx = ctx.norm.tap, ctx.needs_input_grad[0]
    gain = _calls.weight(genes, coeffs, None, tap)
    bias = _calls.weight(bias_genes, coeffs, None, tap, True) if bias_genes else None
    gain, bias = _kernels.as_read(x, gain, bias)
    dbias: Tensor | None = None
    if ctx.norm.kind == LAYER:
        dx, dgain, dbias = _kernels.vector_gradients(dy, x, moments, gain, bias, need_dx)
    else:
        dx, dgain = _kernels.rms_gradients(ctx.norm.kind, dy, x, gain, ctx.norm.eps)
    (dcoeffs,) = single_backward(partial(_spend, saved))(ctx, dgain, dbias)
    return dx, dcoeffs


def _spend(saved: _Saved, ctx: Any, dgain: Tensor, dbias: Tensor | None) -> tuple[Tensor | None]:
    """Add the gradients of gain and bias to the accumulators; returns dcoeffs if it is needed."""
    coeffs, tap, need_dots = saved.coeffs, ctx.norm.tap, ctx.needs_input_grad[1]
    anchor(ctx, coeffs, *saved.genes, *saved.bias_genes, None if tap is None else tap.token)
    wanted, bias_wanted, buffers = _accumulators(ctx)
    dcoeffs: Tensor | None = None
    parts = (
        (dgain, saved.genes, wanted, buffers[: len(wanted)]),
        (dbias, saved.bias_genes, bias_wanted, buffers[len(wanted) :]),
    )
    for grad, genes, chosen, sums in parts:
        if grad is not None and genes and (chosen or need_dots):
            check_upstream(grad)
            dots = _registered.expansion_weight_wgrad_.default(sums, grad, genes, coeffs, chosen, need_dots)
            dcoeffs = dots if dcoeffs is None else dcoeffs + dots
    return (dcoeffs,)
