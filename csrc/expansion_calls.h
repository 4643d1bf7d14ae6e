// SPDX-License-Identifier: Apache-2.0
// The products of the regime `rows`, and single weights, on tensors instead of addresses: one call reads the tensors,
// has the result made by torch and runs the kernel. Nothing is kept between calls. Where a tensor is unusual, or
// tensors do not fit each other, nothing is done and the answer is None: Python then checks and names them.
#pragma once

#include <memory>
#include <optional>

#include "expansion.h"
#include "tensors.h"

namespace pylearngene {

using KernelsOf = const ExpansionKernels& (*)(int level);

// Lets other threads of Python run meanwhile, where the work is longer than it takes to let them.
struct Unlocked {
    Unlocked(int64_t rows, int64_t cols, int64_t terms) {
        if (rows * cols >= kWorth / terms) release.emplace();
    }

    static constexpr int64_t kWorth = 1 << 14;
    std::optional<py::gil_scoped_release> release;
};

class ExpansionCalls {
 public:
    ExpansionCalls(KernelsOf kernels, int64_t threads_pay_from, const py::capsule& exchange, py::tuple classes)
        : kernels_(kernels), threads_pay_from_(threads_pay_from), reader_(exchange, std::move(classes)) {}

    // y = x W^T + b for at most `most` tokens; b is a tensor [O], or made of bias genes, or neither.
    py::object forward(int level, int threads, int64_t most, py::handle x, py::handle gene_list, py::handle coeffs,
                       py::handle bias, py::handle bias_gene_list) const {
        const ExpansionKernels& run = kernels_(level);
        const Tensors genes(gene_list), bias_genes(bias_gene_list);
        RowsForward a;
        View gene, in, b;
        std::unique_ptr<char[]> made;
        if (!read_tokens(x, most, in, a.m, a.x_row_stride)) return py::none();
        if (!read_matrices(genes, coeffs, a.genes, gene, a.o, a.i) || !fits(in, gene, a.i)) return py::none();
        a.x = in.data, a.x_dtype = a.bias_dtype = in.dtype;
        a.bias = nullptr, a.bias_genes.count = 0;
        if (bias_genes.count) {
            made = sum_vectors(run, bias_genes, a.genes, a.o, in.dtype);
            if (!made || !bias.is_none()) return py::none();
            a.bias = made.get();
        } else if (!bias.is_none()) {
            if (!reader_.read(bias, b) || b.dtype != in.dtype || b.ndim != 1 || b.last() != a.o || b.stride(0) != 1)
                return py::none();
            a.bias = b.data;
        }
        py::object y = reader_.empty_like(x, in, a.o, a.y);
        a.y_row_stride = a.o;
        a.threads = paid(threads, a.o, a.i, a.genes.count + a.m);
        const Unlocked unlocked(a.o, a.i, a.genes.count + a.m);
        run.rows_forward(a);
        return y;
    }

    // dx = dy W for at most `most` tokens.
    py::object input_gradient(int level, int threads, int64_t most, py::handle dy, py::handle gene_list,
                              py::handle coeffs) const {
        const ExpansionKernels& run = kernels_(level);
        const Tensors genes(gene_list);
        RowsDx a;
        View gene, in;
        if (!read_tokens(dy, most, in, a.m, a.dy_row_stride)) return py::none();
        if (!read_matrices(genes, coeffs, a.genes, gene, a.o, a.i) || !fits(in, gene, a.o)) return py::none();
        a.dy = in.data, a.dy_dtype = in.dtype;
        py::object dx = reader_.empty_like(dy, in, a.i, a.dx);
        a.dx_row_stride = a.i;
        a.threads = paid(threads, a.o, a.i, a.genes.count + a.m);
        const Unlocked unlocked(a.o, a.i, a.genes.count + a.m);
        run.rows_dx(a);
        return dx;
    }

