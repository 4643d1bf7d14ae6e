// SPDX-License-Identifier: Apache-2.0
// Gradients of the genes and coefficients of `expansion` in bfloat16 for many tokens: pairs are two tokens. A block of
// dW stays in L2 until all tokens have gone by, in float32, and goes to the genes once. Sums run in the order of
// tokens.
#pragma once

#include "pairs.h"
#include "rows_wgrad.h"

namespace {

// Whether the product was one for this file, and is done.
template <class G, class X>
bool wgrad_in_pairs(const RowsWgrad&, X) {
    return false;
}

}  // namespace

#if defined(__AVX512BF16__)

namespace {

constexpr int kDwTokens = 512;   // that are packed at a time
constexpr int kDwRows = 120;     // of dW in a block
constexpr int kDwColumns = 384;  // likewise

// n <= 32 elements of two tokens, the second zero where there is none, side by side: elements 0 to 15 and 16 to 31.
INLINE void pair_up(const BF16* first, const BF16* second, __mmask32 mask, __m512i (&both)[2]) {
    const U32 low = {0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                     0x280008, 0x290009, 0x2A000A, 0x2B000B, 0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F};
    const __m512i a = _mm512_maskz_loadu_epi16(mask, first);
    const __m512i b = second ? _mm512_maskz_loadu_epi16(mask, second) : __m512i{};
    both[0] = _mm512_permutex2var_epi16(a, cast<__m512i>(low), b);
    both[1] = _mm512_permutex2var_epi16(a, cast<__m512i>(low + 0x100010u), b);
}

// to[p][i]: tokens 2 p and 2 p + 1 of x, `cols` <= kPairColumns columns; zero beyond.
inline void pack_pairs(const BF16* x, int64_t stride, int tokens, int cols, uint32_t* to) {
    const __mmask32 mask = first_columns(cols);
    for (int t = 0; t < tokens; t += 2, to += kPairColumns) {
        __m512i both[2];
        pair_up(x + t * stride, t + 1 < tokens ? x + (t + 1) * stride : nullptr, mask, both);
        for (int c = 0; c < 2; ++c) _mm512_store_si512(to + 16 * c, both[c]);
    }
}

// to[r][t]: dy^T, `rows` <= 32 rows; zero beyond the tokens, up to a multiple of 32 of them.
inline void pack_lines(const BF16* dy, int64_t stride, int tokens, int rows, BF16 (*to)[kDwTokens]) {
    const __mmask32 mask = first_columns(rows);
    for (int t = 0; t < tokens; t += 32) {
        __m512i both[16][2] = {}, half[16];
        for (int p = 0; p < 16 && t + 2 * p < tokens; ++p) {
            const BF16* const at = dy + (t + 2 * p) * stride;
            pair_up(at, t + 2 * p + 1 < tokens ? at + stride : nullptr, mask, both[p]);
        }
        for (int h = 0; h < 2; ++h) {
            for (int p = 0; p < 16; ++p) half[p] = both[p][h];
            transpose_words(half);
            for (int r = 0; r < 16; ++r)
                if (16 * h + r < rows) _mm512_storeu_si512(&to[16 * h + r][t], half[r]);
        }
    }
}

// What a block of dW adds to the genes and to the dots of its rows.
template <class G>
void spend_block(const RowsWgrad& a, int64_t row, int rows, int64_t column, int cols,
                 const float (*strip)[kDwColumns]) {
    for (int r = 0; r < rows; r += kRows) {
        const int some = min64(kRows, rows - r), count = a.genes.count;
        double dots[kRows][kMaxGenes] = {};
        spend_strip<G>(a.genes, a.grads, row + r, some, column, cols, strip[r], kDwColumns, dots);
        for (int j = 0; j < some && a.grads.dots; ++j) {
            double* const to = a.grads.dots + (row + r + j) * count;
            for (int k = 0; k < count; ++k) dots[j][k] += read_one(to + k);
            memcpy(to, dots[j], count * sizeof(double));
        }
    }
}

// Where the packing goes on after some tokens of a block.
struct DwPlace {
    int64_t token, row, column;
};
INLINE DwPlace next_place(const RowsWgrad& a, DwPlace at, int rows, int cols) {
    if (at.token + kDwTokens < a.m) return {at.token + kDwTokens, at.row, at.column};
    if (at.column + cols < a.i) return {0, at.row, at.column + cols};
    return {0, at.row + rows, 0};
}

template <class G>
void wgrad_pairs_block(const RowsWgrad& a, int64_t row, int rows, int64_t column, int cols) {
    alignas(64) uint32_t packed[kDwTokens / 2 * kPairColumns];
    alignas(64) BF16 lines[kDwRows][kDwTokens];
    alignas(64) float strip[kDwRows][kDwColumns];
    const BF16 *const dy = static_cast<const BF16*>(a.dy), *const x = static_cast<const BF16*>(a.x);
    const int64_t dy_step = a.dy_row_stride * sizeof(BF16), x_step = a.x_row_stride * sizeof(BF16);
    PairTile tile = {};
    tile.block = packed;
    tile.lines = lines[0];
    tile.line_stride = kDwTokens;
    tile.sum_stride = kDwColumns;
    for (int64_t token = 0; token < a.m; token += kDwTokens) {
        const int tokens = min64(kDwTokens, a.m - token);
        const DwPlace next = next_place(a, {token, row, column}, rows, cols);
        const BF16* const dy_next = dy + next.token * a.dy_row_stride + next.row;
        for (int r = 0; r < rows; r += 32)
            pack_lines(dy + token * a.dy_row_stride + row + r, a.dy_row_stride, tokens, min64(32, rows - r), lines + r);
        tile.first = token == 0;
        tile.depth = (tokens + 1) / 2 * 2;
        for (int c = 0; c < cols; c += kPairColumns) {
            const BF16* const at = x + token * a.x_row_stride + column + c;
            pack_pairs(at, a.x_row_stride, tokens, min64(kPairColumns, cols - c), packed);
            const bool last = c + kPairColumns >= cols;
            const BF16* const x_next = last ? x + next.token * a.x_row_stride + next.column : at + kPairColumns;
            tile.sums = &strip[0][c];
            pair_tiles(tile, rows, last ? 1 + (rows + 31) / 32 : 1, [&](int k) {
                return k ? GeneAhead{dy_next + 32 * (k - 1), dy_step} : GeneAhead{x_next, x_step};
            });
        }
    }
    spend_block<G>(a, row, rows, column, cols, strip);
}

template <class G>
bool wgrad_in_pairs(const RowsWgrad& a, BF16) {
    if (a.m <= kInPlaceTokens) return false;
    if (a.grads.dots) memset(a.grads.dots, 0, a.o * a.genes.count * sizeof(double));
    const int64_t cols = even_block(a.i, kDwColumns, kPairColumns);
    const int64_t most = min64(kDwRows, (a.o + a.threads - 1) / a.threads);
    const int64_t rows = even_block(a.o, (most + kPairLines - 1) / kPairLines * kPairLines, kPairLines);
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.o; row += rows)
        for (int64_t column = 0; column < a.i; column += cols)
            wgrad_pairs_block<G>(a, row, min64(rows, a.o - row), column, min64(cols, a.i - column));
    return true;
}

}  // namespace

#endif
