// SPDX-License-Identifier: Apache-2.0
// CPU kernels of `expansion_norm`, compiled once per level; the passes are in expansion_norm_forward.h and
// expansion_norm_backward.h. C-like on purpose, with internal linkage, as expansion.cpp.

#include "../expansion_norm.h"

#include "expansion_norm_backward.h"
#include "expansion_norm_forward.h"

namespace {

// Calls f(X(), G()) for the dtype codes of x and genes; the pairs were checked before.
template <class F>
void dispatch_norm(int x, int g, F f) {
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

void run_forward(const NormForward& a) {
    dispatch_norm(a.x_dtype, a.gains.dtype, [&](auto x, auto g) { norm_forward<decltype(x), decltype(g)>(a); });
}

void run_backward(const NormBackward& a) {
    dispatch_norm(a.x_dtype, a.gains.dtype, [&](auto x, auto g) { norm_backward<decltype(x), decltype(g)>(a); });
}

}  // namespace

#define JOIN_EXPANDED(a, b) a##b
#define JOIN(a, b) JOIN_EXPANDED(a, b)
const pylearngene::ExpansionNormKernels JOIN(pylearngene_expansion_norm_, PYLEARNGENE_LEVEL) = {
    run_forward,
    run_backward,
};
