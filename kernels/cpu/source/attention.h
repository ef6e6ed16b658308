// Causal grouped-query attention straight over the paged pool, with a softmax that is computed as the
// context passes by (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et
// al., "FlashAttention", 2022).
//
// The context is taken in tiles of TILE tokens that begin at multiples of TILE, whatever the block size
// is. A query's result is made from the tiles it sees, in order, and from nothing else: it is the same to
// the last bit in a prompt's chunk, however cut, as in a decode step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "vector.h"

constexpr int TILE = 64;          // tokens
constexpr int QUERY_ROWS = 32;    // (query, head) pairs of one kv head that share the tiles they read
constexpr float LOG2_E = 1.44269504f;

struct Pool {
    float* data;  // [blocks][layers][k|v][kv_heads][block_size][dim]
    int32_t layers, kv_heads, block_size, dim;

    // k (part 0) or v (part 1) of the token at `offset` in a block.
    float* at(int block, int layer, int part, int head, int offset) const {
        const size_t run = ((size_t(block) * layers + layer) * 2 + part) * kv_heads + head;
        return data + (run * block_size + offset) * dim;
    }
};

// A sequence's query tokens: positions [start, start + queries), from the batch's token `first` on.
struct Sequence {
    int32_t first, queries, start;
    const int32_t* table;  // its blocks
};

struct Attention {
    Pool pool;
    int32_t layer, heads, window;  // window: tokens that a query sees, itself included; 0: all
    const float* q;                // [tokens][q_stride], the heads one after the other
    size_t q_stride;
    float* out;                    // [tokens][out_stride]
    size_t out_stride;
};

// What one thread works in.
class AttentionScratch {
   public:
    AttentionScratch(int rows, int dim)
        : width(rounded_up_to_lanes(dim)), q(size_t(rows) * width), out(size_t(rows) * width), k(size_t(width) * TILE),
          v(size_t(TILE) * width), scores(size_t(rows) * TILE), top(rows), sums(size_t(rows) * LANES) {}

    static int rounded_up_to_lanes(int n) { return (n + LANES - 1) / LANES * LANES; }

    Floats* sums_of(int row) { return reinterpret_cast<Floats*>(sums.data() + size_t(row) * LANES); }

    const int width;               // of a head, with zeros behind it
    std::vector<float> q, out;     // [rows][width]
    std::vector<float> k;          // a tile's keys: [dim][TILE]
    std::vector<float> v;          // its values if they need zeros behind them: [TILE][width]
    std::vector<float> scores;     // [rows][TILE], then the weights of the values
    std::vector<float> top;        // [rows], the largest score so far
    std::vector<float> sums;       // [rows][LANES], of the weights so far
    const float* k_rows[TILE];
    const float* v_rows[TILE];
};

// scores[row][token] = q[row] . k[token], for R rows and V registers of tokens.
template <int R, int V>
static inline void score(const float* q, int width, const float* k, int dim, float* scores) {
    Floats sum[R][V]{};
    for (int d = 0; d < dim; d++, k += TILE)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) sum[r][i] = fused(all(q[r * width + d]), load(k + i * WIDTH), sum[r][i]);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) store(scores + r * TILE + i * WIDTH, sum[r][i]);
}

// out[row] += weights[row][token] * v[token], for R rows and V registers of a head's width.
template <int R, int V>
static inline void add_values(const float* weights, const float* const* v, int at, int begin, int end, float* out, int width) {
    Floats sum[R][V];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) sum[r][i] = load(out + r * width + at + i * WIDTH);
    for (int token = begin; token < end; token++)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++)
                sum[r][i] = fused(all(weights[r * TILE + token]), load(v[token] + at + i * WIDTH), sum[r][i]);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) store(out + r * width + at + i * WIDTH, sum[r][i]);
}

constexpr int AT_ONCE = WIDTH == 16 ? 4 : 2;  // registers of tokens, or of a head's width

template <int R>
static void score_rows(const AttentionScratch& s, int row, int dim, int tokens, float* scores) {
    const float* q = s.q.data() + size_t(row) * s.width;
    int token = 0;
    for (; token + (AT_ONCE - 1) * WIDTH < tokens; token += AT_ONCE * WIDTH)
        score<R, AT_ONCE>(q, s.width, s.k.data() + token, dim, scores + token);
    for (; token < tokens; token += WIDTH) score<R, 1>(q, s.width, s.k.data() + token, dim, scores + token);
}

