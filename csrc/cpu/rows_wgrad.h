// SPDX-License-Identifier: Apache-2.0
// Gradients of the genes and coefficients of `expansion`: strips of dW, formed in L1 from tokens or read from a panel,
// are added to the gradient of every gene and never stored. Sums run in the order of tokens, a strip is one thread's.
#pragma once

#include "strips.h"

namespace {

#if defined(__AVX512F__)
constexpr int kWgradVectors = 3;  // vectors of columns that are multiplied together with kRows rows
#else
constexpr int kWgradVectors = 2;
#endif
constexpr int kWorkTerms = 8;        // products of a lane that are summed as dW itself is, then in double
constexpr int kInPlaceTokens = 16;   // up to as many tokens, x is read where it lies
constexpr int kPackedTokens = 1024;  // tokens of x that are packed at a time
constexpr int kPackedBytes = 192;    // of each token

// What becomes of the gradient of a gene: nothing, a sum with what it is, or what would come of zeros.
enum Spend { kLeave, kAdd, kStore };

// One row of a strip of dW: to += c * dw, and the sum of dw * g, each where it is wanted: in double, or kTerms products
// of a lane in the work dtype and their sums in double.
template <Spend kSpend, bool kDot, int kTerms, class G>
INLINE double spend_row(const WorkOf<G>* dw, Vector<G> c, WorkOf<G>* to, const G* g, int64_t ahead, int64_t gene_ahead,
                        int n) {
    typedef WorkOf<G> Work;
    constexpr int lanes = Simd<Work>::lanes;
    const Vector<G> one = splat(Work(1));
    F64 dot[Simd<Work>::sums] = {};
    int i = 0;
    while (i + lanes <= n) {
        const int end = kDot && kTerms > 1 ? min64(i + kTerms * lanes, n - lanes + 1) : n - lanes + 1;
        Vector<G> part = {};
        for (; i < end; i += lanes) {
            const Vector<G> d = Element<Work>::load(dw + i);
            if (kSpend != kLeave) {
                __builtin_prefetch(to + ahead + i, 1);
                Element<Work>::store(to + i, madd(c, d, kSpend == kAdd ? Element<Work>::load(to + i) : Vector<G>{}));
            }
            if (kDot) {
                __builtin_prefetch(g + gene_ahead + i);
                if (kTerms > 1)
                    part = madd(d, Element<G>::load(g + i), part);
                else
                    add_product(d, Element<G>::load(g + i), dot);
            }
        }
        if (kDot && kTerms > 1) add_product(part, one, dot);
    }
    if (i < n) {
        const Vector<G> d = load_first(dw + i, n - i);  // beyond n an infinite dy has left NaN
        if (kSpend != kLeave)
            store_first(to + i, madd(c, d, kSpend == kAdd ? load_first(to + i, n - i) : Vector<G>{}), n - i);
        if (kDot) add_product(d, load_first(g + i, n - i), dot);
    }
    return kDot ? total(dot) : 0;
}

// One strip of dW goes to every wanted buffer, and into the running dots of its rows. `first` says that no other part
// of these sums of tokens went before.
template <class G, int kTerms = 1>
void spend_strip(const Genes& genes, const GeneGrads& grads, int64_t row, int rows, int64_t column, int n,
                 const WorkOf<G>* dw, int64_t stride, double (*dots)[kMaxGenes], bool first = true) {
    typedef WorkOf<G> Work;
    constexpr int width = kStripBytes / sizeof(Work);
    alignas(64) G stage[kRows * width];
    for (int k = 0; k < genes.count; ++k) {
        const Vector<G> c = splat(read_one(static_cast<const Work*>(genes.coeffs) + k));
        Work* const to = static_cast<Work*>(grads.buffer[k]);
        const int64_t to_stride = grads.buffer_stride[k];
        const bool store = first && grads.fresh[k];
        const Matrix& m = genes.matrix[k];
        const bool in_place = m.column_stride == 1;
        const G* g = in_place ? static_cast<const G*>(m.data) + row * m.row_stride + column : stage;
        const int64_t g_stride = in_place ? m.row_stride : width, g_ahead = in_place ? kRows * g_stride : 0;
        if (!in_place && grads.dots) gather(m, row, rows, column, n, stage, width);
        for (int r = 0; r < rows; ++r, g += g_stride) {
            const Work* const from = dw + r * stride;
            Work* const at = to + (row + r) * to_stride + column;
            const int64_t to_ahead = kRows * to_stride;
            if (to && grads.dots && store)
                dots[r][k] += spend_row<kStore, true, kTerms, G>(from, c, at, g, to_ahead, g_ahead, n);
            else if (to && grads.dots)
                dots[r][k] += spend_row<kAdd, true, kTerms, G>(from, c, at, g, to_ahead, g_ahead, n);
            else if (to && store)
                spend_row<kStore, false, kTerms, G>(from, c, at, g, to_ahead, g_ahead, n);
            else if (to)
                spend_row<kAdd, false, kTerms, G>(from, c, at, g, to_ahead, g_ahead, n);
            else if (grads.dots)
                dots[r][k] += spend_row<kLeave, true, kTerms, G>(from, c, at, g, 0, g_ahead, n);
        }
    }
}

template <class D, class G>
void accumulate(const Accumulate& a) {
    typedef WorkOf<G> Work;
    constexpr int width = kStripBytes / sizeof(Work);
    const D* const dw = static_cast<const D*>(a.dw);
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; row += kRows) {
        const int rows = min64(kRows, a.rows - row);
        double dots[kRows][kMaxGenes] = {};
        alignas(64) Work strip[kRows][width];
        for (int64_t column = 0; column < a.cols; column += width) {
            const int n = min64(width, a.cols - column);
            for (int r = 0; r < rows; ++r) widen_row(strip[r], dw + (row + r) * a.dw_row_stride + column, n);
            spend_strip<G>(a.genes, a.grads, row, rows, column, n, strip[0], width, dots);
        }
        for (int r = 0; r < rows && a.grads.dots; ++r)
            memcpy(a.grads.dots + (row + r) * a.genes.count, dots[r], a.genes.count * sizeof(double));
    }
}

