// SPDX-License-Identifier: Apache-2.0
// The backward pass of `expansion_norm`. With h = (x - mean) / deviation: dx = (dy g - p - h q) / deviation, where p
// and q are the means of dy g and dy g h over a token, p 0 in an RMS norm, and the gradients of gain and bias are the
// sums of dy h and dy over tokens. Tokens are summed in pieces that do not depend on the thread count; pieces are added
// in order.
#pragma once

#include "expansion_norm_forward.h"
#include "rows_wgrad.h"

namespace {

// What one token has in the backward pass, from some column on.
template <class X>
struct NormToken {
    const X *x, *dy;
    NormMoments<WorkOf<X>> moments;
};

// Columns of a token: adds dy g and dy g h to `sums` where kInput, and to the sums of dy h and dy over tokens, which
// lie `apart` from each other, where kGenes; there h is rounded to X where kRounded.
template <bool kInput, bool kGenes, bool kRounded, class X>
INLINE void gather_token(const NormToken<X>& token, int n, const WorkOf<X>* gain, WorkOf<X>* to, int64_t apart,
                         double (&totals)[2]) {
    typedef WorkOf<X> Work;
    typedef Vector<X> V;
    constexpr int lanes = Simd<Work>::lanes;
    const V mean = splat(token.moments.mean), scale = splat(token.moments.scale);
    V sums[2][2] = {};
    const auto add = [&](V x, V dy, int i, int64_t count, V(&s)[2]) {
        V h = normalized<false, X>(x, mean, scale);
        if (kInput) {
            V p = dy * Element<Work>::load(gain + i), q = p * h;
            if (count < lanes) q = first_lanes<Work>(q, count);  // beyond the end h may be infinite
            s[0] += p;
            s[1] += q;
        }
        if (!kGenes) return;
        if constexpr (kRounded) h = Element<X>::round(h);
        if (count < lanes) {
            store_first(to + i, madd(dy, h, load_first(to + i, count)), count);
            store_first(to + apart + i, load_first(to + apart + i, count) + dy, count);
        } else {
            Element<Work>::store(to + i, madd(dy, h, Element<Work>::load(to + i)));
            Element<Work>::store(to + apart + i, Element<Work>::load(to + apart + i) + dy);
        }
    };
    int i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes)
        for (int j = 0; j < 2; ++j)
            add(Element<X>::load(token.x + i + j * lanes), Element<X>::load(token.dy + i + j * lanes), i + j * lanes,
                lanes, sums[j]);
    for (; i + lanes <= n; i += lanes)
        add(Element<X>::load(token.x + i), Element<X>::load(token.dy + i), i, lanes, sums[0]);
    if (i < n) add(load_first(token.x + i, n - i), load_first(token.dy + i, n - i), i, n - i, sums[1]);
    for (int kind = 0; kInput && kind < 2; ++kind) totals[kind] += sum(sums[0][kind] + sums[1][kind]);
}

// Columns of dx; p and q are means.
template <class X>
INLINE void spread_token(const NormToken<X>& token, int n, const WorkOf<X>* gain, WorkOf<X> p, WorkOf<X> q, X* dx) {
    typedef WorkOf<X> Work;
    typedef Vector<X> V;
    constexpr int lanes = Simd<Work>::lanes;
    const V mean = splat(token.moments.mean), scale = splat(token.moments.scale), wp = splat(p), wq = splat(q);
    const auto at = [&](V x, V dy, int i) {
        const V h = (x - mean) * scale;
        return (dy * Element<Work>::load(gain + i) - madd(h, wq, wp)) * scale;
    };
    int i = 0;
    for (; i + lanes <= n; i += lanes)
        Element<X>::store(dx + i, at(Element<X>::load(token.x + i), Element<X>::load(token.dy + i), i));
    if (i < n) store_first(dx + i, at(load_first(token.x + i, n - i), load_first(token.dy + i, n - i), i), n - i);
}

template <class X>
INLINE NormToken<X> token_at(const NormBackward& a, int64_t t) {
    typedef WorkOf<X> Work;
    const Work* const kept = static_cast<const Work*>(a.moments) + t;
    return {static_cast<const X*>(a.x) + t * a.x_row_stride,
            static_cast<const X*>(a.dy) + t * a.dy_row_stride,
            {read_one(kept), read_one(kept + a.m)}};
}

