#include "cpu/kernels/declarations.h"
#include "cpu/kernels/kv_page.h"

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
void write_floats(std::byte* page, int64_t head_dim, int64_t slot, const float* key, const float* value) {
    auto* keys = reinterpret_cast<Element*>(page) + place_in_row(slot, static_cast<Element*>(nullptr));
    Element* values = reinterpret_cast<Element*>(page) + padded_dims(head_dim) * kPageTokens + slot * kRowElements;
    for (int64_t d = 0; d < head_dim; ++d) encode(key[d], keys + d * kPageTokens);
    for (int64_t d = 0; d < head_dim; ++d)
        encode(value[d], values + d / kRowElements * kPanelElements + place_in_row(d % kRowElements, values));
}

// max|x| / 127; NaN if x [D] holds NaN or infinity.
float scale_of(const float* x, int64_t head_dim) {
    F32 largest = broadcast(0.0f), faults = broadcast(0.0f);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const F32 part = load_first(x + d, head_dim - d < kLanes ? head_dim - d : kLanes);
        largest = max(abs(part), largest);
        faults = fma(part, broadcast(0.0f), faults);
    }
    return reduce_max(largest) / kMostKvCode + reduce_add(faults);
}

// put(d, code) with code = round(x[d] / scale) in [-127, 127], ties to even, as the low byte of an int.
template <typename Put>
void quantize(const float* x, int64_t head_dim, float scale, const Put& put) {
    const F32 divisor = broadcast(scale > 0.0f ? scale : 1.0f);  // a scale that underflowed stands for zeros
    const F32 most = broadcast(kMostKvCode), least = broadcast(-kMostKvCode);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const int64_t lanes = head_dim - d < kLanes ? head_dim - d : kLanes;
        alignas(64) float codes[kLanes];
        uint32_t bits[kLanes];
        store(codes, add(max(min(div(load_first(x + d, lanes), divisor), most), least), broadcast(kRoundingBias)));
        std::memcpy(bits, codes, sizeof bits);
        if (lanes == kLanes) {
            GEMMA2_FAST_UNROLL
            for (int64_t i = 0; i < kLanes; ++i) put(d + i, bits[i]);
        } else {
            for (int64_t i = 0; i < lanes; ++i) put(d + i, bits[i]);
        }
    }
}

void write_int8(std::byte* page, int64_t head_dim, int64_t slot, const float* key, const float* value) {
    const Int8Page to(page, head_dim);
    to.key_scales[slot] = scale_of(key, head_dim);
    to.value_scales[slot] = scale_of(value, head_dim);
    quantize(key, head_dim, to.key_scales[slot], [&](uint64_t d, uint32_t code) {
        to.keys[Int8Page::key_place(slot, d)] = static_cast<std::byte>(code + kKeyOffset);
    });
    quantize(value, head_dim, to.value_scales[slot], [&](uint64_t d, uint32_t code) {
        to.values[Int8Page::value_place(slot, d)] = static_cast<std::byte>(code);
    });
}

}  // namespace

void write_kv(const KvPages& pages, int64_t block_index, int64_t slot_in_page, const float* keys, const float* values) {
    const int64_t head_dim = pages.head_dim;
    std::byte* page = pages.data + block_index * pages.num_kv_heads * pages.page_bytes;
    for (int64_t head = 0; head < pages.num_kv_heads; ++head) {
        if (pages.type == KvType::kF32)
            write_floats<float>(page, head_dim, slot_in_page, keys, values);
        else if (pages.type == KvType::kBF16)
            write_floats<uint16_t>(page, head_dim, slot_in_page, keys, values);
        else
            write_int8(page, head_dim, slot_in_page, keys, values);
        page += pages.page_bytes;
        keys += head_dim;
        values += head_dim;
    }
}

GEMMA2_FAST_END_ISA
