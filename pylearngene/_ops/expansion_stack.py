# SPDX-License-Identifier: Apache-2.0
"""The regime `stack` of `expansion`: several layers at once, every gene read once and all layers written from it.

W has the bits of the layer-by-layer chain, and the gradients of the genes add up in the order of the layers. Nothing
here outlives a call; layers at run time never use it, since it holds full weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pylearngene import _backends, plan
from pylearngene._ops.expansion_kernels import CODES, fill, gene_windows, native_for, threads_for

#: Matrices and results that one call of the kernel takes.
MOST = 64


def fill_stack(outs: Sequence[Tensor], genes: Sequence[Tensor], coeffs: Tensor) -> None:
    """`outs[l] = sum_k c[l, k] G_k`, each rounded once to its dtype.

    Args:
        outs: L tensors `[O, I]` of one dtype, column stride 1.
        genes: K tensors `[O, I]`, any strides.
        coeffs: `[L, K]` in the work dtype, contiguous.
    """
    if outs and _stackable(genes) and plan.choose_stack(len(outs), len(genes), True) == "stack":
        for start in range(0, len(outs), MOST):
            _run(outs[start : start + MOST], genes, coeffs[start : start + MOST], add=False)
        return
    for out, row in zip(outs, coeffs, strict=True):
        fill(out, genes, row)


def add_stack(buffers: Sequence[Tensor], grads: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    """`buffers[k] += sum_l c[l, k] dW_l`, a chain in the order of the layers.

    Args:
        buffers: K accumulators `[O, I]` in the work dtype, contiguous.
        grads: L tensors `[O, I]`.
        columns: per buffer the coefficients `[L]` of its gene in the work dtype.
    """
    if _stackable(grads):
        for start in range(0, len(grads), MOST):
            part = torch.stack([column[start : start + MOST] for column in columns])
            _run(buffers, grads[start : start + MOST], part, add=True)
        return
    for index, grad in enumerate(grads):
        wide = grad.to(buffers[0].dtype)
        for buffer, column in zip(buffers, columns, strict=True):
            buffer.addcmul_(wide, column[index])


def _stackable(matrices: Sequence[Tensor]) -> bool:
    """Whether the native kernel reads these as they lie."""
    return native_for(matrices[0]) is not None and all(
        matrix.stride(1) == 1 or matrix.shape[1] == 1 for matrix in matrices
    )


def _run(outs: Sequence[Tensor], matrices: Sequence[Tensor], coeffs: Tensor, add: bool) -> None:
    native = native_for(outs[0])
    assert native is not None
    rows, cols = outs[0].shape
    native.synthesize_stack(
        _backends.LEVEL,
        threads_for(rows * cols * len(matrices) * len(outs)),
        [(out.data_ptr(), out.stride(0)) for out in outs],
        CODES[outs[0].dtype],
        rows,
        cols,
        add,
        [(address, stride, 1) for address, stride, _ in gene_windows(matrices)],
        CODES[matrices[0].dtype],
        coeffs.data_ptr(),
    )
