# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels of `expansion` that add to gradients, on CUDA tensors or in Triton's interpreter.

Arguments are already checked, no value is read on the host. The kernels are in `_expansion_gradient_kernels`, how many
programs share a tile's tokens in `_splits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pylearngene.triton_kernels import _expansion_gradient_kernels as _kernels
from pylearngene.triton_kernels import _launch
from pylearngene.triton_kernels._row import MOST_GENES
from pylearngene.triton_kernels._splits import halvings, splits_for, sums_per_tile
from pylearngene.triton_kernels._table import GROUP, is_regular, row_for, tile_count
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

    dW exists as float32 tiles in registers; where tiles are few, the last rows of it also as at most 24 MiB of partial
    sums. With more than 8 genes it is formed once per 8 of them. Each sum has one order: equal calls give equal bits.

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
        if need_dots or any(buffer is not None for buffer in into):
            with _launch.on(x):
                table = _of_some(into, dy, x, some, coeffs[first : first + MOST_GENES], need_dots)
            sums.append(table.sum(0, dtype=torch.float64) if need_dots else table)
    return torch.cat(sums) if need_dots else None


def _of_some(
    buffers: Sequence[Tensor | None], dy: Tensor, x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, need_dots: bool
) -> Tensor:
    """The same for at most 8 genes; returns a table whose rows add up to the sums, of no rows without dots."""
    (outs, inner), tokens = genes[0].shape, x.shape[0]
    chip, regular = _launch.chip(x.device), _launch.regular(outs, inner, dy, x) and _even(inner, genes)
    launch = row_for(
        "gene_gradients", chip, outs * inner, len(genes), genes[0].element_size(), regular=regular,
        version=_launch.VERSION,
    )  # fmt: skip
    split = splits_for(launch, chip, tokens, outs, inner, _launch.multiprocessors(x.device) * launch.programs)
    tables = []
    for row, rows, splits in ((0, split.whole, 1), (split.whole, outs - split.whole, split.splits)):
        if rows == 0:
            continue
        some, into = [gene[row : row + rows] for gene in genes], _rows(buffers, row, rows)
        tiles, warps = tile_count(rows, inner, *launch.tile[:2]), sums_per_tile(launch)
        # What several programs of a tile have summed waits for `accumulate`; they touch no gene.
        shared = splits > 1
        sums = coeffs.new_empty((splits * rows, inner) if shared else (tiles * warps if need_dots else 0, len(genes)))
        read, added = (some[:1], into[:1]) if shared else (some, into)
        grid = (tile_count(splits * tiles, 1, 1, 1),)
        _kernels.gene_gradients[grid](
            dy[:, row:], x, tuple(read), _pointers(added, coeffs), coeffs, sums, tokens, split.chunk, rows, inner,
            *dy.stride(), *x.stride(), *_launch.strides(read), *launch.tile, GROUP, halvings(launch), warps,
            0 if shared else _bits(added), need_dots and not shared, not launch.irregular, shared,
            _launch.INTERPRETED, **launch.options,
        )  # fmt: skip
        tables.append(_add(sums, rows, splits, some, coeffs, into, 0, need_dots) if shared else sums)
    return torch.cat(tables)


def accumulate(
    panel: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    buffers: Sequence[Tensor | None],
    row: int,
    need_dots: bool,
) -> Tensor | None:
    """`buffers[k][row:row+R] += c_k dW` from a panel of dW; returns the panel's `<dW, G_k>` as `[K]` float64, or None.

    With more than 8 genes the panel is read once per 8 of them. Each sum has one order: equal calls give equal bits.

    Args:
        panel: `[R, I]`, rows `row .. row+R` of dW, column stride 1.
        genes: K tensors `[O, I]`, any strides.
        coeffs: `[K]` in the work dtype, contiguous.
        buffers: per gene its contiguous `[O, I]` accumulator in the work dtype, or None.
        row: first row of the panel.
        need_dots: whether the coefficients need a gradient.
    """
    if panel.numel() == 0:
        return coeffs.new_zeros(len(genes), dtype=torch.float64) if need_dots else None
    sums = []
    for first in range(0, len(genes), MOST_GENES):
        some, into = genes[first : first + MOST_GENES], buffers[first : first + MOST_GENES]
        if need_dots or any(buffer is not None for buffer in into):
            with _launch.on(panel):
                table = _add(panel, len(panel), 1, some, coeffs[first : first + MOST_GENES], into, row, need_dots)
            sums.append(table.sum(0, dtype=torch.float64) if need_dots else table)
    return torch.cat(sums) if need_dots else None


def _add(
    panels: Tensor,
    rows: int,
    splits: int,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    buffers: Sequence[Tensor | None],
    row: int,
    need_dots: bool,
) -> Tensor:
    """Add `splits` panels of `rows` rows each, which stand one below the other; returns the table of dots."""
    cols = panels.shape[1]
    # Tiles of the regular row are too wide for the registers of float64.
    narrow = coeffs.element_size() == 4
    regular = narrow and is_regular(panels.data_ptr(), panels.stride()) and _even(cols, genes)
    launch = row_for(
        "accumulate", _launch.chip(panels.device), 1, len(genes), genes[0].element_size(), regular=regular,
        version=_launch.VERSION,
    )  # fmt: skip
    count = tile_count(rows, cols, *launch.tile)
    warps = sums_per_tile(launch)
    dots = coeffs.new_empty((count * warps if need_dots else 0, len(genes)))
    _kernels.accumulate[(count,)](
        panels, tuple(genes), _pointers(buffers, coeffs), coeffs, dots, rows, cols, row, splits, panels.stride(0),
        *_launch.strides(genes), *launch.tile, warps, _bits(buffers), need_dots, not launch.irregular,
        **launch.options,
    )  # fmt: skip
    return dots


def _even(cols: int, genes: Sequence[Tensor]) -> bool:
    """Whether genes lie in memory as their accumulators do, and can be read 16 bytes at a time."""
    contiguous = all(gene.stride() == (cols, 1) for gene in genes)
    return contiguous and cols % 16 == 0 and all(is_regular(gene.data_ptr(), gene.stride()) for gene in genes)


def _rows(buffers: Sequence[Tensor | None], row: int, rows: int) -> list[Tensor | None]:
    return [None if buffer is None else buffer[row : row + rows] for buffer in buffers]


def _pointers(buffers: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, ...]:
    """Every place of the kernel's tuple holds a pointer; those of genes that need no gradient are never followed."""
    return tuple(other if buffer is None else buffer for buffer in buffers)


def _bits(buffers: Sequence[Tensor | None]) -> int:
    """Which buffers are written, one bit each."""
    return sum(1 << k for k, buffer in enumerate(buffers) if buffer is not None)
