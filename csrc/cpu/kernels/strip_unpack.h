// Blocks of strips (weights/strips.h) as the int8 tiles read them: one byte a code and float32 scales, a group of 128
// columns at a time. Plain loops over constant counts, which compilers turn into vectors.
#pragma once

#include "cpu/kernels/dequantize_simd.h"
#include "weights/strips.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kGroupCols = 128;                       // columns that share an activation scale
constexpr int64_t kStepCodes = kStripRows * 4;            // codes of four columns and all rows
constexpr int64_t kGroupCodes = kStripRows * kGroupCols;  // codes of a group
constexpr int64_t kMaxParts = 8;                          // weight scales a row may have in a group
constexpr int64_t kFetchBytes = 16384;                    // how far ahead of the reads memory is asked

// One group of a strip, unpacked. A part is the columns that share a weight scale: 128, 32 or 16.
struct Group {
    const uint8_t* codes;   // [32][64][4]
    const float* scales;    // [parts][64]
    const float* minimums;  // [parts][64], or null: weight = scale * code + minimum
};

struct GroupBuffer {
    alignas(64) uint8_t codes[kGroupCodes];
    alignas(64) float scales[kMaxParts * kStripRows];
    alignas(64) float minimums[kMaxParts * kStripRows];
};

inline void fetch_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kFetchBytes, 0, 2); }

template <int kWeights>
inline void unpack_codes(const Codes8<kWeights>& codes, int64_t first_step, int64_t num_steps, uint8_t* out) {
    const uint8_t* from = &codes.codes[first_step][0][0];
    for (int64_t i = 0; i < num_steps * kStepCodes; i += 64) {
        fetch_ahead(from + i);
        for (int64_t j = 0; j < 64; ++j) out[i + j] = from[i + j];
    }
}

inline void unpack_nibbles(const uint8_t* nibbles, int64_t num_steps, uint8_t* __restrict out) {
    for (int64_t i = 0; i < num_steps * 2; ++i, nibbles += 64, out += 128) {
        fetch_ahead(nibbles);
        for (int64_t j = 0; j < 64; ++j) out[j] = nibbles[j] & 15;
        for (int64_t j = 0; j < 64; ++j) out[64 + j] = nibbles[j] >> 4;
    }
}

using Pairs [[gnu::vector_size(64)]] = uint16_t;  // named: gcc 12 leaves loops over pairs of bytes as they are

// 32 columns as codes factor * (nibble - 8) + 64, two in 16 bits: whatever is carried meanwhile, in the end each is one
// of 8..128. Factors are nibbles too, those that begin at bit `shift`.
inline void unpack_factored(const uint8_t* nibbles, const uint8_t* factors, int shift, uint8_t* __restrict out) {
    alignas(64) uint32_t spread[kStripRows], offsets[kStripRows];  // to the two pairs of each row
    for (int64_t row = 0; row < kStripRows; ++row) {
        const uint32_t nibble = static_cast<uint32_t>(factors[row]) >> shift & 15;
        spread[row] = ((nibble - 8) & 0xffff) * 0x00010001;
        offsets[row] = (128 - 8 * nibble) * 0x01010101;
    }
    Pairs factor[4], offset[4];
    std::memcpy(factor, spread, sizeof spread);
    std::memcpy(offset, offsets, sizeof offsets);
    for (int64_t step = 0; step < 8; ++step) {
        GEMMA2_FAST_UNROLL
        for (int64_t half = 0; half < 2; ++half, nibbles += 64, out += 128) {
            Pairs packed;
            std::memcpy(&packed, nibbles, sizeof packed);
            fetch_ahead(nibbles);
            const Pairs low = (packed & 0x0f0f) * factor[2 * half] + offset[2 * half];
            const Pairs high = (packed >> 4 & 0x0f0f) * factor[2 * half + 1] + offset[2 * half + 1];
            std::memcpy(out, &low, sizeof low);
            std::memcpy(out + 64, &high, sizeof high);
        }
    }
}

template <int kWeights>
inline void unpack_codes(const Codes4<kWeights>& codes, int64_t first_step, int64_t num_steps, uint8_t* out) {
    unpack_nibbles(&codes.nibbles[first_step][0][0][0], num_steps, out);
}

