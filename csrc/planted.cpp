// SPDX-License-Identifier: Apache-2.0
// Mistakes on purpose, in the module for `make sanitize` only, compiled with the flags of every level: a test sees each
// of them reported, so that a run without reports means something. No kernel stands here.

#include <stdint.h>

#define JOIN_EXPANDED(a, b) a##b
#define JOIN(a, b) JOIN_EXPANDED(a, b)

// memory: n bytes at least, on the heap
extern "C" float JOIN(pylearngene_planted_, PYLEARNGENE_LEVEL)(int mistake, const char* memory, int64_t n) {
    char* const freed = new char[n];
    volatile char local[8] = {};
    delete[] freed;
    switch (mistake) {
        case 0:
            return memory[n];
        case 1:
            return *const_cast<volatile char*>(freed);
        case 2:
            return local[n];
        case 3:
            return *reinterpret_cast<const float*>(memory + 1);
        case 4:
            return static_cast<float>(INT64_MAX - 1 + n);
        case 5:
            return static_cast<float>(int64_t{1} << (n + 64));
        case 6:
            return static_cast<float>(static_cast<int32_t>(1e10f * static_cast<float>(n)));
        default:
            return 0;
    }
}
