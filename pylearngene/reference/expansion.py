# SPDX-License-Identifier: Apache-2.0
"""Specification of `expansion`: `W = sum_k c_k G_k` and the linear layer or convolution with that weight.

Holds the definition only: no checks, no regimes, no fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def weight(genes: Sequence[Tensor], coeffs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`W = sum_k c_k G_k`, a float32 chain in k order, rounded once to `dtype`.

    Each step is one fused multiply-add: product and sum in float64, then rounded to float32. float64 genes are
    chained in float64.

    Args:
        genes: K tensors of one shape, for instance `[O, I]`.
        coeffs: `[K]`.
        dtype: of the result; the genes' own by default.

    Returns:
        a tensor of the genes' shape.
    """
    work = torch.float64 if genes[0].dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=genes[0].device)
    for k, gene in enumerate(genes):
        total = (coeffs[k].to(work).double() * gene.double() + total).to(work).double()
    return total.to(work).to(dtype or genes[0].dtype)


def linear(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None = None,
    bias_genes: Sequence[Tensor] = (),
) -> Tensor:
    """`y = x W^T + b` with `W = sum_k c_k G_k`, and `b` given or `sum_k c_k b_k`.

    Args:
        x: `[*, I]`.
        genes: K tensors `[O, I]`.
        coeffs: `[K]`.
        bias: `[O]` or None.
        bias_genes: K tensors `[O]`, or none.

    Returns:
        `[*, O]` in x's dtype.
    """
    if bias_genes:
        bias = weight(bias_genes, coeffs)
    return F.linear(x, weight(genes, coeffs, x.dtype), None if bias is None else bias.to(x.dtype))


def conv2d(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None = None,
    bias_genes: Sequence[Tensor] = (),
    *settings: Any,
) -> Tensor:
    """Convolve: `y = x * W + b` with `W = sum_k c_k G_k`, and `b` given or `sum_k c_k b_k`.

    Args:
        x: `[B, C, H, W]`.
        genes: K tensors `[O, C/groups, kh, kw]`.
        coeffs: `[K]`.
        bias: `[O]` or None.
        bias_genes: K tensors `[O]`, or none.
        *settings: stride, padding, dilation and groups, as in `F.conv2d`.

    Returns:
        `[B, O, H', W']` in x's dtype.
    """
    if bias_genes:
        bias = weight(bias_genes, coeffs)
    return F.conv2d(x, weight(genes, coeffs, x.dtype), None if bias is None else bias.to(x.dtype), *settings)