template <int kWeights>
inline void unpack_codes(const Codes5<kWeights>& codes, int64_t first_step, int64_t num_steps,
                         uint8_t* __restrict out) {
    unpack_nibbles(&codes.nibbles[first_step][0][0][0], num_steps, out);
    for (int64_t step = first_step; step < first_step + num_steps; ++step, out += kStepCodes) {
        const uint8_t* fifth = codes.fifth[step];
        fetch_ahead(fifth);
        for (int64_t bit = 0; bit < 8; ++bit)
            for (int64_t j = 0; j < 32; ++j) out[bit * 32 + j] |= static_cast<uint8_t>((fifth[j] >> bit & 1) << 4);
    }
}

template <int kWeights>
inline void unpack_codes(const Codes6<kWeights>& codes, int64_t first_step, int64_t num_steps,
                         uint8_t* __restrict out) {
    unpack_nibbles(&codes.nibbles[first_step][0][0][0], num_steps, out);
    for (int64_t step = first_step; step < first_step + num_steps; ++step, out += kStepCodes) {
        const uint8_t* upper = codes.upper[step];
        fetch_ahead(upper);
        for (int64_t pair = 0; pair < 4; ++pair)
            for (int64_t j = 0; j < 64; ++j)
                out[pair * 64 + j] |= static_cast<uint8_t>((upper[j] >> (2 * pair) & 3) << 4);
    }
}

inline void unpack_halves(const Halves& halves, float* out) {
    for (int64_t row = 0; row < kStripRows; row += kLanes) store(out + row, load_f16(halves + row));
}

inline void unpack_bf16(const uint16_t* scales, float* out) {
    for (int64_t row = 0; row < kStripRows; row += kLanes) store(out + row, load_bf16(scales + row));
}

// out = factor * halves * group factors; exact, since a half has 11 bits and a group factor at most 8.
template <typename Integer>
inline void unpack_products(const Halves& halves, const Integer* group_factors, float factor, float* out) {
    for (int64_t row = 0; row < kStripRows; row += kLanes) {
        const auto* bytes = reinterpret_cast<const std::byte*>(group_factors + row);
        const I32 wide = Integer(-1) < 0 ? load_i8(bytes) : load_u8(bytes);
        store(out + row, mul(mul(load_f16(halves + row), broadcast(factor)), to_float(wide)));
    }
}

// One policy a format: how many parts a group has, whether weights have minimums, the code of zero, and unpack(), which
// fills `buffer` from the group-th group of a strip that has `cols` columns, and says where the results are. kInPlace
// where the codes stay where they are stored, so that the tile is the first to read them.
template <typename Strip, int kZeroCode, bool kHasMinimums>
struct SmallBlockStrips {  // 32 columns a block
    static constexpr int64_t kParts = 4;
    static constexpr int32_t kZero = kZeroCode;
    static constexpr bool kMinimums = kHasMinimums, kInPlace = false;

    static Group unpack(const std::byte* strip, int64_t group, int64_t cols, GroupBuffer& buffer) {
        const Strip* blocks = reinterpret_cast<const Strip*>(strip) + group * kParts;
        const int64_t num_blocks = (cols - group * kGroupCols + 31) / 32;
        for (int64_t part = 0; part < kParts; ++part) {
            uint8_t* codes = buffer.codes + part * 8 * kStepCodes;
            float *scales = buffer.scales + part * kStripRows, *minimums = buffer.minimums + part * kStripRows;
            if (part < num_blocks) {
                unpack_codes(blocks[part].codes, 0, 8, codes);
                unpack_halves(blocks[part].scales, scales);
                if constexpr (kMinimums) unpack_halves(blocks[part].minimums, minimums);
            } else {
                std::memset(codes, kZero, 8 * kStepCodes);
                for (int64_t row = 0; row < kStripRows; ++row) scales[row] = minimums[row] = 0;
            }
        }
        return {buffer.codes, buffer.scales, kMinimums ? buffer.minimums : nullptr};
    }
};

template <typename Strip>
struct KStrips {  // Q4_K and Q5_K
    static constexpr int64_t kParts = 4;
    static constexpr int32_t kZero = 0;
    static constexpr bool kMinimums = true, kInPlace = false;

