// SPDX-License-Identifier: Apache-2.0
// y = x W^T + b of `expansion`: dot products along the columns of W, a few rows of W at a time. For few tokens and
// genes these rows stay in registers; for more they are formed once in L1 and multiplied with all tokens of a block.
// Every sum has one order in all ways: a token's result does not depend on how many others come with it.
#pragma once

#include "rows_few.h"

namespace {

constexpr int kManyTokens = 3;           // tokens multiplied together with kRows rows in L1
constexpr int kTokenBlock = 258;         // tokens that share a strip; their x should stay in L2
constexpr int64_t kNearBytes = 1 << 20;  // genes that the next call of a small network still finds in L2

// n columns of `rows` rows of W, and what tokens have to do with them; the first or the last piece of their columns.
template <class X>
struct Strip {
    typename Terms<X>::Stored* w;
    int64_t stride;
    int rows, n;
    const X* x;
    bool first, last;
    const WorkOf<X>* bias;
    X* y;
};

// acc[t][r] += sum_i x[t, i] * w[r, i] over the columns of a strip of N rows.
template <int T, int N, class X>
INLINE void dot_strip(const Strip<X>& s, const X* x, int64_t x_stride, Vector<X> (&acc)[T][N]) {
    typedef Terms<X> Tm;
    typename Tm::Factor v[T];
    int64_t i = 0;
    for (; i + Tm::step <= s.n; i += Tm::step) {
        for (int t = 0; t < T; ++t) v[t] = Tm::load(x + t * x_stride + i);
        for (int r = 0; r < N; ++r) {
            typename Tm::Factor w = Tm::load_stored(s.w + r * s.stride + i);
            KEEP(w);
            for (int t = 0; t < T; ++t) acc[t][r] = Tm::multiply(w, v[t], acc[t][r]);
        }
    }
    if (i < s.n) {
        for (int t = 0; t < T; ++t) v[t] = Tm::load_first(x + t * x_stride + i, s.n - i);
        for (int r = 0; r < N; ++r) {
            const typename Tm::Factor w = Tm::load_stored(s.w + r * s.stride + i);
            for (int t = 0; t < T; ++t) acc[t][r] = Tm::multiply(w, v[t], acc[t][r]);
        }
    }
}

// The same for the first tokens of a strip, which is formed on the way: kRows rows of W from (row, column) on.
template <int T, bool kAsk, class X, class G, int kCount>
INLINE void dot_forming(const RowsForward& a, int64_t row, int64_t column, const Chain<G, kCount>& chain,
                        const Strip<X>& s, Vector<X> (&acc)[T][kRows]) {
    typedef Terms<X> Tm;
    typename Tm::Factor v[T];
    int64_t i = 0;
    for (; i + Tm::step <= s.n; i += Tm::step) {
        for (int t = 0; t < T; ++t) v[t] = Tm::load(s.x + t * a.x_row_stride + i);
        for (int r = 0; r < kRows; ++r) {
            typename Tm::Factor w[1];
            if (kAsk) ask_below<X>(chain, r, i, kRows);
            Tm::form(chain, r, i, w);
            memcpy(s.w + r * s.stride + i, w, sizeof w);
            for (int t = 0; t < T; ++t) acc[t][r] = Tm::multiply(w[0], v[t], acc[t][r]);
        }
    }
    if (i < s.n) {
        typename Tm::Factor w[kRows];
        form_end<X, G>(a.genes, row, column + i, s.n - i, w);
        for (int t = 0; t < T; ++t) v[t] = Tm::load_first(s.x + t * a.x_row_stride + i, s.n - i);
        for (int r = 0; r < kRows; ++r) {
            memcpy(s.w + r * s.stride + i, &w[r], sizeof w[r]);
            for (int t = 0; t < T; ++t) acc[t][r] = Tm::multiply(w[r], v[t], acc[t][r]);
        }
    }
}

// T tokens of a strip from t on; sums of columns that are still to come wait in `kept`.
template <int T, class X, class Dot>
INLINE void sum_tokens(const RowsForward& a, const Strip<X>& s, int t, Vector<X> (*kept)[kRows], Dot dot) {
    Vector<X> acc[T][kRows];
    for (int j = 0; j < T; ++j)
        for (int r = 0; r < kRows; ++r) acc[j][r] = s.first ? Vector<X>{} : kept[t + j][r];
    dot(acc);
    for (int j = 0; j < T; ++j) {
        if (s.last)
            finish<kRows, X>(acc[j], s.rows, s.bias, s.y + (t + j) * a.y_row_stride);
        else
            memcpy(kept[t + j], acc[j], sizeof acc[j]);
    }
}
template <int T, class X>
INLINE void strip_tokens(const RowsForward& a, const Strip<X>& s, int t, Vector<X> (*kept)[kRows]) {
    sum_tokens<T>(a, s, t, kept,
                  [&](Vector<X>(&acc)[T][kRows]) { dot_strip(s, s.x + t * a.x_row_stride, a.x_row_stride, acc); });
}

// The first tokens of a block, with a strip that is formed meanwhile from one gene or two; whether it could be.
template <int kCount, bool kAsk, class X, class G>
INLINE void forming_tokens(const RowsForward& a, int64_t row, int64_t column, const Strip<X>& s,
                           Vector<X> (*kept)[kRows]) {
    Chain<G, kCount> chain;
    chain.start(a.genes, row, column);
    sum_tokens<kManyTokens>(a, s, 0, kept, [&](Vector<X>(&acc)[kManyTokens][kRows]) {
        dot_forming<kManyTokens, kAsk>(a, row, column, chain, s, acc);
    });
}
template <class X, class G>
INLINE bool forming_tokens(const RowsForward& a, int64_t row, int64_t column, const Strip<X>& s,
                           Vector<X> (*kept)[kRows]) {
    if constexpr (kCompiled<X, G>) {
        const int count = s.rows == kRows ? few_genes(a.genes) : 0;
        constexpr bool asks = sizeof(G) == 2;
        const bool ask = asks && count * a.o * a.i * static_cast<int64_t>(sizeof(G)) > kNearBytes;
        if (count == 1 && !ask) forming_tokens<1, false, X, G>(a, row, column, s, kept);
        if (count == 2 && !ask) forming_tokens<2, false, X, G>(a, row, column, s, kept);
        if (count == 1 && ask) forming_tokens<1, asks, X, G>(a, row, column, s, kept);
        if (count == 2 && ask) forming_tokens<2, asks, X, G>(a, row, column, s, kept);
        return count == 1 || count == 2;
    }
    return false;
}

// A block of tokens with kRows rows of W, formed in L1 a piece of the columns at a time.
template <class X, class G>
void forward_block(const RowsForward& a, int64_t row, int64_t token, int tokens) {
    typedef typename Terms<X>::Stored Stored;
    constexpr int width = kStripBytes / sizeof(Stored), lanes = Simd<WorkOf<X>>::lanes;
    const int rows = min64(kRows, a.o - row);
    alignas(64) Stored strip[kRows * width];
    Vector<X> kept[kTokenBlock][kRows];
    WorkOf<X> bias[kRows < lanes ? lanes : kRows] = {};
    memset(strip + rows * width, 0, (kRows - rows) * kStripBytes);
    form_bias<kRows>(a, row, rows, bias);
    X* const y = static_cast<X*>(a.y) + token * a.y_row_stride + row;
    for (int64_t column = 0; column == 0 || column < a.i; column += width) {
        const X* const x = static_cast<const X*>(a.x) + token * a.x_row_stride + column;
        const int n = min64(width, a.i - column);
        const Strip<X> s = {strip, width, rows, n, x, column == 0, column + width >= a.i, bias, y};
        int t = 0;
        if (tokens >= kManyTokens && forming_tokens<X, G>(a, row, column, s, kept))
            t = kManyTokens;
        else
            form_block<Terms<X>, G>(a.genes, row, rows, column, n, strip, width);
        for (; t + kManyTokens <= tokens; t += kManyTokens) strip_tokens<kManyTokens>(a, s, t, kept);
        if (tokens - t == 2) strip_tokens<2>(a, s, t, kept);
        if (tokens - t == 1) strip_tokens<1>(a, s, t, kept);
    }
}

// T tokens with kFewRows rows of W, formed in L1 a piece of the columns at a time.
template <int T, class X, class G>
void strip_rows(const RowsForward& a, int64_t row) {
    typedef typename Terms<X>::Stored Stored;
    constexpr int width = kStripBytes / sizeof(Stored), lanes = Simd<WorkOf<X>>::lanes;
    const int rows = min64(kFewRows, a.o - row);
    alignas(64) Stored strip[kFewRows * width];
    Vector<X> acc[T][kFewRows] = {};
    WorkOf<X> bias[kRows < lanes ? lanes : kRows] = {};
    memset(strip + rows * width, 0, (kFewRows - rows) * kStripBytes);
    form_bias<kFewRows>(a, row, rows, bias);
    for (int64_t column = 0; column < a.i; column += width) {
        const X* const x = static_cast<const X*>(a.x) + column;
        const int n = min64(width, a.i - column);
        form_block<Terms<X>, G>(a.genes, row, rows, column, n, strip, width);
        dot_strip(Strip<X>{strip, width, rows, n, x, false, false, bias, nullptr}, x, a.x_row_stride, acc);
    }
    X* const y = static_cast<X*>(a.y) + row;
    for (int t = 0; t < T; ++t) finish<kFewRows, X>(acc[t], rows, bias, y + t * a.y_row_stride);
}

// At most T tokens, any genes.
template <int T, class X, class G>
void forward_strips(const RowsForward& a) {
    if constexpr (T > 1)
        if (a.m < T) return forward_strips<T - 1, X, G>(a);
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.o; row += kFewRows) strip_rows<T, X, G>(a, row);
}

template <class X, class G>
void rows_forward(const RowsForward& a) {
    if (a.m <= kInRegisters<X, G> && contiguous(a.genes)) {
        if (in_registers<X, G>(a.genes)) return forward_few<X, G>(a);
        return forward_strips<kInRegisters<X, G>, X, G>(a);
    }
    const int64_t block = even_block(a.m, kTokenBlock, kManyTokens);
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t token = 0; token < a.m; token += block)
        for (int64_t row = 0; row < a.o; row += kRows) forward_block<X, G>(a, row, token, min64(block, a.m - token));
}

}  // namespace
