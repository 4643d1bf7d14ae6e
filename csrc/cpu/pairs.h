// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 for many tokens: lines of pairs, read where they lie and broadcast, times a block of pairs side
// by side, summed in registers pair after pair. What fills the block and which product it is stands in pairs_*.h.
#pragma once

#include "strips.h"

#if defined(__AVX512BF16__)

namespace {

constexpr int kPairLines = 12;    // lines multiplied together
constexpr int kPairColumns = 32;  // columns of a block: two vectors of sums
constexpr int kPairDepth = 3072;  // terms of a sum that a block holds
constexpr int kPairTokens = 384;  // lines whose sums wait for the next block
constexpr int kPairWords = kPairDepth / 2 * kPairColumns;

// Memory that is asked for while a tile is multiplied, at every pair some, so that it is in L2 when its turn comes.
struct StepsAhead {
    const char* lines;  // of the next tile
    int64_t line_step;  // bytes from one request to the next
    const char* gene;   // of the next block
    int64_t gene_step;
    INLINE void ask(int) {
        __builtin_prefetch(lines, 0, 2);
        __builtin_prefetch(gene, 0, 2);
        __builtin_prefetch(gene + gene_step, 0, 2);
        lines += line_step;
        gene += 2 * gene_step;
    }
};

alignas(64) constexpr float kNoSums[kPairColumns] = {};

// A tile of a product. Sums go on from `start`, or from kNoSums; they end in `sums`, or as bfloat16 in y.
struct PairTile {
    const uint32_t* block;  // [depth / 2, kPairColumns], two terms in a word
    const BF16* lines;      // [lines, depth]
    int64_t line_stride;
    int depth;
    const float* start;  // [lines, kPairColumns]
    int64_t start_stride;
    bool last;
    float* sums;  // [lines, kPairColumns]
    int64_t sum_stride;
    BF16* y;  // [lines, columns]
    int64_t y_stride;
    const float* bias;  // [kPairColumns] or null
    __m512i order;      // where each column of y stands among the sums
    __mmask32 columns;  // of y
};

template <int T>
INLINE void start_pairs(const PairTile& a, F32 (&sum)[T][2]) {
    for (int t = 0; t < T && a.last; ++t) __builtin_prefetch(a.y + t * a.y_stride, 1);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t)
        for (int c = 0; c < 2; ++c) sum[t][c] = Element<float>::load(a.start + t * a.start_stride + 16 * c);
}

template <int T>
INLINE void finish_pairs(const PairTile& a, F32 (&sum)[T][2]) {
    if (!a.last) {
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t)
            for (int c = 0; c < 2; ++c) memcpy(a.sums + t * a.sum_stride + 16 * c, &sum[t][c], sizeof sum[t][c]);
        return;
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < 2 && a.bias; ++c) sum[t][c] += Element<float>::load(a.bias + 16 * c);
        const __m512i both = cast<__m512i>(_mm512_cvtne2ps_pbh(sum[t][1], sum[t][0]));
        _mm512_mask_storeu_epi16(a.y + t * a.y_stride, a.columns, _mm512_permutexvar_epi16(a.order, both));
    }
}

// T lines.
template <int T, class Ahead>
__attribute__((noinline)) void pair_tile(const PairTile& a, Ahead ahead) {
    F32 sum[T][2];
    start_pairs(a, sum);
    const uint32_t* w = a.block;
    // Bases of a few lines each leave the compiler registers for all addresses.
    const int64_t stride = a.line_stride;
    const BF16 *x0 = a.lines, *x3 = x0 + 3 * stride, *x6 = x3 + 3 * stride, *x9 = x6 + 3 * stride;
    auto multiply = [&](auto word) {
        __m512i v[2];
        for (int c = 0; c < 2; ++c) {
            v[c] = _mm512_loadu_si512(w + 16 * c);
            KEEP(v[c]);
        }
        for (int t = 0; t < T; ++t) {
            __m512i d = _mm512_set1_epi32(static_cast<int>(word((t < 3   ? x0
                                                                 : t < 6 ? x3
                                                                 : t < 9 ? x6
                                                                         : x9) +
                                                                t % 3 * stride)));
            KEEP(d);
            for (int c = 0; c < 2; ++c) sum[t][c] = multiply_pairs(v[c], d, sum[t][c]);
        }
    };
    for (int pair = 0; pair < a.depth / 2; ++pair, w += kPairColumns) {
        ahead.ask(pair);
        multiply([](const BF16* p) {
            uint32_t both;
            memcpy(&both, p, sizeof both);
            return both;
        });
        x0 += 2, x3 += 2, x6 += 2, x9 += 2;
        __asm__("" : "+r"(x0), "+r"(x3), "+r"(x6), "+r"(x9));  // else they become one again
    }
    if (a.depth & 1) multiply([](const BF16* p) { return static_cast<uint32_t>(read_one(p).bits); });
    finish_pairs(a, sum);
}

