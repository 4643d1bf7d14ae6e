// SPDX-License-Identifier: Apache-2.0
// How a few rows of an expanded W come into being, from genes of any strides: in registers (Chain) or in L1 (a strip).
// What is done with them is in expansion.cpp and rows_*.h. Internal linkage throughout, as in simd.h.
#pragma once

#include "../expansion.h"

#include "simd.h"

#define INLINE inline __attribute__((always_inline))

namespace {

using namespace pylearngene;

#if defined(__AVX512F__)
constexpr int kRows = 8;       // rows of W formed together in L1
constexpr int kFewTokens = 4;  // tokens multiplied while W is in registers
#else
constexpr int kRows = 4;
constexpr int kFewTokens = 2;
#endif
constexpr int kFewRows = 4;           // rows of W formed together in registers
constexpr int kFewGenes = 4;          // genes whose addresses and coefficients stay in registers
constexpr int kStripBytes = 2048;     // one row of a strip
constexpr int kStageBytes = 1 << 17;  // copies of genes that are not read in place; 32 columns of 64 genes at least

template <class T>
using Vector = typename Element<T>::Vector;
template <class T>
using WorkOf = typename Element<T>::Work;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Length of the fewest blocks of at most `most` tokens, all alike, so that threads get as much to do: a multiple of
// `step`, as `most` is; the last block may be shorter.
INLINE int64_t even_block(int64_t tokens, int64_t most, int64_t step) {
    const int64_t blocks = (tokens + most - 1) / most;
    return (tokens + blocks * step - 1) / (blocks * step) * step;
}

// Where a chain reads genes whose columns are contiguous. kCount of them, with rows of one stride, stay in registers.
template <class G, int kCount>
struct ChainGenes {
    const G* base[kCount];
    int64_t row_step;
    Vector<G> coeffs[kCount];

    // Starts at (row, column).
    INLINE void start(const Genes& genes, int64_t row, int64_t column) {
        row_step = genes.matrix[0].row_stride;
        for (int k = 0; k < kCount; ++k) {
            base[k] = static_cast<const G*>(genes.matrix[k].data) + row * row_step + column;
            coeffs[k] = splat(read_one(static_cast<const WorkOf<G>*>(genes.coeffs) + k));
        }
    }
    INLINE int size() const { return kCount; }
    INLINE int64_t step(int) const { return row_step; }
    INLINE Vector<G> coeff(int k) const { return coeffs[k]; }
};
// Any number of genes, each with its own stride.
template <class G>
struct ChainGenes<G, 0> {
    const G* base[kMaxGenes];
    int64_t row_step[kMaxGenes];
    const WorkOf<G>* coeffs;
    int count;

    INLINE void start(const Genes& genes, int64_t row, int64_t column) {
        coeffs = static_cast<const WorkOf<G>*>(genes.coeffs);
        count = genes.count;
        for (int k = 0; k < count; ++k) {
            const Matrix& g = genes.matrix[k];
            base[k] = static_cast<const G*>(g.data) + row * g.row_stride + column;
            row_step[k] = g.row_stride;
        }
    }
    INLINE int size() const { return count; }
    INLINE int64_t step(int k) const { return row_step[k]; }
    INLINE Vector<G> coeff(int k) const { return splat(read_one(coeffs + k)); }
};

// W formed in registers as c0*g0, then fma(ck, gk, .) in k order, then rounded as if stored as X: the one definition of
// its bits.
template <class G, int kCount = 0>
struct Chain : ChainGenes<G, kCount> {
    typedef WorkOf<G> Work;
    typedef Vector<G> V;
    static constexpr int lanes = Simd<Work>::lanes;

