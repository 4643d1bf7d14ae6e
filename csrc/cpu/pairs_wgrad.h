// SPDX-License-Identifier: Apache-2.0
// Gradients of the genes and coefficients of `expansion` in bfloat16 for many tokens: pairs are two tokens. A block of
// dW stays in L2 until all tokens have gone by, in float32, and goes to the genes once, while the last of them are
// multiplied. Sums run in the order of tokens.
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
constexpr int kDwSpent = 128;    // columns that go to the genes together

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

// A block of dW and what of the tokens is packed.
struct DwBlock {
    int64_t row, column;
    int rows, cols;
    alignas(64) uint32_t packed[kDwTokens / 2 * kPairColumns];
    alignas(64) BF16 lines[kDwRows][kDwTokens];
    alignas(64) float strip[kDwRows][kDwColumns];
    const void* wanted[kDwTokens / 2];  // lines of cache
};

// Tokens that are multiplied with a block, and where the packing goes on after them.
struct DwBatch {
    int64_t token;
    int tokens;
    bool last;
    int64_t next_token, next_row, next_column;
};
INLINE DwBatch batch_from(const RowsWgrad& a, const DwBlock& b, int64_t token, int64_t most) {
    const bool last = token + most >= a.m;
    const int tokens = min64(most, a.m - token);
    if (!last) return {token, tokens, last, token + most, b.row, b.column};
    if (b.column + b.cols < a.i) return {token, tokens, last, 0, b.row, b.column + b.cols};
    return {token, tokens, last, 0, b.row + b.rows, 0};
}

// Which pairs ask for one of `lines` lines of cache, so that they are spread over all: those whose number has no bit of
// this one.
INLINE int ask_at(int64_t pairs, int64_t lines) {
    int64_t every = 1;
    while (2 * every * lines <= pairs && every < kDwTokens) every *= 2;
    return static_cast<int>(every - 1);
}

// Lines of cache at one distance from each other.
struct Walk {
    const BF16* at;
    int64_t step;
    int rest;
    INLINE void ask(int pair) {
        if (pair & rest) return;
        __builtin_prefetch(at, 0, 2);
        at += step;
    }
};
// What a tile asks for: tokens of the next panel of x and of the next block of dy, and what is spent on soon.
struct DwAhead {
    Walk x, dy;
    const void* const* wanted;
    int rest;
    INLINE void ask(int pair) {
        x.ask(pair);
        dy.ask(pair);
        if (!(pair & rest)) __builtin_prefetch(*wanted++, 0, 2);
    }
};

// The tokens' lines of cache from `from` on that tile `tile` of `tiles` asks for, `across` of them of every token.
INLINE Walk walk(const BF16* from, int64_t stride, int tokens, int across, int64_t tile, int64_t tiles) {
    const int pairs = (tokens + 1) / 2, rest = ask_at(pairs * tiles, int64_t{across} * tokens);
    const int64_t line = tile * (pairs / (rest + 1));
    if (tile < 0 || line >= int64_t{across} * tokens) return {from, 0, rest};
    return {from + line % tokens * stride + line / tokens * 32, stride, rest};
}

// Lists what some rows of a block are spent on, as far as there is room; returns how many lines that are.
template <class G>
INLINE int want_rows(const RowsWgrad& a, int64_t row, int rows, int64_t column, int cols, const void** wanted) {
    int n = 0;
    auto want = [&](const auto* line) {
        for (int c = 0; c < cols && n < kDwTokens / 2; c += 64 / static_cast<int>(sizeof *line)) wanted[n++] = line + c;
    };
    for (int k = 0; k < a.genes.count; ++k) {
        const Matrix& m = a.genes.matrix[k];
        const float* to = static_cast<const float*>(a.grads.buffer[k]) + row * a.grads.buffer_stride[k] + column;
        const G* g = static_cast<const G*>(m.data) + row * m.row_stride + column;
        for (int r = 0; r < rows; ++r, to += a.grads.buffer_stride[k], g += m.row_stride) {
            if (a.grads.buffer[k]) want(to);
            if (a.grads.dots && m.column_stride == 1) want(g);
        }
    }
    return n;
}

// What rows of a block add to the genes and to the dots of its rows.
template <class G>
__attribute__((noinline)) void spend_rows(const RowsWgrad& a, int64_t row, int rows, int64_t column, int cols,
                                          const float* dw) {
    const int count = a.genes.count;
    double dots[kRows][kMaxGenes];
    for (int r = 0; r < rows; r += kRows) {
        const int some = min64(kRows, rows - r);
        for (int j = 0; j < some; ++j) memset(dots[j], 0, count * sizeof(double));
        spend_strip<G, kWorkTerms>(a.genes, a.grads, row + r, some, column, cols, dw + r * kDwColumns, kDwColumns,
                                   dots);
        for (int j = 0; j < some && a.grads.dots; ++j) {
            double* const to = a.grads.dots + (row + r + j) * count;
            for (int k = 0; k < count; ++k) dots[j][k] += read_one(to + k);
            memcpy(to, dots[j], count * sizeof(double));
        }
    }
}

