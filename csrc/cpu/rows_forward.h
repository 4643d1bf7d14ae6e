// SPDX-License-Identifier: Apache-2.0
// y = x W^T + b of `expansion`: dot products along the columns of W, a few rows of W at a time. For few tokens these
// rows stay in registers; for more they are formed once in L1 and multiplied with all tokens of a block. The order of
// every sum is the same in both, so that a token's result does not depend on how many others come with it.
#pragma once

#include "strips.h"

namespace {

constexpr int kManyTokens = 3;    // tokens multiplied together with kRows rows in L1
constexpr int kTokenBlock = 192;  // tokens that share a strip; their x should stay in L2

// acc[t][r] += sum_i x[t, i] * w[r, i] over the columns of a strip.
template <int T, class X>
INLINE void dot_strip(const typename Terms<X>::Stored* strip, int64_t stride, const X* x, int64_t x_stride, int64_t n,
                      Vector<X> (&acc)[T][kRows]) {
    typedef Terms<X> Tm;
    typename Tm::Factor v[T];
    int64_t i = 0;
    for (; i + Tm::step <= n; i += Tm::step) {
        for (int t = 0; t < T; ++t) v[t] = Tm::load(x + t * x_stride + i);
        for (int r = 0; r < kRows; ++r) {
            typename Tm::Factor w = Tm::load_stored(strip + r * stride + i);
            KEEP(w);
            for (int t = 0; t < T; ++t) acc[t][r] = Tm::multiply(w, v[t], acc[t][r]);
        }
    }
    if (i < n) {
        for (int t = 0; t < T; ++t) v[t] = Tm::load_first(x + t * x_stride + i, n - i);
        for (int r = 0; r < kRows; ++r) {
            const typename Tm::Factor w = Tm::load_stored(strip + r * stride + i);
            for (int t = 0; t < T; ++t) acc[t][r] = Tm::multiply(w, v[t], acc[t][r]);
        }
    }
}

// The bias of rows [row, row + rows) in the work dtype, zero where there is none.
template <class Work, class B>
void form_bias(const RowsForward& a, int64_t row, int rows, Work* bias) {
    if (a.bias) {
        widen_row(bias, static_cast<const B*>(a.bias) + row, rows);
    } else if (a.bias_genes.count) {
        constexpr int lanes = Simd<Work>::lanes;
        Work column[kRows][lanes];
        form_block<SingleTerms<Work>, B>(a.bias_genes, row, rows, 0, 1, column[0], lanes);
        for (int r = 0; r < rows; ++r) bias[r] = column[r][0];
    }
}
void form_bias(const RowsForward& a, int64_t row, int rows, double* bias) {
    form_bias<double, double>(a, row, rows, bias);
}
void form_bias(const RowsForward& a, int64_t row, int rows, float* bias) {
    if (a.bias_dtype == kFloat32) form_bias<float, float>(a, row, rows, bias);
    if (a.bias_dtype == kBFloat16) form_bias<float, BF16>(a, row, rows, bias);
    if (a.bias_dtype == kFloat16) form_bias<float, F16>(a, row, rows, bias);
}

// y[r] = acc[r] summed over its lanes, plus the bias, for `rows` of the N rows.
template <int N, class X>
INLINE void finish(const Vector<X>* acc, int rows, const WorkOf<X>* bias, X* y) {
    typedef WorkOf<X> Work;
    Work out[kRows < Simd<Work>::lanes ? Simd<Work>::lanes : kRows] = {};
    sum_each<N>(acc, out);
    for (int r = 0; r < N; ++r) out[r] += bias[r];
    if (rows < N || N % 4) {
        narrow_row(y, out, rows);
        return;
    }
    constexpr int lanes = Simd<Work>::lanes;
    X whole[N < lanes ? lanes : N];
    for (int r = 0; r < N; r += lanes) Element<X>::store(whole + r, Element<Work>::load(out + r));
    memcpy(y, whole, N * sizeof(X));
}

// T tokens and N rows of W, which are formed in registers.
template <int T, int N, class X, class G>
INLINE void dot_chain(const Chain<G>& chain, const X* x, int64_t x_stride, int64_t n, Vector<X> (&acc)[T][kFewRows]) {
    typedef Terms<X> Tm;
    Vector<X> a[T][N] = {};
    typename Tm::Factor w[N];
    int64_t i = 0;
    for (; i + Tm::step <= n; i += Tm::step) {
        Tm::form(chain, 0, i, w);
        for (int t = 0; t < T; ++t) {
            const typename Tm::Factor v = Tm::load(x + t * x_stride + i);
            for (int r = 0; r < N; ++r) a[t][r] = Tm::multiply(w[r], v, a[t][r]);
        }
    }
    if (i < n) {
        Tm::form_first(chain, 0, i, n - i, w);
        for (int t = 0; t < T; ++t) {
            const typename Tm::Factor v = Tm::load_first(x + t * x_stride + i, n - i);
            for (int r = 0; r < N; ++r) a[t][r] = Tm::multiply(w[r], v, a[t][r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kFewRows; ++r) acc[t][r] = r < N ? a[t][r < N ? r : 0] : Vector<X>{};
}

template <int T, int N, class X, class G>
INLINE void forward_rows(const RowsForward& a, int64_t row) {
    Chain<G> chain;
    Vector<X> acc[T][kFewRows];
    WorkOf<X> bias[kRows < Simd<WorkOf<X>>::lanes ? Simd<WorkOf<X>>::lanes : kRows] = {};
    chain.start(a.genes, row, 0);
    form_bias(a, row, N, bias);
    dot_chain<T, N>(chain, static_cast<const X*>(a.x), a.x_row_stride, a.i, acc);
    for (int t = 0; t < T; ++t) finish<kFewRows, X>(acc[t], N, bias, static_cast<X*>(a.y) + t * a.y_row_stride + row);
}

// T tokens, W in registers; the columns of the genes are contiguous.
template <int T, class X, class G>
void forward_few(const RowsForward& a) {
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.o; row += kFewRows) {
        if (row + kFewRows <= a.o) {
            forward_rows<T, kFewRows, X, G>(a, row);
        } else {
            for (int64_t r = row; r < a.o; ++r) forward_rows<T, 1, X, G>(a, r);
        }
    }
}

// Where a strip stands among the pieces of its columns.
struct Piece {
    bool first, last;
    int rows;
};

// T tokens with a strip; sums of columns that are still to come wait in `kept`.
template <int T, class X>
INLINE void forward_tokens(const typename Terms<X>::Stored* strip, int64_t stride, const X* x, int64_t x_stride, int n,
                           Piece piece, Vector<X> (*kept)[kRows], const WorkOf<X>* bias, X* y, int64_t y_stride) {
    Vector<X> acc[T][kRows];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kRows; ++r) acc[t][r] = piece.first ? Vector<X>{} : kept[t][r];
    dot_strip<T, X>(strip, stride, x, x_stride, n, acc);
    for (int t = 0; t < T; ++t) {
        if (piece.last)
            finish<kRows, X>(acc[t], piece.rows, bias, y + t * y_stride);
        else
            memcpy(kept[t], acc[t], sizeof acc[t]);
    }
}

// A block of tokens with kRows rows of W, formed in L1 a piece of the columns at a time.
template <class X, class G>
void forward_block(const RowsForward& a, int64_t row, int64_t token, int tokens) {
    typedef typename Terms<X>::Stored Stored;
    constexpr int width = kStripBytes / sizeof(Stored);
    const int rows = min64(kRows, a.o - row);
    alignas(64) Stored strip[kRows][width];
    Vector<X> kept[kTokenBlock][kRows];
    WorkOf<X> bias[kRows < Simd<WorkOf<X>>::lanes ? Simd<WorkOf<X>>::lanes : kRows] = {};
    memset(strip[rows], 0, (kRows - rows) * sizeof strip[0]);
    form_bias(a, row, rows, bias);
    X* const y = static_cast<X*>(a.y) + token * a.y_row_stride + row;
    for (int64_t column = 0; column == 0 || column < a.i; column += width) {
        const int n = min64(width, a.i - column);
        const Piece piece = {column == 0, column + width >= a.i, rows};
        form_block<Terms<X>, G>(a.genes, row, rows, column, n, strip[0], width);
        const X* x = static_cast<const X*>(a.x) + token * a.x_row_stride + column;
        int t = 0;
        for (; t + kManyTokens <= tokens; t += kManyTokens)
            forward_tokens<kManyTokens, X>(strip[0], width, x + t * a.x_row_stride, a.x_row_stride, n, piece, kept + t,
                                           bias, y + t * a.y_row_stride, a.y_row_stride);
        for (; t < tokens; ++t)
            forward_tokens<1, X>(strip[0], width, x + t * a.x_row_stride, a.x_row_stride, n, piece, kept + t, bias,
                                 y + t * a.y_row_stride, a.y_row_stride);
    }
}

template <class X, class G>
void rows_forward(const RowsForward& a) {
    if (a.m <= kFewTokens && contiguous(a.genes)) {
        if (a.m == 1) forward_few<1, X, G>(a);
        if (a.m == 2) forward_few<2, X, G>(a);
        if (a.m == 3) forward_few < kFewTokens<3 ? 1 : 3, X, G>(a);
        if (a.m == 4) forward_few < kFewTokens<4 ? 1 : 4, X, G>(a);
        return;
    }
    const int64_t block = even_block(a.m, kTokenBlock, kManyTokens);
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t token = 0; token < a.m; token += block)
        for (int64_t row = 0; row < a.o; row += kRows)
            forward_block<X, G>(a, row, token, min64(block, a.m - token));
}

}  // namespace
