// SPDX-License-Identifier: Apache-2.0
// Tensors of torch as they are without being built for one torch: through the exchange table of DLPack, a published C
// ABI that torch.Tensor carries as `__dlpack_c_exchange_api__`. A tensor that is in any way unusual is not read; the
// caller then goes the way through Python, which knows what to do with it or names what is wrong.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>
#include <string.h>

#include "checks.h"

namespace pylearngene {

// DLPack 1.x, as far as it is used.
namespace dlpack {
constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBFloat = 4;

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct Exchange {
    uint32_t major, minor;
    Exchange* older;
    void (*allocate)();
    void (*managed_from_object)();
    void (*managed_to_object)();
    int (*tensor_from_object)(void* object, Tensor* out);
    void (*current_stream)();
};
}  // namespace dlpack

inline PyObject* checked(PyObject* object) {
    if (!object) throw py::error_already_set();
    return object;
}

inline py::str interned(const char* name) {
    return py::reinterpret_steal<py::str>(checked(PyUnicode_InternFromString(name)));
}

inline int work(int dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

constexpr int kMostAxes = 8;

// A plain CPU tensor with elements, all of them in its storage. Sizes and strides are those of the tensor itself.
struct View {
    char* data = nullptr;
    int dtype = 0, ndim = 0;
    const int64_t *shape = nullptr, *strides = nullptr;

    int64_t last() const { return shape[ndim - 1]; }
    int64_t stride(int axis) const { return shape[axis] == 1 ? 1 : strides[axis]; }
    bool same(const View& other) const {
        if (dtype != other.dtype || ndim != other.ndim) return false;
        for (int axis = 0; axis < ndim; ++axis)
            if (shape[axis] != other.shape[axis]) return false;
        return true;
    }
    bool contiguous() const {
        int64_t expected = 1;
        for (int axis = ndim - 1; axis >= 0; expected *= shape[axis--])
            if (shape[axis] != 1 && strides[axis] != expected) return false;
        return true;
    }
};

// The items of a list or tuple, or those of a dict under the keys "0", "1", ... if these are all; of anything else
// there are none. They are kept alive: methods of torch let other threads run, which may change what held them.
struct Tensors {
    explicit Tensors(py::handle from) {
        const bool named = PyDict_Check(from.ptr());
        const Py_ssize_t size = named                       ? PyDict_GET_SIZE(from.ptr())
                                : PyList_Check(from.ptr())  ? PyList_GET_SIZE(from.ptr())
                                : PyTuple_Check(from.ptr()) ? PyTuple_GET_SIZE(from.ptr())
                                                            : 0;
        count = static_cast<size_t>(size);
        for (size_t k = 0; k < count && k < kMaxGenes; ++k) {
            items[k] =
                named ? PyDict_GetItemWithError(from.ptr(), keys()[k].ptr()) : PySequence_Fast_ITEMS(from.ptr())[k];
            if (!items[k]) items[k] = Py_None;  // it is no tensor
            Py_INCREF(items[k]);
        }
    }
    ~Tensors() {
        for (size_t k = 0; k < count && k < kMaxGenes; ++k) Py_DECREF(items[k]);
    }
    Tensors(const Tensors&) = delete;
    Tensors& operator=(const Tensors&) = delete;
    py::handle operator[](size_t k) const { return items[k]; }

    static const py::str* keys() {
        static const auto* const all = [] {
            auto* made = new py::str[kMaxGenes];  // never freed: the interpreter may be gone by then
            for (int k = 0; k < kMaxGenes; ++k) made[k] = interned(std::to_string(k).c_str());
            return made;
        }();
        return all;
    }

    PyObject* items[kMaxGenes];
    size_t count;
};

// Reads tensors whose class is one of `classes` exactly; subclasses have a behaviour of their own.
class TensorReader {
 public:
    TensorReader(const py::capsule& exchange, py::tuple classes) : classes_(std::move(classes)) {
        const char* name = exchange.name();
        if (!name || strcmp(name, dlpack::kCapsule)) refuse("exchange", dlpack::kCapsule, name ? name : "no name");
        auto* table = static_cast<const dlpack::Exchange*>(exchange.get_pointer());
        if (table->major != dlpack::kMajor || !table->tensor_from_object)
            refuse("exchange", "a table of DLPack 1 that shows tensors", std::to_string(table->major));
        tensor_from_object_ = table->tensor_from_object;
    }

    bool read(py::handle object, View& view) const {
        dlpack::Tensor t;
        if (!plain(object.ptr())) return false;
        if (tensor_from_object_(object.ptr(), &t)) return unusual();
        if (t.device_type != dlpack::kCpu || t.lanes != 1 || !t.data || t.ndim > kMostAxes) return false;
        if (t.code == dlpack::kFloat)
            view.dtype = t.bits == 32 ? kFloat32 : t.bits == 64 ? kFloat64 : t.bits == 16 ? kFloat16 : kDTypes;
        else
            view.dtype = t.code == dlpack::kBFloat && t.bits == 16 ? kBFloat16 : kDTypes;
        if (view.dtype == kDTypes) return false;
        view.data = static_cast<char*>(t.data) + t.byte_offset;
        view.ndim = t.ndim, view.shape = t.shape, view.strides = t.strides;
        return !is(object, is_neg_) && in_storage(object, view);
    }

    // New memory in the shape of a tensor but for the last size, and where it is. Sizes are given one by one, which
    // torch reads faster than a tuple.
    py::object empty_like(py::handle tensor, const View& view, int64_t last, void*& data) const {
        py::object sizes[kMostAxes];
        PyObject* arguments[kMostAxes + 1] = {tensor.ptr()};
        for (int axis = 0; axis < view.ndim; ++axis) {
            sizes[axis] = py::int_(axis < view.ndim - 1 ? view.shape[axis] : last);
            arguments[axis + 1] = sizes[axis].ptr();
        }
        py::object made = py::reinterpret_steal<py::object>(
            checked(PyObject_Vectorcall(new_empty_.ptr(), arguments, view.ndim + 1, nullptr)));
        dlpack::Tensor t;
        if (tensor_from_object_(made.ptr(), &t)) throw py::error_already_set();
        data = static_cast<char*>(t.data) + t.byte_offset;
        return made;
    }

 private:
    static bool unusual() {
        PyErr_Clear();
        return false;
    }
    bool plain(PyObject* object) const {
        for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(classes_.ptr()); ++k)
            if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(classes_.ptr(), k)) return true;
        return false;
    }

