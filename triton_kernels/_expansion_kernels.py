# SPDX-License-Identifier: Apache-2.0
"""The kernels of `expansion` that form W: a window of it, and the fused product.

Each program owns one output tile; nothing is added atomically, so results repeat bit for bit. Genes come as a tuple
of K pointers with K row and K column strides. Sizes, tiles and launches are chosen in `expansion` and `_table`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pylearngene.triton_kernels._tiles import activate, chain, grouped_tile, inside, load_coeffs, span


@triton.jit
def synthesize(
    out, genes, coeffs, rows, cols, first_row, first_col, out_row, gene_rows, gene_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """`out = sum_k c_k G_k[first_row:, first_col:]`, `[rows, cols]`, rounded once; K reads and one write a weight."""
    row_tile, col_tile = grouped_tile(rows, cols, BLOCK_ROWS, BLOCK_COLS, 1)
    row, col = span(row_tile, BLOCK_ROWS), span(col_tile, BLOCK_COLS)
    keep = (row[:, None] < rows) & (col[None, :] < cols)
    values = load_coeffs(coeffs, len(genes))
    weight = chain(genes, values, gene_rows, gene_cols, row + first_row, col + first_col, keep)
    tl.store(out + row[:, None] * out_row + col[None, :], weight.to(out.dtype.element_ty), mask=keep)


@triton.jit
def fused(
    y, x, genes, coeffs, biases, tokens, outs, inner, x_row, x_col, gene_rows, gene_cols,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`y = activation(x W^T + b)`: x `[tokens, inner]`, genes `[outs, inner]`, y `[tokens, outs]` contiguous.

    The tile is `y^T = W x^T`: the synthesized operand stands first, so that it stays in registers. The input gradient
    is the same kernel on transposed genes. UPCAST multiplies in float32, for the interpreter.
    """
    out_tile, token_tile = grouped_tile(outs, tokens, BLOCK_OUT, BLOCK_TOKENS, GROUP)
    out, token = span(out_tile, BLOCK_OUT), span(token_tile, BLOCK_TOKENS)
    gene_row = inside(out, outs, BLOCK_OUT)
    x_place = x + inside(token, tokens, BLOCK_TOKENS)[None, :] * x_row
    values = load_coeffs(coeffs, len(genes))
    total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for start in tl.range(0, inner, BLOCK_INNER):
        col = tl.arange(0, BLOCK_INNER).to(tl.int64) + start
        weight = chain(genes, values, gene_rows, gene_cols, gene_row, col, (col < inner)[None, :])
        weight = weight.to(x.dtype.element_ty)
        tile = tl.load(x_place + col[:, None] * x_col, mask=(col < inner)[:, None], other=0.0)
        if UPCAST:
            weight, tile = weight.to(tl.float32), tile.to(tl.float32)
        total = tl.dot(weight, tile, total, input_precision="ieee")
    if BIAS == "plain":
        total += tl.load(biases[0] + gene_row).to(tl.float32)[:, None]
    if BIAS == "genes":
        bias = tl.zeros([BLOCK_OUT], tl.float32)
        for k in tl.static_range(len(genes)):
            bias = tl.fma(tl.load(biases[k] + gene_row).to(tl.float32), values[k], bias)
        total += bias.to(y.dtype.element_ty).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        total = activate(total.to(y.dtype.element_ty).to(tl.float32), ACTIVATION)
    keep = (out[:, None] < outs) & (token[None, :] < tokens)
    tl.store(y + token[None, :] * outs + out[:, None], total.to(y.dtype.element_ty), mask=keep)
