// The Llama-shaped decoder as phases of a team of threads: the same model as
// services/engine/device/decoder.py, with its projections as linear.h computes them.
#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "team.h"

// Norms are padded with zeros to whole groups, as are the rows of activations.
struct Layer {
    const float* attention_norm;  // [hidden]
    Packed qkv;                   // q, then k, then v
    const float* qkv_bias;        // [qkv.outputs] or null
    const float* qk_norm;         // [heads + kv_heads][head_dim] or null
    Packed attention_output;
    const float* mlp_norm;        // [hidden]
    Packed gate_up;               // 16 outputs of gate and 16 of up by turns
    Packed down;
};

struct Model {
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, window;
    float rms_norm_eps;
    const float* frequencies;  // [head_dim / 2], radians per position
    Packed embedding;          // [vocab][hidden]
    const Layer* layer;
    const float* final_norm;
    Packed unembedding;
    Pool pool;
};

struct Batch {
    int32_t tokens, sequences, sampled;
    const int32_t* ids;          // [tokens]
    const Sequence* sequence;    // [sequences], their queries one after the other
    const int32_t* last_tokens;  // [sampled], ascending
    float* logits;               // [sampled][vocab]
    int32_t all_kept;            // whether `unembed_again` may follow, for any token
};

static float sum_of_squares(const float* x, int n) {
    Floats parts[PARTS]{};
    int at = 0;
    for (; at + LANES <= n; at += LANES)
        for (int part = 0; part < PARTS; part++) {
            const Floats values = load(x + at + part * WIDTH);
            parts[part] = fused(values, values, parts[part]);
        }
    float sum = sum_of(parts);
    for (; at < n; at++) sum += x[at] * x[at];
    return sum;
}

// y = x / sqrt(mean(x^2) + eps) * weight
static void rms_norm(const float* x, const float* weight, int n, float eps, float* y) {
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
    for (int at = 0; at < n; at++) y[at] = x[at] * scale * weight[at];
}

// y = gate / (1 + exp(-gate)) * up, 16 of each.
static void swiglu(const float* gate, const float* up, float* y) {
    for (int at = 0; at < 16; at += WIDTH) {
        const Floats g = load(gate + at);
        store(y + at, g / (exp2_of(g * -LOG2_E) + 1.0f) * load(up + at));
    }
}

// Rotates a head by its position's angles, in the half-rotation convention.
static void rotate(float* x, const float* cosines, const float* sines, int dim) {
    const int half = dim / 2;
    for (int j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a * cosines[j] - b * sines[j];
        x[j + half] = b * cosines[j] + a * sines[j];
    }
}

class Decoder {
   public:
    Decoder(const Model& model, Team& team) : m_(model), layers_(model.layer, model.layer + model.layers), team_(team) {
        m_.layer = layers_.data();
        for (int thread = 0; thread < team.threads(); thread++)
            scratch_.push_back(std::make_unique<AttentionScratch>(m_.heads, m_.pool));
    }

    void run(const Batch& batch) {
        grow(batch.tokens, batch.sampled);
        items_ = attention_items(batch.sequence, batch.sequences, m_.heads, m_.kv_heads, team_.threads());
        for (int index = 0; index < batch.sequences; index++)
            for (int query = 0; query < batch.sequence[index].queries; query++)
                sequence_of_[batch.sequence[index].first + query] = index;
        placed_ahead_ = std::any_of(items_.begin(), items_.end(), [&](const AttentionItem& item) {
            return item.queries != batch.sequence[item.sequence].queries;
        });
        compute(batch);
        team_.rest();
    }

    // What the last layer left of the last run's tokens stays until the next one, if all were kept.
    void unembed_again(const int32_t* tokens, int32_t count, float* logits) {
        unembed(tokens, count, logits);
        team_.rest();
    }

   private:
    // Each `share` is a phase that ends before the next begins.
    void compute(const Batch& batch) {
        team_.share(batch.tokens, [&](int token) { embed(batch, token); });
        for (int index = 0; index < m_.layers; index++) {
            const Layer& layer = m_.layer[index];
            project(batch.tokens, layer);
            if (index + 1 == m_.layers && batch.sampled < batch.tokens && !batch.all_kept)
                return finish_sampled(batch, index, layer);
            // Where an item has all queries of its sequence it places them itself: nobody else attends to them.
            if (placed_ahead_) place_all(batch, index, layer);
            finish(batch, index, layer);
        }
        unembed(batch.last_tokens, batch.sampled, batch.logits);
    }

    // Of tokens that nobody samples, the last layer's keys and values are all that is needed.
    void finish_sampled(const Batch& batch, int index, const Layer& layer) {
        place_all(batch, index, layer);
        placed_ahead_ = true;
        std::vector<Sequence> sequences(batch.sampled);
        std::vector<int32_t> tokens(batch.sampled);
        for (int row = 0; row < batch.sampled; row++) {
            const int token = batch.last_tokens[row];
            const Sequence& from = batch.sequence[sequence_of_[token]];
            sequences[row] = {row, 1, from.start + token - from.first, from.table};
            tokens[row] = row;
            std::copy_n(hidden(token), hidden_width(), hidden(row));
            std::copy_n(qkv(token), attended_inputs(), qkv(row));
        }
        items_ = attention_items(sequences.data(), batch.sampled, m_.heads, m_.kv_heads, team_.threads());
        finish({batch.sampled, batch.sampled, 0, nullptr, sequences.data(), nullptr, nullptr, 0}, index, layer);
        unembed(tokens.data(), batch.sampled, batch.logits);
    }

