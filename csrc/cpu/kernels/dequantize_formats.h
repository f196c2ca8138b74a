// One small policy a storage format. A Chunk reads the scales of up to kChunkWeights consecutive weights of a row, and
// weights(step, i) gives the vector of kLanes weights from step * kStepWeights + i, exactly the float32 that
// gemma2_fast.quant unpacks (a half times an integer code fits 24 bits, so only adding a minimum rounds, and it rounds
// once). Steps are as long as weights share stored bytes. Layouts: see gemma2_fast.quant.
#pragma once

#include "cpu/kernels/dequantize_strips.h"
#include "quant/weight_format.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Formats of plain numbers, whose rows may end with a part of a vector.
template <WeightType kFormat>
struct PlainFormat {
    static constexpr int64_t kElementBytes = kFormat == WeightType::kF32 ? 4 : 2;
    static constexpr int64_t kBlockWeights = kLanes, kBlockBytes = kElementBytes * kLanes;
    static constexpr int64_t kChunkWeights = int64_t{1} << 40, kStepWeights = kLanes;

    class Chunk {
      public:
        Chunk(const std::byte* blocks, int64_t) : blocks_(blocks) {}
        F32 weights(int64_t step, int64_t) const {
            const std::byte* block = blocks_ + step * kBlockBytes;
            if constexpr (kFormat == WeightType::kF32)
                return load(reinterpret_cast<const float*>(block));
            else if constexpr (kFormat == WeightType::kF16)
                return load_f16(reinterpret_cast<const uint16_t*>(block));
            else
                return load_bf16(reinterpret_cast<const uint16_t*>(block));
        }

      private:
        const std::byte* blocks_;
    };

    static F32 first_weights(const std::byte* block, int64_t count) {
        std::byte whole[kBlockBytes] = {};
        std::memcpy(whole, block, static_cast<std::size_t>(count * kElementBytes));
        return Chunk(whole, kLanes).weights(0, 0);
    }
};
using FormatF32 = PlainFormat<WeightType::kF32>;
using FormatF16 = PlainFormat<WeightType::kF16>;
using FormatBF16 = PlainFormat<WeightType::kBF16>;

constexpr int64_t kSmallBlocks = 16;  // blocks of 32 weights in a chunk

// The first two halves of consecutive blocks. In memory each costs its users a broadcast load, which vector units do
// not notice; they are stored one by one, because a wide load of narrow stores waits for the stores to retire.
template <int64_t kBlockBytes>
class BlockHalves {
  public:
    BlockHalves(const std::byte* blocks, int64_t num_blocks) {
#pragma GCC unroll 1
        for (int64_t i = 0; i < num_blocks; ++i) {
            const TwoFloats pair = load_two_f16(blocks + i * kBlockBytes);
            store_two(pairs_ + 2 * i, pair);
        }
    }
    F32 first(int64_t block) const { return broadcast(pairs_[2 * block]); }
    F32 second(int64_t block) const { return broadcast(pairs_[2 * block + 1]); }

  private:
    float pairs_[2 * kSmallBlocks];
};

template <int64_t kBytes>
struct SmallBlockFormat {
    static constexpr int64_t kBlockWeights = 32, kBlockBytes = kBytes;
    static constexpr int64_t kChunkWeights = kSmallBlocks * 32, kStepWeights = 32;
    using Halves = BlockHalves<kBytes>;
};

struct FormatQ8_0 : SmallBlockFormat<34> {
    class Chunk {
      public:
        Chunk(const std::byte* blocks, int64_t count) : codes_(blocks + 2), halves_(blocks, count / 32) {}
        F32 weights(int64_t step, int64_t i) const {
            return mul(to_float(load_i8(codes_ + step * kBlockBytes + i)), halves_.first(step));
        }

      private:
        const std::byte* codes_;
        Halves halves_;
    };
};

// Code i of 16 bytes whose low nibbles are codes 0..15 and whose high ones are 16..31; bits above the fourth are
// anything.
inline I32 nibbles(const std::byte* packed, int64_t i) {
    const I32 bytes = load_u8(packed + i % 16);
    return i < 16 ? bytes : shift_right(bytes, 4);
}

struct FormatQ4_0 : SmallBlockFormat<18> {
    class Chunk {
      public:
        Chunk(const std::byte* blocks, int64_t count) : blocks_(blocks), halves_(blocks, count / 32) {}
        F32 weights(int64_t step, int64_t i) const {
            return FourBitWeights<8>(halves_.first(step))(nibbles(blocks_ + step * kBlockBytes + 2, i));
        }

