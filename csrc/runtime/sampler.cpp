#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gemma2_fast {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio, SplitMix64's step

// SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit.
uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

double total_weight(std::span<const Candidate> candidates) {
    double total = 0;
    for (const Candidate& candidate : candidates) total += candidate.weight;
    return total;
}

}  // namespace

double uniform_draw(uint64_t seed, uint64_t token_index) {
    const uint64_t bits = mix(mix(seed + kGolden) + (token_index + 1) * kGolden);
    return static_cast<double>(bits >> 11) * 0x1p-53;
}

Sampler::Sampler(int64_t vocab_size, std::optional<float> softcap)
    : softcap_(softcap), adjusted_logits_(vocab_size), count_(vocab_size) {}

bool Sampler::scan(std::span<const float> logits) {
    raw_.scan(logits, softcap_);
    return !raw_.has_bad_values() && raw_.has_tokens();
}

TokenLogprob Sampler::logprob(int32_t token_id, int64_t num_top) {
    const double normaliser = raw_.log_normaliser();
    TokenLogprob result{token_id, static_cast<float>(raw_[token_id] - normaliser), {}};
    raw_.first(num_top, 1, candidates_);
    std::ranges::sort(candidates_, comes_first);
    result.top.reserve(candidates_.size());
    for (const Candidate& candidate : candidates_)
        result.top.emplace_back(candidate.token_id, static_cast<float>(raw_.value(candidate.logit) - normaliser));
    return result;
}

std::optional<int32_t> Sampler::choose(const Sequence& sequence) {
    const auto token_index = static_cast<uint64_t>(sequence.num_generated());
    if (!adjust(sequence)) return draw(raw_, sequence.request.sampling, token_index);
    adjusted_.scan(adjusted_logits_, std::nullopt);
    return draw(adjusted_, sequence.request.sampling, token_index);
}

// Writes the capped row as bias, penalties and masks leave it to adjusted_logits_; false if they leave it as it is.
bool Sampler::adjust(const Sequence& sequence) {
    const SamplingParams& params = sequence.request.sampling;
    const bool repeats = params.repetition_penalty != 1;
    const bool counts = params.presence_penalty != 0 || params.frequency_penalty != 0;
    const bool masks = sequence.num_generated() < params.min_tokens;
    if (params.logit_bias.empty() && !repeats && !counts && !masks) return false;

    raw_.copy_values(adjusted_logits_);  // bias and penalties may lift a logit past the cap, where none is left
    for (const auto& [token_id, bias] : params.logit_bias) adjusted_logits_[token_id] += bias;
    if (repeats) {
        for (int32_t id : sequence.token_ids) {
            if (count_[id]++ > 0) continue;
            float& logit = adjusted_logits_[id];
            logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
        }
        for (int32_t id : sequence.token_ids) count_[id] = 0;
    }
    if (counts) {
        for (int32_t id : sequence.generated_ids()) ++count_[id];
        for (int32_t id : sequence.generated_ids()) {
            if (count_[id] == 0) continue;  // a repeat of one already handled
            adjusted_logits_[id] -= params.presence_penalty + params.frequency_penalty * static_cast<float>(count_[id]);
            count_[id] = 0;
        }
    }
    if (masks)
        for (int32_t id : params.stop_token_ids) adjusted_logits_[id] = kMinusInfinity;
    return true;
}

std::optional<int32_t> Sampler::draw(LogitsRow& row, const SamplingParams& params, uint64_t token_index) {
    if (!row.has_tokens() || row.has_bad_values()) return std::nullopt;
    if (params.temperature == 0) return row.argmax();

    const float temperature = params.temperature;
    double total = 0;
    if (params.top_k) {
        row.first(*params.top_k, temperature, candidates_);
    } else if (params.top_p < 1) {
        total = row.sum_weights(temperature);
        // Tokens below (1 - top_p) / V of the weight are together below 1 - top_p, so none is needed; halved for
        // rounding.
        const double least = (1 - params.top_p) * total / static_cast<double>(adjusted_logits_.size()) / 2;
        row.at_least(static_cast<float>(row.largest() + temperature * std::log(least)), temperature, candidates_);
    } else {
        const double least = params.min_p / 2;  // its own test comes below; log(0) keeps everything
        row.at_least(static_cast<float>(row.largest() + temperature * std::log(least)), temperature, candidates_);
    }
    if (params.top_p < 1) keep_nucleus(params.top_p * (params.top_k ? total_weight(candidates_) : total));
    if (params.min_p > 0)  // the largest weight is 1
        std::erase_if(candidates_, [&](const Candidate& candidate) { return candidate.weight < params.min_p; });

    double left = uniform_draw(params.seed, token_index) * total_weight(candidates_);
    int32_t last = row.argmax();
    for (const Candidate& candidate : candidates_) {
        if (candidate.weight == 0) continue;
        last = candidate.token_id;
        left -= candidate.weight;
        if (left < 0) break;
    }
    return last;
}

// Keeps the smallest set of first candidates whose weights reach the target, at least one, in the order of their ids.
void Sampler::keep_nucleus(double target) {
    scratch_ = candidates_;
    std::span<Candidate> rest = scratch_;  // the set's last member is in here
    while (rest.size() > 1) {
        const std::size_t half = rest.size() / 2;
        std::ranges::nth_element(rest, rest.begin() + half, comes_first);
        const double weight = total_weight(rest.first(half));
        if (weight >= target) {
            rest = rest.first(half);
        } else {
            target -= weight;
            rest = rest.subspan(half);
        }
    }
    const Candidate last = rest.front();
    std::erase_if(candidates_, [&](const Candidate& candidate) { return comes_first(last, candidate); });
}

}  // namespace gemma2_fast
