#include "cpu/kernels/declarations.h"
#include "cpu/kernels/int8_matvec.h"
#include "cpu/kernels/int8_tile.h"
#include "cpu/kernels/int8_tile_amx.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// The sums of kTokensAtOnce tokens stay in a first-level cache beside a group of weights.
#if defined(__AMX_INT8__)
constexpr int64_t kTokensAtOnce = 64;
constexpr int64_t kFewestAmxTokens = 5;  // of formats of one part; fewer are faster by vectors
#else
constexpr int64_t kTokensAtOnce = 48;
#endif
// For more tokens than a block some groups are unpacked once for all; they stay in a second-level cache.
constexpr int64_t kChunkGroups = 6;
// Sums of all tokens wait in a second-level cache between chunks; what has more reads the weights again.
constexpr int64_t kMostTokens = 512;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

struct Scratch {
    GroupBuffer* groups;  // [kChunkGroups]
    float* sums;          // [strips][tokens][64]
};

// What multiplies: vectors, or matrix tiles that hold few tokens or some of many.
enum class By { kVectors, kFewTiles, kTiles };

int64_t padded(int64_t num_tokens) { return divide_up(num_tokens, kQuantizedTokens) * kQuantizedTokens; }

// Tokens [first, first + count) with groups [begin, end). Weights that come later are fetched little by little:
// `fetch`, or, of a block that reads its weights for the first time and needs them soon, what is just ahead.
template <typename Strips, By kBy, bool kFetchesAhead>
void multiply_block(const Group* groups, int64_t begin, int64_t end, const QuantizedRows& x, int64_t first,
                    int64_t count, Fetch fetch, float* sums) {
    const int64_t num_sums = (kBy == By::kTiles ? padded(count) : count) * kStripRows;
    if (begin == 0) std::memset(sums, 0, static_cast<std::size_t>(num_sums) * sizeof(float));
    const TileTokens tokens{&x, begin * x.token_stride + first, sums};
#if defined(__AMX_INT8__)
    if constexpr (kBy == By::kTiles) return multiply_groups_by_tiles<Strips>(groups, end - begin, tokens, count, fetch);
    if constexpr (kBy == By::kFewTiles) {
        for (int64_t g = 0; g < end - begin; ++g)
            multiply_few_by_tiles<Strips, Strips::kInPlace>(groups[g], tokens.of_later_group(g), count);
        return;
    }
#endif
    const int64_t num_tiles = divide_up(count, kTileTokens), fewest = count / num_tiles, rest = count % num_tiles;
    fetch.split(num_tiles * (end - begin));
    for (int64_t g = 0; g < end - begin; ++g) {
        TileTokens of_tile = tokens.of_later_group(g);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t num_tokens = fewest + (tile < rest ? 1 : 0);
            fetch.next();
            if (kFetchesAhead && Strips::kInPlace && tile == 0)
                run_int8_tile<Strips, Strips::kInPlace>(num_tokens, groups[g], of_tile);
            else
                run_int8_tile<Strips, false>(num_tokens, groups[g], of_tile);
            of_tile = of_tile.after(num_tokens);
        }
    }
}

// All groups of some strips: sums[i] are those of strip i. Strips share the passes over x, which is larger than they.
template <typename Strips, By kBy>
void multiply_strips(const std::byte* strips, int64_t num_strips, int64_t strip_bytes, int64_t cols,
                     const QuantizedRows& x, int64_t first, int64_t count, const Scratch& scratch) {
    const int64_t num_groups = divide_up(cols, kGroupCols), num_blocks = divide_up(count, kTokensAtOnce);
    const int64_t chunk_groups = num_blocks > 1 ? kChunkGroups : 1, group_bytes = strip_bytes / num_groups;
    for (int64_t chunk = 0; chunk < num_groups; chunk += chunk_groups)
        for (int64_t strip = 0; strip < num_strips; ++strip) {
            const int64_t chunk_end = min(chunk + chunk_groups, num_groups);
            const std::byte* weights = strips + strip * strip_bytes;
            float* sums = scratch.sums + strip * padded(count) * kStripRows;
            Group groups[kChunkGroups];
            for (int64_t g = chunk; g < chunk_end; ++g) {
                GroupBuffer& buffer = scratch.groups[g - chunk];
                groups[g - chunk] = Strips::unpack(weights, g, cols, buffer);
#if defined(__AMX_INT8__)
                if constexpr (kBy == By::kTiles) groups[g - chunk] = centred<Strips>(groups[g - chunk], buffer);
#endif
            }
            if (num_blocks == 1) {
                multiply_block<Strips, kBy, true>(groups, chunk, chunk_end, x, first, count, {}, sums);
                continue;
            }
            const bool last_strip = strip + 1 == num_strips, last_chunk = chunk_end == num_groups;
            const std::byte* later = !last_strip  ? weights + strip_bytes + chunk * group_bytes
                                     : last_chunk ? strips + num_strips * strip_bytes
                                                  : strips + chunk_end * group_bytes;
            Fetch fetch{later, (chunk_end - chunk) * group_bytes};
            fetch.split(num_blocks);
            for (int64_t block = 0; block < count; block += kTokensAtOnce)
                multiply_block<Strips, kBy, false>(groups, chunk, chunk_end, x, first + block,
                                                   min(kTokensAtOnce, count - block), fetch.take(),
                                                   sums + block * kStripRows);
        }
}

