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

// Double goes with double only: it is the one dtype with another work dtype.
inline void check_pair(const char* name, int dtype, const char* gene_name, int gene_dtype) {
    check_dtype(name, dtype);
    check_dtype(gene_name, gene_dtype);
    if ((dtype == kFloat64) != (gene_dtype == kFloat64))
        refuse(name, std::string("float64 exactly where ") + gene_name + " is", std::to_string(dtype));
}

inline void check_size(const char* name, int64_t size) {
    if (size < 0) refuse(name, "at least 0", std::to_string(size));
}

inline void check_threads(int threads) {
    if (threads < 1) refuse("threads", "at least 1", std::to_string(threads));
}

// An address as pointer; null is refused unless the tensor has no elements.
template <class T = void>
T* pointer(const char* name, uintptr_t address, bool empty) {
    if (!address && !empty) refuse(name, "an address", "0");
    return reinterpret_cast<T*>(address);
}

// Item j of a tuple as integer. Raw, because a call on small matrices is mostly argument conversion.
template <class Int>
Int tuple_int(const char* name, PyObject* tuple, Py_ssize_t j, Py_ssize_t length) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != length)
        refuse(name, "tuples of " + std::to_string(length) + " integers", Py_TYPE(tuple)->tp_name);
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, j));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<Int>(value);
}

}  // namespace pylearngene
