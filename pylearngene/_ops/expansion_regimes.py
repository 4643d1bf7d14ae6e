# SPDX-License-Identifier: Apache-2.0
"""The products of `expansion` in the regimes `rows`, `fused` and `panel`: y, dx and the gradients of the genes.

`rows` and `fused` (GPU, 16 bits) form W in registers or L1 and multiply at once; `panel` synthesizes into one reused
workspace and lets the BLAS multiply. No tensor of `O*I` elements is made; the regime is chosen here, so that shapes put
no guards on callers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pylearngene import _backends, plan
from pylearngene._ops import expansion_cuda as _cuda
from pylearngene._ops import expansion_turns as _turns
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


def regime_of(x: Tensor, genes: Sequence[Tensor], product: str = "y") -> str:
    """The regime of a product of x, `[M, *]`, with a weight made of genes: of "y", "dx" or "dw"."""
    device = x.device
    who, size = _backends.implementation(device), x.element_size()
    if who == "cpp":
        float16 = x.dtype == torch.float16
        level = _backends.LEVEL_NAME
        return plan.choose(x.shape[0], who, size, len(genes), arch=level, product=product, float16=float16)
    return plan.choose(x.shape[0], who, size, len(genes), arch=_backends.arch(device))


def _fusing(x: Tensor, regime: str) -> Any:
    """The Triton launchers where a product of x in a regime is theirs, else None."""
    return _backends.triton_for(x.device) if regime != "panel" and x.element_size() == 2 else None


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
    if regime == "rows" and x.is_cuda and _cuda.rows_forward(y, x, genes, coeffs, bias, bias_genes):
        return y if activation is None else ACTIVATIONS[activation](y)
    triton = _fusing(x, regime)
    if bias_genes and (triton is None or not all(gene.is_contiguous() for gene in bias_genes)):
        bias = x.new_empty(rows)
        fill(bias.view(1, rows), [gene.reshape(1, rows) for gene in bias_genes], coeffs.to(work_dtype(bias_genes[0])))
        bias_genes = ()
    if triton is not None:
        triton.product(y, x, genes, coeffs, bias, bias_genes, activation)
        return y
    if y.numel() and regime == "rows" and x.is_cpu:
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
    count = _count(x, rows, cols, len(genes))
    length = plan.panel_length(cols, x.element_size(), rows, x.device.type, count)
    order = _turns.turns(x, count, fills_aside=True)
    workspace = x.new_empty((order.slots, length, cols))
    with order:
        for slot, row, end in order.panels(rows, length):
            panel = workspace[slot, : end - row]
            with order.filling(slot):
                fill(panel, genes, coeffs, row=row)
            with order.using(slot):
                if bias is None:
                    torch.mm(x, panel.t(), out=y[:, row:end])
                else:
                    torch.addmm(bias[row:end], x, panel.t(), out=y[:, row:end])


def _count(x: Tensor, lines: int, inner: int, genes: int) -> int:
    """How many panels of W take turns: 1 but for large products on a GPU."""
    if x.device.type != "cuda":
        return 1
    chip, tokens, size = _backends.arch(x.device), x.shape[0], x.element_size()
    beside = plan.costs("panel", tokens, size, genes, chip)[1]
    return plan.turns((tokens, lines, inner), lines * inner, size, beside, chip)


def input_gradient(dy: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    """`dx = dy W`: dy `[M, O]`, genes K x `[O, I]`, coeffs `[K]` -> `[M, I]`; panels are columns of W."""
    rows, cols = genes[0].shape
    regime = regime_of(dy, genes, "dx")
    triton = _fusing(dy, regime)
    dx = dy.new_empty((dy.shape[0], cols))
    if triton is not None:
        triton.product(dx, dy, [gene.t() for gene in genes], coeffs)
        return dx
    if dx.numel() == 0:
        return dx
    if regime == "rows" and dy.is_cpu:
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
    _panels_input_gradient(dx, dy, genes, coeffs)
    return dx


def _panels_input_gradient(dx: Tensor, dy: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> None:
    rows, cols = genes[0].shape
    count = _count(dy, cols, rows, len(genes))
    length = plan.panel_length(rows, dy.element_size(), cols, dy.device.type, count)
    order = _turns.turns(dy, count, fills_aside=True)
    workspace = dy.new_empty((order.slots, rows * length))
    with order:
        for slot, col, end in order.panels(cols, length):
            panel = workspace[slot, : rows * (end - col)].view(rows, end - col)
            with order.filling(slot):
                fill(panel, genes, coeffs, col=col)
            with order.using(slot):
                torch.mm(dy, panel, out=dx[:, col:end])


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
    rows = genes[0].shape[0]
    triton = _backends.triton_for(x.device)
    if triton is not None and x.element_size() == 2:  # for any number of tokens: dW is summed in float32
        sums: Tensor | None = triton.gene_gradients(buffers, dy, x, genes, coeffs, need_dots)
        return sums
    total = torch.zeros(len(genes), dtype=torch.float64, device=x.device) if need_dots else None
    if x.is_cpu and regime_of(x, genes, "dw") == "rows":
        dy, x = _unit_column_stride(dy), _unit_column_stride(x)
        for row, end in pairwise([*range(0, rows, plan.panel_length(8 * len(genes), 1, rows)), rows]):
            dots = _dots(total, end - row)
            _register_gradients(buffers, dy[:, row:end], x, genes, coeffs, row, dots)
            _add(total, dots)
    else:
        _panels_gradients(buffers, dy, x, genes, coeffs, total)
    return total


def _panels_gradients(
    buffers: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    total: Tensor | None,
) -> None:
    """`buffers[k] += c_k dy^T x`, and `total[k] += <dW, G_k>`, through panels of dW."""
    rows, cols = genes[0].shape
    count = _gradient_count(x, rows, cols, len(genes))
    length = _gradient_length(x, genes, count)
    order = _turns.turns(x, count, fills_aside=False)
    workspace = x.new_empty((order.slots, length, cols))
    with order:
        for slot, row, end in order.panels(rows, length):
            panel = workspace[slot, : end - row]
            with order.filling(slot):
                torch.mm(dy[:, row:end].t(), x, out=panel)
            with order.using(slot):
                dots = _dots(total, end - row)
                accumulate(panel, genes, coeffs, buffers, row, dots)
                _add(total, dots)


def _gradient_count(x: Tensor, rows: int, cols: int, genes: int) -> int:
    """How many panels of dW take turns."""
    if x.device.type != "cuda":
        return 1
    chip, size = _backends.arch(x.device), x.element_size()
    return plan.turns((cols, rows, x.shape[0]), rows * cols, size, plan.adding(size, genes, chip), chip)


def _gradient_length(x: Tensor, genes: Sequence[Tensor], count: int) -> int:
    """Rows of a panel of dW, whose row dots are no larger than the panel."""
    rows, cols = genes[0].shape
    return plan.panel_length(max(cols * x.element_size(), 8 * len(genes)), 1, rows, x.device.type, count)


def _dots(total: Tensor | None, rows: int) -> Tensor | None:
    return None if total is None else total.new_empty((rows, len(total)))


def _add(total: Tensor | None, dots: Tensor | None) -> None:
    if total is not None and dots is not None:
        total += dots.sum(0)


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
