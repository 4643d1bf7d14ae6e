// SPDX-License-Identifier: Apache-2.0
// CPU kernels of `expansion`: synthesis, products and gene gradients, compiled once per level. Work is cut into strips
// of kRows rows of W; a strip lives in registers (Chain, genes with contiguous columns and few tokens) or in L1 (Strip,
// everything else), and each gene element is read once per kMaxTokens tokens. Every output element is owned by one
// thread and summed in an order that does not depend on the thread count. C-like on purpose: no library templates,
// internal linkage, so that no code of one level leaks into another.

#include "strips.h"

namespace {

constexpr int kTokens = 4;            // tokens multiplied together
constexpr int kMaxTokens = 32;        // tokens per pass over the genes
constexpr int64_t kChunk = 4096;      // columns of one piece of work in synthesize
constexpr int kPieceBytes = 1 << 14;  // genes of one piece of work in synthesize_stack

// Columns [column, end) of one row: to = W, or to += W term by term.
template <bool kAdd, class D, class G>
INLINE void store_chain(const Chain<G, kAlong>& chain, D* to, int64_t column, int64_t end) {
    typedef WorkOf<G> Work;
    constexpr int lanes = Simd<Work>::lanes, block = 4;
    Vector<G> many[block], one[1];
    int64_t i = column;
    for (; i + block * lanes <= end; i += block * lanes) {
        for (int j = 0; kAdd && j < block; ++j) many[j] = Element<D>::load(to + i + j * lanes);
        chain.template form<Work, block, kAdd>(i, many);
        for (int j = 0; j < block; ++j) Element<D>::store(to + i + j * lanes, many[j]);
    }
    for (; i + lanes <= end; i += lanes) {
        if (kAdd) one[0] = Element<D>::load(to + i);
        chain.template form<Work, 1, kAdd>(i, one);
        Element<D>::store(to + i, one[0]);
    }
    if (i < end) {
        if (kAdd) one[0] = load_first(to + i, end - i);
        chain.template form_first<Work, 1, kAdd>(i, end - i, one);
        store_first(to + i, one[0], end - i);
    }
}

template <class D, class G>
void synthesize(const Synthesize& a) {
    typedef WorkOf<G> Work;
    constexpr int width = Strip<Work>::width;
    D* const dst = static_cast<D*>(a.dst);
    if (!contiguous(a.genes)) {
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
        for (int64_t row = 0; row < a.rows; row += kRows) {
            for (int64_t column = 0; column < a.cols; column += width) {
                const int rows = min64(kRows, a.rows - row), n = min64(width, a.cols - column);
                Strip<Work> strip;
                form_strip<D, G>(a.genes, row, rows, column, n, strip);
                for (int r = 0; r < rows; ++r) narrow_row(dst + (row + r) * a.dst_row_stride + column, strip.at[r], n);
            }
        }
        return;
    }
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) {
        for (int64_t column = 0; column < a.cols; column += kChunk) {
            Chain<G, kAlong> chain;
            chain.start(a.genes, row, 0);
            store_chain<false>(chain, dst + row * a.dst_row_stride, column, min64(column + kChunk, a.cols));
        }
    }
}

// Pieces are so narrow that those of all genes stay in L1 while every layer reads them.
template <bool kAdd, class D, class G>
void synthesize_pieces(const SynthesizeStack& a) {
    typedef WorkOf<G> Work;
    const int64_t room = kPieceBytes / sizeof(G) / a.genes.count, step = 4 * Simd<Work>::lanes;
    const int64_t piece = room < step ? step : room / step * step;
#pragma omp parallel for collapse(2) if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) {
        for (int64_t column = 0; column < a.cols; column += piece) {
            Chain<G, kAlong> chain;
            chain.start(a.genes, row, 0);
            for (int l = 0; l < a.layers; ++l) {
                D* const to = static_cast<D*>(a.dst[l]) + row * a.dst_stride[l];
                store_chain<kAdd>(chain, to, column, min64(column + piece, a.cols));
                chain.coeffs += a.genes.count;
            }
        }
    }
}

