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
          v(size_t(TILE) * width), scores(4 * TILE), top(rows), sums(size_t(rows) * LANES) {}

    static int rounded_up_to_lanes(int n) { return (n + LANES - 1) / LANES * LANES; }

    Floats* sums_of(int row) { return reinterpret_cast<Floats*>(sums.data() + size_t(row) * LANES); }

    const int width;               // of a head, with zeros behind it
    std::vector<float> q, out;     // [rows][width]
    std::vector<float> k;          // a tile's keys: [dim][TILE]
    std::vector<float> v;          // its values if they need zeros behind them: [TILE][width]
    std::vector<float> scores;     // [4][TILE], of the rows at hand; then the weights of the values
    std::vector<float> top;        // [rows], the largest score so far
    std::vector<float> sums;       // [rows][LANES], of the weights so far
    const float* k_rows[TILE];
    const float* v_rows[TILE];
    float fetched;  // what was read ahead must go somewhere
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
static void score_rows(AttentionScratch& s, int row, int dim, int tokens) {
    float* scores = s.scores.data();
    const float* q = s.q.data() + size_t(row) * s.width;
    int token = 0;
    for (; token + (AT_ONCE - 1) * WIDTH < tokens; token += AT_ONCE * WIDTH)
        score<R, AT_ONCE>(q, s.width, s.k.data() + token, dim, scores + token);
    for (; token < tokens; token += WIDTH) score<R, 1>(q, s.width, s.k.data() + token, dim, scores + token);
}

template <int R>
static void add_rows(AttentionScratch& s, int row, int begin, int end) {
    const float* weights = s.scores.data();
    float* out = s.out.data() + size_t(row) * s.width;
    int at = 0;
    for (; at + AT_ONCE * WIDTH <= s.width; at += AT_ONCE * WIDTH)
        add_values<R, AT_ONCE>(weights, s.v_rows, at, begin, end, out, s.width);
    for (; at < s.width; at += WIDTH) add_values<R, 1>(weights, s.v_rows, at, begin, end, out, s.width);
}

