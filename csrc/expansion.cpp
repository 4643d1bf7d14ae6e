// SPDX-License-Identifier: Apache-2.0
// The submodule _C.expansion: checks of sizes, dtypes and list lengths, then the kernels of the asked level.
// They run without the interpreter lock. The arithmetic is in cpu/expansion.cpp.

#include "expansion.h"

#include "checks.h"
#include "expansion_calls.h"

namespace pylearngene {

namespace {

using Address = uintptr_t;

const ExpansionKernels& kernels(int level) {
    static const ExpansionKernels* const table[] = {
        &pylearngene_expansion_DEFAULT,
#if PYLEARNGENE_LEVELS > 1
        &pylearngene_expansion_AVX2,
        &pylearngene_expansion_AVX512,
        &pylearngene_expansion_AVX512_BF16,
#endif
    };
    check_level(level);
    return *table[level];
}

// list: K of (address, row stride, column stride), each [rows, cols]
void read_genes(Genes& genes, const char* name, const py::list& list, int dtype, Address coeffs, int64_t rows,
                int64_t cols) {
    const size_t count = list.size();
    if (count < 1 || count > kMaxGenes) refuse(name, "1 to " + std::to_string(kMaxGenes), std::to_string(count));
    genes.count = static_cast<int>(count);
    genes.dtype = dtype;
    genes.coeffs = pointer("coeffs", coeffs, false);
    for (size_t k = 0; k < count; ++k) {
        PyObject* item = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(k));
        Matrix& matrix = genes.matrix[k];
        matrix.data = pointer(name, tuple_int<Address>(name, item, 0, 3), !rows || !cols);
        matrix.row_stride = tuple_int<int64_t>(name, item, 1, 3);
        matrix.column_stride = tuple_int<int64_t>(name, item, 2, 3);
        check_strides(name, rows, cols, itemsize(dtype), matrix.row_stride, matrix.column_stride);
    }
}

// buffers: K of (address or 0, row stride), each [rows, cols]
void read_grads(GeneGrads& grads, const py::list& buffers, Address dots, const Genes& genes, int64_t rows,
                int64_t cols) {
    const int count = genes.count;
    if (buffers.size() != static_cast<size_t>(count))
        refuse("buffers", std::to_string(count) + " (one per gene)", std::to_string(buffers.size()));
    for (int k = 0; k < count; ++k) {
        PyObject* item = PyList_GET_ITEM(buffers.ptr(), k);
        grads.buffer[k] = pointer("buffers", tuple_int<Address>("buffers", item, 0, 2), true);
        grads.buffer_stride[k] = tuple_int<int64_t>("buffers", item, 1, 2);
        if (!grads.buffer[k]) grads.buffer_stride[k] = cols;
        grads.fresh[k] = false;
        check_output("buffers", rows, cols, itemsize(work(genes.dtype)), grads.buffer_stride[k]);
    }
    int64_t stride = count;
    check_rows("dots", rows, count, sizeof(double), stride);
    grads.dots = pointer<double>("dots", dots, true);
}

void synthesize(int level, int threads, Address dst, int dst_dtype, int64_t rows, int64_t cols, int64_t dst_row_stride,
                const py::list& genes, int gene_dtype, Address coeffs) {
    const ExpansionKernels& run = kernels(level);
    check_threads(threads);
    check_pair("dst_dtype", dst_dtype, "gene_dtype", gene_dtype);
    check_size("rows", rows);
    check_size("cols", cols);
    Synthesize a;
    read_genes(a.genes, "genes", genes, gene_dtype, coeffs, rows, cols);
    check_output("dst", rows, cols, itemsize(dst_dtype), dst_row_stride);
    a.dst = pointer("dst", dst, !rows || !cols);
    a.dst_dtype = dst_dtype;
    a.rows = rows, a.cols = cols, a.dst_row_stride = dst_row_stride;
    a.threads = threads;
    py::gil_scoped_release release;
    run.synthesize(a);
}

// dst: L of (address, row stride)
void synthesize_stack(int level, int threads, const py::list& dst, int dst_dtype, int64_t rows, int64_t cols, bool add,
                      const py::list& genes, int gene_dtype, Address coeffs) {
    const ExpansionKernels& run = kernels(level);
    check_threads(threads);
    check_pair("dst_dtype", dst_dtype, "gene_dtype", gene_dtype);
    check_size("rows", rows);
    check_size("cols", cols);
    if (add && dst_dtype > kFloat64) refuse("dst_dtype", "0 or 1 where the sum is added", std::to_string(dst_dtype));
    SynthesizeStack a;
    read_genes(a.genes, "genes", genes, gene_dtype, coeffs, rows, cols);
    for (int k = 0; k < a.genes.count; ++k)
        if (a.genes.matrix[k].column_stride != 1)
            refuse("genes", "column stride 1", std::to_string(a.genes.matrix[k].column_stride));
    const size_t layers = dst.size();
    if (layers < 1 || layers > kMaxLayers) refuse("dst", "1 to " + std::to_string(kMaxLayers), std::to_string(layers));
    for (size_t l = 0; l < layers; ++l) {
        PyObject* item = PyList_GET_ITEM(dst.ptr(), static_cast<Py_ssize_t>(l));
        a.dst[l] = pointer("dst", tuple_int<Address>("dst", item, 0, 2), !rows || !cols);
        a.dst_stride[l] = tuple_int<int64_t>("dst", item, 1, 2);
        check_output("dst", rows, cols, itemsize(dst_dtype), a.dst_stride[l]);
    }
    a.layers = static_cast<int>(layers);
    a.add = add;
    a.dst_dtype = dst_dtype;
    a.rows = rows, a.cols = cols;
    a.threads = threads;
    py::gil_scoped_release release;
    run.synthesize_stack(a);
}

void rows_forward(int level, int threads, Address y, Address x, int x_dtype, int64_t m, int64_t i, int64_t o,
                  int64_t x_row_stride, int64_t y_row_stride, const py::list& genes, int gene_dtype, Address coeffs,
                  Address bias, const py::list& bias_genes, int bias_dtype) {
    const ExpansionKernels& run = kernels(level);
    check_threads(threads);
    check_pair("x_dtype", x_dtype, "gene_dtype", gene_dtype);
    check_size("M", m);
    check_size("I", i);
    check_size("O", o);
    RowsForward a;
    read_genes(a.genes, "genes", genes, gene_dtype, coeffs, o, i);
    a.bias_genes.count = 0;
    a.bias = pointer("bias", bias, true);
    a.bias_dtype = bias_dtype;
    if (bias || bias_genes.size()) check_pair("bias_dtype", bias_dtype, "gene_dtype", gene_dtype);
    if (bias && bias_genes.size())
        refuse("bias_genes", "an empty list beside a bias", std::to_string(bias_genes.size()));
    if (bias_genes.size()) {
        if (bias_genes.size() != genes.size())
            refuse("bias_genes", std::to_string(genes.size()) + " (one per gene)", std::to_string(bias_genes.size()));
        read_genes(a.bias_genes, "bias_genes", bias_genes, bias_dtype, coeffs, o, 1);
    }
    check_rows("x", m, i, itemsize(x_dtype), x_row_stride);
    check_output("y", m, o, itemsize(x_dtype), y_row_stride);
    a.x = pointer("x", x, !m || !i);
    a.y = pointer("y", y, !m || !o);
    a.x_dtype = x_dtype;
    a.m = m, a.i = i, a.o = o, a.x_row_stride = x_row_stride, a.y_row_stride = y_row_stride;
    a.threads = threads;
    if (!m || !o) return;
    py::gil_scoped_release release;
    run.rows_forward(a);
}

void rows_dx(int level, int threads, Address dx, Address dy, int dy_dtype, int64_t m, int64_t i, int64_t o,
             int64_t dy_row_stride, int64_t dx_row_stride, const py::list& genes, int gene_dtype, Address coeffs) {
    const ExpansionKernels& run = kernels(level);
    check_threads(threads);
    check_pair("dy_dtype", dy_dtype, "gene_dtype", gene_dtype);
    check_size("M", m);
    check_size("I", i);
    check_size("O", o);
    RowsDx a;
    read_genes(a.genes, "genes", genes, gene_dtype, coeffs, o, i);
    check_rows("dy", m, o, itemsize(dy_dtype), dy_row_stride);
    check_output("dx", m, i, itemsize(dy_dtype), dx_row_stride);
    a.dy = pointer("dy", dy, !m || !o);
    a.dx = pointer("dx", dx, !m || !i);
    a.dy_dtype = dy_dtype;
    a.m = m, a.i = i, a.o = o, a.dy_row_stride = dy_row_stride, a.dx_row_stride = dx_row_stride;
    a.threads = threads;
    if (!m || !i) return;
    py::gil_scoped_release release;
    run.rows_dx(a);
}

void accumulate(int level, int threads, Address dw, int dw_dtype, int64_t rows, int64_t cols, int64_t dw_row_stride,
                const py::list& genes, int gene_dtype, Address coeffs, const py::list& buffers, Address dots) {
    const ExpansionKernels& run = kernels(level);
    check_threads(threads);
    check_pair("dw_dtype", dw_dtype, "gene_dtype", gene_dtype);
    check_size("rows", rows);
    check_size("cols", cols);
    Accumulate a;
    read_genes(a.genes, "genes", genes, gene_dtype, coeffs, rows, cols);
    read_grads(a.grads, buffers, dots, a.genes, rows, cols);
    check_rows("dw", rows, cols, itemsize(dw_dtype), dw_row_stride);
    a.dw = pointer("dw", dw, !rows || !cols);
    a.dw_dtype = dw_dtype;
    a.rows = rows, a.cols = cols, a.dw_row_stride = dw_row_stride;
    a.threads = threads;
    if (!rows || (!cols && !dots)) return;
    py::gil_scoped_release release;
    run.accumulate(a);
}

void rows_wgrad(int level, int threads, Address dy, Address x, int x_dtype, int64_t m, int64_t i, int64_t o,
                int64_t dy_row_stride, int64_t x_row_stride, const py::list& genes, int gene_dtype, Address coeffs,
                const py::list& buffers, Address dots) {
    const ExpansionKernels& run = kernels(level);
    check_threads(threads);
    check_pair("x_dtype", x_dtype, "gene_dtype", gene_dtype);
    check_size("M", m);
    check_size("I", i);
    check_size("O", o);
    RowsWgrad a;
    read_genes(a.genes, "genes", genes, gene_dtype, coeffs, o, i);
    read_grads(a.grads, buffers, dots, a.genes, o, i);
    check_rows("dy", m, o, itemsize(x_dtype), dy_row_stride);
    check_rows("x", m, i, itemsize(x_dtype), x_row_stride);
    a.dy = pointer("dy", dy, !m || !o);
    a.x = pointer("x", x, !m || !i);
    a.x_dtype = x_dtype;
    a.m = m, a.i = i, a.o = o, a.dy_row_stride = dy_row_stride, a.x_row_stride = x_row_stride;
    a.threads = threads;
    if (!o || (!i && !dots)) return;
    py::gil_scoped_release release;
    run.rows_wgrad(a);
}

// sums: [O] in the work dtype of dy
void column_sums(int level, int threads, Address sums, Address dy, int dy_dtype, int64_t m, int64_t o,
                 int64_t dy_row_stride) {
    const ExpansionKernels& run = kernels(level);
    check_threads(threads);
    check_dtype("dy_dtype", dy_dtype);
    check_size("M", m);
    check_size("O", o);
    ColumnSums a;
    check_rows("dy", m, o, itemsize(dy_dtype), dy_row_stride);
    a.dy = pointer("dy", dy, !m || !o);
    a.sums = pointer("sums", sums, !o);
    a.dy_dtype = dy_dtype;
    a.m = m, a.o = o, a.dy_row_stride = dy_row_stride;
    a.threads = threads;
    py::gil_scoped_release release;
    run.column_sums(a);
}

}  // namespace

