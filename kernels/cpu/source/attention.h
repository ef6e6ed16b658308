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
#include <optional>
#include <vector>

#include "kv_tile.h"

constexpr int QUERY_ROWS = 48;    // (query, head) pairs of one kv head that share the tiles they read

struct Attention {
    Pool pool;
    int32_t layer, heads, window;  // window: tokens that a query sees, itself included; 0: all
    const float* q;                // [tokens][q_stride], the heads one after the other
    size_t q_stride;
    float* out;                    // [tokens][out_stride]
    size_t out_stride;
};

// One item of work for the team: a sequence's queries [from, from + queries), kv heads [kv_head, kv_heads_end).
struct AttentionItem {
    int32_t sequence, from, queries, kv_head, kv_heads_end;
};

// The rows of an item, as far as they have seen the context.
struct AttentionRows {
    AttentionRows(int rows, int width) : width(width), out(size_t(rows) * width), top(rows), sums(size_t(rows) * LANES) {}

    void begin(int rows) {
        std::fill_n(out.begin(), size_t(rows) * width, 0.0f);
        std::fill_n(sums.begin(), size_t(rows) * LANES, 0.0f);
        std::fill_n(top.begin(), rows, -INFINITY);
    }

    float* out_of(int row) { return out.data() + size_t(row) * width; }
    Floats* sums_of(int row) { return reinterpret_cast<Floats*>(sums.data() + size_t(row) * LANES); }

    const int width;          // of a head, with zeros behind it
    std::vector<float> out;   // [rows][width], of values times weights so far
    std::vector<float> top;   // [rows], the largest score so far
    std::vector<float> sums;  // [rows][LANES], of the weights so far
    float scores[4 * TILE];   // [4][TILE], of the rows at hand; then the weights of the values
};

// A row sees a tile's tokens [begin, end), if any.
static inline void hide_unseen(int begin, int end, float* scores) {
    std::fill(scores, scores + std::clamp(begin, 0, TILE), -INFINITY);
    std::fill(scores + std::clamp(end, 0, TILE), scores + TILE, -INFINITY);
}

// What a row's scores are relative to: its largest one, once it has seen a token.
static inline float origin_of(float top) { return top > -INFINITY ? top : 0.0f; }

// The largest scores of R rows so far. shrink[LANES] gets for each row what its sums up to now are to be multiplied with.
template <int R>
static inline void raise_tops(const float* scores, float* top, float* shrink) {
    float origin[LANES]{}, before[LANES]{};
    for (int r = 0; r < R; r++) {
        Floats largest = all(top[r]);
        for (int token = 0; token < TILE; token += WIDTH) largest = larger(load(scores + r * TILE + token), largest);
        before[r] = top[r];
        top[r] = max_of(largest);
        origin[r] = origin_of(top[r]);
    }
    for (int r = 0; r < R; r += WIDTH) store(shrink + r, exp2_of(load(before + r) - load(origin + r)));
}

// Scores become weights of the tile's values.
template <int R, typename Tile>
static inline void weigh(const Tile& tile, float* scores, const float* top, const float* shrink, Floats* sums) {
    for (int r = 0; r < R; r++) {
        const float origin = origin_of(top[r]);
        for (int part = 0; part < PARTS; part++) sums[r * PARTS + part] *= shrink[r];
        for (int token = 0; token < TILE; token += WIDTH) {
            float* at = scores + r * TILE + token;
            const Floats weights = exp2_of(load(at) - origin);
            sums[r * PARTS + token / WIDTH % PARTS] += weights;
            store(at, tile.value_weights(token, weights));
        }
    }
}

// Reads a tile's keys and values of some heads from end to end. The loops that compute with them jump
// about in them, and the processor does not read ahead of jumps: blocks lie anywhere in memory.
static void fetch(const Pool& pool, const Sequence& sequence, const TilePlace& first, int kv_heads_end) {
    for_each_block(pool, sequence, first, [&](int block, int offset, int, int tokens) {
        for (int part : {KEYS, VALUES})
            for (int head = first.kv_head; head < kv_heads_end; head++)
                for_each_run(
                    pool, pool.row(block, first.layer, part, head), part, offset, tokens,
                    [](const uint8_t* at, size_t bytes) {
                        for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
                    });
    });
}

// An item being computed. Its rows are the (query, head) pairs of the first kv head, then of the next.
template <typename Tile>
class Attending {
   public:
    // `following`: what this thread will probably compute next, or null.
    Attending(const Attention& attention, const Sequence* sequences, const AttentionItem& item,
              const AttentionItem* following, AttentionRows& rows, Tile& tile)
        : a_(attention), sequences_(sequences), sequence_(sequences[item.sequence]), item_(item), following_(following),
          s_(rows), tile_(tile), shared_(attention.heads / attention.pool.kv_heads), rows_(item.queries * shared_),
          first_(sequence_.start + item.from), last_(first_ + item.queries - 1) {}

