#include "weights/strips.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

uint16_t half_at(const uint8_t* bytes) {
    uint16_t value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

// Each reader gives the fields of one stored block to a block of a strip; layouts: gemma2_fast.quant.

template <typename Strip>
void read_nibbles_32(const uint8_t* packed, Strip& strip, int64_t row) {
    for (int64_t col = 0; col < 32; ++col) strip.codes.put(row, col, packed[col % 16] >> (col / 16 * 4) & 15u);
}

template <typename Strip>
void read_five_bits_32(const uint8_t* fifth, const uint8_t* packed, Strip& strip, int64_t row) {
    for (int64_t col = 0; col < 32; ++col) {
        const uint32_t low = packed[col % 16] >> (col / 16 * 4) & 15u, high = fifth[col / 8] >> (col % 8) & 1u;
        strip.codes.put(row, col, low | high << 4);
    }
}

// The eight 6-bit scales and the eight 6-bit minima of a K block.
template <typename Strip>
void read_group_scales(const uint8_t* packed, Strip& strip, int64_t row) {
    for (int64_t group = 0; group < 8; ++group) {
        uint8_t scale, minimum;
        if (group < 4) {
            scale = packed[group] & 63;
            minimum = packed[group + 4] & 63;
        } else {
            scale = static_cast<uint8_t>((packed[group + 4] & 15) | packed[group - 4] >> 6 << 4);
            minimum = static_cast<uint8_t>(packed[group + 4] >> 4 | packed[group] >> 6 << 4);
        }
        strip.group_scales[group][row] = scale;
        strip.group_minimums[group][row] = minimum;
    }
}

void read_block(const uint8_t* block, StripQ8_0& strip, int64_t row) {
    strip.scales[row] = half_at(block);
    for (int64_t col = 0; col < 32; ++col) strip.codes.put(row, col, block[2 + col] ^ 128u);
}

void read_block(const uint8_t* block, StripQ4_0& strip, int64_t row) {
    strip.scales[row] = half_at(block);
    read_nibbles_32(block + 2, strip, row);
}

void read_block(const uint8_t* block, StripQ4_1& strip, int64_t row) {
    strip.scales[row] = half_at(block);
    strip.minimums[row] = half_at(block + 2);
    read_nibbles_32(block + 4, strip, row);
}

void read_block(const uint8_t* block, StripQ5_0& strip, int64_t row) {
    strip.scales[row] = half_at(block);
    read_five_bits_32(block + 2, block + 6, strip, row);
}

void read_block(const uint8_t* block, StripQ5_1& strip, int64_t row) {
    strip.scales[row] = half_at(block);
    strip.minimums[row] = half_at(block + 2);
    read_five_bits_32(block + 4, block + 8, strip, row);
}

void read_block(const uint8_t* block, StripQ4_K& strip, int64_t row) {
    strip.scales[row] = half_at(block);
    strip.minimums[row] = half_at(block + 2);
    read_group_scales(block + 4, strip, row);
    const uint8_t* packed = block + 16;
    for (int64_t col = 0; col < 256; ++col)
        strip.codes.put(row, col, packed[col / 64 * 32 + col % 32] >> (col % 64 / 32 * 4) & 15u);
}

void read_block(const uint8_t* block, StripQ5_K& strip, int64_t row) {
    strip.scales[row] = half_at(block);
    strip.minimums[row] = half_at(block + 2);
    read_group_scales(block + 4, strip, row);
    const uint8_t *fifth = block + 16, *packed = block + 48;
    for (int64_t col = 0; col < 256; ++col) {
        const uint32_t low = packed[col / 64 * 32 + col % 32] >> (col % 64 / 32 * 4) & 15u;
        strip.codes.put(row, col, low | (fifth[col % 32] >> (col / 32) & 1u) << 4);
    }
}

void read_block(const uint8_t* block, StripQ6_K& strip, int64_t row) {
    const uint8_t *low = block, *upper = block + 128, *scales = block + 192;
    strip.scales[row] = half_at(block + 208);
    for (int64_t group = 0; group < 16; ++group) strip.group_scales[group][row] = static_cast<int8_t>(scales[group]);
    for (int64_t col = 0; col < 256; ++col) {
        const int64_t half = col / 128, quarter = col % 128 / 32, place = col % 32;
        const uint32_t nibble = low[half * 64 + quarter % 2 * 32 + place] >> (quarter / 2 * 4) & 15u;
        strip.codes.put(row, col, nibble | (upper[half * 32 + place] >> (quarter * 2) & 3u) << 4);
    }
}

template <typename Strip>
void pack_rows(const WeightView& weight, int64_t first_row, std::byte* out) {
    const WeightFormat& format = weight_format(weight.type);
    const int64_t num_blocks = weight.cols / format.block_weights;
    const int64_t num_rows = std::min(kStripRows, weight.rows - first_row);
    for (int64_t index = 0; index < num_blocks; ++index) {
        Strip strip{};
        for (int64_t row = 0; row < num_rows; ++row)
            read_block(reinterpret_cast<const uint8_t*>(weight.row(first_row + row) + index * format.block_bytes),
                       strip, row);
        std::memcpy(out + index * static_cast<int64_t>(sizeof(Strip)), &strip, sizeof strip);
    }
}

}  // namespace

bool has_strips(WeightType type) {
    return type != WeightType::kF32 && type != WeightType::kF16 && type != WeightType::kBF16;
}

int64_t strip_bytes(WeightType type, int64_t cols) {
    const WeightFormat& format = weight_format(type);
    int64_t block_bytes = format.block_rows == 1 ? format.block_bytes * kStripRows : format.block_bytes;
    if (type == WeightType::kQ4_K) block_bytes = sizeof(StripQ4_K);
    if (type == WeightType::kQ5_K) block_bytes = sizeof(StripQ5_K);
    return (cols + format.block_weights - 1) / format.block_weights * block_bytes;
}

void pack_strip(const WeightView& weight, int64_t strip, std::byte* out) {
    const int64_t first_row = strip * kStripRows;
    switch (weight.type) {
        case WeightType::kQ8_0:
            return pack_rows<StripQ8_0>(weight, first_row, out);
        case WeightType::kQ4_0:
            return pack_rows<StripQ4_0>(weight, first_row, out);
        case WeightType::kQ4_1:
            return pack_rows<StripQ4_1>(weight, first_row, out);
        case WeightType::kQ5_0:
            return pack_rows<StripQ5_0>(weight, first_row, out);
        case WeightType::kQ5_1:
            return pack_rows<StripQ5_1>(weight, first_row, out);
        case WeightType::kQ4_K:
            return pack_rows<StripQ4_K>(weight, first_row, out);
        case WeightType::kQ5_K:
            return pack_rows<StripQ5_K>(weight, first_row, out);
        case WeightType::kQ6_K:
            return pack_rows<StripQ6_K>(weight, first_row, out);
        default:
            throw Error("pack_strip: " + std::string(weight_format(weight.type).name) + " is not a row-major format");
    }
}

}  // namespace gemma2_fast