    static Group unpack(const std::byte* strip, int64_t group, int64_t, GroupBuffer& buffer) {
        const Strip& block = reinterpret_cast<const Strip*>(strip)[group / 2];
        const int64_t first_part = group % 2 * kParts;
        unpack_codes(block.codes, group % 2 * 32, 32, buffer.codes);
        for (int64_t part = 0; part < kParts; ++part) {
            const int64_t place = part * kStripRows;
            unpack_products(block.scales, block.group_scales[first_part + part], 1, buffer.scales + place);
            unpack_products(block.minimums, block.group_minimums[first_part + part], -1, buffer.minimums + place);
        }
        return {buffer.codes, buffer.scales, buffer.minimums};
    }
};

struct StripsQ6_K {
    static constexpr int64_t kParts = 8;
    static constexpr int32_t kZero = 32;
    static constexpr bool kMinimums = false, kInPlace = false;

    static Group unpack(const std::byte* strip, int64_t group, int64_t, GroupBuffer& buffer) {
        const StripQ6_K& block = reinterpret_cast<const StripQ6_K*>(strip)[group / 2];
        unpack_codes(block.codes, group % 2 * 32, 32, buffer.codes);
        for (int64_t part = 0; part < kParts; ++part)
            unpack_products(block.scales, block.group_scales[group % 2 * kParts + part], 1,
                            buffer.scales + part * kStripRows);
        return {buffer.codes, buffer.scales, nullptr};
    }
};

struct StripsInt8G128 {
    static constexpr int64_t kParts = 1;
    static constexpr int32_t kZero = 128;
    static constexpr bool kMinimums = false, kInPlace = true;

    static Group unpack(const std::byte* strip, int64_t group, int64_t, GroupBuffer& buffer) {
        const Int8G128Block& block = reinterpret_cast<const Int8G128Block*>(strip)[group];
        unpack_bf16(block.scales, buffer.scales);
        return {&block.codes[0][0][0], buffer.scales, nullptr};
    }
};

struct StripsInt4G32 {  // factors go into the codes, so that a row has one scale
    static constexpr int64_t kParts = 1;
    static constexpr int32_t kZero = 64;  // in 16 bits there is room for two products of these codes, and not of larger
    static constexpr bool kMinimums = false, kInPlace = false;

    static Group unpack(const std::byte* strip, int64_t group, int64_t, GroupBuffer& buffer) {
        const Int4G32Block& block = reinterpret_cast<const Int4G32Block*>(strip)[group];
        for (int64_t part = 0; part < 4; ++part)
            unpack_factored(&block.nibbles[part * 8][0][0][0], block.factors[part / 2], part % 2 * 4,
                            buffer.codes + part * 8 * kStepCodes);
        unpack_bf16(block.scales, buffer.scales);
        return {buffer.codes, buffer.scales, nullptr};
    }
};

// Calls visit<Policy>() with the policy of a format that has strips.
template <typename Visit>
void with_strips(WeightType type, Visit visit) {
    switch (type) {
        case WeightType::kInt8G128:
            return visit.template operator()<StripsInt8G128>();
        case WeightType::kInt4G32:
            return visit.template operator()<StripsInt4G32>();
        case WeightType::kQ8_0:
            return visit.template operator()<SmallBlockStrips<StripQ8_0, 128, false>>();
        case WeightType::kQ4_0:
            return visit.template operator()<SmallBlockStrips<StripQ4_0, 8, false>>();
        case WeightType::kQ4_1:
            return visit.template operator()<SmallBlockStrips<StripQ4_1, 0, true>>();
        case WeightType::kQ5_0:
            return visit.template operator()<SmallBlockStrips<StripQ5_0, 16, false>>();
        case WeightType::kQ5_1:
            return visit.template operator()<SmallBlockStrips<StripQ5_1, 0, true>>();
        case WeightType::kQ4_K:
            return visit.template operator()<KStrips<StripQ4_K>>();
        case WeightType::kQ5_K:
            return visit.template operator()<KStrips<StripQ5_K>>();
        case WeightType::kQ6_K:
            return visit.template operator()<StripsQ6_K>();
        default:
            return;
    }
}

}  // namespace
GEMMA2_FAST_END_ISA