template <int R>
static void add_rows(AttentionScratch& s, int row, int begin, int end) {
    const float* weights = s.scores.data() + size_t(row) * TILE;
    float* out = s.out.data() + size_t(row) * s.width;
    int at = 0;
    for (; at + AT_ONCE * WIDTH <= s.width; at += AT_ONCE * WIDTH)
        add_values<R, AT_ONCE>(weights, s.v_rows, at, begin, end, out, s.width);
    for (; at < s.width; at += WIDTH) add_values<R, 1>(weights, s.v_rows, at, begin, end, out, s.width);
}

// Scores become weights of the tile's values; what was summed before shrinks if the largest score grows.
// The row sees the tile's tokens [begin, end), at least one.
static void weigh(AttentionScratch& s, int row, int begin, int end) {
    float* scores = s.scores.data() + size_t(row) * TILE;
    const int stop = (end + WIDTH - 1) / WIDTH * WIDTH;
    for (int token = 0; token < begin; token++) scores[token] = -INFINITY;
    for (int token = end; token < TILE; token++) scores[token] = -INFINITY;
    Floats largest = all(s.top[row]);
    for (int token = 0; token < stop; token += WIDTH) largest = larger(load(scores + token), largest);
    const float top = max_of(largest);
    const Floats shrink = exp2_of(all(s.top[row] - top));
    s.top[row] = top;
    Floats* sums = s.sums_of(row);
    for (int part = 0; part < PARTS; part++) sums[part] *= shrink;
    for (int token = 0; token < TILE; token += WIDTH) {
        const Floats weight = token < stop ? exp2_of(load(scores + token) - top) : Floats{};
        sums[token / WIDTH % PARTS] += weight;
        store(scores + token, weight);
    }
    float* out = s.out.data() + size_t(row) * s.width;
    for (int at = 0; at < s.width; at += WIDTH) store(out + at, load(out + at) * shrink);
}

// Points to the tile's keys and values and turns the keys into columns. Tokens [begin, end) of the tile.
static void read_tile(const Attention& a, const Sequence& sequence, int kv_head, int base, int begin, int end, AttentionScratch& s) {
    const Pool& pool = a.pool;
    for (int token = begin; token < end; token++) {
        const int position = base + token, offset = position % pool.block_size;
        const int block = sequence.table[position / pool.block_size];
        s.k_rows[token] = pool.at(block, a.layer, 0, kv_head, offset);
        s.v_rows[token] = pool.at(block, a.layer, 1, kv_head, offset);
    }
    for (int token = begin / 8 * 8; token < end; token += 8) {
        const float* rows[8];  // beyond the tokens to be seen: any finite numbers, which `weigh` hides
        for (int i = 0; i < 8; i++) rows[i] = s.k_rows[std::min(std::max(token + i, begin), end - 1)];
        int d = 0;
        for (; d + 8 <= pool.dim; d += 8) transpose_8x8(rows, d, s.k.data() + size_t(d) * TILE + token, TILE);
        for (; d < pool.dim; d++)
            for (int i = 0; i < 8; i++) s.k[size_t(d) * TILE + token + i] = rows[i][d];
    }
    if (pool.dim == s.width) return;
    for (int token = begin; token < end; token++) {
        float* padded = s.v.data() + size_t(token) * s.width;
        memcpy(padded, s.v_rows[token], sizeof(float) * pool.dim);
        s.v_rows[token] = padded;
    }
}

// Asks for a tile's keys and values: blocks lie anywhere in memory, where the processor does not look ahead.
static void prefetch_tile(const Attention& a, const Sequence& sequence, int kv_head, int begin, int end) {
    const Pool& pool = a.pool;
    for (int position = begin; position < end;) {
        const int offset = position % pool.block_size, tokens = std::min(pool.block_size - offset, end - position);
        for (int part = 0; part < 2; part++) {
            const int block = sequence.table[position / pool.block_size];
            const char* from = reinterpret_cast<const char*>(pool.at(block, a.layer, part, kv_head, offset));
            for (size_t at = 0; at < sizeof(float) * pool.dim * tokens; at += 64) __builtin_prefetch(from + at, 0, 2);
        }
        position += tokens;
    }
}

