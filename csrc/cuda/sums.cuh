// SPDX-License-Identifier: Apache-2.0
// Sums over the lanes of a warp and the warps of a block, in one order that depends on the number of warps alone: no
// atomics, so every run has the same bits, whatever else is summed beside.
#pragma once

#include <cuda_runtime.h>

namespace pylearngene {
namespace gpu {

constexpr int kLanes = 32;
constexpr int kMostWarps = 8;

// Sums kCount values, a power of two up to 32, over the lanes. Lanes 16 apart are added first, then 8, 4, 2 and 1.
// While there are several values a lane keeps one half of them and gives the other away, so that about kCount values
// are passed instead of 5 * kCount; who keeps what has no influence on a sum.
template <int kCount, int kApart = kLanes / 2>
__device__ __forceinline__ void sum_lanes(float (&values)[kCount], int lane, float* sums) {
    constexpr int kKept = kCount > 1 ? kCount / 2 : 1;
    const bool upper = lane & kApart;
    float kept[kKept];
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
        const float mine = kCount > 1 && upper ? values[kCount / 2 + j] : values[j];
        const float given = kCount > 1 && upper ? values[j] : values[kCount > 1 ? kCount / 2 + j : j];
        kept[j] = mine + __shfl_xor_sync(0xffffffffu, given, kApart);
    }
    if constexpr (kCount > 1) sums += upper ? kKept : 0;
    if constexpr (kApart > 1) {
        sum_lanes<kKept, kApart / 2>(kept, lane, sums);
    } else {
        *sums = kept[0];
    }
}

}  // namespace gpu
}  // namespace pylearngene
