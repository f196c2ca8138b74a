// Where everything lies in one head's page of the cache: P keys and P values of D elements, D filled up to Dp, a
// multiple of 32. Both products of attention walk a page from its first byte to its last.
//
//   float32, bfloat16   keys [D, P], then from Dp * P on values [Dp / 32, P, 32]. A row of 32 bfloat16 holds its
//                       elements in the order 0, 16, 1, 17, …: one load gives two vectors of float32 without a shuffle.
//   int8                keys [Dp / 4, P, 4], each code + 128; values [Dp / 32, P / 4, 32, 4], signed codes; then
//   float32
//                       scales of the keys [P] and of the values [P]. Groups of four bytes are what VNNI multiplies.
//
// Elements of D..Dp hold anything: no result depends on them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kRowElements = 32;  // of a page's row: keys of one dimension, or dimensions of one value
constexpr int64_t kPanelElements = kPageTokens * kRowElements;  // of P values' 32 dimensions
static_assert(kPageTokens == kRowElements);

inline int64_t padded_dims(int64_t head_dim) { return (head_dim + kRowElements - 1) / kRowElements * kRowElements; }

inline int64_t place_in_row(int64_t i, const float*) { return i; }
inline int64_t place_in_row(int64_t i, const uint16_t*) { return i % 16 * 2 + i / 16; }

constexpr float kMostKvCode = 127;
constexpr int kKeyOffset = 128;  // keys are stored unsigned
// Adding it to a float below 2^22 leaves the nearest integer, ties to even, in the low bits.
constexpr float kRoundingBias = 0x1.8p23f;

struct Int8Page {
    std::byte* keys;
    std::byte* values;
    float* key_scales;
    float* value_scales;

    Int8Page(std::byte* page, int64_t head_dim)
        : keys(page),
          values(page + padded_dims(head_dim) * kPageTokens),
          key_scales(reinterpret_cast<float*>(values + padded_dims(head_dim) * kPageTokens)),
          value_scales(key_scales + kPageTokens) {}

    static uint64_t key_place(uint64_t slot, uint64_t d) { return (d / 4 * kPageTokens + slot) * 4 + d % 4; }
    static uint64_t value_place(uint64_t slot, uint64_t d) {
        return d / kRowElements * kPanelElements + (slot / 4 * kRowElements + d % kRowElements) * 4 + slot % 4;
    }
};

}  // namespace
GEMMA2_FAST_END_ISA
