#include "runtime/logits_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "runtime/row_math.h"

namespace gemma2_fast {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kUnroll = 4;  // independent partial results, which hide each operation's latency

struct BlockScan {
    float largest = kMinusInfinity;
    bool bad = false;
};

BlockScan scan_block(const float* logits, int64_t count) {
    constexpr float kLargestFloat = std::numeric_limits<float>::max();
    Floats largest[kUnroll];
    Ints good[kUnroll];
    for (int64_t u = 0; u < kUnroll; ++u) {
        largest[u] = Floats{} + kMinusInfinity;
        good[u] = ~Ints{};
    }
    BlockScan result;
    int64_t i = 0;
    for (; i + kUnroll * kRowLanes <= count; i += kUnroll * kRowLanes)
        for (int64_t u = 0; u < kUnroll; ++u) {
            const Floats x = load_floats(logits + i + u * kRowLanes);
            largest[u] = x > largest[u] ? x : largest[u];
            good[u] &= x <= kLargestFloat;
        }
    for (; i < count; ++i) {
        result.largest = std::max(result.largest, logits[i]);
        result.bad |= !(logits[i] <= kLargestFloat);
    }
    for (int64_t u = 1; u < kUnroll; ++u) {
        largest[0] = largest[u] > largest[0] ? largest[u] : largest[0];
        good[0] &= good[u];
    }
    for (int64_t lane = 0; lane < kRowLanes; ++lane) {
        result.largest = std::max(result.largest, largest[0][lane]);
        result.bad |= good[0][lane] == 0;
    }
    return result;
}

}  // namespace

void LogitsRow::scan(std::span<const float> logits, std::optional<float> softcap) {
    logits_ = logits;
    softcap_ = softcap;
    largest_logit_ = kMinusInfinity;
    bad_ = false;
    const auto size = static_cast<int64_t>(logits.size());
    block_largest_.resize((size + kBlock - 1) / kBlock);
    for (std::size_t b = 0; b < block_largest_.size(); ++b) {
        const int64_t begin = static_cast<int64_t>(b) * kBlock;
        const BlockScan block = scan_block(logits.data() + begin, std::min(kBlock, size - begin));
        block_largest_[b] = block.largest;
        largest_logit_ = std::max(largest_logit_, block.largest);
        bad_ |= block.bad;
    }
}

bool LogitsRow::has_tokens() const { return largest_logit_ > kMinusInfinity; }

int32_t LogitsRow::argmax() const {
    const auto block = std::ranges::find(block_largest_, largest_logit_) - block_largest_.begin();
    const auto first = logits_.begin() + block * kBlock;
    return static_cast<int32_t>(std::find(first, logits_.end(), largest_logit_) - logits_.begin());
}

float LogitsRow::value(float logit) const {
    return softcap_ ? softcap_series<float, int32_t>(logit, *softcap_) : logit;
}

void LogitsRow::copy_values(std::span<float> out) const {
    if (!softcap_) {
        std::ranges::copy(logits_, out.begin());
        return;
    }
    std::size_t i = 0;
    for (; i + kRowLanes <= logits_.size(); i += kRowLanes) {
        const Floats values = softcap_series<Floats, Ints>(load_floats(logits_.data() + i), *softcap_);
        std::memcpy(out.data() + i, &values, sizeof values);
    }
    for (; i < logits_.size(); ++i) out[i] = value(logits_[i]);
}

void LogitsRow::block_weights(int64_t block, float temperature, float (&weights)[kBlock]) const {
    const int64_t begin = block * kBlock;
    const int64_t count = std::min<int64_t>(kBlock, static_cast<int64_t>(logits_.size()) - begin);
    const float* logits = logits_.data() + begin;
    const float largest_value = largest();
    int64_t i = 0;
    for (; i + kRowLanes <= count; i += kRowLanes) {
        Floats x = load_floats(logits + i);
        if (softcap_) x = softcap_series<Floats, Ints>(x, *softcap_);
        const Floats weight = exp_series<Floats, Ints>((x - largest_value) / temperature);
        std::memcpy(weights + i, &weight, sizeof weight);
    }
    for (; i < count; ++i) weights[i] = exp_series<float, int32_t>((value(logits[i]) - largest_value) / temperature);
    std::fill(weights + i, weights + kBlock, 0.0f);
}

double LogitsRow::sum_weights(float temperature) const {
    double sum = 0;
    float weights[kBlock];
    for (std::size_t b = 0; b < block_largest_.size(); ++b) {
        block_weights(static_cast<int64_t>(b), temperature, weights);
        Floats partial = {};
        for (int64_t i = 0; i < kBlock; i += kRowLanes) partial += load_floats(weights + i);
        for (int64_t lane = 0; lane < kRowLanes; ++lane) sum += partial[lane];
    }
    return sum;
}

double LogitsRow::log_normaliser() const { return largest() + std::log(sum_weights(1)); }

// A logit below which no value reaches the floor.
float LogitsRow::least_logit(float floor) const {
    if (!softcap_) return floor;
    constexpr double kSlack = 1e-6;  // more than a capped value's error
    const double ratio = static_cast<double>(floor) / *softcap_ - kSlack;
    if (ratio <= -1) return kMinusInfinity;
    if (ratio >= 1) return largest_logit_;
    return std::min(largest_logit_, static_cast<float>(*softcap_ * std::atanh(ratio)));
}

void LogitsRow::at_least(float floor, float temperature, std::vector<Candidate>& out) const {
    from_logit(least_logit(floor), temperature, out);
}

void LogitsRow::from_logit(float least, float temperature, std::vector<Candidate>& out) const {
    out.clear();
    float weights[kBlock];
    for (std::size_t b = 0; b < block_largest_.size(); ++b) {
        if (block_largest_[b] < least) continue;
        block_weights(static_cast<int64_t>(b), temperature, weights);
        const std::size_t begin = b * kBlock;
        const std::size_t end = std::min(begin + kBlock, logits_.size());
        for (std::size_t i = begin; i < end; ++i)
            if (logits_[i] >= least && logits_[i] > kMinusInfinity)
                out.push_back({static_cast<int32_t>(i), logits_[i], weights[i - begin]});
    }
}

void LogitsRow::first(int64_t count, float temperature, std::vector<Candidate>& out) {
    out.clear();
    if (count <= 0) return;
    // At least `count` blocks have a member as large as the count-th largest of their maxima, so no smaller logit
    // counts.
    float least = kMinusInfinity;
    if (count < static_cast<int64_t>(block_largest_.size())) {
        order_ = block_largest_;
        std::ranges::nth_element(order_, order_.begin() + (count - 1), std::ranges::greater{});
        least = order_[count - 1];
    }
    from_logit(least, temperature, out);
    if (static_cast<int64_t>(out.size()) <= count) return;
    scratch_ = out;
    std::ranges::nth_element(scratch_, scratch_.begin() + (count - 1), comes_first);
    const Candidate last = scratch_[count - 1];
    std::erase_if(out, [&](const Candidate& candidate) { return comes_first(last, candidate); });
}

}  // namespace gemma2_fast
