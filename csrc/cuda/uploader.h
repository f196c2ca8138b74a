#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/device.h"

namespace gemma2_fast {

// Copies memory that the device cannot read by itself, a mapped file say, through two pinned buffers: one is filled
// while the device reads the other.
class Uploader {
  public:
    explicit Uploader(Stream& stream);
    ~Uploader();
    Uploader(const Uploader&) = delete;
    Uploader& operator=(const Uploader&) = delete;

    // Returns when `source` is no longer needed; the device may still be reading a buffer.
    void copy(CUdeviceptr target, const std::byte* source, int64_t num_bytes);

  private:
    struct Buffer {
        explicit Buffer(const Device& device);
        PinnedMemory memory;
        Event read;  // recorded after the device's last read
    };

    Stream& stream_;
    std::array<Buffer, 2> buffers_;
    std::size_t next_ = 0;
};

}  // namespace gemma2_fast
