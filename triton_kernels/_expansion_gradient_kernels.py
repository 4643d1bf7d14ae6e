# SPDX-License-Identifier: Apache-2.0
"""The kernels of `expansion` that add to the gradients of genes and coefficients, and never hold dW.

Each program owns one tile of every gene's accumulator; nothing is added atomically, so results repeat bit for bit.
Genes come as a tuple of K pointers with K row and K column strides; launches are in `_expansion_gradients`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pylearngene.triton_kernels._tiles import add_to_genes, grouped_tile, inside, load_coeffs, span


@triton.jit
def gene_gradients(
    dy, x, genes, buffers, coeffs, dots, tokens, outs, inner, dy_row, dy_col, x_row, x_col, gene_rows, gene_cols,
    BLOCK_OUT: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUP: tl.constexpr,
    WANTED: tl.constexpr, DOTS: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`buffer_k += c_k dy^T x` and `dots[tile, k] = <dW, G_k>`: dW `[outs, inner]` exists as one float32 tile only."""
    out_tile, inner_tile = grouped_tile(outs, inner, BLOCK_OUT, BLOCK_INNER, GROUP)
    out, col = span(out_tile, BLOCK_OUT), span(inner_tile, BLOCK_INNER)
    dy_place = dy + inside(out, outs, BLOCK_OUT)[:, None] * dy_col
    x_place = x + inside(col, inner, BLOCK_INNER)[None, :] * x_col
    dw = tl.zeros([BLOCK_OUT, BLOCK_INNER], tl.float32)
    for start in tl.range(0, tokens, BLOCK_TOKENS):
        token = tl.arange(0, BLOCK_TOKENS).to(tl.int64) + start
        left = tl.load(dy_place + token[None, :] * dy_row, mask=(token < tokens)[None, :], other=0.0)
        right = tl.load(x_place + token[:, None] * x_row, mask=(token < tokens)[:, None], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        dw = tl.dot(left, right, dw, input_precision="ieee")
    keep = (out[:, None] < outs) & (col[None, :] < inner)
    values = load_coeffs(coeffs, len(genes))
    place = dots + tl.program_id(0).to(tl.int64) * len(genes)
    add_to_genes(
        dw, genes, buffers, values, place, gene_rows, gene_cols, inner, out_tile.to(tl.int64) * BLOCK_OUT,
        inner_tile.to(tl.int64) * BLOCK_INNER, keep, WANTED, DOTS, INDEX,
    )  # fmt: skip


@triton.jit
def accumulate(
    panel, genes, buffers, coeffs, dots, rows, cols, first_row, panel_row, gene_rows, gene_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    WANTED: tl.constexpr, DOTS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """`buffer_k[first_row:] += c_k dW` and `dots[tile, k] = <dW, G_k>` from a panel of dW, `[rows, cols]`."""
    row_tile, col_tile = grouped_tile(rows, cols, BLOCK_ROWS, BLOCK_COLS, 1)
    row, col = span(row_tile, BLOCK_ROWS), span(col_tile, BLOCK_COLS)
    keep = (row[:, None] < rows) & (col[None, :] < cols)
    values = load_coeffs(coeffs, len(genes))
    dw = tl.load(panel + row[:, None] * panel_row + col[None, :], mask=keep, other=0.0).to(values[0].dtype)
    place = dots + tl.program_id(0).to(tl.int64) * len(genes)
    add_to_genes(
        dw, genes, buffers, values, place, gene_rows, gene_cols, cols, row_tile.to(tl.int64) * BLOCK_ROWS + first_row,
        col_tile.to(tl.int64) * BLOCK_COLS, keep, WANTED, DOTS, INDEX,
    )  # fmt: skip
