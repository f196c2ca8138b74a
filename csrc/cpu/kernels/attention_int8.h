// Attention's two products over int8 pages. Keys and values have 8 bits and a scale a token; queries are rounded to 16
// bits a row and weights to 15 bits a row and block of keys, so that all of the error that counts is the cache's own.
// A value's scale goes into the weight before it is rounded: sums over keys stay integers.
#pragma once

#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/integer_products.h"
#include "cpu/kernels/integer_products_amx.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr float kMostWeightCode = 32767;  // times 127 times kBlockTokens fits int32
static_assert(32767ll * 127 * kBlockTokens < INT32_MAX);

struct Int8Kv {
    // Rows whose sums fit the vector registers; matrix units take more.
#if defined(__AVX512F__) || !GEMMA2_FAST_BYTE_PRODUCTS
    static constexpr int64_t kVectorRows = 6;
#else
    static constexpr int64_t kVectorRows = 3;
#endif
    static constexpr int64_t kTileRows = kMatrixRows > 0 ? kMatrixRows : kVectorRows;
    static constexpr int64_t kRowBytes = kStepColumnBytes;
    static int64_t rows_a_half(int64_t head_dim) { return padded_dims(head_dim) / kStepCodes; }

    // Of a tile: what a unit of each row's codes stands for [rows], -128 times the sum of each row's codes [rows], then
    // the codes: a step of all rows after the other, or for matrix units a row after the other.
    static void prepare(const float* const* queries, int64_t num_rows, int64_t head_dim, float* prepared) {
        auto* codes = reinterpret_cast<std::byte*>(prepared + 2 * num_rows);
        // High part times 256, plus 128, must fit 16 bits, and a sum of products with bytes 32 bits.
        const int64_t fits = INT32_MAX / (255 * head_dim);
        const float most = static_cast<float>(fits < 32639 ? fits : 32639);
        for (int64_t r = 0; r < num_rows; ++r) {
            F32 largest = broadcast(0.0f), faults = broadcast(0.0f);
            for (int64_t d = 0; d < head_dim; d += kLanes) {
                const F32 x = load_first(queries[r] + d, head_dim - d < kLanes ? head_dim - d : kLanes);
                largest = max(abs(x), largest);
                faults = fma(x, broadcast(0.0f), faults);
            }
            const float unit = reduce_max(largest) / most + reduce_add(faults);
            const float inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
            const bool by_row = num_rows > kVectorRows;
            const int64_t end = by_row ? matrix_dims(head_dim) : head_dim;
            const int64_t step_stride = by_row ? kStepCodes : num_rows * kStepCodes * kCodeBytes;
            const int64_t part_stride = by_row ? end : kStepCodes;
            std::byte* row = codes + r * (by_row ? end * kCodeBytes : kStepCodes * kCodeBytes);
            int32_t sum = 0;
            for (int64_t d = 0; d < end; d += kStepCodes) {
                uint32_t four[kStepCodes] = {};
                for (int64_t i = 0; i < kStepCodes && d + i < head_dim; ++i) {
                    const float code = queries[r][d + i] * inverse + kRoundingBias;
                    std::memcpy(&four[i], &code, sizeof code);
                    sum += static_cast<int16_t>(four[i]);
                }
                put_key_codes(four, row + d / kStepCodes * step_stride, part_stride);
            }
            prepared[r] = unit;
            const int32_t offset = -kKeyOffset * sum;
            std::memcpy(prepared + num_rows + r, &offset, sizeof offset);
        }
    }

    static void score(const float* prepared, int64_t num_rows, const Block& block, int64_t head_dim, float* scores) {
        if (num_rows > kVectorRows) return score_by_matrix(prepared, num_rows, block, head_dim, scores);
        kScore[num_rows - 1](prepared, block, head_dim, scores);
    }

    static void add_values(float* weights, int64_t num_rows, const Block& block, KeyRange, int64_t head_dim,
                           float* records) {
        alignas(64) std::byte codes[kTileRows * kBlockTokens * kCodeBytes];
        for (int64_t r = 0; r < num_rows; ++r)
            record_at(records, r, head_dim)->factor =
                round_weights(weights + r * kBlockTokens, block, head_dim, codes + r * kBlockTokens * kCodeBytes);
        for_page_runs(block, block.streams, [&](const PageRun& run) {
            if (num_rows > kVectorRows) return add_values_by_matrix(codes, num_rows, block, run, head_dim, records);
            kAddValues[num_rows - 1](codes, block, run, head_dim, records);
        });
        for (int64_t r = 0; r < num_rows; ++r) {
            float* sums = record_at(records, r, head_dim)->sums();
            for (int64_t d = 0; d < padded_dims(head_dim); d += kLanes) store(sums + d, to_float(load_ints(sums + d)));
        }
    }

