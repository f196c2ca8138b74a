// Weights in strips of 64 rows, the order in which the int8 matmul reads them: one record a format. INT8_G128 and
// INT4_G32 are stored so (quant/weight_format.h); GGUF's formats are brought into it in memory, every weight keeping
// its exact value. Codes are unsigned, as the four-byte dot products want one operand.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/weight_format.h"
#include "weights/weight_view.h"

namespace gemma2_fast {

// Codes of kWeights columns and 64 rows; put() wants zeroed memory.
template <int kWeights>
struct Codes8 {
    uint8_t codes[kWeights / 4][kStripRows][4];

    void put(int64_t row, int64_t col, uint32_t code) { codes[col / 4][row][col % 4] = static_cast<uint8_t>(code); }
};

template <int kWeights>
struct Codes4 {
    uint8_t nibbles[kWeights / 4][2][16][4];  // as in Int4G32Block

    void put(int64_t row, int64_t col, uint32_t code) {
        nibbles[col / 4][row / 32][row % 16][col % 4] |= static_cast<uint8_t>((code & 15) << (row % 32 / 16 * 4));
    }
};

// With the place of (row, col % 4) in [64][4] as p: the fifth bit is bit p / 32 of byte p % 32.
template <int kWeights>
struct Codes5 : Codes4<kWeights> {
    uint8_t fifth[kWeights / 4][32];

    void put(int64_t row, int64_t col, uint32_t code) {
        Codes4<kWeights>::put(row, col, code);
        const int64_t place = row * 4 + col % 4;
        fifth[col / 4][place % 32] |= static_cast<uint8_t>((code >> 4 & 1) << (place / 32));
    }
};

// The fifth and sixth bits are bits 2 * (p / 64) of byte p % 64.
template <int kWeights>
struct Codes6 : Codes4<kWeights> {
    uint8_t upper[kWeights / 4][64];

    void put(int64_t row, int64_t col, uint32_t code) {
        Codes4<kWeights>::put(row, col, code);
        const int64_t place = row * 4 + col % 4;
        upper[col / 4][place % 64] |= static_cast<uint8_t>((code >> 4 & 3) << (place / 64 * 2));
    }
};

using Halves = uint16_t[kStripRows];  // IEEE half precision, one a row

struct StripQ8_0 {  // scale * (code - 128)
    Codes8<32> codes;
    Halves scales;
};
struct StripQ4_0 {  // scale * (code - 8)
    Codes4<32> codes;
    Halves scales;
};
struct StripQ4_1 {  // scale * code + minimum
    Codes4<32> codes;
    Halves scales, minimums;
};
struct StripQ5_0 {  // scale * (code - 16)
    Codes5<32> codes;
    Halves scales;
};
struct StripQ5_1 {  // scale * code + minimum
    Codes5<32> codes;
    Halves scales, minimums;
};
struct StripQ4_K {  // (scale * group_scale) * code - minimum * group_minimum, a group being 32 columns
    Codes4<256> codes;
    uint8_t group_scales[8][kStripRows], group_minimums[8][kStripRows];
    Halves scales, minimums;
};
struct StripQ5_K {  // as Q4_K
    Codes5<256> codes;
    uint8_t group_scales[8][kStripRows], group_minimums[8][kStripRows];
    Halves scales, minimums;
};
struct StripQ6_K {  // (scale * group_scale) * (code - 32), a group being 16 columns
    Codes6<256> codes;
    int8_t group_scales[16][kStripRows];
    Halves scales;
};
static_assert(sizeof(StripQ8_0) == 34 * 64 && sizeof(StripQ4_0) == 18 * 64 && sizeof(StripQ4_1) == 20 * 64);
static_assert(sizeof(StripQ5_0) == 22 * 64 && sizeof(StripQ5_1) == 24 * 64 && sizeof(StripQ6_K) == 210 * 64);
static_assert(sizeof(StripQ4_K) == 148 * 64 && sizeof(StripQ5_K) == 180 * 64);  // 6-bit group scales take a byte here

// A matrix [rows, cols] in strips: [ceil(rows / 64)] strips of strip_bytes(type, cols) each, that somebody else owns.
struct StripView {
    WeightType type = WeightType::kInt8G128;
    int64_t rows = 0;
    int64_t cols = 0;
    const std::byte* data = nullptr;

    int64_t num_strips() const { return (rows + kStripRows - 1) / kStripRows; }
};

bool has_strips(WeightType type);  // false for the unquantised formats
int64_t strip_bytes(WeightType type, int64_t cols);

// Writes one strip of a row-major matrix; rows past the last become zeros.
void pack_strip(const WeightView& weight, int64_t strip, std::byte* out);

}  // namespace gemma2_fast
