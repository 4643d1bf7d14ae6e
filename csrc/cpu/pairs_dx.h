// SPDX-License-Identifier: Apache-2.0
// dx = dy W of `expansion` in bfloat16 for many tokens: as pairs_forward.h, with pairs that lie in two rows of W.
#pragma once

#include "pairs.h"

namespace {

// Whether the product was one for this file, and is done.
template <class G, class D>
bool dx_in_pairs(const RowsDx&, D) {
    return false;
}

}  // namespace

#if defined(__AVX512BF16__)

namespace {

constexpr int kPairRows = 16;  // rows of W that are formed together

// to[p][i]: rows 2 p and 2 p + 1 of column i, in the order of `taken`; zero beyond n rows and `cols` <= kPairColumns
// columns.
template <class G>
__attribute__((noinline)) void form_down(const Genes& genes, int64_t row, int n, int64_t column, int cols,
                                         uint32_t* to) {
    typedef Terms<BF16> Tm;
    for (int r = 0; r < n; r += kPairRows) {
        const int rows = min64(kPairRows, n - r);
        each_chain<G>(genes, row + r, rows, column, cols, [&](const Chain<G>& chain, int, int) {
            auto store = [&](__m512i upper, __m512i lower, int at) {
                uint32_t* const p = to + (r + at) / 2 * kPairColumns;
                _mm512_store_si512(p, _mm512_maskz_unpacklo_epi16(~__mmask32{0}, upper, lower));
                _mm512_store_si512(p + 16, _mm512_maskz_unpackhi_epi16(~__mmask32{0}, upper, lower));
            };
            int j = 0;
            for (; j + 4 <= rows; j += 4) {
                __m512i w[4];
                if (cols == kPairColumns)
                    Tm::form(chain, j, 0, w);
                else
                    Tm::form_first(chain, j, 0, cols, w);
                store(w[0], w[1], j);
                store(w[2], w[3], j + 2);
            }
            __m512i w[4] = {};
            for (int left = j; left < rows; ++left) {
                __m512i one[1];
                if (cols == kPairColumns)
                    Tm::form(chain, left, 0, one);
                else
                    Tm::form_first(chain, left, 0, cols, one);
                w[left - j] = one[0];
            }
            for (int left = j; left < rows; left += 2) store(w[left - j], w[left - j + 1], left);
        });
    }
}

// Where columns of dx stand among sums of what form_down made.
INLINE __m512i down_order() {
    const U32 order = {0x10000, 0x30002, 0x110010, 0x130012, 0x50004, 0x70006, 0x150014, 0x170016,
                       0x90008, 0xB000A, 0x190018, 0x1B001A, 0xD000C, 0xF000E, 0x1D001C, 0x1F001E};
    return cast<__m512i>(order);
}

template <class G>
GeneAhead ahead_down(const Matrix& g, int64_t column) {
    if (g.column_stride != 1) return {&g, 0};
    return {static_cast<const G*>(g.data) + column, g.row_stride * static_cast<int64_t>(sizeof(G))};
}

// kPairColumns columns of dx for tokens [token, end).
template <class G>
void dx_pairs_block(const RowsDx& a, int64_t column, int64_t token, int64_t end) {
    const int cols = min64(kPairColumns, a.i - column);
    PairTile tile = {};
    tile.lines = static_cast<const BF16*>(a.dy) + token * a.dy_row_stride;
    tile.line_stride = a.dy_row_stride;
    tile.y = static_cast<BF16*>(a.dx) + token * a.dx_row_stride + column;
    tile.y_stride = a.dx_row_stride;
    tile.order = down_order();
    tile.columns = first_columns(cols);
    pair_columns(
        tile, end - token, a.o, a.genes.count,
        [&](int64_t row, int n, uint32_t* block) { form_down<G>(a.genes, row, n, column, cols, block); },
        [&](int k) { return ahead_down<G>(a.genes.matrix[k], column + kPairColumns); });
}

template <class G>
bool dx_in_pairs(const RowsDx& a, BF16) {
    if (a.m <= kFewTokens) return false;
    pair_blocks(a.i, a.m, a.threads,
                [&](int64_t column, int64_t token, int64_t end) { dx_pairs_block<G>(a, column, token, end); });
    return true;
}

}  // namespace

#endif
