// SPDX-License-Identifier: Apache-2.0
// What the positions of a convolution read: patches of pixels as lines, tap after tap and within one channel after
// channel, zero beyond the image. And images whose channels lie side by side, made of planes.
#pragma once

#include "expansion_conv_tiles.h"

namespace {

// The token that is looked at, and where it stands.
struct Token {
    int64_t image, row, column;

    INLINE Token(const ConvImage& in, int64_t token) {
        column = token % in.columns;
        row = token / in.columns % in.rows;
        image = token / in.columns / in.rows;
    }
    INLINE void next(const ConvImage& in) {
        if (++column < in.columns) return;
        column = 0;
        if (++row < in.rows) return;
        row = 0, ++image;
    }
    // The pixel that tap (i, j) reads, or null beyond the image.
    template <class X>
    INLINE const X* pixel(const ConvImage& in, int64_t i, int64_t j) const {
        const int64_t y = row * in.row_stride + i * in.row_dilation - in.above;
        const int64_t x = column * in.column_stride + j * in.column_dilation - in.before;
        if (y < 0 || y >= in.height || x < 0 || x >= in.width) return nullptr;
        return static_cast<const X*>(in.pixels) + ((image * in.height + y) * in.width + x) * in.channels;
    }
};

// Asks for the pixels that the last taps of some tokens read; what other taps read was read by tokens before.
template <class X>
void ask_for_pixels(const ConvImage& in, int64_t token, int64_t tokens, int64_t channel, int64_t channels) {
    if (token + tokens > in.images * in.rows * in.columns) return;
    Token at(in, token);
    for (int64_t t = 0; t < tokens; ++t, at.next(in)) {
        const X* const pixel = at.pixel<X>(in, in.tap_rows - 1, in.tap_columns - 1);
        if (!pixel) continue;
        const char* const from = reinterpret_cast<const char*>(pixel + channel);
        for (int64_t byte = 0; byte < channels * static_cast<int64_t>(sizeof(X)); byte += 64)
            __builtin_prefetch(from + byte);
    }
}

// n words of a line; whole vectors are written.
template <class Word>
INLINE void clear(Word* to, int64_t n) {
    typedef Element<float> Any;
    for (int64_t i = 0; i < n; i += Simd<float>::lanes * sizeof(float) / sizeof(Word))
        memset(to + i, 0, sizeof(Any::Vector));
}

// to[line][tap][word]: `channels` channels of `lines` patches; whole vectors are written, the last beyond its line.
template <class X>
void make_lines(const ConvImage& in, int64_t token, int64_t lines, int64_t channel, int64_t channels,
                typename Words<X>::Word* to, int64_t stride) {
    typedef typename Words<X>::Word Word;
    const int64_t words = (channels + Words<X>::terms - 1) / Words<X>::terms, step = in.column_dilation;
    const bool whole = channels == in.channels && step == 1 && channels % Words<X>::terms == 0;
    Token at(in, token);
    for (int64_t line = 0; line < lines; ++line, at.next(in), to += stride) {
        const int64_t y = at.row * in.row_stride - in.above, x = at.column * in.column_stride - in.before;
        int64_t first = 0, last = in.tap_columns;  // the taps within the image
        while (first < last && x + first * step < 0) ++first;
        while (last > first && x + (last - 1) * step >= in.width) --last;
        const int64_t corner = at.image * in.height * in.width + x + first * step;
        const X* const row = static_cast<const X*>(in.pixels) + corner * in.channels + channel;
        Word* next = to;
        for (int64_t i = 0; i < in.tap_rows; ++i) {
            const int64_t down = y + i * in.row_dilation;
            if (down < 0 || down >= in.height) {
                clear(next, in.tap_columns * words);
                next += in.tap_columns * words;
                continue;
            }
            const X* from = row + down * in.width * in.channels;
            if (first) clear(next, first * words);
            next += first * words;
            if (whole) {
                Words<X>::copy(next, from, (last - first) * channels);
                next += (last - first) * words;
            } else {
                for (int64_t j = first; j < last; ++j, next += words, from += step * in.channels)
                    Words<X>::copy(next, from, channels);
            }
            if (last < in.tap_columns) clear(next, (in.tap_columns - last) * words);
            next += (in.tap_columns - last) * words;
        }
    }
}

// to[p][c] = from[c][p] of one image, `channels` of `all` channels.
template <class T>
void turn_planes(const T* from, int64_t positions, int64_t channels, T* to, int64_t all, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
        for (int64_t c = 0; c < channels; ++c) to[p * all + c] = read_one(from + c * positions + p);
}

#if defined(__AVX512F__)
// 16 positions of channels that fill a vector.
INLINE void turn_whole(const float* from, int64_t positions, float* to, int64_t all) {
    __m512i v[16];
    for (int c = 0; c < 16; ++c) v[c] = _mm512_loadu_si512(from + c * positions);
    transpose_words(v);
    for (int p = 0; p < 16; ++p) _mm512_storeu_si512(to + p * all, v[p]);
}
INLINE void turn_whole(const BF16* from, int64_t positions, BF16* to, int64_t all) {
    __m512i v[16];
    for (int c = 0; c < 16; ++c) {
        U16 even, odd;
        memcpy(&even, from + 2 * c * positions, sizeof even);
        memcpy(&odd, from + (2 * c + 1) * positions, sizeof odd);
        v[c] = cast<__m512i>(zero_extend(even) | zero_extend(odd) << 16);
    }
    transpose_words(v);
    for (int p = 0; p < 16; ++p) _mm512_storeu_si512(to + p * all, v[p]);
}
template <class T>
void turn_image(const T* from, int64_t channels, int64_t positions, T* to, int64_t first, int64_t last) {
    constexpr int whole = 64 / sizeof(T);
    for (int64_t c = 0; c < channels; c += whole) {
        const T* const plane = from + c * positions;
        int64_t p = first;
        for (; c + whole <= channels && p + 16 <= last; p += 16)
            turn_whole(plane + p, positions, to + p * channels + c, channels);
        turn_planes(plane, positions, min64(whole, channels - c), to + c, channels, p, last);
    }
}
#else
template <class T>
void turn_image(const T* from, int64_t channels, int64_t positions, T* to, int64_t first, int64_t last) {
    turn_planes(from, positions, channels, to, channels, first, last);
}
#endif
inline void turn_image(const double* from, int64_t channels, int64_t positions, double* to, int64_t first,
                       int64_t last) {
    turn_planes(from, positions, channels, to, channels, first, last);
}

template <class T>
void make_pixels(const ConvPixels& a) {
    constexpr int64_t piece = 256;
    const T* const from = static_cast<const T*>(a.from);
    T* const to = static_cast<T*>(a.to);
    const int64_t size = a.channels * a.positions;
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t image = 0; image < a.images; ++image)
        for (int64_t p = 0; p < a.positions; p += piece)
            turn_image(from + image * size, a.channels, a.positions, to + image * size, p,
                       min64(p + piece, a.positions));
}

}  // namespace
