#include "cpu/matrix.h"

#include <cstring>

#include "base/huge_pages.h"

namespace gemma2_fast {

Matrix load_matrix(const ModelWeights& weights, const std::string& name, int64_t rows, int64_t cols,
                   Activations activations, ThreadPool& threads) {
    Matrix matrix;
    matrix.stored = weights.at(name, rows, cols);
    const WeightView& stored = matrix.stored;
    if (activations == Activations::kF32 || !has_strips(stored.type)) return matrix;

    StripView& strips = matrix.strips.emplace(StripView{stored.type, rows, cols, stored.data});
    const bool stored_in_strips = weight_format(stored.type).block_rows == kStripRows;
    const bool aligned = reinterpret_cast<uintptr_t>(stored.data) % AlignedBuffer<std::byte>::kAlignmentBytes == 0;
    if (stored_in_strips && aligned) return matrix;

    const int64_t bytes = strip_bytes(stored.type, cols);
    matrix.own_strips = AlignedBuffer<std::byte>(static_cast<std::size_t>(strips.num_strips() * bytes));
    prefer_huge_pages(matrix.own_strips.data(), matrix.own_strips.size());
    strips.data = matrix.own_strips.data();
    threads.parallel_for(strips.num_strips(), [&](int64_t strip, int) {
        std::byte* out = matrix.own_strips.data() + strip * bytes;
        if (stored_in_strips)
            std::memcpy(out, stored.data + strip * bytes, static_cast<std::size_t>(bytes));
        else
            pack_strip(stored, strip, out);
    });
    return matrix;
}

}  // namespace gemma2_fast