template <class D, class G>
void synthesize_stack(const SynthesizeStack& a) {
    if (a.add)
        synthesize_pieces<true, D, G>(a);
    else
        synthesize_pieces<false, D, G>(a);
}

// acc[t][r] += sum_i x[t, i] * w[r, i] for T tokens, lane by lane.
template <int T, class X, class Source>
INLINE void dot_tokens(const Source& source, const X* x, int64_t x_stride, int64_t n, Vector<X> (*acc)[kRows]) {
    constexpr int lanes = Simd<WorkOf<X>>::lanes;
    Vector<X> a[T][kRows], w[kRows];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kRows; ++r) a[t][r] = acc[t][r];
    for (int64_t i = 0; i < n; i += lanes) {
        const bool whole = i + lanes <= n;
        if (whole)
            source.template form<X>(i, w);
        else
            source.template form_first<X>(i, n - i, w);
        for (int t = 0; t < T; ++t) {
            const X* p = x + t * x_stride + i;
            const Vector<X> v = whole ? Element<X>::load(p) : load_first(p, n - i);
            for (int r = 0; r < kRows; ++r) a[t][r] = madd(w[r], v, a[t][r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kRows; ++r) acc[t][r] = a[t][r];
}

template <class X, class Source>
void dot(const Source& source, const X* x, int64_t x_stride, int tokens, int64_t n, Vector<X> (*acc)[kRows]) {
    for (; tokens >= kTokens; tokens -= kTokens, x += kTokens * x_stride, acc += kTokens)
        dot_tokens<kTokens>(source, x, x_stride, n, acc);
    if (tokens == 3) dot_tokens<3>(source, x, x_stride, n, acc);
    if (tokens == 2) dot_tokens<2>(source, x, x_stride, n, acc);
    if (tokens == 1) dot_tokens<1>(source, x, x_stride, n, acc);
}

// The bias of rows [row, row + rows) in the work dtype, zero where there is none.
template <class Work, class B>
void form_bias(const RowsForward& a, int64_t row, int rows, Work* bias) {
    if (a.bias) {
        widen_row(bias, static_cast<const B*>(a.bias) + row, rows);
    } else if (a.bias_genes.count) {
        Strip<Work> strip;
        form_strip<Work, B>(a.bias_genes, row, rows, 0, 1, strip);
        for (int r = 0; r < rows; ++r) bias[r] = strip.at[r][0];
    }
}
void form_bias(const RowsForward& a, int64_t row, int rows, double* bias) {
    form_bias<double, double>(a, row, rows, bias);
}
void form_bias(const RowsForward& a, int64_t row, int rows, float* bias) {
    if (a.bias_dtype == kFloat32) form_bias<float, float>(a, row, rows, bias);
    if (a.bias_dtype == kBFloat16) form_bias<float, BF16>(a, row, rows, bias);
    if (a.bias_dtype == kFloat16) form_bias<float, F16>(a, row, rows, bias);
}

template <class X, class G>
void rows_forward(const RowsForward& a) {
    typedef WorkOf<X> Work;
    constexpr int lanes = Simd<Work>::lanes, width = Strip<Work>::width;
    constexpr int padded = kRows < lanes ? lanes : kRows;
    const bool in_registers = contiguous(a.genes);
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t row = 0; row < a.o; row += kRows) {
        const int rows = min64(kRows, a.o - row);
        Work bias[padded] = {}, out[padded] = {};
        form_bias(a, row, rows, bias);
        for (int64_t token = 0; token < a.m; token += kMaxTokens) {
            const int tokens = min64(kMaxTokens, a.m - token);
            const X* x = static_cast<const X*>(a.x) + token * a.x_row_stride;
            Vector<X> acc[kMaxTokens][kRows];
            memset(acc, 0, tokens * sizeof acc[0]);
            if (in_registers && rows == kRows && tokens <= kTokens) {
                Chain<G, kDown> chain;
                chain.start(a.genes, row, 0);
                dot(chain, x, a.x_row_stride, tokens, a.i, acc);
            } else {
                Strip<Work> strip;
                for (int64_t column = 0; column < a.i; column += width) {
                    const int n = min64(width, a.i - column);
                    form_strip<X, G>(a.genes, row, rows, column, n, strip);
                    dot(strip, x + column, a.x_row_stride, tokens, n, acc);
                }
            }
            X* y = static_cast<X*>(a.y) + token * a.y_row_stride + row;
            for (int t = 0; t < tokens; ++t) {
                for (int r = 0; r < rows; ++r) out[r] = sum(acc[t][r]) + bias[r];
                narrow_row(y + t * a.y_row_stride, out, rows);
            }
        }
    }
}

// acc[t][i] += sum_r dy[t][r] * w[r, i] for T tokens, in r order.
template <int T, class D, class Source>
INLINE void axpy_tokens(const Source& source, const WorkOf<D> (*dy)[kRows], int64_t n,
                        WorkOf<D> (*acc)[Strip<WorkOf<D>>::width]) {
    typedef WorkOf<D> Work;
    constexpr int lanes = Simd<Work>::lanes;
    Vector<D> d[T][kRows], w[kRows];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kRows; ++r) d[t][r] = splat(dy[t][r]);
    for (int64_t i = 0; i < n; i += lanes) {
        if (i + lanes <= n)
            source.template form<D>(i, w);
        else
            source.template form_first<D>(i, n - i, w);
        for (int t = 0; t < T; ++t) {
            Vector<D> s = Element<Work>::load(&acc[t][i]);
            for (int r = 0; r < kRows; ++r) s = madd(w[r], d[t][r], s);
            memcpy(&acc[t][i], &s, sizeof s);
        }
    }
}