      private:
        const std::byte* blocks_;
        Halves halves_;
    };
};

struct FormatQ4_1 : SmallBlockFormat<20> {
    class Chunk {
      public:
        Chunk(const std::byte* blocks, int64_t count) : blocks_(blocks), halves_(blocks, count / 32) {}
        F32 weights(int64_t step, int64_t i) const {
            return FourBitWeights<0>(halves_.first(step),
                                     halves_.second(step))(nibbles(blocks_ + step * kBlockBytes + 4, i));
        }

      private:
        const std::byte* blocks_;
        Halves halves_;
    };
};

// Code i of a word of fifth bits and 16 bytes of nibbles.
inline I32 five_bits(const std::byte* packed, int64_t i) {
    return with_fifth_bits(nibbles(packed + 4, i), load_as<uint32_t>(packed), i);
}

struct FormatQ5_0 : SmallBlockFormat<22> {
    class Chunk {
      public:
        Chunk(const std::byte* blocks, int64_t count) : blocks_(blocks), halves_(blocks, count / 32) {}
        F32 weights(int64_t step, int64_t i) const {
            return FiveBitWeights<16>(halves_.first(step))(five_bits(blocks_ + step * kBlockBytes + 2, i));
        }

      private:
        const std::byte* blocks_;
        Halves halves_;
    };
};

struct FormatQ5_1 : SmallBlockFormat<24> {
    class Chunk {
      public:
        Chunk(const std::byte* blocks, int64_t count) : blocks_(blocks), halves_(blocks, count / 32) {}
        F32 weights(int64_t step, int64_t i) const {
            return FiveBitWeights<0>(halves_.first(step),
                                     halves_.second(step))(five_bits(blocks_ + step * kBlockBytes + 4, i));
        }

      private:
        const std::byte* blocks_;
        Halves halves_;
    };
};

// K blocks hold 256 weights; a chunk is one of them.
template <int64_t kBytes, int64_t kStep>
struct LargeBlockFormat {
    static constexpr int64_t kBlockWeights = 256, kBlockBytes = kBytes;
    static constexpr int64_t kChunkWeights = 256, kStepWeights = kStep;
};

// The eight group scales and eight negated group minima of Q4_K and Q5_K in float32.
class GroupScales {
  public:
    explicit GroupScales(const std::byte* block) {
        // Six bits each. Groups 0..3: the low bits of a byte of `low`; groups 4..7: a nibble of `high` below two bits
        // from the top of that byte. In either word the first four bytes are of scales, the others of minima.
        const uint64_t low = load_as<uint64_t>(block + 4), mixed = load_as<uint32_t>(block + 12);
        const uint64_t high = (mixed | mixed << 28) & 0x0f0f0f0f0f0f0f0f;
        const TwoFloats factors = load_two_f16(block);
        store_scaled(low & 0x3f3f3f3f3f3f3f3f, factors, values_);
        store_scaled(high | (low >> 2 & 0x3030303030303030), factors, values_ + 8);
    }
    F32 scale(int64_t pair, int64_t i) const { return broadcast(*at(pair, i)); }
    F32 offset(int64_t pair, int64_t i) const { return broadcast(*(at(pair, i) + 4)); }

  private:
    // Of group 2 * pair + i / 32.
    const float* at(int64_t pair, int64_t i) const { return values_ + pair / 2 * 8 + pair % 2 * 2 + i / 32; }

    alignas(64) float values_[16];
};

struct FormatQ4_K : LargeBlockFormat<144, 64> {
    class Chunk {
      public:
        Chunk(const std::byte* block, int64_t) : packed_(block + 16), scales_(block) {}
        F32 weights(int64_t step, int64_t i) const {
            const I32 bytes = load_u8(packed_ + step * 32 + i % 32);
            const FourBitWeights<0> weight_of(scales_.scale(step, i), scales_.offset(step, i));
            return weight_of(i < 32 ? bytes : shift_right(bytes, 4));
        }

      private:
        const std::byte* packed_;
        GroupScales scales_;
    };
};

struct FormatQ5_K : LargeBlockFormat<176, 64> {
    class Chunk {
      public:
        Chunk(const std::byte* block, int64_t) : fifth_bits_(block + 16), packed_(block + 48), scales_(block) {}
        F32 weights(int64_t step, int64_t i) const {
            const I32 bytes = load_u8(packed_ + step * 32 + i % 32);
            const I32 flags = load_u8(fifth_bits_ + i % 32);
            const FiveBitWeights<0> weight_of(scales_.scale(step, i), scales_.offset(step, i));
            return weight_of(with_fifth_bits(i < 32 ? bytes : shift_right(bytes, 4), flags, 2 * step + i / 32));
        }

