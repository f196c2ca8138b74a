#include "cpu/kernels/declarations.h"
#include "cpu/kernels/matmul_tile.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Tokens of a tile at most: as many accumulators as the registers hold beside their operands.
constexpr int64_t kPanelTokens = kLanes == 16 ? 6 : 2;
// Up to so many tokens rows are used as they are unpacked; for more, a panel of rows and columns is unpacked once for a
// block of tokens. Plain numbers cost so little to unpack that several tiles of tokens may do it, one after another on
// the same rows, which only the first reads from memory.
template <typename Format>
constexpr bool kIsPlain = requires { Format::kElementBytes; };
template <typename Format>
constexpr int64_t kDirectTileTokens = kLanes < 16 ? 2 : (kIsPlain<Format> ? kPanelTokens : 4);
template <typename Format>
constexpr int64_t kDirectTokens = kLanes == 16 && kIsPlain<Format> ? 16 : kDirectTileTokens<Format>;
// The activations of a tile over kPanelCols stay in a first-level cache, the panel and the waiting accumulators of a
// block of tokens in a second-level one of 1 MiB.
constexpr int64_t kPanelRows = 64, kPanelCols = 1024, kBlockTokens = 120;
// So few tokens' activations are in a cache since the first panel.
constexpr int64_t kFewTokens = 64;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
constexpr int64_t round_up(int64_t value, int64_t unit) { return divide_up(value, unit) * unit; }

struct Matmul {
    const std::byte* data;
    int64_t row_bytes;  // or those of a strip
    int64_t row_begin, row_end;
    int64_t cols;
    const float* x;
    int64_t num_tokens;
    float* out;
    int64_t out_stride;
    float* scratch;
};

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// The index-th of num_parts parts of nearly equal size: a small last part would waste what the others share.
Range part_of(Range whole, int64_t index, int64_t num_parts) {
    return {whole.begin + whole.size() * index / num_parts, whole.begin + whole.size() * (index + 1) / num_parts};
}

template <typename Format, int kTokens = 1>
void run_direct_tile(int64_t num_tokens, const DirectTile& tile) {
    if (num_tokens == kTokens)
        direct_tile<Format, kTokens>(tile);
    else if constexpr (kTokens < kDirectTileTokens<Format>)
        run_direct_tile<Format, kTokens + 1>(num_tokens, tile);
}

template <typename Format>
void direct(const Matmul& m) {
    const int64_t num_tiles = divide_up(m.num_tokens, kDirectTileTokens<Format>);
    for (int64_t row = m.row_begin; row < m.row_end; row += kTileRows)
        for (int64_t i = 0; i < num_tiles; ++i) {
            const Range tokens = part_of({0, m.num_tokens}, i, num_tiles);
            run_direct_tile<Format>(tokens.size(), {.row = m.data + row * m.row_bytes,
                                                    .row_bytes = m.row_bytes,
                                                    .num_rows = min(kTileRows, m.row_end - row),
                                                    .x = m.x + tokens.begin * m.cols,
                                                    .cols = m.cols,
                                                    .out = m.out + tokens.begin * m.out_stride + row,
                                                    .out_stride = m.out_stride,
                                                    .fetch_part = i,
                                                    .num_fetch_parts = num_tiles});
        }
}

// Unpacks to tiles of kTileRows interleaved rows; the last tile's missing rows are zeros. Inlined, it would lose its
// registers to the loops around it.
template <typename Format>
__attribute__((noinline)) void unpack_panel(const Matmul& m, Range rows, Range cols, float* panel) {
    const int64_t tile_floats = round_up(cols.size(), kLanes) * kTileRows;
    for (int64_t r = 0; r < round_up(rows.size(), kTileRows); ++r) {
        float* out = panel + r / kTileRows * tile_floats + r % kTileRows * kLanes;
        const auto put = [=](int64_t col, F32 weights) { store(out + col * kTileRows, weights); };
        const int64_t row = rows.begin + r;
        if (r >= rows.size())
            for (int64_t col = 0; col < cols.size(); col += kLanes) put(col, broadcast(0));
        else if constexpr (InStrips<Format>)
            unpack_strip_row<Format>(m.data + row / kStripRows * m.row_bytes, row % kStripRows, cols.begin, cols.end,
                                     put, put);
        else
            unpack_row<Format>(m.data + row * m.row_bytes + cols.begin / Format::kBlockWeights * Format::kBlockBytes,
                               cols.size(), put, put);
    }
}

