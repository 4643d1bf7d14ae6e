// SPDX-License-Identifier: Apache-2.0
// Argument checks and level choice shared by the bindings of all primitives. Messages name the argument, what was
// expected and what came. Tensors are checked in Python; here only what could lead to a wrong memory access.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <string>

#include "expansion.h"

namespace pylearngene {

namespace py = pybind11;

// In the order of the `level` argument; a build for another processor has the first one alone.
constexpr const char* kLevelNames[] = {"DEFAULT", "AVX2", "AVX512", "AVX512_BF16"};
constexpr int kLevels = PYLEARNGENE_LEVELS;

// No address space is larger. Offsets of fewer bytes can be added, and read ahead of, without overflow.
constexpr int64_t kMemory = int64_t{1} << 57;
constexpr int kMostThreads = 4096;

inline bool level_supported(int level) {
#if PYLEARNGENE_LEVELS > 1
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (level == 1) return avx2;
    if (level == 2) return avx512;
    if (level == 3) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return level == 0;
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& expected, const std::string& got) {
    throw py::value_error(name + ": expected " + expected + ", got " + got);
}

inline void check_level(int level) {
    static const bool supported[] = {true, level_supported(1), level_supported(2), level_supported(3)};
    if (level < 0 || level >= kLevels) refuse("level", "0 to " + std::to_string(kLevels - 1), std::to_string(level));
    if (!supported[level]) refuse("level", "one this processor can run", kLevelNames[level]);
}

inline void check_dtype(const char* name, int dtype) {
    if (dtype < 0 || dtype >= kDTypes) refuse(name, "0 to 3", std::to_string(dtype));
}

inline int64_t itemsize(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Double goes with double only: it is the one dtype with another work dtype.
inline void check_pair(const char* name, int dtype, const char* gene_name, int gene_dtype) {
    check_dtype(name, dtype);
    check_dtype(gene_name, gene_dtype);
    if ((dtype == kFloat64) != (gene_dtype == kFloat64))
        refuse(name, std::string("float64 exactly where ") + gene_name + " is", std::to_string(dtype));
}

inline void check_size(const char* name, int64_t size) {
    if (size < 0) refuse(name, "at least 0", std::to_string(size));
    if (size >= kMemory) refuse(name, "less than 2^57", std::to_string(size));
}

inline void check_threads(int threads) {
    if (threads < 1) refuse("threads", "at least 1", std::to_string(threads));
    if (threads > kMostThreads) refuse("threads", "at most " + std::to_string(kMostThreads), std::to_string(threads));
}

// The strides of a matrix [rows, cols], in elements, as kernels may follow them. Those of axes with one index or none
// say nothing, and torch lets them be anything: they are replaced.
inline void check_strides(const char* name, int64_t rows, int64_t cols, int64_t itemsize, int64_t& row_stride,
                          int64_t& column_stride) {
    if (rows < 2 || cols < 1) row_stride = 0;
    if (cols < 2 || rows < 1) column_stride = 1;
    if (row_stride < 0) refuse(name, "strides of at least 0", std::to_string(row_stride));
    if (column_stride < 0) refuse(name, "strides of at least 0", std::to_string(column_stride));
    int64_t down, along, bytes;
    if (__builtin_mul_overflow(rows, row_stride, &down) || __builtin_mul_overflow(cols, column_stride, &along) ||
        __builtin_add_overflow(down, along, &bytes) || __builtin_mul_overflow(bytes, itemsize, &bytes) ||
        bytes >= kMemory)
        refuse(name, "less than 2^57 bytes",
               std::to_string(rows) + " x " + std::to_string(cols) + " with strides " + std::to_string(row_stride) +
                   " and " + std::to_string(column_stride));
}

// The same for a matrix with contiguous rows.
inline void check_rows(const char* name, int64_t rows, int64_t cols, int64_t itemsize, int64_t& row_stride) {
    int64_t column_stride = 1;
    check_strides(name, rows, cols, itemsize, row_stride, column_stride);
}

// The same for one that is written, whose rows must lie apart.
inline void check_output(const char* name, int64_t rows, int64_t cols, int64_t itemsize, int64_t& row_stride) {
    check_rows(name, rows, cols, itemsize, row_stride);
    if (rows > 1 && row_stride < cols)
        refuse(name, "a row stride of at least " + std::to_string(cols), std::to_string(row_stride));
}

// An address as pointer, of any alignment; null is refused unless the tensor has no elements.
template <class T = void>
T* pointer(const char* name, uintptr_t address, bool empty) {
    if ((!address && !empty) || address >= static_cast<uintptr_t>(kMemory))
        refuse(name, "an address", std::to_string(address));
    return reinterpret_cast<T*>(address);
}

// Item j of a tuple as integer. Raw, because a call on small matrices is mostly argument conversion; nothing but an int
// is converted, so that no code of the caller runs while the list is read.
template <class Int>
Int tuple_int(const char* name, PyObject* tuple, Py_ssize_t j, Py_ssize_t length) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != length)
        refuse(name, "tuples of " + std::to_string(length) + " integers", Py_TYPE(tuple)->tp_name);
    PyObject* item = PyTuple_GET_ITEM(tuple, j);
    if (!PyLong_Check(item)) refuse(name, "integers in its tuples", Py_TYPE(item)->tp_name);
    const long long value = PyLong_AsLongLong(item);
    if (value == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        refuse(name, "integers of 64 bits in its tuples", "a larger one");
    }
    return static_cast<Int>(value);
}

}  // namespace pylearngene