void bind_expansion(py::module_& parent) {
    py::module_ module = parent.def_submodule("expansion", "W[o, i] = sum_k coeffs[k] * genes[k][o, i]");
    using py::arg;
    module.def("synthesize", &synthesize, arg("level"), arg("threads"), arg("dst"), arg("dst_dtype"), arg("rows"),
               arg("cols"), arg("dst_row_stride"), arg("genes"), arg("gene_dtype"), arg("coeffs"));
    module.def("synthesize_stack", &synthesize_stack, arg("level"), arg("threads"), arg("dst"), arg("dst_dtype"),
               arg("rows"), arg("cols"), arg("add"), arg("genes"), arg("gene_dtype"), arg("coeffs"));
    module.def("rows_forward", &rows_forward, arg("level"), arg("threads"), arg("y"), arg("x"), arg("x_dtype"),
               arg("M"), arg("I"), arg("O"), arg("x_row_stride"), arg("y_row_stride"), arg("genes"), arg("gene_dtype"),
               arg("coeffs"), arg("bias"), arg("bias_genes"), arg("bias_dtype"));
    module.def("rows_dx", &rows_dx, arg("level"), arg("threads"), arg("dx"), arg("dy"), arg("dy_dtype"), arg("M"),
               arg("I"), arg("O"), arg("dy_row_stride"), arg("dx_row_stride"), arg("genes"), arg("gene_dtype"),
               arg("coeffs"));
    module.def("accumulate", &accumulate, arg("level"), arg("threads"), arg("dw"), arg("dw_dtype"), arg("rows"),
               arg("cols"), arg("dw_row_stride"), arg("genes"), arg("gene_dtype"), arg("coeffs"), arg("buffers"),
               arg("dots"));
    module.def("rows_wgrad", &rows_wgrad, arg("level"), arg("threads"), arg("dy"), arg("x"), arg("x_dtype"), arg("M"),
               arg("I"), arg("O"), arg("dy_row_stride"), arg("x_row_stride"), arg("genes"), arg("gene_dtype"),
               arg("coeffs"), arg("buffers"), arg("dots"));
    module.def("column_sums", &column_sums, arg("level"), arg("threads"), arg("sums"), arg("dy"), arg("dy_dtype"),
               arg("M"), arg("O"), arg("dy_row_stride"));
    bind_expansion_calls(module, kernels);
}

}  // namespace pylearngene
