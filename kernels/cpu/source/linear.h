// Projections: with float32 weights (float_linear.h), or with weights of 4 or 8 bits and activations of 8 bits,
// exact within groups.
//
//     8 bits:  y[r][o] = sum over groups g of  dot * (xs[r][g] * d[o][g])                          w = d * q
//     4 bits:  y[r][o] = sum over groups g of  dot * (xs[r][g] * d[o][g])  +  m[o][g] * t[r][g]    w = d * q + m
//
// where dot is the sum of x[r][k] * q[o][k] over the inputs k of g, and t that of x[r][k], times xs[r][g].
// These sums are of integers, so they are exact in any order; the outer one runs over the groups in order,
// rounding every product and sum by itself. A row's result therefore depends on that row alone, and is the
// same to the last bit on every processor.
//
// What q + 128, as weights of 8 bits are stored, adds to a dot product is where that begins (`RowGroup::begin`).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <type_traits>

#include "dots.h"
#include "float_linear.h"
#include "packed.h"
#include "team.h"
#include "vector.h"

constexpr int ROWS_AT_ONCE = WIDTH == 16 ? 8 : WIDTH == 8 ? 4 : 1;  // whose sums fit in registers

struct RowGroup {
    float scale;
    float sum;      // of the group's q, times the scale
    int32_t begin;  // -128 * sum of the group's q
};

// Rows of activations: floats, and what they are rounded to for weights of few bits.
struct Rows {
    const float* x;  // [rows][stride], with zeros up to the end of the last group
    size_t stride;
    int groups;
    int8_t* q;        // [rows][groups * GROUP]; null: for float32 weights, with nothing to round
    RowGroup* group;  // [rows][groups]
};

// The largest magnitude of a group.
static inline float top_of(const float* x) {
    Floats largest{};
    for (int k = 0; k < GROUP; k += WIDTH) largest = larger(absolute(load(x + k)), largest);
    return max_of(largest);
}

// q = x * inverse, rounded; returns their sum.
static inline int32_t quantize_group(const float* x, float inverse, int8_t* q) {
    Ints sums{};
    for (int k = 0; k < GROUP; k += WIDTH) {
        const Ints values = rounded(load(x + k) * all(inverse));
        sums += values << 24 >> 24;
        *reinterpret_cast<Bytes*>(q + k) = __builtin_convertvector(values, Bytes);
    }
    return sum_of(sums);
}

// So many groups that their divisions are one.
static inline void quantize_together(const float* x, int count, int8_t* q, RowGroup* of) {
    float tops[WIDTH]{}, scales[WIDTH], inverses[WIDTH];
    for (int i = 0; i < count; i++) tops[i] = top_of(x + i * GROUP);
    const Floats top = load(tops);
    store(scales, top / 127.0f);
    store(inverses, select(top > 0.0f, 127.0f / top, Floats{}));
    for (int i = 0; i < count; i++) {
        const int32_t sum = quantize_group(x + i * GROUP, inverses[i], q + i * GROUP);
        of[i] = {scales[i], float(sum) * scales[i], -128 * sum};
    }
}

static inline void quantize_one(const float* x, int8_t* q, RowGroup& of) {
    const float top = top_of(x), scale = top / 127.0f;
    const int32_t sum = quantize_group(x, top > 0.0f ? 127.0f / top : 0.0f, q);
    of = {scale, float(sum) * scale, -128 * sum};
}

// Groups [begin, end) of a row.
static void quantize_groups(const Rows& rows, int row, int begin, int end) {
    if (!rows.q) return;
    const float* x = rows.x + row * rows.stride;
    int8_t* q = rows.q + size_t(row) * rows.groups * GROUP;
    RowGroup* of = rows.group + size_t(row) * rows.groups;
    if (end - begin == 1) return quantize_one(x + begin * GROUP, q + begin * GROUP, of[begin]);
    for (int first = begin; first < end; first += WIDTH)
        quantize_together(x + first * GROUP, std::min(WIDTH, end - first), q + first * GROUP, of + first);
}

static void quantize_row(const Rows& rows, int row) { quantize_groups(rows, row, 0, rows.groups); }

