// SPDX-License-Identifier: Apache-2.0
// float16 of CUDA for the processor, as far as the kernels use it; rounding to nearest even is written out.
#pragma once

#include <cuda_runtime.h>

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const float sign = value.bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * ldexpf(exponent ? 1024 + fraction : fraction, (exponent ? exponent : 1) - 25);
}
inline __half __float2half_rn(float value) {
    const uint16_t sign = __float_as_uint(value) >> 16 & 0x8000;
    const float size = fabsf(value);
    if (value != value) return {0x7fff};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent;
    frexpf(size, &exponent);
    const int scale = size < 0x1p-14f ? -24 : exponent - 11;  // of the last bit
    const int units = static_cast<int>(nearbyintf(ldexpf(size, -scale)));
    // Units carry into the exponent by themselves: 1024 of them are the next power of two.
    const int bits = scale == -24 ? units : ((scale + 24) << 10) + units;
    return {static_cast<uint16_t>(sign | bits)};
}
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
