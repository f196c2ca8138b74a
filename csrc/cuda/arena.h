#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/device.h"

namespace gemma2_fast {

// All of a model's device memory as one allocation: first everything is reserved, then it is allocated, and from then
// on every slice has an address.
class Arena {
  public:
    struct Slice {
        int64_t offset = 0;
        int64_t num_bytes = 0;
    };

    Slice reserve(int64_t num_bytes) {
        const Slice slice{num_bytes_, num_bytes};
        num_bytes_ += (num_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
        return slice;
    }
    void allocate(const Device& device, const std::string& purpose) { memory_.emplace(device, num_bytes_, purpose); }

    CUdeviceptr at(const Slice& slice, int64_t offset_bytes = 0) const {
        return memory_.value().address() + static_cast<CUdeviceptr>(slice.offset + offset_bytes);
    }
    int64_t num_bytes() const { return num_bytes_; }

  private:
    static constexpr int64_t kAlignmentBytes = 256;

    int64_t num_bytes_ = 0;
    std::optional<DeviceMemory> memory_;
};

}  // namespace gemma2_fast