// The tokens of one piece: dx where kInput, and where kGenes the sums of dy h and dy, [2, N].
template <bool kInput, bool kGenes, class X, class G>
void norm_piece(const NormBackward& a, int64_t first, int64_t last, WorkOf<X>* to) {
    typedef WorkOf<X> Work;
    constexpr int width = kNormBytes / sizeof(Work);
    alignas(64) Work gain[width];
    int64_t formed = -1;
    const auto need = [&](int64_t column, int n) {
        if (kInput && formed != column) form_vector<X, G>(a.gains, column, n, gain);
        formed = column;
    };
    const int64_t block = a.n > width ? kNormBlock : 1;
    if (kGenes) memset(to, 0, 2 * a.n * sizeof(Work));
    for (int64_t start = first; start < last; start += block) {
        const int tokens = min64(block, last - start);
        double totals[kNormBlock][2] = {};
        for (int64_t column = 0; column < a.n; column += width) {
            const int n = min64(width, a.n - column);
            need(column, n);
            for (int t = 0; t < tokens; ++t) {
                NormToken<X> token = token_at<X>(a, start + t);
                token.x += column, token.dy += column;
                if (a.kind == kRmsNormGainLast)
                    gather_token<kInput, kGenes, true>(token, n, gain, to + column, a.n, totals[t]);
                else
                    gather_token<kInput, kGenes, false>(token, n, gain, to + column, a.n, totals[t]);
            }
        }
        for (int64_t column = 0; kInput && column < a.n; column += width) {
            const int n = min64(width, a.n - column);
            need(column, n);
            for (int t = 0; t < tokens; ++t) {
                NormToken<X> token = token_at<X>(a, start + t);
                token.x += column, token.dy += column;
                const double size = static_cast<double>(a.n), p = a.kind == kLayerNorm ? totals[t][0] / size : 0;
                spread_token(token, n, gain, static_cast<Work>(p), static_cast<Work>(totals[t][1] / size),
                             static_cast<X*>(a.dx) + (start + t) * a.n + column);
            }
        }
    }
}

// Adds the pieces up, in order, and spends the sums on the genes and coefficients.
template <class G>
void spend_pieces(const NormBackward& a) {
    typedef WorkOf<G> Work;
    constexpr int width = kStripBytes / sizeof(Work), lanes = Simd<Work>::lanes;
    double dots[1][kMaxGenes] = {};
    for (int64_t column = 0; column < a.n; column += width) {
        const int n = min64(width, a.n - column);
        for (int kind = 0; kind < 2; ++kind) {
            const Work* from = static_cast<const Work*>(a.partial) + kind * a.n + column;
            alignas(64) Work strip[width];
            widen_row(strip, from, n);
            for (int64_t part = 1; part < a.parts; ++part) {
                from += 2 * a.n;
                for (int i = 0; i < n; i += lanes) {
                    const Vector<Work> v = n - i < lanes ? load_first(from + i, n - i) : Element<Work>::load(from + i);
                    Element<Work>::store(strip + i, Element<Work>::load(strip + i) + v);
                }
            }
            const Genes& genes = kind ? a.biases : a.gains;
            if (genes.count)
                spend_strip<G>(genes, kind ? a.bias_grads : a.gain_grads, 0, 1, column, n, strip, width, dots);
        }
    }
    if (a.dots) memcpy(a.dots, dots[0], a.gains.count * sizeof(double));
}

template <bool kInput, bool kGenes, class X, class G>
void norm_pieces(const NormBackward& a) {
    typedef WorkOf<X> Work;
    const int64_t shares = min64(a.threads, a.parts);
#pragma omp parallel for if (shares > 1) num_threads(static_cast<int>(shares)) schedule(static)
    for (int64_t part = 0; part < a.parts; ++part)
        norm_piece<kInput, kGenes, X, G>(a, a.m * part / a.parts, a.m * (part + 1) / a.parts,
                                         static_cast<Work*>(a.partial) + (kGenes ? part * 2 * a.n : 0));
}

template <class X, class G>
void norm_backward(const NormBackward& a) {
    if (a.dx && a.partial)
        norm_pieces<true, true, X, G>(a);
    else if (a.dx)
        norm_pieces<true, false, X, G>(a);
    else if (a.partial)
        norm_pieces<false, true, X, G>(a);
    if (a.partial) spend_pieces<G>(a);
}

}  // namespace