static inline int32_t begin_of(const EightBit&, const RowGroup& x) { return x.begin; }
static inline int32_t begin_of(const FourBit&, const RowGroup&) { return 0; }

// sum[r][c] += what a group of R rows and C registers of outputs gives, from its dot products.
template <int R, int C>
static inline void add_group(
    const EightBit& unit, int column, const RowGroup* x, size_t groups, const Ints (&dot)[R][C], Floats (&sum)[R][C]) {
    for (int c = 0; c < C; c++) {
        const Floats scale = load_halves(unit.scale + column + c * WIDTH);
        for (int r = 0; r < R; r++) sum[r][c] += as_floats(dot[r][c]) * (all(x[r * groups].scale) * scale);
    }
}

template <int R, int C>
static inline void add_group(
    const FourBit& unit, int column, const RowGroup* x, size_t groups, const Ints (&dot)[R][C], Floats (&sum)[R][C]) {
    for (int c = 0; c < C; c++) {
        const Floats scale = load_halves(unit.scale + column + c * WIDTH);
        const Floats minimum = load_halves(unit.minimum + column + c * WIDTH);
        for (int r = 0; r < R; r++)
            sum[r][c] += as_floats(dot[r][c]) * (all(x[r * groups].scale) * scale) + minimum * all(x[r * groups].sum);
    }
}

template <typename Unit>
constexpr int sums_of() { return std::is_same_v<Unit, FourBit> ? SUMS_OF_4_BITS : SUMS_OF_8_BITS; }

// Weights that are asked for while others are multiplied with: the processor reads ahead too little by itself
// where several rows pass over each block.
struct Ahead {
    const char *at, *end;
    int lines;  // of the cache, for each group

