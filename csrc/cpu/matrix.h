#pragma once

#include <optional>
#include <string>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "weights/model_weights.h"
#include "weights/strips.h"

namespace gemma2_fast {

enum class Activations { kF32, kInt8 };

// A weight matrix as a matmul reads it: in strips where it meets int8 activations, else as it is stored.
struct Matrix {
    WeightView stored;
    std::optional<StripView> strips;
    AlignedBuffer<std::byte> own_strips;       // what `strips` shows, unless the checkpoint stores strips
    std::optional<AlignedBuffer<float>> bias;  // [rows]

    int64_t rows() const { return stored.rows; }
    int64_t num_strips() const { return (stored.rows + kStripRows - 1) / kStripRows; }
};

// Looks the matrix up and, for int8 activations, brings a quantised one into strips. Unquantised ones stay as they are.
Matrix load_matrix(const ModelWeights& weights, const std::string& name, int64_t rows, int64_t cols,
                   Activations activations, ThreadPool& threads);

}  // namespace gemma2_fast
