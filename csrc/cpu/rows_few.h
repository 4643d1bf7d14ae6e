// SPDX-License-Identifier: Apache-2.0
// y = x W^T + b of `expansion` for few tokens and genes: a few rows of W are formed in registers and multiplied there,
// so that a call takes no longer than to read the genes once. How sums end, for rows_forward.h too; the rest is there.
#pragma once

#include "strips.h"

namespace {

// The bias of `rows` <= kRows rows in the work dtype, untouched where there is none; whole vectors are written.
template <class Work, class B>
void bias_part(const RowsForward& a, int64_t row, int rows, Work* bias) {
    if (a.bias) {
        widen_row(bias, static_cast<const B*>(a.bias) + row, rows);
    } else if (a.bias_genes.count) {
        constexpr int lanes = Simd<Work>::lanes;
        Work column[kRows][lanes];
        form_block<SingleTerms<Work>, B>(a.bias_genes, row, rows, 0, 1, column[0], lanes);
        for (int r = 0; r < rows; ++r) bias[r] = column[r][0];
    }
}
void bias_part(const RowsForward& a, int64_t row, int rows, double* bias) {
    bias_part<double, double>(a, row, rows, bias);
}
void bias_part(const RowsForward& a, int64_t row, int rows, float* bias) {
    if (a.bias_dtype == kFloat32) bias_part<float, float>(a, row, rows, bias);
    if (a.bias_dtype == kBFloat16) bias_part<float, BF16>(a, row, rows, bias);
    if (a.bias_dtype == kFloat16) bias_part<float, F16>(a, row, rows, bias);
}

// The bias of rows [row, row + rows), kMost at most, of an array that is clear. Memory checkers alone would see a write
// beyond it: an array without room for the last vector does not compile.
template <int kMost, class Work, int N>
INLINE void form_bias(const RowsForward& a, int64_t row, int rows, Work (&bias)[N]) {
    constexpr int lanes = Simd<Work>::lanes, last = (kMost - 1) / kRows * kRows;
    static_assert(last + (kMost - last + lanes - 1) / lanes * lanes <= N, "the last vector has no room");
    for (int r = 0; r < rows; r += kRows) bias_part(a, row + r, min64(kRows, rows - r), bias + r);
}

// y[r] = acc[r] summed over its lanes, plus the bias, for `rows` of the N rows.
template <int N, class X>
INLINE void finish(const Vector<X>* acc, int rows, const WorkOf<X>* bias, X* y) {
    typedef Element<WorkOf<X>> Sum;
    constexpr int lanes = Simd<WorkOf<X>>::lanes, room = N < lanes ? lanes : N;
    WorkOf<X> sums[room] = {};
    X whole[room];
    sum_each<N>(acc, sums);
    for (int r = 0; r < N; r += lanes) Element<X>::store(whole + r, Sum::load(sums + r) + Sum::load(bias + r));
    if (rows == N)
        memcpy(y, whole, N * sizeof(X));
    else
        memcpy(y, whole, rows * sizeof(X));
}

// Asks for genes where a factor of row r + rows will be formed from column i on: few genes, lines of 16 bits.
template <class X, class G, int kCount>
INLINE void ask_below(const Chain<G, kCount>& chain, int64_t r, int64_t i, int rows) {
    if (Terms<X>::step * sizeof(G) < 64) return;
    for (int k = 0; k < kCount; ++k) ask_ahead(chain.at(k, r, i), rows * chain.step(k));
}

// acc[t][r] = sum_i x[t, i] * w[r, i] for T tokens and the N rows of W from `row` on, which are formed in registers by
// the chain.
template <int T, int N, class X, int kCount, class G>
INLINE void dot_chain(const RowsForward& a, int64_t row, const Chain<G, kCount>& chain, Vector<X> (&acc)[T][N]) {
    typedef Terms<X> Tm;
    const X* const x = static_cast<const X*>(a.x);
    int64_t i = 0;
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < N; ++r) acc[t][r] = Vector<X>{};
    for (; i + Tm::step <= a.i; i += Tm::step) {
        typename Tm::Factor w[N];
        for (int r = 0; r < N; ++r) ask_below<X>(chain, r, i, N);
        Tm::form(chain, 0, i, w);
        for (int t = 0; t < T; ++t) {
            const typename Tm::Factor v = Tm::load(x + t * a.x_row_stride + i);
            for (int r = 0; r < N; ++r) acc[t][r] = Tm::multiply(w[r], v, acc[t][r]);
        }
    }
    if (i < a.i) {
        typename Tm::Factor w[N];
        form_end<X, G>(a.genes, row, i, a.i - i, w);
        for (int t = 0; t < T; ++t) {
            const typename Tm::Factor v = Tm::load_first(x + t * a.x_row_stride + i, a.i - i);
            for (int r = 0; r < N; ++r) acc[t][r] = Tm::multiply(w[r], v, acc[t][r]);
        }
    }
}

template <int T, int N, int kCount, class X, class G>
INLINE void forward_rows(const RowsForward& a, int64_t row) {
    constexpr int lanes = Simd<WorkOf<X>>::lanes;
    Chain<G, kCount> chain;
    Vector<X> acc[T][N];
    WorkOf<X> bias[kFewRows < lanes ? lanes : kFewRows] = {};
    chain.start(a.genes, row, 0);
    form_bias<kFewRows>(a, row, N, bias);
    dot_chain<T, N, X>(a, row, chain, acc);
    for (int t = 0; t < T; ++t) {
        Vector<X> four[kFewRows] = {};  // the sums of a lone row end as those of four do
        for (int r = 0; r < N; ++r) four[r] = acc[t][r];
        finish<kFewRows, X>(four, N, bias, static_cast<X*>(a.y) + t * a.y_row_stride + row);
    }
}

// T tokens, and kCount genes as in Chain.
template <int T, int kCount, class X, class G>
void forward_few(const RowsForward& a) {
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.o; row += kFewRows) {
        if (row + kFewRows <= a.o) {
            forward_rows<T, kFewRows, kCount, X, G>(a, row);
        } else {
            for (int64_t r = row; r < a.o; ++r) forward_rows<T, 1, 0, X, G>(a, r);
        }
    }
}

template <int T, int kCount, class X, class G>
void forward_some(const RowsForward& a) {
    if (a.m == T) return forward_few<T, kCount, X, G>(a);
    if constexpr (T > 1) forward_some<T - 1, kCount, X, G>(a);
}

// Whether few tokens are multiplied with W in registers. For more genes that are read four rows at once, caches foresee
// none of them.
template <class X, class G>
bool in_registers(const Genes& genes) {
    return genes.count <= 2 || (kCompiled<X, G> && few_genes(genes));
}

// At most kInRegisters tokens, and genes with contiguous columns.
template <class X, class G>
void forward_few(const RowsForward& a) {
    constexpr int most = kInRegisters<X, G>;
    if constexpr (kCompiled<X, G>) {
        const int count = few_genes(a.genes);
        if (count == 1) return forward_some<most, 1, X, G>(a);
        if (count == 2) return forward_some<most, 2, X, G>(a);
        if (count == 4) return forward_some<most, 4, X, G>(a);
    }
    forward_some<most, 0, X, G>(a);
}

}  // namespace