    void fetch() {
        for (int line = 0; line < lines && at < end; line++, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// The block `next` (-1: none), while so many times a few rows pass over another one. A single row of 8 bits goes
// at the memory's speed by itself, if the processor multiplies bytes; asking for more only slows it.
template <typename Unit>
static Ahead ahead_of(const Packed& weight, int next, int groups, int rows) {
    constexpr int LINES = sizeof(Unit) / 64;
    const int passes = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const bool worth = rows > 1 || std::is_same_v<Unit, FourBit> || !DOT_BYTES;
    if (next < 0 || !worth) return {nullptr, nullptr, 0};
    const char* at = reinterpret_cast<const char*>(weight.block<Unit>(next, groups));
    return {at, at + groups * sizeof(Unit), (LINES + passes - 1) / passes};
}

// y[R][COLUMNS]: R rows times one block of weights.
template <int R, typename Unit>
static void multiply(const Unit* unit, const Rows& x, int row, Ahead& ahead, float (*y)[COLUMNS]) {
    constexpr int AT_ONCE = std::bit_floor(unsigned(std::clamp(sums_of<Unit>() / R, 1, COLUMNS / WIDTH)));
    const size_t groups = x.groups, width = groups * GROUP;
    for (int column = 0; column < COLUMNS; column += AT_ONCE * WIDTH) {
        Floats sum[R][AT_ONCE]{};
        for (size_t group = 0; group < groups; group++) {
            const RowGroup* of = x.group + row * groups + group;
            ahead.fetch();
            Ints dot[R][AT_ONCE];
            for (int r = 0; r < R; r++)
                for (int c = 0; c < AT_ONCE; c++) dot[r][c] = Ints{} + begin_of(*unit, of[r * groups]);
            add_dots<R, AT_ONCE>(unit[group], column, x.q + row * width + group * GROUP, width, dot);
            add_group<R, AT_ONCE>(unit[group], column, of, groups, dot, sum);
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < AT_ONCE; c++) store(y[r] + column + c * WIDTH, sum[r][c]);
    }
}

template <int R, typename Unit>
static void multiply_up_to(int rows, const Unit* unit, const Rows& x, int row, Ahead& ahead, float (*y)[COLUMNS]) {
    if (rows >= R) return multiply<R>(unit, x, row, ahead, y);
    if constexpr (R > 1) multiply_up_to<R - 1>(rows, unit, x, row, ahead, y);
}

// What a team shares out: panels of rows times spans of blocks of outputs. A panel of so many bytes stays in the
// second-level cache while the blocks of weights pass by.
struct Panels {
    int rows, blocks, span;
    size_t row_bytes;
    int rows_at_once;

    // multiply(block, the block after it or -1, first row, end) for each block of a span, then done(row, span) for
    // each of its rows.
    template <typename Multiply, typename Done>
    void share(Team& team, Multiply multiply, Done done) const {
        const int panel = std::max(rows_at_once, int((384 << 10) / row_bytes) / rows_at_once * rows_at_once);
        const int panels = (rows + panel - 1) / panel, spans = (blocks + span - 1) / span;
        team.share(spans * panels, [&](int item, int thread) {
            const int first_block = item % spans * span, first = item / spans * panel;
            const int end = std::min(rows, first + panel), end_block = std::min(blocks, first_block + span);
            const int following = item % spans + Team::step_of(thread);
            for (int block = first_block; block < end_block; block++) {
                const int next = block + 1 < end_block ? block + 1 : following < spans ? following * span : -1;
                multiply(block, next, first, end);
            }
            for (int row = first; row < end; row++) done(row, item % spans);
        });
    }
};

template <typename Unit, typename Use, typename Done>
static void multiply_units(Team& team, const Packed& weight, const Rows& x, int rows, Use use, int span, Done done) {
    const Panels panels{rows, blocks_of(weight.outputs), span, size_t(x.groups) * GROUP, ROWS_AT_ONCE};
    const auto multiply_block = [&](int block, int next, int first, int end) {
        alignas(64) float y[ROWS_AT_ONCE][COLUMNS];
        Ahead ahead = ahead_of<Unit>(weight, next, x.groups, end - first);
        for (int row = first; row < end; row += ROWS_AT_ONCE) {
            const int count = std::min(ROWS_AT_ONCE, end - row);
            multiply_up_to<ROWS_AT_ONCE>(count, weight.block<Unit>(block, x.groups), x, row, ahead, y);
            for (int r = 0; r < count; r++) use(row + r, block, y[r]);
        }
    };
    panels.share(team, multiply_block, done);
}

template <typename Use, typename Done>
static void multiply_with_floats(Team& team, const Packed& weight, const Rows& x, int rows, Use use, int span, Done done) {
    const Panels panels{rows, blocks_of(weight.outputs), span, sizeof(float) * weight.inputs, FLOAT_ROWS_AT_ONCE};
    const auto multiply_block = [&](int block, int /*next*/, int first, int end) {
        alignas(64) float y[FLOAT_ROWS_AT_ONCE][COLUMNS];
        // Parts of about the same size: one of few rows would leave registers idle.
        const int parts = (end - first + FLOAT_ROWS_AT_ONCE - 1) / FLOAT_ROWS_AT_ONCE;
        for (int part = 0, row = first; part < parts; part++) {
            const int count = (end - row) / (parts - part);
            const float* from = x.x + row * x.stride;
            multiply_floats_up_to<FLOAT_ROWS_AT_ONCE>(count, weight.floats(block), from, x.stride, weight.inputs, y);
            for (int r = 0; r < count; r++) use(row + r, block, y[r]);
            row += count;
        }
    };
    panels.share(team, multiply_block, done);
}

// Rows times weights; use(row, block, values[COLUMNS]) takes each row's results of a block of outputs.
// Then, in the same thread, done(row, n) is called for the n-th `span` blocks.
template <typename Use, typename Done>
static void multiply_all(Team& team, const Packed& weight, const Rows& x, int rows, Use use, int span, Done done) {
    if (weight.has_floats()) multiply_with_floats(team, weight, x, rows, use, span, done);
    else if (weight.bits == 4) multiply_units<FourBit>(team, weight, x, rows, use, span, done);
    else multiply_units<EightBit>(team, weight, x, rows, use, span, done);
}

template <typename Use>
static void multiply_all(Team& team, const Packed& weight, const Rows& x, int rows, Use use) {
    multiply_all(team, weight, x, rows, use, 1, [](int, int) {});
}
