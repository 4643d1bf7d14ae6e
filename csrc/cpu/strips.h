// SPDX-License-Identifier: Apache-2.0
// How a few rows of an expanded W come into being in L1, as what is multiplied: strips, formed by a few genes at a
// time. What is done with them is in expansion.cpp and rows_*.h; chains, which form W in registers, are in chains.h.
#pragma once

#include "chains.h"

namespace {

#if defined(__AVX512F__)
// Word p of vector r becomes word r of vector p.
INLINE void transpose_words(__m512i (&v)[16]) {
    __m512i u[16];
    for (int j = 0; j < 16; j += 2) {
        u[j] = _mm512_maskz_unpacklo_epi32(kAllLanes, v[j], v[j + 1]);
        u[j + 1] = _mm512_maskz_unpackhi_epi32(kAllLanes, v[j], v[j + 1]);
    }
    for (int j = 0; j < 16; j += 4)
        for (int h = 0; h < 2; ++h) {
            v[j + 2 * h] = _mm512_maskz_unpacklo_epi64(0xFF, u[j + h], u[j + 2 + h]);
            v[j + 2 * h + 1] = _mm512_maskz_unpackhi_epi64(0xFF, u[j + h], u[j + 2 + h]);
        }
    // Quarter s of v[4 q + p] holds word 4 s + p of vectors 4 q to 4 q + 3.
    for (int p = 0; p < 4; ++p)
        for (int h = 0; h < 2; ++h) {
            u[4 * p + h] = _mm512_maskz_shuffle_i32x4(kAllLanes, v[8 * h + p], v[8 * h + 4 + p], 0x88);
            u[4 * p + 2 + h] = _mm512_maskz_shuffle_i32x4(kAllLanes, v[8 * h + p], v[8 * h + 4 + p], 0xDD);
        }
    for (int p = 0; p < 4; ++p)
        for (int h = 0; h < 2; ++h) {
            v[4 * h + p] = _mm512_maskz_shuffle_i32x4(kAllLanes, u[4 * p + 2 * h], u[4 * p + 2 * h + 1], 0x88);
            v[4 * h + 8 + p] = _mm512_maskz_shuffle_i32x4(kAllLanes, u[4 * p + 2 * h], u[4 * p + 2 * h + 1], 0xDD);
        }
}
#endif

constexpr int kStripBytes = 2048;  // one row of a strip
constexpr int kPassGenes = 4;      // genes that are read together: processors follow only a few streams at once
constexpr int kPassBytes = 4096;   // sums of a row that wait for the next genes
constexpr int kFewCouples = 4;     // of a row that is not worth passes

// What is multiplied at once in a product with elements X: one vector of work values.
template <class X>
struct SingleTerms {
    typedef WorkOf<X> Stored;  // an element of a strip of W
    typedef Vector<X> Factor;
    static constexpr int step = Simd<Stored>::lanes;
    static INLINE Factor load(const X* p) { return Element<X>::load(p); }
    static INLINE Factor load_first(const X* p, int64_t n) { return ::load_first(p, n); }
    static INLINE Factor load_stored(const Stored* p) { return Element<Stored>::load(p); }
    static INLINE Vector<X> multiply(Factor a, Factor b, Vector<X> sum) { return madd(a, b, sum); }

    template <class C, int N>
    static INLINE void form(const C& chain, int64_t r, int64_t i, Factor (&w)[N]) {
        chain.template form_at<X, N, true>(r, i, w);
    }
    template <class C, int N>
    static INLINE void form_first(const C& chain, int64_t r, int64_t i, int64_t n, Factor (&w)[N]) {
        chain.template form_first<X, N>(r, i, n, w);
    }
    // Two vectors of columns side by side.
    static INLINE void put(Stored* to, const Vector<X> (&w)[2]) {
        for (int h = 0; h < 2; ++h) {
            const Vector<X> v = Element<X>::round(w[h]);
            memcpy(to + h * step, &v, sizeof v);
        }
    }
};
template <class X>
struct Terms : SingleTerms<X> {};

#if defined(__AVX512BF16__)
inline F32 multiply_pairs(__m512i a, __m512i b, F32 sum) {
    return _mm512_dpbf16_ps(sum, cast<__m512bh>(a), cast<__m512bh>(b));
}
// Pairs of bfloat16, each pair's two products added to one sum; numbers below 2^-126 count as zero.
template <>
struct Terms<BF16> {
    typedef BF16 Stored;
    typedef __m512i Factor;
    static constexpr int step = 32;
    static INLINE Factor load(const BF16* p) { return _mm512_loadu_si512(p); }
    static INLINE Factor load_first(const BF16* p, int64_t n) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
    }
    static INLINE Factor load_stored(const BF16* p) { return load(p); }
    static INLINE F32 multiply(Factor a, Factor b, F32 sum) { return multiply_pairs(a, b, sum); }

