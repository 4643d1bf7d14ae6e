// SPDX-License-Identifier: Apache-2.0
// Where the elements of an expanded W come from: chains of fused multiply-adds over genes of any strides, and how genes
// are read that do not lie in columns. What is made of them in L1 is in strips.h. Internal linkage, as in simd.h.
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

}  // namespace
