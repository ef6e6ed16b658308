// A tile of the context: keys and values of one kv head, TILE tokens from a multiple of TILE on, and what
// attention computes with them for rows, which are (query, head) pairs. What a row gets does not depend on the
// other rows, nor on the block size.
//
//     score[row][token] = q[row] . k[token] * log2(e) / sqrt(dim)
//     out[row] = out[row] * shrink[row] + sum over tokens, in order, of weight[row][token] * v[token]
//
// `FloatTile` computes with a pool of float32, `Int8Tile` with one of 8 bits: there the query has 8 bits
// as well, so a score is an exact sum of integers, scaled; weights and sums of values are float32.
#pragma once

#include <algorithm>
#include <vector>

#include "pool.h"

constexpr int TILE = 64;                      // tokens
constexpr int AT_ONCE = WIDTH == 16 ? 4 : 2;  // registers of tokens, or of a head's width
constexpr int FEW_ROWS = 4;                   // that see a tile all together

// A sequence's query tokens: positions [start, start + queries), from the batch's token `first` on.
struct Sequence {
    int32_t first, queries, start;
    const int32_t* table;  // its blocks
};

// Tokens [begin, end) of the tile that begins at position `base`.
struct TilePlace {
    int layer, kv_head, base, begin, end;
};

// The parts of the tile that lie in one block: use(block, offset, token, tokens).
template <typename Use>
static inline void for_each_block(const Pool& pool, const Sequence& sequence, const TilePlace& place, Use use) {
    for (int token = place.begin; token < place.end;) {
        const int position = place.base + token, offset = position % pool.block_size;
        const int tokens = std::min(pool.block_size - offset, place.end - token);
        use(sequence.table[position / pool.block_size], offset, token, tokens);
        token += tokens;
    }
}

static inline int rounded_up_to_lanes(int n) { return (n + LANES - 1) / LANES * LANES; }

// out[row][at..] = out * shrink[row] + the sum of weights[row][token] * value(token, at..), in order, for R rows and
// V registers of a head's width.
template <int R, int V, typename Value>
static inline void add_values(
    const float* weights, int at, int begin, int end, const float* shrink, float* out, int width, Value value) {
    Floats sum[R][V];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) sum[r][i] = load(out + r * width + at + i * WIDTH) * shrink[r];
    for (int token = begin; token < end; token++)
        for (int i = 0; i < V; i++) {
            const Floats values = value(token, at + i * WIDTH);
            for (int r = 0; r < R; r++) sum[r][i] = fused(all(weights[r * TILE + token]), values, sum[r][i]);
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) store(out + r * width + at + i * WIDTH, sum[r][i]);
}

template <int R, typename Value>
static inline void add_all_values(
    const float* weights, int begin, int end, const float* shrink, float* out, int width, Value value) {
    int at = 0;
    for (; at + AT_ONCE * WIDTH <= width; at += AT_ONCE * WIDTH)
        add_values<R, AT_ONCE>(weights, at, begin, end, shrink, out, width, value);
    for (; at < width; at += WIDTH) add_values<R, 1>(weights, at, begin, end, shrink, out, width, value);
}

class FloatTile {
   public:
    FloatTile(int rows, const Pool& pool)
        : width(rounded_up_to_lanes(pool.dim)), pool_(pool), q_(size_t(rows) * width), k_(size_t(width) * TILE),
          v_(size_t(TILE) * width) {}

    void take_query(int row, const float* q) {
        const Floats scale = all(LOG2_E / std::sqrt(float(pool_.dim)));
        float* ours = q_.data() + size_t(row) * width;
        memcpy(ours, q, sizeof(float) * pool_.dim);
        for (int d = 0; d < width; d += WIDTH) store(ours + d, load(ours + d) * scale);
    }

    // Turns keys into columns. `rows` is for how many.
    void read(const Sequence& sequence, const TilePlace& place, int /*rows*/) {
        point_to_rows(sequence, place);
        for (int token = place.begin / 8 * 8; token < place.end; token += 8) {
            const float* rows[8];  // beyond the tokens to be seen: any finite numbers, which nobody sees
            for (int i = 0; i < 8; i++) rows[i] = k_rows_[std::clamp(token + i, place.begin, place.end - 1)];
            int d = 0;
            for (; d + 8 <= pool_.dim; d += 8) transpose_8x8(rows, d, k_.data() + size_t(d) * TILE + token, TILE);
            for (; d < pool_.dim; d++)
                for (int i = 0; i < 8; i++) k_[size_t(d) * TILE + token + i] = rows[i][d];
        }
        if (pool_.dim == width) return;
        for (int token = place.begin; token < place.end; token++) {
            float* padded = v_.data() + size_t(token) * width;
            memcpy(padded, v_rows_[token], sizeof(float) * pool_.dim);
            v_rows_[token] = padded;
        }
    }