  private:
    using Score = void (*)(const float*, const Block&, int64_t, float*);
    using AddValues = void (*)(const std::byte*, const Block&, const PageRun&, int64_t, float*);

    // Codes of weight * scale of the value, for the block's pages; gives what a unit stands for.
    static float round_weights(float* weights, const Block& block, int64_t head_dim, std::byte* codes) {
        F32 largest = broadcast(0.0f), sum = broadcast(0.0f);
        for (int64_t page = block.first_page; page < block.end_page; ++page) {
            const float* scales = Int8Page(block.pages[page], head_dim).value_scales;
            for (int64_t slot = 0; slot < kPageTokens; slot += kLanes) {
                float* p = weights + page * kPageTokens + slot;
                const F32 weight = load(p), none = broadcast(0.0f);
                const F32 scaled = select_less(none, weight, mul(weight, load(scales + slot)), none);  // hidden: any
                store(p, scaled);
                largest = max(scaled, largest);
                sum = add(sum, scaled);
            }
        }
        const float unit = reduce_max(largest) / kMostWeightCode, total = reduce_add(sum);
        const float inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
        for (int64_t key = block.first_page * kPageTokens; key < block.end_page * kPageTokens; key += kLanes) {
            const F32 code = min(mul(load(weights + key), broadcast(inverse)), broadcast(kMostWeightCode));
            put_value_codes(add(code, broadcast(kRoundingBias)), codes, key);
        }
        return unit + total * 0.0f;  // NaN if a scale or a weight is
    }

    template <int kRows>
    static void score_block(const float* prepared, const Block& block, int64_t head_dim, float* scores) {
        using Products = IntegerProducts<kRows, Operand::kKeys>;
        const auto* codes = reinterpret_cast<const std::byte*>(prepared + 2 * kRows);
        const int64_t steps = (head_dim + kStepCodes - 1) / kStepCodes;
        for (int64_t index = block.first_page; index < block.end_page; ++index) {
            const Int8Page page(block.pages[index], head_dim);
            for (int64_t c = 0; c < kRowElements; c += Products::kColumns) {
                Products products;
                products.add_steps(codes, page.keys + c * kStepCodes, steps,
                                   {block.fetched_keys[index], block.fetch_step});
                products.finish([&](int64_t r, int64_t column, Ints sum) {
                    int32_t offset;
                    std::memcpy(&offset, prepared + kRows + r, sizeof offset);
                    const F32 scale = mul(load(page.key_scales + c + column), broadcast(prepared[r]));
                    store(scores + r * kBlockTokens + index * kPageTokens + c + column,
                          mul(to_float(add(sum, broadcast_int(offset))), scale));
                });
            }
        }
    }

