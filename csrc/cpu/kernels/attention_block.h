// What the products of attention share: the pages of one block of keys and the records they add up to.
#pragma once

#include "cpu/kernels/attention_weights.h"
#include "cpu/kernels/kv_page.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kBlockPages = kBlockTokens / kPageTokens;

// A row of a task's part of the softmax: a header, then the weighted sum of values [Dp].
struct Record {
    float reference;    // the weights below are 2^(t - reference)
    float denominator;  // their sum
    float factor;       // of the sum of values
    float unused[13];   // the sums begin on a cache line
    float* sums() { return reinterpret_cast<float*>(this + 1); }
    const float* sums() const { return reinterpret_cast<const float*>(this + 1); }
};
static_assert(sizeof(Record) == 64);

constexpr int64_t kRecordHeader = sizeof(Record) / sizeof(float);
inline int64_t record_floats(int64_t head_dim) { return kRecordHeader + padded_dims(head_dim); }
inline Record* record_at(float* records, int64_t row, int64_t head_dim) {
    return reinterpret_cast<Record*>(records + row * record_floats(head_dim));
}

// Pages of one block that hold keys which some query of the walk sees.
//
// Memory works while the products compute: with each row of a page they also ask for a piece of what the walk reads
// next, into the second-level cache: the first has no room beside the present page.
struct Block {
    int64_t first_page;  // [first_page, end_page) of the block's
    int64_t end_page;
    std::byte* pages[kBlockPages];
    const std::byte* fetched_keys[kBlockPages];    // while the keys of that page are read
    const std::byte* fetched_values[kBlockPages];  // while its values are
    int64_t fetch_step;                            // bytes a row
    bool streams;                                  // the walk has no other tile
};

// A run of a block's pages whose values are added together. One tile alone streams them from memory, so it takes page
// by page, in the order they lie in; with more tiles they come from the cache, and sums stay in registers for all
// pages.
struct PageRun {
    int64_t first_page;
    int64_t end_page;
    bool first;  // else the sums so far are in the record
    bool last;
};

template <typename Body>
inline void for_page_runs(const Block& block, bool streams, const Body& body) {
    const int64_t length = streams ? 1 : kBlockPages;
    for (int64_t page = block.first_page; page < block.end_page; page += length) {
        const int64_t end = page + length < block.end_page ? page + length : block.end_page;
        body(PageRun{page, end, page == block.first_page, end == block.end_page});
    }
}

struct Fetch {
    const std::byte* from;
    int64_t step;

    template <int64_t kMostBytes>
    inline __attribute__((always_inline)) void next() {
        if constexpr (kLanes > 1) {
            for (int64_t i = 0; i < kMostBytes; i += 64) __builtin_prefetch(from + i, 0, 2);
            from += step;
        }
    }
};

}  // namespace
GEMMA2_FAST_END_ISA
