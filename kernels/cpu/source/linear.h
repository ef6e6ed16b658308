// Projections with 8-bit weights and 8-bit activations, exact within groups.
//
//     y[r][o] = sum over groups g of  (sum over k in g of q[r][k] * w[o][k])  *  (xs[r][g] * ws[o][g])
//
// The inner sum is one of integers, so it is exact in any order; the outer one runs over the groups in
// order, rounding every product and sum by itself. A row's result therefore depends on that row alone, and
// is the same to the last bit on every processor.
//
// Weights are stored as w + 128, which is unsigned, for the processors' products of unsigned with signed
// bytes; what that adds to the sum, 128 * sum of q, is where the sum begins (`Rows::begin`).
#pragma once

#include <algorithm>
#include <cstddef>

#include "team.h"
#include "vector.h"

constexpr int GROUP = 32;    // weights and activations that share a scale, along the inputs
constexpr int COLUMNS = 32;  // outputs that lie together

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
typedef int8_t Activation;
#else
typedef int16_t Activation;  // the products of 16-bit integers are what AVX2 has
#endif
typedef Activation Activations __attribute__((vector_size(sizeof(Activation) * WIDTH), aligned(1), may_alias));

struct Packed {
    int32_t outputs, inputs;
    const uint8_t* weights;  // [outputs / COLUMNS][inputs / 4][COLUMNS][4], both rounded up
    const float* scales;     // [outputs / COLUMNS][groups][COLUMNS]
};

static inline int rounded_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
static inline int groups_of(int inputs) { return rounded_up(inputs, GROUP) / GROUP; }
static inline int blocks_of(int outputs) { return rounded_up(outputs, COLUMNS) / COLUMNS; }

// Rows of quantised activations.
struct Rows {
    int groups;
    Activation* q;   // [rows][groups * GROUP]
    float* scale;    // [rows][groups]
    int32_t* begin;  // [rows][groups]: -128 * sum of the group's q
};

// One row of float[inputs]; `x` may be read up to the end of its last group.
static void quantize_row(const float* x, const Rows& rows, int row) {
    for (int group = 0; group < rows.groups; group++, x += GROUP) {
        Floats largest{};
        for (int k = 0; k < GROUP; k += WIDTH) largest = larger(absolute(load(x + k)), largest);
        const float top = max_of(largest);
        const Floats inverse = all(top > 0.0f ? 127.0f / top : 0.0f);
        Activation* q = rows.q + (size_t(row) * rows.groups + group) * GROUP;
        Ints sum{};
        for (int k = 0; k < GROUP; k += WIDTH) {
            const Ints values = rounded(load(x + k) * inverse);
            sum += values;
            *reinterpret_cast<Activations*>(q + k) = __builtin_convertvector(values, Activations);
        }
        rows.scale[size_t(row) * rows.groups + group] = top / 127.0f;
        rows.begin[size_t(row) * rows.groups + group] = -128 * sum_of(sum);
    }
}

// y[R][COLUMNS]: R rows times one block of weights. One variant for each kind of processor.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

constexpr int ROWS_AT_ONCE = 6;  // 12 sums of integers, 12 of floats, in 32 registers

template <int R>
static void multiply(const uint8_t* w, const float* ws, const Rows& x, int row, float (*y)[COLUMNS]) {
    const size_t width = size_t(x.groups) * GROUP;
    const Activation* q = x.q + row * width;
    const float* scale = x.scale + size_t(row) * x.groups;
    const int32_t* begin = x.begin + size_t(row) * x.groups;
    __m512 sum[R][2];
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int group = 0; group < x.groups; group++, ws += COLUMNS, q += GROUP) {
        __m512i dot[R][2];
        for (int r = 0; r < R; r++) dot[r][0] = dot[r][1] = _mm512_set1_epi32(begin[r * x.groups + group]);
        for (int k = 0; k < GROUP; k += 4, w += 4 * COLUMNS) {
            const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
            for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, q + r * width + k, 4);
                const __m512i a = _mm512_set1_epi32(four);
                dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], w0, a);
                dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], w1, a);
            }
        }
        const __m512 s0 = _mm512_loadu_ps(ws), s1 = _mm512_loadu_ps(ws + 16);
        for (int r = 0; r < R; r++) {
            const __m512 s = _mm512_set1_ps(scale[r * x.groups + group]);
            sum[r][0] = _mm512_add_ps(sum[r][0], _mm512_mul_ps(_mm512_cvtepi32_ps(dot[r][0]), _mm512_mul_ps(s, s0)));
            sum[r][1] = _mm512_add_ps(sum[r][1], _mm512_mul_ps(_mm512_cvtepi32_ps(dot[r][1]), _mm512_mul_ps(s, s1)));
        }
    }
    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(y[r], sum[r][0]);
        _mm512_storeu_ps(y[r] + 16, sum[r][1]);
    }
}

#elif defined(__AVX2__)

constexpr int ROWS_AT_ONCE = 4;

// Eight outputs' sums over one group of one to four rows.
template <int R>
static inline void dot_group(const uint8_t* w, const Activation* q, size_t width, __m256i* dot) {
#if defined(__AVXVNNI__)
    for (int k = 0; k < GROUP; k += 4, w += 4 * COLUMNS) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)w);
        for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, q + r * width + k, 4);
            dot[r] = _mm256_dpbusd_avx_epi32(dot[r], w0, _mm256_set1_epi32(four));
        }
    }
