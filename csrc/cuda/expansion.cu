// SPDX-License-Identifier: Apache-2.0
// The regime `rows` of `expansion` on a GPU: y = x W^T + b for few tokens, one pass over the genes.
//
// Why it is not left to Triton: a launch from Triton's Python takes longer than this kernel is meant to run, and its
// tiles of matrix products hold at least 16 tokens, with 32-bit products left to panels. Here a launch is one call into
// C++, a token is a fused multiply-add, and float32 is taken. It is meant to beat Triton's `rows` up to about 8 tokens
// of 16 bits, beyond which multiply-adds cost more than reading genes from L2, and panels up to 16 tokens of float32.
// None of this has been measured yet.
//
// A block owns kRows rows of W. Its threads take turns at pieces of 16 bytes of every gene: all reads of a piece are
// under way before the first is used, W is formed in registers (a chain of fused multiply-adds in k order, rounded
// once) and spent on all tokens. Which thread adds what depends on I and the dtypes alone, not on M, K, strides or
// addresses, so a token has the same bits whatever comes with it.

#include "expansion.cuh"

#include "elements.cuh"
#include "memory.cuh"
#include "sums.cuh"

namespace pylearngene {
namespace gpu {

namespace {

constexpr int kMostThreads = kLanes * kMostWarps;
// Reads of genes that a thread has under way, at most.
constexpr int kReads = 8;
// Blocks of one launch; what is left over they take in turns.
#if !defined(PYLEARNGENE_MOST_BLOCKS)
#define PYLEARNGENE_MOST_BLOCKS 0x7fffffff
#endif

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

template <class T>
__device__ __forceinline__ const T* row_of(const void* data, int64_t row, int64_t stride) {
    return static_cast<const T*>(data) + row * stride;
}

// The first n elements as floats, one by one, and zeros behind them.
template <class T, int kWidth>
__device__ __forceinline__ void read_odd(const T* from, int64_t n, float (&to)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) to[j] = j < n ? Element<T>::widen(__ldg(from + j)) : 0.0f;
}

// Bias of one row, rounded to X.
template <class X, class B>
__device__ float combined_bias(const RowsForward& a, int64_t row) {
    float value[2] = {0.0f, 0.0f};
    for (int k = 0; k < a.genes; ++k) {
        const B* const gene = static_cast<const B*>(a.bias_gene[k]);
        value[0] =
            __fmaf_rn(__ldg(a.coeffs + k), Element<B>::widen(__ldg(gene + row * a.bias_gene_stride[k])), value[0]);
    }
    Element<X>::round(value);
    return value[0];
}

template <class X>
__device__ float bias_of(const RowsForward& a, int64_t row) {
    if (a.bias) return Element<X>::widen(__ldg(static_cast<const X*>(a.bias) + row));
    if (!a.bias_gene[0]) return 0.0f;
    if (a.bias_dtype == kBFloat16) return combined_bias<X, BF16>(a, row);
    if (a.bias_dtype == kFloat16) return combined_bias<X, F16>(a, row);
    return combined_bias<X, float>(a, row);
}

// w[r] = kWidth columns of row r of W, rounded to X.
template <class X, class G, int kGenes, int kRows, int kWidth>
__device__ __forceinline__ void form(const RowsForward& a, const int64_t (&rows)[kRows], int64_t column,
                                     const float (&coeffs)[kGenes], uint64_t policy, float (&w)[kRows][kWidth]) {
    uint32_t words[kRows][kGenes][kGeneWords];
#pragma unroll
    for (int k = 0; k < kGenes; ++k) {
        if (k >= a.genes) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            load_gene(row_of<G>(a.gene[k], rows[r], a.gene_stride[k]) + column, policy, words[r][k]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) w[r][j] = 0.0f;
#pragma unroll
        for (int k = 0; k < kGenes; ++k) {
            if (k >= a.genes) break;
            float gene[kWidth];
            unpack<G>(words[r][k], gene);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) w[r][j] = __fmaf_rn(coeffs[k], gene[j], w[r][j]);
        }
        round_to<X>(w[r]);
    }
}

// The same without whole reads; zeros beyond the last column.
template <class X, class G, int kRows, int kWidth>
__device__ __forceinline__ void form_odd(const RowsForward& a, const int64_t (&rows)[kRows], int64_t column,
                                         float (&w)[kRows][kWidth]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) w[r][j] = 0.0f;
#pragma unroll 1
        for (int k = 0; k < a.genes; ++k) {
            const float coeff = __ldg(a.coeffs + k);
            float gene[kWidth];
            read_odd(row_of<G>(a.gene[k], rows[r], a.gene_stride[k]) + column, a.i - column, gene);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) w[r][j] = __fmaf_rn(coeff, gene[j], w[r][j]);
        }
        round_to<X>(w[r]);
        // A coefficient that is not finite makes something of the zeros that were read.