    // The records' sums hold integers.
    template <int kRows>
    static void add_values_of(const std::byte* codes, const Block& block, const PageRun& run, int64_t head_dim,
                              float* records) {
        alignas(64) static constexpr float kZeros[kRowElements] = {};
        using Products = IntegerProducts<kRows, Operand::kValues>;
        const int64_t record_stride = record_floats(head_dim);
        constexpr int64_t kPageSteps = kPageTokens / kStepCodes;
        for (int64_t d = 0; d < head_dim; d += kRowElements)
            for (int64_t c = 0; c < kRowElements; c += Products::kColumns) {
                Products products;
                int64_t index = run.first_page;
                do {
                    products.add_steps(codes + index * kPageTokens * kCodeBytes / kCodeParts,
                                       Int8Page(block.pages[index], head_dim).values + d * kPageTokens + c * kStepCodes,
                                       kPageSteps,
                                       {block.fetched_values[index] + d / kRowElements * kPageSteps * block.fetch_step,
                                        block.fetch_step});
                } while (++index < run.end_page);
                float* sums = records + kRecordHeader + d + c;
                const float* before = run.first ? kZeros : sums;
                const int64_t before_stride = run.first ? 0 : record_stride;
                products.finish([&](int64_t r, int64_t column, Ints sum) {
                    store_ints(sums + r * record_stride + column,
                               add(sum, load_ints(before + r * before_stride + column)));
                });
            }
    }

#if defined(__AMX_INT8__)
    static void score_by_matrix(const float* prepared, int64_t num_rows, const Block& block, int64_t head_dim,
                                float* scores) {
        const AmxTiles tiles(64);
        const auto* codes = reinterpret_cast<const std::byte*>(prepared + 2 * num_rows);
        const int64_t dims = matrix_dims(head_dim);
        alignas(64) MatrixSums sums[2];
        for (int64_t index = block.first_page; index <= block.end_page; ++index) {
            if (index < block.end_page) {
                clear_sums();
                Fetch fetched{block.fetched_keys[index], 16 * block.fetch_step};
                for (int64_t d = 0; d < dims; d += 64) {
                    fetched.from = fetch_lines(fetched);
                    add_matrix_products<Operand::kKeys>(codes + d, kCodeBytes * dims, dims,
                                                        block.pages[index] + d * kPageTokens);
                }
                store_sums(sums[index % 2]);
            }
            if (index == block.first_page) continue;
            // Meanwhile the next page's products run.
            const Int8Page page(block.pages[index - 1], head_dim);
            for (int64_t r = 0; r < num_rows; ++r) {
                int32_t offset;
                std::memcpy(&offset, prepared + num_rows + r, sizeof offset);
                for (int64_t c = 0; c < kPageTokens; c += kLanes) {
                    const F32 scale = mul(load(page.key_scales + c), broadcast(prepared[r]));
                    const Ints sum = add(sums[(index - 1) % 2].of(r, c), broadcast_int(offset));
                    store(scores + r * kBlockTokens + (index - 1) * kPageTokens + c, mul(to_float(sum), scale));
                }
            }
        }
    }

    static void add_values_by_matrix(const std::byte* codes, int64_t num_rows, const Block& block, const PageRun& run,
                                     int64_t head_dim, float* records) {
        const AmxTiles tiles(kPageTokens);
        alignas(64) MatrixSums sums[2];
        for (int64_t d = 0; d <= padded_dims(head_dim); d += kRowElements) {
            if (d < padded_dims(head_dim)) {
                clear_sums();
                for (int64_t index = run.first_page; index < run.end_page; ++index) {
                    fetch_lines(
                        {block.fetched_values[index] + d / kStepCodes * block.fetch_step, 8 * block.fetch_step});
                    add_matrix_products<Operand::kValues>(
                        codes + index * kPageTokens, kCodeBytes * kBlockTokens, kBlockTokens,
                        Int8Page(block.pages[index], head_dim).values + d * kPageTokens);
                }
                store_sums(sums[d / kRowElements % 2]);
            }
            if (d == 0) continue;
            for (int64_t r = 0; r < num_rows; ++r)
                for (int64_t c = 0; c < kRowElements; c += kLanes) {
                    float* place = record_at(records, r, head_dim)->sums() + d - kRowElements + c;
                    const Ints sum = sums[(d / kRowElements - 1) % 2].of(r, c);
                    store_ints(place, run.first ? sum : add(sum, load_ints(place)));
                }
        }
    }
#else
    static void score_by_matrix(const float*, int64_t, const Block&, int64_t, float*) {}
    static void add_values_by_matrix(const std::byte*, int64_t, const Block&, const PageRun&, int64_t, float*) {}
#endif

    static constexpr Score kScore[kVectorRows] = {score_block<1>, score_block<2>,
                                                  score_block<3>,
#if defined(__AVX512F__) || !GEMMA2_FAST_BYTE_PRODUCTS
                                                  score_block<4>, score_block<5>,
                                                  score_block<6>
#endif
    };
    static constexpr AddValues kAddValues[kVectorRows] = {add_values_of<1>, add_values_of<2>,
                                                          add_values_of<3>,
#if defined(__AVX512F__) || !GEMMA2_FAST_BYTE_PRODUCTS
                                                          add_values_of<4>, add_values_of<5>,
                                                          add_values_of<6>
#endif
    };
};

}  // namespace
GEMMA2_FAST_END_ISA
