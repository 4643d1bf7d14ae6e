# SPDX-License-Identifier: Apache-2.0
"""The products of `expansion` in the regimes `rows`, `fused` and `panel`: y, dx and the gradients of the genes.

`rows` (CPU) and `fused` (GPU, 16 bits) form W in registers and multiply at once; `panel` synthesizes into one reused
workspace and lets the BLAS multiply. No tensor of `O*I` elements is made; the regime is chosen here, so that shapes put
no guards on callers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pylearngene import _backends, plan
from pylearngene._ops.expansion_kernels import (
    CODES,
    accumulate,
    buffer_windows,
    fill,
    gene_windows,
    native_for,
    threads_for,
    work_dtype,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "silu": torch.ops.aten.silu_,
}


def regime_of(x: Tensor, genes: Sequence[Tensor]) -> str:
    """The regime of a product of x, `[M, *]`, with a weight made of genes."""
    return plan.choose(x.shape[0], _backends.implementation(x.device), x.element_size(), len(genes))


def forward(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor] = (),
    activation: str | None = None,
) -> Tensor:
    """`y = activation(x W^T + b)`.

    Args:
        x: `[M, I]`.
        genes: K tensors `[O, I]`.
        coeffs: `[K]` in the work dtype.
        bias: `[O]` in x's dtype, contiguous, or None.
        bias_genes: K tensors `[O]` that are combined instead.
        activation: None, "relu", "gelu" or "silu".

    Returns:
        `[M, O]`, contiguous.
    """
    rows = genes[0].shape[0]
    regime = regime_of(x, genes)
    y = x.new_empty((x.shape[0], rows))
    triton = _backends.triton_for(x.device) if regime == "fused" else None
    if bias_genes and (triton is None or not all(gene.is_contiguous() for gene in bias_genes)):
        bias = x.new_empty(rows)
        fill(bias.view(1, rows), [gene.reshape(1, rows) for gene in bias_genes], coeffs.to(work_dtype(bias_genes[0])))
        bias_genes = ()
    if triton is not None:
        triton.product(y, x, genes, coeffs, bias, bias_genes, activation)
        return y
    if y.numel() and regime == "rows":
        _rows_forward(y, x, genes, coeffs, bias)
    elif y.numel():
        _panels_forward(y, x, genes, coeffs, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


def _rows_forward(y: Tensor, x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, bias: Tensor | None) -> None:
    rows, cols = genes[0].shape
    x = _unit_column_stride(x)
    _native(x).rows_forward(
        _backends.LEVEL,
        threads_for(rows * cols * (len(genes) + x.shape[0])),
        y.data_ptr(),
        x.data_ptr(),
        CODES[x.dtype],
        x.shape[0],
        cols,
        rows,
        x.stride(0),
        y.stride(0),
        gene_windows(genes),
        CODES[genes[0].dtype],
        coeffs.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        [],
        CODES[x.dtype],
    )


def _panels_forward(y: Tensor, x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, bias: Tensor | None) -> None:
    rows, cols = genes[0].shape
    length = plan.panel_length(cols, x.element_size(), rows, x.device.type)
    workspace = x.new_empty((length, cols))
    for row in range(0, rows, length):
        end = min(rows, row + length)
        panel = workspace[: end - row]
        fill(panel, genes, coeffs, row=row)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, row:end])
        else:
            torch.addmm(bias[row:end], x, panel.t(), out=y[:, row:end])


def input_gradient(dy: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    """`dx = dy W`: dy `[M, O]`, genes K x `[O, I]`, coeffs `[K]` -> `[M, I]`; panels are columns of W."""
    rows, cols = genes[0].shape
    regime = regime_of(dy, genes)
    triton = _backends.triton_for(dy.device) if regime == "fused" else None
    dx = dy.new_empty((dy.shape[0], cols))
    if triton is not None:
        triton.product(dx, dy, [gene.t() for gene in genes], coeffs)
        return dx
    if dx.numel() == 0:
        return dx
    if regime == "rows":
        dy = _unit_column_stride(dy)
        _native(dy).rows_dx(
            _backends.LEVEL,
            threads_for(rows * cols * (len(genes) + dy.shape[0])),
            dx.data_ptr(),
            dy.data_ptr(),
            CODES[dy.dtype],
            dy.shape[0],
            cols,
            rows,
            dy.stride(0),
            dx.stride(0),
            gene_windows(genes),
            CODES[genes[0].dtype],
            coeffs.data_ptr(),
        )
        return dx
    length = plan.panel_length(rows, dy.element_size(), cols, dy.device.type)
    workspace = dy.new_empty(rows * length)
    for col in range(0, cols, length):
        end = min(cols, col + length)
        panel = workspace[: rows * (end - col)].view(rows, end - col)
        fill(panel, genes, coeffs, col=col)
        torch.mm(dy, panel, out=dx[:, col:end])
    return dx


def gene_gradients(
    buffers: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    need_dots: bool,
) -> Tensor | None:
    """`buffers[k] += c_k dy^T x`; returns `<dW, G_k>` as `[K]` float64 where `need_dots`, else None.

    Args:
        buffers: per gene its contiguous `[O, I]` accumulator in the work dtype, or None.
        dy: `[M, O]`.
        x: `[M, I]`.
        genes: K tensors `[O, I]`.
        coeffs: `[K]` in the work dtype.
        need_dots: whether the coefficients need a gradient.
    """
    rows, cols = genes[0].shape
    triton = _backends.triton_for(x.device)
    if triton is not None and x.element_size() == 2:  # for any number of tokens: dW is summed in float32
        sums: Tensor | None = triton.gene_gradients(buffers, dy, x, genes, coeffs, need_dots)
        return sums
    in_registers = regime_of(x, genes) == "rows"
    if in_registers:
        dy, x = _unit_column_stride(dy), _unit_column_stride(x)
    length = plan.panel_length(max(cols * x.element_size(), 8 * len(genes)), 1, rows, x.device.type)
    workspace = None if in_registers else x.new_empty((length, cols))
    total = torch.zeros(len(genes), dtype=torch.float64, device=x.device) if need_dots else None
    for row in range(0, rows, length):
        end = min(rows, row + length)
        dots = total.new_empty((end - row, len(genes))) if total is not None else None
        if workspace is None:
            _register_gradients(buffers, dy[:, row:end], x, genes, coeffs, row, dots)
        else:
            panel = workspace[: end - row]
            torch.mm(dy[:, row:end].t(), x, out=panel)
            accumulate(panel, genes, coeffs, buffers, row, dots)
        if total is not None and dots is not None:
            total += dots.sum(0)
    return total


def _register_gradients(
    buffers: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    row: int,
    dots: Tensor | None,
) -> None:
    """Rows `row` .. of dW formed in registers and added at once; dy `[M, R]`, x `[M, I]`."""
    tokens, rows = dy.shape
    cols = x.shape[1]
    _native(x).rows_wgrad(
        _backends.LEVEL,
        threads_for(rows * cols * (2 * len(genes) + tokens)),
        dy.data_ptr(),
        x.data_ptr(),
        CODES[x.dtype],
        tokens,
        cols,
        rows,
        dy.stride(0),
        x.stride(0),
        gene_windows(genes, row),
        CODES[genes[0].dtype],
        coeffs.data_ptr(),
        buffer_windows(buffers, row),
        0 if dots is None else dots.data_ptr(),
    )


def _native(tensor: Tensor) -> Any:
    module = native_for(tensor)
    assert module is not None, "the regime `rows` needs the native module"
    return module


def _unit_column_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