    void run() {
        s_.begin(all_rows());
        fetch(a_.pool, sequence_, first_tile(), item_.kv_heads_end);
        for (int row = 0; row < all_rows(); row++) tile_.take_query(row, a_.q + place(row, a_.q_stride));
        for (TilePlace at = first_tile(); at.begin < at.end; at = tile_at(at.base + TILE)) {
            if (!tile_.fetches_ahead(rows_)) fetch(a_.pool, sequence_, tile_at(at.base + TILE), item_.kv_heads_end);
            for (TilePlace head = at; head.kv_head < item_.kv_heads_end; head.kv_head++) {
                tile_.read(sequence_, head, rows_);
                if (tile_.fetches_ahead(rows_)) fetch_ahead(head);
                see(head);
            }
        }
        finish();
    }

   private:
    // The first position that a query sees.
    int seen_from(int position) const { return a_.window == 0 ? 0 : std::max(0, position + 1 - a_.window); }

    // What the next tile of a kv head reads; behind the last one it is the following item's first.
    void fetch_ahead(const TilePlace& at) {
        TilePlace next = tile_at(at.base + TILE);
        const Sequence* sequence = &sequence_;
        if (next.begin >= next.end && following_) {
            const Attending following(a_, sequences_, *following_, nullptr, s_, tile_);
            next = following.first_tile();
            sequence = &following.sequence_;
        }
        next.kv_head = at.kv_head;
        tile_.fetch_ahead(*sequence, next);
    }

    TilePlace first_tile() const { return tile_at(seen_from(first_) / TILE * TILE); }

    // For the first kv head; without tokens behind the last position.
    TilePlace tile_at(int base) const {
        return {a_.layer, item_.kv_head, base, std::max(seen_from(first_) - base, 0), std::min(last_ + 1 - base, TILE)};
    }

    // Where the query of a row lies in the batch's tokens, or its result.
    size_t place(int row, size_t stride) const {
        const int token = sequence_.first + item_.from + row % rows_ / shared_;
        const int head = (item_.kv_head + row / rows_) * shared_ + row % shared_;
        return token * stride + size_t(head) * a_.pool.dim;
    }

    int all_rows() const { return rows_ * (item_.kv_heads_end - item_.kv_head); }

    // All rows of a kv head see a tile.
    void see(const TilePlace& at) {
        const int head_rows = (at.kv_head - item_.kv_head) * rows_;
        for (int row = 0; row < rows_; row += 4) {
            const int count = std::min(4, rows_ - row);
            if (count == 4) see<4>(at, head_rows, row);
            else if (count == 3) see<3>(at, head_rows, row);
            else if (count == 2) see<2>(at, head_rows, row);
            else see<1>(at, head_rows, row);
        }
    }

    template <int R>
    void see(const TilePlace& at, int head_rows, int row) {
        float shrink[LANES];
        const int first = head_rows + row;
        tile_.template score<R>(first, at.begin, at.end, s_.scores);
        for (int r = 0; r < R; r++) {
            const int position = first_ + (row + r) / shared_;
            hide_unseen(seen_from(position) - at.base, position + 1 - at.base, s_.scores + r * TILE);
        }
        raise_tops<R>(s_.scores, s_.top.data() + first, shrink);
        weigh<R>(tile_, s_.scores, s_.top.data() + first, shrink, s_.sums_of(first));
        tile_.template add_values<R>(s_.scores, at.begin, at.end, shrink, s_.out_of(first));
    }

    void finish() {
        for (int row = 0; row < all_rows(); row++) {
            const float whole = sum_of(s_.sums_of(row));
            float* out = a_.out + place(row, a_.out_stride);
            for (int d = 0; d < a_.pool.dim; d++) out[d] = s_.out_of(row)[d] / whole;
        }
    }

    const Attention& a_;
    const Sequence* sequences_;
    const Sequence& sequence_;
    const AttentionItem& item_;
    const AttentionItem* following_;
    AttentionRows& s_;
    Tile& tile_;
    const int shared_, rows_;  // heads per kv head; rows of one kv head
    const int first_, last_;   // positions
};

// What one thread works in.
class AttentionScratch {
   public:
    AttentionScratch(int heads, const Pool& pool) {
        // The most rows that an item has.
        const int rows = std::max(QUERY_ROWS * pool.kv_heads, heads);
        rows_.emplace(rows, rounded_up_to_lanes(pool.dim));
        if (pool.bits == 8) int8_.emplace(rows, pool);
        else float_.emplace(rows, pool);
    }

    // The item at `index`; `next` is the index of what this thread will probably compute then.
    void attend(const Attention& attention, const Sequence* sequences, const std::vector<AttentionItem>& items, int index,
                int next) {
        const AttentionItem* following = 0 <= next && next < int(items.size()) ? &items[next] : nullptr;
        if (int8_) Attending<Int8Tile>(attention, sequences, items[index], following, *rows_, *int8_).run();
        else Attending<FloatTile>(attention, sequences, items[index], following, *rows_, *float_).run();
    }

   private:
    std::optional<AttentionRows> rows_;
    std::optional<FloatTile> float_;
    std::optional<Int8Tile> int8_;
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
