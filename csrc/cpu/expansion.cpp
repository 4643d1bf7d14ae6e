// SPDX-License-Identifier: Apache-2.0
// CPU kernels of `expansion`, compiled once per level: W itself in synthesis.h, products and gene gradients in
// rows_*.h. A few rows of W at a time live in registers (few tokens) or in L1 and are multiplied there with a block of
// tokens; pairs_*.h does so with more of W in L2 where the processor multiplies pairs of bfloat16. Every output element
// is owned by one thread and summed in an order that does not depend on the thread count. C-like on purpose: no library
// templates, internal linkage, so that no code of one level leaks into another.

#include "column_sums.h"
#include "pairs_dx.h"
#include "pairs_forward.h"
#include "pairs_wgrad.h"
#include "rows_dx.h"
#include "rows_forward.h"
#include "rows_wgrad.h"
#include "synthesis.h"

namespace {

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