// kRows elements as work values, zero beyond `rows`.
template <class X>
INLINE void widen_rows(WorkOf<X>* to, const X* from, int rows) {
    constexpr int lanes = Simd<WorkOf<X>>::lanes, whole = kRows < lanes ? lanes : kRows;
    X some[whole] = {};
    WorkOf<X> wide[whole];
    if (rows == kRows)  // a copy of known size is one instruction
        memcpy(some, from, kRows * sizeof(X));
    else
        memcpy(some, from, rows * sizeof(X));
    for (int r = 0; r < whole; r += lanes) {
        const Vector<X> v = Element<X>::load(some + r);
        memcpy(wide + r, &v, sizeof v);
    }
    memcpy(to, wide, kRows * sizeof wide[0]);
}

// What is multiplied at once going through tokens: one token.
template <class X>
struct Through {
    typedef WorkOf<X> Scalar;  // one row's part of a factor
    typedef WorkOf<X> Stored;  // an element of packed x
    static constexpr int tokens = 1;
    static constexpr int columns = kPackedBytes / sizeof(Stored);
    static INLINE Vector<X> repeat(Scalar dy) { return splat(dy); }
    static INLINE Vector<X> multiply(Vector<X> x, Vector<X> dy, Vector<X> sum) { return madd(x, dy, sum); }
    static INLINE Vector<X> load(const Stored* p) { return Element<Stored>::load(p); }

    // to[t][i]: tokens of x, a row of them.
    static void pack(const X* x, int64_t stride, int n, int cols, Stored* to) {
        for (int t = 0; t < n; ++t) widen_row(to + t * columns, x + t * stride, cols);
    }
    // to[t][r]: rows of dy^T, side by side; zero beyond `rows`.
    static void pack_rows(const X* dy, int64_t stride, int n, int rows, Scalar (*to)[kRows]) {
        for (int t = 0; t < n; ++t) widen_rows(to[t], dy + t * stride, rows);
    }
};

