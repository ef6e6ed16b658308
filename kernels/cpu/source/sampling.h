// Choosing tokens as kernels/reference/sampling.py and the engine's sampler do, without sorting the
// vocabulary and with the logarithms of the noise for the few tokens that could win.
//
// A token with score s beats the best total so far, b, if -log(-log(u)) > b - s, that is -log(u) < e^(s-b).
// As -log(u) >= 1 - u, it cannot if 1 - u >= e^(s-b): one product and one comparison per token. u comes from
// SplitMix64, keyed as the reference says.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <vector>

#include "vector.h"

struct Draw {
    int64_t seed, choice, index;
    double top_p, min_p;  // 1 and 0: off
    float temperature;    // 0: the most probable token
    int32_t top_k;        // 0: off
};

constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;

static inline uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static float largest_of(const float* x, int n) {
    Floats largest = all(-INFINITY);
    int at = 0;
    for (; at + WIDTH <= n; at += WIDTH) largest = larger(load(x + at), largest);
    float top = max_of(largest);
    for (; at < n; at++) top = std::max(top, x[at]);
    return top;
}

// The lowest id among the largest.
static int argmax(const float* x, int n) {
    const float top = largest_of(x, n);
    for (int at = 0; at < n; at++)
        if (x[at] == top) return at;
    return 0;  // nothing but NaN
}

// One row's sampling. The vectors are kept from row to row.
class Sampler {
   public:
    int draw(const float* logits, int vocab, const Draw& d) {
        if (d.temperature == 0.0f) return argmax(logits, vocab);
        scale(logits, vocab, d.temperature);
        least_score_ = -INFINITY;
        least_weight_ = 0.0f;
        if (d.top_k != 0) least_score_ = kth_largest(std::min(d.top_k, vocab));
        if (d.top_p != 1.0) least_weight_ = least_weight_of_mass(d.top_p);
        if (d.min_p != 0.0) least_score_ = std::max(least_score_, float(std::log(d.min_p)));
        return noisiest(d);
    }

   private:
    static constexpr int PART = 64;     // scores whose maximum stands for them
    static constexpr int RANGES = 512;  // of scores, for the search of a mass

    bool kept(int token) const { return scores_[token] >= least_score_ && weights_[token] >= least_weight_; }

    // Scores relative to the best token, their exponentials, and the maximum of each part.
    void scale(const float* logits, int vocab, float temperature) {
        const int padded = (vocab + PART - 1) / PART * PART;
        scores_.assign(padded, -INFINITY);
        weights_.resize(padded);
        tops_.resize(padded / PART);
        const float top = largest_of(logits, vocab);
        for (int token = 0; token < vocab; token++) scores_[token] = (logits[token] - top) / temperature;
        for (int token = 0; token < padded; token += WIDTH)
            store(&weights_[token], exp2_of(load(&scores_[token]) * LOG2_E));
        for (size_t part = 0; part < tops_.size(); part++) tops_[part] = largest_of(&scores_[part * PART], PART);
    }

    // A bound that at least `count` scores reach, and few more.
    float bound_of(size_t count) {
        if (count > tops_.size()) return -INFINITY;
        some_ = tops_;
        std::nth_element(some_.begin(), some_.begin() + (count - 1), some_.end(), std::greater<float>());
        return some_[count - 1];
    }

    float kth_largest(int k) {
        const float bound = bound_of(k);
        some_.clear();
        for (float score : scores_)
            if (score >= bound) some_.push_back(score);
        if (some_.size() < size_t(k)) return -INFINITY;  // a broken row: most are not numbers
        std::nth_element(some_.begin(), some_.begin() + (k - 1), some_.end(), std::greater<float>());
        return some_[k - 1];
    }

    // The smallest weight in the smallest set of largest ones that hold `share` of what is kept: scores are
    // counted into ranges, and only the range in which the share is reached is sorted.
    float least_weight_of_mass(double share) {
        std::fill(std::begin(mass_), std::end(mass_), 0.0);
        for (size_t token = 0; token < scores_.size(); token++)
            if (scores_[token] >= least_score_) mass_[range_of(scores_[token])] += weights_[token];
        const double wanted = share * std::accumulate(std::begin(mass_), std::end(mass_), 0.0);
        int range = 0;
        double sum = 0.0;
        for (; range < RANGES - 1 && sum + mass_[range] < wanted; range++) sum += mass_[range];
        some_.clear();
        for (size_t token = 0; token < scores_.size(); token++)
            if (scores_[token] >= least_score_ && range_of(scores_[token]) == range) some_.push_back(weights_[token]);
        std::sort(some_.begin(), some_.end(), std::greater<float>());
        for (float weight : some_)
            if ((sum += weight) >= wanted) return weight;
        return 0.0f;
    }

    // Ranges of a sixteenth of a nat below the best token; the last one has all the rest.
    static int range_of(float score) { return int(std::min(score * -16.0f, float(RANGES - 1))); }

    // The kept token with the largest sum of score and noise.
    int noisiest(const Draw& d) const {
        const uint64_t key = mixed(mixed(uint64_t(d.seed) + uint64_t(d.choice) * GAMMA) + uint64_t(d.index) * GAMMA);
        const double unit = 1.0 / (uint64_t(1) << 53);
        // scale: e^-best, with a margin for the weights' rounding. Finite, so that a weight of 0 never passes.
        double best = -INFINITY, scale = std::numeric_limits<double>::max();
        int chosen = 0;
        for (int token = 0; token < int(scores_.size()); token++) {
            const uint64_t bits = mixed(key + uint64_t(token + 1) * GAMMA) >> 11 | 1;
            const double rest = double((uint64_t(1) << 53) - bits) * unit;
            if (rest >= weights_[token] * scale || !kept(token)) continue;
            const double total = double(scores_[token]) - std::log(-std::log(double(bits) * unit));
            if (!(total > best)) continue;
            best = total;
            scale = std::exp(-best) * (1.0 + 1e-5);
            chosen = token;
        }
        return chosen;
    }

    std::vector<float> scores_, weights_, tops_, some_;
    double mass_[RANGES];
    float least_score_ = -INFINITY, least_weight_ = 0.0f;
};
