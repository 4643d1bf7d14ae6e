# SPDX-License-Identifier: Apache-2.0
"""The contraction of `low_rank` by PyTorch's products, and its autograd for 16-bit x.

In 32 and 64 bits it is plain autograd. In 16 bits what has R columns stays in float32, which a plain composition would
round: strengths are few, and their gradients are sums of it. Arguments are already checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pylearngene import _checks
from pylearngene.functional._context import transformed


def factored(x: Tensor, u: Tensor, strength: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`((x V) * strength) U^T + b`; strength is `[R]` or `[B, R]`, x is already in its compute dtype."""
    u, v, bias = u.to(x.dtype), v.to(x.dtype), None if bias is None else bias.to(x.dtype)
    tokens = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), len(v))  # products in 2-D alone, for equal bits
    samples = None if strength.dim() == 1 else (len(x), math.prod(x.shape[1:-1]))
    if x.dtype not in _checks.HALF:
        y = _outer(_scaled(tokens @ v, strength, samples), u, bias)
    elif transformed():
        inner = _scaled(tokens.float() @ v.float(), strength, samples)
        y = _outer(inner.to(x.dtype), u, bias)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = _product(tokens, u, strength, v, bias, samples)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(u))


def synthesized(u: Tensor, strength: Tensor, v: Tensor) -> Tensor:
    """`U diag(strength) V^T` in the dtype of U."""
    with torch.autocast(u.device.type, enabled=False):
        return ((u.to(strength.dtype) * strength.unsqueeze(-2)) @ v.to(strength.dtype).t()).to(u.dtype)


def _scaled(inner: Tensor, strength: Tensor, samples: tuple[int, int] | None) -> Tensor:
    """Rows of `[M, R]` times the strengths, those of their sample where there are samples."""
    if samples is None:
        return inner * strength
    return (inner.view(*samples, inner.shape[1]) * strength.unsqueeze(1)).view(inner.shape)


def _outer(inner: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
    return inner @ u.t() if bias is None else torch.addmm(bias, inner, u.t())


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """The product of 16-bit matrices in float32."""
    if a.is_cuda and not torch.is_grad_enabled():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class FactoredFunction(Function):
    """`y = ((x V) * strength) U^T + b` in 16 bits; its backward is made of differentiable products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        strength: Tensor,
        v: Tensor,
        bias: Tensor | None,
        samples: tuple[int, int] | None,
    ) -> Tensor:
        ctx.samples = samples
        ctx.save_for_backward(x, u, strength, v)
        return _outer(_scaled(_wide(x, v), strength, samples).to(x.dtype), u, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, u, strength, v = ctx.saved_tensors
        need, samples = ctx.needs_input_grad, ctx.samples
        dx = du = dstrength = dv = None
        with torch.autocast(dy.device.type, enabled=False):
            inner = _wide(x, v) if need[1] or need[2] else None
            if need[0] or need[2] or need[3]:
                upstream = _wide(dy, u)
                scaled = _scaled(upstream, strength, samples).to(x.dtype)
                dx = scaled @ v.t() if need[0] else None
                dv = x.t() @ scaled if need[3] else None
            if inner is not None and need[1]:
                du = dy.t() @ _scaled(inner, strength, samples).to(x.dtype)
            if inner is not None and need[2]:
                dots = upstream * inner
                dstrength = dots.sum(0) if samples is None else dots.view(*samples, dots.shape[1]).sum(1)
        dbias = dy.sum(0) if need[4] else None
        return dx, du, dstrength, dv, dbias, None


_product: Callable[..., Tensor] = FactoredFunction.apply