    static bool is(py::handle object, const py::object& method) {
        PyObject* value = PyObject_CallOneArg(method.ptr(), object.ptr());
        if (!value) return !unusual();
        Py_DECREF(value);
        return value == Py_True;
    }

    // Of what a call has answered, which is given up.
    static int64_t number(PyObject* value) {
        const int64_t result = value ? PyLong_AsLongLong(value) : -1;
        Py_XDECREF(value);
        if (result < 0) PyErr_Clear();
        return result;
    }

    // Sizes are bounded as well: expanded axes take no memory, but what is computed from them does.
    bool in_storage(py::handle object, const View& view) const {
        int64_t end = number(PyObject_CallOneArg(storage_offset_.ptr(), object.ptr())) + 1, count = sizeof(double),
                reach;
        if (end < 1) return false;
        for (int axis = 0; axis < view.ndim; ++axis) {
            const int64_t size = view.shape[axis];
            if (size < 1 || __builtin_mul_overflow(count, size, &count) || count >= kMemory) return false;
            if (__builtin_mul_overflow(size - 1, view.strides[axis], &reach)) return false;
            if (__builtin_add_overflow(end, reach, &end)) return false;
        }
        PyObject* storage = PyObject_CallOneArg(untyped_storage_.ptr(), object.ptr());
        if (!storage) return unusual();
        const int64_t bytes = number(PyObject_CallMethodNoArgs(storage, nbytes_.ptr()));
        Py_DECREF(storage);
        return end >= 1 && bytes / itemsize(view.dtype) >= end;
    }

    py::tuple classes_;
    int (*tensor_from_object_)(void*, dlpack::Tensor*);
    // Methods of torch's own class, which the others have as it has them: looked up once.
    const py::object is_neg_ = classes_[0].attr("is_neg"), new_empty_ = classes_[0].attr("new_empty"),
                     storage_offset_ = classes_[0].attr("storage_offset"),
                     untyped_storage_ = classes_[0].attr("untyped_storage");
    const py::str nbytes_ = interned("nbytes");
};

}  // namespace pylearngene
