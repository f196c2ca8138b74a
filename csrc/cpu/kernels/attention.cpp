#include "cpu/kernels/attention_float.h"
#include "cpu/kernels/attention_int8.h"
#include "cpu/kernels/declarations.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Rows (query, head) that share one walk over the pages: enough to read a page from memory once for many, few enough
// that their queries and sums stay in the second-level cache.
constexpr int64_t kWalkRows = 96;
constexpr int64_t kMostTileRows = 16;
constexpr int64_t kPagesAhead = 4;  // halves of pages, that one tile alone fetches early

// Floats a row of prepared queries takes.
int64_t prepared_floats(int64_t head_dim) { return padded_dims(head_dim) + 2; }

// row = query * G + head
struct Walk {
    float* prepared;  // [rows, prepared_floats]
    float* totals;    // records [rows]
    float* parts;     // records of one tile
    float* scores;    // [tile rows, kBlockTokens]
};

Walk walk_in(float* scratch, int64_t rows, int64_t head_dim) {
    Walk walk;
    walk.scores = scratch;
    walk.parts = walk.scores + kMostTileRows * kBlockTokens;
    walk.prepared = walk.parts + kMostTileRows * record_floats(head_dim);
    walk.totals = walk.prepared + rows * prepared_floats(head_dim);  // last: matrix units read past a tile's rows
    return walk;
}

struct Tile {
    int64_t row;
    int64_t num_rows;
};

// Tiles of nearly equal height: 16 rows are 8 + 8 and not 12 + 4.
Tile tile_at(int64_t index, int64_t num_tiles, int64_t num_rows) {
    const int64_t begin = num_rows * index / num_tiles;
    return {begin, num_rows * (index + 1) / num_tiles - begin};
}

// Adds a block's part to a row's total. A part that saw no key leaves the total as it is, bit for bit.
void join(const Record& part, Record& total, int64_t head_dim) {
    if (part.reference == kMinusInfinity) return;
    const float reference = part.reference > total.reference ? part.reference : total.reference;
    const float decay = power_of_two(total.reference - reference), growth = power_of_two(part.reference - reference);
    total.reference = reference;
    total.denominator = part.denominator * growth + total.denominator * decay;
    const F32 decays = broadcast(decay), factors = broadcast(part.factor * growth);
    for (int64_t d = 0; d < padded_dims(head_dim); d += kLanes) {
        float* sum = total.sums() + d;
        store(sum, fma(load(part.sums() + d), factors, mul(load(sum), decays)));
    }
}

void clear(float* records, int64_t num_rows, int64_t head_dim) {
    for (int64_t i = 0; i < num_rows * record_floats(head_dim); ++i) records[i] = 0.0f;
    for (int64_t row = 0; row < num_rows; ++row) record_at(records, row, head_dim)->reference = kMinusInfinity;
}

void write_out(const AttentionTask& task, int64_t first_query, int64_t num_rows, float* totals) {
    const int64_t head_dim = task.pages.head_dim;
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t query = row / task.group_heads, head = row % task.group_heads;
        float* out = task.out + (first_query + query) * task.out_stride + head * head_dim;
        const Record& total = *record_at(totals, row, head_dim);
        // Adding zero makes a negative zero positive: it could come from the 0 * value of a key that another row sees.
        for (int64_t d = 0; d < head_dim; ++d) out[d] = total.sums()[d] / total.denominator + 0.0f;
    }
}

struct Walker {
    const AttentionTask& task;
    WeightRule rule;
    int64_t first_query;
    int64_t num_queries;

    int64_t num_rows() const { return num_queries * task.group_heads; }
    int64_t position_of(int64_t row) const { return task.first_position + first_query + row / task.group_heads; }
    int64_t last_position() const { return position_of(num_rows() - 1); }
    // Of the block: what some query of the walk sees.
    KeyRange visible(int64_t block) const { return visible(block, 0, num_rows()); }
    KeyRange visible(int64_t block, int64_t row, int64_t count) const {
        return rule.visible(position_of(row), position_of(row + count - 1), block * kBlockTokens);
    }
    int64_t first_block() const {
        const int64_t first = task.window_keys ? position_of(0) - *task.window_keys + 1 : 0;
        return first > 0 ? first / kBlockTokens : 0;
    }
    int64_t end_block() const { return last_position() / kBlockTokens + 1; }

