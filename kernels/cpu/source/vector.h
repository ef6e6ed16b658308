// Vectors of floats as wide as the processor's, and what is computed with them.
//
// Sums run over the same elements in the same order whatever the width is: a lane is always an output
// of its own, and where a sum runs across lanes it has LANES partial sums, however many registers
// these take. Compile with -ffp-contract=off: fused operations are written out (`fused`), so the same
// source rounds the same way everywhere a processor has them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int LANES = 16;  // of a sum across lanes
constexpr int PARTS = LANES / WIDTH;

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

typedef int8_t Bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));

static inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }
static inline void store(float* at, Floats x) { *reinterpret_cast<Floats*>(at) = x; }
static inline Floats all(float x) { return x - Floats{}; }  // "+" would turn -0 into 0: one more operation
static inline Floats select(Ints mask, Floats yes, Floats no) { return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no)); }
static inline Floats larger(Floats a, Floats b) { return select(a > b, a, b); }

// a * b + c: rounded once where the processor can, else twice.
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// To the nearest integer, ties to even, for |x| < 2^22.
static inline Ints rounded(Floats x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: its last bit has the weight 1
    return (Ints)(x + magic) - (Ints)all(magic);
}

static inline Floats as_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// Numbers in float16. Without instructions for it: a float's exponent begins 112 further up.
static inline Floats load_halves(const uint16_t* at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at));
#else
    Ints bits;
    for (int lane = 0; lane < WIDTH; lane++) bits[lane] = at[lane];
    const Ints sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    const Floats finite = (Floats)rest * 0x1p112f;
    return (Floats)(sign | (Ints)select(rest >= 0x7c00 << 13, (Floats)(rest | 0x7f800000), finite));
#endif
}

constexpr float LOG2_E = 1.44269504f;

// 2^x within 2 units of the last place; 0 below -126. The fraction's polynomial is the Taylor series
// of 2^f on [-1/2, 1/2], whose first term left out is below 2^-25.
static inline Floats exp2_of(Floats x) {
    const Floats bounded = select(x < -126.0f, all(-126.0f), select(x > 127.0f, all(127.0f), x));
    const Ints whole = rounded(bounded);
    const Floats f = bounded - __builtin_convertvector(whole, Floats);
    Floats y = all(1.5252734e-5f);
    y = fused(y, f, all(1.5403530e-4f));
    y = fused(y, f, all(1.3333558e-3f));
    y = fused(y, f, all(9.6181291e-3f));
    y = fused(y, f, all(5.5504109e-2f));
    y = fused(y, f, all(2.4022651e-1f));
    y = fused(y, f, all(6.9314718e-1f));
    y = fused(y, f, all(1.0f));
    const Floats scaled = y * (Floats)((whole + 127) << 23);
    return select(x < -126.0f, Floats{}, scaled);
}

// The sum of LANES partial sums, always in the same order.
static inline float sum_of(const Floats* parts) {
    float lanes[LANES];
    for (int part = 0; part < PARTS; part++) store(lanes + part * WIDTH, parts[part]);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// Of floats that are numbers.
static inline float max_of(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float top = x[0];
    for (int lane = 1; lane < WIDTH; lane++) top = std::max(top, x[lane]);
    return top;
#endif
}

static inline int32_t sum_of(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(__AVX2__)
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_srli_epi64(two, 32)));
#else
    int32_t sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += x[lane];
    return sum;
#endif
}

// Eight rows of eight floats become columns: to[j * to_stride + i] = from[i * from_stride + j].
static inline void transpose_8x8(const float* const* from, int at, float* to, int to_stride) {
    Eight r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = *reinterpret_cast<const Eight*>(from[i] + at);
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = __builtin_shufflevector(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 1] = __builtin_shufflevector(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[i + 2] = __builtin_shufflevector(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 3] = __builtin_shufflevector(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        *reinterpret_cast<Eight*>(to + i * to_stride) = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *reinterpret_cast<Eight*>(to + (i + 4) * to_stride) = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
