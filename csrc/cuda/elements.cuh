// SPDX-License-Identifier: Apache-2.0
// Elements of float32, bfloat16 and float16 as floats and back: out of 32-bit words, and rounded to nearest even.
// Where they are read from is in memory.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace pylearngene {
namespace gpu {

using BF16 = __nv_bfloat16;
using F16 = __half;
// Names of the dtypes that a kernel file is compiled for.
using FLOAT32 = float;
using BFLOAT16 = BF16;
using FLOAT16 = F16;

template <class T>
struct Element;

template <>
struct Element<float> {
    static constexpr int per_word = 1;
    static __device__ __forceinline__ float widen(float value) { return value; }
    static __device__ __forceinline__ float narrow(float value) { return value; }
    static __device__ __forceinline__ void unpack(uint32_t word, float* to) { to[0] = __uint_as_float(word); }
    static __device__ __forceinline__ void round(float*) {}
};

template <>
struct Element<BF16> {
    static constexpr int per_word = 2;
    static __device__ __forceinline__ float widen(BF16 value) { return __bfloat162float(value); }
    static __device__ __forceinline__ BF16 narrow(float value) { return __float2bfloat16_rn(value); }
    static __device__ __forceinline__ void unpack(uint32_t word, float* to) {
        to[0] = __uint_as_float(word << 16);
        to[1] = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ void round(float* pair) {
        const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair[0], pair[1]);
        pair[0] = __low2float(rounded), pair[1] = __high2float(rounded);
    }
};

template <>
struct Element<F16> {
    static constexpr int per_word = 2;
    static __device__ __forceinline__ float widen(F16 value) { return __half2float(value); }
    static __device__ __forceinline__ F16 narrow(float value) { return __float2half_rn(value); }
    static __device__ __forceinline__ void unpack(uint32_t word, float* to) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
        to[0] = pair.x, to[1] = pair.y;
    }
    static __device__ __forceinline__ void round(float* pair) {
        const __half2 rounded = __floats2half2_rn(pair[0], pair[1]);
        pair[0] = __low2float(rounded), pair[1] = __high2float(rounded);
    }
};

template <class T, int kWords>
__device__ __forceinline__ void unpack(const uint32_t (&words)[kWords], float (&to)[kWords * Element<T>::per_word]) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) Element<T>::unpack(words[j], to + j * Element<T>::per_word);
}

// To the dtype T and back.
template <class T, int kCount>
__device__ __forceinline__ void round_to(float (&values)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; j += Element<T>::per_word) Element<T>::round(values + j);
}

}  // namespace gpu
}  // namespace pylearngene
