// SPDX-License-Identifier: Apache-2.0
// How a few rows of an expanded W come into being, from genes of any strides: in registers (Chain) or in L1 (Strip).
// What is done with them is in expansion.cpp. Internal linkage throughout, as in simd.h.
#pragma once

#include "../expansion.h"

#include "simd.h"

#define INLINE inline __attribute__((always_inline))

namespace {

using namespace pylearngene;

constexpr int kRows = 4;              // rows of W formed together
constexpr int kStripBytes = 2048;     // one row of a strip
constexpr int kStageBytes = 1 << 16;  // copies of genes that are not read in place; 32 columns of 64 genes at least

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

    // What it holds was rounded when it was made.
    template <class X>
    INLINE void form(int64_t i, V (&w)[kRows]) const {
        for (int r = 0; r < kRows; ++r) w[r] = Element<Work>::load(&at[r][i]);
    }
    template <class X>
    INLINE void form_first(int64_t i, int64_t, V (&w)[kRows]) const {
        form<X>(i, w);
    }
};

// How the vectors formed together lie: one below another in rows, or one after another along a row.
enum Direction { kDown, kAlong };

// W formed in registers as c0*g0, then fma(ck, gk, .) in k order, then rounded as if stored as X: the one definition of
// its bits.
template <class G, Direction kDirection>
struct Chain {
    typedef WorkOf<G> Work;
    typedef Vector<G> V;
    const G* base[kMaxGenes];
    int64_t step[kMaxGenes];  // from one of the vectors formed together to the next
    const Work* coeffs;
    int count;

    // Starts at (row, column); the columns of every gene are contiguous.
    INLINE void start(const Genes& genes, int64_t row, int64_t column) {
        coeffs = static_cast<const Work*>(genes.coeffs);
        count = genes.count;
        for (int k = 0; k < count; ++k) {
            const Matrix& g = genes.matrix[k];
            base[k] = static_cast<const G*>(g.data) + row * g.row_stride + column;
            step[k] = kDirection == kAlong ? Simd<Work>::lanes : g.row_stride;
        }
    }
    // Going down rows, the processor cannot guess where the next ones are: they are asked for one strip ahead.
    template <int N>
    INLINE V load(int k, int64_t i, int j) const {
        const G* p = base[k] + j * step[k] + i;
        if (kDirection == kDown) __builtin_prefetch(p + N * step[k]);
        return Element<G>::load(p);
    }
    // With kAdd the chain goes on from what w holds.
    template <class X, int N, bool kAdd = false>
    INLINE void form(int64_t i, V (&w)[N]) const {
        for (int j = 0; j < N && !kAdd; ++j) w[j] = splat(read_one(coeffs)) * load<N>(0, i, j);
        for (int k = kAdd ? 0 : 1; k < count; ++k) {
            const V c = splat(read_one(coeffs + k));
            for (int j = 0; j < N; ++j) w[j] = fma(c, load<N>(k, i, j), w[j]);
        }
        for (int j = 0; j < N; ++j) w[j] = Element<X>::round(w[j]);
    }
    // The last n columns of a row. Lanes beyond are cleared: an infinite coefficient must not make them NaN.
    template <class X, int N, bool kAdd = false>
    INLINE void form_first(int64_t i, int64_t n, V (&w)[N]) const {
        for (int j = 0; j < N; ++j) {
            if (!kAdd) w[j] = splat(read_one(coeffs)) * load_first(base[0] + j * step[0] + i, n);
            for (int k = kAdd ? 0 : 1; k < count; ++k)
                w[j] = fma(splat(read_one(coeffs + k)), load_first(base[k] + j * step[k] + i, n), w[j]);
            Work kept[Simd<Work>::lanes] = {};
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

// N rows of the strip, from row r and column c on, each element rounded as if stored as X.
template <class X, int N, class G>
INLINE void fill_strip(const Chain<G, kDown>& chain, int r, int c, int n, Strip<WorkOf<G>>& strip) {
    constexpr int lanes = Simd<WorkOf<G>>::lanes;
    for (int i = 0; i < n; i += lanes) {
        Vector<G> w[N];
        if (i + lanes <= n)
            chain.template form<X>(i, w);
        else
            chain.template form_first<X>(i, n - i, w);
        for (int j = 0; j < N; ++j) memcpy(&strip.at[r + j][c + i], &w[j], sizeof w[j]);
    }
}

// The strip of W at (row, column). Genes whose columns are not contiguous are copied aside, a few columns at a time.
template <class X, class G>
void form_strip(const Genes& genes, int64_t row, int rows, int64_t column, int n, Strip<WorkOf<G>>& strip) {
    constexpr int lanes = Simd<WorkOf<G>>::lanes;
    alignas(64) G stage[kStageBytes / sizeof(G)];
    const bool in_place = contiguous(genes);
    const int room = kStageBytes / sizeof(G) / (kRows * genes.count) / lanes * lanes;
    const int piece = in_place ? n : min64(n, room);
    memset(strip.at[rows], 0, (kRows - rows) * sizeof strip.at[0]);
    for (int c = 0; c < n; c += piece) {
        const int m = min64(piece, n - c);
        Chain<G, kDown> chain;
        chain.start(genes, row, column + c);
        for (int k = 0; k < genes.count && !in_place; ++k) {
            G* to = stage + k * kRows * room;
            gather(genes.matrix[k], row, rows, column + c, m, to, room);
            chain.base[k] = to;
            chain.step[k] = room;
        }
        if (rows == kRows) fill_strip<X, kRows>(chain, 0, c, m, strip);
        for (int r = 0; r < rows && rows < kRows; ++r) {
            fill_strip<X, 1>(chain, r, c, m, strip);
            for (int k = 0; k < genes.count; ++k) chain.base[k] += chain.step[k];
        }
    }
}

}  // namespace
