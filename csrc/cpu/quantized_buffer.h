#pragma once

#include <cstring>

#include "base/aligned_buffer.h"
#include "cpu/kernels.h"

namespace gemma2_fast {

// Storage for the quantised rows of up to `tokens` tokens; empty where none are needed.
class QuantizedBuffer {
  public:
    QuantizedBuffer() = default;
    QuantizedBuffer(int64_t tokens, int64_t cols) {
        const int64_t stride = (tokens + kQuantizedTokens - 1) / kQuantizedTokens * kQuantizedTokens;
        const auto rows = static_cast<std::size_t>((cols + kQuantizedCols - 1) / kQuantizedCols * stride);
        codes_ = AlignedBuffer<int8_t>(rows * kQuantizedCols);
        outliers_ = AlignedBuffer<Outliers>(rows);
        has_outliers_ = AlignedBuffer<uint8_t>(rows + 8);
        scales_ = AlignedBuffer<float>(rows);
        sums_ = AlignedBuffer<int32_t>(rows);
        part_sums_ = AlignedBuffer<int32_t>(rows * 8);
        // Tiles read as many tokens as they have place for; what they make of the absent ones is left.
        std::memset(codes_.data(), 0, codes_.size());
        std::memset(has_outliers_.data(), 0, has_outliers_.size());
        for (float& scale : scales_.span()) scale = 0;
        for (int32_t& sum : sums_.span()) sum = 0;
        for (int32_t& sum : part_sums_.span()) sum = 0;
    }

    // A step of num_tokens tokens uses the storage densely.
    QuantizedRows rows(int64_t num_tokens) {
        const int64_t whole = (num_tokens + kQuantizedTokens - 1) / kQuantizedTokens * kQuantizedTokens;
        const int64_t stride = num_tokens > kMostUnpaddedTokens ? whole : num_tokens;
        return {codes_.data(), outliers_.data(), has_outliers_.data(), scales_.data(), sums_.data(), part_sums_.data(),
                stride};
    }

  private:
    AlignedBuffer<int8_t> codes_;
    AlignedBuffer<Outliers> outliers_;
    AlignedBuffer<uint8_t> has_outliers_;
    AlignedBuffer<float> scales_;
    AlignedBuffer<int32_t> sums_, part_sums_;
};

}  // namespace gemma2_fast
