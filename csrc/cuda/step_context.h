#pragma once

#include "cuda/arena.h"
#include "cuda/kernel.h"
#include "cuda/step_inputs.h"

namespace gemma2_fast {

// Rows of one step, T each, shared by all layers. The residual and logits are float32, all else bfloat16.
struct StepRows {
    Arena::Slice residual, normed, branch;  // [T, E]
    Arena::Slice mixed;                     // [T, W]: what a layer's first product gives, W its rows
    Arena::Slice attended;                  // [T, X]: what its second product reads, X its columns
    Arena::Slice gate_up, hidden;           // [T, 2 F], [T, F]
    Arena::Slice logits;                    // [L, V]
    Arena::Slice chosen;                    // [L] int32: tokens of the step before, until this one's are chosen
};

// What every launch of a step needs to know.
struct StepContext {
    Stream& stream;
    const Arena& arena;
    const StepRows& rows;
    const StepShape& shape;
    const StepInputs::Addresses inputs;

    CUdeviceptr at(const Arena::Slice& slice) const { return arena.at(slice); }
};

}  // namespace gemma2_fast
