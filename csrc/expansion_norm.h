// SPDX-License-Identifier: Apache-2.0
// The kernels of the primitive `expansion_norm`, y = (x - mean) / sqrt(var + eps) * g + b with g = sum_k c[k] * G[k]
// and b = sum_k c[k] * B[k], or y = x / sqrt(mean(x^2) + eps) * g, as one table of functions per level. Plain data and
// function pointers only, as in expansion.h. All memory belongs to the caller; strides count elements.
#pragma once

#include "expansion.h"

namespace pylearngene {

// What is computed: a layer norm; an RMS norm, whose means are 0; one that rounds to x's dtype before the gain
// multiplies, too.
enum NormKind { kLayerNorm, kRmsNorm, kRmsNormGainLast, kNormKinds };

struct NormForward {
    Genes gains;    // [1, N]
    Genes biases;   // [1, N]; count 0 where there are none
    const void* x;  // [M, N]
    void* y;        // [M, N], contiguous, dtype of x
    void* moments;  // [2, M] in the work dtype: means, then 1 / deviations; or null
    int x_dtype, kind;
    int64_t m, n, x_row_stride;
    double eps;
    int threads;
};

struct NormBackward {
    Genes gains;          // [1, N]
    Genes biases;         // [1, N]; count 0 where there are none
    const void* x;        // [M, N]
    const void* dy;       // [M, N], dtype of x
    const void* moments;  // [2, M], of the forward pass
    void* dx;             // [M, N], contiguous, dtype of x; or null
    GeneGrads gain_grads, bias_grads;
    double* dots;   // [K], overwritten; or null
    void* partial;  // [parts, 2, N] in the work dtype, or null where neither genes nor coefficients need a gradient
    int64_t parts;  // pieces of the tokens that are summed apart, whatever the number of threads
    int x_dtype, kind;
    int64_t m, n, x_row_stride, dy_row_stride;
    int threads;
};

struct ExpansionNormKernels {
    void (*forward)(const NormForward&);
    void (*backward)(const NormBackward&);
};

}  // namespace pylearngene

extern "C" {
extern const pylearngene::ExpansionNormKernels pylearngene_expansion_norm_DEFAULT;
extern const pylearngene::ExpansionNormKernels pylearngene_expansion_norm_AVX2;
extern const pylearngene::ExpansionNormKernels pylearngene_expansion_norm_AVX512;
extern const pylearngene::ExpansionNormKernels pylearngene_expansion_norm_AVX512_BF16;
}
