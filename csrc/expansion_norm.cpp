// SPDX-License-Identifier: Apache-2.0
// The submodule _C.expansion_norm: norms of tensors, not addresses. One call reads the tensors, has the results made by
// torch and runs the kernel of the asked level. Nothing is kept between calls. Where a tensor is unusual, or tensors do
// not fit each other, nothing is done and the answer is None: Python then goes another way, or names what is wrong.

#include "expansion_norm.h"

#include <memory>
#include <optional>
#include <string>

#include "checks.h"
#include "tensors.h"

namespace pylearngene {

namespace {

constexpr int64_t kTerms = 4;             // multiply-adds that an element of x counts for
constexpr int64_t kUnlockFrom = 1 << 14;  // elements from which other threads of Python may run meanwhile
constexpr int64_t kPieceTokens = 16, kMostPieces = 32, kPieceMemory = 1 << 21;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// How many pieces of M tokens [N] a backward pass sums apart, each as gain and bias in a work dtype of so many bytes.
int64_t pieces(int64_t m, int64_t n, int64_t size) {
    return most(1, least(least(m / kPieceTokens, kMostPieces), kPieceMemory / (2 * n * size)));
}

const ExpansionNormKernels& kernels(int level) {
    static const ExpansionNormKernels* const table[] = {
        &pylearngene_expansion_norm_DEFAULT,
#if PYLEARNGENE_LEVELS > 1
        &pylearngene_expansion_norm_AVX2,
        &pylearngene_expansion_norm_AVX512,
        &pylearngene_expansion_norm_AVX512_BF16,
#endif
    };
    check_level(level);
    return *table[level];
}

// Tokens [*, N] whose rows are contiguous and lie evenly, as [M, N].
struct Tokens {
    View view;
    int64_t m, n, row_stride;
};

class NormCalls {
 public:
    NormCalls(int64_t threads_pay_from, const py::capsule& exchange, py::tuple classes, int kind)
        : threads_pay_from_(threads_pay_from), reader_(exchange, std::move(classes)), kind_(kind) {
        if (kind < 0 || kind >= kNormKinds)
            throw py::value_error("kind: expected 0 to " + std::to_string(kNormKinds - 1) + ", got " +
                                  std::to_string(kind));
    }

    // y, or with `keep` the pair of y and the moments, [2 M].
    py::object forward(int level, int threads, py::handle x, py::handle gains, py::handle biases, py::handle coeffs,
                       double eps, bool keep) const {
        const ExpansionNormKernels& run = kernels(level);
        const Tensors gain_list(gains), bias_list(biases);
        NormForward a;
        Tokens in;
        View c;
        if (!read_tokens(x, in) || !read_vectors(in, gain_list, bias_list, coeffs, a.gains, a.biases, c))
            return py::none();
        a.x = in.view.data, a.x_dtype = in.view.dtype;
        a.m = in.m, a.n = in.n, a.x_row_stride = in.row_stride;
        a.eps = eps, a.moments = nullptr, a.kind = kind_;
        a.threads = paid(threads, in);
        py::object y = reader_.empty_like(x, in.view, in.n, a.y), moments;
        if (keep) moments = reader_.empty_like(coeffs, c, 2 * in.m, a.moments);
        {
            const std::optional<py::gil_scoped_release> unlocked = unlock(in);
            run.forward(a);
        }
        if (!keep) return y;
        return py::make_tuple(std::move(y), std::move(moments));
    }

    // The pair of dx and the coefficients' gradient, None each where it is not needed; adds to the accumulators of
    // genes, which are tensors [N] or None.
    py::object backward(int level, int threads, py::handle dy, py::handle x, py::handle moments, py::handle gains,
                        py::handle biases, py::handle coeffs, py::handle buffers, py::handle bias_buffers, bool need_dx,
                        bool need_dots) const {
        const ExpansionNormKernels& run = kernels(level);
        const Tensors gain_list(gains), bias_list(biases), buffer_list(buffers), bias_buffer_list(bias_buffers);
        NormBackward a;
        Tokens in, up;
        View c, kept;
        bool any = need_dots;
        if (!read_tokens(x, in) || !read_tokens(dy, up) || !up.view.same(in.view)) return py::none();
        if (!read_vectors(in, gain_list, bias_list, coeffs, a.gains, a.biases, c)) return py::none();
        if (!reader_.read(moments, kept) || kept.ndim != 1 || kept.last() != 2 * in.m || kept.dtype != c.dtype ||
            !kept.contiguous())
            return py::none();
        if (!read_buffers(buffer_list, a.gains, c, in.n, a.gain_grads, any)) return py::none();
        if (!read_buffers(bias_buffer_list, a.biases, c, in.n, a.bias_grads, any)) return py::none();
        a.x = in.view.data, a.dy = up.view.data, a.moments = kept.data, a.x_dtype = in.view.dtype;
        a.m = in.m, a.n = in.n, a.x_row_stride = in.row_stride, a.dy_row_stride = up.row_stride;
        a.threads = paid(threads, in), a.kind = kind_;
        double dots[kMaxGenes];
        a.dots = need_dots ? dots : nullptr;
        a.gain_grads.dots = a.bias_grads.dots = a.dots;
        const int64_t size = itemsize(work(a.x_dtype)), piece = 2 * in.n * size;
        a.parts = pieces(in.m, in.n, size);
        const std::unique_ptr<char[]> partial(any ? new char[a.parts * piece] : nullptr);
        a.partial = partial.get(), a.dx = nullptr;
        py::object dx = py::none(), dcoeffs = py::none();
        if (need_dx) dx = reader_.empty_like(x, in.view, in.n, a.dx);
        void* to = nullptr;
        if (need_dots) dcoeffs = reader_.empty_like(coeffs, c, c.last(), to);
        {
            const std::optional<py::gil_scoped_release> unlocked = unlock(in);
            run.backward(a);
        }
        for (int k = 0; k < a.gains.count && need_dots; ++k) {
            if (c.dtype == kFloat64)
                static_cast<double*>(to)[k] = dots[k];
            else
                static_cast<float*>(to)[k] = static_cast<float>(dots[k]);
        }
        return py::make_tuple(std::move(dx), std::move(dcoeffs));
    }