    // Of R rows: [R][TILE], at least for tokens [begin, end).
    template <int R>
    void score(int row, int /*begin*/, int end, float* scores) const {
        const float* q = q_.data() + size_t(row) * width;
        int token = 0;
        for (; token + (AT_ONCE - 1) * WIDTH < end; token += AT_ONCE * WIDTH) score<R, AT_ONCE>(q, token, scores);
        for (; token < end; token += WIDTH) score<R, 1>(q, token, scores);
    }

    // Nothing is fetched while this tile computes.
    bool fetches_ahead(int /*rows*/) const { return false; }
    void fetch_ahead(const Sequence& /*sequence*/, const TilePlace& /*place*/) {}

    // Weights of tokens are those of values.
    Floats value_weights(int /*token*/, Floats weights) const { return weights; }

    template <int R>
    void add_values(const float* weights, int begin, int end, const float* shrink, float* out) const {
        add_all_values<R>(weights, begin, end, shrink, out, width, [&](int token, int at) { return load(v_rows_[token] + at); });
    }

    const int width;  // of a row of results, with zeros behind dim

   private:
    void point_to_rows(const Sequence& sequence, const TilePlace& place) {
        for_each_block(pool_, sequence, place, [&](int block, int offset, int token, int tokens) {
            const auto k = reinterpret_cast<const float*>(pool_.row(block, place.layer, KEYS, place.kv_head));
            const auto v = reinterpret_cast<const float*>(pool_.row(block, place.layer, VALUES, place.kv_head));
            for (int i = 0; i < tokens; i++) {
                k_rows_[token + i] = k + size_t(offset + i) * pool_.dim;
                v_rows_[token + i] = v + size_t(offset + i) * pool_.dim;
            }
        });
    }

    template <int R, int V>
    void score(const float* q, int token, float* scores) const {
        const float* k = k_.data() + token;
        Floats sum[R][V]{};
        for (int d = 0; d < pool_.dim; d++, k += TILE)
            for (int r = 0; r < R; r++)
                for (int i = 0; i < V; i++) sum[r][i] = fused(all(q[r * width + d]), load(k + i * WIDTH), sum[r][i]);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) store(scores + r * TILE + token + i * WIDTH, sum[r][i]);
    }

    const Pool pool_;
    std::vector<float> q_;  // [rows][width], times what a score is scaled by
    std::vector<float> k_;  // [dim][TILE]
    std::vector<float> v_;  // values that need zeros behind them: [TILE][width]
    const float* k_rows_[TILE];
    const float* v_rows_[TILE];
};

// Four dimensions of WIDTH tokens' keys, ready to be multiplied with those of a query.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
struct Keys {
    __m512i plus_128;
    explicit Keys(const int8_t* at) : plus_128(_mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8(-128))) {}
};
static inline Ints dot(Ints sum, const Keys& k, int32_t q) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, k.plus_128, _mm512_set1_epi32(q));
}
constexpr int KEY_BIAS = 128;
#elif defined(__AVXVNNI__)
struct Keys {
    __m256i plus_128;
    explicit Keys(const int8_t* at)
        : plus_128(_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)at), _mm256_set1_epi8(-128))) {}
};
static inline Ints dot(Ints sum, const Keys& k, int32_t q) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, k.plus_128, _mm256_set1_epi32(q));
}
constexpr int KEY_BIAS = 128;
#elif defined(__AVX2__)
// |k| * (q with the sign of k): two products of at most 127 * 127 fit into 16 bits.
struct Keys {
    __m256i signed_ones, sizes;
    explicit Keys(const int8_t* at)
        : signed_ones(_mm256_loadu_si256((const __m256i*)at)), sizes(_mm256_abs_epi8(signed_ones)) {}
};
static inline Ints dot(Ints sum, const Keys& k, int32_t q) {
    const __m256i pairs = _mm256_maddubs_epi16(k.sizes, _mm256_sign_epi8(_mm256_set1_epi32(q), k.signed_ones));
    return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
constexpr int KEY_BIAS = 0;
#else
struct Keys {
    const int8_t* at;
    explicit Keys(const int8_t* at) : at(at) {}
};
static inline Ints dot(Ints sum, const Keys& k, int32_t q) {
    int8_t four[4];
    memcpy(four, &q, 4);
    for (int token = 0; token < WIDTH; token++)
        for (int i = 0; i < 4; i++) sum[token] += int32_t(k.at[4 * token + i]) * four[i];
    return sum;
}
constexpr int KEY_BIAS = 0;
#endif

// WIDTH codes. (Compilers make many instructions of a conversion that is not written as one.)
static inline Floats floats_of(const int8_t* codes) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes)));
#else
    Floats values;
    for (int i = 0; i < WIDTH; i++) values[i] = float(codes[i]);
    return values;
