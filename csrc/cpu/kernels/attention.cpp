#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/declarations.h"
#include "cpu/vector_math.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Rows (query, head) that share one walk over the pages: enough to read a page from memory once for many, few enough
// that their queries and sums stay in the second-level cache.
constexpr int64_t kWalkRows = 48;
constexpr int64_t kPageVectors = kPageTokens / kLanes;
constexpr float kMinusInfinity = -__builtin_inff();

int64_t walk_queries(int64_t group_heads) { return group_heads < kWalkRows ? kWalkRows / group_heads : 1; }
int64_t whole_vectors(int64_t count) {
    return (count + kMaxTileRows + 15) / 16 * 16;
}  // and room for a tile's overhang

struct KeyRange {  // within one page
    int64_t first;
    int64_t last;  // exclusive
    bool empty() const { return first >= last; }
};

struct Rule {
    float query_scale;
    bool capped;
    float cap;
    float inverse_cap;
    bool windowed;
    int64_t window_keys;

    // Keys of the page at page_position that some query in [first, last] sees.
    KeyRange visible(int64_t first_query, int64_t last_query, int64_t page_position) const {
        int64_t first = windowed ? first_query - window_keys + 1 - page_position : 0;
        int64_t last = last_query + 1 - page_position;
        return {first > 0 ? first : 0, last < kPageTokens ? last : kPageTokens};
    }
};

// State of the rows of one walk, row = query * G + head: the running softmax of each and the weighted sum of values.
struct Walk {
    float* maximum;      // [rows]
    float* denominator;  // [rows]
    float* decay;        // [rows]; what the present page multiplies the earlier sums by
    float* scores;       // [kMaxTileRows, P]
    float* queries;      // a [D, tile rows] panel for each tile
    float* sums;         // [rows, D]
};

struct Tile {
    int64_t row;
    int64_t num_rows;
};

// Tiles of nearly equal height: 16 rows are 8 + 8 and not 12 + 4.
Tile tile_at(int64_t index, int64_t num_tiles, int64_t num_rows) {
    int64_t begin = num_rows * index / num_tiles;
    return {begin, num_rows * (index + 1) / num_tiles - begin};
}

// Scales, caps and masks one row of dot products in place; gives their maximum.
float prepare_scores(const Rule& rule, KeyRange visible, float* scores) {
    alignas(64) static constexpr float kKeyIndex[kPageTokens] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                                 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                                 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const F32 first = broadcast(static_cast<float>(visible.first)), last = broadcast(static_cast<float>(visible.last));
    const F32 hidden = broadcast(kMinusInfinity);
    F32 maximum = hidden;
#pragma GCC unroll 4
    for (int64_t v = 0; v < kPageVectors; ++v) {
        F32 score = mul(load(scores + v * kLanes), broadcast(rule.query_scale));
        if (rule.capped) score = mul(broadcast(rule.cap), tanh(mul(score, broadcast(rule.inverse_cap))));
        F32 key = load(kKeyIndex + v * kLanes);
        score = select_less(key, first, hidden, select_less(key, last, score, hidden));
        store(scores + v * kLanes, score);
        maximum = max(score, maximum);
    }
    return reduce_max(maximum);
}

// Replaces one row of scores by exp(score - maximum); gives their sum.
float exponentiate(float* scores, float maximum) {
    F32 sum = broadcast(0.0f);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kPageVectors; ++v) {
        F32 weight = exp(sub(load(scores + v * kLanes), broadcast(maximum)));
        store(scores + v * kLanes, weight);
        sum = add(sum, weight);
    }
    return reduce_add(sum);
}

// Folds one page's scores of a tile into its rows' running softmax. A row that sees nothing of the page keeps its
// state: its weights are 0 and its decay is 1.
void update_softmax(const Rule& rule, const Walk& walk, Tile tile, int64_t first_position, int64_t group_heads,
                    int64_t page_position) {
    alignas(64) float earlier[(kMaxTileRows + kLanes - 1) / kLanes * kLanes] = {};
    float* maximum = walk.maximum + tile.row;
    float* denominator = walk.denominator + tile.row;
    float* decay = walk.decay + tile.row;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        const int64_t position = first_position + (tile.row + r) / group_heads;
        const float page_maximum =
            prepare_scores(rule, rule.visible(position, position, page_position), walk.scores + r * kPageTokens);
        earlier[r] = maximum[r];
        maximum[r] = page_maximum > maximum[r] ? page_maximum : maximum[r];
    }
    for (int64_t r = 0; r < tile.num_rows; r += kLanes) {
        const int64_t lanes = tile.num_rows - r < kLanes ? tile.num_rows - r : kLanes;
        F32 before = load_first(earlier + r, lanes), after = load_first(maximum + r, lanes);
        store_first(decay + r, select_less(before, after, exp(sub(before, after)), broadcast(1.0f)), lanes);
    }
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        float* scores = walk.scores + r * kPageTokens;
        const bool seen_any = maximum[r] > kMinusInfinity;  // else every score is still minus infinity
        const float sum = exponentiate(scores, seen_any ? maximum[r] : 0.0f);
        denominator[r] = decay[r] * denominator[r] + sum;
    }
}