#else
    __m256i pairs[R][2];  // two sums for each of four outputs
    for (int r = 0; r < R; r++) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
    for (int k = 0; k < GROUP; k += 4, w += 4 * COLUMNS) {
        const __m256i w0 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)w));
        const __m256i w1 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)));
        for (int r = 0; r < R; r++) {
            int64_t four;
            memcpy(&four, q + r * width + k, 8);
            const __m256i a = _mm256_set1_epi64x(four);
            pairs[r][0] = _mm256_add_epi32(pairs[r][0], _mm256_madd_epi16(w0, a));
            pairs[r][1] = _mm256_add_epi32(pairs[r][1], _mm256_madd_epi16(w1, a));
        }
    }
    for (int r = 0; r < R; r++) {
        const __m256i both = _mm256_hadd_epi32(pairs[r][0], pairs[r][1]);
        dot[r] = _mm256_add_epi32(dot[r], _mm256_permute4x64_epi64(both, 0b11011000));
    }
#endif
}

template <int R>
static void multiply(const uint8_t* w, const float* ws, const Rows& x, int row, float (*y)[COLUMNS]) {
    const size_t width = size_t(x.groups) * GROUP;
    const Activation* q = x.q + row * width;
    const float* scale = x.scale + size_t(row) * x.groups;
    const int32_t* begin = x.begin + size_t(row) * x.groups;
    for (int column = 0; column < COLUMNS; column += 8) {
        __m256 sum[R];
        for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_ps();
        for (int group = 0; group < x.groups; group++) {
            __m256i dot[R];
            for (int r = 0; r < R; r++) dot[r] = _mm256_set1_epi32(begin[r * x.groups + group]);
            dot_group<R>(w + size_t(group) * GROUP * COLUMNS + column * 4, q + group * GROUP, width, dot);
            const __m256 s0 = _mm256_loadu_ps(ws + group * COLUMNS + column);
            for (int r = 0; r < R; r++) {
                const __m256 s = _mm256_mul_ps(_mm256_set1_ps(scale[r * x.groups + group]), s0);
                sum[r] = _mm256_add_ps(sum[r], _mm256_mul_ps(_mm256_cvtepi32_ps(dot[r]), s));
            }
        }
        for (int r = 0; r < R; r++) _mm256_storeu_ps(y[r] + column, sum[r]);
    }
}

#else

constexpr int ROWS_AT_ONCE = 1;

template <int R>
static void multiply(const uint8_t* w, const float* ws, const Rows& x, int row, float (*y)[COLUMNS]) {
    static_assert(R == 1);
    const Activation* q = x.q + size_t(row) * x.groups * GROUP;
    for (int column = 0; column < COLUMNS; column++) y[0][column] = 0.0f;
    for (int group = 0; group < x.groups; group++, ws += COLUMNS) {
        int32_t dot[COLUMNS];
        for (int column = 0; column < COLUMNS; column++) dot[column] = x.begin[size_t(row) * x.groups + group];
        for (int k = 0; k < GROUP; k += 4, w += 4 * COLUMNS, q += 4)
            for (int column = 0; column < COLUMNS; column++)
                for (int j = 0; j < 4; j++) dot[column] += int32_t(w[column * 4 + j]) * q[j];
        const float s = x.scale[size_t(row) * x.groups + group];
        for (int column = 0; column < COLUMNS; column++) y[0][column] += float(dot[column]) * (s * ws[column]);
    }
}

#endif

template <int R>
static void multiply_up_to(int rows, const uint8_t* w, const float* ws, const Rows& x, int row, float (*y)[COLUMNS]) {
    if (rows >= R) return multiply<R>(w, ws, x, row, y);
    if constexpr (R > 1) multiply_up_to<R - 1>(rows, w, ws, x, row, y);
}

// Rows times weights; use(row, block, values[COLUMNS]) takes each row's results of a block of outputs.
template <typename Use>
static void multiply_all(Team& team, const Packed& weight, const Rows& x, int rows, Use use) {
    const int blocks = blocks_of(weight.outputs);
    // A panel of rows stays in the second-level cache while the blocks of weights pass by.
    const int panel = std::max(ROWS_AT_ONCE, (384 << 10) / (x.groups * GROUP) / ROWS_AT_ONCE * ROWS_AT_ONCE);
    const int panels = (rows + panel - 1) / panel;
    const size_t block_scales = size_t(x.groups) * COLUMNS;
    team.share(blocks * panels, [&](int item) {
        const int block = item % blocks, first = item / blocks * panel;
        const int end = std::min(rows, first + panel);
        alignas(64) float y[ROWS_AT_ONCE][COLUMNS];
        for (int row = first; row < end; row += ROWS_AT_ONCE) {
            const int count = std::min(ROWS_AT_ONCE, end - row);
            multiply_up_to<ROWS_AT_ONCE>(
                count, weight.weights + block * block_scales * GROUP, weight.scales + block * block_scales, x, row, y);
            for (int r = 0; r < count; r++) use(row + r, block, y[r]);
        }
    });
}
