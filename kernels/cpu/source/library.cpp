// The kernels as a C library: what kernels/cpu/library.py calls.
#include "attention.h"
#include "decoder.h"
#include "linear.h"
#include "sampling.h"
#include "team.h"

extern "C" {

// `slots` null: a worker that shares its cores with nobody.
Team* diptych_team_create(int32_t threads, CoreSlot* slots, int32_t workers, int32_t slot) {
    return new Team(threads, Cores(threads, slots, workers, slot));
}
void diptych_team_destroy(Team* team) { delete team; }

// y[rows][outputs] = x[rows][inputs] times the weights.
void diptych_linear(Team* team, const Packed* weight, const float* x, int32_t rows, float* y) {
    const int groups = groups_of(weight->inputs), width = groups * GROUP;
    std::vector<float> padded(size_t(rows) * width);
    std::vector<int8_t> q(size_t(rows) * width);
    std::vector<RowGroup> of_groups(size_t(rows) * groups);
    const Rows padded_rows{padded.data(), size_t(width), groups, weight->has_floats() ? nullptr : q.data(), of_groups.data()};
    team->share(rows, [&](int row) {
        memcpy(&padded[size_t(row) * width], x + size_t(row) * weight->inputs, sizeof(float) * weight->inputs);
        quantize_row(padded_rows, row);
    });
    multiply_all(*team, *weight, padded_rows, rows, [&](int row, int block, const float* values) {
        const int first = block * COLUMNS, count = std::min(COLUMNS, weight->outputs - first);
        memcpy(y + size_t(row) * weight->outputs + first, values, sizeof(float) * count);
    });
    team->rest();
}

// out[tokens][heads * dim] from q[tokens][heads][dim].
void diptych_attention(Team* team, const Pool* pool, int32_t layer, int32_t heads, int32_t window,
                       const Sequence* sequences, int32_t count, const float* q, float* out) {
    const size_t stride = size_t(heads) * pool->dim;
    const Attention attention{*pool, layer, heads, window, q, stride, out, stride};
    const auto items = attention_items(sequences, count, heads, pool->kv_heads, team->threads());
    std::vector<AttentionScratch> scratch(team->threads(), AttentionScratch(heads, *pool));
    team->share(int(items.size()), [&](int index, int thread) {
        scratch[thread].attend(attention, sequences, items, index, index + Team::step_of(thread));
    });
    team->rest();
}

// k and v [tokens][kv_heads][dim] of a layer into the pool, at offsets[token] of blocks[token]; both may change.
void diptych_kv_write(const Pool* pool, int32_t layer, const int32_t* blocks, const int32_t* offsets, int32_t tokens,
                      float* k, float* v) {
    for (int token = 0; token < tokens; token++)
        for (int part : {KEYS, VALUES})
            for (int head = 0; head < pool->kv_heads; head++) {
                float* x = (part == KEYS ? k : v) + (size_t(token) * pool->kv_heads + head) * pool->dim;
                write_head(*pool, pool->row(blocks[token], layer, part, head), part, offsets[token], x);
            }
}

void diptych_rms_norm(const float* x, const float* weight, int32_t rows, int32_t n, float eps, float* y) {
    for (int row = 0; row < rows; row++) rms_norm(x + size_t(row) * n, weight, n, eps, y + size_t(row) * n);
}

// y[rows][16] from [rows][32]: 16 of gate, then 16 of up.
void diptych_swiglu(const float* gate_up, int32_t rows, float* y) {
    for (int row = 0; row < rows; row++) swiglu(gate_up + row * 32, gate_up + row * 32 + 16, y + row * 16);
}

// The tokens of logits[rows][vocab], each row by its own draw.
void diptych_sample(Team* team, const float* logits, int32_t rows, int32_t vocab, const Draw* draws, int64_t* tokens) {
    std::vector<Sampler> samplers(team->threads());
    team->share(rows, [&](int row, int thread) {
        tokens[row] = samplers[thread].draw(logits + size_t(row) * vocab, vocab, draws[row]);
    });
    team->rest();
}

// The team and what the model points to must outlive the decoder.
Decoder* diptych_decoder_create(const Model* model, Team* team) { return new Decoder(*model, *team); }
void diptych_decoder_destroy(Decoder* decoder) { delete decoder; }
void diptych_decoder_run(Decoder* decoder, const Batch* batch) { decoder->run(*batch); }
// logits[count][vocab] after these tokens of the last run.
void diptych_decoder_unembed(Decoder* decoder, const int32_t* tokens, int32_t count, float* logits) {
    decoder->unembed_again(tokens, count, logits);
}
}
