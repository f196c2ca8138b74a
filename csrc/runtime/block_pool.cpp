#include "runtime/block_pool.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {

BlockPool::BlockPool(int64_t num_blocks) {
    if (num_blocks < 1 || num_blocks > std::numeric_limits<int32_t>::max())
        throw CapacityError("a cache pool needs between 1 and 2^31 - 1 blocks, got " + std::to_string(num_blocks));
    owner_.assign(num_blocks, kNobody);
    free_.resize(num_blocks);
    for (int64_t i = 0; i < num_blocks; ++i)
        free_[i] = static_cast<int32_t>(num_blocks - 1 - i);  // low ids leave first
}

int32_t BlockPool::take(int64_t owner) {
    if (owner < 0) throw std::logic_error("an owner of cache blocks is a sequence id, got " + std::to_string(owner));
    if (free_.empty()) throw std::logic_error("a block was taken from an empty cache pool");
    const int32_t block = free_.back();
    free_.pop_back();
    owner_[block] = owner;
    return block;
}

void BlockPool::give_back(int32_t block, int64_t owner) {
    if (block < 0 || block >= num_blocks() || owner < 0 || owner_[block] != owner)
        throw std::logic_error("sequence " + std::to_string(owner) + " gave back cache block " + std::to_string(block) +
                               ", which it does not hold");
    owner_[block] = kNobody;
    free_.push_back(block);
}

}  // namespace gemma2_fast