    // What follows a layer's projections. Of a batch that is placed, its tokens and sequences are enough.
    void finish(const Batch& batch, int index, const Layer& layer) {
        attend(batch, index, layer);
        add_attention(batch.tokens, layer);
        feed_forward(batch.tokens, layer);
    }

    void embed(const Batch& batch, int token) {
        unpack_row(m_.embedding, batch.ids[token], hidden(token));
        const Sequence& sequence = batch.sequence[sequence_of_[token]];
        const float position = float(sequence.start + token - sequence.first);
        const int half = m_.head_dim / 2;
        for (int j = 0; j < half; j++) {
            cosines_[size_t(token) * half + j] = std::cos(position * m_.frequencies[j]);
            sines_[size_t(token) * half + j] = std::sin(position * m_.frequencies[j]);
        }
    }

    void project(int tokens, const Layer& layer) {
        normalize(tokens, layer.attention_norm, layer.qkv);
        multiply_all(team_, layer.qkv, normal_rows(layer.qkv), tokens, [&](int token, int block, const float* y) {
            memcpy(qkv(token) + block * COLUMNS, y, sizeof(float) * COLUMNS);
        });
    }

    void place_all(const Batch& batch, int index, const Layer& layer) {
        team_.share(batch.tokens, [&](int token) { place(batch, index, layer, token, 0, m_.kv_heads); });
    }

    void attend(const Batch& batch, int index, const Layer& layer) {
        const Attention attention{
            m_.pool, index, m_.heads, m_.window, qkv_.data(), qkv_width(), attended_.data(), attended_width()};
        team_.share(int(items_.size()), [&](int at, int thread) {
            const AttentionItem& item = items_[at];
            const int first = batch.sequence[item.sequence].first + item.from;
            for (int token = first; !placed_ahead_ && token < first + item.queries; token++)
                place(batch, index, layer, token, item.kv_head, item.kv_heads_end);
            scratch_[thread]->attend(attention, batch.sequence, items_, at, at + Team::step_of(thread));
            for (int token = first; whole_groups() && token < first + item.queries; token++)
                quantize_groups(attended_rows(layer), token, groups_before(item.kv_head), groups_before(item.kv_heads_end));
        });
    }

    // What is between the projection and the attention, for kv heads [begin, end) and those that share them:
    // bias, norm, rotation, and k and v into the pool.
    void place(const Batch& batch, int index, const Layer& layer, int token, int begin, int end) {
        const int shared = m_.heads / m_.kv_heads, keys = m_.heads, values = m_.heads + m_.kv_heads;
        for (int head = begin * shared; head < end * shared; head++) rotate_head(layer, token, head);
        for (int head = keys + begin; head < keys + end; head++) rotate_head(layer, token, head);
        for (int head = values + begin; head < values + end; head++) add_bias(layer, token, head);
        const Sequence& sequence = batch.sequence[sequence_of_[token]];
        const int position = sequence.start + token - sequence.first;
        const int block = sequence.table[position / m_.pool.block_size], offset = position % m_.pool.block_size;
        for (int part : {KEYS, VALUES})
            for (int head = begin; head < end; head++) {
                float* from = qkv_head(token, m_.heads + part * m_.kv_heads + head);
                write_head(m_.pool, m_.pool.row(block, index, part, head), part, offset, from);
            }
    }

    void rotate_head(const Layer& layer, int token, int head) {
        const int dim = m_.head_dim;
        float* x = qkv_head(token, head);
        add_bias(layer, token, head);
        if (layer.qk_norm) rms_norm(x, layer.qk_norm + head * dim, dim, m_.rms_norm_eps, x);
        rotate(x, &cosines_[size_t(token) * (dim / 2)], &sines_[size_t(token) * (dim / 2)], dim);
    }

    void add_bias(const Layer& layer, int token, int head) {
        if (!layer.qkv_bias) return;
        float* x = qkv_head(token, head);
        for (int d = 0; d < m_.head_dim; d++) x[d] += layer.qkv_bias[head * m_.head_dim + d];
    }

    void add_attention(int tokens, const Layer& layer) {
        if (!whole_groups())
            team_.share(tokens, [&](int token) { quantize_row(attended_rows(layer), token); });
        add(tokens, layer.attention_output, attended_rows(layer));
    }

