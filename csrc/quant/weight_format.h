#pragma once

#include <cstdint>
#include <string_view>

namespace gemma2_fast {

// How the elements of a weight matrix are stored. Names equal those of gemma2_fast.quant.FORMATS.
enum class WeightType {
    kF32,
    kF16,
    kBF16,
    kQ8_0,
    kQ4_0,
    kQ4_1,
    kQ5_0,
    kQ5_1,
    kQ4_K,
    kQ5_K,
    kQ6_K,
    kInt8G128,
    kInt4G32
};

struct WeightFormat {
    WeightType type;
    std::string_view name;
    int64_t block_rows;     // 1, or kStripRows where a block covers a strip of rows
    int64_t block_weights;  // consecutive weights of a row in one block
    int64_t block_bytes;
};

// Rows of a strip: what a matmul for int8 activations computes at once. Matrices are stored as strips of whole blocks,
// [ceil(rows / 64), ceil(cols / block_weights)], padded with codes, factors and scales of zero.
inline constexpr int64_t kStripRows = 64;

// Blocks of strips. codes[k / 4][row][k % 4] is the order that four-byte dot products read; scales are bfloat16.
struct Int8G128Block {
    uint8_t codes[32][kStripRows][4];  // weight = scale * (code - 128), code 1..255
    uint16_t scales[kStripRows];
};
static_assert(sizeof(Int8G128Block) == 8320);

// weight = scale * factor * (nibble - 8), a factor -8..7 for 32 columns: factor * (nibble - 8) fits a byte. Of nibbles
// [k / 4][half][lane][k % 4] the low one belongs to row 32 * half + lane, the high one to row 32 * half + 16 + lane. Of
// factors [i][row] the low nibble is factor + 8 of columns 64 * i to 64 * i + 31, the high one that of the next 32.
struct Int4G32Block {
    uint8_t nibbles[32][2][16][4];
    uint8_t factors[2][kStripRows];
    uint16_t scales[kStripRows];
};
static_assert(sizeof(Int4G32Block) == 4352);

const WeightFormat& weight_format(WeightType type);
const WeightFormat& weight_format(std::string_view name);  // throws Error that lists the known names

}  // namespace gemma2_fast
