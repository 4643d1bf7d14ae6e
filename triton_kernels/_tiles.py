# SPDX-License-Identifier: Apache-2.0
"""Device functions shared by kernels: tile order, offsets, the synthesis chain, activations, sums per gene.

Offsets start from int64, so that no product of a size and a stride wraps. No kernel stands here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of a `[rows, cols]` grid: GROUP columns of tiles are walked together, for hits in L2."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    number = tl.program_id(0)
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
def load_coeffs(coeffs, COUNT: tl.constexpr):
    """The K coefficients as scalars, read once per program."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(coeffs + k),)  # noqa: RUF005  (Triton has no starred tuples)
    return values


@triton.jit
def chain(genes, values, gene_rows, gene_cols, row, col, keep):
    """`sum_k c_k G_k` at rows `row` and columns `col`: one fused multiply-add per gene in k order, work dtype."""
    total = tl.zeros([row.shape[0], col.shape[0]], values[0].dtype)
    for k in tl.static_range(len(genes)):
        gene = tl.load(genes[k] + row[:, None] * gene_rows[k] + col[None, :] * gene_cols[k], mask=keep, other=0.0)
        total = tl.fma(gene.to(total.dtype), values[k], total)
    return total


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


@triton.jit
def add_to_genes(
    dw, genes, buffers, values, dots, gene_rows, gene_cols, buffer_row, row, col, keep,
    WANTED: tl.constexpr, DOTS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """`dots[k] = <dW, G_k>` of the tile that starts at int64 row and col, then `buffer_k += c_k dW` for WANTED's bits.

    The dots stand first, in a loop of their own: otherwise registers spill. `dw` need not be masked: where `keep` is
    false, genes read as zero and nothing is stored.
    """
    r = tl.arange(0, dw.shape[0]).to(INDEX)[:, None]
    c = tl.arange(0, dw.shape[1]).to(INDEX)[None, :]
    if DOTS:
        for k in tl.static_range(len(genes)):
            corner = genes[k] + row * gene_rows[k] + col * gene_cols[k]
            gene = tl.load(corner + (r * gene_rows[k] + c * gene_cols[k]), mask=keep, other=0.0)
            tl.store(dots + k, tl.sum(dw * gene.to(dw.dtype)))
    for k in tl.static_range(len(genes)):
        if (WANTED >> k) & 1:
            place = buffers[k] + row * buffer_row + col + (r * buffer_row + c)
            old = tl.load(place, mask=keep, other=0.0)
            tl.store(place, tl.fma(dw, values[k], old), mask=keep)
