// SPDX-License-Identifier: Apache-2.0
// W of `expansion` itself: one weight, or those of several layers in one pass over the genes. Products, which never
// write W, are in rows_*.h and pairs_*.h.
#pragma once

#include "strips.h"

namespace {

constexpr int64_t kChunk = 4096;          // columns of one piece of work in synthesize
constexpr int kPieceBytes = 1 << 14;      // widened genes of one piece of work in synthesize_stack
constexpr int kLayers = 4;                // that are formed together
constexpr int64_t kStreamFrom = 1 << 23;  // bytes of weights that are written past the caches

// Bits of bfloat16 in the high half, as bf16_bits; the low half is anything.
INLINE U32 bf16_bits_above(F32 v) {
    const U32 u = cast<U32>(v);
    return v == v ? u + 0x7FFFu + ((u >> 16) & 1u) : U32{} + 0x7FC00000u;
}

// A vector stored as it is; with kStream past the caches, at an address of whole vectors.
template <bool kStream, class V>
INLINE void store_bits(void* to, V v) {
#if defined(__AVX512F__)
    if (kStream) return _mm512_stream_si512(static_cast<__m512i*>(to), cast<__m512i>(v));
#elif defined(__AVX2__)
    if (kStream) return _mm256_stream_si256(static_cast<__m256i*>(to), cast<__m256i>(v));
#endif
    memcpy(to, &v, sizeof v);
}

// Other threads see nothing of what went past the caches before this.
INLINE void end_streams() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Couples of columns that are rounded and stored as elements D.
template <class D, bool kStream = false>
struct Results {
    typedef D Stored;
    static INLINE void put(D* to, const Vector<D> (&w)[2]) {
        for (int h = 0; h < 2; ++h) {
            D* const half = to + h * Simd<WorkOf<D>>::lanes;
            if constexpr (sizeof(D) == sizeof(WorkOf<D>))
                store_bits<kStream>(half, plain_nan(w[h]));
            else
                Element<D>::store(half, w[h]);
        }
    }
};
template <bool kStream>
struct Couple<Results<BF16, kStream>, BF16> {
    static constexpr int columns = 2 * Simd<float>::lanes;
    static INLINE void load(const BF16* p, F32 (&v)[2]) { load_turns(p, v); }
    static INLINE void put(BF16* to, const F32 (&w)[2]) {
        store_bits<kStream>(to, bf16_bits_above(w[0]) >> 16 | (bf16_bits_above(w[1]) & 0xFFFF0000u));
    }
};

// Columns [column, end) of one row: to = W, or to += W term by term.
template <bool kAdd, class D, class G>
INLINE void store_chain(const Chain<G>& chain, D* to, int64_t column, int64_t end) {
    typedef WorkOf<G> Work;
    constexpr int lanes = Simd<Work>::lanes, block = 4;
    Vector<G> many[block], one[1];
    int64_t i = column;
    for (; i + block * lanes <= end; i += block * lanes) {
        for (int j = 0; kAdd && j < block; ++j) many[j] = Element<D>::load(to + i + j * lanes);
        chain.template form_at<Work, block, false, kAdd>(0, i, many);
        for (int j = 0; j < block; ++j) Element<D>::store(to + i + j * lanes, many[j]);
    }
    for (; i + lanes <= end; i += lanes) {
        if (kAdd) one[0] = Element<D>::load(to + i);
        chain.template form_at<Work, 1, false, kAdd>(0, i, one);
        Element<D>::store(to + i, one[0]);
    }
    if (i < end) {
        if (kAdd) one[0] = load_first(to + i, end - i);
        chain.template form_first<Work, 1, kAdd>(0, i, end - i, one);
        store_first(to + i, one[0], end - i);
    }
}

template <class D, class G>
void synthesize(const Synthesize& a) {
    typedef WorkOf<G> Work;
    constexpr int width = kStripBytes / sizeof(Work);
    D* const dst = static_cast<D*>(a.dst);
    if (!contiguous(a.genes)) {
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
        for (int64_t row = 0; row < a.rows; row += kRows) {
            for (int64_t column = 0; column < a.cols; column += width) {
                const int rows = min64(kRows, a.rows - row), n = min64(width, a.cols - column);
                alignas(64) Work strip[kRows][width];
                form_block<SingleTerms<D>, G>(a.genes, row, rows, column, n, strip[0], width);
                for (int r = 0; r < rows; ++r) narrow_row(dst + (row + r) * a.dst_row_stride + column, strip[r], n);
            }
        }
        return;
    }
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) {
        for (int64_t column = 0; column < a.cols; column += kChunk) {
            Chain<G> chain;
            chain.start(a.genes, row, column);
            D* const to = dst + row * a.dst_row_stride + column;
            const int64_t n = min64(kChunk, a.cols - column);
            store_chain<false>(chain, to, form_couples<Results<D>, G>(chain, 1, n, to, 0), n);
        }
    }
}

// Whether the weights will have left the caches before anybody reads them, and lie so that they can go past them.
template <class D>
bool streams(const SynthesizeStack& a) {
    if (a.layers * a.rows * a.cols * static_cast<int64_t>(sizeof(D)) < kStreamFrom) return false;
    for (int l = 0; l < a.layers; ++l)
        if (reinterpret_cast<uintptr_t>(a.dst[l]) % 64 || a.dst_stride[l] * sizeof(D) % 64) return false;
    return true;
}

// A piece of a row of several weights: n couples of columns of all genes as work values, side by side, and the rows of
// the weights that they make.
template <class G>
struct WidePiece {
    const Vector<G> (*genes)[2];  // [K, n]
    const WorkOf<G>* coeffs;      // [L, K]
    int count, n;

