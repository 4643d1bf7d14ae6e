// SPDX-License-Identifier: Apache-2.0
// Gradients of the genes and coefficients of a convolution: a block of dW, some rows by kConvColumns channels by all
// taps, stays in L2 in the work dtype until all tokens have gone by, and goes to the genes once. Sums run in the order
// of tokens; a block is one thread's.
#pragma once

#include "expansion_conv_patches.h"
#include "rows_wgrad.h"

namespace {

// What a thread works in.
template <class X>
struct GradientRoom {
    typename Words<X>::Word *lines, *block;
    WorkOf<X>* strip;    // [rows, taps, kConvColumns]
    WorkOf<X>* ordered;  // [kRows, kConvColumns, taps], and a vector
    int64_t width;       // of a row of either

    GradientRoom(const ConvGradients& a, int64_t share) {
        char* const room = static_cast<char*>(a.workspace) + share * a.room;
        width = a.in.tap_rows * a.in.tap_columns * kConvColumns;
        strip = reinterpret_cast<WorkOf<X>*>(room);
        ordered = strip + a.rows * width;
        lines = reinterpret_cast<typename Words<X>::Word*>(ordered + kRows * width + Words<X>::columns);
        block = lines + a.rows * kConvTokens;
    }
};

// to[r][word]: `rows` rows of dy of some tokens, which planes hold one after the other; zero beyond, to a whole word.
template <class X>
void pack_planes(const ConvGradients& a, int64_t row, int rows, int64_t token, int64_t tokens,
                 typename Words<X>::Word* to) {
    typedef Words<X> W;
    const X* const dy = static_cast<const X*>(a.dy);
    const int64_t positions = a.in.rows * a.in.columns;
    for (int r = 0; r < rows; ++r) {
        alignas(64) X line[kConvTokens * W::terms];
        for (int64_t t = 0; t < tokens;) {
            const int64_t image = (token + t) / positions, position = (token + t) % positions;
            const int64_t some = min64(tokens - t, positions - position);
            memcpy(line + t, dy + (image * a.o + row + r) * positions + position, some * sizeof(X));
            t += some;
        }
        W::copy(to + r * kConvTokens, line, tokens);
    }
}

// to[word][column]: `columns` channels of what one tap reads for some tokens, zero beyond.
template <class X>
void pack_tap(const ConvImage& in, int64_t i, int64_t j, int64_t token, int64_t tokens, int64_t channel, int columns,
              typename Words<X>::Word* to) {
    typedef Words<X> W;
    Token at(in, token);
    for (int64_t t = 0; t < tokens; ++t, at.next(in), to += W::columns) {
        const X* const pixel = at.pixel<X>(in, i, j);
        if (columns < W::columns || !pixel) memset(to, 0, W::columns * sizeof(*to));
        if (pixel) W::copy(to, pixel + channel, columns);
    }
}
#if defined(__AVX512BF16__)
// Two tokens in a word.
template <>
inline void pack_tap<BF16>(const ConvImage& in, int64_t i, int64_t j, int64_t token, int64_t tokens, int64_t channel,
                           int columns, uint32_t* to) {
    const U32 low = {0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                     0x280008, 0x290009, 0x2A000A, 0x2B000B, 0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F};
    const __m512i order[2] = {cast<__m512i>(low), cast<__m512i>(low + 0x100010u)};
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << columns) - 1);
    const BF16 nothing[32] = {};
    Token at(in, token);
    for (int64_t t = 0; t < tokens; t += 2, to += 32) {
        __m512i v[2];
        for (int s = 0; s < 2; ++s) {
            const BF16* const pixel = t + s < tokens ? at.pixel<BF16>(in, i, j) : nullptr;
            v[s] = _mm512_maskz_loadu_epi16(mask, pixel ? pixel + channel : nothing);
            at.next(in);
        }
        for (int c = 0; c < 2; ++c) _mm512_storeu_si512(to + 16 * c, _mm512_permutex2var_epi16(v[0], order[c], v[1]));
    }
}
#endif