#endif
}

class Int8Tile {
   public:
    Int8Tile(int rows, const Pool& pool)
        : width(rounded_up_to_lanes(pool.dim)), pool_(pool), fours_(pool.width() / 4), rotated_(width),
          q_(size_t(rows) * fours_), q_scale_(rows), q_begin_(rows), k_(size_t(fours_) * TILE * 4),
          v_(size_t(TILE) * width) {}

    void take_query(int row, const float* q) {
        memcpy(rotated_.data(), q, sizeof(float) * pool_.dim);
        keep_finite(rotated_.data(), pool_.dim);
        spread(rotated_.data(), pool_.dim);
        const auto codes = reinterpret_cast<int8_t*>(&q_[size_t(row) * fours_]);
        const float scale = quantize_head(rotated_.data(), pool_.dim, codes);
        int32_t sum = 0;
        for (int d = 0; d < pool_.dim; d++) sum += codes[d];
        // Spreading both sides made their product spread_of(dim) times larger.
        q_scale_[row] = scale * (LOG2_E / std::sqrt(float(pool_.dim)) / float(spread_of(pool_.dim)));
        q_begin_[row] = -KEY_BIAS * sum;
    }

    // `rows`: for how many. Values that few rows see are not worth keeping as floats.
    void read(const Sequence& sequence, const TilePlace& place, int rows) {
        const bool in_place = pool_.block_size % WIDTH == 0;  // keys of a register's tokens lie in one block
        k_step_ = in_place ? pool_.block_size * 4 : TILE * 4;
        for_each_block(pool_, sequence, place, [&](int block, int offset, int token, int tokens) {
            uint8_t* k = pool_.row(block, place.layer, KEYS, place.kv_head);
            uint8_t* v = pool_.row(block, place.layer, VALUES, place.kv_head);
            memcpy(k_scale_ + token, pool_.scales(k) + offset, sizeof(float) * tokens);
            memcpy(v_scale_ + token, pool_.scales(v) + offset, sizeof(float) * tokens);
            for (int i = 0; i < tokens; i++)
                v_rows_[token + i] = reinterpret_cast<const int8_t*>(v) + size_t(offset + i) * pool_.width();
            const auto codes = reinterpret_cast<const int8_t*>(k) + 4 * offset;
            if (in_place) point_to_keys(codes, token, tokens);
            else copy_keys(codes, token, tokens);
        });
        as_floats_ = rows > FEW_ROWS || pool_.dim != width;
        if (as_floats_) values_to_floats(place.begin, place.end);
    }

    template <int R>
    void score(int row, int begin, int end, float* scores) const {
        int token = begin / WIDTH * WIDTH;
        for (; token + (AT_ONCE - 1) * WIDTH < end; token += AT_ONCE * WIDTH) score<R, AT_ONCE>(row, token, scores);
        for (; token < end; token += WIDTH) score<R, 1>(row, token, scores);
    }

    // If few rows see a tile, reading it takes as long as computing with it: then the processor fetches the
    // next one bit by bit meanwhile. (Asked for many lines at once, it waits until most of them are there.)
    bool fetches_ahead(int rows) const { return rows <= FEW_ROWS && pool_.dim == width && pool_.block_size <= TILE; }

