#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "cpu/kernels.h"

namespace gemma2_fast {

// Runs attention tasks on all threads. Where there are too few tasks for the threads, those of a single query are split
// over their keys, and whoever finishes a task's last piece joins them; the bits are those of the whole.
class AttentionRun {
  public:
    // Room for parts of `most_part_floats` a split task, scratch for the widest of the layers' heads.
    AttentionRun(const Kernels& kernels, int num_threads, int64_t most_tasks, int64_t most_part_floats,
                 int64_t scratch_floats);

    // What one split task of so many heads and keys needs.
    static int64_t part_floats(const Kernels& kernels, int64_t group_heads, int64_t head_dim, int64_t most_keys);

    void run(std::span<const AttentionTask> tasks, ThreadPool& threads);

  private:
    struct Piece {
        int64_t task;
        int64_t first_block, end_block;  // of kBlockTokens keys
        float* parts;                    // null: the whole task
        std::atomic<int64_t>* unfinished;
    };

    const Kernels& kernels_;
    int64_t most_split_;
    int64_t part_floats_;
    int64_t scratch_floats_;
    AlignedBuffer<float> parts_;                    // [most_split, part_floats]
    AlignedBuffer<float> scratch_;                  // [threads, scratch_floats]
    std::vector<std::atomic<int64_t>> unfinished_;  // [most_split] pieces
    std::vector<Piece> pieces_;
};

}  // namespace gemma2_fast
