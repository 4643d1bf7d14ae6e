// SPDX-License-Identifier: Apache-2.0
// How a few rows of an expanded W come into being: in registers (Chain) or in L1 (Strip, form_strip), from genes of any
// strides. What is done with them is in expansion.cpp. Internal linkage throughout, as in simd.h.
#pragma once

#include "../expansion.h"

#include "simd.h"

#define INLINE inline __attribute__((always_inline))

namespace {

using namespace pylearngene;

constexpr int kRows = 4;           // rows of W formed together
constexpr int kStripBytes = 2048;  // one row of a strip

template <class T>
using Vector = typename Element<T>::Vector;
template <class T>
using WorkOf = typename Element<T>::Work;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// kRows rows of W over at most `width` columns, in the work dtype; zero beyond what was formed.
template <class Work>
struct Strip {
    static constexpr int width = kStripBytes / sizeof(Work);
    typedef typename Simd<Work>::Vector V;
    alignas(64) Work at[kRows][width];

    INLINE void form(int64_t i, V (&w)[kRows]) const {
        for (int r = 0; r < kRows; ++r) w[r] = Element<Work>::load(&at[r][i]);
    }
    INLINE void form_first(int64_t i, int64_t, V (&w)[kRows]) const { form(i, w); }
};

// W formed in registers as c0*g0, then fma(ck, gk, .) in k order: the one definition of its bits.
template <class G>
struct Chain {
    typedef WorkOf<G> Work;
    typedef Vector<G> V;
    const G* base[kMaxGenes];
    int64_t step[kMaxGenes];  // from one of the vectors formed together to the next
    const Work* coeffs;
    int count;

    // The vectors formed together stand in consecutive rows, or (`along`) one after another in a row.
    INLINE void start(const Genes& genes, int64_t row, bool along = false) {
        coeffs = static_cast<const Work*>(genes.coeffs);
        count = genes.count;
        for (int k = 0; k < count; ++k) {
            const Matrix& g = genes.matrix[k];
            base[k] = static_cast<const G*>(g.data) + row * g.row_stride;
            step[k] = along ? Simd<Work>::lanes : g.row_stride;
        }
    }
    template <int N>
    INLINE void form(int64_t i, V (&w)[N]) const {
        for (int j = 0; j < N; ++j) w[j] = splat(coeffs[0]) * Element<G>::load(base[0] + j * step[0] + i);
        for (int k = 1; k < count; ++k) {
            const G* p = base[k] + i;
            const V c = splat(coeffs[k]);
            for (int j = 0; j < N; ++j) w[j] = fma(c, Element<G>::load(p + j * step[k]), w[j]);
        }
    }
    // The last n columns of a row. Lanes beyond are cleared: an infinite coefficient must not make them NaN.
    template <int N>
    INLINE void form_first(int64_t i, int64_t n, V (&w)[N]) const {
        for (int j = 0; j < N; ++j) {
            w[j] = splat(coeffs[0]) * load_first(base[0] + j * step[0] + i, n);
            for (int k = 1; k < count; ++k)
                w[j] = fma(splat(coeffs[k]), load_first(base[k] + j * step[k] + i, n), w[j]);
            Work kept[Simd<Work>::lanes] = {};
            memcpy(kept, &w[j], n * sizeof(Work));
            w[j] = Element<Work>::load(kept);
        }
    }
};

bool contiguous(const Genes& genes) {
    for (int k = 0; k < genes.count; ++k)
        if (genes.matrix[k].column_stride != 1) return false;
    return true;
}

// `rows` x `n` elements of a gene with contiguous columns: in place where they are, else copied to `stage`, walking
// along the smaller stride so that a transposed gene is read line by line.
template <class G>
const G* gather(const Matrix& g, int64_t row, int rows, int64_t column, int n, G* stage, int stage_width,
                int64_t* stride) {
    const G* p = static_cast<const G*>(g.data) + row * g.row_stride + column * g.column_stride;
    *stride = g.column_stride == 1 ? g.row_stride : stage_width;
    if (g.column_stride == 1) return p;
    if (g.row_stride < g.column_stride) {
        for (int c = 0; c < n; ++c)
            for (int r = 0; r < rows; ++r) stage[r * stage_width + c] = p[r * g.row_stride + c * g.column_stride];
    } else {
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < n; ++c) stage[r * stage_width + c] = p[r * g.row_stride + c * g.column_stride];
    }
    return stage;
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

// The strip of W at (row, column), each element rounded as if stored as X.
template <class X, class G>
void form_strip(const Genes& genes, int64_t row, int rows, int64_t column, int n, Strip<WorkOf<G>>& strip) {
    typedef WorkOf<G> Work;
    constexpr int lanes = Simd<Work>::lanes, width = Strip<Work>::width;
    const Work* coeffs = static_cast<const Work*>(genes.coeffs);
    const int padded = (n + lanes - 1) / lanes * lanes;
    alignas(64) G stage[kRows * width];
    alignas(64) Work g[width];
    if (rows < kRows) memset(strip.at[rows], 0, (kRows - rows) * sizeof strip.at[0]);
    int k = 0;
    do {  // K is at least 1
        int64_t stride;
        const G* p = gather(genes.matrix[k], row, rows, column, n, stage, width, &stride);
        const Vector<G> c = splat(coeffs[k]);
        const bool last = k == genes.count - 1;
        for (int r = 0; r < rows; ++r) {
            widen_row(g, p + r * stride, n);
            for (int i = 0; i < padded; i += lanes) {
                const Vector<G> v = Element<Work>::load(g + i);
                Vector<G> w = k ? fma(c, v, Element<Work>::load(&strip.at[r][i])) : c * v;
                if (last) w = Element<X>::round(w);
                memcpy(&strip.at[r][i], &w, sizeof w);
            }
            if (last) memset(&strip.at[r][n], 0, (padded - n) * sizeof(Work));
        }
    } while (++k < genes.count);
}

}  // namespace