template <int kTokens = 1>
void run_panel_tile(int64_t num_tokens, const PanelTile& tile) {
    if (num_tokens == kTokens)
        panel_tile<kTokens>(tile);
    else if constexpr (kTokens < kPanelTokens)
        run_panel_tile<kTokens + 1>(num_tokens, tile);
}

// Fetches the index-th of num_parts parts of the activations [tokens, cols], which the next tiles will read.
void prefetch_part(const Matmul& m, Range tokens, Range cols, int64_t index, int64_t num_parts) {
    const Range part = part_of(cols, index, num_parts);
    for (int64_t token = tokens.begin; token < tokens.end; ++token)
        for (int64_t col = part.begin; col < part.end; col += 16) __builtin_prefetch(m.x + token * m.cols + col, 0, 2);
}

// Multiplies an unpacked panel with a block of tokens. Each tile of tokens meets every tile of rows in turn, so that
// its activations are read from the first-level cache.
void multiply_panel(const Matmul& m, Range rows, Range cols, Range tokens, const float* panel, float* partial) {
    const int64_t num_token_tiles = divide_up(tokens.size(), kPanelTokens);
    const int64_t num_row_tiles = divide_up(rows.size(), kTileRows);
    Range next_tokens = part_of(tokens, 0, num_token_tiles);
    for (int64_t i = 0; i < num_token_tiles; ++i) {
        const Range tile_tokens = next_tokens;
        next_tokens = part_of(tokens, i + 1, num_token_tiles);
        const bool fetch = i + 1 < num_token_tiles && m.num_tokens > kFewTokens;
        for (int64_t j = 0; j < num_row_tiles; ++j) {
            if (fetch) prefetch_part(m, next_tokens, cols, j, num_row_tiles);
            const int64_t row = rows.begin + j * kTileRows;
            run_panel_tile(tile_tokens.size(),
                           {.panel = panel + j * kTileRows * round_up(cols.size(), kLanes),
                            .x = m.x + tile_tokens.begin * m.cols + cols.begin,
                            .x_stride = m.cols,
                            .cols = cols.size(),
                            .partial = partial + (i * num_row_tiles + j) * kPanelTokens * kTileRows * kLanes,
                            .first = cols.begin == 0,
                            .last = cols.end == m.cols,
                            .num_rows = min(kTileRows, rows.end - row),
                            .out = m.out + tile_tokens.begin * m.out_stride + row,
                            .out_stride = m.out_stride});
        }
    }
}

template <typename Format>
void through_panels(const Matmul& m) {
    float* partial = m.scratch + kPanelRows * kPanelCols;
    // Without accumulators to keep, one block takes every token and the rows are unpacked once.
    const int64_t num_blocks = m.cols <= kPanelCols ? 1 : divide_up(m.num_tokens, kBlockTokens);
    for (int64_t row = m.row_begin; row < m.row_end; row += kPanelRows) {
        const Range rows{row, min(row + kPanelRows, m.row_end)};
        for (int64_t i = 0; i < num_blocks; ++i)
            for (int64_t col = 0; col < m.cols; col += kPanelCols) {
                const Range cols{col, min(col + kPanelCols, m.cols)};
                unpack_panel<Format>(m, rows, cols, m.scratch);
                multiply_panel(m, rows, cols, part_of({0, m.num_tokens}, i, num_blocks), m.scratch, partial);
            }
    }
}

}  // namespace

int64_t matmul_scratch_floats(int64_t cols) {
    const int64_t panel = kPanelRows * kPanelCols;
    const int64_t tiles = (kBlockTokens / kPanelTokens) * (kPanelRows / kTileRows);
    return cols <= kPanelCols ? panel : panel + tiles * kPanelTokens * kTileRows * kLanes;
}

void matmul(const WeightView& weight, int64_t row_begin, int64_t row_end, const float* x, int64_t num_tokens,
            float* out, int64_t out_stride, float* scratch) {
    with_format(weight.type, [&]<typename Format>() {
        const Matmul m{weight.data, weight.row_bytes(), row_begin, row_end,    weight.cols,
                       x,           num_tokens,         out,       out_stride, scratch};
        if constexpr (!InStrips<Format>)
            if (num_tokens <= kDirectTokens<Format>) return direct<Format>(m);
        through_panels<Format>(m);
    });
}

GEMMA2_FAST_END_ISA
