// SPDX-License-Identifier: Apache-2.0
// dx = dy W of `expansion`: sums down the rows of W, a few columns at a time. For few tokens the rows are formed in
// registers; for more, some rows at a time in L1, multiplied with all tokens of a block. Sums run in the order of rows.
#pragma once

#include "strips.h"

namespace {

#if defined(__AVX512F__)
constexpr int kDxTokens = 6;   // tokens multiplied together
constexpr int kDxVectors = 4;  // vectors of columns multiplied together
#else
constexpr int kDxTokens = 4;
constexpr int kDxVectors = 2;
#endif
constexpr int kDxRows = 64;         // rows of W formed at a time
constexpr int kDxTokenBlock = 192;  // tokens that share them

// Columns of a block of W.
template <class Work>
constexpr int kDxColumns = kDxVectors * Simd<Work>::lanes;

// acc[t][i] += sum_o dy[t][o] * w[o, i] for T tokens and C vectors of columns.
template <int T, int C, class Work>
INLINE void add_rows(const Work* w, const Work (*dy)[kDxRows], int n, Work (*acc)[kDxColumns<Work>]) {
    typedef typename Simd<Work>::Vector V;
    constexpr int lanes = Simd<Work>::lanes;
    V a[T][C];
    for (int t = 0; t < T; ++t)
        for (int c = 0; c < C; ++c) a[t][c] = Element<Work>::load(&acc[t][c * lanes]);
    for (int o = 0; o < n; ++o, w += kDxColumns<Work>) {
        V v[C];
        for (int c = 0; c < C; ++c) {
            v[c] = Element<Work>::load(w + c * lanes);
            KEEP(v[c]);
        }
        for (int t = 0; t < T; ++t) {
            V d = splat(dy[t][o]);
            KEEP(d);
            for (int c = 0; c < C; ++c) a[t][c] = madd(v[c], d, a[t][c]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int c = 0; c < C; ++c) memcpy(&acc[t][c * lanes], &a[t][c], sizeof a[t][c]);
}

template <int C, class Work>
INLINE void add_rows_to(const Work* w, const Work (*dy)[kDxRows], int n, Work (*acc)[kDxColumns<Work>], int tokens) {
    int t = 0;
    for (; t + kDxTokens <= tokens; t += kDxTokens) add_rows<kDxTokens, C>(w, dy + t, n, acc + t);
    for (; t + 2 <= tokens; t += 2) add_rows<2, C>(w, dy + t, n, acc + t);
    if (t < tokens) add_rows<1, C>(w, dy + t, n, acc + t);
}

// `cols` columns of dx for a block of tokens.
template <class D, class G>
void dx_block(const RowsDx& a, int64_t column, int cols, int64_t token, int tokens) {
    typedef WorkOf<D> Work;
    constexpr int columns = kDxColumns<Work>;
    alignas(64) Work w[kDxRows * columns];
    alignas(64) Work acc[kDxTokenBlock][columns];
    Work dy[kDxTokenBlock][kDxRows];
    memset(acc, 0, tokens * sizeof acc[0]);
    if (cols < columns) memset(w, 0, sizeof w);
    for (int64_t row = 0; row < a.o; row += kDxRows) {
        const int n = min64(kDxRows, a.o - row);
        for (int r = 0; r < n; r += kRows)
            form_block<SingleTerms<D>, G>(a.genes, row + r, min64(kRows, n - r), column, cols, w + r * columns,
                                          columns);
        const D* const from = static_cast<const D*>(a.dy) + token * a.dy_row_stride + row;
        for (int t = 0; t < tokens; ++t) widen_row(dy[t], from + t * a.dy_row_stride, n);
        if (cols > Simd<Work>::lanes)
            add_rows_to<kDxVectors>(w, dy, n, acc, tokens);
        else
            add_rows_to<1>(w, dy, n, acc, tokens);
    }
    D* const dx = static_cast<D*>(a.dx) + token * a.dx_row_stride + column;
    for (int t = 0; t < tokens; ++t) narrow_row(dx + t * a.dx_row_stride, acc[t], cols);
}

// C vectors of columns of dx for T tokens, W in registers; with kFirst only the first `cols` of one vector.
template <int T, int C, bool kFirst, class D, class G>
INLINE void dx_columns(const RowsDx& a, int64_t column, int cols) {
    typedef WorkOf<D> Work;
    constexpr int lanes = Simd<Work>::lanes;
    Chain<G> chain;
    chain.start(a.genes, 0, column);
    Vector<D> acc[T][C] = {}, w[C];
    Work dy[T][kDxRows];
    for (int64_t row = 0; row < a.o; row += kDxRows) {
        const int n = min64(kDxRows, a.o - row);
        const D* const from = static_cast<const D*>(a.dy) + row;
        for (int t = 0; t < T; ++t) widen_row(dy[t], from + t * a.dy_row_stride, n);
        for (int o = 0; o < n; ++o) {
            if (kFirst) {
                Vector<D> first[1];
                chain.template form_first<D, 1>(row + o, 0, cols, first);
                w[0] = first[0];
            } else {
                chain.template form_at<D, C, false>(row + o, 0, w);
            }
            for (int t = 0; t < T; ++t) {
                const Vector<D> d = splat(dy[t][o]);
                for (int c = 0; c < C; ++c) acc[t][c] = madd(w[c], d, acc[t][c]);
            }
        }
    }
    D* const dx = static_cast<D*>(a.dx) + column;
    for (int t = 0; t < T; ++t) {
        Work out[C * lanes];
        memcpy(out, acc[t], sizeof out);
        narrow_row(dx + t * a.dx_row_stride, out, kFirst ? cols : C * lanes);
    }
}

// T tokens, W in registers; the columns of the genes are contiguous. A thread owns columns, so that a sum over all rows
// is one thread's and never a rounded partial sum.
template <int T, class D, class G>
void dx_few(const RowsDx& a) {
    constexpr int lanes = Simd<WorkOf<D>>::lanes, wide = kDxVectors;
    const int64_t share = (a.i + a.threads - 1) / a.threads;
    const int64_t block = share < wide * lanes ? lanes : wide * lanes;
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t column = 0; column < a.i; column += block) {
        const int64_t end = min64(column + block, a.i);
        int64_t c = column;
        if (end - c == wide * lanes) {
            dx_columns<T, wide, false, D, G>(a, c, 0);
            continue;
        }
        for (; c + lanes <= end; c += lanes) dx_columns<T, 1, false, D, G>(a, c, 0);
        if (c < end) dx_columns<T, 1, true, D, G>(a, c, end - c);
    }
}

template <class D, class G>
void rows_dx(const RowsDx& a) {
    constexpr int lanes = Simd<WorkOf<D>>::lanes;
    if (!a.i) return;
    if (a.m <= kFewTokens && contiguous(a.genes)) {
        if (a.m == 1) dx_few<1, D, G>(a);
        if (a.m == 2) dx_few<2, D, G>(a);
        if (a.m == 3) dx_few < kFewTokens<3 ? 1 : 3, D, G>(a);
        if (a.m == 4) dx_few < kFewTokens<4 ? 1 : 4, D, G>(a);
        return;
    }
    const int64_t share = (a.i + a.threads - 1) / a.threads;
    const int64_t block = share < kDxVectors * lanes ? lanes : kDxVectors * lanes;
    const int64_t tokens = even_block(a.m, kDxTokenBlock, kDxTokens);
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t token = 0; token < a.m; token += tokens)
        for (int64_t column = 0; column < a.i; column += block)
            dx_block<D, G>(a, column, min64(block, a.i - column), token, min64(tokens, a.m - token));
}

}  // namespace
