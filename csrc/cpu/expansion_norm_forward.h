// SPDX-License-Identifier: Apache-2.0
// The forward pass of `expansion_norm`: moments of a token, gain and bias formed in L1, and the token with them. Every
// token is one thread's, and summed in an order that does not depend on the thread count.
#pragma once

#include "strips.h"

namespace {

constexpr int kNormBytes = 8192;  // gain, and likewise bias, formed at a time
constexpr int kNormBlock = 8;     // tokens that share them, where there are more columns
constexpr int kNormVectors = 4;   // vectors summed side by side
constexpr int kNormChunk = 2048;  // columns summed in the work dtype; sums of chunks are in double

template <class Work>
struct NormMoments {
    Work mean, scale;
};

// v, but zero from lane n on.
template <class Work>
INLINE typename Simd<Work>::Vector first_lanes(typename Simd<Work>::Vector v, int64_t n) {
    Work kept[Simd<Work>::lanes] = {};
    memcpy(kept, &v, n * sizeof(Work));
    return Element<Work>::load(kept);
}

// Sums over columns of one token: calls add(v, sums[j]) for vectors v of it, clear beyond its end, and adds up the sums
// of each kind in double.
template <int kKinds, class X, class Add>
INLINE void sum_token(const X* x, int64_t n, double (&totals)[kKinds], Add add) {
    typedef WorkOf<X> Work;
    constexpr int lanes = Simd<Work>::lanes;
    for (int64_t start = 0; start < n; start += kNormChunk) {
        const int64_t end = min64(start + kNormChunk, n);
        Vector<X> sums[kNormVectors][kKinds] = {};
        int64_t i = start;
        for (; i + kNormVectors * lanes <= end; i += kNormVectors * lanes)
            for (int j = 0; j < kNormVectors; ++j) add(Element<X>::load(x + i + j * lanes), lanes, sums[j]);
        for (; i + lanes <= end; i += lanes) add(Element<X>::load(x + i), lanes, sums[0]);
        if (i < end) add(load_first(x + i, end - i), end - i, sums[1]);
        for (int kind = 0; kind < kKinds; ++kind)
            totals[kind] += sum((sums[0][kind] + sums[1][kind]) + (sums[2][kind] + sums[3][kind]));
    }
}

// Two passes. The first goes by differences from the first element, so that equal elements have no variance, whatever
// their size, and adds up parts of their mean, which overflow no sooner than the elements do. The second also corrects
// the mean: what the first lost of large elements with small differences.
template <class X>
INLINE NormMoments<WorkOf<X>> moments_of(const X* x, int64_t n, double eps) {
    typedef WorkOf<X> Work;
    typedef Vector<X> V;
    constexpr int lanes = Simd<Work>::lanes;
    double guessed[1] = {}, around[2] = {};
    const Vector<X> start = load_first(x, 1);
    const V share = splat(static_cast<Work>(1.0 / static_cast<double>(n))), origin = splat(start[0]);
    sum_token(x, n, guessed, [&](V v, int64_t count, V(&s)[1]) {
        V d = v - origin;
        if (count < lanes) d = first_lanes<Work>(d, count);
        s[0] = madd(d, share, s[0]);
    });
    const Work guess = static_cast<Work>(guessed[0] + start[0]);
    const V center = splat(guess);
    sum_token(x, n, around, [&](V v, int64_t count, V(&s)[2]) {
        V d = v - center;
        if (count < lanes) d = first_lanes<Work>(d, count);
        s[0] += d;
        s[1] = madd(d, d, s[1]);
    });
    const double size = static_cast<double>(n), shift = around[0] / size;
    const double variance = around[1] / size - shift * shift;
    NormMoments<Work> found;
    found.mean = static_cast<Work>(static_cast<double>(guess) + shift);
    found.scale = static_cast<Work>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps));
    return found;
}

// Of an RMS norm: a mean of 0, which is exact to subtract.
template <class X>
INLINE NormMoments<WorkOf<X>> square_of(const X* x, int64_t n, double eps) {
    typedef WorkOf<X> Work;
    double squares[1] = {};
    sum_token(x, n, squares, [&](Vector<X> v, int64_t, Vector<X>(&s)[1]) { s[0] = madd(v, v, s[0]); });
    return {0, static_cast<Work>(1 / __builtin_sqrt(squares[0] / static_cast<double>(n) + eps))};
}

