# SPDX-License-Identifier: Apache-2.0
"""Specification of `low_rank`: `W = U diag(s * gate) V^T` and the linear layer with that weight, or one per sample.

Holds the definition only: it builds full weights; no checks, no order of products.
Absent: triton_kernels/low_rank.py, because its products run through PyTorch.
Absent: csrc/low_rank.h, because its products run through PyTorch.
Absent: csrc/low_rank.cpp, because its products run through PyTorch.
Absent: csrc/cpu/low_rank.cpp, because its products run through PyTorch.
Absent: csrc/cuda/low_rank.cu, because its products run through PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight(u: Tensor, s: Tensor, v: Tensor, gate: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`W = U diag(s * gate) V^T`, summed in float64, rounded to float32 and then to `dtype`.

    `s * gate` is rounded to float32. float64 factors stay float64 throughout.

    Args:
        u: `[O, R]`.
        s: `[R]`.
        v: `[I, R]`.
        gate: None, `[R]`, or `[B, R]`.
        dtype: of the result; that of U by default.

    Returns:
        `[O, I]`, or `[B, O, I]`.
    """
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    scale = s.to(work) if gate is None else s.to(work) * gate.to(work)
    total = (u.double() * scale.double().unsqueeze(-2)) @ v.double().t()
    return total.to(work).to(dtype or u.dtype)


def linear(
    x: Tensor, u: Tensor, s: Tensor, v: Tensor, gate: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`y = x W^T + b` with `W = U diag(s * gate) V^T`; with a gate per sample, each sample has its own weight.

    Args:
        x: `[*, I]`; `[B, *, I]` with a gate per sample.
        u: `[O, R]`.
        s: `[R]`.
        v: `[I, R]`.
        gate: None, `[R]`, or `[B, R]`.
        bias: `[O]` or None.

    Returns:
        `[*, O]` in x's dtype.
    """
    full = weight(u, s, v, gate, x.dtype)
    if full.dim() == 3:
        samples = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        y = (samples @ full.transpose(-1, -2)).reshape(*x.shape[:-1], len(u))
    else:
        y = x @ full.t()
    return y if bias is None else y + bias.to(x.dtype)
