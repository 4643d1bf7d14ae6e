// SPDX-License-Identifier: Apache-2.0
// One vector of float and one of double per level, with exact fma and conversions for the four element types.
// Everything has internal linkage, so that code of a higher level is never chosen by the linker for a lower one. No
// loops over matrices here.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
#define PYLEARNGENE_BYTES 64
#elif defined(__AVX2__)
#define PYLEARNGENE_BYTES 32
#else
#define PYLEARNGENE_BYTES 16
#endif

typedef float F32 __attribute__((vector_size(PYLEARNGENE_BYTES)));
typedef double F64 __attribute__((vector_size(PYLEARNGENE_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(PYLEARNGENE_BYTES)));
typedef int64_t I64 __attribute__((vector_size(PYLEARNGENE_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(PYLEARNGENE_BYTES / 2)));
typedef float HalfF32 __attribute__((vector_size(PYLEARNGENE_BYTES / 2)));

struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class Work>
struct Simd;
template <>
struct Simd<float> {
    typedef F32 Vector;
    static constexpr int sums = 2;  // vectors of double with one element per lane
    static constexpr int lanes = PYLEARNGENE_BYTES / 4;
};
template <>
struct Simd<double> {
    typedef F64 Vector;
    static constexpr int sums = 1;
    static constexpr int lanes = PYLEARNGENE_BYTES / 8;
};

template <class To, class From>
inline To cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "cast keeps the bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

#if defined(__AVX512F__)
inline F32 splat(float value) { return _mm512_set1_ps(value); }
inline F64 splat(double value) { return _mm512_set1_pd(value); }
#elif defined(__AVX2__)
inline F32 splat(float value) { return _mm256_set1_ps(value); }
inline F64 splat(double value) { return _mm256_set1_pd(value); }
#else
inline F32 splat(float value) { return F32{value, value, value, value}; }
inline F64 splat(double value) { return F64{value, value}; }
#endif

#if defined(__AVX512F__)
// Conversions are called in their masked form: gcc 12 warns of an undefined operand inside the plain ones.
constexpr __mmask16 kAllLanes = 0xFFFF;
#endif

#if defined(__AVX2__)
inline float sum_256(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline double sum_256(__m256d v) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
#endif

// fma: a * b + c with one rounding, the same bits on every level. sum: over the lanes, in a fixed order.
#if defined(__AVX512F__)
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F64 fma(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
inline float sum(F32 v) {
    __m256 half[2];
    memcpy(half, &v, sizeof v);
    return sum_256(half[0] + half[1]);
}
inline double sum(F64 v) {
    __m256d half[2];
    memcpy(half, &v, sizeof v);
    return sum_256(half[0] + half[1]);
}
#elif defined(__AVX2__)
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F64 fma(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
inline float sum(F32 v) { return sum_256(v); }
inline double sum(F64 v) { return sum_256(v); }
#else
inline float sum(F32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline double sum(F64 v) { return v[0] + v[1]; }
inline F64 fma(F64 a, F64 b, F64 c) {
    F64 r;
    for (int j = 0; j < Simd<double>::lanes; ++j) r[j] = __builtin_fma(a[j], b[j], c[j]);
    return r;
}
#if defined(__FP_FAST_FMAF)
inline F32 fma(F32 a, F32 b, F32 c) {
    F32 r;
    for (int j = 0; j < Simd<float>::lanes; ++j) r[j] = __builtin_fmaf(a[j], b[j], c[j]);
    return r;
}
#else
// The product of two floats is exact in double. The sum is rounded to odd (the error of the sum tells which way its
// last bit must go), after which rounding to float is right: Boldo and Melquiond, "Emulation of a FMA and correctly
// rounded sums: proved algorithms using rounding to odd", 2008.
inline F64 odd_sum(F64 p, F64 c) {
    const F64 s = p + c, t = s - p;
    const F64 error = (p - (s - t)) + (c - t);
    const I64 inexact = (error < 0) | (error > 0);  // false for NaN, so infinite sums stay
    const I64 even = (cast<I64>(s) & 1) - 1;
    const I64 shrink = (error > 0) ^ (s > 0);
    return cast<F64>(cast<I64>(s) + (inexact & even & (shrink | 1)));
}
inline F32 fma(F32 a, F32 b, F32 c) {
    HalfF32 a2[2], b2[2], c2[2], r[2];
    memcpy(a2, &a, sizeof a);
    memcpy(b2, &b, sizeof b);
    memcpy(c2, &c, sizeof c);
    for (int j = 0; j < 2; ++j) {
        const F64 product = __builtin_convertvector(a2[j], F64) * __builtin_convertvector(b2[j], F64);
        r[j] = __builtin_convertvector(odd_sum(product, __builtin_convertvector(c2[j], F64)), HalfF32);
    }
    F32 result;
    memcpy(&result, r, sizeof result);
    return result;
}
#endif
#endif

// Holds a vector in a register, so that several instructions do not each load it.
#if defined(__x86_64__) && defined(__AVX512F__)
#define KEEP(vector) __asm__("" : "+v"(vector))
#elif defined(__x86_64__)
#define KEEP(vector) __asm__("" : "+x"(vector))
#else
#define KEEP(vector)
#endif

// to[j] = sum of v[j] over its lanes, for several vectors at once; on a level every vector has one order, however many
// are summed together. There is room for whole vectors at `to`, and what follows the sums is anything.
template <int N, class Vector, class Work>
inline void sum_each(const Vector* v, Work* to) {
    for (int j = 0; j < N; ++j) to[j] = sum(v[j]);
}
#if defined(__AVX512F__)
template <int kOrder>
inline __m512 quarters(__m512 a, __m512 b) {
    return _mm512_maskz_shuffle_f32x4(kAllLanes, a, b, kOrder);
}
// In each quarter [a, b, c, d]: what stood there in each of four vectors, summed.
inline __m512 sum_quarters(const F32* v) {
    __m512 pairs[2];
    for (int j = 0; j < 2; ++j)
        pairs[j] = _mm512_maskz_unpacklo_ps(kAllLanes, v[2 * j], v[2 * j + 1]) +
                   _mm512_maskz_unpackhi_ps(kAllLanes, v[2 * j], v[2 * j + 1]);
    const __m512d ab = _mm512_castps_pd(pairs[0]), cd = _mm512_castps_pd(pairs[1]);
    return _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xFF, ab, cd)) +
           _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xFF, ab, cd));
}
template <>
inline void sum_each<4, F32, float>(const F32* v, float* to) {
    const __m512 q = sum_quarters(v), half = q + quarters<0xEE>(q, q);
    const __m512 all = half + quarters<0x55>(half, half);
    memcpy(to, &all, sizeof all);
}
template <>
inline void sum_each<8, F32, float>(const F32* v, float* to) {
    const __m512 q = sum_quarters(v), r = sum_quarters(v + 4);
    const __m512 half = quarters<0x44>(q, r) + quarters<0xEE>(q, r);
    const __m512 all = quarters<0x88>(half, half) + quarters<0xDD>(half, half);
    memcpy(to, &all, sizeof all);
}
#endif

// madd: for sums whose last bit is free; one instruction where there is one.
#if defined(__AVX2__) || defined(__FP_FAST_FMAF)
template <class Vector>
inline Vector madd(Vector a, Vector b, Vector c) {
    return fma(a, b, c);
}
#else
inline F32 madd(F32 a, F32 b, F32 c) { return a * b + c; }
inline F64 madd(F64 a, F64 b, F64 c) { return a * b + c; }
#endif

// Sums of products in double, where a product of two floats is exact.
inline void add_product(F32 a, F32 b, F64 (&sums)[2]) {
    HalfF32 a2[2], b2[2];
    memcpy(a2, &a, sizeof a);
    memcpy(b2, &b, sizeof b);
    for (int j = 0; j < 2; ++j)
        sums[j] = madd(__builtin_convertvector(a2[j], F64), __builtin_convertvector(b2[j], F64), sums[j]);
}
inline void add_product(F64 a, F64 b, F64 (&sums)[1]) { sums[0] = madd(a, b, sums[0]); }
inline double total(const F64 (&sums)[1]) { return sum(sums[0]); }
inline double total(const F64 (&sums)[2]) { return sum(sums[0] + sums[1]); }

// Every NaN is stored as this one, because which operand's payload survives differs between instructions.
inline F32 plain_nan(F32 v) { return v == v ? v : splat(__builtin_nanf("")); }
inline F64 plain_nan(F64 v) { return v == v ? v : splat(__builtin_nan("")); }

inline U32 zero_extend(U16 h) {
#if defined(__AVX512F__)
    return cast<U32>(_mm512_maskz_cvtepu16_epi32(kAllLanes, cast<__m256i>(h)));
#elif defined(__AVX2__)
    return cast<U32>(_mm256_cvtepu16_epi32(cast<__m128i>(h)));
#else
    return __builtin_convertvector(h, U32);
#endif
}

// Bits of float -> bits of bfloat16 in the low half, to nearest even; integer, so that denormals are kept.
inline U32 bf16_bits(F32 v) {
    const U32 u = cast<U32>(v);
    const U32 rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return v == v ? rounded : U32{} + 0x7FC0u;
}

#if defined(__AVX512F__)
inline F32 from_f16(U16 h) { return _mm512_maskz_cvtph_ps(kAllLanes, cast<__m256i>(h)); }
inline U16 to_f16(F32 v) {
    return cast<U16>(_mm512_maskz_cvtps_ph(kAllLanes, plain_nan(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline F32 from_f16(U16 h) { return _mm256_cvtph_ps(cast<__m128i>(h)); }
inline U16 to_f16(F32 v) { return cast<U16>(_mm256_cvtps_ph(plain_nan(v), _MM_FROUND_TO_NEAREST_INT)); }
#else
// Both directions rescale with exact products, so that the processor's own rounding and denormals do the work.
inline F32 from_f16(U16 h) {
    const U32 w = zero_extend(h) << 16, twice = w + w;
    const F32 normal = cast<F32>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const F32 denormal = cast<F32>((twice >> 17) | (126u << 23)) - 0.5f;
    const U32 magnitude = twice < (1u << 27) ? cast<U32>(denormal) : cast<U32>(normal);
    return cast<F32>((w & 0x80000000u) | magnitude);
}
inline U16 to_f16(F32 v) {
    const U32 w = cast<U32>(v), twice = w + w;
    const U32 exponent = twice & 0xFF000000u;
    const U32 bias = exponent < 0x71000000u ? U32{} + 0x71000000u : exponent;
    const F32 clamped = cast<F32>(w & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
    const U32 base = cast<U32>(cast<F32>((bias >> 1) + 0x07800000u) + clamped);
    const U32 bits = ((base >> 13) & 0x7C00u) + (base & 0x0FFFu);
    const U32 signed_bits = ((w & 0x80000000u) >> 16) | bits;
    return __builtin_convertvector(v == v ? signed_bits : U32{} + 0x7E00u, U16);
}
#endif

// An element type in memory and the vector it is computed in; `round` is store followed by load.
template <class T>
struct Element;
template <class T>
struct PlainElement {
    typedef T Work;
    typedef typename Simd<T>::Vector Vector;
    static Vector load(const T* p) {
        Vector v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(T* p, Vector v) {
        v = plain_nan(v);
        memcpy(p, &v, sizeof v);
    }
    static Vector round(Vector v) { return v; }
};
template <>
struct Element<float> : PlainElement<float> {};
template <>
struct Element<double> : PlainElement<double> {};
template <>
struct Element<BF16> {
    typedef float Work;
    typedef F32 Vector;
    static F32 load(const BF16* p) {
        U16 h;
        memcpy(&h, p, sizeof h);
        return cast<F32>(zero_extend(h) << 16);
    }
    static void store(BF16* p, F32 v) {
        const U16 h = __builtin_convertvector(bf16_bits(v), U16);
        memcpy(p, &h, sizeof h);
    }
    static F32 round(F32 v) { return cast<F32>(bf16_bits(v) << 16); }
};
template <>
struct Element<F16> {
    typedef float Work;
    typedef F32 Vector;
    static F32 load(const F16* p) {
        U16 h;
        memcpy(&h, p, sizeof h);
        return from_f16(h);
    }
    static void store(F16* p, F32 v) {
        const U16 h = to_f16(v);
        memcpy(p, &h, sizeof h);
    }
    static F32 round(F32 v) { return from_f16(to_f16(v)); }
};

// One element of any alignment, as it lies.
template <class T>
inline T read_one(const T* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

// The first n < lanes elements; lanes beyond are zero, memory beyond is untouched.
template <class T>
inline typename Element<T>::Vector load_first(const T* p, int64_t n) {
    T buffer[Simd<typename Element<T>::Work>::lanes] = {};
    memcpy(buffer, p, n * sizeof(T));
    return Element<T>::load(buffer);
}
template <class T>
inline void store_first(T* p, typename Element<T>::Vector v, int64_t n) {
    T buffer[Simd<typename Element<T>::Work>::lanes];
    Element<T>::store(buffer, v);
    memcpy(p, buffer, n * sizeof(T));
}

}  // namespace
