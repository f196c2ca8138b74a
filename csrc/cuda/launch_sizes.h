#pragma once

#include <bit>
#include <cstdint>

namespace gemma2_fast {

inline constexpr int64_t kBF16Bytes = 2, kF32Bytes = 4, kI32Bytes = 4, kI64Bytes = 8, kF64Bytes = 8;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t power_of_two(int64_t least) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(least))); }
inline int32_t i32(int64_t value) { return static_cast<int32_t>(value); }

// What a step may grow to, what decode steps are filled up with included.
struct StepSizes {
    int64_t max_tokens = 0;
    int64_t max_sequences = 0;
    int64_t max_logits = 0;
    int64_t max_seq_len = 0;
};

// New tokens of a sequence that one program of attention has room for.
struct QueryRoom {
    int64_t tile = 0;   // of prefill attention
    int64_t split = 0;  // of decode attention, which splits the keys among programs
};

}  // namespace gemma2_fast