template <typename Element>
void attend(const AttentionTask& task, const Rule& rule, const Walk& walk, int64_t first_query, int64_t num_queries) {
    const int64_t head_dim = task.pages.head_dim;
    const int64_t half_page = head_dim * kPageTokens;
    const int64_t num_rows = num_queries * task.group_heads;
    const int64_t num_tiles = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
    const int64_t first_position = task.first_position + first_query;
    const int64_t last_position = first_position + num_queries - 1;
    auto query_of = [&](int64_t row) { return row / task.group_heads; };

    for (int64_t i = 0; i < num_tiles; ++i) {
        const Tile tile = tile_at(i, num_tiles, num_rows);
        float* panel = walk.queries + tile.row * head_dim;
        for (int64_t r = 0; r < tile.num_rows; ++r) {
            const int64_t row = tile.row + r, query = query_of(row), head = row - query * task.group_heads;
            const float* source = task.queries + (first_query + query) * task.query_stride + head * head_dim;
            for (int64_t d = 0; d < head_dim; ++d) panel[d * tile.num_rows + r] = source[d];
        }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
        walk.maximum[row] = kMinusInfinity;
        walk.denominator[row] = 0.0f;
    }
    for (int64_t i = 0; i < num_rows * head_dim; ++i) walk.sums[i] = 0.0f;

    auto keys_of = [&](int64_t page) {
        const int64_t block = task.block_table[page % task.table_width];
        return reinterpret_cast<const Element*>(task.pages.data) +
               (block * task.pages.num_kv_heads + task.kv_head) * 2 * half_page;
    };
    const int64_t first_key = rule.windowed ? first_position - rule.window_keys + 1 : 0;
    const int64_t last_page = last_position / kPageTokens;
    for (int64_t page = first_key > 0 ? first_key / kPageTokens : 0; page <= last_page; ++page) {
        const int64_t page_position = page * kPageTokens;
        const Element* keys = keys_of(page);
        const Element* values = keys + half_page;
        const Element* next_keys = page < last_page ? keys_of(page + 1) : keys;
        for (int64_t i = 0; i < num_tiles; ++i) {
            const Tile tile = tile_at(i, num_tiles, num_rows);
            const KeyRange seen = rule.visible(first_position + query_of(tile.row),
                                               first_position + query_of(tile.row + tile.num_rows - 1), page_position);
            if (seen.empty()) continue;
            kTiles<Element>.score[tile.num_rows - 1](walk.queries + tile.row * head_dim, keys, head_dim, walk.scores,
                                                     values);
            update_softmax(rule, walk, tile, first_position, task.group_heads, page_position);
            kTiles<Element>.add_values[tile.num_rows - 1](walk.scores, walk.decay + tile.row, values, seen.first,
                                                          seen.last, head_dim, walk.sums + tile.row * head_dim,
                                                          next_keys);
        }
    }

    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t query = query_of(row), head = row - query * task.group_heads;
        float* out = task.out + (first_query + query) * task.out_stride + head * head_dim;
        const float* sums = walk.sums + row * head_dim;
        // Adding zero makes a negative zero positive: it could come from the 0 * value of a key that another row sees.
        for (int64_t d = 0; d < head_dim; ++d) out[d] = sums[d] / walk.denominator[row] + 0.0f;
    }
}

}  // namespace

int64_t attention_scratch_floats(int64_t group_heads, int64_t head_dim) {
    const int64_t rows = walk_queries(group_heads) * group_heads;
    return 3 * whole_vectors(rows) + kMaxTileRows * kPageTokens + 2 * rows * head_dim;
}

void attention(const AttentionTask& task, float* scratch) {
    const int64_t per_walk = walk_queries(task.group_heads);
    const int64_t rows = per_walk * task.group_heads;
    Walk walk;
    walk.maximum = scratch;
    walk.denominator = walk.maximum + whole_vectors(rows);
    walk.decay = walk.denominator + whole_vectors(rows);
    walk.scores = walk.decay + whole_vectors(rows);
    walk.queries = walk.scores + kMaxTileRows * kPageTokens;
    walk.sums = walk.queries + rows * task.pages.head_dim;
    Rule rule{};
    rule.query_scale = task.query_scale;
    if (task.score_softcap) {
        rule.capped = true;
        rule.cap = *task.score_softcap;
        rule.inverse_cap = 1.0f / rule.cap;
    }
    if (task.window_keys) {
        rule.windowed = true;
        rule.window_keys = *task.window_keys;
    }
    for (int64_t query = 0; query < task.num_queries; query += per_walk) {
        const int64_t rest = task.num_queries - query;
        const int64_t count = rest < per_walk ? rest : per_walk;
        if (task.pages.type == KvType::kF32)
            attend<float>(task, rule, walk, query, count);
        else
            attend<uint16_t>(task, rule, walk, query, count);
    }
}

GEMMA2_FAST_END_ISA
