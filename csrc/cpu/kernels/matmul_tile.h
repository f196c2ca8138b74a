// The two inner loops of matmul. Both compute output (token, row) by one vector accumulator: lane l sums, in order of
// k, the products of weights and activations k = l (mod kLanes) by fused multiply-adds, and the lanes are folded by
// halves at the end. So their results agree bit for bit, whatever tokens and rows are computed together.
#pragma once

#include "cpu/kernels/dequantize_formats.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kTileRows = 4;

// Stored bytes are fetched into the second-level cache this far ahead, and at least a tile of rows: less than that and
// memory is waited for. From there every row's are fetched into the first-level cache shortly before their use; with
// that a core streams bfloat16 at 92 % of what it reads, without it at 83 %.
constexpr int64_t kAheadBytes = 32768, kNearBytes = 2048;

// Adds to sums[t][r] the vector products of four rows' weights with each token's activations.
template <int kTokens>
inline __attribute__((always_inline)) void accumulate(F32 (&sums)[kTokens][kTileRows], const F32 (&weights)[kTileRows],
                                                      const F32 (&x)[kTokens]) {
    GEMMA2_FAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        GEMMA2_FAST_UNROLL
        for (int r = 0; r < kTileRows; ++r) sums[t][r] = fma(weights[r], x[t], sums[t][r]);
    }
}

// out[t * out_stride + r] for the first num_rows of the tile.
template <int kTokens>
inline __attribute__((always_inline)) void store_sums(const F32 (&sums)[kTokens][kTileRows], int64_t num_rows,
                                                      float* out, int64_t out_stride) {
    GEMMA2_FAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        float folded[kTileRows];
        reduce_add_four(sums[t][0], sums[t][1], sums[t][2], sums[t][3], folded);
        float* token_out = out + t * out_stride;
        if (num_rows == kTileRows)
            std::memcpy(token_out, folded, sizeof folded);
        else
            for (int64_t r = 0; r < num_rows; ++r) token_out[r] = folded[r];
    }
}

// Four rows straight from their stored blocks, for few tokens: each weight is unpacked in registers and used at once.
// Rows past num_rows are read as the last one. Fetches the next rows' bytes as it goes (stored rows are contiguous), or
// its part of them where several tiles of tokens use the same rows.
struct DirectTile {
    const std::byte* row;
    int64_t row_bytes;
    int64_t num_rows;
    const float* x;  // of the first token
    int64_t cols;
    float* out;
    int64_t out_stride;
    int64_t fetch_part, num_fetch_parts;
};

template <typename Format, int kTokens>
void direct_tile(const DirectTile& tile) {
    const auto [row, row_bytes, num_rows, x, cols, out, out_stride, fetch_part, num_fetch_parts] = tile;
    constexpr int64_t kStepBytes = kTileRows * Format::kBlockBytes * Format::kStepWeights / Format::kBlockWeights;
    constexpr int64_t kStepLines = kStepBytes < 64 ? 1 : (kStepBytes + 32) / 64;
    const int64_t tile_bytes = kTileRows * row_bytes, ahead_step = kStepBytes / num_fetch_parts;
    const std::byte* ahead =
        row + (tile_bytes > kAheadBytes ? tile_bytes : kAheadBytes) + tile_bytes * fetch_part / num_fetch_parts;
    const std::byte* blocks[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) blocks[r] = row + (r < num_rows ? r : num_rows - 1) * row_bytes;

    F32 sums[kTokens][kTileRows];
    for (auto& of_token : sums)
        for (F32& sum : of_token) sum = broadcast(0);

    const int64_t whole = cols / Format::kBlockWeights * Format::kBlockWeights;
    for (int64_t col = 0; col < whole;) {
        const int64_t count = whole - col < Format::kChunkWeights ? whole - col : Format::kChunkWeights;
        const typename Format::Chunk chunks[kTileRows] = {
            {blocks[0], count}, {blocks[1], count}, {blocks[2], count}, {blocks[3], count}};
        for (int64_t step = 0; step < count / Format::kStepWeights; ++step, col += Format::kStepWeights) {
            GEMMA2_FAST_UNROLL
            for (int64_t line = 0; line < kStepLines; ++line)
                __builtin_prefetch(ahead + line * kStepBytes / kStepLines, 0, 2);
            ahead += ahead_step;
            GEMMA2_FAST_UNROLL
            for (int64_t r = 0; r < kTileRows; ++r)
                __builtin_prefetch(blocks[r] + step * (kStepBytes / kTileRows) + kNearBytes, 0, 3);
            GEMMA2_FAST_UNROLL
            for (int64_t i = 0; i < Format::kStepWeights; i += kLanes) {
                F32 weights[kTileRows], activations[kTokens];
                GEMMA2_FAST_UNROLL
                for (int r = 0; r < kTileRows; ++r) weights[r] = chunks[r].weights(step, i);
                GEMMA2_FAST_UNROLL
                for (int t = 0; t < kTokens; ++t) activations[t] = load(x + t * cols + col + i);
                accumulate(sums, weights, activations);
            }
        }
        for (const std::byte*& block : blocks) block += count / Format::kBlockWeights * Format::kBlockBytes;
    }
    if constexpr (requires { Format::first_weights; })
        if (whole < cols) {
            F32 weights[kTileRows], activations[kTokens];
            GEMMA2_FAST_UNROLL
            for (int r = 0; r < kTileRows; ++r) weights[r] = Format::first_weights(blocks[r], cols - whole);
            GEMMA2_FAST_UNROLL
            for (int t = 0; t < kTokens; ++t) activations[t] = load_first(x + t * cols + whole, cols - whole);
            accumulate(sums, weights, activations);
        }
    store_sums(sums, num_rows, out, out_stride);
}

