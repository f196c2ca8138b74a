#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu_features.h"

namespace gemma2_fast {

// Loops that do nothing but what bounds every kernel, for the benchmarks to compare with.
struct Ceilings {
    // Reads bytes [0, num_bytes), a multiple of 1024; returns a value that depends on all of them.
    uint64_t (*read)(const std::byte* data, int64_t num_bytes);
    // Independent fused multiply-adds on float32, and multiply-accumulates of bytes to int32; return the number of
    // multiplications done, at least `wanted`.
    int64_t (*multiply_add)(int64_t wanted);
    int64_t (*multiply_add_bytes)(int64_t wanted);
};

const Ceilings& ceilings_for(InstructionSet set);  // throws BackendError when the machine lacks the set

}  // namespace gemma2_fast
