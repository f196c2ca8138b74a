#include "runtime/logits_row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace gemma2_fast {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Four floats of any x86-64 or ARM processor; loops over rows are written with them because compilers keep ordered
// reductions and the exponential below scalar.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4;
constexpr int64_t kUnroll = 4;  // independent partial results, which hide each operation's latency

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// Float and Int are float and int32_t, or the vectors of them: one formula, the same bits.
template <typename Float, typename Int>
inline Float exp_series(Float x) {
    const Float smallest = Float{} - 87.0f;
    constexpr float kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693145752f;  // few bits, so that n * kLn2High is exact
    constexpr float kLn2Low = 1.42860677e-6f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Float clamped = x > smallest ? x : smallest;
    const Float shifted = clamped * kLog2E + kRound;
    const Float n = shifted - kRound;
    const Float r = (clamped - n * kLn2High) - n * kLn2Low;  // |r| <= log(2) / 2
    Float p = r * (1.0f / 5040) + 1.0f / 720;                // the series up to r^7 leaves 5e-9
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Float scaled = std::bit_cast<Float>(std::bit_cast<Int>(p) + (std::bit_cast<Int>(shifted) << 23));
    return x > smallest ? scaled : Float{};
}

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
    for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes)
        for (int64_t u = 0; u < kUnroll; ++u) {
            const Floats x = load(logits + i + u * kLanes);
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
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        result.largest = std::max(result.largest, largest[0][lane]);
        result.bad |= good[0][lane] == 0;
    }
    return result;
}

}  // namespace

void LogitsRow::scan(std::span<const float> logits) {
    logits_ = logits;
    largest_ = kMinusInfinity;
    bad_ = false;
    const auto size = static_cast<int64_t>(logits.size());
    block_largest_.resize((size + kBlock - 1) / kBlock);
    for (std::size_t b = 0; b < block_largest_.size(); ++b) {
        const int64_t begin = static_cast<int64_t>(b) * kBlock;
        const BlockScan block = scan_block(logits.data() + begin, std::min(kBlock, size - begin));
        block_largest_[b] = block.largest;
        largest_ = std::max(largest_, block.largest);
        bad_ |= block.bad;
    }
}

bool LogitsRow::has_tokens() const { return largest_ > kMinusInfinity; }

int32_t LogitsRow::argmax() const {
    const auto block = std::ranges::find(block_largest_, largest_) - block_largest_.begin();
    return static_cast<int32_t>(std::find(logits_.begin() + block * kBlock, logits_.end(), largest_) - logits_.begin());
}

void LogitsRow::block_weights(int64_t block, float temperature, float (&weights)[kBlock]) const {
    const int64_t begin = block * kBlock;
    const int64_t count = std::min<int64_t>(kBlock, static_cast<int64_t>(logits_.size()) - begin);
    const float* logits = logits_.data() + begin;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats weight = exp_series<Floats, Ints>((load(logits + i) - largest_) / temperature);
        std::memcpy(weights + i, &weight, sizeof weight);
    }
    for (; i < count; ++i) weights[i] = exp_series<float, int32_t>((logits[i] - largest_) / temperature);
    std::fill(weights + i, weights + kBlock, 0.0f);
}

double LogitsRow::sum_weights(float temperature) const {
    double sum = 0;
    float weights[kBlock];
    for (std::size_t b = 0; b < block_largest_.size(); ++b) {
        block_weights(static_cast<int64_t>(b), temperature, weights);
        Floats partial = {};
        for (int64_t i = 0; i < kBlock; i += kLanes) partial += load(weights + i);
        for (int64_t lane = 0; lane < kLanes; ++lane) sum += partial[lane];
    }
    return sum;
}

double LogitsRow::log_normaliser() const { return largest_ + std::log(sum_weights(1)); }

void LogitsRow::at_least(float floor, float temperature, std::vector<Candidate>& out) const {
    out.clear();
    float weights[kBlock];
    for (std::size_t b = 0; b < block_largest_.size(); ++b) {
        if (block_largest_[b] < floor) continue;
        block_weights(static_cast<int64_t>(b), temperature, weights);
        const std::size_t begin = b * kBlock;
        const std::size_t end = std::min(begin + kBlock, logits_.size());
        for (std::size_t i = begin; i < end; ++i)
            if (logits_[i] >= floor && logits_[i] > kMinusInfinity)
                out.push_back({static_cast<int32_t>(i), logits_[i], weights[i - begin]});
    }
}

void LogitsRow::first(int64_t count, float temperature, std::vector<Candidate>& out) {
    out.clear();
    if (count <= 0) return;
    // At least `count` blocks have a member as large as the count-th largest of their maxima, so no smaller logit
    // counts.
    float floor = kMinusInfinity;
    if (count < static_cast<int64_t>(block_largest_.size())) {
        order_ = block_largest_;
        std::ranges::nth_element(order_, order_.begin() + (count - 1), std::ranges::greater{});
        floor = order_[count - 1];
    }
    at_least(floor, temperature, out);
    if (static_cast<int64_t>(out.size()) <= count) return;
    scratch_ = out;
    std::ranges::nth_element(scratch_, scratch_.begin() + (count - 1), comes_first);
    const Candidate last = scratch_[count - 1];
    std::erase_if(out, [&](const Candidate& candidate) { return comes_first(last, candidate); });
}

}  // namespace gemma2_fast
