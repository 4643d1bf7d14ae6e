# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels of `expansion` on CUDA tensors, or on the CPU in Triton's interpreter.

Holds which launch a call gets; arguments are already checked, empty results never reach a kernel, no value is read on
the host. The kernels are in `_expansion_kernels`, the table in `_table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from pylearngene.triton_kernels import _expansion_kernels as _kernels
from pylearngene.triton_kernels._table import GROUP, INTERPRETER, MOST_GENES, chip_of, is_regular, row_for, tile_count
from torch import Tensor
from triton import knobs

#: Whether the kernels were decorated for the interpreter (TRITON_INTERPRET is read once, when this is imported).
INTERPRETED = bool(knobs.runtime.interpret)

__all__ = ["INTERPRETED", "accumulate", "fill", "gene_gradients", "product"]


@lru_cache(maxsize=64)
def _chip(device: torch.device) -> str:
    if INTERPRETED:
        return INTERPRETER
    chip = chip_of(torch.cuda.get_device_capability(device))
    assert chip is not None, "refused before"
    return chip


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _strides(genes: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(gene.stride(0) for gene in genes), tuple(gene.stride(1) for gene in genes)


def _regular(outs: int, inner: int, *matrices: Tensor) -> bool:
    even = outs % 16 == 0 and inner % 16 == 0
    return even and all(is_regular(matrix.data_ptr(), matrix.stride()) for matrix in matrices)


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
    launch = row_for("synthesize", _chip(out.device), 1, len(genes), genes[0].element_size())
    grid = (tile_count(rows, cols, *launch.tile),)
    with _on(out):
        _kernels.synthesize[grid](
            out, tuple(genes), coeffs, rows, cols, row, col, out.stride(0), *_strides(genes), *launch.tile,
            num_warps=launch.warps, num_stages=launch.stages,
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
    launch = row_for(
        "fused", _chip(x.device), tokens, len(genes), genes[0].element_size(),
        activation in ("gelu", "silu"), _regular(outs, inner, x, *genes),
    )  # fmt: skip
    grid = (tile_count(outs, tokens, *launch.tile[:2]),)
    biases = tuple(bias_genes) if bias_genes else (coeffs if bias is None else bias,)
    kind = "genes" if bias_genes else None if bias is None else "plain"
    with _on(x):
        _kernels.fused[grid](
            y, x, tuple(genes), coeffs, biases, tokens, outs, inner, *x.stride(), *_strides(genes), *launch.tile, GROUP,
            kind, activation, INTERPRETED, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


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
            "gene_gradients", _chip(x.device), outs * inner, len(some), genes[0].element_size(),
            regular=_regular(outs, inner, dy, x, *some),
        )  # fmt: skip
        count = tile_count(outs, inner, *launch.tile[:2])
        dots = coeffs.new_empty((count if need_dots else 0, len(some)))
        with _on(x):
            _kernels.gene_gradients[(count,)](
                dy, x, tuple(some), _pointers(into, coeffs), coeffs[first:], dots, x.shape[0], outs, inner,
                *dy.stride(), *x.stride(), *_strides(some), *launch.tile, GROUP, _bits(into), need_dots,
                tl.int64 if launch.irregular else tl.int32, INTERPRETED,
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
    launch = row_for("accumulate", _chip(panel.device), 1, len(genes), genes[0].element_size())
    count = tile_count(rows, cols, *launch.tile)
    dots = coeffs.new_empty((count if need_dots else 0, len(genes)))
    if count:
        with _on(panel):
            _kernels.accumulate[(count,)](
                panel, tuple(genes), _pointers(buffers, coeffs), coeffs, dots, rows, cols, row, panel.stride(0),
                *_strides(genes), *launch.tile, _bits(buffers), need_dots, tl.int64,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
    return dots.sum(0, dtype=torch.float64) if need_dots else None


def _pointers(buffers: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, ...]:
    """Every place of the kernel's tuple holds a pointer; those of genes that need no gradient are never followed."""
    return tuple(other if buffer is None else buffer for buffer in buffers)


def _bits(buffers: Sequence[Tensor | None]) -> int:
    """Which buffers are written, one bit each."""
    return sum(1 << k for k, buffer in enumerate(buffers) if buffer is not None)
