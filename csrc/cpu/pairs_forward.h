// SPDX-License-Identifier: Apache-2.0
// y = x W^T + b of `expansion` in bfloat16 for many tokens: a block of W is formed once, in the order in which pairs
// are multiplied, and stays in L2 while all tokens of a part go by. Every sum runs pair after pair from the first, so
// that a token's result depends neither on how many others come with it nor on the threads.
#pragma once

#include "pairs.h"
#include "rows_forward.h"

namespace {

// Whether the product was one for this file, and is done.
template <class G, class X>
bool forward_in_pairs(const RowsForward&, X) {
    return false;
}

}  // namespace

#if defined(__AVX512BF16__)

namespace {

constexpr int kPairsFrom = 17;   // tokens; fewer are for rows_forward.h
constexpr int kPairStrip = 256;  // columns of W that are formed before they are turned

// to[p][r]: columns 2 p and 2 p + 1 of row r, for `rows` <= kPairColumns rows and n columns; zero beyond both.
template <class G>
void form_across(const Genes& genes, int64_t row, int rows, int64_t column, int n, uint32_t* to) {
    alignas(64) BF16 strip[16][kPairStrip];
    for (int half = 0; half < kPairColumns; half += 16, to += 16)
        for (int i = 0; i < n; i += kPairStrip) {
            const int some = min64(16, rows - half), m = min64(kPairStrip, n - i);
            if (some < 16) memset(strip, 0, sizeof strip);
            for (int r = 0; r < some; r += kRows)
                form_block<Terms<BF16>, G>(genes, row + half + r, min64(kRows, some - r), column + i, m, strip[r],
                                           kPairStrip);
            for (int j = 0; j < m; j += 32) {
                __m512i v[16];
                for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(&strip[r][j]);
                transpose_words(v);
                uint32_t* const at = to + (i + j) / 2 * kPairColumns;
                const int pairs = min64(16, (m - j + 1) / 2);
                if (pairs == 16) {
                    for (int p = 0; p < 16; ++p) _mm512_store_si512(at + p * kPairColumns, v[p]);
                } else {
                    for (int p = 0; p < 16; ++p)
                        if (p < pairs) _mm512_store_si512(at + p * kPairColumns, v[p]);
                }
            }
        }
}

// Rows that lie side by side are one piece of memory.
template <class G>
GeneAhead ahead_across(const Matrix& g, int64_t row, int64_t cols) {
    if (g.column_stride != 1 || g.row_stride != cols) return {&g, 0};
    return {static_cast<const G*>(g.data) + row * cols, kPairColumns * static_cast<int64_t>(sizeof(G))};
}

// kPairColumns rows of W with tokens [token, end).
template <class G>
void forward_pairs_block(const RowsForward& a, int64_t row, int64_t token, int64_t end) {
    alignas(64) float bias[kPairColumns + Simd<float>::lanes] = {};
    const int rows = min64(kPairColumns, a.o - row);
    form_bias<kPairColumns>(a, row, rows, bias);
    PairTile tile = {};
    tile.lines = static_cast<const BF16*>(a.x) + token * a.x_row_stride;
    tile.line_stride = a.x_row_stride;
    tile.y = static_cast<BF16*>(a.y) + token * a.y_row_stride + row;
    tile.y_stride = a.y_row_stride;
    tile.bias = bias;
    tile.order = in_order();
    tile.columns = first_columns(rows);
    pair_columns(
        tile, end - token, a.i, a.genes.count,
        [&](int64_t column, int n, uint32_t* block) { form_across<G>(a.genes, row, rows, column, n, block); },
        [&](int k) { return ahead_across<G>(a.genes.matrix[k], row + kPairColumns, a.i); });
}

template <class G>
bool forward_in_pairs(const RowsForward& a, BF16) {
    if (a.m < kPairsFrom) return false;
    pair_blocks(a.o, a.m, a.threads,
                [&](int64_t row, int64_t token, int64_t end) { forward_pairs_block<G>(a, row, token, end); });
    return true;
}

}  // namespace

#endif