      private:
        const std::byte *fifth_bits_, *packed_;
        GroupScales scales_;
    };
};

struct FormatQ6_K : LargeBlockFormat<210, 64> {
    class Chunk {
      public:
        // The codes are joined bytewise, many at once, which costs less than in the vectors of int32.
        Chunk(const std::byte* block, int64_t) {
            const uint8_t* bytes = reinterpret_cast<const uint8_t*>(block);
            for (int half = 0; half < 2; ++half) {
                const uint8_t *low = bytes + half * 64, *high = bytes + 128 + half * 32;
                int8_t* codes = codes_ + half * 128;
                for (int i = 0; i < 32; ++i) codes[i] = join(low[i] & 15, high[i] << 4);
                for (int i = 0; i < 32; ++i) codes[32 + i] = join(low[32 + i] & 15, high[i] << 2);
                for (int i = 0; i < 32; ++i) codes[64 + i] = join(low[i] >> 4, high[i]);
                for (int i = 0; i < 32; ++i) codes[96 + i] = join(low[32 + i] >> 4, high[i] >> 2);
            }
            const F32 scale = broadcast_f16(block + 208);
            for (int64_t i = 0; i < 16; i += kLanes) store(scales_ + i, mul(to_float(load_i8(block + 192 + i)), scale));
        }
        F32 weights(int64_t step, int64_t i) const {
            const auto* codes = reinterpret_cast<const std::byte*>(codes_ + step * kStepWeights + i);
            return mul(to_float(load_i8(codes)), broadcast(scales_[step * 4 + i / 16]));
        }

      private:
        static int8_t join(int low, int high) { return static_cast<int8_t>((low | (high & 48)) - 32); }

        alignas(64) int8_t codes_[256];
        alignas(64) float scales_[16];
    };
};

// Calls visitor.template operator()<Format>() with the format of `type`.
template <typename Visitor>
inline void with_format(WeightType type, Visitor&& visitor) {
    switch (type) {
        case WeightType::kF32:
            return visitor.template operator()<FormatF32>();
        case WeightType::kF16:
            return visitor.template operator()<FormatF16>();
        case WeightType::kBF16:
            return visitor.template operator()<FormatBF16>();
        case WeightType::kQ8_0:
            return visitor.template operator()<FormatQ8_0>();
        case WeightType::kQ4_0:
            return visitor.template operator()<FormatQ4_0>();
        case WeightType::kQ4_1:
            return visitor.template operator()<FormatQ4_1>();
        case WeightType::kQ5_0:
            return visitor.template operator()<FormatQ5_0>();
        case WeightType::kQ5_1:
            return visitor.template operator()<FormatQ5_1>();
        case WeightType::kQ4_K:
            return visitor.template operator()<FormatQ4_K>();
        case WeightType::kQ5_K:
            return visitor.template operator()<FormatQ5_K>();
        case WeightType::kQ6_K:
            return visitor.template operator()<FormatQ6_K>();
        case WeightType::kInt8G128:
            return visitor.template operator()<FormatInt8G128>();
        case WeightType::kInt4G32:
            return visitor.template operator()<FormatInt4G32>();
    }
}

// Calls take(col, weights) for the whole vectors of a row in order, then take_rest(col, weights) where a part of one is
// left, with zeros in its other lanes.
template <typename Format, typename Take, typename TakeRest>
inline void unpack_row(const std::byte* row, int64_t cols, Take&& take, TakeRest&& take_rest) {
    const int64_t whole = cols / Format::kBlockWeights * Format::kBlockWeights;
    for (int64_t col = 0; col < whole;) {
        const int64_t count = whole - col < Format::kChunkWeights ? whole - col : Format::kChunkWeights;
        const typename Format::Chunk chunk(row + col / Format::kBlockWeights * Format::kBlockBytes, count);
        for (int64_t step = 0; step < count / Format::kStepWeights; ++step, col += Format::kStepWeights)
            GEMMA2_FAST_UNROLL
        for (int64_t i = 0; i < Format::kStepWeights; i += kLanes) take(col + i, chunk.weights(step, i));
    }
    if constexpr (requires { Format::first_weights; })
        if (whole < cols) take_rest(whole, Format::first_weights(row + whole * Format::kElementBytes, cols - whole));
}

}  // namespace
GEMMA2_FAST_END_ISA