// n lines.
template <class Ahead>
INLINE void pair_lines(const PairTile& a, int n, Ahead ahead) {
    static void (*const tile[])(const PairTile&, Ahead) = {
        pair_tile<1, Ahead>, pair_tile<2, Ahead>,  pair_tile<3, Ahead>,  pair_tile<4, Ahead>,
        pair_tile<5, Ahead>, pair_tile<6, Ahead>,  pair_tile<7, Ahead>,  pair_tile<8, Ahead>,
        pair_tile<9, Ahead>, pair_tile<10, Ahead>, pair_tile<11, Ahead>, pair_tile<12, Ahead>};
    static_assert(sizeof tile == kPairLines * sizeof tile[0], "a function for every size");
    tile[n - 1](a, ahead);
}

// What the next block is made of, a gene or tokens, and from there to the next line of cache; none: {anything, 0}.
struct GeneAhead {
    const void* from;
    int64_t step;  // bytes
};

// Any number of lines, in tiles of about one size: small ones leave the multipliers waiting. While the last tiles are
// multiplied, each asks for one of what the next block is made of: gene_ahead(k).
template <class Next>
INLINE void pair_tiles(PairTile a, int64_t lines, int genes, Next gene_ahead) {
    const BF16* const first = a.lines;
    const int64_t tiles = (lines + kPairLines - 1) / kPairLines;
    for (int64_t j = 0; j < tiles; ++j) {
        const int n = static_cast<int>(lines * (j + 1) / tiles - lines * j / tiles);
        const int64_t left = tiles - 1 - j;
        const GeneAhead gene = left < genes ? gene_ahead(static_cast<int>(left)) : GeneAhead{a.lines, 0};
        const BF16* const next = left ? a.lines + n * a.line_stride : first;
        pair_lines(a, n,
                   StepsAhead{reinterpret_cast<const char*>(next), a.depth ? 4 * n * a.line_stride / a.depth : 0,
                              static_cast<const char*>(gene.from), gene.step});
        a.lines += n * a.line_stride;
        a.y += n * a.y_stride;
        a.start += n * a.start_stride;
        a.sums += n * a.sum_stride;
    }
}

// kPairColumns columns of a product for `tokens` lines from those of the tile on: form(at, depth, block) writes a block
// of `depth` terms from `at` on. More terms than a block holds are done for kPairTokens lines at a time.
template <class Form, class Next>
INLINE void pair_columns(PairTile tile, int64_t tokens, int64_t terms, int genes, Form form, Next gene_ahead) {
    alignas(64) uint32_t block[kPairWords];
    alignas(64) float sums[kPairTokens * kPairColumns];
    const BF16* const lines = tile.lines;
    BF16* const y = tile.y;
    tile.block = block;
    tile.sums = sums;
    tile.sum_stride = kPairColumns;
    const int64_t at_once = terms <= kPairDepth ? tokens : kPairTokens;
    for (int64_t t = 0; t < tokens; t += at_once)
        for (int64_t at = 0; at == 0 || at < terms; at += kPairDepth) {
            tile.depth = min64(kPairDepth, terms - at);
            form(at, tile.depth, block);
            tile.lines = lines + t * tile.line_stride + at;
            tile.y = y + t * tile.y_stride;
            tile.start = at ? sums : kNoSums;
            tile.start_stride = at ? kPairColumns : 0;
            tile.last = at + tile.depth >= terms;
            pair_tiles(tile, min64(at_once, tokens - t), genes, gene_ahead);
        }
}

inline __mmask32 first_columns(int n) { return static_cast<__mmask32>((uint64_t{1} << n) - 1); }

inline __m512i in_order() {
    const U32 order = {0x10000,  0x30002,  0x50004,  0x70006,  0x90008,  0xB000A,  0xD000C,  0xF000E,
                       0x110010, 0x130012, 0x150014, 0x170016, 0x190018, 0x1B001A, 0x1D001C, 0x1F001E};
    return cast<__m512i>(order);
}

// Into how many parts tokens are cut so that `blocks` blocks of columns keep all threads at work; every part forms W
// again.
inline int64_t token_parts(int64_t blocks, int64_t tokens, int64_t threads) {
    int64_t parts = 1;
    while (parts < threads && tokens / (parts + 1) >= kPairTokens / 4) {
        const int64_t rounds = (blocks * parts + threads - 1) / threads;
        if (8 * rounds * threads <= 9 * blocks * parts) break;
        ++parts;
    }
    return parts;
}

// Calls block(column, token, end) for every kPairColumns columns of a product and every part of its tokens.
template <class Block>
void pair_blocks(int64_t columns, int64_t tokens, int threads, Block block) {
    const int64_t blocks = (columns + kPairColumns - 1) / kPairColumns, parts = token_parts(blocks, tokens, threads);
#pragma omp parallel for collapse(2) if (threads > 1) num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t b = 0; b < blocks; ++b)
            block(b * kPairColumns, tokens * part / parts, tokens * (part + 1) / parts);
}

}  // namespace

#endif
