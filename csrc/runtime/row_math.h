// exp and tanh for rows of logits: the same bits on every machine, unlike the C library's.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

namespace gemma2_fast {

// Four floats of any x86-64 or ARM processor; loops over rows are written with them because compilers keep ordered
// reductions and the functions below scalar.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
inline constexpr int64_t kRowLanes = 4;

inline Floats load_floats(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// In what follows Float and Int are float and int32_t, or the vectors of them: one formula, the same bits.

template <typename Float>
struct SplitExponential {  // exp(x) = power * (1 + rest)
    Float power;
    Float rest;
};

template <typename Float, typename Int>
inline SplitExponential<Float> split_exponential(Float x) {  // |x| <= 87
    constexpr float kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693145752f;  // few bits, so that n * kLn2High is exact
    constexpr float kLn2Low = 1.42860677e-6f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Float shifted = x * kLog2E + kRound;
    const Float n = shifted - kRound;
    const Float r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= log(2) / 2
    Float p = r * (1.0f / 5040) + 1.0f / 720;          // the series up to r^7 leaves 5e-9
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    const Float one = Float{} + 1.0f;
    return {std::bit_cast<Float>(std::bit_cast<Int>(one) + (std::bit_cast<Int>(shifted) << 23)), p * r};
}

// exp(x) for x <= 87; 0 below -87.
template <typename Float, typename Int>
inline Float exp_series(Float x) {
    const Float smallest = Float{} - 87.0f;
    const auto [power, rest] = split_exponential<Float, Int>(x > smallest ? x : smallest);
    return x > smallest ? power * (rest + 1.0f) : Float{};
}

// cap * tanh(x / cap), within 4e-7 of the cap; -inf stays -inf. With t = exp(2 |y|) - 1, tanh(|y|) = t / (t + 2).
template <typename Float, typename Int>
inline Float softcap_series(Float x, float cap) {
    constexpr int32_t kSign = std::numeric_limits<int32_t>::min();
    const Float ratio = x / cap;
    const Int sign = std::bit_cast<Int>(ratio) & kSign;
    const Float largest = Float{} + 20.0f;  // tanh(10) is 1
    const Float twice = std::bit_cast<Float>(std::bit_cast<Int>(ratio) ^ sign) * 2.0f;
    const auto [power, rest] = split_exponential<Float, Int>(twice < largest ? twice : largest);
    const Float t = power * rest + (power - 1.0f);
    const Float capped = t / (t + 2.0f) * cap;
    return x < -std::numeric_limits<float>::max() ? x : std::bit_cast<Float>(std::bit_cast<Int>(capped) ^ sign);
}

}  // namespace gemma2_fast