    template <class C, int N>
    static INLINE void form(const C& chain, int64_t r, int64_t i, Factor (&w)[N]) {
        F32 low[N], high[N];
        chain.template form_at<float, N, true>(r, i, low);
        chain.template form_at<float, N, true>(r, i + 16, high);
        for (int j = 0; j < N; ++j) w[j] = cast<__m512i>(_mm512_cvtne2ps_pbh(high[j], low[j]));
    }
    // Even and odd columns apart take one instruction each to widen, and one at the end to stand side by side again.
    template <int kCount, int N>
    static INLINE void form(const Chain<BF16, kCount>& chain, int64_t r, int64_t i, Factor (&w)[N]) {
        F32 even[N], odd[N];
        for (int j = 0; j < N; ++j) {
            const U32 both = cast<U32>(load(chain.at(0, r + j, i)));
            even[j] = chain.coeff(0) * cast<F32>(both << 16);
            odd[j] = chain.coeff(0) * cast<F32>(both & 0xFFFF0000u);
        }
        for (int k = 1; k < chain.size(); ++k) {
            const F32 c = chain.coeff(k);
            for (int j = 0; j < N; ++j) {
                const U32 both = cast<U32>(load(chain.at(k, r + j, i)));
                even[j] = fma(c, cast<F32>(both << 16), even[j]);
                odd[j] = fma(c, cast<F32>(both & 0xFFFF0000u), odd[j]);
            }
        }
        for (int j = 0; j < N; ++j) w[j] = interleave(cast<__m512i>(_mm512_cvtne2ps_pbh(odd[j], even[j])));
    }
    template <class C, int N>
    static INLINE void form_first(const C& chain, int64_t r, int64_t i, int64_t n, Factor (&w)[N]) {
        F32 low[N], high[N] = {};
        if (n < 16)
            chain.template form_first<float, N>(r, i, n, low);
        else
            chain.template form_at<float, N, true>(r, i, low);
        if (n > 16) chain.template form_first<float, N>(r, i + 16, n - 16, high);
        for (int j = 0; j < N; ++j) w[j] = cast<__m512i>(_mm512_cvtne2ps_pbh(high[j], low[j]));
    }
    static INLINE void put(BF16* to, const F32 (&w)[2]) {
        _mm512_storeu_si512(to, cast<__m512i>(_mm512_cvtne2ps_pbh(w[1], w[0])));
    }
    // The halves' elements in turn: 0, 16, 1, 17, ...
    static INLINE __m512i interleave(__m512i halves) {
        const U32 order = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                           0x180008, 0x190009, 0x1A000A, 0x1B000B, 0x1C000C, 0x1D000D, 0x1E000E, 0x1F000F};
        return _mm512_permutexvar_epi16(cast<__m512i>(order), halves);
    }
};
#endif

// N rows of W, the first n < step of the columns from `column` on. Never inlined: every product has such an end.
template <class X, class G, int N>
__attribute__((noinline)) void form_end(const Genes& genes, int64_t row, int64_t column, int64_t n,
                                        typename Terms<X>::Factor (&w)[N]) {
    Chain<G> chain;
    chain.start(genes, row, column);
    Terms<X>::form_first(chain, 0, 0, n, w);
}

// N rows from r on, columns [i, m) of a block.
template <class T, int N, class C>
INLINE void form_rows(const C& chain, int r, int i, int m, typename T::Stored* to, int64_t stride) {
    typename T::Factor w[N];
    for (; i < m; i += T::step) {
        if (i + T::step <= m)
            T::form(chain, r, i, w);
        else
            T::form_first(chain, r, i, m - i, w);
        for (int j = 0; j < N; ++j) memcpy(to + j * stride + i, &w[j], sizeof w[j]);
    }
}

// Two vectors of columns: how they are read from genes of type G, and how W's elements come of them.
template <class T, class G>
struct Couple {
    static constexpr int columns = 2 * Simd<WorkOf<G>>::lanes;
    static INLINE void load(const G* p, Vector<G> (&v)[2]) {
        for (int h = 0; h < 2; ++h) v[h] = Element<G>::load(p + h * (columns / 2));
    }
    static INLINE void put(typename T::Stored* to, const Vector<G> (&w)[2]) { T::put(to, w); }
};
// Even and odd columns of bfloat16 apart.
INLINE void load_turns(const BF16* p, F32 (&v)[2]) {
    U32 both;
    memcpy(&both, p, sizeof both);
    v[0] = cast<F32>(both << 16);
    v[1] = cast<F32>(both & 0xFFFF0000u);
}
#if defined(__AVX512BF16__)
template <>
struct Couple<Terms<BF16>, BF16> {
    static constexpr int columns = 32;
    static INLINE void load(const BF16* p, F32 (&v)[2]) { load_turns(p, v); }
    static INLINE void put(BF16* to, const F32 (&w)[2]) {
        _mm512_storeu_si512(to, Terms<BF16>::interleave(cast<__m512i>(_mm512_cvtne2ps_pbh(w[1], w[0]))));
    }
};
#endif

