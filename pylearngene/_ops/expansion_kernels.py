# SPDX-License-Identifier: Apache-2.0
"""The smallest pieces of `expansion`: fill a window of W, add a window of dW to the gene gradients.

Each piece has three forms on the same window: the native kernel, Triton's and plain PyTorch; none builds a full
weight. Which regime uses them, and how products are formed, is in `expansion_regimes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pylearngene import _backends
from pylearngene.reference import expansion as _specification

#: Multiply-adds below which one thread is faster: a parallel region costs microseconds, more on a busy machine.
THREADS_PAY_FROM = 1 << 17
#: Elements of W that the specification makes at a time, so that its float64 temporaries stay within a panel.
SPECIFICATION_ELEMENTS = 1 << 15
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

__all__ = [
    "CODES",
    "accumulate",
    "buffer_windows",
    "column_sums",
    "fill",
    "gene_windows",
    "native_for",
    "threads_for",
    "work_dtype",
]


def native_for(tensor: Tensor) -> ModuleType | None:
    """The native `expansion` kernels where `tensor` can be handed to them."""
    module = _backends.native()
    return module.expansion if module is not None and tensor.device.type == "cpu" else None


def work_dtype(gene: Tensor) -> torch.dtype:
    """The dtype of the synthesis chain: float64 for float64 genes, else float32."""
    return torch.float64 if gene.dtype == torch.float64 else torch.float32


def threads_for(multiplies: int) -> int:
    """Return torch's thread count where the work pays for waking threads, else 1."""
    return torch.get_num_threads() if multiplies >= THREADS_PAY_FROM else 1


def gene_windows(genes: Sequence[Tensor], row: int = 0, col: int = 0) -> list[tuple[int, int, int]]:
    """(address, row stride, column stride) of each gene's window that starts at `row`, `col`."""
    windows = []
    for gene in genes:
        rows, cols = gene.stride()
        windows.append((gene.data_ptr() + (row * rows + col * cols) * gene.element_size(), rows, cols))
    return windows


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
    triton = _backends.triton_for(out.device)
    if triton is not None:
        triton.fill(out, genes, coeffs, row, col)
        return
    native = native_for(out)
    if native is None:
        step = max(1, SPECIFICATION_ELEMENTS // max(1, cols))
        for start in range(0, rows, step):  # the specification holds a few float64 tensors of the window's size
            end = min(rows, start + step)
            window = [gene[row + start : row + end, col : col + cols] for gene in genes]
            out[start:end].copy_(_specification.weight(window, coeffs, out.dtype))
        return
    native.synthesize(
        _backends.LEVEL,
        threads_for(rows * cols * len(genes)),
        out.data_ptr(),
        CODES[out.dtype],
        rows,
        cols,
        out.stride(0),
        gene_windows(genes, row, col),
        CODES[genes[0].dtype],
        coeffs.data_ptr(),
    )


def accumulate(
    panel: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    buffers: Sequence[Tensor | None],
    row: int,
    dots: Tensor | None,
) -> None:
    """`buffers[k][row:row+R] += c_k dW`, and `dots`, whose sum over its rows is `<dW, G_k[row:row+R]>`, in one pass.

    Args:
        panel: `[R, I]`, rows `row .. row+R` of dW.
        genes: K tensors `[O, I]`.
        coeffs: `[K]` in the work dtype.
        buffers: per gene its gradient `[O, I]` in the work dtype, or None.
        row: first row of the panel.
        dots: `[R, K]` float64, or None where no coefficient needs a gradient.
    """
    rows, cols = panel.shape
    triton = _backends.triton_for(panel.device)
    if triton is not None:
        sums = triton.accumulate(panel, genes, coeffs, buffers, row, dots is not None)
        if dots is not None:
            dots.zero_()[:1] = sums
        return
    native = native_for(panel)
    if native is None:
        wide = panel.to(coeffs.dtype)
        for k, (gene, buffer) in enumerate(zip(genes, buffers, strict=True)):
            if buffer is not None:
                buffer[row : row + rows].addcmul_(wide, coeffs[k])
            if dots is not None:
                dots[:, k] = (wide.double() * gene[row : row + rows].double()).sum(1)
        return
    native.accumulate(
        _backends.LEVEL,
        threads_for(rows * cols * 2 * len(genes)),
        panel.data_ptr(),
        CODES[panel.dtype],
        rows,
        cols,
        panel.stride(0),
        gene_windows(genes, row),
        CODES[genes[0].dtype],
        coeffs.data_ptr(),
        buffer_windows(buffers, row),
        0 if dots is None else dots.data_ptr(),
    )


def buffer_windows(buffers: Sequence[Tensor | None], row: int = 0) -> list[tuple[int, int]]:
    """(address, row stride) of each gradient buffer from `row` on; (0, 0) where a gene needs none."""
    return [
        (0, 0) if b is None else (b.data_ptr() + row * b.stride(0) * b.element_size(), b.stride(0)) for b in buffers
    ]


def column_sums(dy: Tensor) -> Tensor:
    """The sum over tokens of dy, `[M, O]`, as `[O]` in the work dtype: no wider copy of dy is made."""
    native = native_for(dy)
    if native is None or not dy.numel():
        return dy.sum(0, dtype=work_dtype(dy))
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    sums = dy.new_empty(dy.shape[1], dtype=work_dtype(dy))
    threads = threads_for(dy.numel())
    native.column_sums(
        _backends.LEVEL, threads, sums.data_ptr(), dy.data_ptr(), CODES[dy.dtype], *dy.shape, dy.stride(0)
    )
    return sums
