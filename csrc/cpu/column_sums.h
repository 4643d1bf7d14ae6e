// SPDX-License-Identifier: Apache-2.0
// Sums of dy over tokens, from which genes of biases get their gradients. A column is one thread's, and summed in the
// order of tokens, some of them at a time.
#pragma once

#include "strips.h"

namespace {

constexpr int kSumVectors = 8;   // of columns that are summed together
constexpr int kSumTokens = 256;  // that are summed to one term of the whole sum

// to[c] = sum_t dy[t, c] for C vectors of columns, or their first n columns where C is 1.
template <int C, class X>
INLINE void sum_some(const X* dy, int64_t stride, int64_t tokens, int n, WorkOf<X>* to) {
    constexpr int lanes = Simd<WorkOf<X>>::lanes;
    Vector<X> all[C] = {};
    for (int64_t token = 0; token < tokens; token += kSumTokens) {
        Vector<X> some[C] = {};
        for (int64_t t = token, end = min64(token + kSumTokens, tokens); t < end; ++t)
            for (int c = 0; c < C; ++c) {
                const X* const at = dy + t * stride + c * lanes;
                some[c] += C == 1 && n < lanes ? load_first(at, n) : Element<X>::load(at);
            }
        for (int c = 0; c < C; ++c) all[c] += some[c];
    }
    for (int c = 0; c < C; ++c) {
        if (C == 1 && n < lanes)
            store_first(to, all[c], n);
        else
            Element<WorkOf<X>>::store(to + c * lanes, all[c]);
    }
}

template <class X>
void column_sums(const ColumnSums& a) {
    typedef WorkOf<X> Work;
    constexpr int lanes = Simd<Work>::lanes;
    const X* const dy = static_cast<const X*>(a.dy);
    Work* const to = static_cast<Work*>(a.sums);
    const int64_t step = a.o ? even_block(a.o, kSumVectors * lanes, lanes) : 1;
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t column = 0; column < a.o; column += step) {
        const int64_t end = min64(column + step, a.o);
        int64_t i = column;
        for (; i + kSumVectors * lanes <= end; i += kSumVectors * lanes)
            sum_some<kSumVectors>(dy + i, a.dy_row_stride, a.m, 0, to + i);
        for (; i + 2 * lanes <= end; i += 2 * lanes) sum_some<2>(dy + i, a.dy_row_stride, a.m, 0, to + i);
        for (; i < end; i += lanes)
            sum_some<1>(dy + i, a.dy_row_stride, a.m, static_cast<int>(min64(lanes, end - i)), to + i);
    }
}

}  // namespace