// Four rows unpacked to float32, interleaved: panel[k / kLanes][row][k % kLanes], zeros after the last column.
// One call covers `cols` consecutive k; between calls the accumulators wait in `partial` [tokens, rows, kLanes].
struct PanelTile {
    const float* panel;
    const float* x;  // of the first token, at the first k
    int64_t x_stride;
    int64_t cols;
    float* partial;
    bool first, last;
    int64_t num_rows;
    float* out;
    int64_t out_stride;
};

template <int kTokens>
void panel_tile(const PanelTile& tile) {
    F32 sums[kTokens][kTileRows];
    if (tile.first) {
        GEMMA2_FAST_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            GEMMA2_FAST_UNROLL
            for (int r = 0; r < kTileRows; ++r) sums[t][r] = broadcast(0);
        }
    } else {
        GEMMA2_FAST_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            GEMMA2_FAST_UNROLL
            for (int r = 0; r < kTileRows; ++r) sums[t][r] = load(tile.partial + (t * kTileRows + r) * kLanes);
        }
    }

    const float *panel = tile.panel, *x = tile.x;
    const float* const x_end = x + tile.cols / kLanes * kLanes;
    const int64_t x_stride = tile.x_stride;
    for (; x < x_end; x += kLanes, panel += kTileRows * kLanes) {
        F32 weights[kTileRows];
        GEMMA2_FAST_UNROLL
        for (int r = 0; r < kTileRows; ++r) weights[r] = load(panel + r * kLanes);
        GEMMA2_FAST_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            F32 activation = load(x + t * x_stride);
            asm("" : "+v"(activation.v));  // gcc 12 would load it again for every row: 65 % of the peak instead of 75 %
            GEMMA2_FAST_UNROLL
            for (int r = 0; r < kTileRows; ++r) sums[t][r] = fma(weights[r], activation, sums[t][r]);
        }
    }
    if (const int64_t rest = tile.cols % kLanes; rest > 0) {
        F32 weights[kTileRows], activations[kTokens];
        GEMMA2_FAST_UNROLL
        for (int r = 0; r < kTileRows; ++r) weights[r] = load(panel + r * kLanes);
        GEMMA2_FAST_UNROLL
        for (int t = 0; t < kTokens; ++t) activations[t] = load_first(x + t * x_stride, rest);
        accumulate(sums, weights, activations);
    }

    if (tile.last) {
        store_sums(sums, tile.num_rows, tile.out, tile.out_stride);
        return;
    }
    GEMMA2_FAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        GEMMA2_FAST_UNROLL
        for (int r = 0; r < kTileRows; ++r) store(tile.partial + (t * kTileRows + r) * kLanes, sums[t][r]);
    }
}

}  // namespace
GEMMA2_FAST_END_ISA