template <typename Matvec>
void multiply_token_strips(const StripView& weight, int64_t first_strip, int64_t num_strips, const QuantizedRows& x,
                           float* out) {
    const int64_t bytes = strip_bytes(weight.type, weight.cols), num_groups = divide_up(weight.cols, kGroupCols);
    for (int64_t done = 0; done < num_strips; done += kMostMatvecStrips) {
        const std::byte* strips = weight.data + (first_strip + done) * bytes;
        const int64_t count = min(kMostMatvecStrips, num_strips - done);
        float* rows = out + done * kStripRows;
        const int64_t num_rows = min(count * kStripRows, weight.rows - (first_strip + done) * kStripRows);
        float whole[kMostMatvecStrips * kStripRows];
        float* results = num_rows < count * kStripRows ? whole : rows;
        if (count == 1)
            multiply_token<Matvec, 1>(strips, bytes, num_groups, x, results);
        else
            multiply_token<Matvec, kMostMatvecStrips>(strips, bytes, num_groups, x, results);
        if (results == whole) std::memcpy(rows, whole, static_cast<std::size_t>(num_rows) * sizeof(float));
    }
}

}  // namespace

int64_t int8_matmul_scratch_floats(int64_t num_tokens) {
    constexpr int64_t kGroupFloats = sizeof(GroupBuffer) / sizeof(float);
    return (num_tokens > kTokensAtOnce ? kChunkGroups : 1) * kGroupFloats +
           kMostStripsAtOnce * padded(min(num_tokens, kMostTokens)) * kStripRows;
}

void int8_matmul(const StripView& weight, int64_t first_strip, int64_t num_strips, const QuantizedRows& x,
                 int64_t num_tokens, float* out, int64_t out_stride, float* scratch) {
    if (num_tokens == 1 && weight.type == WeightType::kInt8G128)
        return multiply_token_strips<MatvecInt8G128>(weight, first_strip, num_strips, x, out);
    if (num_tokens == 1 && weight.type == WeightType::kInt4G32)
        return multiply_token_strips<MatvecInt4G32>(weight, first_strip, num_strips, x, out);
    const int64_t num_buffers = num_tokens > kTokensAtOnce ? kChunkGroups : 1;
    const Scratch parts{reinterpret_cast<GroupBuffer*>(scratch),
                        scratch + num_buffers * static_cast<int64_t>(sizeof(GroupBuffer) / sizeof(float))};
    const int64_t bytes = strip_bytes(weight.type, weight.cols);
    for (int64_t first = 0; first < num_tokens; first += kMostTokens) {
        const int64_t count = min(kMostTokens, num_tokens - first);
        with_strips(weight.type, [&]<typename Strips>() {
            const std::byte* strips = weight.data + first_strip * bytes;
            const auto multiply = [&]<By kBy>() {
                multiply_strips<Strips, kBy>(strips, num_strips, bytes, weight.cols, x, first, count, parts);
            };
#if defined(__AMX_INT8__)
            constexpr int64_t kPartCols = kGroupCols / Strips::kParts;
            if constexpr (Strips::kParts == 1) {
                if (num_tokens >= kFewestAmxTokens && num_tokens <= kAmxRows) {
                    const AmxTiles tiles(kPartCols, kSumTiles, num_tokens);
                    return multiply.template operator()<By::kFewTiles>();
                }
            }
            if (num_tokens > kMostUnpaddedTokens) {
                const AmxTiles tiles(kPartCols, kSumTiles);
                return multiply.template operator()<By::kTiles>();
            }
#endif
            multiply.template operator()<By::kVectors>();
        });
        for (int64_t strip = 0; strip < num_strips; ++strip) {
            const int64_t num_rows = min(kStripRows, weight.rows - (first_strip + strip) * kStripRows);
            const float* sums = parts.sums + strip * padded(count) * kStripRows;
            for (int64_t t = 0; t < count; ++t)
                std::memcpy(out + (first + t) * out_stride + strip * kStripRows, sums + t * kStripRows,
                            static_cast<std::size_t>(num_rows) * sizeof(float));
        }
    }
}

GEMMA2_FAST_END_ISA
