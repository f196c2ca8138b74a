// Attention's two products over float32 and bfloat16 pages: tiles of rows that keep two vectors of sums each in
// registers. The terms of a sum are added in an order that is its own, so its bits do not depend on how many rows share
// the tile.
#pragma once

#include "cpu/kernels/attention_block.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Dot products are summed in runs of this many dims: a chain of 256 has three times the rounding error.
constexpr int64_t kRunDims = 64;

struct Pair {
    F32 left, right;
};
// Elements c.. and 16 + c.. of a page's row.
inline Pair load_pair(const float* row, int64_t c) { return {load(row + c), load(row + 16 + c)}; }
inline Pair load_pair(const uint16_t* row, int64_t c) {
#if defined(__AVX512F__)
    const __m512i both = _mm512_loadu_si512(row + 2 * c);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
#elif defined(__AVX2__)
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * c));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
#else
    return {load_bf16(row + 2 * c), load_bf16(row + 2 * c + 1)};
#endif
}

template <typename Element>
struct FloatKv {
    // Sums of a full tile, a row of the page and one broadcast fit the registers: 32 with AVX-512, else 16.
    static constexpr int64_t kTileRows = kLanes == 16 ? 12 : 6;
    static constexpr int64_t kRowBytes = kRowElements * sizeof(Element);

    static int64_t rows_a_half(int64_t head_dim) { return padded_dims(head_dim); }

    // Of a tile: [D, rows].
    static void prepare(const float* const* queries, int64_t num_rows, int64_t head_dim, float* prepared) {
        for (int64_t r = 0; r < num_rows; ++r)
            for (int64_t d = 0; d < head_dim; ++d) prepared[d * num_rows + r] = queries[r][d];
    }

    // scores[r, key] = sum_d queries[r, d] * keys[d, key] for the keys of the block's pages.
    static void score(const float* prepared, int64_t num_rows, const Block& block, int64_t head_dim, float* scores) {
        for (int64_t page = block.first_page; page < block.end_page; ++page)
            kScore[num_rows - 1](prepared, block.pages[page], head_dim, scores + page * kPageTokens,
                                 {block.fetched_keys[page], block.fetch_step});
    }

    // records[r].sums = sum of weights[r, key] * values[key, :] over keys [first, last) of the block.
    static void add_values(float* weights, int64_t num_rows, const Block& block, KeyRange keys, int64_t head_dim,
                           float* records) {
        for (int64_t r = 0; r < num_rows; ++r) record_at(records, r, head_dim)->factor = 1.0f;
        for_page_runs(block, block.streams, [&](const PageRun& run) {
            kAddValues[num_rows - 1](weights, block, run, keys, head_dim, records);
        });
    }

  private:
    using Score = void (*)(const float*, const std::byte*, int64_t, float*, Fetch);
    using AddValues = void (*)(const float*, const Block&, const PageRun&, KeyRange, int64_t, float*);

    template <int kRows>
    static void score_page(const float* queries, const std::byte* page, int64_t head_dim, float* scores,
                           Fetch fetched) {
        for (int64_t c = 0; c < 16; c += kLanes) {
            const float* query = queries;
            const Element* keys = reinterpret_cast<const Element*>(page);
            for (int64_t begin = 0; begin < head_dim; begin += kRunDims) {
                const int64_t end = begin + kRunDims < head_dim ? begin + kRunDims : head_dim;
                F32 left[kRows], right[kRows];
                GEMMA2_FAST_UNROLL
                for (int r = 0; r < kRows; ++r) left[r] = right[r] = broadcast(0.0f);
                for (int64_t d = begin; d < end; ++d, query += kRows, keys += kRowElements) {
                    fetched.next<kRowBytes>();
                    const Pair key = load_pair(keys, c);
                    GEMMA2_FAST_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        const F32 q = broadcast(query[r]);
                        left[r] = fma(q, key.left, left[r]);
                        right[r] = fma(q, key.right, right[r]);
                    }
                }
                GEMMA2_FAST_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    float* score = scores + r * kBlockTokens + c;
                    store(score, begin == 0 ? left[r] : add(load(score), left[r]));
                    store(score + 16, begin == 0 ? right[r] : add(load(score + 16), right[r]));
                }
            }
            fetched.from -= head_dim * fetched.step;
        }
    }

    template <int kRows>
    static void add_values_of(const float* weights, const Block& block, const PageRun& run, KeyRange keys,
                              int64_t head_dim, float* records) {
        const int64_t values_offset = padded_dims(head_dim) * kRowBytes;
        const int64_t record_stride = record_floats(head_dim);
        for (int64_t panel = 0; panel < padded_dims(head_dim); panel += kRowElements)
            for (int64_t c = 0; c < 16; c += kLanes) {
                F32 left[kRows], right[kRows];
                float* sums = records + kRecordHeader + panel + c;
                GEMMA2_FAST_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    left[r] = run.first ? broadcast(0.0f) : load(sums + r * record_stride);
                    right[r] = run.first ? broadcast(0.0f) : load(sums + r * record_stride + 16);
                }
                for (int64_t page = run.first_page; page < run.end_page; ++page) {
                    const int64_t position = page * kPageTokens;
                    const int64_t first = keys.first > position ? keys.first - position : 0;
                    const int64_t last = keys.last - position < kPageTokens ? keys.last - position : kPageTokens;
                    const float* weight = weights + position;
                    const int64_t begin = panel * kRowBytes + first * kRowBytes;
                    const auto* value = reinterpret_cast<const Element*>(block.pages[page] + values_offset + begin);
                    Fetch fetched{block.fetched_values[page] + (panel + first) * block.fetch_step, block.fetch_step};
                    for (int64_t key = first; key < last; ++key, value += kRowElements) {
                        fetched.next<kRowBytes>();
                        const Pair v = load_pair(value, c);
                        GEMMA2_FAST_UNROLL
                        for (int r = 0; r < kRows; ++r) {
                            const F32 w = broadcast(weight[r * kBlockTokens + key]);
                            left[r] = fma(w, v.left, left[r]);
                            right[r] = fma(w, v.right, right[r]);
                        }
                    }
                }
                GEMMA2_FAST_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    store(sums + r * record_stride, left[r]);
                    store(sums + r * record_stride + 16, right[r]);
                }
            }
    }

    // Entry r serves r + 1 rows.
    static constexpr Score kScore[kTileRows] = {score_page<1>,  score_page<2>, score_page<3>, score_page<4>,
                                                score_page<5>,  score_page<6>,
#if defined(__AVX512F__)
                                                score_page<7>,  score_page<8>, score_page<9>, score_page<10>,
                                                score_page<11>, score_page<12>
#endif
    };
    static constexpr AddValues kAddValues[kTileRows] = {
        add_values_of<1>,  add_values_of<2>, add_values_of<3>, add_values_of<4>,
        add_values_of<5>,  add_values_of<6>,
#if defined(__AVX512F__)
        add_values_of<7>,  add_values_of<8>, add_values_of<9>, add_values_of<10>,
        add_values_of<11>, add_values_of<12>
#endif
    };
};

}  // namespace
GEMMA2_FAST_END_ISA