 private:
    int paid(int threads, const Tokens& in) const {
        check_threads(threads);
        return in.m * in.n < threads_pay_from_ / kTerms ? 1 : threads;
    }

    static std::optional<py::gil_scoped_release> unlock(const Tokens& in) {
        if (in.m * in.n < kUnlockFrom) return std::nullopt;
        return std::optional<py::gil_scoped_release>(std::in_place);
    }

    bool read_tokens(py::handle tensor, Tokens& tokens) const {
        View& view = tokens.view;
        if (!reader_.read(tensor, view) || view.ndim < 1 || view.stride(view.ndim - 1) != 1) return false;
        tokens.m = 1, tokens.n = tokens.row_stride = view.last();
        for (int axis = view.ndim - 2; axis >= 0; --axis) {
            if (view.shape[axis] == 1) continue;
            if (tokens.m == 1) tokens.row_stride = view.strides[axis];
            if (view.strides[axis] != tokens.row_stride * tokens.m) return false;
            tokens.m *= view.shape[axis];
        }
        return true;
    }

    // K vectors [N] of one dtype as matrices of one row.
    bool read_list(const Tensors& tensors, int64_t size, Genes& genes) const {
        if (tensors.count > kMaxGenes) return false;
        for (size_t k = 0; k < tensors.count; ++k) {
            View gene;
            if (!reader_.read(tensors[k], gene) || gene.ndim != 1 || gene.last() != size) return false;
            if (k && gene.dtype != genes.dtype) return false;
            genes.dtype = gene.dtype;
            genes.matrix[k] = {gene.data, 0, gene.stride(0)};
        }
        genes.count = static_cast<int>(tensors.count);
        return true;
    }

    // Gains, perhaps biases, and the coefficients of both in the work dtype.
    bool read_vectors(const Tokens& in, const Tensors& gain_list, const Tensors& bias_list, py::handle coeffs,
                      Genes& gains, Genes& biases, View& c) const {
        if (!read_list(gain_list, in.n, gains) || !gains.count) return false;
        if (!read_list(bias_list, in.n, biases)) return false;
        if (kind_ != kLayerNorm && biases.count) return false;
        if (kind_ == kRmsNormGainLast && in.view.dtype == kFloat64) return false;  // it would work in float32
        if (biases.count && (biases.count != gains.count || biases.dtype != gains.dtype)) return false;
        if (!reader_.read(coeffs, c) || c.ndim != 1 || c.last() != gains.count || c.stride(0) != 1) return false;
        gains.coeffs = biases.coeffs = c.data;
        return c.dtype == work(gains.dtype) && work(in.view.dtype) == work(gains.dtype);
    }

    bool read_buffers(const Tensors& buffers, const Genes& genes, const View& c, int64_t size, GeneGrads& grads,
                      bool& any) const {
        if (buffers.count != static_cast<size_t>(genes.count)) return false;
        for (int k = 0; k < genes.count; ++k) {
            View buffer;
            grads.buffer[k] = nullptr, grads.buffer_stride[k] = size, grads.fresh[k] = false;
            if (buffers[k].is_none()) continue;
            if (!reader_.read(buffers[k], buffer) || buffer.ndim != 1 || buffer.last() != size ||
                buffer.dtype != c.dtype || !buffer.contiguous())
                return false;
            grads.buffer[k] = buffer.data;
            any = true;
        }
        return true;
    }

    const int64_t threads_pay_from_;
    const TensorReader reader_;
    const int kind_;
};

}  // namespace

void bind_expansion_norm(py::module_& parent) {
    py::module_ module =
        parent.def_submodule("expansion_norm", "y = (x - mean) / sqrt(var + eps) * g + b, and RMS norms");
    using py::arg;
    module.def(
        "workspace", [](int64_t m, int64_t n, int64_t size) { return pieces(m, n, size) * 2 * n * size; },
        "Bytes that a backward pass of tokens [M, N] holds inside, in a work dtype of so many bytes.", arg("tokens"),
        arg("columns"), arg("itemsize"));
    py::class_<NormCalls>(module, "Calls", "Norms of tensors; None where they need to be looked at.")
        .def(py::init<int64_t, const py::capsule&, py::tuple, int>(), arg("threads_pay_from"), arg("exchange"),
             arg("classes"), arg("kind") = static_cast<int>(kLayerNorm))
        .def("forward", &NormCalls::forward, arg("level"), arg("threads"), arg("x"), arg("gains"), arg("biases"),
             arg("coeffs"), arg("eps"), arg("keep"))
        .def("backward", &NormCalls::backward, arg("level"), arg("threads"), arg("dy"), arg("x"), arg("moments"),
             arg("gains"), arg("biases"), arg("coeffs"), arg("buffers"), arg("bias_buffers"), arg("need_dx"),
             arg("need_dots"));
}

}  // namespace pylearngene