// Adds tokens to the columns of a block from c on, and spends what no other tokens are added to.
template <class G>
INLINE void wgrad_panel(const RowsWgrad& a, DwBlock& b, const DwBatch& t, int c) {
    const int tiles = (b.rows + kPairLines - 1) / kPairLines, panels = (b.cols + kPairColumns - 1) / kPairColumns;
    const int begin = c / kDwSpent * kDwSpent, width = min64(kDwSpent, b.cols - begin);
    const int part = (c - begin) / kPairColumns, parts = (width + kPairColumns - 1) / kPairColumns;
    const bool end = c + kPairColumns >= b.cols;
    const BF16* const x = static_cast<const BF16*>(a.x) + (end ? t.next_token : t.token) * a.x_row_stride +
                          (end ? t.next_column : b.column + c + kPairColumns);
    const BF16* const dy = static_cast<const BF16*>(a.dy) + t.next_token * a.dy_row_stride + t.next_row;
    PairTile tile = {};
    tile.block = b.packed;
    tile.line_stride = kDwTokens;
    tile.depth = (t.tokens + 1) / 2 * 2;
    tile.start_stride = t.token ? kDwColumns : 0;
    tile.sum_stride = kDwColumns;
    for (int j = 0; j < tiles; ++j) {
        const int r = b.rows * j / tiles, n = b.rows * (j + 1) / tiles - r;
        const int first = n * part / parts, some = n * (part + 1) / parts - first;
        const int wanted = t.last ? want_rows<G>(a, b.row + r + first, some, b.column + begin, width, b.wanted) : 0;
        tile.lines = b.lines[r];
        tile.sums = &b.strip[r][c];
        tile.start = t.token ? tile.sums : kNoSums;
        pair_lines(tile, n,
                   DwAhead{walk(x, a.x_row_stride, t.tokens, 1, j, tiles),
                           walk(dy, a.dy_row_stride, t.tokens, (b.rows + 31) / 32 + 1,
                                (c / kPairColumns - panels / 2) * tiles + j, (panels - panels / 2) * tiles),
                           b.wanted, ask_at(tile.depth / 2, wanted)});
        if (t.last && part + 1 == parts) spend_rows<G>(a, b.row + r, n, b.column + begin, width, &b.strip[r][begin]);
    }
}

template <class G>
void wgrad_pairs_block(const RowsWgrad& a, int64_t row, int rows, int64_t column, int cols) {
    DwBlock b;
    b.row = row, b.rows = rows, b.column = column, b.cols = cols;
    // More are asked for than listed: addresses of nothing would take long.
    for (const void*& line : b.wanted) line = b.packed;
    const int64_t most = even_block(a.m, kDwTokens, 2);
    for (int64_t token = 0; token < a.m; token += most) {
        const DwBatch t = batch_from(a, b, token, most);
        const BF16* const dy = static_cast<const BF16*>(a.dy) + token * a.dy_row_stride + row;
        const BF16* const x = static_cast<const BF16*>(a.x) + token * a.x_row_stride + column;
        for (int r = 0; r < rows; r += 32)
            pack_lines(dy + r, a.dy_row_stride, t.tokens, min64(32, rows - r), b.lines + r);
        for (int c = 0; c < cols; c += kPairColumns) {
            pack_pairs(x + c, a.x_row_stride, t.tokens, min64(kPairColumns, cols - c), b.packed);
            wgrad_panel<G>(a, b, t, c);
        }
    }
}

// Threads get as many whole tiles of rows.
template <class G>
bool wgrad_in_pairs(const RowsWgrad& a, BF16) {
    if (a.m <= kInPlaceTokens) return false;
    if (a.grads.dots) memset(a.grads.dots, 0, a.o * a.genes.count * sizeof(double));
    if (!a.i) return true;
    const int64_t cols = even_block(a.i, kDwColumns, kPairColumns);
    const int64_t tiles = (a.o + kPairLines - 1) / kPairLines, shares = min64(a.threads, tiles);
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t share = 0; share < shares; ++share) {
        const int64_t first = tiles * share / shares * kPairLines;
        const int64_t last = min64(tiles * (share + 1) / shares * kPairLines, a.o);
        const int64_t rows = even_block(last - first, kDwRows, kPairLines);
        for (int64_t row = first; row < last; row += rows)
            for (int64_t column = 0; column < a.i; column += cols)
                wgrad_pairs_block<G>(a, row, min64(rows, last - row), column, min64(cols, a.i - column));
    }
    return true;
}

}  // namespace

#endif
