#include "cpu/attention_run.h"

#include <algorithm>

namespace gemma2_fast {
namespace {

constexpr int64_t kPiecesAThread = 4;  // a virtual CPU may be taken away
constexpr int64_t kLeastBlocks = 2;    // a piece's; less is not worth the joining

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t first_block(const AttentionTask& task) {
    const int64_t first_key = task.window_keys ? task.first_position - *task.window_keys + 1 : 0;
    return std::max<int64_t>(0, first_key) / kBlockTokens;
}

int64_t end_block(const AttentionTask& task) { return (task.first_position + task.num_queries - 1) / kBlockTokens + 1; }

}  // namespace

AttentionRun::AttentionRun(const Kernels& kernels, int num_threads, int64_t most_tasks, int64_t most_part_floats,
                           int64_t scratch_floats)
    : kernels_(kernels),
      most_split_(num_threads > 1 ? std::min<int64_t>(most_tasks, kPiecesAThread * num_threads - 1) : 0),
      part_floats_(divide_up(most_part_floats, 16) * 16),
      scratch_floats_(divide_up(scratch_floats, 16) * 16),
      parts_(static_cast<std::size_t>(most_split_ * part_floats_)),
      scratch_(static_cast<std::size_t>(num_threads * scratch_floats_)),
      unfinished_(static_cast<std::size_t>(most_split_)) {
    pieces_.reserve(static_cast<std::size_t>(most_tasks + 2 * kPiecesAThread * num_threads));
}

int64_t AttentionRun::part_floats(const Kernels& kernels, int64_t group_heads, int64_t head_dim, int64_t most_keys) {
    return (divide_up(most_keys, kBlockTokens) + 1) * group_heads * kernels.attention_part_floats(head_dim);
}

void AttentionRun::run(std::span<const AttentionTask> tasks, ThreadPool& threads) {
    const auto num_tasks = static_cast<int64_t>(tasks.size());
    const int64_t wanted = kPiecesAThread * threads.num_threads();
    int64_t piece_blocks = INT64_MAX;
    if (threads.num_threads() > 1 && num_tasks < wanted) {
        int64_t all_blocks = 0;
        for (const AttentionTask& task : tasks) all_blocks += end_block(task) - first_block(task);
        piece_blocks = std::max(kLeastBlocks, divide_up(all_blocks, wanted));
    }

    pieces_.clear();
    int64_t num_split = 0;
    for (int64_t index = 0; index < num_tasks; ++index) {
        const AttentionTask& task = tasks[index];
        const int64_t first = first_block(task), end = end_block(task);
        const int64_t block_floats = task.group_heads * kernels_.attention_part_floats(task.pages.head_dim);
        if (task.num_queries > 1 || end - first <= piece_blocks || num_split == most_split_ ||
            (end - first) * block_floats > part_floats_) {
            pieces_.push_back({index, first, end, nullptr, nullptr});
            continue;
        }
        // Pieces of nearly equal length, the boundaries anywhere: each block is a part of its own.
        const int64_t num_pieces = divide_up(end - first, piece_blocks);
        std::atomic<int64_t>* unfinished = &unfinished_[static_cast<std::size_t>(num_split)];
        *unfinished = num_pieces;
        float* parts = parts_.data() + num_split++ * part_floats_;
        for (int64_t piece = 0; piece < num_pieces; ++piece)
            pieces_.push_back({index, first + (end - first) * piece / num_pieces,
                               first + (end - first) * (piece + 1) / num_pieces, parts, unfinished});
    }

    threads.parallel_for(static_cast<int64_t>(pieces_.size()), [&](int64_t index, int thread) {
        const Piece& piece = pieces_[static_cast<std::size_t>(index)];
        const AttentionTask& task = tasks[static_cast<std::size_t>(piece.task)];
        float* scratch = scratch_.data() + thread * scratch_floats_;
        if (piece.parts == nullptr) return kernels_.attention(task, scratch);
        const int64_t first = first_block(task);
        const int64_t block_floats = task.group_heads * kernels_.attention_part_floats(task.pages.head_dim);
        kernels_.attention_parts(task, piece.first_block, piece.end_block,
                                 piece.parts + (piece.first_block - first) * block_floats, scratch);
        if (piece.unfinished->fetch_sub(1) == 1)
            kernels_.join_attention_parts(task, piece.parts, end_block(task) - first, scratch);
    });
}

}  // namespace gemma2_fast
