# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels of `expansion` that add to gradients, on CUDA tensors or in Triton's interpreter.

Arguments are already checked, no value is read on the host. The kernels are in `_expansion_gradient_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from pylearngene.triton_kernels import _expansion_gradient_kernels as _kernels
from pylearngene.triton_kernels import _launch
from pylearngene.triton_kernels._row import MOST_GENES
from pylearngene.triton_kernels._table import GROUP, row_for, tile_count
from torch import Tensor


def gene_gradients(
    buffers: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    need_dots: bool,
) -> Tensor | None:
    """`buffers[k] += c_k dy^T x`; returns `<dW, G_k>` as `[K]` float64 where `need_dots`, else None.

    dW exists as float32 tiles in registers only; with more than 8 genes it is formed once per 8 of them.

    Args:
        buffers: per gene its contiguous `[O, I]` float32 accumulator, or None.
        dy: `[M, O]`, any strides, in x's dtype.
        x: `[M, I]`, any strides, 16 bits wide (in the interpreter also float32).
        genes: K tensors `[O, I]`, any strides.
        coeffs: `[K]` float32, contiguous.
        need_dots: whether the coefficients need a gradient.
    """
    outs, inner = genes[0].shape
    if outs == 0 or inner == 0:
        return coeffs.new_zeros(len(genes), dtype=torch.float64) if need_dots else None
    sums = []
    for first in range(0, len(genes), MOST_GENES):
        some, into = genes[first : first + MOST_GENES], buffers[first : first + MOST_GENES]
        if not need_dots and all(buffer is None for buffer in into):
            continue
        launch = row_for(
            "gene_gradients", _launch.chip(x.device), outs * inner, len(some), genes[0].element_size(),
            regular=_launch.regular(outs, inner, dy, x, *some),
        )  # fmt: skip
        count = tile_count(outs, inner, *launch.tile[:2])
        dots = coeffs.new_empty((count if need_dots else 0, len(some)))
        with _launch.on(x):
            _kernels.gene_gradients[(count,)](
                dy, x, tuple(some), _pointers(into, coeffs), coeffs[first:], dots, x.shape[0], outs, inner,
                *dy.stride(), *x.stride(), *_launch.strides(some), *launch.tile, GROUP, _bits(into), need_dots,
                tl.int64 if launch.irregular else tl.int32, _launch.INTERPRETED,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        sums.append(dots.sum(0, dtype=torch.float64))
    return torch.cat(sums) if need_dots else None


def accumulate(
    panel: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    buffers: Sequence[Tensor | None],
    row: int,
    need_dots: bool,
) -> Tensor | None:
    """`buffers[k][row:row+R] += c_k dW` from a panel of dW; returns the panel's `<dW, G_k>` as `[K]` float64, or None.

    Args:
        panel: `[R, I]`, rows `row .. row+R` of dW, column stride 1.
        genes: K tensors `[O, I]`, any strides.
        coeffs: `[K]` in the work dtype, contiguous.
        buffers: per gene its contiguous `[O, I]` accumulator in the work dtype, or None.
        row: first row of the panel.
        need_dots: whether the coefficients need a gradient.
    """
    rows, cols = panel.shape
    launch = row_for("accumulate", _launch.chip(panel.device), 1, len(genes), genes[0].element_size())
    count = tile_count(rows, cols, *launch.tile)
    dots = coeffs.new_empty((count if need_dots else 0, len(genes)))
    if count:
        with _launch.on(panel):
            _kernels.accumulate[(count,)](
                panel, tuple(genes), _pointers(buffers, coeffs), coeffs, dots, rows, cols, row, panel.stride(0),
                *_launch.strides(genes), *launch.tile, _bits(buffers), need_dots, tl.int64,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
    return dots.sum(0, dtype=torch.float64) if need_dots else None


def _pointers(buffers: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, ...]:
    """Every place of the kernel's tuple holds a pointer; those of genes that need no gradient are never followed."""
    return tuple(other if buffer is None else buffer for buffer in buffers)


def _bits(buffers: Sequence[Tensor | None]) -> int:
    """Which buffers are written, one bit each."""
    return sum(1 << k for k, buffer in enumerate(buffers) if buffer is not None)