// Scores become weights of the tile's values; what was summed before shrinks if the largest score grows.
// The row sees the tile's tokens [begin, end), at least one.
static void weigh(AttentionScratch& s, int row, float* scores, int begin, int end) {
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

// One item of work for the team: a sequence's queries [from, from + queries), kv heads [kv_head, kv_heads_end).
struct AttentionItem {
    int32_t sequence, from, queries, kv_head, kv_heads_end;
};

// An item being computed. Its rows are the (query, head) pairs of the first kv head, then of the next.
class Attending {
   public:
    Attending(const Attention& attention, const Sequence* sequences, const AttentionItem& item, AttentionScratch& scratch)
        : a_(attention), sequence_(sequences[item.sequence]), item_(item), s_(scratch),
          shared_(attention.heads / attention.pool.kv_heads), rows_(item.queries * shared_),
          first_(sequence_.start + item.from), last_(first_ + item.queries - 1) {}

    void run() {
        begin();
        const int heads = item_.kv_heads_end - item_.kv_head;
        for (int base = seen_from(first_) / TILE * TILE; base <= last_; base += TILE) {
            const int from = std::max(seen_from(first_) - base, 0), to = std::min(last_ + 1 - base, TILE);
            fetch(base, from, to);
            for (int head = 0; head < heads; head++) {
                read_tile(a_, sequence_, item_.kv_head + head, base, from, to, s_);
                for (int row = 0; row < rows_; row += 4) see_tile(head * rows_, row, std::min(4, rows_ - row), base, from, to);
            }
        }
        finish();
    }

   private:
    // The first position that a query sees.
    int seen_from(int position) const { return a_.window == 0 ? 0 : std::max(0, position + 1 - a_.window); }

    // Where the query of a row lies in the batch's tokens, or its result.
    size_t place(int row, size_t stride) const {
        const int token = sequence_.first + item_.from + row % rows_ / shared_;
        const int head = (item_.kv_head + row / rows_) * shared_ + row % shared_;
        return token * stride + size_t(head) * a_.pool.dim;
    }

    int all_rows() const { return rows_ * (item_.kv_heads_end - item_.kv_head); }

    void begin() {
        const Floats scale = all(LOG2_E / std::sqrt(float(a_.pool.dim)));
        std::fill_n(s_.out.begin(), size_t(all_rows()) * s_.width, 0.0f);
        std::fill_n(s_.sums.begin(), size_t(all_rows()) * LANES, 0.0f);
        std::fill_n(s_.top.begin(), all_rows(), -INFINITY);
        for (int row = 0; row < all_rows(); row++) {
            float* q = s_.q.data() + size_t(row) * s_.width;
            memcpy(q, a_.q + place(row, a_.q_stride), sizeof(float) * a_.pool.dim);
            for (int d = 0; d < s_.width; d += WIDTH) store(q + d, load(q + d) * scale);
        }
    }

    // Reads a tile's keys and values of all heads from end to end. The loops that compute with them jump
    // about in them, and the processor does not read ahead of jumps: blocks lie anywhere in memory.
    void fetch(int base, int from, int to) {
        const Pool& pool = a_.pool;
        Floats sum{};
        for (int position = base + from; position < base + to;) {
            const int block = sequence_.table[position / pool.block_size], offset = position % pool.block_size;
            const int tokens = std::min(pool.block_size - offset, base + to - position);
            for (int part = 0; part < 2; part++)
                for (int head = item_.kv_head; head < item_.kv_heads_end; head++) {
                    const float* run = pool.at(block, a_.layer, part, head, offset);
                    for (int at = 0; at + 16 <= tokens * pool.dim; at += 16) sum += load(run + at);  // one per line
                }
            position += tokens;
        }
        s_.fetched = sum[0];
    }

    // Up to four rows of a kv head see the tile that `read_tile` has read.
    void see_tile(int head_rows, int row, int count, int base, int from, int to) {
        if (count == 4) see_tile<4>(head_rows, row, base, from, to);
        else if (count == 3) see_tile<3>(head_rows, row, base, from, to);
        else if (count == 2) see_tile<2>(head_rows, row, base, from, to);
        else see_tile<1>(head_rows, row, base, from, to);
    }

    template <int R>
    void see_tile(int head_rows, int row, int base, int from, int to) {
        score_rows<R>(s_, head_rows + row, a_.pool.dim, to);
        for (int r = 0; r < R; r++) {
            const int position = first_ + (row + r) / shared_;
            const int row_from = std::max(seen_from(position) - base, 0), row_to = std::min(position + 1 - base, TILE);
            if (row_from < row_to) weigh(s_, head_rows + row + r, s_.scores.data() + r * TILE, row_from, row_to);
            else std::fill_n(s_.scores.begin() + r * TILE, TILE, 0.0f);
        }
        add_rows<R>(s_, head_rows + row, from, to);
    }

    void finish() {
        for (int row = 0; row < all_rows(); row++) {
            const float whole = sum_of(s_.sums_of(row));
            float* out = a_.out + place(row, a_.out_stride);
            for (int d = 0; d < a_.pool.dim; d++) out[d] = s_.out[size_t(row) * s_.width + d] / whole;
        }
    }

    const Attention& a_;
    const Sequence& sequence_;
    const AttentionItem& item_;
    AttentionScratch& s_;
    const int shared_, rows_;  // heads per kv head; rows of one kv head
    const int first_, last_;   // positions
};

static std::vector<AttentionItem> attention_items(
    const Sequence* sequences, int count, int heads, int kv_heads, int threads) {
    const int step = std::max(1, QUERY_ROWS / (heads / kv_heads));
    int parts = 0;
    for (int index = 0; index < count; index++) parts += (sequences[index].queries + step - 1) / step;
    // What lies together is read together, unless there is too little for all threads.
    const int kv_heads_per_item = parts < 4 * threads ? 1 : kv_heads;
    std::vector<AttentionItem> items;
    for (int index = 0; index < count; index++)
        for (int from = 0; from < sequences[index].queries; from += step)
            for (int head = 0; head < kv_heads; head += kv_heads_per_item)
                items.push_back(
                    {index, from, std::min(step, sequences[index].queries - from), head, head + kv_heads_per_item});
    return items;
}

// The most rows that an item has.
static int attention_rows(int heads, int kv_heads) { return std::max(QUERY_ROWS * kv_heads, heads); }
