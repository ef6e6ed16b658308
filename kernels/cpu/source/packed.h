// Weights of 4 or 8 bits as the kernels read them, in blocks of outputs and groups of inputs.
//
// They are stored unsigned, for the processors' products of unsigned with signed bytes: with 8 bits as
// q + 128. kernels/cpu/packed_weight.py packs them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector.h"

constexpr int GROUP = 32;    // weights and activations that share a scale, along the inputs
constexpr int COLUMNS = 32;  // outputs that lie together

typedef uint8_t Quads[COLUMNS][4];  // four inputs' weights for each output

// The weights of a group of inputs and a block of outputs; float16 has the scales of GGUF files exactly.
struct EightBit {
    uint16_t scale[COLUMNS];
    Quads weights[GROUP / 4];
};
struct FourBit {
    uint16_t scale[COLUMNS], minimum[COLUMNS];
    Quads weights[GROUP / 8];  // of each eight inputs the first four in the low halves, the others in the high ones
};

struct Packed {
    int32_t outputs, inputs;
    int32_t bits;       // 4, 8 or 32
    const void* units;  // FourBit or EightBit [outputs / COLUMNS][groups], both rounded up; or
                        // float [outputs / COLUMNS, rounded up][inputs][COLUMNS]

    bool has_floats() const { return bits == 32; }

    const float* floats(int block) const { return static_cast<const float*>(units) + size_t(block) * inputs * COLUMNS; }

    template <typename Unit>
    const Unit* block(int index, int groups) const { return static_cast<const Unit*>(units) + size_t(index) * groups; }
};

static inline int rounded_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
static inline int groups_of(int inputs) { return rounded_up(inputs, GROUP) / GROUP; }
static inline int blocks_of(int outputs) { return rounded_up(outputs, COLUMNS) / COLUMNS; }

static inline float half_at(const uint16_t (&numbers)[COLUMNS], int column) {
    return load_halves(numbers + column / WIDTH * WIDTH)[column % WIDTH];
}

static inline void unpack_group(const EightBit& unit, int column, float* to) {
    const float scale = half_at(unit.scale, column);
    for (int k = 0; k < GROUP; k++) to[k] = float(int(unit.weights[k / 4][column][k % 4]) - 128) * scale;
}

static inline void unpack_group(const FourBit& unit, int column, float* to) {
    const float scale = half_at(unit.scale, column), minimum = half_at(unit.minimum, column);
    for (int k = 0; k < GROUP; k++) {
        const int both = unit.weights[k / 8][column][k % 4];
        to[k] = float(k / 4 % 2 == 0 ? both & 15 : both >> 4) * scale + minimum;
    }
}

template <typename Unit>
static void unpack_unit_row(const Packed& weight, int output, float* to) {
    const int groups = groups_of(weight.inputs);
    const Unit* unit = weight.block<Unit>(output / COLUMNS, groups);
    for (int group = 0; group < groups; group++) unpack_group(unit[group], output % COLUMNS, to + group * GROUP);
}

static void copy_float_row(const Packed& weight, int output, float* to) {
    const float* from = weight.floats(output / COLUMNS) + output % COLUMNS;
    for (int k = 0; k < weight.inputs; k++) to[k] = from[size_t(k) * COLUMNS];
}

// The weights of one output as floats. What is written behind them, up to the end of the last group, is zeros.
static void unpack_row(const Packed& weight, int output, float* to) {
    if (weight.has_floats()) copy_float_row(weight, output, to);
    else if (weight.bits == 4) unpack_unit_row<FourBit>(weight, output, to);
    else unpack_unit_row<EightBit>(weight, output, to);
}