    std::byte* page_at(int64_t page) const {
        const int64_t block = task.block_table[page % task.table_width];
        return task.pages.data + (block * task.pages.num_kv_heads + task.kv_head) * task.pages.page_bytes;
    }

    // Only pages that some query sees are looked up: the table names no others.
    Block block_at(int64_t index) const {
        const KeyRange seen = visible(index);
        Block block;
        block.first_page = seen.first / kPageTokens;
        block.end_page = (seen.last + kPageTokens - 1) / kPageTokens;
        for (int64_t page = block.first_page; page < block.end_page; ++page)
            block.pages[page] = page_at(index * kBlockPages + page);
        return block;
    }

    // The block as one of a walk's tiles reads it, which fetches its share of the block after it; a tile alone fetches
    // what it reads itself a few pages later.
    template <typename Kv>
    Block for_tile(const Block& block, const Block& next, int64_t tile) const {
        const int64_t half_rows = Kv::rows_a_half(task.pages.head_dim), half_bytes = half_rows * Kv::kRowBytes;
        Block own = block;
        own.fetch_step = (Kv::kRowBytes + num_tiles<Kv>() - 1) / num_tiles<Kv>();
        own.streams = num_tiles<Kv>() == 1;
        if (own.streams) {
            const std::byte* order[2 * kBlockPages + kPagesAhead];
            int64_t length = 0;
            for (int64_t page = block.first_page; page < block.end_page; ++page) order[length++] = block.pages[page];
            for (int64_t page = block.first_page; page < block.end_page; ++page)
                order[length++] = block.pages[page] + half_bytes;
            for (int64_t i = 0; i < kPagesAhead; ++i, ++length)
                order[length] = next.first_page + i < next.end_page ? next.pages[next.first_page + i] : order[0];
            const std::byte** fetched = order + kPagesAhead;
            for (int64_t page = block.first_page; page < block.end_page; ++page) own.fetched_keys[page] = *fetched++;
            for (int64_t page = block.first_page; page < block.end_page; ++page) own.fetched_values[page] = *fetched++;
            return own;
        }
        const int64_t share = tile * half_rows * own.fetch_step;
        for (int64_t page = block.first_page; page < block.end_page; ++page) {
            const bool known = next.first_page <= page && page < next.end_page;
            own.fetched_keys[page] = (known ? next : block).pages[page] + share;
            own.fetched_values[page] = own.fetched_keys[page] + half_bytes;
        }
        return own;
    }

    template <typename Kv>
    int64_t num_tiles() const {
        return (num_rows() + Kv::kTileRows - 1) / Kv::kTileRows;
    }

    template <typename Kv>
    void prepare(const Walk& walk) const {
        const int64_t head_dim = task.pages.head_dim;
        for (int64_t i = 0; i < num_tiles<Kv>(); ++i) {
            const Tile tile = tile_at(i, num_tiles<Kv>(), num_rows());
            const float* queries[Kv::kTileRows];
            for (int64_t r = 0; r < tile.num_rows; ++r) {
                const int64_t query = (tile.row + r) / task.group_heads, head = (tile.row + r) % task.group_heads;
                queries[r] = task.queries + (first_query + query) * task.query_stride + head * head_dim;
            }
            Kv::prepare(queries, tile.num_rows, head_dim, walk.prepared + tile.row * prepared_floats(head_dim));
        }
    }

    // The parts of one tile's rows in one block.
    template <typename Kv>
    void part(const Walk& walk, Tile tile, int64_t index, Block block, float* parts) const {
        const int64_t head_dim = task.pages.head_dim;
        const KeyRange seen = visible(index, tile.row, tile.num_rows);
        if (seen.empty()) {
            for (int64_t r = 0; r < tile.num_rows; ++r) record_at(parts, r, head_dim)->reference = kMinusInfinity;
            return;
        }
        block.first_page = seen.first / kPageTokens;
        block.end_page = (seen.last + kPageTokens - 1) / kPageTokens;
        Kv::score(walk.prepared + tile.row * prepared_floats(head_dim), tile.num_rows, block, head_dim, walk.scores);
        for (int64_t r = 0; r < tile.num_rows; ++r) {
            const BlockWeights weights = rule.weigh(walk.scores + r * kBlockTokens, block.first_page * kPageTokens,
                                                    block.end_page * kPageTokens, visible(index, tile.row + r, 1));
            Record* record = record_at(parts, r, head_dim);
            record->reference = weights.reference;
            record->denominator = weights.sum;
        }
        Kv::add_values(walk.scores, tile.num_rows, block, seen, head_dim, parts);
    }
};

