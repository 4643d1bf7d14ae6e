// SPDX-License-Identifier: Apache-2.0
// The module pylearngene._C: one submodule per primitive. It takes addresses, sizes and strides; it knows nothing of
// torch and allocates no tensor.

#include <pybind11/pybind11.h>

#include "checks.h"

namespace pylearngene {
void bind_expansion(py::module_& module);
}

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
}
