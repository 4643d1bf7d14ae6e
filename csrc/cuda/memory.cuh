// SPDX-License-Identifier: Apache-2.0
// Reads of memory that nobody writes meanwhile, by 32-bit words: genes past L1 and kept in L2, x through L1. All PTX
// of the kernels is here; what the words mean is in elements.cuh.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace pylearngene {
namespace gpu {

constexpr int kGeneWords = 4;  // of one read of a gene, 16 bytes

// Tests compile the kernels for the processor, where no PTX can be: they bring these with them.
#if defined(PYLEARNGENE_EMULATED)
uint64_t keep_in_l2();
int64_t opaque(int64_t value);
void load_gene(const void* from, uint64_t policy, uint32_t (&words)[kGeneWords]);
#else
__device__ __forceinline__ uint64_t keep_in_l2() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// The value, unknown to the compiler: what is computed from it is computed where it is used and takes no registers
// through a loop.
__device__ __forceinline__ int64_t opaque(int64_t value) {
    asm volatile("" : "+l"(value));
    return value;
}

__device__ __forceinline__ void load_gene(const void* from, uint64_t policy, uint32_t (&words)[kGeneWords]) {
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(__cvta_generic_to_global(from)), "l"(policy));
}
#endif

// 8, 16 or 32 bytes, aligned to 8 or 16.
template <int kWords>
__device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[kWords]) {
    if constexpr (kWords == 2) {
        const uint2 pair = __ldg(static_cast<const uint2*>(from));
        words[0] = pair.x, words[1] = pair.y;
    } else {
#pragma unroll
        for (int j = 0; j < kWords; j += 4) {
            const uint4 four = __ldg(static_cast<const uint4*>(from) + j / 4);
            words[j] = four.x, words[j + 1] = four.y, words[j + 2] = four.z, words[j + 3] = four.w;
        }
    }
}

}  // namespace gpu
}  // namespace pylearngene