#pragma unroll
        for (int j = 0; j < kWidth; ++j) w[r][j] = column + j < a.i ? w[r][j] : 0.0f;
    }
}

// sums[t * kRows + r] += x[t] w[r] over kWidth columns. Tokens that are not there repeat the last one.
template <class X, bool kAligned, int kCount, int kRows, int kWidth>
__device__ __forceinline__ void multiply(const RowsForward& a, int64_t column, const float (&w)[kRows][kWidth],
                                         float (&sums)[kCount]) {
    constexpr int kTokens = kCount / kRows, kTogether = kTokens < 2 ? kTokens : 2;
#pragma unroll
    for (int first = 0; first < kTokens; first += kTogether) {
        if (first >= a.m) break;
        const int64_t stride = opaque(a.x_stride);
#pragma unroll
        for (int t = first; t < first + kTogether; ++t) {
            const X* const from = row_of<X>(a.x, t < a.m ? t : a.m - 1, stride) + column;
            float x[kWidth];
            if constexpr (kAligned) {
                uint32_t words[kWidth / Element<X>::per_word];
                load_words(from, words);
                unpack<X>(words, x);
            } else {
                read_odd(from, a.i - column, x);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int j = 0; j < kWidth; ++j) sums[t * kRows + r] = __fmaf_rn(w[r][j], x[j], sums[t * kRows + r]);
        }
    }
}

template <class X, class G, int kTokens, int kGenes, int kRows, bool kAligned>
__global__ void __launch_bounds__(kMostThreads, 2) rows_kernel(const __grid_constant__ RowsForward a) {
    constexpr int kCount = kTokens * kRows, kWidth = kGeneWords * Element<G>::per_word;
    __shared__ float partial[kMostWarps][kCount];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
    const uint64_t policy = keep_in_l2();
    float coeffs[kGenes];
#pragma unroll
    for (int k = 0; k < kGenes; ++k) coeffs[k] = k < a.genes ? __ldg(a.coeffs + k) : 0.0f;
    for (int64_t first = int64_t{blockIdx.x} * kRows; first < a.o; first += int64_t{gridDim.x} * kRows) {
        int64_t rows[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) rows[r] = first + r < a.o ? first + r : a.o - 1;
        float sums[kCount] = {};
        for (int64_t column = threadIdx.x * kWidth; column < a.i; column += blockDim.x * kWidth) {
            float w[kRows][kWidth];
            if constexpr (kAligned)
                form<X, G>(a, rows, column, coeffs, policy, w);
            else
                form_odd<X, G>(a, rows, column, w);
            multiply<X, kAligned>(a, column, w, sums);
        }
        sum_lanes(sums, lane, partial[warp]);
        __syncthreads();
        const int token = threadIdx.x / kRows;
        const int64_t row = first + threadIdx.x % kRows;
        if (token < kTokens && token < a.m && row < a.o) {
            float total = partial[0][threadIdx.x];
            for (int other = 1; other < warps; ++other) total += partial[other][threadIdx.x];
            static_cast<X*>(a.y)[token * a.y_stride + row] = Element<X>::narrow(total + bias_of<X>(a, row));
        }
        __syncthreads();
    }
}

