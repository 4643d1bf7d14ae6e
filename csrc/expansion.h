// SPDX-License-Identifier: Apache-2.0
// The kernels of the primitive `expansion`, W[o, i] = sum_k c[k] * G[k][o, i], as one table of functions per level.
// Plain data and function pointers only: this header is compiled with several instruction sets, so nothing in it may
// become code. All memory belongs to the caller; strides count elements.
#pragma once

#include <stdint.h>

namespace pylearngene {

enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kDTypes };

constexpr int kMaxGenes = 64;
constexpr int kMaxLayers = 64;

struct Matrix {
    const void* data;
    int64_t row_stride;
    int64_t column_stride;
};

// K matrices of one shape and dtype, and K coefficients in the work dtype (double for double genes, else float).
struct Genes {
    Matrix matrix[kMaxGenes];
    const void* coeffs;  // [K]
    int count;           // K
    int dtype;
};

// Where the gradients of genes and coefficients go; a null pointer means "not wanted".
struct GeneGrads {
    void* buffer[kMaxGenes];           // K of [rows, cols], work dtype, added to
    int64_t buffer_stride[kMaxGenes];  // rows of a buffer
    bool fresh[kMaxGenes];             // what a buffer holds counts as zeros, and is not read
    double* dots;                      // [rows, K], overwritten
};

// dst = W
struct Synthesize {
    Genes genes;  // [rows, cols]
    void* dst;    // [rows, cols]
    int dst_dtype;
    int64_t rows, cols, dst_row_stride;
    int threads;
};

// dst[l] = W of coefficients l for every l, or with `add` dst[l] += W, in the dtype the sum is formed in; each gene
// element is read once.
struct SynthesizeStack {
    Genes genes;                     // [rows, cols]; coeffs [L, K]
    void* dst[kMaxLayers];           // L of [rows, cols]
    int64_t dst_stride[kMaxLayers];  // rows of a dst
    int layers;                      // L
    bool add;
    int dst_dtype;
    int64_t rows, cols;
    int threads;
};

// y = x W^T + b, with W rounded to the dtype of x
struct RowsForward {
    Genes genes;       // [O, I]
    const void* x;     // [M, I]
    const void* bias;  // [O] or null
    Genes bias_genes;  // [O, 1]; count 0 where there are none
    void* y;           // [M, O], dtype of x
    int x_dtype, bias_dtype;
    int64_t m, i, o, x_row_stride, y_row_stride;
    int threads;
};

// dx = dy W, with W rounded to the dtype of dy
struct RowsDx {
    Genes genes;     // [O, I]
    const void* dy;  // [M, O]
    void* dx;        // [M, I], dtype of dy
    int dy_dtype;
    int64_t m, i, o, dy_row_stride, dx_row_stride;
    int threads;
};

// buffer[k] += c[k] dW and dots[r, k] = sum_c dW[r, c] G[k][r, c]
struct Accumulate {
    Genes genes;     // [rows, cols]
    const void* dw;  // [rows, cols]
    GeneGrads grads;
    int dw_dtype;
    int64_t rows, cols, dw_row_stride;
    int threads;
};

// As Accumulate, with dW = dy^T x formed on the way and never stored
struct RowsWgrad {
    Genes genes;     // [O, I]
    const void* dy;  // [M, O]
    const void* x;   // [M, I], dtype of dy
    GeneGrads grads;
    int x_dtype;
    int64_t m, i, o, dy_row_stride, x_row_stride;
    int threads;
};

// sums[o] = sum_m dy[m, o]
struct ColumnSums {
    const void* dy;  // [M, O]
    void* sums;      // [O], work dtype
    int dy_dtype;
    int64_t m, o, dy_row_stride;
    int threads;
};

struct ExpansionKernels {
    void (*synthesize)(const Synthesize&);
    void (*synthesize_stack)(const SynthesizeStack&);
    void (*rows_forward)(const RowsForward&);
    void (*rows_dx)(const RowsDx&);
    void (*accumulate)(const Accumulate&);
    void (*rows_wgrad)(const RowsWgrad&);
    void (*column_sums)(const ColumnSums&);
};

}  // namespace pylearngene

extern "C" {
extern const pylearngene::ExpansionKernels pylearngene_expansion_DEFAULT;
extern const pylearngene::ExpansionKernels pylearngene_expansion_AVX2;
extern const pylearngene::ExpansionKernels pylearngene_expansion_AVX512;
extern const pylearngene::ExpansionKernels pylearngene_expansion_AVX512_BF16;
}