    // What `add_values` shall fetch: whole rows, though the tile may begin or end within one.
    void fetch_ahead(const Sequence& sequence, const TilePlace& place) {
        const size_t row_bytes = pool_.row_bytes();
        int lines = 0;
        for_each_block(pool_, sequence, place, [&](int block, int, int, int) {
            for (int part : {KEYS, VALUES}) {
                const uint8_t* row = pool_.row(block, place.layer, part, place.kv_head);
                for (size_t line = 0; line < row_bytes; line += 64)
                    if (lines < AHEAD) ahead_[lines++] = row + line;
                    else __builtin_prefetch(row + line);
            }
        });
        std::fill(ahead_ + lines, ahead_ + AHEAD, reinterpret_cast<const uint8_t*>(v_scale_));
    }

    Floats value_weights(int token, Floats weights) const { return weights * load(v_scale_ + token); }

    template <int R>
    void add_values(const float* weights, int begin, int end, const float* shrink, float* out) const {
        if (as_floats_)
            add_all_values<R>(weights, begin, end, shrink, out, width, [&](int token, int at) {
                return load(v_.data() + size_t(token) * width + at);
            });
        else
            add_all_values<R>(weights, begin, end, shrink, out, width, [rows = v_rows_, ahead = ahead_](int token, int at) {
                if (at == 0) {
                    __builtin_prefetch(ahead[2 * token]);
                    __builtin_prefetch(ahead[2 * token + 1]);
                }
                return floats_of(rows[token] + at);
            });
    }

    const int width;

   private:
    void point_to_keys(const int8_t* codes, int token, int tokens) {
        for (int part = token / WIDTH; part * WIDTH < token + tokens; part++)
            k_at_[part] = codes + 4 * (part * WIDTH - token);
    }

    void copy_keys(const int8_t* codes, int token, int tokens) {
        for (int four = 0; four < fours_; four++)
            memcpy(k_.data() + (four * TILE + token) * 4, codes + size_t(four) * pool_.block_size * 4, 4 * tokens);
        for (int part = 0; part < TILE / WIDTH; part++) k_at_[part] = k_.data() + part * WIDTH * 4;
    }

    void values_to_floats(int begin, int end) {
        for (int token = begin; token < end; token++) {
            float* to = v_.data() + size_t(token) * width;
            int at = 0;
            for (; at + WIDTH <= pool_.dim; at += WIDTH) store(to + at, floats_of(v_rows_[token] + at));
            for (; at < pool_.dim; at++) to[at] = float(v_rows_[token][at]);
        }
    }

    template <int R, int V>
    void score(int row, int token, float* scores) const {
        const int32_t* q = q_.data() + size_t(row) * fours_;
        const int8_t* const* k = k_at_ + token / WIDTH;
        Ints sum[R][V];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) sum[r][i] = Ints{} + q_begin_[row + r];
        for (int four = 0; four < fours_; four++)
            for (int i = 0; i < V; i++) {
                const Keys keys(k[i] + four * k_step_);
                for (int r = 0; r < R; r++) sum[r][i] = dot(sum[r][i], keys, q[r * fours_ + four]);
            }
        for (int i = 0; i < V; i++) {
            const Floats k_scale = load(k_scale_ + token + i * WIDTH);
            for (int r = 0; r < R; r++)
                store(scores + r * TILE + token + i * WIDTH,
                      __builtin_convertvector(sum[r][i], Floats) * (k_scale * q_scale_[row + r]));
        }
    }

    const Pool pool_;
    const int fours_;              // of a head's dimensions
    std::vector<float> rotated_;   // a query
    std::vector<int32_t> q_;       // [rows][fours]: four codes each
    std::vector<float> q_scale_;   // [rows], times what a score is scaled by
    std::vector<int32_t> q_begin_; // [rows], where their sums begin
    std::vector<int8_t> k_;        // keys that do not lie in whole registers: [fours][TILE][4]
    std::vector<float> v_;         // values that many rows see: [TILE][width]
    static constexpr int AHEAD = 2 * TILE;
    const uint8_t* ahead_[AHEAD] = {};  // lines to fetch, two for each token
    bool as_floats_ = false;
    size_t k_step_ = 0;            // from four dimensions to the next
    const int8_t* k_at_[TILE / WIDTH] = {};
    const int8_t* v_rows_[TILE] = {};
    float k_scale_[TILE] = {}, v_scale_[TILE] = {};
};