template <class D, class Source>
void axpy(const Source& source, const WorkOf<D> (*dy)[kRows], int tokens, int64_t n,
          WorkOf<D> (*acc)[Strip<WorkOf<D>>::width]) {
    for (; tokens >= kTokens; tokens -= kTokens, dy += kTokens, acc += kTokens)
        axpy_tokens<kTokens, D>(source, dy, n, acc);
    if (tokens == 3) axpy_tokens<3, D>(source, dy, n, acc);
    if (tokens == 2) axpy_tokens<2, D>(source, dy, n, acc);
    if (tokens == 1) axpy_tokens<1, D>(source, dy, n, acc);
}

// values[t][r] = m[row + r of token t], zero beyond `rows`.
template <class D>
INLINE void load_tokens(const D* p, int64_t stride, int tokens, int rows, WorkOf<D> (*values)[kRows]) {
    constexpr int lanes = Simd<WorkOf<D>>::lanes;
    for (int t = 0; t < tokens; ++t) {
        WorkOf<D> row[kRows < lanes ? lanes : kRows] = {};
        widen_row(row, p + t * stride, rows);
        memcpy(values[t], row, sizeof values[t]);
    }
}

template <class D, class G>
void rows_dx(const RowsDx& a) {
    typedef WorkOf<D> Work;
    constexpr int lanes = Simd<Work>::lanes, width = Strip<Work>::width;
    const bool in_registers = contiguous(a.genes);
    if (!a.i) return;
    // A thread owns columns, so that a sum over all rows is one thread's and never a rounded partial sum.
    const int64_t share = (a.i + a.threads - 1) / a.threads;
    const int64_t block = min64(width, (share + lanes - 1) / lanes * lanes);
#pragma omp parallel for if (a.threads > 1) num_threads(a.threads) schedule(static)
    for (int64_t column = 0; column < a.i; column += block) {
        const int n = min64(block, a.i - column);
        alignas(64) Work acc[kMaxTokens][width];
        Work dy[kMaxTokens][kRows];
        for (int64_t token = 0; token < a.m; token += kMaxTokens) {
            const int tokens = min64(kMaxTokens, a.m - token);
            memset(acc, 0, tokens * sizeof acc[0]);
            for (int64_t row = 0; row < a.o; row += kRows) {
                const int rows = min64(kRows, a.o - row);
                const D* from = static_cast<const D*>(a.dy) + token * a.dy_row_stride + row;
                load_tokens(from, a.dy_row_stride, tokens, rows, dy);
                if (in_registers && rows == kRows && tokens <= kTokens) {
                    Chain<G, kDown> chain;
                    chain.start(a.genes, row, column);
                    axpy<D>(chain, dy, tokens, n, acc);
                } else {
                    Strip<Work> strip;
                    form_strip<D, G>(a.genes, row, rows, column, n, strip);
                    axpy<D>(strip, dy, tokens, n, acc);
                }
            }
            D* dx = static_cast<D*>(a.dx) + token * a.dx_row_stride + column;
            for (int t = 0; t < tokens; ++t) narrow_row(dx + t * a.dx_row_stride, acc[t], n);
        }
    }
}

