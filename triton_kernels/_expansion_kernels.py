# SPDX-License-Identifier: Apache-2.0
"""The kernels of `expansion` that form W: a window of it, the fused product, and the sum of a product in parts.

Each program owns its output tiles; nothing is added atomically, so results repeat bit for bit. Genes come as a tuple
of K pointers with K row and K column strides. Sizes, tiles and launches are chosen in `expansion` and `_table`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pylearngene.triton_kernels._tiles import (
    chain,
    epilogue,
    grouped_tile,
    load_coeffs,
    multiply,
    span,
    tile_at,
    tiles_of,
)


@triton.jit(do_not_specialize=["rows", "first_row"])
def synthesize(
    out, genes, coeffs, rows, cols, first_row, first_col, out_row, gene_rows, gene_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """`out = sum_k c_k G_k[first_row:, first_col:]`, `[rows, cols]`, rounded once; K reads and one write a weight.

    The L2 is asked to keep what is written, for the product that follows, and the genes, for the next layer.
    """
    row_tile, col_tile = grouped_tile(rows, cols, BLOCK_ROWS, BLOCK_COLS, 1)
    row, col = span(row_tile, BLOCK_ROWS), span(col_tile, BLOCK_COLS)
    keep = (row[:, None] < rows) & (col[None, :] < cols)
    values = load_coeffs(coeffs, len(genes))
    weight = chain(genes, values, gene_rows, gene_cols, row + first_row, col + first_col, keep, True)
    place = out + row[:, None] * out_row + col[None, :]
    tl.store(place, weight.to(out.dtype.element_ty), mask=keep, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["tokens", "chunk"])
def fused(
    y, x, genes, coeffs, biases, tokens, outs, inner, chunk, x_row, x_col, gene_rows, gene_cols,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr,
    SPLIT: tl.constexpr, PERSISTENT: tl.constexpr, STAY: tl.constexpr,
):  # fmt: skip
    """`y = activation(x W^T + b)`: x `[tokens, inner]`, genes `[outs, inner]`, y `[tokens, outs]` contiguous.

    The tile is `y^T = W x^T`. The input gradient is the same kernel on transposed genes. With SPLIT, y is float32
    `[splits, tokens, outs]`, the sums over `chunk` steps of `inner` each, which `finish` adds. PERSISTENT programs walk
    over the tiles in the order in which a plain grid starts them. STAY asks the L2 to keep the genes.
    """
    tiles = tiles_of(outs, BLOCK_OUT) * tiles_of(tokens, BLOCK_TOKENS)
    steps = tiles_of(inner, BLOCK_INNER)
    values = load_coeffs(coeffs, len(genes))
    number = tl.program_id(0)
    if PERSISTENT:
        for tile in tl.range(number, tiles, tl.num_programs(0)):
            out_tile, token_tile = tile_at(tile, outs, tokens, BLOCK_OUT, BLOCK_TOKENS, GROUP)
            total = multiply(
                x, genes, values, out_tile, token_tile, tokens, outs, inner, 0, steps, x_row, x_col, gene_rows,
                gene_cols, BLOCK_OUT, BLOCK_TOKENS, BLOCK_INNER, INDEX, UPCAST, STAY,
            )  # fmt: skip
            epilogue(
                y, total, biases, values, out_tile, token_tile, tokens, outs, BLOCK_OUT, BLOCK_TOKENS, BIAS, ACTIVATION
            )
    else:
        first, last = 0, steps
        if SPLIT:
            split = number // tiles
            number = number % tiles
            first = split * chunk
            last = min(first + chunk, steps)
            y += split.to(tl.int64) * tokens * outs
        out_tile, token_tile = tile_at(number, outs, tokens, BLOCK_OUT, BLOCK_TOKENS, GROUP)
        total = multiply(
            x, genes, values, out_tile, token_tile, tokens, outs, inner, first, last, x_row, x_col, gene_rows,
            gene_cols, BLOCK_OUT, BLOCK_TOKENS, BLOCK_INNER, INDEX, UPCAST, STAY,
        )  # fmt: skip
        epilogue(
            y, total, biases, values, out_tile, token_tile, tokens, outs, BLOCK_OUT, BLOCK_TOKENS, BIAS, ACTIVATION
        )


@triton.jit(do_not_specialize=["splits", "tokens"])
def finish(
    y, partials, coeffs, biases, splits, tokens, outs,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`y = activation(sum_s partials[s] + b)`: partials `[splits, tokens, outs]` float32, added from the first on."""
    out_tile, token_tile = grouped_tile(outs, tokens, BLOCK_OUT, BLOCK_TOKENS, 1)
    out, token = span(out_tile, BLOCK_OUT), span(token_tile, BLOCK_TOKENS)
    keep = (out[:, None] < outs) & (token[None, :] < tokens)
    place = partials + (token[None, :] * outs + out[:, None])
    size = tokens.to(tl.int64) * outs
    total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    # Unrolled, since the loads do not wait for each other while the sums do.
    for split in tl.range(0, splits, loop_unroll_factor=8):
        total += tl.load(place + split * size, mask=keep, other=0.0)
    values = load_coeffs(coeffs, len(biases) if BIAS == "genes" else 0)
    epilogue(y, total, biases, values, out_tile, token_tile, tokens, outs, BLOCK_OUT, BLOCK_TOKENS, BIAS, ACTIVATION)
