# SPDX-License-Identifier: Apache-2.0
"""The contraction of `low_rank` by PyTorch's products, and its autograd for 16-bit x.

In 32 and 64 bits it is plain autograd. In 16 bits the gradients of strengths are sums of products in float32, which a
plain composition would round: strengths are few, and often all that is trained. Arguments are already checked.
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
    if u.dtype != x.dtype:  # asked first: even a conversion to the same dtype costs a call
        u, v = u.to(x.dtype), v.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    tokens = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), len(v))  # products in 2-D alone, for equal bits
    # Not `len`: exported graphs would be of one batch size.
    samples = None if strength.dim() == 1 else (x.shape[0], math.prod(x.shape[1:-1]))
    direct = x.dtype not in _checks.HALF or transformed() or not torch.is_grad_enabled()
    y = (_contract if direct else _product)(tokens, u, strength, v, bias, samples)
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


def _contract(
    x: Tensor, u: Tensor, strength: Tensor, v: Tensor, bias: Tensor | None, samples: tuple[int, int] | None
) -> Tensor:
    inner = _scaled(x @ v, strength, samples)
    inner = inner if inner.dtype == x.dtype else inner.to(x.dtype)
    return inner @ u.t() if bias is None else torch.addmm(bias, inner, u.t())


def _summed(dots: Tensor, samples: tuple[int, int] | None) -> Tensor:
    """The sum over tokens, those of a sample alone where there are samples."""
    return dots.sum(0) if samples is None else dots.view(*samples, dots.shape[1]).sum(1)


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
        return _contract(x, u, strength, v, bias, samples)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, u, strength, v = ctx.saved_tensors
        need, samples = ctx.needs_input_grad, ctx.samples
        product = _wide if need[2] else torch.mm
        du = dstrength = None
        with torch.autocast(dy.device.type, enabled=False):
            upstream = product(dy, u)
            if need[1] or need[2]:
                inner = product(x, v)
                du = dy.t() @ _scaled(inner, strength, samples).to(x.dtype) if need[1] else None
                dstrength = _summed(upstream * inner, samples) if need[2] else None
            scaled = _scaled(upstream, strength, samples).to(x.dtype)
            dx = scaled @ v.t() if need[0] else None
            dv = x.t() @ scaled if need[3] else None
        return dx, du, dstrength, dv, dy.sum(0) if need[4] else None, None


_product: Callable[..., Tensor] = FactoredFunction.apply
