// The formats that are stored in strips of 64 rows, read as single rows of float32: for exact activations, where the
// order of the strips, made for int8 ones, is only in the way.
#pragma once

#include "cpu/kernels/dequantize_simd.h"
#include "quant/weight_format.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// The bytes of kLanes consecutive columns of a row. Four columns lie together, the next four kStride bytes on.
template <int64_t kStride>
inline I32 gather_codes(const std::byte* codes, int64_t col) {
    const std::byte* p = codes + col / 4 * kStride;
#if defined(__AVX512F__)
    return load_u8(_mm_setr_epi32(load_as<int>(p), load_as<int>(p + kStride), load_as<int>(p + 2 * kStride),
                                  load_as<int>(p + 3 * kStride)));
#elif defined(__AVX2__)
    return load_u8(_mm_setr_epi32(load_as<int>(p), load_as<int>(p + kStride), 0, 0));
#else
    return load_u8(p + col % 4);
#endif
}

inline F32 strip_scale(const std::byte* scales, int64_t row) {
    std::byte scale[4] = {};
    std::memcpy(scale + 2, scales + 2 * row, 2);  // bfloat16 is the upper half of a float32
    return broadcast(load_as<float>(scale));
}

struct FormatInt8G128 {
    static constexpr int64_t kBlockWeights = 128, kBlockBytes = sizeof(Int8G128Block);

    class Row {
      public:
        Row(const std::byte* block, int64_t row)
            : codes_(block + 4 * row), scale_(strip_scale(block + offsetof(Int8G128Block, scales), row)) {}
        F32 weights(int64_t col) const {
            return mul(sub(to_float(gather_codes<4 * kStripRows>(codes_, col)), broadcast(128)), scale_);
        }

      private:
        const std::byte* codes_;
        F32 scale_;
    };
};

struct FormatInt4G32 {
    static constexpr int64_t kBlockWeights = 128, kBlockBytes = sizeof(Int4G32Block);

    class Row {
      public:
        Row(const std::byte* block, int64_t row)
            : nibbles_(block + row / 32 * 64 + row % 16 * 4),
              factors_(block + offsetof(Int4G32Block, factors) + row),
              shift_(row % 32 < 16 ? 0 : 4),
              scale_(strip_scale(block + offsetof(Int4G32Block, scales), row)) {}
        F32 weights(int64_t col) const {
            const I32 codes = bit_and(shift_right(gather_codes<2 * kStripRows>(nibbles_, col), shift_), 15);
            const int pair = load_as<uint8_t>(factors_ + col / 64 * kStripRows);
            const F32 factor = broadcast(static_cast<float>((pair >> col / 32 % 2 * 4 & 15) - 8));
            return mul(mul(sub(to_float(codes), broadcast(8)), factor), scale_);
        }

      private:
        const std::byte *nibbles_, *factors_;
        int shift_;
        F32 scale_;
    };
};

template <typename Format>
concept InStrips = requires { typename Format::Row; };

// As unpack_row for columns [first_col, end_col) of one row of the strip; first_col begins a block. Columns are counted
// from first_col.
template <InStrips Format, typename Take, typename TakeRest>
inline void unpack_strip_row(const std::byte* strip, int64_t row, int64_t first_col, int64_t end_col, Take&& take,
                             TakeRest&& take_rest) {
    for (int64_t begin = first_col; begin < end_col; begin += Format::kBlockWeights) {
        const typename Format::Row block(strip + begin / Format::kBlockWeights * Format::kBlockBytes, row);
        const int64_t count = end_col - begin < Format::kBlockWeights ? end_col - begin : Format::kBlockWeights;
        int64_t col = 0;
        for (; col + kLanes <= count; col += kLanes) take(begin - first_col + col, block.weights(col));
        if (col < count) take_rest(begin - first_col + col, block.weights(col));  // blocks are whole: none is outside
    }
}

}  // namespace
GEMMA2_FAST_END_ISA