    // Adds c_k dW to the sums of genes and c_k db to those of bias genes, for at most `most` tokens; and dx = dy W
    // where that is needed, else true.
    //
    // sums: those of one backward pass; None for what no layer has added to, which is made here
    // places, bias_places: per gene where its sum is among them, -1 for one that needs none
    py::object gradients(int level, int threads, int64_t most, py::handle dy, py::handle x, py::handle gene_list,
                         py::handle coeffs, py::handle places, py::handle bias_gene_list, py::handle bias_places,
                         py::handle sums, bool need_dx) const {
        const ExpansionKernels& run = kernels_(level);
        const Tensors genes(gene_list), bias_genes(bias_gene_list);
        RowsWgrad a;
        Accumulate b;
        RowsDx c;
        View gene, bias, in, from;
        int64_t tokens;
        if (!read_tokens(x, most, in, a.m, a.x_row_stride)) return py::none();
        if (!read_tokens(dy, most, from, tokens, a.dy_row_stride)) return py::none();
        if (!read_matrices(genes, coeffs, a.genes, gene, a.o, a.i)) return py::none();
        if (!fits(in, gene, a.i) || !fits(from, gene, a.o)) return py::none();
        if (a.m != tokens || in.dtype != from.dtype) return py::none();
        if (bias_genes.count && !read_vectors(bias_genes, a.genes, a.o, in.dtype, b.genes, bias)) return py::none();
        Sums own(sums, places, a.genes.count), bias_own(sums, bias_places, bias_genes.count ? a.genes.count : 0);
        if (!read_sums(own, gene, a.grads) || !read_sums(bias_own, bias, b.grads)) return py::none();
        a.dy = from.data, a.x = in.data, a.x_dtype = in.dtype;
        a.threads = paid(threads, a.o, a.i, 2 * a.genes.count + a.m);
        py::object dx = py::bool_(true);
        if (need_dx) {
            c.genes = a.genes, c.dy = a.dy, c.dy_dtype = from.dtype;
            c.m = a.m, c.i = a.i, c.o = a.o, c.dy_row_stride = a.dy_row_stride, c.dx_row_stride = a.i;
            c.threads = paid(threads, a.o, a.i, a.genes.count + a.m);
            dx = reader_.empty_like(dy, from, a.i, c.dx);
        }
        make_sums(own, coeffs, gene, a.grads);
        make_sums(bias_own, coeffs, bias, b.grads);
        {
            const Unlocked unlocked(a.o, a.i, 2 * a.genes.count + a.m);
            if (need_dx) run.rows_dx(c);
            if (own.wanted) run.rows_wgrad(a);
            if (bias_own.wanted) add_bias(run, a, b, threads);
        }
        own.put();
        bias_own.put();
        return dx;
    }

    // W in the shape and dtype of its genes, matrices or vectors.
    py::object weight(int level, int threads, py::handle gene_list, py::handle coeffs) const {
        const ExpansionKernels& run = kernels_(level);
        const Tensors genes(gene_list);
        Synthesize a;
        View gene;
        if (!read(genes, coeffs, a.genes, gene) || gene.ndim > 2) return py::none();
        a.rows = gene.ndim == 2 ? gene.shape[0] : 1, a.cols = a.dst_row_stride = gene.last();
        a.dst_dtype = gene.dtype;
        py::object w = reader_.empty_like(genes[0], gene, a.cols, a.dst);
        a.threads = paid(threads, a.rows, a.cols, a.genes.count);
        const Unlocked unlocked(a.rows, a.cols, a.genes.count);
        run.synthesize(a);
        return w;
    }

 private:
    int paid(int threads, int64_t rows, int64_t cols, int64_t terms) const {
        check_threads(threads);
        return rows * cols < threads_pay_from_ / terms ? 1 : threads;
    }

