// SPDX-License-Identifier: Apache-2.0
// The kernels of convolutions by an expanded weight, W[o, c, tap] = sum_k c[k] * G[k][o, c, tap], as one table of
// functions per level. A tap is a position of the kernel, row by row. Plain data and function pointers only, as in
// expansion.h. All memory belongs to the caller; strides count elements.
#pragma once

#include "expansion.h"

namespace pylearngene {

constexpr int kConvTaps = 64;     // of a kernel, at most
constexpr int kConvColumns = 32;  // channels that are multiplied together, on any level a multiple of those that are
constexpr int kConvPanel = 256;   // columns of W that are formed at a time, at most
constexpr int kConvRows = 128;    // rows of dW that are summed together, at most
constexpr int kConvTokens = 512;  // words of tokens that are packed at a time for dW
constexpr int kConvLines = 12;    // tokens whose patches are made together, at most

// Where each token [B, positions] finds its taps: token (p, q) reads pixel (p * stride + tap * dilation - before).
struct ConvImage {
    const void* pixels;  // [B, height, width, channels], contiguous
    int64_t images, height, width, channels;
    int64_t tap_rows, tap_columns;
    int64_t row_stride, column_stride, row_dilation, column_dilation;
    int64_t above, before;  // padding along height and width; may be negative
    int64_t rows, columns;  // positions
};

// y = conv(x, W) + b, or where `transposed` dx = conv(dy, W with channels and taps turned round), W rounded to the
// dtype of the pixels.
struct ConvProduct {
    Genes genes;  // [O, C * taps], contiguous columns
    ConvImage in;
    const void* bias;  // [N], dtype of the pixels, or null
    void* y;           // [B, positions, N] where `last`, else [B, N, positions]; dtype of the pixels
    int64_t n;
    bool transposed, last;
    int dtype;
    int64_t panel, parts;   // columns of W that are formed at a time, and pieces of the tokens that are done apart
    int64_t chunk, tokens;  // channels that are summed at a time, and tokens whose sums wait meanwhile
    void* workspace;        // [threads, room] bytes, aligned to 64
    int64_t room;
    int threads;
};

// buffer[k] += c[k] dW and dots[j, o, k] = the sum of dW * G[k] over row o and the j-th kConvColumns channels
struct ConvGradients {
    Genes genes;  // [O, C * taps], contiguous columns
    ConvImage in;
    const void* dy;   // [B, O, positions], contiguous, dtype of the pixels
    GeneGrads grads;  // dots: [C / kConvColumns rounded up, O, K]
    int64_t o;
    int dtype;
    int64_t rows;     // of dW that are summed together
    void* workspace;  // as above
    int64_t room;
    int threads;
};

// to[b, p, c] = from[b, c, p], elements of `itemsize` bytes
struct ConvPixels {
    const void* from;
    void* to;
    int64_t images, channels, positions;
    int itemsize, threads;
};

struct ExpansionConvKernels {
    void (*product)(const ConvProduct&);
    void (*gradients)(const ConvGradients&);
    void (*pixels)(const ConvPixels&);
};

}  // namespace pylearngene

extern "C" {
extern const pylearngene::ExpansionConvKernels pylearngene_expansion_conv_DEFAULT;
extern const pylearngene::ExpansionConvKernels pylearngene_expansion_conv_AVX2;
extern const pylearngene::ExpansionConvKernels pylearngene_expansion_conv_AVX512;
extern const pylearngene::ExpansionConvKernels pylearngene_expansion_conv_AVX512_BF16;
}
