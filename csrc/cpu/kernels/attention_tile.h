// Register tiles of attention: both products walk one page and keep rows x 2 vectors of sums in registers. The terms of
// a sum are added in an order that is its own, so its bits do not depend on how many rows share the tile.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Sums of a full tile, two vectors a row and one broadcast fit the set's vector registers (32 with AVX-512, else 16).
constexpr int64_t kMaxTileRows = kLanes == 16 ? 12 : 6;
constexpr int64_t kTileColumns = 2 * kLanes;
// Dot products are summed in runs of this many dims: a chain of 256 has three times the rounding error, and runs
// overlap.
constexpr int64_t kRunDims = 32;
static_assert(kPageTokens % kTileColumns == 0);

inline F32 load_kv(const float* p) { return load(p); }
inline F32 load_kv(const uint16_t* p) { return load_bf16(p); }
inline F32 load_first_kv(const float* p, int64_t n) { return load_first(p, n); }
inline F32 load_first_kv(const uint16_t* p, int64_t n) { return load_first_bf16(p, n); }

// Memory works while the tiles compute: each product also asks for what the next one reads, a few cache lines a step,
// into the second-level cache: the first has no room beside the present page, and decoding was 10 % slower with it.
template <typename Element>
inline void fetch(const Element* p, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(Element);
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// scores[r, key] = sum_d queries[d, r] * keys[d, key].
// queries: [D, kRows]; keys: [D, P]; scores: [kRows, P]; upcoming: D * P elements to fetch.
template <int kRows, typename Element>
void score_page(const float* queries, const Element* keys, int64_t head_dim, float* scores, const Element* upcoming) {
    for (int64_t column = 0; column < kPageTokens; column += kTileColumns) {
        const float* query = queries;
        const Element* key = keys + column;
        const Element* fetched = upcoming + column;
        for (int64_t begin = 0; begin < head_dim; begin += kRunDims) {
            const int64_t end = begin + kRunDims < head_dim ? begin + kRunDims : head_dim;
            F32 left[kRows], right[kRows];
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) left[r] = right[r] = broadcast(0.0f);
            for (int64_t d = begin; d < end; ++d, query += kRows, key += kPageTokens, fetched += kPageTokens) {
                fetch(fetched, kTileColumns);
                F32 key_left = load_kv(key), key_right = load_kv(key + kLanes);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    F32 q = broadcast(query[r]);
                    left[r] = fma(q, key_left, left[r]);
                    right[r] = fma(q, key_right, right[r]);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                float* score = scores + r * kPageTokens + column;
                store(score, begin == 0 ? left[r] : add(load(score), left[r]));
                store(score + kLanes, begin == 0 ? right[r] : add(load(score + kLanes), right[r]));
            }
        }
    }
}

// sums[r, :] = decay[r] * sums[r, :] + sum_{key in [first, last)} weights[r, key] * values[key, :]
// weights: [kRows, P]; values: [P, D]; sums: [kRows, D]; upcoming: D * P elements to fetch.
template <int kRows, typename Element>
void add_values(const float* weights, const float* decay, const Element* values, int64_t first_key, int64_t last_key,
                int64_t head_dim, float* sums, const Element* upcoming) {
    int64_t column = 0;
    for (; column + kTileColumns <= head_dim; column += kTileColumns) {
        F32 left[kRows], right[kRows];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) left[r] = right[r] = broadcast(0.0f);
        const Element* value = values + first_key * head_dim + column;
        const Element* fetched = upcoming + column * kPageTokens;
        for (int64_t key = first_key; key < last_key; ++key, value += head_dim, fetched += kTileColumns) {
            fetch(fetched, kTileColumns);
            F32 value_left = load_kv(value), value_right = load_kv(value + kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                F32 weight = broadcast(weights[r * kPageTokens + key]);
                left[r] = fma(weight, value_left, left[r]);
                right[r] = fma(weight, value_right, right[r]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            float* total = sums + r * head_dim + column;
            F32 factor = broadcast(decay[r]);
            store(total, fma(factor, load(total), left[r]));
            store(total + kLanes, fma(factor, load(total + kLanes), right[r]));
        }
    }
    for (; column < head_dim; column += kLanes) {
        const int64_t lanes = head_dim - column < kLanes ? head_dim - column : kLanes;
        F32 sum[kRows];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) sum[r] = broadcast(0.0f);
        for (int64_t key = first_key; key < last_key; ++key) {
            F32 value = load_first_kv(values + key * head_dim + column, lanes);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) sum[r] = fma(broadcast(weights[r * kPageTokens + key]), value, sum[r]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            float* total = sums + r * head_dim + column;
            store_first(total, fma(broadcast(decay[r]), load_first(total, lanes), sum[r]), lanes);
        }
    }
}

// The tiles of 1 to kMaxTileRows rows; entry r serves r + 1 rows.
template <typename Element>
struct TileTable {
    using Score = void (*)(const float*, const Element*, int64_t, float*, const Element*);
    using AddValues = void (*)(const float*, const float*, const Element*, int64_t, int64_t, int64_t, float*,
                               const Element*);
    Score score[kMaxTileRows];
    AddValues add_values[kMaxTileRows];
};

template <typename Element>
inline constexpr TileTable<Element> kTiles = {{score_page<1, Element>, score_page<2, Element>, score_page<3, Element>,
                                               score_page<4, Element>, score_page<5, Element>, score_page<6, Element>,
#if defined(__AVX512F__)
                                               score_page<7, Element>, score_page<8, Element>, score_page<9, Element>,
                                               score_page<10, Element>, score_page<11, Element>, score_page<12, Element>
#endif
                                              },
                                              {add_values<1, Element>, add_values<2, Element>, add_values<3, Element>,
                                               add_values<4, Element>, add_values<5, Element>, add_values<6, Element>,
#if defined(__AVX512F__)
                                               add_values<7, Element>, add_values<8, Element>, add_values<9, Element>,
                                               add_values<10, Element>, add_values<11, Element>, add_values<12, Element>
#endif
                                              }};

}  // namespace
GEMMA2_FAST_END_ISA
