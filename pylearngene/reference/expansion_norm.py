# SPDX-License-Identifier: Apache-2.0
"""Specification of `expansion_norm`: layer and RMS norms whose gain and bias are sums of genes, `g = sum_k c_k g_k`.

Holds the definition only: no checks, no fusion.
Absent: pylearngene/functional/expansion_norm.py, because layers alone use it; their autograd is in _expansion_norm.py.
Absent: triton_kernels/expansion_norm.py, because on a GPU gain and bias are expanded and PyTorch's own norm runs.
Absent: csrc/cuda/expansion_norm.cu, because on a GPU gain and bias are expanded and PyTorch's own norm runs.
Absent: benchmarks/expansion_norm.py, because its cases are among those of host cost and of whole models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pylearngene.reference.expansion import weight


def layer_norm(
    x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], coeffs: Tensor, eps: float = 1e-5
) -> Tensor:
    """`y = (x - mean) / sqrt(var + eps) * g + b` with `g = sum_k c_k g_k` and `b = sum_k c_k b_k`.

    Args:
        x: `[*, N]`.
        genes: K tensors `[N]`.
        bias_genes: K tensors `[N]`, or none.
        coeffs: `[K]`.
        eps: added to the variance.

    Returns:
        `[*, N]` in x's dtype.
    """
    gain = weight(genes, coeffs).to(x.dtype)
    bias = weight(bias_genes, coeffs).to(x.dtype) if bias_genes else None
    return F.layer_norm(x, gain.shape, gain, bias, eps)


def rms_norm(
    x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, eps: float = 1e-6, *, gain_last: bool = False
) -> Tensor:
    """`y = x / sqrt(mean(x^2) + eps) * g` with `g = sum_k c_k g_k`.

    Args:
        x: `[*, N]`.
        genes: K tensors `[N]`.
        coeffs: `[K]`.
        eps: added to the mean square.
        gain_last: whether x is normalized in float32 and rounded to its dtype before the gain multiplies.

    Returns:
        `[*, N]` in x's dtype.
    """
    gain = weight(genes, coeffs).to(x.dtype)
    if not gain_last:
        return F.rms_norm(x, gain.shape, gain, eps)
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * gain