// n columns of an expanded vector, rounded to the genes' dtype and then to X; zeros where there are no genes.
template <class X, class G>
__attribute__((noinline)) void form_vector(const Genes& genes, int64_t column, int n, WorkOf<X>* to) {
    typedef WorkOf<X> Work;
    constexpr int lanes = Simd<Work>::lanes;
    if (!genes.count) {
        memset(to, 0, (n + lanes - 1) / lanes * lanes * sizeof(Work));
        return;
    }
    form_block<SingleTerms<G>, G>(genes, 0, 1, column, n, to, n);
    for (int i = 0; i < n; i += lanes) {
        const Vector<X> v = Element<X>::round(Element<Work>::load(to + i));
        memcpy(to + i, &v, sizeof v);
    }
}

// A normalized vector as the gain finds it.
template <bool kRounded, class X>
INLINE Vector<X> normalized(Vector<X> x, Vector<X> mean, Vector<X> scale) {
    const Vector<X> h = (x - mean) * scale;
    if constexpr (kRounded)
        return Element<X>::round(h);
    else
        return h;
}

// Columns of one token from `column` on; gain and bias begin there.
template <bool kRounded, class X>
INLINE void scale_token(const X* x, X* y, int n, const NormMoments<WorkOf<X>>& moments, const WorkOf<X>* gain,
                        const WorkOf<X>* bias) {
    typedef WorkOf<X> Work;
    typedef Vector<X> V;
    constexpr int lanes = Simd<Work>::lanes;
    const V mean = splat(moments.mean), scale = splat(moments.scale);
    int i = 0;
    for (; i + lanes <= n; i += lanes) {
        const V h = normalized<kRounded, X>(Element<X>::load(x + i), mean, scale);
        Element<X>::store(y + i, madd(h, Element<Work>::load(gain + i), Element<Work>::load(bias + i)));
    }
    if (i < n) {
        const V h = normalized<kRounded, X>(load_first(x + i, n - i), mean, scale);
        store_first(y + i, madd(h, Element<Work>::load(gain + i), Element<Work>::load(bias + i)), n - i);
    }
}

template <class X, class G>
void norm_forward(const NormForward& a) {
    typedef WorkOf<X> Work;
    constexpr int width = kNormBytes / sizeof(Work);
    // Two tokens otherwise: the processor begins with one before the moments of the other are there.
    const int64_t block = a.n > width ? kNormBlock : 2, blocks = (a.m + block - 1) / block;
    const int64_t shares = min64(a.threads, blocks);
    const X* const x = static_cast<const X*>(a.x);
    X* const y = static_cast<X*>(a.y);
    Work* const kept = static_cast<Work*>(a.moments);
#pragma omp parallel for if (shares > 1) num_threads(static_cast<int>(shares)) schedule(static)
    for (int64_t share = 0; share < shares; ++share) {
        alignas(64) Work gain[width], bias[width];
        int64_t formed = -1;
        for (int64_t b = blocks * share / shares; b < blocks * (share + 1) / shares; ++b) {
            const int64_t first = b * block;
            const int tokens = min64(block, a.m - first);
            NormMoments<Work> moments[kNormBlock];
            for (int t = 0; t < tokens; ++t) {
                const X* const token = x + (first + t) * a.x_row_stride;
                moments[t] = a.kind == kLayerNorm ? moments_of(token, a.n, a.eps) : square_of(token, a.n, a.eps);
                if (kept) memcpy(kept + first + t, &moments[t].mean, sizeof(Work));
                if (kept) memcpy(kept + a.m + first + t, &moments[t].scale, sizeof(Work));
            }
            for (int64_t column = 0; column < a.n; column += width) {
                const int n = min64(width, a.n - column);
                if (formed != column) {
                    form_vector<X, G>(a.gains, column, n, gain);
                    form_vector<X, G>(a.biases, column, n, bias);
                    formed = column;
                }
                for (int t = 0; t < tokens; ++t) {
                    const X* const from = x + (first + t) * a.x_row_stride + column;
                    X* const to = y + (first + t) * a.n + column;
                    if (a.kind == kRmsNormGainLast)
                        scale_token<true>(from, to, n, moments[t], gain, bias);
                    else
                        scale_token<false>(from, to, n, moments[t], gain, bias);
                }
            }
        }
    }
}

}  // namespace
