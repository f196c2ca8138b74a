// From dot products to the weights of a softmax over one block of keys.
//
// A weight is 2^t, t = log2(e) * score, times a power of two, 2^-reference, that a block has for itself. Powers of two
// round nothing, so blocks can be summed apart and joined later. Where a cap bounds the scores the reference is 0: with
// |t| <= 80, sums over 2^20 keys stay below 2^100, and keys that are all near -cap still weigh 2^-80, so neither side
// can leave the range of float32. Without a cap, or with one above 55, the reference is the largest t, rounded.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector_math.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMostConstantExponent = 80.0f;
constexpr float kMinusInfinity = -__builtin_inff();

struct KeyRange {
    int64_t first;
    int64_t last;  // exclusive
    bool empty() const { return first >= last; }
};

struct BlockWeights {
    float reference;  // minus infinity if no key is visible
    float sum;
};

class WeightRule {
  public:
    explicit WeightRule(const AttentionTask& task)
        : task_(task),
          capped_exp2_(task.score_softcap ? *task.score_softcap * kLog2E : 0.0f),
          input_scale_(task.score_softcap ? task.query_scale / *task.score_softcap : task.query_scale),
          constant_(task.score_softcap && *task.score_softcap * kLog2E <= kMostConstantExponent) {}

    // Keys of the block at block_position that some query in [first, last] sees.
    KeyRange visible(int64_t first_query, int64_t last_query, int64_t block_position) const {
        const int64_t first = task_.window_keys ? first_query - *task_.window_keys + 1 - block_position : 0;
        const int64_t last = last_query + 1 - block_position;
        return {first > 0 ? first : 0, last < kBlockTokens ? last : kBlockTokens};
    }

    // Replaces the dot products of keys [begin, end), multiples of P, by weights, 0 for those that are not visible.
    BlockWeights weigh(float* scores, int64_t begin, int64_t end, KeyRange visible) const {
        if (visible.empty()) {
            for (int64_t key = begin; key < end; ++key) scores[key] = 0.0f;
            return {kMinusInfinity, 0.0f};
        }
        if (constant_) return weigh_bounded(scores, begin, end, visible);
        float scale = input_scale_, scale_rest = 0.0f;
        if (task_.score_softcap) {
            for (int64_t key = begin; key < end; key += kLanes)
                store(scores + key, capped_exp2_.exponent(mul(load(scores + key), broadcast(scale))));
            scale = 1.0f;
        } else {
            const double exact = static_cast<double>(scale) * 1.4426950408889634;
            scale = static_cast<float>(exact);
            scale_rest = static_cast<float>(exact - scale);
        }
        return weigh_running(scores, begin, end, visible, scale, scale_rest);
    }

  private:
    static F32 masked(F32 x, int64_t key, KeyRange visible, F32 hidden) {
        alignas(64) static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        if (key >= visible.first && key + kLanes <= visible.last) return x;
        const F32 lane = load(kLane);
        const F32 first = broadcast(static_cast<float>(visible.first - key));
        const F32 last = broadcast(static_cast<float>(visible.last - key));
        return select_less(lane, first, hidden, select_less(lane, last, x, hidden));
    }

    BlockWeights weigh_bounded(float* scores, int64_t begin, int64_t end, KeyRange visible) const {
        const CappedExp2 capped_exp2 = capped_exp2_;
        const F32 scale = broadcast(input_scale_), none = broadcast(0.0f);
        F32 sum = none;
#pragma GCC unroll 2
        for (int64_t key = begin; key < end; key += kLanes) {
            const F32 weight = masked(capped_exp2(mul(load(scores + key), scale)), key, visible, none);
            store(scores + key, weight);
            sum = add(sum, weight);
        }
        return {0.0f, reduce_add(sum)};
    }

    // Weights of t = x * (scale + scale_rest).
    static BlockWeights weigh_running(float* scores, int64_t begin, int64_t end, KeyRange visible, float scale,
                                      float scale_rest) {
        const F32 hidden = broadcast(kMinusInfinity), none = broadcast(0.0f);
        F32 largest = hidden;
        for (int64_t key = begin; key < end; key += kLanes)
            largest = max(mul(masked(load(scores + key), key, visible, hidden), broadcast(scale)), largest);
        const F32 reference = round_to_nearest(broadcast(reduce_max(largest)));
        F32 sum = none;
#pragma GCC unroll 2
        for (int64_t key = begin; key < end; key += kLanes) {
            const F32 x = load(scores + key);
            const F32 n = round_to_nearest(mul(x, broadcast(scale)));
            F32 r = fma(x, broadcast(scale_rest), fma(x, broadcast(scale), sub(none, n)));
            // Only where float32 has no fractions left, from |t| = 2^23 on, does the remainder pass 1.
            r = max(broadcast(-1.0f), min(broadcast(1.0f), r));
            const F32 e = sub(n, reference);
            F32 weight = scale_by_power_of_two(exp2_fraction(r), max(e, broadcast(-126.0f)));
            weight = select_less(e, broadcast(-125.5f), none, weight);  // nothing subnormal, which would be slow
            weight = masked(weight, key, visible, none);
            store(scores + key, weight);
            sum = add(sum, weight);
        }
        float chosen[kLanes];
        store(chosen, reference);
        return {chosen[0], reduce_add(sum)};
    }

    const AttentionTask& task_;
    CappedExp2 capped_exp2_;
    float input_scale_;
    bool constant_;
};

// 2^e for an integer e; 0 below what float32 holds.
inline float power_of_two(float e) {
    if (!(e >= -126.0f)) return e < -126.0f ? 0.0f : e;  // NaN stays
    const uint32_t bits = static_cast<uint32_t>(static_cast<int>(e < 127.0f ? e : 127.0f) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

}  // namespace
GEMMA2_FAST_END_ISA
