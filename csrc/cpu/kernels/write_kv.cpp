#include <cstring>

#include "cpu/kernels/declarations.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

inline void encode(float value, float* out) { *out = value; }

inline void encode(float value, uint16_t* out) {  // to the nearest bfloat16, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry a NaN into infinity
    bits = is_nan ? bits | 0x00400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    *out = static_cast<uint16_t>(bits >> 16);
}

template <typename Element>
void write_slot(const KvPages& pages, int64_t block_index, int64_t slot, const float* keys, const float* values) {
    const int64_t head_dim = pages.head_dim;
    const int64_t half = head_dim * kPageTokens;
    Element* page = reinterpret_cast<Element*>(pages.data) + block_index * pages.num_kv_heads * 2 * half;
    for (int64_t head = 0; head < pages.num_kv_heads; ++head, page += 2 * half, keys += head_dim, values += head_dim) {
        for (int64_t d = 0; d < head_dim; ++d) encode(keys[d], page + d * kPageTokens + slot);
        for (int64_t d = 0; d < head_dim; ++d) encode(values[d], page + half + slot * head_dim + d);
    }
}

}  // namespace

void write_kv(const KvPages& pages, int64_t block_index, int64_t slot_in_page, const float* keys, const float* values) {
    if (pages.type == KvType::kF32)
        write_slot<float>(pages, block_index, slot_in_page, keys, values);
    else
        write_slot<uint16_t>(pages, block_index, slot_in_page, keys, values);
}

GEMMA2_FAST_END_ISA
