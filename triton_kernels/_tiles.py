# SPDX-License-Identifier: Apache-2.0
"""Device functions shared by kernels: tile order, offsets, the synthesis chain, products, activations.

Offsets start from int64, so that no product of a size and a stride wraps. No kernel stands here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_of(size, BLOCK: tl.constexpr):
    """How many tiles cover a size of at least 1; no sum is formed that a size just below 2^31 would wrap."""
    return (size - 1) // BLOCK + 1


@triton.jit
def grouped_tile(rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of a `[rows, cols]` grid: GROUP columns of tiles are walked together, for hits in L2."""
    return tile_at(tl.program_id(0), rows, cols, BLOCK_ROWS, BLOCK_COLS, GROUP)


@triton.jit
def tile_at(number, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """The row and the column of a tile by its number in that order."""
    row_tiles = tiles_of(rows, BLOCK_ROWS)
    col_tiles = tiles_of(cols, BLOCK_COLS)
    first = number // (GROUP * row_tiles) * GROUP
    width = min(col_tiles - first, GROUP)
    inside = number % (GROUP * row_tiles)
    return inside // width, first + inside % width


@triton.jit
def span(tile, BLOCK: tl.constexpr):
    """The int64 indices of a tile."""
    return tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)


@triton.jit
def inside(index, size, BLOCK: tl.constexpr):
    """Indices past the end wrapped to valid ones: what is read there is never stored, and loads need no mask."""
    return tl.max_contiguous(tl.multiple_of(index % size, BLOCK), BLOCK)


@triton.jit
def wrapped(start, size, BLOCK: tl.constexpr):
    """The int32 indices of a tile from its int64 start on, wrapped as by `inside`."""
    return inside(tl.arange(0, BLOCK), tl.minimum(size - start, BLOCK).to(tl.int32), BLOCK)


@triton.jit
def load_coeffs(coeffs, COUNT: tl.constexpr):
    """The K coefficients as scalars, read once per program."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(coeffs + k),)  # noqa: RUF005  (Triton has no starred tuples)
    return values


@triton.jit
def chain(genes, values, gene_rows, gene_cols, row, col, keep, STAY: tl.constexpr = False):
    """`sum_k c_k G_k` at rows `row` and columns `col`: one fused multiply-add per gene in k order, work dtype.

    STAY asks the L2 to keep the genes, for the next layer that is made of them.
    """
    total = tl.zeros([row.shape[0], col.shape[0]], values[0].dtype)
    policy: tl.constexpr = "evict_last" if STAY else ""
    for k in tl.static_range(len(genes)):
        place = genes[k] + (row[:, None] * gene_rows[k] + col[None, :] * gene_cols[k])
        gene = tl.load(place, mask=keep, other=0.0, eviction_policy=policy)
        total = tl.fma(gene.to(total.dtype), values[k], total)
    return total


@triton.jit
def corners(genes, gene_rows, gene_cols, row, col):
    """The genes' pointers moved to an int64 row and column."""
    moved = ()
    for k in tl.static_range(len(genes)):
        moved = moved + (genes[k] + row * gene_rows[k] + col * gene_cols[k],)  # noqa: RUF005
    return moved


@triton.jit
def multiply(
    x, genes, values, out_tile, token_tile, tokens, outs, inner, first, last, x_row, x_col, gene_rows, gene_cols,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr, STAY: tl.constexpr,
):  # fmt: skip
    """One float32 tile of `W x^T`, summed over the steps `first .. last` of `inner`.

    The synthesized operand stands first, so that it stays in registers. Offsets inside a tile are of the type INDEX.
    UPCAST multiplies in float32, for the interpreter.
    """
    out, token = out_tile.to(tl.int64) * BLOCK_OUT, token_tile.to(tl.int64) * BLOCK_TOKENS
    r = wrapped(out, outs, BLOCK_OUT).to(INDEX)
    t = wrapped(token, tokens, BLOCK_TOKENS).to(INDEX)
    c = tl.arange(0, BLOCK_INNER).to(INDEX)
    x += token * x_row
    total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for step in tl.range(first, last):
        start = tl.cast(step, tl.int64) * BLOCK_INNER
        keep = c < inner - start
        if INDEX == tl.int32:  # noqa: SIM300  (a constexpr stands first)
            moved = corners(genes, gene_rows, gene_cols, out, start)
            x_moved = x + start * x_col
            col = c
        else:  # any strides: 64-bit offsets of every gene, kept over all steps, would take all registers
            moved = corners(genes, gene_rows, gene_cols, out, 0)
            x_moved = x
            col = c + start
        weight = chain(moved, values, gene_rows, gene_cols, r, col, keep[None, :], STAY)
        weight = weight.to(x.dtype.element_ty)
        tile = tl.load(x_moved + (t[None, :] * x_row + col[:, None] * x_col), mask=keep[:, None], other=0.0)
        if UPCAST:
            weight, tile = weight.to(tl.float32), tile.to(tl.float32)
        total = tl.dot(weight, tile, total, input_precision="ieee")
    return total


@triton.jit
def epilogue(
    y, total, biases, values, out_tile, token_tile, tokens, outs,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write `activation(total + bias)`, a tile of `W x^T`, to y `[tokens, outs]`, contiguous, rounded once."""
    out = span(out_tile, BLOCK_OUT)
    token = span(token_tile, BLOCK_TOKENS)
    if BIAS == "plain":
        total += tl.load(biases[0] + out, mask=out < outs, other=0.0).to(tl.float32)[:, None]
    if BIAS == "genes":
        bias = tl.zeros([BLOCK_OUT], tl.float32)
        for k in tl.static_range(len(biases)):
            gene = tl.load(biases[k] + out, mask=out < outs, other=0.0)
            bias = tl.fma(gene.to(tl.float32), values[k], bias)
        total += bias.to(y.dtype.element_ty).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        total = activate(total.to(y.dtype.element_ty).to(tl.float32), ACTIVATION)
    keep = (out[:, None] < outs) & (token[None, :] < tokens)
    tl.store(y + token[None, :] * outs + out[:, None], total.to(y.dtype.element_ty), mask=keep)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """relu, gelu (by erf) or silu in float32; NaN stays NaN."""
    if ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)
    if ACTIVATION == "gelu":
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    if ACTIVATION == "silu":
        value = value / (1 + tl.exp(-value))
    return value