// Asks for what follows p by `step` elements, a couple of columns. Caches foresee few streams of two bytes an element
// by themselves; the lines of wider ones they do.
template <class G>
INLINE void ask_ahead(const G* p, int64_t step) {
    if (sizeof(G) == 2) __builtin_prefetch(p + step);
}

// Columns [i, i + n couples) of row r of a chain.
template <class T, class G, class C>
struct Piece {
    const C& chain;
    int64_t r, i;
    int n;
    Vector<G> (*sums)[2];
    typename T::Stored* to;

    // Genes [k, k + kCount); where they are many, the next row is asked for meanwhile.
    template <int kCount, bool kFirst, bool kLast>
    INLINE void pass(int k) const {
        typedef Couple<T, G> P;
        const G* from[kCount];
        Vector<G> c[kCount];
        for (int q = 0; q < kCount; ++q) {
            from[q] = chain.at(k + q, r, i);
            c[q] = chain.coeff(k + q);
        }
        for (int j = 0; j < n; ++j) {
            Vector<G> v[2], w[2];
            for (int q = 0; q < kCount; ++q) {
                const G* const p = from[q] + j * P::columns;
                if (kCount > 2) ask_ahead(p, chain.step(k + q));
                P::load(p, v);
                for (int h = 0; h < 2; ++h) {
                    if (q)
                        w[h] = fma(c[q], v[h], w[h]);
                    else if (kFirst)
                        w[h] = c[q] * v[h];
                    else
                        w[h] = fma(c[q], v[h], sums[j][h]);
                }
            }
            if (kLast)
                P::put(to + j * P::columns, w);
            else
                memcpy(sums[j], w, sizeof w);
        }
    }
    template <bool kFirst>
    INLINE void last(int k) const {
        switch (chain.size() - k) {
            case 1:
                return pass<1, kFirst, true>(k);
            case 2:
                return pass<2, kFirst, true>(k);
            case 3:
                return pass<3, kFirst, true>(k);
            default:
                return pass<4, kFirst, true>(k);
        }
    }
    INLINE void form() const {
        if (chain.size() <= kPassGenes) return last<true>(0);
        pass<kPassGenes, true, false>(0);
        int k = kPassGenes;
        for (; k + kPassGenes < chain.size(); k += kPassGenes) pass<kPassGenes, false, false>(k);
        last<false>(k);
    }
};

// The whole couples of `rows` rows and m columns of a block, one row after the other; how many columns these are.
template <class T, class G, class C>
INLINE int form_couples(const C& chain, int rows, int m, typename T::Stored* to, int64_t stride) {
    constexpr int columns = Couple<T, G>::columns, room = kPassBytes / (2 * sizeof(Vector<G>));
    Vector<G> sums[room][2];
    const int couples = m / columns;
    if (couples < kFewCouples) return 0;
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < couples; j += room)
            Piece<T, G, C>{
                chain, r, j * columns, static_cast<int>(min64(room, couples - j)), sums, to + r * stride + j * columns}
                .form();
    return couples * columns;
}

// to[r][i] = W[row + r, column + i] for `rows` <= kRows rows and n columns, rounded as if stored as the terms'
// elements; each row padded with zeros to whole factors, rows beyond left alone. Never inlined: a caller would keep the
// copies of genes on its stack beside those of its other calls.
template <class T, class G>
__attribute__((noinline)) void form_block(const Genes& genes, int64_t row, int rows, int64_t column, int n,
                                          typename T::Stored* to, int64_t stride) {
    each_chain<G>(genes, row, rows, column, n, [&](const Chain<G>& chain, int c, int m) {
        const int done = form_couples<T, G>(chain, rows, m, to + c, stride);
        int r = 0;
        for (; r + kFewRows <= rows; r += kFewRows)
            form_rows<T, kFewRows>(chain, r, done, m, to + r * stride + c, stride);
        for (; r < rows; ++r) form_rows<T, 1>(chain, r, done, m, to + r * stride + c, stride);
    });
}

}  // namespace
