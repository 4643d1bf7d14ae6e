# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels of `expansion` on CUDA tensors, or on the CPU in Triton's interpreter.

Holds which launch a call gets; arguments are already checked, empty results never reach a kernel, no value is read on
the host. The kernels are in `_expansion_kernels`, gradients in `_expansion_gradients`, the table in `_table`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from pylearngene.triton_kernels import _expansion_kernels as _kernels
from pylearngene.triton_kernels import _launch
from pylearngene.triton_kernels._expansion_gradients import accumulate, gene_gradients
from pylearngene.triton_kernels._launch import INTERPRETED
from pylearngene.triton_kernels._programs import Programs, programs_for
from pylearngene.triton_kernels._row import Row
from pylearngene.triton_kernels._table import GROUP, row_for, tile_count
from torch import Tensor

__all__ = ["INTERPRETED", "accumulate", "fill", "gene_gradients", "product"]

#: What follows a product: tensors that bias is made of, its kind (None, "plain" or "genes"), the activation.
End = tuple[tuple[Tensor, ...], str | None, str | None]


def fill(out: Tensor, genes: Sequence[Tensor], coeffs: Tensor, row: int = 0, col: int = 0) -> None:
    """`out = sum_k c_k G_k[row:row+R, col:col+C]`, rounded once to out's dtype.

    Args:
        out: `[R, C]`, column stride 1.
        genes: K tensors `[O, I]`, any strides.
        coeffs: `[K]` in the work dtype, contiguous.
        row: where the window starts.
        col: likewise.
    """
    rows, cols = out.shape
    if out.numel() == 0:
        return
    # Rows of a window may start anywhere, its columns at a multiple of 16; float64 has half as many registers.
    wide = coeffs.element_size() == 4 and col % 16 == 0 and all(gene.stride(1) == 1 for gene in genes)
    launch = row_for(
        "synthesize", _launch.chip(out.device), 1, len(genes), genes[0].element_size(),
        regular=wide and _launch.regular(16, cols, out, *genes), version=_launch.VERSION,
    )  # fmt: skip
    grid = (tile_count(rows, cols, *launch.tile),)
    with _launch.on(out):
        _kernels.synthesize[grid](
            out, tuple(genes), coeffs, rows, cols, row, col, out.stride(0), *_launch.strides(genes), *launch.tile,
            **launch.options,
        )  # fmt: skip


def product(
    y: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None = None,
    bias_genes: Sequence[Tensor] = (),
    activation: str | None = None,
) -> None:
    """`y = activation(x W^T + b)` with W in registers; the input gradient is the product with transposed genes.

    Where tiles are fewer than the multiprocessors, the sum over I is split and added in order, through at most 24 MiB.

    Args:
        y: `[M, O]`, contiguous, in x's dtype.
        x: `[M, I]`, any strides, 16 bits wide (in the interpreter also float32).
        genes: at most 8 tensors `[O, I]`, any strides.
        coeffs: `[K]` float32, contiguous.
        bias: `[O]`, contiguous, or None.
        bias_genes: K tensors `[O]`, contiguous, instead of a bias.
        activation: None, "relu", "gelu" or "silu".
    """
    (tokens, outs), inner = y.shape, x.shape[1]
    if y.numel() == 0:
        return
    chip, itemsize = _launch.chip(x.device), genes[0].element_size()
    # Where tokens are contiguous, a load of 16 bytes would reach beyond the last of them.
    regular = (x.stride(1) == 1 or tokens % 16 == 0) and _launch.regular(outs, inner, x, *genes)
    wide = activation in ("gelu", "silu")
    row = row_for("fused", chip, tokens, len(genes), itemsize, wide, regular, _launch.VERSION)
    programs = programs_for(row, chip, tokens, outs, inner, len(genes) * itemsize, _launch.multiprocessors(x.device))
    biases = tuple(bias_genes) if bias_genes else (coeffs if bias is None else bias,)
    end: End = (biases, "genes" if bias_genes else None if bias is None else "plain", activation)
    with _launch.on(x):
        if programs.splits == 1:
            _multiply(y, x, genes, coeffs, row, programs, end)
            return
        partials = torch.empty((programs.splits, tokens, outs), dtype=torch.float32, device=x.device)
        _multiply(partials, x, genes, coeffs, row, programs, ((coeffs,), None, None))
        _finish(y, partials, coeffs, end)


def _multiply(
    y: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    row: Row,
    programs: Programs,
    end: End,
) -> None:
    """The product, or its sums in parts where y is `[splits, tokens, outs]`."""
    tokens, outs = y.shape[-2:]
    biases, kind, activation = end
    _kernels.fused[(programs.count,)](
        y, x, tuple(genes), coeffs, biases, tokens, outs, x.shape[1], programs.chunk, *x.stride(),
        *_launch.strides(genes), *row.tile, GROUP, kind, activation, tl.int64 if row.irregular else tl.int32,
        _launch.INTERPRETED, programs.splits > 1, row.persistent and programs.splits == 1, row.stay, **row.options,
    )  # fmt: skip


def _finish(y: Tensor, partials: Tensor, coeffs: Tensor, end: End) -> None:
    """`y = activation(partials.sum(0) + b)`, added in order."""
    tokens, outs = y.shape
    biases, kind, activation = end
    row = row_for("finish", _launch.chip(y.device), 1, 1, 4)
    _kernels.finish[(tile_count(outs, tokens, *row.tile),)](
        y, partials, coeffs, biases, partials.shape[0], tokens, outs, *row.tile, kind, activation, **row.options
    )