template <typename Kv>
void attend(const Walker& walker, const Walk& walk) {
    const int64_t head_dim = walker.task.pages.head_dim, num_rows = walker.num_rows();
    walker.prepare<Kv>(walk);
    clear(walk.totals, num_rows, head_dim);
    Block next = walker.block_at(walker.first_block());
    for (int64_t index = walker.first_block(); index < walker.end_block(); ++index) {
        const Block block = next;
        if (index + 1 < walker.end_block()) next = walker.block_at(index + 1);
        for (int64_t i = 0; i < walker.num_tiles<Kv>(); ++i) {
            const Tile tile = tile_at(i, walker.num_tiles<Kv>(), num_rows);
            walker.part<Kv>(walk, tile, index, walker.for_tile<Kv>(block, next, i), walk.parts);
            for (int64_t r = 0; r < tile.num_rows; ++r)
                join(*record_at(walk.parts, r, head_dim), *record_at(walk.totals, tile.row + r, head_dim), head_dim);
        }
    }
    write_out(walker.task, walker.first_query, num_rows, walk.totals);
}

template <typename Kv>
void attend_parts(const Walker& walker, const Walk& walk, int64_t first_block, int64_t end_block, float* parts) {
    const int64_t head_dim = walker.task.pages.head_dim, num_rows = walker.num_rows();
    walker.prepare<Kv>(walk);
    Block next = walker.block_at(first_block);
    for (int64_t index = first_block; index < end_block; ++index) {
        const Block block = next;
        if (index + 1 < end_block) next = walker.block_at(index + 1);
        for (int64_t i = 0; i < walker.num_tiles<Kv>(); ++i) {
            const Tile tile = tile_at(i, walker.num_tiles<Kv>(), num_rows);
            walker.part<Kv>(walk, tile, index, walker.for_tile<Kv>(block, next, i),
                            parts + tile.row * record_floats(head_dim));
        }
        parts += num_rows * record_floats(head_dim);
    }
}

template <typename Body>
void for_kv_type(KvType type, const Body& body) {
    if (type == KvType::kF32)
        body(FloatKv<float>{});
    else if (type == KvType::kBF16)
        body(FloatKv<uint16_t>{});
    else
        body(Int8Kv{});
}

}  // namespace

int64_t attention_queries(int64_t group_heads) { return group_heads < kWalkRows ? kWalkRows / group_heads : 1; }

int64_t attention_part_floats(int64_t head_dim) { return record_floats(head_dim); }

int64_t attention_scratch_floats(int64_t group_heads, int64_t head_dim) {
    const int64_t rows = attention_queries(group_heads) * group_heads;
    return kMostTileRows * (kBlockTokens + record_floats(head_dim)) +
           rows * (record_floats(head_dim) + prepared_floats(head_dim));
}

void attention(const AttentionTask& task, float* scratch) {
    const int64_t queries = attention_queries(task.group_heads);
    const Walk walk = walk_in(scratch, queries * task.group_heads, task.pages.head_dim);
    for (int64_t first = 0; first < task.num_queries; first += queries) {
        const int64_t rest = task.num_queries - first;
        const Walker walker{task, WeightRule(task), first, rest < queries ? rest : queries};
        for_kv_type(task.pages.type, [&](auto kv) { attend<decltype(kv)>(walker, walk); });
    }
}

void attention_parts(const AttentionTask& task, int64_t first_block, int64_t end_block, float* parts, float* scratch) {
    const Walker walker{task, WeightRule(task), 0, task.num_queries};
    const Walk walk = walk_in(scratch, walker.num_rows(), task.pages.head_dim);
    for_kv_type(task.pages.type,
                [&](auto kv) { attend_parts<decltype(kv)>(walker, walk, first_block, end_block, parts); });
}

void join_attention_parts(const AttentionTask& task, const float* parts, int64_t num_blocks, float* scratch) {
    const int64_t head_dim = task.pages.head_dim, num_rows = task.num_queries * task.group_heads;
    float* totals = walk_in(scratch, num_rows, head_dim).totals;
    clear(totals, num_rows, head_dim);
    for (int64_t i = 0; i < num_blocks * num_rows; ++i)
        join(*reinterpret_cast<const Record*>(parts + i * record_floats(head_dim)),
             *record_at(totals, i % num_rows, head_dim), head_dim);
    write_out(task, 0, num_rows, totals);
}

GEMMA2_FAST_END_ISA