    // Sums of some genes among those of a backward pass, which are kept alive.
    struct Sums {
        Sums(py::handle from, py::handle at, int genes) : all(py::reinterpret_borrow<py::object>(from)), count(genes) {
            good = PyList_Check(from.ptr()) && PyList_Check(at.ptr()) && PyList_GET_SIZE(at.ptr()) == count;
            for (int k = 0; good && k < count; ++k) {
                place[k] = PyLong_AsSsize_t(PyList_GET_ITEM(at.ptr(), k));
                if (place[k] < 0) {
                    PyErr_Clear();
                    continue;
                }
                good = place[k] < PyList_GET_SIZE(from.ptr());
                if (good) sum[k] = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(from.ptr(), place[k]));
                wanted = true;
            }
        }
        // What was made is there for the next layer; called when it has been written.
        void put() {
            for (int k = 0; k < count; ++k)
                if (made[k] && PyList_SetItem(all.ptr(), place[k], sum[k].inc_ref().ptr()))
                    throw py::error_already_set();
        }

        const py::object all;
        const int count;
        Py_ssize_t place[kMaxGenes];
        py::object sum[kMaxGenes];
        bool made[kMaxGenes] = {}, wanted = false, good;
    };

    // Sums are contiguous and in the work dtype.
    bool read_sums(const Sums& sums, const View& gene, GeneGrads& grads) const {
        if (!sums.good) return false;
        View wanted = gene;
        wanted.dtype = work(gene.dtype);
        grads.dots = nullptr;
        for (int k = 0; k < sums.count; ++k) {
            View buffer;
            grads.buffer[k] = nullptr, grads.buffer_stride[k] = gene.last(), grads.fresh[k] = false;
            if (sums.place[k] < 0 || sums.sum[k].is_none()) continue;
            if (!reader_.read(sums.sum[k], buffer) || !buffer.same(wanted) || !buffer.contiguous()) return false;
            grads.buffer[k] = buffer.data;
        }
        return true;
    }

    // Memory for sums that are not there, from a tensor in the work dtype.
    void make_sums(Sums& sums, py::handle like, const View& gene, GeneGrads& grads) const {
        for (int k = 0; k < sums.count; ++k) {
            if (sums.place[k] < 0 || !sums.sum[k].is_none()) continue;
            sums.sum[k] = reader_.empty_like(like, gene, gene.last(), grads.buffer[k]);
            sums.made[k] = grads.fresh[k] = true;
        }
    }

    // b, whose panel of dW is the sum of dy over tokens.
    void add_bias(const ExpansionKernels& run, const RowsWgrad& a, Accumulate& b, int threads) const {
        const int dtype = work(a.x_dtype);
        std::unique_ptr<char[]> db(new char[a.o * itemsize(dtype)]);
        run.column_sums({a.dy, db.get(), a.x_dtype, a.m, a.o, a.dy_row_stride, paid(threads, a.o, a.m, 1)});
        b.dw = db.get(), b.dw_dtype = dtype;
        b.rows = 1, b.cols = b.dw_row_stride = a.o;
        b.threads = 1;
        run.accumulate(b);
    }

    // K tensors of one shape and dtype, and their coefficients in the work dtype; vectors are matrices of one row.
    bool read(const Tensors& tensors, py::handle coeffs, Genes& genes, View& first) const {
        View c;
        if (!read_genes(tensors, genes, first) || !reader_.read(coeffs, c)) return false;
        genes.coeffs = c.data;
        return c.ndim == 1 && c.last() == genes.count && c.stride(0) == 1 && c.dtype == work(first.dtype);
    }

    bool read_genes(const Tensors& tensors, Genes& genes, View& first) const {
        if (tensors.count < 1 || tensors.count > kMaxGenes) return false;
        for (size_t k = 0; k < tensors.count; ++k) {
            View gene;
            if (!reader_.read(tensors[k], gene) || gene.ndim < 1 || (k && !gene.same(first))) return false;
            if (!k) first = gene;
            genes.matrix[k] = {gene.data, gene.ndim > 1 ? gene.stride(0) : 0, gene.stride(gene.ndim - 1)};
        }
        genes.count = static_cast<int>(tensors.count), genes.dtype = first.dtype;
        return true;
    }

