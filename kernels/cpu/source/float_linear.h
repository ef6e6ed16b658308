// Rows of floats times float32 weights.
//
//     y[r][o] = sum over k of x[r][k] * w[o][k]      in the order of k, rounded once for each k (`fused`)
//
// Each sum is one chain of its own, so a row's result does not depend on the rows beside it. What is fast is
// to compute so many chains at once that their registers are all in use: weights come from memory once for all
// of the rows, and a row's number, once it is in a register, meets two registers of outputs.
#pragma once

#include <cstddef>

#include "vector.h"

constexpr int FLOAT_ROWS_AT_ONCE = WIDTH == 16 ? 14 : 6;  // times two registers of sums, of 32 or 16 registers

// Inputs whose weights are fetched before they are needed, into the next block's: 16 KB. The processor by itself
// reads ahead less than memory has to give while it computes (8 rows: 1.3 times the time, 32 rows: 1.2).
constexpr int READ_AHEAD = 128;

// y[R][COLUMNS] from x[R][stride] and w[inputs][COLUMNS].
template <int R, int COLUMNS>
static void multiply_floats(const float* w, const float* x, size_t stride, int inputs, float (*y)[COLUMNS]) {
    for (int column = 0; column < COLUMNS; column += 2 * WIDTH) {
        Floats sum[R][2]{};
        for (int k = 0; k < inputs; k++) {
            const float* at = w + size_t(k) * COLUMNS + column;
            for (int i = 0; i < 2 * WIDTH; i += 16) __builtin_prefetch(at + READ_AHEAD * COLUMNS + i);  // one per line
            const Floats w0 = load(at), w1 = load(at + WIDTH);
            for (int r = 0; r < R; r++) {
                const Floats number = all(x[r * stride + k]);
                sum[r][0] = fused(number, w0, sum[r][0]);
                sum[r][1] = fused(number, w1, sum[r][1]);
            }
        }
        for (int r = 0; r < R; r++) {
            store(y[r] + column, sum[r][0]);
            store(y[r] + column + WIDTH, sum[r][1]);
        }
    }
}

// The same for up to R rows.
template <int R, int COLUMNS>
static void multiply_floats_up_to(int rows, const float* w, const float* x, size_t stride, int inputs, float (*y)[COLUMNS]) {
    if (rows >= R) return multiply_floats<R>(w, x, stride, inputs, y);
    if constexpr (R > 1) multiply_floats_up_to<R - 1>(rows, w, x, stride, inputs, y);
}