// to[column][tap] = from[tap][column], a row of dW as the genes hold it.
template <class Work>
INLINE void order_taps(const Work* from, int columns, int taps, Work* to) {
    for (int c = 0; c < columns; ++c)
        for (int tap = 0; tap < taps; ++tap) to[c * taps + tap] = from[tap * kConvColumns + c];
}
#if defined(__AVX512F__)
template <>
INLINE void order_taps<float>(const float* from, int columns, int taps, float* to) {
    for (int c = 0; c < columns; c += 16)
        for (int first = 0; first < taps; first += 16) {
            __m512i v[16] = {};
            const int some = min64(16, taps - first);
            for (int tap = 0; tap < some; ++tap) v[tap] = _mm512_loadu_si512(from + (first + tap) * kConvColumns + c);
            transpose_words(v);
            const __mmask16 mask = static_cast<__mmask16>((1 << some) - 1);
            for (int j = 0; j < 16; ++j)
                if (c + j < columns) _mm512_mask_storeu_epi32(to + (c + j) * taps + first, mask, v[j]);
        }
}
#endif

// What a block of dW adds to the genes and to the dots of its rows.
template <class X>
void spend_rows(const ConvGradients& a, int64_t row, int rows, int64_t channel, int columns,
                const GradientRoom<X>& room) {
    const int taps = a.in.tap_rows * a.in.tap_columns, count = a.genes.count;
    for (int r = 0; r < rows; r += kRows) {
        const int some = min64(kRows, rows - r);
        double dots[kRows][kMaxGenes] = {};
        for (int s = 0; s < some; ++s)
            order_taps(room.strip + (r + s) * room.width, columns, taps, room.ordered + s * room.width);
        with_gene_type<X>(a.genes.dtype, [&](auto g) {
            spend_strip<decltype(g), kWorkTerms>(a.genes, a.grads, row + r, some, channel * taps, columns * taps,
                                                 room.ordered, room.width, dots);
        });
        for (int s = 0; s < some && a.grads.dots; ++s)
            memcpy(a.grads.dots + (channel / kConvColumns * a.o + row + r + s) * count, dots[s],
                   count * sizeof(double));
    }
}

// Rows [row, row + rows) of dW and `columns` channels.
template <class X>
void gradient_block(const ConvGradients& a, int64_t row, int rows, int64_t channel, int columns,
                    const GradientRoom<X>& room) {
    typedef Words<X> W;
    constexpr int64_t at_once = kConvTokens * W::terms;
    const int64_t tokens = a.in.images * a.in.rows * a.in.columns;
    ConvTile<X> tile = {};
    tile.block = room.block;
    tile.lines = room.lines;
    tile.line_stride = kConvTokens;
    tile.sum_stride = room.width;
    for (int64_t token = 0; token < tokens; token += at_once) {
        const int64_t some = min64(at_once, tokens - token);
        pack_planes<X>(a, row, rows, token, some, room.lines);
        tile.depth = (some + W::terms - 1) / W::terms;
        tile.first = token == 0;
        tile.sums = room.strip;
        for (int64_t i = 0; i < a.in.tap_rows; ++i)
            for (int64_t j = 0; j < a.in.tap_columns; ++j, tile.sums += kConvColumns)
                for (int c = 0; c < columns; c += W::columns) {
                    pack_tap<X>(a.in, i, j, token, some, channel + c, min64(W::columns, columns - c), room.block);
                    ConvTile<X> part = tile;
                    part.sums += c;
                    conv_tiles(part, rows);
                }
    }
    spend_rows<X>(a, row, rows, channel, columns, room);
}

template <class X>
void conv_gradients(const ConvGradients& a) {
    const int64_t groups = (a.o + a.rows - 1) / a.rows, across = (a.in.channels + kConvColumns - 1) / kConvColumns;
    const int64_t blocks = groups * across;
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t share = 0; share < a.threads; ++share) {
        const GradientRoom<X> room(a, share);
        for (int64_t block = blocks * share / a.threads; block < blocks * (share + 1) / a.threads; ++block) {
            const int64_t row = block % groups * a.rows, channel = block / groups * kConvColumns;
            gradient_block<X>(a, row, min64(a.rows, a.o - row), channel, min64(kConvColumns, a.in.channels - channel),
                              room);
        }
    }
}

}  // namespace
