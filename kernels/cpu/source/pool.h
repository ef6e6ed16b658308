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
#include <utility>

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

// x = H x for the Hadamard matrix H of 2 numbers that lie DISTANCE apart, all along a register.
template <int DISTANCE, size_t... LANE>
static inline Floats butterfly(Floats x, std::index_sequence<LANE...>) {
    const Floats other = __builtin_shufflevector(x, x, (int(LANE) ^ DISTANCE)...);
    return fused(x, Floats{(LANE & DISTANCE ? -1.0f : 1.0f)...}, other);
}

template <int DISTANCE = 1>
static inline Floats butterflies(Floats x) {
    if constexpr (DISTANCE == WIDTH) return x;
    else return butterflies<2 * DISTANCE>(butterfly<DISTANCE>(x, std::make_index_sequence<WIDTH>()));
}

// How many numbers a head's Hadamard matrix mixes: the largest power of two that divides `dim`.
static inline int spread_of(int dim) { return dim & -dim; }

// Both halves of x[2 * distance] become their sum and their difference.
static inline void add_and_subtract(float* x, int distance) {
    int i = 0;
    for (; i + WIDTH <= distance; i += WIDTH) {
        const Floats a = load(x + i), b = load(x + i + distance);
        store(x + i, a + b);
        store(x + i + distance, a - b);
    }
    for (; i < distance; i++) {
        const float a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
    }
}

// x = H x along parts of spread_of(dim) numbers. H is not normalised: it makes vectors sqrt(spread) longer.
static inline void spread(float* x, int dim) {
    const int size = spread_of(dim);
    const bool whole = size >= WIDTH;  // registers
    for (int at = 0; whole && at < dim; at += WIDTH) store(x + at, butterflies(load(x + at)));
    for (int distance = whole ? WIDTH : 1; distance < size; distance *= 2)
        for (int at = 0; at < dim; at += 2 * distance) add_and_subtract(x + at, distance);
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

// Codes of finite x[dim], with zeros behind them up to a multiple of 4. Returns their scale: x = code * scale.
// What is too large or too small for a scale is all zeros. The codes may lie where x begins.
static inline float quantize_head(const float* x, int dim, int8_t* codes) {
    const float top = largest_size_of(x, dim);
    if (!(top > 1e-30f && top < INFINITY)) return memset(codes, 0, (dim + 3) / 4 * 4), 0.0f;
    const float inverse = 127.0f / top;
    int at = 0;
    for (; at + WIDTH <= dim; at += WIDTH)
        *reinterpret_cast<Bytes*>(codes + at) = __builtin_convertvector(rounded(load(x + at) * inverse), Bytes);
    for (; at < dim; at++) codes[at] = int8_t(std::nearbyint(x[at] * inverse));
    for (; at % 4 != 0; at++) codes[at] = 0;
    return top / 127.0f;
}

// One token of a head, x[dim], to its place in the row; x may change.
static inline void write_head(const Pool& pool, uint8_t* row, int part, int offset, float* x) {
    keep_finite(x, pool.dim);
    if (pool.bits == 32) {
        memcpy(row + size_t(offset) * pool.dim * sizeof(float), x, sizeof(float) * pool.dim);
    } else if (part == KEYS) {
        spread(x, pool.dim);
        const auto codes = reinterpret_cast<int8_t*>(x);
        pool.scales(row)[offset] = quantize_head(x, pool.dim, codes);
        for (int four = 0; four < pool.width() / 4; four++)
            memcpy(row + (size_t(four) * pool.block_size + offset) * 4, codes + 4 * four, 4);
    } else {
        const auto codes = reinterpret_cast<int8_t*>(row) + size_t(offset) * pool.width();
        pool.scales(row)[offset] = quantize_head(x, pool.dim, codes);
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
