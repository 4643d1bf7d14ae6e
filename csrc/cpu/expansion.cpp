// SPDX-License-Identifier: Apache-2.0
// CPU kernels of `expansion`, compiled once per level: synthesis here, products and gene gradients in rows_*.h. A few
// rows of W at a time live in registers (few tokens) or in L1 and are multiplied there with a block of tokens;
// pairs_*.h does so with more of W in L2 where the processor multiplies pairs of bfloat16. Every output element is
// owned by one thread and summed in an order that does not depend on the thread count. C-like on purpose: no library
// templates, internal linkage, so that no code of one level leaks into another.

#include "column_sums.h"
#include "pairs_dx.h"
#include "pairs_forward.h"
#include "pairs_wgrad.h"
#include "rows_dx.h"
#include "rows_forward.h"
#include "rows_wgrad.h"
#include "strips.h"

namespace {

constexpr int64_t kChunk = 4096;      // columns of one piece of work in synthesize
constexpr int kPieceBytes = 1 << 14;  // genes of one piece of work in synthesize_stack

// Columns [column, end) of one row: to = W, or to += W term by term.
template <bool kAdd, class D, class G>
INLINE void store_chain(const Chain<G>& chain, D* to, int64_t column, int64_t end) {
    typedef WorkOf<G> Work;
    constexpr int lanes = Simd<Work>::lanes, block = 4;
    Vector<G> many[block], one[1];
    int64_t i = column;
    for (; i + block * lanes <= end; i += block * lanes) {
        for (int j = 0; kAdd && j < block; ++j) many[j] = Element<D>::load(to + i + j * lanes);
        chain.template form_at<Work, block, false, kAdd>(0, i, many);
        for (int j = 0; j < block; ++j) Element<D>::store(to + i + j * lanes, many[j]);
    }
    for (; i + lanes <= end; i += lanes) {
        if (kAdd) one[0] = Element<D>::load(to + i);
        chain.template form_at<Work, 1, false, kAdd>(0, i, one);
        Element<D>::store(to + i, one[0]);
    }
    if (i < end) {
        if (kAdd) one[0] = load_first(to + i, end - i);
        chain.template form_first<Work, 1, kAdd>(0, i, end - i, one);
        store_first(to + i, one[0], end - i);
    }
}

template <class D, class G>
void synthesize(const Synthesize& a) {
    typedef WorkOf<G> Work;
    constexpr int width = kStripBytes / sizeof(Work);
    D* const dst = static_cast<D*>(a.dst);
    if (!contiguous(a.genes)) {
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
        for (int64_t row = 0; row < a.rows; row += kRows) {
            for (int64_t column = 0; column < a.cols; column += width) {
                const int rows = min64(kRows, a.rows - row), n = min64(width, a.cols - column);
                alignas(64) Work strip[kRows][width];
                form_block<SingleTerms<D>, G>(a.genes, row, rows, column, n, strip[0], width);
                for (int r = 0; r < rows; ++r) narrow_row(dst + (row + r) * a.dst_row_stride + column, strip[r], n);
            }
        }
        return;
    }
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) {
        for (int64_t column = 0; column < a.cols; column += kChunk) {
            Chain<G> chain;
            chain.start(a.genes, row, 0);
            store_chain<false>(chain, dst + row * a.dst_row_stride, column, min64(column + kChunk, a.cols));
        }
    }
}

// Pieces are so narrow that those of all genes stay in L1 while every layer reads them.
template <bool kAdd, class D, class G>
void synthesize_pieces(const SynthesizeStack& a) {
    typedef WorkOf<G> Work;
    const int64_t room = kPieceBytes / sizeof(G) / a.genes.count, step = 4 * Simd<Work>::lanes;
    const int64_t piece = room < step ? step : room / step * step;
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) {
        for (int64_t column = 0; column < a.cols; column += piece) {
            Chain<G> chain;
            chain.start(a.genes, row, 0);
            for (int l = 0; l < a.layers; ++l) {
                D* const to = static_cast<D*>(a.dst[l]) + row * a.dst_stride[l];
                store_chain<kAdd>(chain, to, column, min64(column + piece, a.cols));
                chain.coeffs += a.genes.count;
            }
        }
    }
}

template <class D, class G>
void synthesize_stack(const SynthesizeStack& a) {
    if (a.add)
        synthesize_pieces<true, D, G>(a);
    else
        synthesize_pieces<false, D, G>(a);
}

template <class X, class G>
void forward(const RowsForward& a) {
    if (!forward_in_pairs<G>(a, X())) rows_forward<X, G>(a);
}

template <class D, class G>
void dx(const RowsDx& a) {
    if (!dx_in_pairs<G>(a, D())) rows_dx<D, G>(a);
}

template <class X, class G>
void wgrad(const RowsWgrad& a) {
    if (!wgrad_in_pairs<G>(a, X())) rows_wgrad<X, G>(a);
}

// Calls f(X(), G()) for the dtype codes of x and genes; the pairs were checked before.
template <class F>
void dispatch(int x, int g, F f) {
    auto gene = [&](auto tag) {
        if (g == kFloat32) f(tag, float());
        if (g == kBFloat16) f(tag, BF16());
        if (g == kFloat16) f(tag, F16());
    };
    if (x == kFloat64) f(double(), double());
    if (x == kFloat32) gene(float());
    if (x == kBFloat16) gene(BF16());
    if (x == kFloat16) gene(F16());
}

#define DISPATCHED(kernel, Args, x_dtype)                                                                 \
    void run_##kernel(const Args& a) {                                                                    \
        dispatch(a.x_dtype, a.genes.dtype, [&](auto x, auto g) { kernel<decltype(x), decltype(g)>(a); }); \
    }
DISPATCHED(synthesize, Synthesize, dst_dtype)
DISPATCHED(synthesize_stack, SynthesizeStack, dst_dtype)
DISPATCHED(forward, RowsForward, x_dtype)
DISPATCHED(dx, RowsDx, dy_dtype)
DISPATCHED(accumulate, Accumulate, dw_dtype)
DISPATCHED(wgrad, RowsWgrad, x_dtype)

void run_column_sums(const ColumnSums& a) {
    dispatch(a.dy_dtype, a.dy_dtype, [&](auto x, auto) { column_sums<decltype(x)>(a); });
}

}  // namespace

#define JOIN_EXPANDED(a, b) a##b
#define JOIN(a, b) JOIN_EXPANDED(a, b)
const pylearngene::ExpansionKernels JOIN(pylearngene_expansion_, PYLEARNGENE_LEVEL) = {
    run_synthesize, run_synthesize_stack, run_forward, run_dx, run_accumulate, run_wgrad, run_column_sums,
};