template <class X, class G, int kTokens, int kGenes, bool kAligned>
cudaError_t launch(const RowsForward& a, cudaStream_t stream) {
    // As many rows as registers allow without spilling, with two blocks on a multiprocessor.
    constexpr int kRows = least(kTokens < 8 ? 4 : 2, kReads / kGenes);
    // Threads for one piece each or, where a block cannot have so many, for as many pieces each.
    const int64_t turns = pieces(a.i, kGeneWords * Element<G>::per_word);
    const int64_t threads = pieces(turns, pieces(turns, kMostThreads) ? pieces(turns, kMostThreads) : 1);
    const int64_t blocks = pieces(a.o, kRows);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks < PYLEARNGENE_MOST_BLOCKS ? static_cast<unsigned>(blocks) : PYLEARNGENE_MOST_BLOCKS);
    config.blockDim = dim3(threads ? static_cast<unsigned>(pieces(threads, kLanes)) * kLanes : kLanes);
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, rows_kernel<X, G, kTokens, kGenes, kRows, kAligned>, a);
    // Our copy of the runtime keeps an error until it is asked for it.
    const cudaError_t last = cudaGetLastError();
    return error ? error : last;
}

template <class X, class G, int kTokens>
cudaError_t launch_genes(const RowsForward& a, cudaStream_t stream) {
    if (a.genes <= 2) return launch<X, G, kTokens, 2, true>(a, stream);
    if (a.genes <= 4) return launch<X, G, kTokens, 4, true>(a, stream);
    return launch<X, G, kTokens, 8, true>(a, stream);
}

// Whether whole pieces can be read everywhere.
template <class X, class G>
bool aligned(const RowsForward& a) {
    constexpr int64_t kWidth = kGeneWords * Element<G>::per_word, kBytes = kWidth * sizeof(X) < 16 ? 8 : 16;
    uint64_t odd = a.i % kWidth;
    for (int k = 0; k < a.genes; ++k)
        odd |= (reinterpret_cast<uintptr_t>(a.gene[k]) | a.gene_stride[k] * sizeof(G)) % 16;
    return !(odd | (reinterpret_cast<uintptr_t>(a.x) | a.x_stride * sizeof(X)) % kBytes);
}

template <class X, class G>
cudaError_t launch_tokens(const RowsForward& a, cudaStream_t stream) {
    if (!aligned<X, G>(a)) return launch<X, G, kMostTokens, kMostGenes, false>(a, stream);
    if (a.m <= 1) return launch_genes<X, G, 1>(a, stream);
    if (a.m <= 4) return launch_genes<X, G, 4>(a, stream);
    if (a.m <= 8) return launch_genes<X, G, 8>(a, stream);
    return launch_genes<X, G, 16>(a, stream);
}

}  // namespace

}  // namespace gpu
}  // namespace pylearngene

#define PYLEARNGENE_NAME_(x) pylearngene_rows_forward_##x
#define PYLEARNGENE_NAME(x) PYLEARNGENE_NAME_(x)

extern "C" cudaError_t PYLEARNGENE_NAME(PYLEARNGENE_X)(const pylearngene::gpu::RowsForward& a, cudaStream_t stream) {
    using namespace pylearngene;
    using X = gpu::PYLEARNGENE_X;
    if (a.gene_dtype == kFloat32) return gpu::launch_tokens<X, float>(a, stream);
    if constexpr (sizeof(X) == sizeof(float)) {
        if (a.gene_dtype == kBFloat16) return gpu::launch_tokens<X, gpu::BF16>(a, stream);
        return gpu::launch_tokens<X, gpu::F16>(a, stream);
    } else {
        return gpu::launch_tokens<X, X>(a, stream);
    }
}
