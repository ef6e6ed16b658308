// Keys and values as they lie in a worker's pool: [blocks][layers][k|v][kv_heads] rows, each with
// block_size tokens of one head.
//
//     float32   [token][dim]
//     8 bits    keys [width / 4][token][4], values [token][width]; then one float32 scale for each [token]
//
// (width: dim rounded up to 4.) Eight bits are symmetric, one scale for a token of a head. So that one large
// dimension does not take the precision of all others, a key is first spread: multiplied by a Hadamard
// matrix, and so is the query, which leaves their product as it was (Ashkboos et al., "QuaRot", 2024). Keys
// lie as their products with queries take them: four dimensions of many tokens side by side.
//
// A number that is not finite is stored as 0, because attention reads whole tiles, and 0 * NaN is NaN.
#pragma once

#include <cstddef>

#include "vector.h"

constexpr int KEYS = 0, VALUES = 1;

struct Pool {
    uint8_t* data;
    int32_t layers, kv_heads, block_size, dim;
    int32_t bits;  // of a number: 32 (float32) or 8

    int width() const { return bits == 8 ? (dim + 3) / 4 * 4 : dim; }
    size_t row_bytes() const { return size_t(block_size) * (bits == 8 ? width() + sizeof(float) : dim * sizeof(float)); }

    uint8_t* row(int block, int layer, int part, int head) const {
        return data + (((size_t(block) * layers + layer) * 2 + part) * kv_heads + head) * row_bytes();
    }
    // The same row's scales, with 8 bits.
    float* scales(uint8_t* row) const { return reinterpret_cast<float*>(row + size_t(block_size) * width()); }
};

static inline Floats finite(Floats x) { return select(absolute(x) < INFINITY, x, Floats{}); }

// x = H x for the Hadamard matrix H of 2, 4 or 8 numbers, times as many eights.
template <int DISTANCE>
static inline Eight butterfly(Eight x) {
    const Eight other = DISTANCE == 1   ? __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6)
                        : DISTANCE == 2 ? __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5)
                                        : __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    constexpr float b = DISTANCE == 1 ? -1 : 1, c = DISTANCE == 2 ? -1 : 1, d = DISTANCE == 4 ? -1 : 1;
    const Eight signs = {1, b, c, b * c, d, b * d, c * d, b * c * d};
    return other + x * signs;
}

// How many numbers a head's Hadamard matrix mixes: the largest power of two that divides `dim`.
static inline int spread_of(int dim) { return dim & -dim; }

// x = H x along parts of spread_of(dim) numbers. H is not normalised: it makes vectors sqrt(spread) longer.
static inline void spread(float* x, int dim) {
    const int size = spread_of(dim);
    for (int at = 0; size >= 8 && at < dim; at += 8) {
        Eight& eight = *reinterpret_cast<Eight*>(x + at);
        eight = butterfly<4>(butterfly<2>(butterfly<1>(eight)));
    }
    for (int distance = size >= 8 ? 8 : 1; distance < size; distance *= 2)
        for (int at = 0; at < dim; at += 2 * distance)
            for (int i = at; i < at + distance; i++) {
                const float a = x[i], b = x[i + distance];
                x[i] = a + b;
                x[i + distance] = a - b;
            }
}

static inline void keep_finite(float* x, int n) {
    int at = 0;
    for (; at + WIDTH <= n; at += WIDTH) store(x + at, finite(load(x + at)));
    for (; at < n; at++) x[at] = std::isfinite(x[at]) ? x[at] : 0.0f;
}

static inline float largest_size_of(const float* x, int n) {
    Floats largest{};
    int at = 0;
    for (; at + WIDTH <= n; at += WIDTH) largest = larger(absolute(load(x + at)), largest);
    float top = max_of(largest);
    for (; at < n; at++) top = std::max(top, std::fabs(x[at]));
    return top;
}

// Codes of finite x[dim], four at a time with zeros behind the last one: put(at, codes). Returns their
// scale: x = code * scale. What is too large or too small for a scale is all zeros.
template <typename Put>
static inline float quantize_head(const float* x, int dim, Put put) {
    const float top = largest_size_of(x, dim);
    const bool has_scale = top > 1e-30f && top < INFINITY;
    const float inverse = has_scale ? 127.0f / top : 0.0f;
    int at = 0;
    for (; has_scale && at + WIDTH <= dim; at += WIDTH) {
        typedef int8_t Codes __attribute__((vector_size(WIDTH)));
        int8_t codes[WIDTH];
        const Codes rounded_ones = __builtin_convertvector(rounded(load(x + at) * inverse), Codes);
        memcpy(codes, &rounded_ones, WIDTH);
        for (int four = 0; four < WIDTH; four += 4) put(at + four, codes + four);
    }
    for (; at < dim; at += 4) {
        int8_t codes[4] = {};
        for (int i = 0; has_scale && i < 4 && at + i < dim; i++) codes[i] = int8_t(std::nearbyint(x[at + i] * inverse));
        put(at, codes);
    }
    return has_scale ? top / 127.0f : 0.0f;
}

// One token of a head, x[dim], to its place in the row; x may change.
static inline void write_head(const Pool& pool, uint8_t* row, int part, int offset, float* x) {
    keep_finite(x, pool.dim);
    if (pool.bits == 32) {
        memcpy(row + size_t(offset) * pool.dim * sizeof(float), x, sizeof(float) * pool.dim);
    } else if (part == KEYS) {
        spread(x, pool.dim);
        pool.scales(row)[offset] = quantize_head(x, pool.dim, [&](int at, const int8_t* codes) {
            memcpy(row + size_t(at) * pool.block_size + 4 * offset, codes, 4);
        });
    } else {
        pool.scales(row)[offset] = quantize_head(x, pool.dim, [&](int at, const int8_t* codes) {
            memcpy(row + size_t(offset) * pool.width() + at, codes, 4);
        });
    }
}

// The runs of bytes that hold `tokens` tokens of a row from `offset` on: use(at, bytes).
template <typename Use>
static inline void for_each_run(const Pool& pool, uint8_t* row, int part, int offset, int tokens, Use use) {
    const size_t token_bytes = pool.width() * (pool.bits / 8);
    if (pool.bits == 8 && part == KEYS)
        for (int four = 0; four < pool.width() / 4; four++) use(row + (size_t(four) * pool.block_size + offset) * 4, tokens * 4);
    else use(row + offset * token_bytes, tokens * token_bytes);
    if (pool.bits == 8) use(reinterpret_cast<uint8_t*>(pool.scales(row) + offset), tokens * sizeof(float));
}