// Queries [from, from + queries) of a sequence, all heads of one kv head. `next_head`: whether the caller
// goes on with the next kv head.
static void attend(
    const Attention& a, const Sequence& sequence, int from, int queries, int kv_head, bool next_head, AttentionScratch& s) {
    const int dim = a.pool.dim, shared = a.heads / a.pool.kv_heads, rows = queries * shared;
    const Floats scale = all(LOG2_E / std::sqrt(float(dim)));
    auto seen_from = [&](int position) { return a.window == 0 ? 0 : std::max(0, position + 1 - a.window); };
    auto token_of = [&](int row) { return size_t(sequence.first) + from + row / shared; };
    auto head_of = [&](int row) { return size_t(kv_head * shared + row % shared) * dim; };

    std::fill_n(s.out.begin(), size_t(rows) * s.width, 0.0f);
    std::fill_n(s.sums.begin(), size_t(rows) * LANES, 0.0f);
    std::fill_n(s.top.begin(), rows, -INFINITY);
    for (int row = 0; row < rows; row++) {
        float* q = s.q.data() + size_t(row) * s.width;
        memcpy(q, a.q + token_of(row) * a.q_stride + head_of(row), sizeof(float) * dim);
        for (int d = 0; d < s.width; d += WIDTH) store(q + d, load(q + d) * scale);
    }
    const int first = sequence.start + from, last = first + queries - 1;
    const int tiles_from = seen_from(first) / TILE * TILE;
    for (int base = tiles_from; base <= last; base += TILE) {
        const int begin = std::max(seen_from(first) - base, 0), end = std::min(last + 1 - base, TILE);
        if (base + TILE <= last) prefetch_tile(a, sequence, kv_head, base + TILE, std::min(last + 1, base + 2 * TILE));
        else if (next_head) prefetch_tile(a, sequence, kv_head + 1, seen_from(first), std::min(last + 1, tiles_from + TILE));
        read_tile(a, sequence, kv_head, base, begin, end, s);
        for (int row = 0; row < rows; row += 4) {
            const int count = std::min(4, rows - row);
            float* scores = s.scores.data() + size_t(row) * TILE;
            if (count == 4) score_rows<4>(s, row, dim, end, scores);
            else if (count == 3) score_rows<3>(s, row, dim, end, scores);
            else if (count == 2) score_rows<2>(s, row, dim, end, scores);
            else score_rows<1>(s, row, dim, end, scores);
            for (int r = row; r < row + count; r++) {
                const int position = first + r / shared;
                const int row_begin = std::max(seen_from(position) - base, 0);
                const int row_end = std::min(position + 1 - base, TILE);
                if (row_begin < row_end) weigh(s, r, row_begin, row_end);
                else std::fill_n(s.scores.begin() + size_t(r) * TILE, TILE, 0.0f);
            }
            if (count == 4) add_rows<4>(s, row, begin, end);
            else if (count == 3) add_rows<3>(s, row, begin, end);
            else if (count == 2) add_rows<2>(s, row, begin, end);
            else add_rows<1>(s, row, begin, end);
        }
    }
    for (int row = 0; row < rows; row++) {
        const float whole = sum_of(s.sums_of(row));
        float* out = a.out + token_of(row) * a.out_stride + head_of(row);
        for (int d = 0; d < dim; d++) out[d] = s.out[size_t(row) * s.width + d] / whole;
    }
}

// One item of work for the team: a sequence's queries [from, from + queries), kv heads [kv_head, end).
struct AttentionItem {
    int32_t sequence, from, queries, kv_head, kv_heads_end;
};

static void attend(const Attention& a, const Sequence* sequences, const AttentionItem& item, AttentionScratch& s) {
    for (int head = item.kv_head; head < item.kv_heads_end; head++)
        attend(a, sequences[item.sequence], item.from, item.queries, head, head + 1 < item.kv_heads_end, s);
}

static std::vector<AttentionItem> attention_items(
    const Sequence* sequences, int count, int heads, int kv_heads, int threads) {
    const int step = std::max(1, QUERY_ROWS / (heads / kv_heads));
    int parts = 0;
    for (int index = 0; index < count; index++) parts += (sequences[index].queries + step - 1) / step;
    const int kv_heads_per_item = parts < 4 * threads ? 1 : kv_heads;  // few parts are shared out by heads
    std::vector<AttentionItem> items;
    for (int index = 0; index < count; index++)
        for (int from = 0; from < sequences[index].queries; from += step)
            for (int head = 0; head < kv_heads; head += kv_heads_per_item)
                items.push_back(
                    {index, from, std::min(step, sequences[index].queries - from), head, head + kv_heads_per_item});
    return items;
}

static int attention_rows(int heads, int kv_heads) { return std::max(QUERY_ROWS, heads / kv_heads); }
