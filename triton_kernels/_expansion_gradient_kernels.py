# SPDX-License-Identifier: Apache-2.0
"""The kernels of `expansion` that add to the gradients of genes and coefficients, and never hold dW.

Each program owns one tile of every gene's accumulator; nothing is added atomically, so results repeat bit for bit.
Genes come as a tuple of K pointers with K row and K column strides; launches are in `_expansion_gradients`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pylearngene.triton_kernels._expansion_gradient_tiles import add_to_genes
from pylearngene.triton_kernels._tiles import grouped_tile, inside, load_coeffs, span, tile_at, tiles_of


@triton.jit(do_not_specialize=["tokens", "chunk"])
def gene_gradients(
    dy, x, genes, buffers, coeffs, dots, tokens, chunk, outs, inner, dy_row, dy_col, x_row, x_col, gene_rows, gene_cols,
    BLOCK_OUT: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUP: tl.constexpr,
    HALVINGS: tl.constexpr, WARPS: tl.constexpr, WANTED: tl.constexpr, DOTS: tl.constexpr, REGULAR: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`buffer_k += c_k dy^T x`; `dots[tile, w, k]` sum to `<dW, G_k>`: of dW `[outs, inner]` one float32 tile exists.

    With SPLIT, a tile has several programs of `chunk` steps each, and what they sum is stored to `dots`
    `[splits, outs, inner]` for `accumulate` instead. UPCAST multiplies in float32, for the interpreter.
    """
    number, first, last = tl.program_id(0), 0, tiles_of(tokens, BLOCK_TOKENS)
    if SPLIT:
        tiles = tiles_of(outs, BLOCK_OUT) * tiles_of(inner, BLOCK_INNER)
        split = number // tiles
        number = number % tiles
        first = split * chunk
        last = tl.minimum(first + chunk, last)
        dots += split.to(tl.int64) * outs * inner
    out_tile, inner_tile = tile_at(number, outs, inner, BLOCK_OUT, BLOCK_INNER, GROUP)
    out, col = span(out_tile, BLOCK_OUT), span(inner_tile, BLOCK_INNER)
    dy_place = dy + inside(out, outs, BLOCK_OUT)[:, None] * dy_col
    x_place = x + inside(col, inner, BLOCK_INNER)[None, :] * x_col
    dw = tl.zeros([BLOCK_OUT, BLOCK_INNER], tl.float32)
    for step in tl.range(first, last):
        token = span(tl.cast(step, tl.int64), BLOCK_TOKENS)
        left = tl.load(dy_place + token[None, :] * dy_row, mask=(token < tokens)[None, :], other=0.0)
        right = tl.load(x_place + token[:, None] * x_row, mask=(token < tokens)[:, None], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        dw = tl.dot(left, right, dw, input_precision="ieee")
    if SPLIT:
        keep = (out[:, None] < outs) & (col[None, :] < inner)
        tl.store(dots + out[:, None] * inner + col[None, :], dw, mask=keep)
    else:
        values = load_coeffs(coeffs, len(genes))
        dots += tl.program_id(0).to(tl.int64) * (WARPS * len(genes))
        add_to_genes(
            dw, genes, buffers, values, dots, gene_rows, gene_cols, inner, out_tile.to(tl.int64) * BLOCK_OUT,
            inner_tile.to(tl.int64) * BLOCK_INNER, outs, inner, HALVINGS, WARPS, WANTED, DOTS, REGULAR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "first_row", "splits"])
def accumulate(
    panel, genes, buffers, coeffs, dots, rows, cols, first_row, splits, panel_row, gene_rows, gene_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WARPS: tl.constexpr,
    WANTED: tl.constexpr, DOTS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """`buffer_k[first_row:] += c_k dW` and `dots[tile, w, k]`, whose sums are `<dW, G_k>`, from rows of dW.

    dW is the sum of `splits` panels `[rows, cols]` that follow each other in memory, added in their order.
    """
    row_tile, col_tile = grouped_tile(rows, cols, BLOCK_ROWS, BLOCK_COLS, 1)
    row, col = row_tile.to(tl.int64) * BLOCK_ROWS, col_tile.to(tl.int64) * BLOCK_COLS
    r = tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None] + row
    c = tl.max_contiguous(tl.arange(0, BLOCK_COLS), 4).to(tl.int64)[None, :] + col
    keep = (r < rows) & (c < cols)
    values = load_coeffs(coeffs, len(genes))
    place = panel + r * panel_row + c
    dw = tl.load(place, mask=keep, other=0.0, eviction_policy="evict_first").to(values[0].dtype)
    size = rows.to(tl.int64) * panel_row
    # Unrolled, since the loads do not wait for each other while the sums do.
    for split in tl.range(1, splits, loop_unroll_factor=4):
        dw += tl.load(place + tl.cast(split, tl.int64) * size, mask=keep, other=0.0, eviction_policy="evict_first").to(
            dw.dtype
        )
    dots += tl.program_id(0).to(tl.int64) * (WARPS * len(genes))
    add_to_genes(
        dw, genes, buffers, values, dots, gene_rows, gene_cols, cols, row + first_row, col,
        first_row.to(tl.int64) + rows, cols, 0, WARPS, WANTED, DOTS, REGULAR,
    )  # fmt: skip
