// SPDX-License-Identifier: Apache-2.0
// The inner product of convolutions: lines of words, broadcast, times a block of words side by side, summed in
// registers. A word is a term of the sum, or two of bfloat16 where the processor multiplies pairs. What lines and
// blocks are made of stands in expansion_conv_*.h.
#pragma once

#include "../expansion_conv.h"

#include "strips.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTileLines = 12;  // lines multiplied together
#else
constexpr int kTileLines = 6;
#endif
static_assert(kTileLines <= kConvLines, "the workspace has room for a tile");

// What is multiplied at once with elements X: one term.
template <class X>
struct Words {
    typedef WorkOf<X> Work;
    typedef Work Word;
    typedef X Rounded;  // what W is rounded to before it is a word
    static constexpr int terms = 1, lanes = Simd<Work>::lanes, columns = 2 * lanes;
    typedef Vector<X> Factor;
    static INLINE Factor load(const Word* p) { return Element<Work>::load(p); }
    static INLINE Factor repeat(const Word* p) { return splat(*p); }
    static INLINE Vector<X> multiply(Factor w, Factor x, Vector<X> sum) { return madd(w, x, sum); }
    // A vector of words of W.
    static INLINE void put(Word* to, const Work* first, const Work*) { memcpy(to, first, lanes * sizeof(Work)); }
    // n channels of a pixel; whole vectors are written.
    static INLINE void copy(Word* to, const X* from, int64_t n) {
        int64_t i = 0;
        for (; i + lanes <= n; i += lanes) {
            const Vector<X> v = Element<X>::load(from + i);
            memcpy(to + i, &v, sizeof v);
        }
        if (i < n) widen_row(to + i, from + i, n - i);
    }
};

#if defined(__AVX512BF16__)
template <>
struct Words<BF16> {
    typedef float Work;
    typedef uint32_t Word;
    typedef float Rounded;
    static constexpr int terms = 2, lanes = 16, columns = 32;
    typedef __m512i Factor;
    static INLINE Factor load(const Word* p) { return _mm512_loadu_si512(p); }
    static INLINE Factor repeat(const Word* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static INLINE F32 multiply(Factor w, Factor x, F32 sum) { return multiply_pairs(w, x, sum); }
    static INLINE void put(Word* to, const float* first, const float* second) {
        const __m512i halves =
            cast<__m512i>(_mm512_cvtne2ps_pbh(Element<float>::load(second), Element<float>::load(first)));
        _mm512_storeu_si512(to, Terms<BF16>::interleave(halves));
    }
    static INLINE void copy(Word* to, const BF16* from, int64_t n) {
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) _mm512_storeu_si512(to + i / 2, _mm512_loadu_si512(from + i));
        if (i < n) _mm512_storeu_si512(to + i / 2, Terms<BF16>::load_first(from + i, n - i));
    }
};
#endif

// A tile of a product; sums are added to those that wait, unless it is the first.
template <class X>
struct ConvTile {
    const typename Words<X>::Word* block;  // [depth, Words::columns]
    const typename Words<X>::Word* lines;  // [lines, depth]
    int64_t line_stride, depth;
    bool first;
    WorkOf<X>* sums;  // [lines, Words::columns]
    int64_t sum_stride;
};

// T lines.
template <class X, int T>
__attribute__((noinline)) void conv_tile(const ConvTile<X>& a) {
    typedef Words<X> W;
    constexpr int lanes = W::lanes;
    Vector<X> sum[T][2];
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = Vector<X>{};
    const typename W::Word *w = a.block, *x = a.lines;
    const int64_t stride = a.line_stride;
    for (int t = 0; t < T; ++t)
        for (int c = 0; c < 2; ++c) __builtin_prefetch(a.sums + t * a.sum_stride + c * lanes, 1);
    for (int64_t d = 0; d < a.depth; ++d, w += W::columns, ++x) {
        typename W::Factor v[2];
        for (int c = 0; c < 2; ++c) {
            v[c] = W::load(w + c * lanes);
            KEEP(v[c]);
        }
        for (int t = 0; t < T; ++t) {
            typename W::Factor f = W::repeat(x + t * stride);
            KEEP(f);
            for (int c = 0; c < 2; ++c) sum[t][c] = W::multiply(v[c], f, sum[t][c]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int c = 0; c < 2; ++c) {
            WorkOf<X>* const to = a.sums + t * a.sum_stride + c * lanes;
            if (!a.first) sum[t][c] += Element<WorkOf<X>>::load(to);
            memcpy(to, &sum[t][c], sizeof sum[t][c]);
        }
}

template <class X, int T = kTileLines>
INLINE void conv_tile(const ConvTile<X>& a, int lines) {
    if (lines == T)
        conv_tile<X, T>(a);
    else if constexpr (T > 1)
        conv_tile<X, T - 1>(a, lines);
}

// Any number of lines, in tiles of about one size: small ones leave the multipliers waiting.
template <class X>
void conv_tiles(ConvTile<X> a, int64_t lines) {
    const int64_t tiles = (lines + kTileLines - 1) / kTileLines;
    for (int64_t j = 0; j < tiles; ++j) {
        const int n = static_cast<int>(lines * (j + 1) / tiles - lines * j / tiles);
        conv_tile<X>(a, n);
        a.lines += n * a.line_stride;
        a.sums += n * a.sum_stride;
    }
}

// to[p][r] = from[r][p] for `lanes` rows and columns.
template <class Work>
INLINE void turn(const Work* from, int64_t stride, Work* to) {
    constexpr int lanes = Simd<Work>::lanes;
    for (int p = 0; p < lanes; ++p)
        for (int r = 0; r < lanes; ++r) to[p * lanes + r] = from[r * stride + p];
}
#if defined(__AVX512F__)
template <>
INLINE void turn<float>(const float* from, int64_t stride, float* to) {
    __m512i v[16];
    for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_si512(from + r * stride);
    transpose_words(v);
    for (int p = 0; p < 16; ++p) _mm512_storeu_si512(to + p * 16, v[p]);
}
#endif

// Calls f(G()) for the dtype of genes that go with X.
template <class X, class F>
INLINE void with_gene_type(int dtype, F f) {
    if constexpr (sizeof(X) == 8) {
        f(double());
    } else {
        if (dtype == kFloat32) f(float());
        if (dtype == kBFloat16) f(BF16());
        if (dtype == kFloat16) f(F16());
    }
}

}  // namespace
