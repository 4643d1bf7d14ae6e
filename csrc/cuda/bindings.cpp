// SPDX-License-Identifier: Apache-2.0
// The optional module pylearngene._cuda: checks of sizes, dtypes and list lengths, then the kernels on a GPU. It takes
// addresses, sizes, strides, a device and a stream; it knows nothing of torch, allocates nothing and waits for nothing.
// It has the CUDA runtime inside and needs no driver to be imported.

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../checks.h"
#include "expansion.cuh"

namespace pylearngene {

namespace {

using Address = uintptr_t;

// An error of the runtime as exception: what was called, what is wrong, and the name to search for.
void check(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the runtime would report it once more at the next launch
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                             ")");
}

// Makes a device the current one of this thread, and the former one afterwards.
class DeviceGuard {
 public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device == before_) return;
        check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    // The same as the destructor, with the error as exception.
    void restore() {
        if (changed_) check(cudaSetDevice(before_), "cudaSetDevice");
        changed_ = false;
    }

 private:
    int before_ = 0;
    bool changed_ = false;
};

// How many devices there are or, in words, why they cannot be counted.
py::tuple devices() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess) return py::make_tuple(count, "");
    cudaGetLastError();
    return py::make_tuple(0, std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")");
}

void check_product(int x_dtype, int gene_dtype, int64_t m, int64_t i, int64_t o) {
    check_dtype("x_dtype", x_dtype);
    check_dtype("gene_dtype", gene_dtype);
    if (!gpu::rows_forward_takes(x_dtype, gene_dtype))
        refuse("gene_dtype", "float32, or 16 bits as x or beside float32", std::to_string(gene_dtype));
    check_size("M", m);
    check_size("I", i);
    check_size("O", o);
    if (m > gpu::kMostTokens) refuse("M", "at most " + std::to_string(gpu::kMostTokens), std::to_string(m));
}

// list: K of (address, row stride, column stride), each [O, I] with contiguous rows
void read_genes(gpu::RowsForward& a, const py::list& list) {
    const size_t count = list.size();
    if (count < 1 || count > gpu::kMostGenes)
        refuse("genes", "1 to " + std::to_string(gpu::kMostGenes), std::to_string(count));
    a.genes = static_cast<int>(count);
    for (size_t k = 0; k < count; ++k) {
        PyObject* item = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(k));
        a.gene[k] = pointer("genes", tuple_int<Address>("genes", item, 0, 3), !a.o || !a.i);
        a.gene_stride[k] = tuple_int<int64_t>("genes", item, 1, 3);
        int64_t column_stride = tuple_int<int64_t>("genes", item, 2, 3);
        check_strides("genes", a.o, a.i, itemsize(a.gene_dtype), a.gene_stride[k], column_stride);
        if (column_stride != 1) refuse("genes", "column stride 1", std::to_string(column_stride));
    }
}

// list: K of (address, stride), each [O], or none
void read_bias_genes(gpu::RowsForward& a, const py::list& list, int dtype) {
    if (!list.size()) return;
    if (a.bias) refuse("bias_genes", "an empty list beside a bias", std::to_string(list.size()));
    if (list.size() != static_cast<size_t>(a.genes))
        refuse("bias_genes", std::to_string(a.genes) + " (one per gene)", std::to_string(list.size()));
    check_dtype("bias_dtype", dtype);
    if (dtype == kFloat64) refuse("bias_dtype", "float32 or 16 bits", std::to_string(dtype));
    for (int k = 0; k < a.genes; ++k) {
        PyObject* item = PyList_GET_ITEM(list.ptr(), k);
        a.bias_gene[k] = pointer("bias_genes", tuple_int<Address>("bias_genes", item, 0, 2), !a.o);
        a.bias_gene_stride[k] = tuple_int<int64_t>("bias_genes", item, 1, 2);
        check_rows("bias_genes", a.o, 1, itemsize(dtype), a.bias_gene_stride[k]);
    }
    a.bias_dtype = dtype;
}

void rows_forward(int device, Address stream, Address y, Address x, int x_dtype, int64_t m, int64_t i, int64_t o,
                  int64_t x_row_stride, int64_t y_row_stride, const py::list& genes, int gene_dtype, Address coeffs,
                  Address bias, const py::list& bias_genes, int bias_dtype) {
    if (device < 0) refuse("device", "at least 0", std::to_string(device));
    check_product(x_dtype, gene_dtype, m, i, o);
    gpu::RowsForward a = {};
    a.x_dtype = x_dtype, a.gene_dtype = gene_dtype;
    a.m = static_cast<int>(m), a.i = i, a.o = o;
    read_genes(a, genes);
    a.coeffs = pointer<const float>("coeffs", coeffs, false);
    check_rows("x", m, i, itemsize(x_dtype), x_row_stride);
    check_output("y", m, o, itemsize(x_dtype), y_row_stride);
    a.x = pointer("x", x, !m || !i);
    a.y = pointer("y", y, !m || !o);
    a.x_stride = x_row_stride, a.y_stride = y_row_stride;
    a.bias = pointer("bias", bias, true);
    read_bias_genes(a, bias_genes, bias_dtype);
    if (!m || !o) return;
    py::gil_scoped_release release;
    DeviceGuard guard(device);
    const auto run = x_dtype == kFloat32    ? pylearngene_rows_forward_FLOAT32
                     : x_dtype == kBFloat16 ? pylearngene_rows_forward_BFLOAT16
                                            : pylearngene_rows_forward_FLOAT16;
    check(run(a, reinterpret_cast<cudaStream_t>(stream)), "rows_forward");
    guard.restore();
}

}  // namespace

void bind_cuda(py::module_& module) {
    using py::arg;
    module.attr("version") = PYLEARNGENE_VERSION;
    module.attr("runtime") = CUDART_VERSION;
    module.def("devices", &devices, "The number of devices, and why they cannot be counted or nothing.");
    py::module_ expansion = module.def_submodule("expansion", "W[o, i] = sum_k coeffs[k] * genes[k][o, i]");
    expansion.attr("most_genes") = gpu::kMostGenes;
    expansion.attr("most_tokens") = gpu::kMostTokens;
    expansion.def(
        "takes", [](int x_dtype, int gene_dtype) { return gpu::rows_forward_takes(x_dtype, gene_dtype); },
        arg("x_dtype"), arg("gene_dtype"), "Whether there are kernels for x of one dtype and genes of another.");
    expansion.def("rows_forward", &rows_forward, arg("device"), arg("stream"), arg("y"), arg("x"), arg("x_dtype"),
                  arg("M"), arg("I"), arg("O"), arg("x_row_stride"), arg("y_row_stride"), arg("genes"),
                  arg("gene_dtype"), arg("coeffs"), arg("bias"), arg("bias_genes"), arg("bias_dtype"));
}

}  // namespace pylearngene

PYBIND11_MODULE(_cuda, module, pybind11::mod_gil_not_used()) {
    module.doc() = "CUDA kernels of pylearngene.";
    pylearngene::bind_cuda(module);
}