    // Two blocks of gate and up are a group of what `down` multiplies with.
    void feed_forward(int tokens, const Layer& layer) {
        normalize(tokens, layer.mlp_norm, layer.gate_up);
        const Rows rows = rows_of(layer.down, wide_, wide_width(), wide_q_, wide_groups_);
        multiply_all(
            team_, layer.gate_up, normal_rows(layer.gate_up), tokens,
            [&](int token, int block, const float* y) { swiglu(y, y + 16, wide(token) + block * 16); },
            2, [&](int token, int group) { quantize_groups(rows, token, group, group + 1); });
        add(tokens, layer.down, rows);
    }

    void unembed(const int32_t* tokens, int32_t count, float* logits) {
        team_.share(count, [&](int row) {
            float* normal = normal_.data() + size_t(row) * hidden_width();
            rms_norm(hidden(tokens[row]), m_.final_norm, m_.hidden, m_.rms_norm_eps, normal);
            quantize_row(normal_rows(m_.unembedding), row);
        });
        multiply_all(team_, m_.unembedding, normal_rows(m_.unembedding), count, [&](int row, int block, const float* y) {
            const int first = block * COLUMNS, columns = std::min(COLUMNS, m_.vocab - first);
            memcpy(logits + size_t(row) * m_.vocab + first, y, sizeof(float) * columns);
        });
    }

    void normalize(int tokens, const float* weight, const Packed& next) {
        team_.share(tokens, [&](int token) {
            float* normal = normal_.data() + token * hidden_width();
            rms_norm(hidden(token), weight, m_.hidden, m_.rms_norm_eps, normal);
            quantize_row(normal_rows(next), token);
        });
    }

    void add(int tokens, const Packed& weight, const Rows& rows) {
        multiply_all(team_, weight, rows, tokens, [&](int token, int block, const float* y) {
            float* sum = hidden(token) + block * COLUMNS;
            for (int at = 0; at < COLUMNS; at++) sum[at] += y[at];
        });
    }

    // Widths of buffers: whole groups and blocks, so that no loop has a rest. Nothing but zeros is ever
    // written behind a row's inputs, because they take part in the scale of its last group.
    size_t hidden_width() const { return rounded_up(m_.hidden, COLUMNS); }
    size_t qkv_width() const { return rounded_up((m_.heads + 2 * m_.kv_heads) * m_.head_dim, COLUMNS); }
    size_t attended_width() const { return rounded_up(m_.heads * m_.head_dim, COLUMNS); }
    size_t wide_width() const { return rounded_up(m_.intermediate, COLUMNS); }
    float* hidden(int token) { return hidden_.data() + token * hidden_width(); }
    float* qkv(int token) { return qkv_.data() + token * qkv_width(); }
    float* qkv_head(int token, int head) { return qkv(token) + size_t(head) * m_.head_dim; }
    float* wide(int token) { return wide_.data() + token * wide_width(); }

    int attended_inputs() const { return m_.heads * m_.head_dim; }
    // Of attention's result, before those of a kv head; whether that is a whole number for all of them.
    int groups_before(int kv_head) const { return kv_head * (attended_inputs() / m_.kv_heads) / GROUP; }
    bool whole_groups() const { return attended_inputs() / m_.kv_heads % GROUP == 0; }

    // The rows that a weight is to be multiplied with.
    static Rows rows_of(const Packed& weight, const std::vector<float>& x, size_t width, std::vector<int8_t>& q,
                        std::vector<RowGroup>& groups) {
        return {x.data(), width, groups_of(weight.inputs), weight.has_floats() ? nullptr : q.data(), groups.data()};
    }
    Rows normal_rows(const Packed& weight) { return rows_of(weight, normal_, hidden_width(), q_, q_groups_); }
    Rows attended_rows(const Layer& layer) {
        return rows_of(layer.attention_output, attended_, attended_width(), q_, q_groups_);
    }

    void grow(int tokens, int sampled) {
        const size_t rows = std::max(tokens, sampled);
        if (rows <= capacity_) return;
        capacity_ = rows;
        const size_t inputs = std::max(hidden_width(), attended_width());
        hidden_.resize(rows * hidden_width());
        normal_.resize(rows * hidden_width());
        qkv_.resize(rows * qkv_width());
        attended_.resize(rows * attended_width());
        wide_.resize(rows * wide_width());
        cosines_.resize(rows * (m_.head_dim / 2));
        sines_.resize(rows * (m_.head_dim / 2));
        q_.resize(rows * inputs);
        q_groups_.resize(rows * (inputs / GROUP));
        wide_q_.resize(rows * wide_width());
        wide_groups_.resize(rows * (wide_width() / GROUP));
        sequence_of_.resize(rows);
    }

    Model m_;
    std::vector<Layer> layers_;
    Team& team_;
    std::vector<std::unique_ptr<AttentionScratch>> scratch_;
    std::vector<AttentionItem> items_;
    size_t capacity_ = 0;
    std::vector<float> hidden_, normal_, qkv_, attended_, wide_, cosines_, sines_;
    std::vector<int8_t> q_, wide_q_;
    std::vector<RowGroup> q_groups_, wide_groups_;
    bool placed_ahead_ = false;  // the batch's keys and values, in a phase of their own
    std::vector<int32_t> sequence_of_;
};
