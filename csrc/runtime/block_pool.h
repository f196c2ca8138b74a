#pragma once

#include <cstdint>
#include <vector>

namespace gemma2_fast {

// A free list of equal pieces of the cache: the pages of one group, or the state slots. Every piece knows its owner, so
// a piece given back twice or by somebody else is caught where it happens and not as a wrong token much later.
class BlockPool {
  public:
    explicit BlockPool(int64_t num_blocks);  // throws CapacityError unless 1 <= num_blocks < 2^31

    int32_t take(int64_t owner);                   // throws std::logic_error when none is free
    void give_back(int32_t block, int64_t owner);  // throws std::logic_error unless owner holds the block

    int64_t num_blocks() const { return static_cast<int64_t>(owner_.size()); }
    int64_t num_free() const { return static_cast<int64_t>(free_.size()); }

  private:
    static constexpr int64_t kNobody = -1;
    std::vector<int32_t> free_;
    std::vector<int64_t> owner_;
};

}  // namespace gemma2_fast