// strip[r][c] += sum_t dy[t][r] * x[t, c] for C vectors of columns; `load` reads a factor of x.
template <int C, class Th, class Work, class E, class Load>
INLINE void add_tokens(const E* x, int64_t x_stride, const typename Th::Scalar (*dy)[kRows], int n, Work* strip,
                       int64_t stride, Load load) {
    typedef typename Simd<Work>::Vector V;
    constexpr int lanes = Simd<Work>::lanes;
    V a[kRows][C];
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < C; ++c) a[r][c] = Element<Work>::load(strip + r * stride + c * lanes);
    for (int t = 0; t < n; ++t, x += x_stride) {
        decltype(load(x)) v[C];
        for (int c = 0; c < C; ++c) {
            v[c] = load(x + c * lanes);
            KEEP(v[c]);
        }
        for (int r = 0; r < kRows; ++r) {
            auto d = Th::repeat(dy[t][r]);
            KEEP(d);
            for (int c = 0; c < C; ++c) a[r][c] = Th::multiply(v[c], d, a[r][c]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < C; ++c) memcpy(strip + r * stride + c * lanes, &a[r][c], sizeof a[r][c]);
}

// A strip of dW from a few tokens, x read where it lies.
template <class X, class Work>
void few_tokens(const X* x, int64_t x_stride, const Work (*dy)[kRows], int tokens, int n, Work* strip, int64_t stride) {
    typedef SingleTerms<X> Tm;
    struct Single {
        typedef Work Scalar;
        static INLINE Vector<X> repeat(Scalar d) { return splat(d); }
        static INLINE Vector<X> multiply(Vector<X> v, Vector<X> d, Vector<X> sum) { return madd(v, d, sum); }
    };
    constexpr int lanes = Simd<Work>::lanes;
    int i = 0;
    for (; i + kWgradVectors * lanes <= n; i += kWgradVectors * lanes)
        add_tokens<kWgradVectors, Single>(x + i, x_stride, dy, tokens, strip + i, stride, Tm::load);
    for (; i + lanes <= n; i += lanes) add_tokens<1, Single>(x + i, x_stride, dy, tokens, strip + i, stride, Tm::load);
    const int left = n - i;
    if (left)
        add_tokens<1, Single>(x + i, x_stride, dy, tokens, strip + i, stride,
                              [left](const X* p) { return Tm::load_first(p, left); });
}

template <class X, class G>
void wgrad_few(const RowsWgrad& a) {
    typedef WorkOf<X> Work;
    constexpr int width = kStripBytes / sizeof(Work), lanes = Simd<Work>::lanes;
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.o; row += kRows) {
        const int rows = min64(kRows, a.o - row);
        double dots[kRows][kMaxGenes] = {};
        alignas(64) Work strip[kRows][width];
        Work dy[kInPlaceTokens][kRows];
        for (int t = 0; t < a.m; ++t) {
            widen_rows(dy[t], static_cast<const X*>(a.dy) + t * a.dy_row_stride + row, rows);
        }
        for (int64_t column = 0; column < a.i; column += width) {
            const int n = min64(width, a.i - column), whole = (n + lanes - 1) / lanes * lanes;
            for (int r = 0; r < kRows; ++r) memset(strip[r], 0, whole * sizeof(Work));
            few_tokens(static_cast<const X*>(a.x) + column, a.x_row_stride, dy, static_cast<int>(a.m), n, strip[0],
                       width);
            spend_strip<G, kWorkTerms>(a.genes, a.grads, row, rows, column, n, strip[0], width, dots);
        }
        for (int r = 0; r < rows && a.grads.dots; ++r)
            memcpy(a.grads.dots + (row + r) * a.genes.count, dots[r], a.genes.count * sizeof(double));
    }
}

// Rows [first, last) of dW from some tokens and columns of x, packed before.
template <class X, class G>
void wgrad_rows(const RowsWgrad& a, int64_t first, int64_t last, int64_t token, int tokens, int64_t column, int cols,
                const typename Through<X>::Stored* packed) {
    typedef Through<X> Th;
    typedef WorkOf<X> Work;
    constexpr int lanes = Simd<Work>::lanes;
    const int n = (tokens + Th::tokens - 1) / Th::tokens;
    typename Th::Scalar dy[kPackedTokens / Th::tokens][kRows];
    for (int64_t row = first; row < last; row += kRows) {
        const int rows = min64(kRows, last - row);
        double dots[kRows][kMaxGenes] = {};
        alignas(64) Work strip[kRows][Th::columns] = {};
        Th::pack_rows(static_cast<const X*>(a.dy) + token * a.dy_row_stride + row, a.dy_row_stride, tokens, rows, dy);
        int i = 0;
        for (; i + kWgradVectors * lanes <= cols; i += kWgradVectors * lanes)
            add_tokens<kWgradVectors, Th>(packed + i, Th::columns, dy, n, &strip[0][i], Th::columns, Th::load);
        for (; i < cols; i += lanes)
            add_tokens<1, Th>(packed + i, Th::columns, dy, n, &strip[0][i], Th::columns, Th::load);
        spend_strip<G, kWorkTerms>(a.genes, a.grads, row, rows, column, cols, strip[0], Th::columns, dots, token == 0);
        for (int r = 0; r < rows && a.grads.dots; ++r) {
            double* const to = a.grads.dots + (row + r) * a.genes.count;
            for (int k = 0; k < a.genes.count; ++k) dots[r][k] += read_one(to + k);
            memcpy(to, dots[r], a.genes.count * sizeof(double));
        }
    }
}

template <class X, class G>
void rows_wgrad(const RowsWgrad& a) {
    typedef Through<X> Th;
    if (a.m <= kInPlaceTokens) {
        wgrad_few<X, G>(a);
        return;
    }
    const int64_t blocks = (a.o + kRows - 1) / kRows;
    const int64_t shares = min64(a.threads, blocks);
    if (a.grads.dots) memset(a.grads.dots, 0, a.o * a.genes.count * sizeof(double));
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t share = 0; share < shares; ++share) {
        const int64_t first = blocks * share / shares * kRows, last = min64(blocks * (share + 1) / shares * kRows, a.o);
        alignas(64) typename Th::Stored packed[kPackedTokens / Th::tokens * Th::columns];
        for (int64_t column = 0; column < a.i; column += Th::columns) {
            const int cols = min64(Th::columns, a.i - column);
            for (int64_t token = 0; token < a.m; token += kPackedTokens) {
                const int tokens = min64(kPackedTokens, a.m - token);
                const X* const x = static_cast<const X*>(a.x) + token * a.x_row_stride + column;
                Th::pack(x, a.x_row_stride, tokens, cols, packed);
                wgrad_rows<X, G>(a, first, last, token, tokens, column, cols, packed);
            }
        }
    }
}

}  // namespace