    INLINE const G* at(int k, int64_t r, int64_t i) const { return this->base[k] + r * this->step(k) + i; }
    // N vectors from (r, i) on, `step` rows or `lanes` columns apart. With kAdd the chain goes on from what w holds.
    template <class X, int N, bool kDown, bool kAdd = false>
    INLINE void form_at(int64_t r, int64_t i, V (&w)[N]) const {
        const G* p = at(0, r, i);
        for (int j = 0; j < N && !kAdd; ++j)
            w[j] = this->coeff(0) * Element<G>::load(p + j * (kDown ? this->step(0) : lanes));
        for (int k = kAdd ? 0 : 1; k < this->size(); ++k) {
            const V c = this->coeff(k);
            const int64_t step = kDown ? this->step(k) : lanes;
            p = at(k, r, i);
            for (int j = 0; j < N; ++j) w[j] = fma(c, Element<G>::load(p + j * step), w[j]);
        }
        for (int j = 0; j < N; ++j) w[j] = Element<X>::round(w[j]);
    }
    // The same where only the first n of the columns exist, n < lanes, N rows of them. Lanes beyond are cleared: an
    // infinite coefficient must not make them NaN.
    template <class X, int N, bool kAdd = false>
    INLINE void form_first(int64_t r, int64_t i, int64_t n, V (&w)[N]) const {
        for (int j = 0; j < N; ++j) {
            if (!kAdd) w[j] = this->coeff(0) * load_first(at(0, r + j, i), n);
            for (int k = kAdd ? 0 : 1; k < this->size(); ++k)
                w[j] = fma(this->coeff(k), load_first(at(k, r + j, i), n), w[j]);
            Work kept[lanes] = {};
            memcpy(kept, &w[j], n * sizeof(Work));
            w[j] = Element<X>::round(Element<Work>::load(kept));
        }
    }
};

bool contiguous(const Genes& genes) {
    for (int k = 0; k < genes.count; ++k)
        if (genes.matrix[k].column_stride != 1) return false;
    return true;
}

// Whether chains are compiled for few genes of these dtypes, and how many tokens are multiplied in registers forward.
template <class X, class G>
constexpr bool kCompiled = false;
template <>
constexpr bool kCompiled<float, float> = true;
template <>
constexpr bool kCompiled<BF16, BF16> = true;
template <class X, class G>
constexpr int kInRegisters = kCompiled<X, G> && kRows == 8 ? 6 : kFewTokens;

// How many genes such a chain is for, 0 where it cannot be used: columns contiguous, rows of one stride.
INLINE int few_genes(const Genes& genes) {
    for (int k = 1; k < genes.count; ++k)
        if (genes.matrix[k].row_stride != genes.matrix[0].row_stride) return 0;
    return genes.count <= kFewGenes && genes.count != 3 && contiguous(genes) ? genes.count : 0;
}

// Copies `rows` x `n` elements of a gene of any strides to `to`, walking along the smaller stride, so that a transposed
// gene is read line by line.
template <class G>
void gather(const Matrix& g, int64_t row, int rows, int64_t column, int n, G* to, int64_t width) {
    const G* p = static_cast<const G*>(g.data) + row * g.row_stride + column * g.column_stride;
    if (g.row_stride < g.column_stride) {
        for (int c = 0; c < n; ++c)
            for (int r = 0; r < rows; ++r) to[r * width + c] = read_one(p + r * g.row_stride + c * g.column_stride);
    } else {
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < n; ++c) to[r * width + c] = read_one(p + r * g.row_stride + c * g.column_stride);
    }
}

// n elements of T as work values, padded with zeros to whole vectors.
template <class T>
INLINE void widen_row(WorkOf<T>* to, const T* from, int64_t n) {
    constexpr int lanes = Simd<WorkOf<T>>::lanes;
    for (int64_t i = 0; i < n; i += lanes) {
        const Vector<T> v = n - i < lanes ? load_first(from + i, n - i) : Element<T>::load(from + i);
        memcpy(to + i, &v, sizeof v);
    }
}

template <class T>
INLINE void narrow_row(T* to, const WorkOf<T>* from, int64_t n) {
    constexpr int lanes = Simd<WorkOf<T>>::lanes;
    for (int64_t i = 0; i < n; i += lanes) {
        const Vector<T> v = Element<WorkOf<T>>::load(from + i);
        if (n - i < lanes)
            store_first(to + i, v, n - i);
        else
            Element<T>::store(to + i, v);
    }
}

// Calls spend(chain, c, m) with chains that start at columns c .. of W's row `row` and are good for `rows` rows and m
// columns, until n columns are done. Genes whose columns are not contiguous are copied aside, as many columns as fit.
template <class G, class Spend>
INLINE void each_chain(const Genes& genes, int64_t row, int rows, int64_t column, int n, Spend spend) {
    constexpr int whole = 32;  // columns in a factor, at most
    Chain<G> chain;
    chain.start(genes, row, column);
    if (contiguous(genes)) {
        spend(chain, 0, n);
        return;
    }
    alignas(64) G stage[kStageBytes / sizeof(G)];
    const int room = kStageBytes / sizeof(G) / (rows * genes.count) / whole * whole;
    for (int c = 0; c < n; c += room) {
        const int m = min64(room, n - c);
        for (int k = 0; k < genes.count; ++k) {
            G* const to = stage + k * rows * room;
            gather(genes.matrix[k], row, rows, column + c, m, to, room);
            chain.base[k] = to;
            chain.row_step[k] = room;
        }
        spend(chain, c, m);
    }
}

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

// N rows from r on, m columns of a block.
template <class T, int N, class C>
INLINE void form_rows(const C& chain, int r, int m, typename T::Stored* to, int64_t stride) {
    typename T::Factor w[N];
    for (int i = 0; i < m; i += T::step) {
        if (i + T::step <= m)
            T::form(chain, r, i, w);
        else
            T::form_first(chain, r, i, m - i, w);
        for (int j = 0; j < N; ++j) memcpy(to + j * stride + i, &w[j], sizeof w[j]);
    }
}

// to[r][i] = W[row + r, column + i] for `rows` <= kRows rows and n columns, rounded as if stored as the terms'
// elements; each row padded with zeros to whole factors, rows beyond left alone. Never inlined: a caller would keep the
// copies of genes on its stack beside those of its other calls.
template <class T, class G>
__attribute__((noinline)) void form_block(const Genes& genes, int64_t row, int rows, int64_t column, int n,
                                          typename T::Stored* to, int64_t stride) {
    each_chain<G>(genes, row, rows, column, n, [&](const Chain<G>& chain, int c, int m) {
        int r = 0;
        for (; r + kFewRows <= rows; r += kFewRows) form_rows<T, kFewRows>(chain, r, m, to + r * stride + c, stride);
        for (; r < rows; ++r) form_rows<T, 1>(chain, r, m, to + r * stride + c, stride);
    });
}

}  // namespace
