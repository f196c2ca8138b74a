#include "cpu/kernels/declarations.h"
#include "cpu/kernels/matmul_tile.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Up to this many tokens rows are used as they are unpacked; for more they are unpacked once into a panel.
constexpr int64_t kDirectTokens = kLanes == 16 ? 4 : 2;
// Tokens of a panel tile at most: as many accumulators as the registers hold beside their operands.
constexpr int64_t kPanelTokens = kLanes == 16 ? 6 : 2;
// A panel is to stay in the second-level cache beside the activations that stream past it, and one tile's activations
// over kPanelCols in the first-level cache.
constexpr int64_t kPanelFloats = 128 * 1024, kPanelRows = 64, kPanelCols = 1024;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t panel_rows(int64_t cols) {
    const int64_t fitting = kPanelFloats / round_up(cols, kLanes) / kTileRows * kTileRows;
    return fitting < kTileRows ? kTileRows : fitting > kPanelRows ? kPanelRows : fitting;
}

struct Matmul {
    const std::byte* data;
    int64_t row_bytes;
    int64_t row_begin, row_end;
    int64_t cols;
    const float* x;
    int64_t num_tokens;
    float* out;
    int64_t out_stride;
    float* scratch;
};

template <typename Format, int kTokens>
void direct_rows(const Matmul& m) {
    for (int64_t row = m.row_begin; row < m.row_end; row += kTileRows) {
        const int64_t num_rows = m.row_end - row < kTileRows ? m.row_end - row : kTileRows;
        direct_tile<Format, kTokens>(m.data + row * m.row_bytes, m.row_bytes, num_rows, m.x, m.cols, m.out + row,
                                     m.out_stride);
    }
}

template <typename Format, int kTokens = 1>
void direct(const Matmul& m) {
    if (m.num_tokens == kTokens)
        direct_rows<Format, kTokens>(m);
    else if constexpr (kTokens < kDirectTokens)
        direct<Format, kTokens + 1>(m);
}

// Unpacks num_rows rows from `row` to tiles of kTileRows interleaved rows; the last tile's missing rows are zeros.
template <typename Format>
void unpack_panel(const Matmul& m, int64_t row, int64_t num_rows, float* panel) {
    const int64_t tile_floats = round_up(m.cols, kLanes) * kTileRows;
    for (int64_t r = 0; r < round_up(num_rows, kTileRows); ++r) {
        float* out = panel + r / kTileRows * tile_floats + r % kTileRows * kLanes;
        const auto put = [=](int64_t col, F32 weights) { store(out + col * kTileRows, weights); };
        if (r < num_rows)
            unpack_row<Format>(m.data + (row + r) * m.row_bytes, m.cols, put, put);
        else
            for (int64_t col = 0; col < m.cols; col += kLanes) put(col, broadcast(0));
    }
}

template <int kTokens = 1>
void run_panel_tile(int64_t num_tokens, const PanelTile& tile) {
    if (num_tokens == kTokens)
        panel_tile<kTokens>(tile);
    else if constexpr (kTokens < kPanelTokens)
        run_panel_tile<kTokens + 1>(num_tokens, tile);
}

// Multiplies an unpacked panel with num_tokens <= kPanelTokens tokens: column blocks outside, so that the activations
// of a block are read from the first-level cache by every tile of rows.
void multiply_panel(const Matmul& m, int64_t row, int64_t num_rows, int64_t token, int64_t num_tokens,
                    const float* panel, float* partial) {
    const int64_t tile_floats = round_up(m.cols, kLanes) * kTileRows;
    for (int64_t col = 0; col < m.cols; col += kPanelCols)
        for (int64_t r = 0; r < num_rows; r += kTileRows)
            run_panel_tile(num_tokens, {.panel = panel + r / kTileRows * tile_floats + col * kTileRows,
                                        .x = m.x + token * m.cols + col,
                                        .x_stride = m.cols,
                                        .cols = m.cols - col < kPanelCols ? m.cols - col : kPanelCols,
                                        .partial = partial + r * kPanelTokens * kLanes,
                                        .first = col == 0,
                                        .last = m.cols - col <= kPanelCols,
                                        .num_rows = num_rows - r < kTileRows ? num_rows - r : kTileRows,
                                        .out = m.out + token * m.out_stride + row + r,
                                        .out_stride = m.out_stride});
}

template <typename Format>
void through_panels(const Matmul& m) {
    const int64_t rows_at_once = panel_rows(m.cols);
    float* partial = m.scratch + rows_at_once * round_up(m.cols, kLanes);
    const int64_t num_token_tiles = (m.num_tokens + kPanelTokens - 1) / kPanelTokens;
    for (int64_t row = m.row_begin; row < m.row_end; row += rows_at_once) {
        const int64_t num_rows = m.row_end - row < rows_at_once ? m.row_end - row : rows_at_once;
        unpack_panel<Format>(m, row, num_rows, m.scratch);
        for (int64_t tile = 0; tile < num_token_tiles; ++tile) {  // of nearly equal size: a small one wastes operands
            const int64_t token = m.num_tokens * tile / num_token_tiles;
            const int64_t token_end = m.num_tokens * (tile + 1) / num_token_tiles;
            multiply_panel(m, row, num_rows, token, token_end - token, m.scratch, partial);
        }
    }
}

}  // namespace

int64_t matmul_scratch_floats(int64_t cols) {
    return panel_rows(cols) * (round_up(cols, kLanes) + kPanelTokens * kLanes);
}

void matmul(const WeightView& weight, int64_t row_begin, int64_t row_end, const float* x, int64_t num_tokens,
            float* out, int64_t out_stride, float* scratch) {
    with_format(weight.type, [&]<typename Format>() {
        const int64_t block_weights = Format::kBlockWeights;
        int64_t row_bytes = weight.cols / block_weights * Format::kBlockBytes;
        if constexpr (requires { Format::kElementBytes; }) row_bytes = weight.cols * Format::kElementBytes;
        const Matmul m{weight.data, row_bytes,  row_begin, row_end,    weight.cols,
                       x,           num_tokens, out,       out_stride, scratch};
        if (num_tokens <= kDirectTokens)
            direct<Format>(m);
        else
            through_panels<Format>(m);
    });
}

GEMMA2_FAST_END_ISA
