// SPDX-License-Identifier: Apache-2.0
// The module pylearngene._C: one submodule per primitive. It takes addresses, sizes and strides; it knows nothing of
// torch and allocates no tensor.

#include <pybind11/pybind11.h>

#include "checks.h"

namespace pylearngene {
void bind_expansion(py::module_& module);
void bind_expansion_conv(py::module_& module);
void bind_expansion_norm(py::module_& module);
}  // namespace pylearngene

#if defined(PYLEARNGENE_SANITIZED)
extern "C" {
float pylearngene_planted_DEFAULT(int mistake, const char* memory, int64_t n);
float pylearngene_planted_AVX2(int mistake, const char* memory, int64_t n);
float pylearngene_planted_AVX512(int mistake, const char* memory, int64_t n);
float pylearngene_planted_AVX512_BF16(int mistake, const char* memory, int64_t n);
}
#endif

PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
    namespace py = pybind11;
    using namespace pylearngene;
    module.doc() = "CPU kernels of pylearngene.";
    module.attr("version") = PYLEARNGENE_VERSION;
    module.def(
        "levels",
        [] {
            py::list names;
            for (int level = 0; level < kLevels; ++level) names.append(kLevelNames[level]);
            return names;
        },
        "Names of the instruction sets compiled in; the position is the `level` argument of every kernel.");
    module.def(
        "supported_levels",
        [] {
            py::list names;
            for (int level = 0; level < kLevels; ++level)
                if (level_supported(level)) names.append(kLevelNames[level]);
            return names;
        },
        "Names of the compiled instruction sets that this processor can run.");
    bind_expansion(module);
    bind_expansion_conv(module);
    bind_expansion_norm(module);
#if defined(PYLEARNGENE_SANITIZED)
    module.def(
        "planted",
        [](int level, int mistake, uintptr_t memory, int64_t n) {
            decltype(&pylearngene_planted_DEFAULT) const made[] = {
                &pylearngene_planted_DEFAULT,
#if PYLEARNGENE_LEVELS > 1
                &pylearngene_planted_AVX2,
                &pylearngene_planted_AVX512,
                &pylearngene_planted_AVX512_BF16,
#endif
            };
            check_level(level);
            return made[level](mistake, reinterpret_cast<const char*>(memory), n);
        },
        "A mistake on purpose, with the flags of a level; in the module for `make sanitize` only.");
#endif
}
