// Integer dot products of a group of activations with a group of weights, exact at every level.
//
// A register has one sum for each of WIDTH outputs; four inputs of each are multiplied at once.
#pragma once

#include <cstring>

#include "packed.h"

static inline Ints quads(const uint8_t* at) { return *reinterpret_cast<const Ints*>(at); }

// The same four activations for every output.
static inline Ints four(const int8_t* at) {
    int32_t bytes;
    memcpy(&bytes, at, 4);
    return Ints{} + bytes;
}

static inline Ints low_halves(Ints bytes) { return bytes & 0x0f0f0f0f; }
static inline Ints high_halves(Ints bytes) { return (bytes >> 4) & 0x0f0f0f0f; }

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__) || !defined(__AVX2__)

#define DOT_BYTES 1  // whether four products of bytes can be added to 32 bits at once
#define LOOP_STAYS
constexpr int SUMS_OF_4_BITS = WIDTH == 16 ? 16 : WIDTH == 8 ? 8 : 1, SUMS_OF_8_BITS = SUMS_OF_4_BITS;  // at once
typedef Ints GroupSums;

// In each lane: sum + the products of w's four unsigned bytes with x's four signed ones.
static inline Ints add_dot(Ints sum, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#else
    for (int byte = 0; byte < 32; byte += 8) sum += (w >> byte & 0xff) * (x << (24 - byte) >> 24);
    return sum;
#endif
}

static inline Ints total(GroupSums sums) { return sums; }

template <int R, int C>
static inline void add_dots(const EightBit& unit, int column, const int8_t* q, size_t width, Ints (&dot)[R][C]) {
    for (int k = 0; k < GROUP; k += 4) {
        Ints w[C];
        for (int c = 0; c < C; c++) w[c] = quads(unit.weights[k / 4][column + c * WIDTH]);
        for (int r = 0; r < R; r++) {
            const Ints x = four(q + r * width + k);
            for (int c = 0; c < C; c++) dot[r][c] = add_dot(dot[r][c], w[c], x);
        }
    }
}

#else

// AVX2 adds pairs of products to 16 bits, without an overflow if one factor has 4 bits: a group's 16 products
// are below 16 * 15 * 128 < 2^15. Weights of 8 bits are two of 4.
#define DOT_BYTES 0
#define LOOP_STAYS _Pragma("GCC unroll 1")  // unrolled, it has GCC keep sums in memory
constexpr int SUMS_OF_4_BITS = 8, SUMS_OF_8_BITS = 4;  // at once
typedef int16_t GroupSums __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));  // two of each output

static inline GroupSums add_dot(GroupSums sums, Ints w, Ints x) {
    return sums + (GroupSums)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
}

static inline Ints total(GroupSums sums, int16_t factor = 1) {
    return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(factor));
}

template <int R, int C>
static inline void add_dots(const EightBit& unit, int column, const int8_t* q, size_t width, Ints (&dot)[R][C]) {
    GroupSums low[R][C]{}, high[R][C]{};
    LOOP_STAYS
    for (int k = 0; k < GROUP; k += 4) {
        Ints w[C];
        for (int c = 0; c < C; c++) w[c] = quads(unit.weights[k / 4][column + c * WIDTH]);
        for (int r = 0; r < R; r++) {
            const Ints x = four(q + r * width + k);
            for (int c = 0; c < C; c++) {
                low[r][c] = add_dot(low[r][c], low_halves(w[c]), x);
                high[r][c] = add_dot(high[r][c], high_halves(w[c]), x);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) dot[r][c] += total(low[r][c]) + total(high[r][c], 16);
}

#endif

// dot[r][c] += the dot products of a group of R rows, `width` activations apart, with C registers of outputs.
template <int R, int C>
static inline void add_dots(const FourBit& unit, int column, const int8_t* q, size_t width, Ints (&dot)[R][C]) {
    GroupSums sums[R][C]{};
    LOOP_STAYS
    for (int k = 0; k < GROUP; k += 8) {
        Ints low[C], high[C];
        for (int c = 0; c < C; c++) {
            const Ints both = quads(unit.weights[k / 8][column + c * WIDTH]);
            low[c] = low_halves(both), high[c] = high_halves(both);
        }
        for (int r = 0; r < R; r++) {
            const Ints x0 = four(q + r * width + k), x1 = four(q + r * width + k + 4);
            for (int c = 0; c < C; c++) sums[r][c] = add_dot(add_dot(sums[r][c], low[c], x0), high[c], x1);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) dot[r][c] += total(sums[r][c]);
}
