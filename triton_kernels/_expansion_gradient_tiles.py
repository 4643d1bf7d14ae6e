# SPDX-License-Identifier: Apache-2.0
"""Device functions of the kernels that add to gradients: a tile of dW in parts, sums per gene, the K updates.

No kernel stands here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    both = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(both, (0, 2, 1)))


@triton.jit
def parts_of(tile, HALVINGS: tl.constexpr):
    """The tile cut into `2**HALVINGS` parts by columns, from left to right.

    Cut at least once, the accumulator of a product is brought into the order of loads and stores once. The compiler
    would else bring what is loaded into the accumulator's order, and back, for every gene.
    """
    parts = (tile,)
    for _ in tl.static_range(HALVINGS):
        finer = ()
        for j in tl.static_range(len(parts)):
            left, right = halves(parts[j])
            finer = finer + (left, right)  # noqa: RUF005  (Triton has no starred tuples)
        parts = finer
    return parts


@triton.jit
def add_up(sums, values, WARPS: tl.constexpr):
    """`sums` plus those of `values` `[R, C]` over what one thread holds where WARPS is more than 1, else over all.

    Of `[4 WARPS, C / 4]` sums each thread has one, if one load of all warps covers 32 columns of 4 WARPS rows.
    """
    if WARPS > 1:
        shaped = tl.reshape(values, [values.shape[0] // sums.shape[0], sums.shape[0], sums.shape[1], 4])
        return sums + tl.sum(tl.sum(shaped, axis=3), axis=0)
    return sums + tl.sum(values)


@triton.jit
def store_sums(dots, sums, k, COUNT: tl.constexpr, WARPS: tl.constexpr):
    """`dots[w, k]`, one for each warp, so that none waits for another, or `dots[0, k]`."""
    if WARPS > 1:
        of_warps = tl.sum(tl.reshape(sums, [WARPS, sums.shape[0] * sums.shape[1] // WARPS]), axis=1)
        tl.store(dots + tl.arange(0, WARPS) * COUNT + k, of_warps)
    else:
        tl.store(dots + k, sums)


@triton.jit
def add_part(part, buffers, values, k, place, keep):
    """`buffer_k += c_k part`, where `place` counts from the buffer's start."""
    old = tl.load(buffers[k] + place, mask=keep, other=0.0)
    tl.store(buffers[k] + place, tl.fma(part, values[k], old), mask=keep)


@triton.jit
def add_to_genes(
    dw, genes, buffers, values, dots, gene_rows, gene_cols, buffer_row, row, col, rows, cols,
    HALVINGS: tl.constexpr, WARPS: tl.constexpr, WANTED: tl.constexpr, DOTS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """`dots[w, k]`, whose sum over WARPS is `<dW, G_k>`, and `buffer_k += c_k dW` for WANTED's bits, of one tile.

    The tile starts at int64 row and col of `[rows, cols]`; nothing outside is read or written. REGULAR: genes lie as
    the buffers do, so that one set of offsets serves all; it fits 32 bits inside a tile. Each thread takes 4 columns
    of each gene and buffer: 16 bytes of float32.
    """
    parts = parts_of(dw, HALVINGS)
    WIDTH: tl.constexpr = dw.shape[1] // 2**HALVINGS
    r = tl.arange(0, dw.shape[0])[:, None]
    c = tl.max_contiguous(tl.arange(0, WIDTH), 4)[None, :]
    if not REGULAR:
        r, c = r.to(tl.int64), c.to(tl.int64)
    start = row * buffer_row + col
    if DOTS:
        # Gene by gene, since sums of all genes at once would take the registers of loads.
        for k in tl.static_range(len(genes)):
            corner = genes[k] + row * gene_rows[k] + col * gene_cols[k]
            sums = tl.zeros([WARPS * 128 // WIDTH, WIDTH // 4] if WARPS > 1 else [], dw.dtype)
            for j in tl.static_range(len(parts)):
                keep = (r < rows - row) & (c < cols - col - j * WIDTH)
                place = start + j * WIDTH + (r * buffer_row + c)
                if REGULAR:
                    gene = tl.load(genes[k] + place, mask=keep, other=0.0, eviction_policy="evict_last")
                else:
                    there = r * gene_rows[k] + (c + j * WIDTH) * gene_cols[k]
                    gene = tl.load(corner + there, mask=keep, other=0.0)
                if (WANTED >> k) & 1:
                    add_part(parts[j], buffers, values, k, place, keep)
                sums = add_up(sums, parts[j] * gene.to(dw.dtype), WARPS)
            store_sums(dots, sums, k, len(genes), WARPS)
    else:
        for j in tl.static_range(len(parts)):
            keep = (r < rows - row) & (c < cols - col - j * WIDTH)
            place = start + j * WIDTH + (r * buffer_row + c)
            for k in tl.static_range(len(genes)):
                if (WANTED >> k) & 1:
                    add_part(parts[j], buffers, values, k, place, keep)
