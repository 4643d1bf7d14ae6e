// SPDX-License-Identifier: Apache-2.0
// CPU kernels of convolutions by an expanded weight, compiled once per level; the products are in
// expansion_conv_product.h and expansion_conv_gradients.h. C-like on purpose, with internal linkage, as expansion.cpp.

#include "../expansion_conv.h"

#include "expansion_conv_gradients.h"
#include "expansion_conv_product.h"

namespace {

// Calls f(X()) for the dtype code of images.
template <class F>
void dispatch_conv(int x, F f) {
    if (x == kFloat64) f(double());
    if (x == kFloat32) f(float());
    if (x == kBFloat16) f(BF16());
    if (x == kFloat16) f(F16());
}

void run_product(const ConvProduct& a) {
    dispatch_conv(a.dtype, [&](auto x) { conv_product<decltype(x)>(a); });
}

void run_gradients(const ConvGradients& a) {
    dispatch_conv(a.dtype, [&](auto x) { conv_gradients<decltype(x)>(a); });
}

void run_pixels(const ConvPixels& a) {
    if (a.itemsize == 2) make_pixels<BF16>(a);
    if (a.itemsize == 4) make_pixels<float>(a);
    if (a.itemsize == 8) make_pixels<double>(a);
}

}  // namespace

#define JOIN_EXPANDED(a, b) a##b
#define JOIN(a, b) JOIN_EXPANDED(a, b)
const pylearngene::ExpansionConvKernels JOIN(pylearngene_expansion_conv_, PYLEARNGENE_LEVEL) = {
    run_product,
    run_gradients,
    run_pixels,
};
