// SPDX-License-Identifier: Apache-2.0
// The kernels of the primitive `expansion` on a GPU, W[o, i] = sum_k c[k] * G[k][o, i], as the bindings see them.
// Plain data and functions. All memory belongs to the caller and lies on the GPU; strides count elements.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../expansion.h"

namespace pylearngene {
namespace gpu {

constexpr int kMostGenes = 8;
constexpr int kMostTokens = 16;

// y = x W^T + b, with W and b rounded to the dtype of x
struct RowsForward {
    const void* gene[kMostGenes];  // K of [O, I] with contiguous rows
    int64_t gene_stride[kMostGenes];
    const float* coeffs;  // [K]
    int genes;            // K
    int gene_dtype;
    const void* x;  // [M, I] with contiguous rows
    void* y;        // [M, O] with contiguous rows, dtype of x
    int64_t x_stride, y_stride;
    int x_dtype;
    const void* bias;                   // [O], dtype of x, contiguous, or null
    const void* bias_gene[kMostGenes];  // K of [O], or null
    int64_t bias_gene_stride[kMostGenes];
    int bias_dtype;  // of the bias genes
    int64_t o, i;
    int m;
};

// Whether there are kernels for x of one dtype and genes of another: 16 bits go with their own and with float32.
inline bool rows_forward_takes(int x_dtype, int gene_dtype) {
    if (x_dtype == kFloat64 || gene_dtype == kFloat64) return false;
    return x_dtype == gene_dtype || x_dtype == kFloat32 || gene_dtype == kFloat32;
}

}  // namespace gpu
}  // namespace pylearngene

// They start the kernel for x of their dtype in a stream of the current device; nothing is waited for or allocated.
extern "C" {
cudaError_t pylearngene_rows_forward_FLOAT32(const pylearngene::gpu::RowsForward& a, cudaStream_t stream);
cudaError_t pylearngene_rows_forward_BFLOAT16(const pylearngene::gpu::RowsForward& a, cudaStream_t stream);
cudaError_t pylearngene_rows_forward_FLOAT16(const pylearngene::gpu::RowsForward& a, cudaStream_t stream);
}