    // C couples from j on for N layers from l on, in registers: gene k of their chains.
    template <bool kFirst, int N, int C>
    INLINE void add(int k, int l, int j, Vector<G> (&w)[N][C][2]) const {
        Vector<G> g[C][2];
        memcpy(g, genes + k * n + j, sizeof g);
        for (int q = 0; q < C; ++q)
            for (int h = 0; h < 2; ++h) KEEP(g[q][h]);
        for (int m = 0; m < N; ++m) {
            Vector<G> c = splat(read_one(coeffs + (l + m) * count + k));
            KEEP(c);
            for (int q = 0; q < C; ++q)
                for (int h = 0; h < 2; ++h) w[m][q][h] = kFirst ? c * g[q][h] : fma(c, g[q][h], w[m][q][h]);
        }
    }
    template <int N, int C>
    INLINE void form(int l, int j, Vector<G> (&w)[N][C][2]) const {
        add<true>(0, l, j, w);
        for (int k = 1; k < count; ++k) add<false>(k, l, j, w);
    }
    template <int N, bool kStream, class D>
    INLINE void store(int l, D* const* to) const {
        typedef Couple<Results<D, kStream>, G> P;
        constexpr int wide = 2;
        int j = 0;
        for (; j + wide <= n; j += wide) {
            Vector<G> w[N][wide][2];
            form<N, wide>(l, j, w);
            for (int m = 0; m < N; ++m)
                for (int q = 0; q < wide; ++q) P::put(to[m] + (j + q) * P::columns, w[m][q]);
        }
        for (; j < n; ++j) {
            Vector<G> w[N][1][2];
            form<N, 1>(l, j, w);
            for (int m = 0; m < N; ++m) P::put(to[m] + j * P::columns, w[m][0]);
        }
    }
};

// The whole couples of n columns of a row of all weights, from where the chain starts; how many columns these are. What
// is narrower than work values is widened once for all layers.
template <bool kStream, class D, class G>
INLINE int store_layers(const Chain<G>& chain, D* const* to, int layers, int n) {
    typedef Couple<Results<D, kStream>, G> P;
    Vector<G> wide[kPieceBytes / (2 * sizeof(Vector<G>))][2];
    const WidePiece<G> piece = {wide, chain.coeffs, chain.count, n / P::columns};
    for (int k = 0; k < piece.count; ++k)
        for (int j = 0; j < piece.n; ++j) {
            const G* const from = chain.at(k, 0, j * P::columns);
            ask_ahead(from, chain.step(k));
            P::load(from, wide[k * piece.n + j]);
        }
    int l = 0;
    for (; l + kLayers <= layers; l += kLayers) piece.template store<kLayers, kStream>(l, to + l);
    for (; l < layers; ++l) piece.template store<1, kStream>(l, to + l);
    return piece.n * P::columns;
}

// n columns of a row of all weights, from where the chain starts.
template <bool kStream, class D, class G>
INLINE void store_piece(Chain<G>& chain, D* const* to, int layers, int n) {
    int done = 0;
    if constexpr (sizeof(G) < sizeof(WorkOf<G>)) done = store_layers<kStream>(chain, to, layers, n);
    for (int l = 0; l < layers; ++l, chain.coeffs += chain.count) {
        if constexpr (sizeof(G) == sizeof(WorkOf<G>))
            done = form_couples<Results<D, kStream>, G>(chain, 1, n, to[l], 0);
        store_chain<false>(chain, to[l], done, n);
    }
}

// Pieces of rows are so narrow that those of all genes stay in L1 while every layer reads them.
template <class D, class G>
void synthesize_layers(const SynthesizeStack& a) {
    const int64_t couple = 2 * Simd<WorkOf<G>>::lanes, room = kPieceBytes / sizeof(WorkOf<G>) / a.genes.count;
    const int64_t piece = room / couple * couple;
    const bool stream = streams<D>(a);
#pragma omp parallel if (a.threads > 1) num_threads(a.threads)
    {
#pragma omp for collapse(2) schedule(static) nowait
        for (int64_t row = 0; row < a.rows; ++row)
            for (int64_t column = 0; column < a.cols; column += piece) {
                const int n = min64(piece, a.cols - column);
                Chain<G> chain;
                chain.start(a.genes, row, column);
                D* to[kMaxLayers];
                for (int l = 0; l < a.layers; ++l) to[l] = static_cast<D*>(a.dst[l]) + row * a.dst_stride[l] + column;
                if (stream)
                    store_piece<true>(chain, to, a.layers, n);
                else
                    store_piece<false>(chain, to, a.layers, n);
            }
        end_streams();
    }
}

template <class D, class G>
void add_layers(const SynthesizeStack& a) {
    const int64_t room = kPieceBytes / sizeof(G) / a.genes.count, step = 4 * Simd<WorkOf<G>>::lanes;
    const int64_t piece = room < step ? step : room / step * step;
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row)
        for (int64_t column = 0; column < a.cols; column += piece) {
            Chain<G> chain;
            chain.start(a.genes, row, 0);
            for (int l = 0; l < a.layers; ++l, chain.coeffs += a.genes.count)
                store_chain<true>(chain, static_cast<D*>(a.dst[l]) + row * a.dst_stride[l], column,
                                  min64(column + piece, a.cols));
        }
}

template <class D, class G>
void synthesize_stack(const SynthesizeStack& a) {
    if (a.add)
        add_layers<D, G>(a);
    else
        synthesize_layers<D, G>(a);
}

}  // namespace