// One strip of dW goes to every wanted buffer, and into the running dots of its rows.
template <class G>
void spend_strip(const Genes& genes, const GeneGrads& grads, int64_t row, int rows, int64_t column, int n,
                 const Strip<WorkOf<G>>& dw, double (*dots)[kMaxGenes]) {
    typedef WorkOf<G> Work;
    constexpr int lanes = Simd<Work>::lanes, width = Strip<Work>::width;
    alignas(64) G stage[kRows * width];
    for (int k = 0; k < genes.count; ++k) {
        const Vector<G> c = splat(read_one(static_cast<const Work*>(genes.coeffs) + k));
        for (int r = 0; r < rows && grads.buffer[k]; ++r) {
            Work* b = static_cast<Work*>(grads.buffer[k]) + (row + r) * grads.buffer_stride[k] + column;
            for (int i = 0; i < n; i += lanes) {
                const Vector<G> d = Element<Work>::load(&dw.at[r][i]);
                __builtin_prefetch(b + kRows * grads.buffer_stride[k] + i, 1);
                if (i + lanes <= n)
                    Element<Work>::store(b + i, madd(c, d, Element<Work>::load(b + i)));
                else
                    store_first(b + i, madd(c, d, load_first(b + i, n - i)), n - i);
            }
        }
        if (!grads.dots) continue;
        const Matrix& m = genes.matrix[k];
        const bool in_place = m.column_stride == 1;
        const G* g = in_place ? static_cast<const G*>(m.data) + row * m.row_stride + column : stage;
        const int64_t stride = in_place ? m.row_stride : width;
        if (!in_place) gather(m, row, rows, column, n, stage, width);
        for (int r = 0; r < rows; ++r) {
            F64 s[Simd<Work>::sums] = {};
            const G* p = g + r * stride;
            int i = 0;
            for (; i + lanes <= n; i += lanes) {
                __builtin_prefetch(p + kRows * stride + i);
                add_product(Element<Work>::load(&dw.at[r][i]), Element<G>::load(p + i), s);
            }
            if (i < n) add_product(Element<Work>::load(&dw.at[r][i]), load_first(p + i, n - i), s);
            dots[r][k] += total(s);
        }
    }
}