    bool read_matrices(const Tensors& tensors, py::handle coeffs, Genes& genes, View& first, int64_t& rows,
                       int64_t& cols) const {
        if (!read(tensors, coeffs, genes, first) || first.ndim != 2) return false;
        rows = first.shape[0], cols = first.shape[1];
        return true;
    }

    // Vectors that go with matrices, and have their coefficients.
    bool read_vectors(const Tensors& tensors, const Genes& matrices, int64_t size, int dtype, Genes& genes,
                      View& first) const {
        if (!read_genes(tensors, genes, first)) return false;
        genes.coeffs = matrices.coeffs;
        return genes.count == matrices.count && first.ndim == 1 && first.last() == size &&
               work(first.dtype) == work(dtype) && work(first.dtype) == work(matrices.dtype);
    }

    // At most `most` tokens [*, size] that lie evenly.
    bool read_tokens(py::handle tensor, int64_t most, View& view, int64_t& count, int64_t& row_stride) const {
        if (!reader_.read(tensor, view) || view.ndim < 1 || view.stride(view.ndim - 1) != 1) return false;
        count = 1;
        for (int axis = 0; axis < view.ndim - 1; ++axis) count *= view.shape[axis];
        row_stride = view.ndim == 2 ? view.strides[0] : view.last();
        return count <= most && (view.ndim <= 2 || view.contiguous());
    }

    static bool fits(const View& tokens, const View& gene, int64_t size) {
        return tokens.last() == size && work(tokens.dtype) == work(gene.dtype);
    }

    // The sum of bias genes, rounded to a dtype as a bias is; null where they are unusual.
    std::unique_ptr<char[]> sum_vectors(const ExpansionKernels& run, const Tensors& tensors, const Genes& matrices,
                                        int64_t size, int dtype) const {
        Synthesize a;
        View first;
        if (!read_vectors(tensors, matrices, size, dtype, a.genes, first)) return nullptr;
        std::unique_ptr<char[]> made(new char[size * itemsize(dtype)]);
        a.dst = made.get(), a.dst_dtype = dtype;
        a.rows = 1, a.cols = a.dst_row_stride = size;
        a.threads = 1;
        const Unlocked unlocked(1, size, a.genes.count);
        run.synthesize(a);
        return made;
    }

    const KernelsOf kernels_;
    const int64_t threads_pay_from_;
    const TensorReader reader_;
};

inline void bind_expansion_calls(py::module_& module, KernelsOf kernels) {
    using py::arg;
    py::class_<ExpansionCalls>(module, "Calls",
                               "Products and weights on tensors; None where they need to be looked at.")
        .def(py::init([kernels](int64_t threads_pay_from, const py::capsule& exchange, py::tuple classes) {
                 return new ExpansionCalls(kernels, threads_pay_from, exchange, std::move(classes));
             }),
             arg("threads_pay_from"), arg("exchange"), arg("classes"))
        .def("forward", &ExpansionCalls::forward, arg("level"), arg("threads"), arg("most"), arg("x"), arg("genes"),
             arg("coeffs"), arg("bias"), arg("bias_genes"))
        .def("input_gradient", &ExpansionCalls::input_gradient, arg("level"), arg("threads"), arg("most"), arg("dy"),
             arg("genes"), arg("coeffs"))
        .def("gradients", &ExpansionCalls::gradients, arg("level"), arg("threads"), arg("most"), arg("dy"), arg("x"),
             arg("genes"), arg("coeffs"), arg("places"), arg("bias_genes"), arg("bias_places"), arg("sums"),
             arg("need_dx"))
        .def("weight", &ExpansionCalls::weight, arg("level"), arg("threads"), arg("genes"), arg("coeffs"));
}

}  // namespace pylearngene