// Runs over strips of dW: form(row, rows, column, n, strip) says what they hold.
template <class G, class Form>
void each_strip(const Genes& genes, const GeneGrads& grads, int64_t all_rows, int64_t cols, int threads, Form form) {
    typedef WorkOf<G> Work;
    constexpr int width = Strip<Work>::width;
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int64_t row = 0; row < all_rows; row += kRows) {
        const int rows = min64(kRows, all_rows - row);
        double dots[kRows][kMaxGenes] = {};
        Strip<Work> strip;
        for (int64_t column = 0; column < cols; column += width) {
            const int n = min64(width, cols - column);
            form(row, rows, column, n, strip);
            spend_strip<G>(genes, grads, row, rows, column, n, strip, dots);
        }
        for (int r = 0; r < rows && grads.dots; ++r)
            memcpy(grads.dots + (row + r) * genes.count, dots[r], genes.count * sizeof(double));
    }
}

template <class D, class G>
void accumulate(const Accumulate& a) {
    const D* const dw = static_cast<const D*>(a.dw);
    each_strip<G>(a.genes, a.grads, a.rows, a.cols, a.threads,
                  [&](int64_t row, int rows, int64_t column, int n, Strip<WorkOf<G>>& strip) {
                      for (int r = 0; r < rows; ++r)
                          widen_row(strip.at[r], dw + (row + r) * a.dw_row_stride + column, n);
                  });
}

template <class X, class G>
void rows_wgrad(const RowsWgrad& a) {
    typedef WorkOf<X> Work;
    constexpr int lanes = Simd<Work>::lanes;
    auto form = [&](int64_t row, int rows, int64_t column, int n, Strip<Work>& strip) {
        Work dy[kMaxTokens][kRows];
        for (int r = 0; r < kRows; ++r) memset(strip.at[r], 0, (n + lanes - 1) / lanes * lanes * sizeof(Work));
        for (int64_t token = 0; token < a.m; token += kMaxTokens) {
            const int tokens = min64(kMaxTokens, a.m - token);
            const X* x = static_cast<const X*>(a.x) + token * a.x_row_stride + column;
            const X* from = static_cast<const X*>(a.dy) + token * a.dy_row_stride + row;
            load_tokens(from, a.dy_row_stride, tokens, rows, dy);
            for (int i = 0; i < n; i += lanes) {
                Vector<X> w[kRows];
                strip.template form<Work>(i, w);
                for (int t = 0; t < tokens; ++t) {
                    const X* p = x + t * a.x_row_stride + i;
                    const Vector<X> v = i + lanes <= n ? Element<X>::load(p) : load_first(p, n - i);
                    for (int r = 0; r < kRows; ++r) w[r] = madd(splat(dy[t][r]), v, w[r]);
                }
                for (int r = 0; r < kRows; ++r) memcpy(&strip.at[r][i], &w[r], sizeof w[r]);
            }
        }
    };
    each_strip<G>(a.genes, a.grads, a.o, a.i, a.threads, form);
}

// Calls f(X(), G()) for the dtype codes of x and genes; the pairs were checked before.
template <class F>
void dispatch(int x, int g, F f) {
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

#define DISPATCHED(kernel, Args, x_dtype)                                                                 \
    void run_##kernel(const Args& a) {                                                                    \
        dispatch(a.x_dtype, a.genes.dtype, [&](auto x, auto g) { kernel<decltype(x), decltype(g)>(a); }); \
    }
DISPATCHED(synthesize, Synthesize, dst_dtype)
DISPATCHED(synthesize_stack, SynthesizeStack, dst_dtype)
DISPATCHED(rows_forward, RowsForward, x_dtype)
DISPATCHED(rows_dx, RowsDx, dy_dtype)
DISPATCHED(accumulate, Accumulate, dw_dtype)
DISPATCHED(rows_wgrad, RowsWgrad, x_dtype)

}  // namespace

#define JOIN_EXPANDED(a, b) a##b
#define JOIN(a, b) JOIN_EXPANDED(a, b)
const pylearngene::ExpansionKernels JOIN(pylearngene_expansion_, PYLEARNGENE_LEVEL) = {
    run_synthesize, run_synthesize_stack, run_rows_forward, run_rows_dx, run_accumulate, run_rows_wgrad,
};
